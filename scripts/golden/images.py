#!/usr/bin/env python3
"""Makes what diffusers says of the image modes, on the miniature models in tests/fixtures/models.

    python -m pip install -r scripts/requirements.txt
    python scripts/golden/images.py

Separate from generate.py because it needs the stored models and changes none of them. In
tests/fixtures/golden/images it writes a picture and a mask, MODEL.encoded.safetensors (the VAE's
encoder), nine-channels.safetensors (conv_in of an inpainting UNet, to go in the place of sd1's),
cases.json and CASE.png. Prints every figure it asserts.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from PIL import Image, ImageDraw

from checks import FAILED, check, psnr
from goldens import load, save, scheduler

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
OUTPUT = FIXTURES / "golden" / "images"
VARIANTS = {"tiny": None, "sd1": None, "sd2": "fp16"}
NINE = "nine-channels"


def draw_inputs() -> None:
    """A picture and a mask, of sizes that are no multiples of 8 and not each other's."""
    height, width = 61, 86
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 5) * np.cos(y / 7)]
    picture = Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    pen.ellipse([20, 10, 60, 50], fill=(230, 40, 60))
    pen.rectangle([50, 30, 80, 55], fill=(20, 160, 90), outline=(255, 255, 255))
    picture.save(OUTPUT / "picture.png", optimize=True)
    mask = Image.new("L", (100, 75), 0)
    ImageDraw.Draw(mask).ellipse([30, 15, 90, 70], fill=255)
    mask.save(OUTPUT / "mask.png", optimize=True)


def cases() -> list[dict]:
    """Every case differs from its model's first ones in what its name says."""
    base = {"width": 64, "height": 48, "steps": 5, "guidance_scale": 7.5, "seed": 42}
    base |= {"prompt": "a red boat on a stormy sea", "scheduler": None, "mask": False}

    def case(model: str, name: str, strength: float, **changed) -> dict:
        return {"name": f"{model}-{name}", "model": model, "strength": strength, **base, **changed}

    found = [
        case("tiny", "image", 0.6),
        case("tiny", "image-own-size", 0.6, width=None, height=None),
        case("tiny", "image-weak", 0.21),
        case("tiny", "image-whole", 1.0),
        case("tiny", "image-guidance-1", 0.6, guidance_scale=1.0),
        case("tiny", "image-euler-a", 0.6, scheduler="euler-a"),
        case("tiny", "image-another-seed", 0.6, seed=7),
        case("tiny", "inpaint", 0.8, mask=True),
        case("tiny", "inpaint-whole", 1.0, mask=True),
        case("tiny", "inpaint-euler-a", 0.8, mask=True, scheduler="euler-a"),
        case("tiny", "inpaint-another-seed", 0.8, mask=True, seed=7),
        case("sd1", "image", 0.6),
        case("sd1", "inpaint", 0.8, mask=True),
        case("sd2", "image", 0.6),
        case("sd2", "inpaint", 0.8, mask=True, scheduler="euler"),
        case(NINE, "inpaint", 1.0, mask=True),
        case(NINE, "inpaint-weak", 0.6, mask=True),
        case(NINE, "inpaint-euler-a", 1.0, mask=True, scheduler="euler-a"),
        case(NINE, "inpaint-guidance-1", 0.6, mask=True, guidance_scale=1.0),
    ]
    return found


@torch.no_grad()
def make_nine_channels(pipe) -> None:
    """An inpainting UNet of sd1's: mask and masked latents reach what is not wired."""
    old = pipe.unet.conv_in
    new = torch.nn.Conv2d(9, old.out_channels, 3, padding=1)
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(new.weight.shape, generator=generator) * 0.4
    weight[:8] = 0
    weight[:, :4] = old.weight
    new.weight.copy_(weight.half().float())
    new.bias.copy_(old.bias)
    pipe.unet.conv_in = new
    pipe.unet.register_to_config(in_channels=9)
    save({"conv_in.weight": new.weight.half()}, OUTPUT / f"{NINE}.safetensors")


def inputs() -> tuple[Image.Image, Image.Image]:
    return load_image(str(OUTPUT / "picture.png")), load_image(str(OUTPUT / "mask.png"))


