"""What diffusers and transformers compute from the stored models, stage by stage.

Weights are f16 on disk; everything here is computed in f32 from them.
"""

import contextlib
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

import named
from prompts import OVER_LONG

# Those with a picture and trajectories of every model; schedulers.py has all.
SCHEDULERS = ["dpm++2m", "ddim", "pndm", "euler", "euler-a"]

PROMPT = "Portrait of a pretty girl"
NEGATIVE = "ugly, blurry"
FRACTIONAL_TIMESTEP = 333.25


def load(
    folder: Path, variant: str | None = None, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    for library in [diffusers_logging, transformers_logging]:
        library.set_verbosity(library.CRITICAL)  # pickles are what is meant to be loaded
        library.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, dtype=dtype, variant=variant, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def scheduler(pipe: StableDiffusionPipeline, name: str | None):
    """The pipeline with another scheduler, as `from_config` switches; its own afterwards."""
    own = pipe.scheduler
    if name is not None:
        pipe.scheduler = named.stepper(name, own.config)
    try:
        yield pipe
    finally:
        pipe.scheduler = own


def picture(pipe: StableDiffusionPipeline, case: dict, record: list | None = None) -> np.ndarray:
    """One case through the whole pipeline: u8, height × width × 3.

    `record` collects (timestep, latents after it).
    """

    def on_step_end(_pipe, _step, timestep, tensors):
        if record is not None:
            record.append((float(timestep), tensors["latents"].float().clone()))
        return tensors

    with scheduler(pipe, case["scheduler"]), f32_noise():
        result = pipe(
            case["prompt"],
            negative_prompt=case["negative_prompt"],
            width=case["width"],
            height=case["height"],
            num_inference_steps=case["steps"],
            guidance_scale=case["guidance_scale"],
            generator=torch.Generator("cpu").manual_seed(case["seed"]),
            callback_on_step_end=on_step_end,
        )
    return np.array(result.images[0])


@contextlib.contextmanager
def f32_noise():
    """Noise is drawn in f32 whatever the pipeline's dtype is, so that f64 starts from the same."""
    randn = torch.randn

    def drawn_in_f32(*shape, dtype=None, **others):
        return randn(*shape, dtype=torch.float32, **others).to(dtype or torch.float32)

    torch.randn = drawn_in_f32
    try:
        yield
    finally:
        torch.randn = randn


def cases(own_scheduler: str) -> list[dict]:
    """The final pictures; every case differs from `base` in what its name says."""
    base = {
        "prompt": PROMPT,
        "negative_prompt": None,
        "width": 64,
        "height": 64,
        "steps": 4,
        "guidance_scale": 7.5,
        "seed": 42,
        "scheduler": None,
    }
    changes = {
        "base": {},
        "another-prompt": {"prompt": "a red boat on a stormy sea"},
        "another-seed": {"seed": 2**40 + 7},
        "negative-prompt": {"negative_prompt": NEGATIVE},
        "empty-prompt": {"prompt": ""},
        "over-long-prompt": {"prompt": OVER_LONG},
        "non-latin-and-emoji": {"prompt": "漂亮女孩的肖像, Привет, café 👩‍🚀🏽!"},
        "guidance-1": {"guidance_scale": 1.0},
        "tall-192x64": {"width": 64, "height": 192},
        "odd-latents-72x40": {"width": 40, "height": 72},
        "one-step": {"steps": 1},
    }
    named = [{"name": name, **base, **change} for name, change in changes.items()]
    for name in SCHEDULERS:
        if name != own_scheduler:
            named.append({"name": f"scheduler-{name}", **base, "scheduler": name})
    return named


def write_cases(pipe, spec, folder: Path) -> dict[str, np.ndarray]:
    """<case>.png and cases.json."""
    pictures = {}
    all_cases = cases(spec.own_scheduler)
    for case in all_cases:
        pictures[case["name"]] = picture(pipe, case)
        Image.fromarray(pictures[case["name"]]).save(folder / f"{case['name']}.png", optimize=True)
    rows = ",\n".join(json.dumps(case) for case in all_cases)
    (folder / "cases.json").write_text(f"[\n{rows}\n]\n")
    return pictures


@torch.no_grad()
def write_stages(pipe, folder: Path) -> dict[str, torch.Tensor]:
    """stages.safetensors: tokens, embeddings, one UNet evaluation, VAE decode."""
    tensors = {}
    for name, prompt in [("prompt", PROMPT), ("negative", NEGATIVE), ("over_long", OVER_LONG)]:
        tokens = pipe.tokenizer(
            prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        tensors[f"{name}_ids"] = tokens.input_ids
        tensors[f"{name}_embeddings"] = pipe.text_encoder(tokens.input_ids)[0]
    both = torch.cat([tensors["negative_embeddings"], tensors["prompt_embeddings"]])
    generator = torch.Generator().manual_seed(7)
    sizes = {"unet": (8, 8), "unet_tall": (24, 8), "unet_odd": (9, 5)}
    for name, (height, width) in sizes.items():
        sample = torch.randn(2, 4, height, width, generator=generator)
        tensors[f"{name}_sample"] = sample
        tensors[f"{name}_output"] = pipe.unet(sample, FRACTIONAL_TIMESTEP, both).sample
    tensors["unet_timestep"] = torch.tensor([FRACTIONAL_TIMESTEP])
    for name, (height, width) in {"vae": (8, 8), "vae_odd": (9, 5)}.items():
        latents = torch.randn(1, 4, height, width, generator=generator) * 1.3
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        tensors[f"{name}_latents"] = latents
        tensors[f"{name}_image"] = image
        pixels = pipe.image_processor.postprocess(image, output_type="pil")[0]
        tensors[f"{name}_pixels"] = torch.from_numpy(np.array(pixels))
    save(tensors, folder / "stages.safetensors")
    return tensors


def write_trajectories(pipe, folder: Path) -> None:
    """trajectories.safetensors: the latents after every evaluation, for every scheduler."""
    tensors = {}
    base = cases("")[0]
    for name in SCHEDULERS:
        for steps in [4, 7]:
            record: list = []
            picture(pipe, {**base, "scheduler": name, "steps": steps}, record)
            with scheduler(pipe, name):
                pipe.scheduler.set_timesteps(steps)
                sigma = torch.as_tensor(pipe.scheduler.init_noise_sigma, dtype=torch.float32)
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(42))
            latents = [noise * sigma, *(latents for _, latents in record)]
            key = f"{name}.{steps}"
            tensors[f"{key}.timesteps"] = torch.tensor([t for t, _ in record], dtype=torch.float64)
            tensors[f"{key}.latents"] = torch.cat(latents)
    save(tensors, folder / "trajectories.safetensors")


def write_schedules(configs: dict[str, dict], folder: Path) -> None:
    """schedules.safetensors: the schedulers alone, from each published config.

    Element i of the model's output is 0.8 × (scaled sample)_i + 0.3 × sin(i + timestep / 100).
    """
    tensors = {}
    for config_name, config in configs.items():
        source = getattr(__import__("diffusers"), config["_class_name"]).from_config(config)
        for name in SCHEDULERS:
            for steps in [1, 2, 3, 10, 25]:
                timesteps, samples = linear_trajectory(
                    named.kind(name).from_config(source.config), steps
                )
                key = f"{config_name}.{name}.{steps}"
                tensors[f"{key}.timesteps"] = timesteps
                tensors[f"{key}.samples"] = samples
    # What a config that does not say skip_prk_steps means for PNDM: Runge-Kutta steps first.
    runge_kutta = {k: v for k, v in configs["tiny"].items() if k != "skip_prk_steps"}
    for steps in [10, 25]:
        timesteps, samples = linear_trajectory(PNDMScheduler.from_config(runge_kutta), steps)
        tensors[f"tiny-without-skip_prk_steps.pndm.{steps}.timesteps"] = timesteps
        tensors[f"tiny-without-skip_prk_steps.pndm.{steps}.samples"] = samples
    save(tensors, folder / "schedules.safetensors")


def linear_trajectory(stepper, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    stepper.set_timesteps(steps)
    generator = torch.Generator().manual_seed(3)
    index = torch.arange(16, dtype=torch.float32).reshape(1, 1, 4, 4)
    sample = torch.randn(1, 1, 4, 4, generator=generator) * stepper.init_noise_sigma
    samples = [sample]
    extra = {"generator": generator} if "AncestralD" in type(stepper).__name__ else {}
    for timestep in stepper.timesteps:
        scaled = stepper.scale_model_input(sample, timestep)
        output = 0.8 * scaled + 0.3 * torch.sin(index + timestep / 100)
        sample = stepper.step(output, timestep, sample, **extra).prev_sample.float()
        samples.append(sample)
    return stepper.timesteps.double(), torch.cat(samples).reshape(-1, 16)


def write_noise(folder: Path) -> None:
    """noise.safetensors: torch.randn from the CPU generator, several draws one after the other."""
    tensors = {}
    for seed in [0, 1, 42, 2**32 - 1, 2**32 + 1, 2**63 - 1]:
        generator = torch.Generator("cpu").manual_seed(seed)
        for draw, length in enumerate([256, 1, 15, 16, 17, 24, 31, 100, 1000]):
            tensors[f"{seed}.{draw}"] = torch.randn(length, generator=generator)
    save(tensors, folder / "noise.safetensors")


def save(tensors: dict, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
