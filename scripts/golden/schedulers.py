#!/usr/bin/env python3
"""Makes tests/fixtures/golden/tiny/schedulers.safetensors: the latents of every scheduler's picture.

    python -m pip install -r scripts/requirements.txt
    python scripts/golden/schedulers.py

One picture each from StableDiffusionPipeline on the stored model tiny, with the noise that the
pipeline draws from one generator. generate.py makes it, too, after the models.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

import goldens
import named

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
STEPS = 5


def write(output: Path) -> None:
    """NAME [1, 4, 8, 8], with each of the class's spacings of sigmas, too."""
    torch.set_num_threads(1)
    pipe = goldens.load(output / "models" / "tiny")
    own = pipe.scheduler
    tensors = {}
    for name in named.names():
        tensors[name] = latents(pipe, named.stepper(name, own.config))
    save_file(tensors, output / "golden" / "tiny" / "schedulers.safetensors")
    print(f"{len(tensors)} schedulers")


def latents(pipe, stepper) -> torch.Tensor:
    pipe.scheduler = stepper
    generator = torch.Generator("cpu").manual_seed(42)
    result = pipe(
        goldens.PROMPT, height=64, width=64, num_inference_steps=STEPS, generator=generator,
        output_type="latent",
    )
    assert result.images.isfinite().all(), stepper
    return result.images.contiguous()


if __name__ == "__main__":
    write(FIXTURES)