def paint(pipe, case: dict) -> np.ndarray:
    picture, mask = inputs()
    components = {**pipe.components, "requires_safety_checker": False}
    shared = {
        "prompt": case["prompt"],
        "strength": case["strength"],
        "num_inference_steps": case["steps"],
        "guidance_scale": case["guidance_scale"],
        "generator": torch.Generator("cpu").manual_seed(case["seed"]),
    }
    with scheduler(pipe, case["scheduler"]):
        components["scheduler"] = pipe.scheduler
        if case["mask"]:
            painter = StableDiffusionInpaintPipeline(**components)
            size = {"height": case["height"], "width": case["width"]}
            inpaint = {"image": picture, "mask_image": mask, **size}
        else:
            painter = StableDiffusionImg2ImgPipeline(**components)
            if case["width"]:
                processor = VaeImageProcessor(vae_scale_factor=8)
                picture = processor.resize(picture, case["height"], case["width"])
            inpaint = {"image": picture}
        painter.set_progress_bar_config(disable=True)
        return np.array(painter(**shared, **inpaint).images[0])


@torch.no_grad()
def write_encoded(vae: AutoencoderKL, model: str) -> None:
    """pixels, moments: at an odd size of latents too."""
    tensors = {}
    generator = torch.Generator().manual_seed(11)
    for name, (height, width) in {"even": (32, 16), "odd": (40, 24)}.items():
        pixels = torch.rand(1, 3, height, width, generator=generator) * 2 - 1
        tensors[f"{name}.pixels"] = pixels.half().float()
        tensors[f"{name}.moments"] = vae.encode(pixels.half().float()).latent_dist.parameters
    tensors = {n: t.half() if n.endswith("pixels") else t for n, t in tensors.items()}
    save(tensors, OUTPUT / f"{model}.encoded.safetensors")


def main() -> None:
    torch.set_num_threads(1)  # the order of additions is part of what is reproduced
    OUTPUT.mkdir(parents=True, exist_ok=True)
    draw_inputs()
    pictures = {}
    all_cases = cases()
    for model in [*VARIANTS, NINE]:
        stored = "sd1" if model == NINE else model
        pipe = load(FIXTURES / "models" / stored, variant=VARIANTS[stored])
        if model == NINE:
            make_nine_channels(pipe)
        else:
            write_encoded(pipe.vae, model)
        for case in all_cases:
            if case["model"] == model:
                pictures[case["name"]] = paint(pipe, case)
                image = Image.fromarray(pictures[case["name"]])
                image.save(OUTPUT / f"{case['name']}.png", optimize=True)
        if model == NINE:
            # What the condition is for shows.
            case = next(case for case in all_cases if case["model"] == NINE)
            pipe.unet.conv_in.weight.data[:, 4:] = 0
            without = psnr(paint(pipe, case), pictures[case["name"]])
            check("without mask and masked latents, dB", without, at_most=40)
    rows = ",\n".join(json.dumps(case) for case in all_cases)
    (OUTPUT / "cases.json").write_text(f"[\n{rows}\n]\n")
    for a, b in [
        ("tiny-image", "tiny-image-weak"),
        ("tiny-image", "tiny-image-whole"),
        ("tiny-image", "tiny-image-euler-a"),
        ("tiny-image", "tiny-image-another-seed"),
        ("tiny-image", "tiny-image-guidance-1"),
        ("tiny-inpaint", "tiny-inpaint-whole"),
        ("tiny-inpaint", "tiny-inpaint-euler-a"),
        ("tiny-inpaint", "tiny-inpaint-another-seed"),
        ("nine-channels-inpaint", "nine-channels-inpaint-weak"),
        ("nine-channels-inpaint", "nine-channels-inpaint-euler-a"),
    ]:
        check(f"{a} against {b}, dB", psnr(pictures[a], pictures[b]), at_most=40)
    for name, pixels in pictures.items():
        check(f"{name}: standard deviation of samples", pixels.std(), at_least=15)
    files = list(OUTPUT.iterdir())
    print(f"{len(files)} files, {sum(file.stat().st_size for file in files):,} bytes")
    assert not FAILED, FAILED


if __name__ == "__main__":
    main()
