"""Renders the portraits that the UNet is trained on, and encodes them: `WORK/latents.pt`."""

import argparse
import dataclasses
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

import parallel
from portraits import draw, sample


@torch.inference_mode()
def encode(rank, processes, count, work):
    vae = AutoencoderKL.from_pretrained(work / "vae").eval().to(parallel.DEVICE)
    chance, began = random.Random(f"latents {rank}"), time.time()
    portraits, latents = [], []
    while len(portraits) < count // processes:
        batch = [sample(chance) for _ in range(25)]
        pictures = np.stack([draw(portrait, chance) for portrait in batch])
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast(parallel.DEVICE.type, torch.bfloat16):
            encoded = vae.encode(x.to(parallel.DEVICE)).latent_dist.mean
            latents.append(encoded.float().cpu().clone())
        portraits += [dataclasses.astuple(portrait) for portrait in batch]
    parallel.save(work / f"latents.{rank}", dict(portraits=portraits, latents=torch.cat(latents)))
    if rank == 0:
        print(f"{len(portraits) * processes / (time.time() - began):.0f} pictures/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--count", type=int, default=36000)
    parser.add_argument("--processes", type=int, default=parallel.PROCESSES)
    args = parser.parse_args()
    parallel.spawn(encode, args.processes, args.count, args.work)
    paths = [args.work / f"latents.{rank}" for rank in range(args.processes)]
    parts = [torch.load(path) for path in paths]
    latents = torch.cat([part["latents"] for part in parts])
    portraits = [portrait for part in parts for portrait in part["portraits"]]
    parallel.save(args.work / "latents.pt", dict(portraits=portraits, latents=latents))
    [path.unlink() for path in paths]
    print(f"{len(portraits)} latents: mean {latents.mean():.3f}, std {latents.std():.3f}")


if __name__ == "__main__":
    main()
