"""Writes tests/fixtures/vaes: VAEs that are given apart from their model, with what diffusers makes
of them.

    python tests/generate_vaes.py       (torch 2.15.0, diffusers 0.42.1, safetensors)

`tiny/` is an AutoencoderTiny with random weights, in diffusers layout, and fewer and narrower blocks
than TAESD's. `tiny.safetensors` has latents and the image that its decoder makes of them, `tiny.png`
the picture of case base of tests/fixtures/golden/tiny with it in the place of the model's VAE.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"
OUT = FIXTURES / "vaes"


@torch.no_grad()
def build() -> AutoencoderTiny:
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4,
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 2, 1, 1),
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(21)
    for name, parameter in vae.named_parameters():
        parameter.normal_(generator=generator)
        if parameter.dim() > 1:
            parameter.mul_(1.3 / parameter[0].numel() ** 0.5)
        else:
            parameter.mul_(0.2)
    last = vae.decoder.layers[-1]
    last.weight.mul_(0.06)
    last.bias.fill_(0.5)
    return vae.half()


@torch.no_grad()
def main():
    OUT.mkdir(parents=True, exist_ok=True)
    vae = build()
    vae.save_pretrained(OUT / "tiny")
    vae = vae.float()
    generator = torch.Generator().manual_seed(22)
    latents = torch.randn(2, 4, 6, 5, generator=generator) * 2
    image = vae.decode(latents / vae.config.scaling_factor).sample
    assert image.shape[1:] == (3, 48, 40)
    save_file({"latents": latents, "image": image}, OUT / "tiny.safetensors")

    case = next(
        case
        for case in json.loads((FIXTURES / "golden" / "tiny" / "cases.json").read_text())
        if case["name"] == "base"
    )
    pipeline = StableDiffusionPipeline.from_pretrained(
        FIXTURES / "models" / "tiny", vae=vae, torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        case["prompt"], negative_prompt=case["negative_prompt"], width=case["width"],
        height=case["height"], num_inference_steps=case["steps"],
        guidance_scale=case["guidance_scale"],
        generator=torch.Generator().manual_seed(case["seed"]),
    ).images[0]  # fmt: skip
    picture.save(OUT / "tiny.png")
    pixels = torch.tensor(list(picture.tobytes())).double()
    spread, clipped = pixels.std(), (pixels % 255 == 0).double().mean()
    print(f"spread {spread:.0f}, {clipped:.1%} clipped; image {image.std():.2f}")
    assert spread > 20 and clipped < 0.2


if __name__ == "__main__":
    main()
