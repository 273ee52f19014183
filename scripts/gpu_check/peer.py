"""diffusers on the same model and settings, as a program of its own: a line of JSON a finding.

    python3 peer.py '{"model": "/tmp/tiny-sd", "device": "cuda", "modes": ["eager"], …}'

Separate, and never imported by the others, because it alone needs torch and diffusers: if they are
missing, fail or hang, only this process does. Lines come as soon as something is known, so what
was found before a limit of time is kept.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

DTYPES = {"f16": torch.float16, "f32": torch.float32}


def tell(**finding) -> None:
    print(json.dumps(finding), flush=True)


def load(asked: dict, dtype: str) -> StableDiffusionPipeline:
    for library in [diffusers_logging, transformers_logging]:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    # The name of this argument has changed: dtype is the newer one.
    for name in ["torch_dtype", "dtype"]:
        pipe = StableDiffusionPipeline.from_pretrained(
            asked["model"], safety_checker=None, local_files_only=True, **{name: DTYPES[dtype]}
        )
        if pipe.unet.dtype == DTYPES[dtype]:
            break
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == DTYPES[dtype]
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(asked["device"])


def synchronize(asked: dict) -> None:
    if asked["device"].startswith("cuda"):
        torch.cuda.synchronize()


def picture(pipe: StableDiffusionPipeline, asked: dict, job: dict):
    """The picture and its seconds; noise is drawn in f32 on the CPU, as tiny-sd draws it."""
    generator = torch.Generator("cpu").manual_seed(job["seed"])
    noise = torch.randn(1, 4, job["height"] // 8, job["width"] // 8, generator=generator)
    synchronize(asked)
    started = time.monotonic()
    image = pipe(
        job["prompt"],
        width=job["width"],
        height=job["height"],
        num_inference_steps=job["steps"],
        guidance_scale=job["guidance_scale"],
        latents=noise.to(asked["device"], pipe.unet.dtype),
    ).images[0]
    synchronize(asked)
    return image, time.monotonic() - started


def measure(pipe: StableDiffusionPipeline, asked: dict, mode: str, warm_ups: int = 1) -> None:
    """Warms up outside of the timing, then times each job."""
    on_gpu = asked["device"].startswith("cuda")
    started = time.monotonic()
    for _ in range(warm_ups):
        image, _ = picture(pipe, asked, asked["jobs"][0])
    warm_up_s = time.monotonic() - started
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for job in asked["jobs"]:
        seconds.append(picture(pipe, asked, job)[1])
    file = Path(asked["folder"]) / f"{mode}.png"
    image.save(file)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    tell(mode=mode, seconds=seconds, warm_up_s=warm_up_s, peak_bytes=peak, picture=str(file))


def compiled(pipe: StableDiffusionPipeline, mode: str) -> None:
    """As diffusers' documentation has it: UNet and decoder, channels_last."""
    how = {"mode": "reduce-overhead", "fullgraph": True} if mode == "compile-graphs" else {}
    pipe.unet = torch.compile(pipe.unet, **how)
    # Only the UNet repeats; CUDA graphs of the decoder would hold memory for one replay.
    pipe.vae.decode = torch.compile(pipe.vae.decode)


def half_precision(asked: dict) -> None:
    pipe = load(asked, "f16")
    for mode in [name for name in asked["modes"] if name != "f32"]:
        try:
            if mode != "eager":
                pipe.unet.to(memory_format=torch.channels_last)
                pipe.vae.to(memory_format=torch.channels_last)
            if mode.startswith("compile"):
                torch._dynamo.reset()
                own = pipe.unet, pipe.vae.decode
                compiled(pipe, mode)
                try:
                    measure(pipe, asked, mode, warm_ups=2)
                finally:
                    pipe.unet, pipe.vae.decode = own
            else:
                measure(pipe, asked, mode)
        except Exception as error:  # One mode that fails is no reason to lack the others.
            tell(mode=mode, error=f"{type(error).__name__}: {error}"[:500])


def full_precision(asked: dict) -> None:
    """One picture in f32, with no product in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    try:
        measure(load(asked, "f32"), asked | {"jobs": asked["jobs"][:2]}, "f32")
    except Exception as error:
        tell(mode="f32", error=f"{type(error).__name__}: {error}"[:500])


def main() -> None:
    asked = json.loads(sys.argv[1])
    names = ["torch", "diffusers", "transformers"]
    versions = {name: importlib.metadata.version(name) for name in names}
    tf32 = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    tell(versions=versions, tf32=tf32, threads=torch.get_num_threads())
    # f32 is before what compiles, which may take all the time that there is.
    early = {**asked, "modes": [mode for mode in asked["modes"] if "compile" not in mode]}
    late = {**asked, "modes": [mode for mode in asked["modes"] if "compile" in mode]}
    if early["modes"]:
        half_precision(early)
    if "f32" in asked["modes"]:
        full_precision(asked)
    if late["modes"]:
        half_precision(late)


if __name__ == "__main__":
    main()
