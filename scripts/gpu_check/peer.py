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


def one_mode(pipe: StableDiffusionPipeline, asked: dict, mode: str) -> None:
    if mode not in ("eager", "f32"):
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if not mode.startswith("compile"):
        measure(pipe, asked, mode)
        return
    torch._dynamo.reset()
    own = pipe.unet, pipe.vae.decode
    compiled(pipe, mode)
    try:
        # The second one records CUDA graphs.
        measure(pipe, asked, mode, warm_ups=2)
    finally:
        pipe.unet, pipe.vae.decode = own


def main() -> None:
    asked = json.loads(sys.argv[1])
    # f32 is compared with ours, which has all bits of f32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    names = ["torch", "diffusers", "transformers"]
    versions = {name: importlib.metadata.version(name) for name in names}
    tell(versions=versions, threads=torch.get_num_threads())
    pipe = None
    for mode in asked["modes"]:
        dtype = "f32" if mode == "f32" else "f16"
        try:
            if pipe is None or pipe.unet.dtype != DTYPES[dtype]:
                pipe = None  # One after the other, so that memory at most is of one.
                pipe = load(asked, dtype)
            jobs = asked["jobs"][:2] if mode == "f32" else asked["jobs"]
            one_mode(pipe, asked | {"jobs": jobs}, mode)
        except Exception as error:  # One mode that fails is no reason to lack the others.
            tell(mode=mode, error=f"{type(error).__name__}: {error}"[:500])


if __name__ == "__main__":
    main()
