"""Puts the trained parts together in diffusers' layout, `models/demo`, in halves, with its card.

The scheduler is DPM-Solver++ on the schedule that was trained on, and `defaults.json` has what
tiny-sd takes for flags that are not given.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

import portraits
from train_unet import SCHEDULE

DEFAULTS = {"steps": 20, "guidance-scale": 3.0}
INDEX = dict(
    _class_name="StableDiffusionPipeline", feature_extractor=[None, None],
    requires_safety_checker=False, safety_checker=[None, None],
    scheduler=["diffusers", "DPMSolverMultistepScheduler"],
    text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
    unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"],
)
UNRELATED = ("_name_or_path", "transformers_version", "_diffusers_version")


def tidy(path, **more):
    """Leaves out of a configuration which versions wrote it, and where."""
    config = json.loads(path.read_text()) | more
    for name in UNRELATED:
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


CARD = """\
---
license: mit OR apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# The built-in model of tiny-sd

Cartoon portraits of 128x128 from a prompt, by latent diffusion: CLIP's text encoder, UNet and VAE
in miniature, all trained from scratch by `scripts/demo-model` on pictures that the same folder draws.
No picture, weight or text of anybody else went into it. It is for trying tiny-sd where there is no
network, and for its tests.

| | parameters | trained on |
|---|---|---|
| VAE, 4 channels of an eighth of the side | {vae:,} | {crops:,} crops of 64x64, {vae_steps:,} steps: {psnr_db} dB |
| text encoder and UNet | {text:,} + {unet:,} | {samples:,} samples of {pictures:,} pictures, {unet_steps:,} steps of 64: mean squared error of the velocity {loss} |

## What it can draw

A girl, woman, boy or man from the front, and of them:

- hair: {hair}; long, short, curly, a ponytail or a bun (girls), short, spiky or curly (boys)
- skin: {skin}
- glasses or sunglasses; a cap or beanie of a colour, a crown, a top hat; a beard (boys)
- a shirt: {shirts}
- a background: {backgrounds}

What a prompt leaves out is left to the seed, but for glasses, hats and beards: where a person is named,
they are there when they are asked for, and else not. Pairs of hair and background that training has
never seen ({held_out} of 56) come out too; the tests ask for those alone.

## What it cannot

The mouth is left to the seed, whatever a prompt says: of "smiling", "serious" and "surprised" about
a third comes out, which is chance.

Nor can it draw anything else: a prompt for a fox or a landscape gives some portrait. The words are
English, and few. Two people, bodies, other views and other sizes than 128x128 are none that it has
seen: larger pictures repeat parts. Cartoons of so few features show stereotypes: "girl" and
"boy" differ here by lashes, hair and shoulders, because that is how they were drawn.

## Licence

MIT or Apache-2.0, as tiny-sd: the code that drew the pictures, the pictures and the weights.
"""


def card(work, parts):
    vae, unet = (json.loads((work / f"{name}.json").read_text()) for name in ("vae", "unet"))
    every = [portraits.Portrait("girl", "long", hair, "pale", "none", "none", "red", "smile", False,
                                "red", background)
             for hair in portraits.HAIR_COLORS for background in portraits.BACKGROUNDS]
    return CARD.format(
        vae=parts["vae"], text=parts["text_encoder"], unet=parts["unet"], crops=vae["crops"],
        vae_steps=vae["steps"], psnr_db=vae["psnr_db"], unet_steps=unet["steps"],
        samples=unet["samples"], pictures=unet["pictures"], loss=unet["loss"],
        held_out=sum(portrait.held_out() for portrait in every),
        **{name: ", ".join(values) for name, values in dict(
            hair=portraits.HAIR_COLORS, skin=portraits.SKINS, shirts=portraits.SHIRTS,
            backgrounds=portraits.BACKGROUNDS).items()},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    parts = {}
    for model, name in (
        (CLIPTextModel, "text_encoder"), (UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"),
    ):
        part = model.from_pretrained(args.work / name).to(torch.float16)
        part.save_pretrained(args.output / name)
        parts[name] = part.num_parameters()
        tidy(args.output / name / "config.json")
    shutil.copytree(args.work / "tokenizer", args.output / "tokenizer", dirs_exist_ok=True)
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, timestep_spacing="trailing")
    scheduler.save_pretrained(args.output / "scheduler")
    # As Stable Diffusion's has it: for DDIM and DDPM, which clip samples where nothing is said.
    tidy(args.output / "scheduler/scheduler_config.json", clip_sample=False)
    (args.output / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    (args.output / "defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    (args.output / "README.md").write_text(card(args.work, parts))
    files = [path for path in args.output.rglob("*") if path.is_file()]
    print(f"{sum(path.stat().st_size for path in files)} bytes in {len(files)} files")


if __name__ == "__main__":
    main()
