"""What diffusers draws with the built-in model: the golden pictures of `tests/demo`."""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = (
    "Portrait of a pretty girl with red hair",
    "portrait of a boy with spiky blonde hair and sunglasses, green shirt, purple background",
    "a wizard in a deep forest",
    "",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models/demo")
    parser.add_argument("--output", type=Path, default=ROOT / "tests/fixtures/demo")
    args = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    defaults = json.loads((args.model / "defaults.json").read_text())
    pictures = {}
    for i, prompt in enumerate(PROMPTS):
        image = pipeline(
            prompt, num_inference_steps=defaults["steps"],
            guidance_scale=defaults["guidance-scale"], output_type="pt",
            generator=torch.Generator().manual_seed(i),
        ).images[0]
        pictures[str(i)] = (image.permute(1, 2, 0) * 255).round().byte().contiguous()
    args.output.mkdir(parents=True, exist_ok=True)
    save_file(pictures, args.output / "golden.safetensors")
    (args.output / "golden.json").write_text(json.dumps(PROMPTS, indent=1) + "\n")


if __name__ == "__main__":
    main()
