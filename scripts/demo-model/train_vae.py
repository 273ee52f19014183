"""Trains the VAE of the built-in model: 128x128 pictures to latents of 4x16x16 and back.

Most of the training sees crops of 64x64, which costs a quarter; the last fifth sees whole
pictures. Goes on from `WORK/vae.checkpoint` where there is one, and leaves `WORK/vae`.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

import parallel
from portraits import draw, sample

WHOLE = 0.8  # from this part of the training on, whole pictures
RATE = 2e-3
CROPS = 16  # of 64x64 in a batch, over all processes; or a fourth as many whole pictures


def model():
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, norm_num_groups=8, sample_size=128,
    )


def batch(chance, count, side):
    """Pictures in -1..1, or crops of them: (count, 3, side, side)."""
    pictures = []
    for _ in range(count):
        picture = draw(sample(chance), chance)
        y, x = (8 * chance.randint(0, (128 - side) // 8) for _ in range(2))
        pictures.append(picture[y : y + side, x : x + side])
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous().to(parallel.DEVICE)


def edges(x):
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def losses(vae, x):
    """The loss, and the mean squared error of the reconstruction."""
    with torch.autocast(parallel.DEVICE.type, torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
    y = y.float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    squared = ((y - x) ** 2).mean()
    gradient = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x)))
    return (y - x).abs().mean() + squared + 0.5 * gradient + 3e-5 * kl, squared.item()


def rate(step, steps):
    return RATE * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-5


def train(rank, processes, steps, work):
    torch.manual_seed(0)
    vae = model().to(parallel.DEVICE)
    with torch.no_grad():  # start with little noise in the latents
        vae.quant_conv.bias[4:] = -5.0
        vae.quant_conv.weight[4:] *= 0.1
    gradients = parallel.Gradients(vae.parameters())
    optimizer = torch.optim.AdamW(
        vae.parameters(), RATE, (0.9, 0.99), weight_decay=1e-4, fused=True)
    average, start = parallel.Average(vae.parameters(), 0.998), 0
    checkpoint = work / "vae.checkpoint"
    if checkpoint.exists():
        kept = torch.load(checkpoint, map_location=parallel.DEVICE)
        vae.load_state_dict(kept["vae"])
        optimizer.load_state_dict(kept["optimizer"])
        average.mean, start = kept["average"], kept["step"]
    began, errors = time.time(), []
    for step in range(start, steps):
        chance = random.Random(f"vae {rank} {step}")
        torch.manual_seed(1_000_003 * rank + step)
        crops = step < WHOLE * steps
        side, count = (64, CROPS // processes) if crops else (128, CROPS // 4 // processes)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        gradients.zero()
        loss, error = losses(vae, batch(chance, count, side))
        loss.backward()
        gradients.share(1.0)
        optimizer.step()
        average.update(step)
        errors.append(error)
        if rank == 0 and (step + 1) % 200 == 0:
            psnr = 10 * math.log10(4 / np.mean(errors))
            speed = (step + 1 - start) / (time.time() - began)
            print(f"step {step + 1}: {psnr:.2f} dB, {speed:.2f} steps/s", flush=True)
            errors.clear()
        if rank == 0 and (step + 1) % 1000 == 0:
            parallel.save(checkpoint, dict(vae=vae.state_dict(), optimizer=optimizer.state_dict(),
                                           average=average.mean, step=step + 1))
    if rank == 0:
        average.swap()
        finish(vae.eval(), work, steps)


@torch.inference_mode()
def finish(vae, work, steps):
    """Standardises the latents, so that `scaling_factor` is 1, and saves and measures."""
    chance = random.Random("vae validation")
    pictures = batch(chance, 256, 128)
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in pictures.split(32)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae.quant_conv.weight[:4] /= std.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - mean) / std
    vae.quant_conv.bias[4:] -= 2 * std.log()
    post = vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in pictures.split(32)])
    decoded = torch.cat([vae.decode(z).sample for z in latents.split(32)])
    psnr = 10 * math.log10(4 / ((decoded - pictures) ** 2).mean())
    print(f"validation: {psnr:.2f} dB; latents' mean {latents.mean():.3f}, std {latents.std():.3f}")
    vae.save_pretrained(work / "vae")
    facts = dict(steps=steps, crops=steps * CROPS, psnr_db=round(psnr, 2))
    (work / "vae.json").write_text(json.dumps(facts) + "\n")
    rows = [torch.cat(list(half[:10]), 2) for half in (pictures, decoded)]
    rows += [torch.cat(list(half[10:20]), 2) for half in (pictures, decoded)]
    sheet = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu()
    Image.fromarray(sheet.numpy()).save(work / "vae.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--processes", type=int, default=parallel.PROCESSES)
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    parallel.spawn(train, args.processes, args.steps, args.work)


if __name__ == "__main__":
    main()
