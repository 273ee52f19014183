"""Trains the probe of the tests: a small network that tells glasses, hats and the like from a
picture, where looking at a colour is not enough. It sees what portraits look like after the VAE.

Leaves the weights and a sheet of portraits with what they show, which `tests/demo/measure.rs`
reads, and prints how often the probe is right.
"""

import argparse
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from portraits import GLASSES, HATS, MOUTHS, draw, sample

HEADS = dict(glasses=GLASSES, hat=HATS, mouth=MOUTHS, person=("girl", "boy"), beard=(False, True))
SIDE = 32  # pixels of what it sees
CHANNELS = (3, 16, 24, 32)  # of three convolutions of 3x3 that halve the side
DECODED = 0.15  # of the pictures


def seen(pictures):
    """Pictures in 0..1 of (batch, 3, 128, 128) as the probe sees them: means of 4x4."""
    return functional.avg_pool2d(pictures, 128 // SIDE)


@torch.inference_mode()
def data(vae, chance, count, decoded):
    """Inputs and labels, a part of them after the VAE."""
    inputs, labels = [], []
    for _ in range(count // 40):
        portraits = [sample(chance, chance.random() < 0.1) for _ in range(40)]
        pictures = np.stack([draw(portrait, chance) for portrait in portraits])
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        part = int(decoded * 40)
        with torch.autocast("cpu", torch.bfloat16):
            back = vae.decode(vae.encode(x[:part] * 2 - 1).latent_dist.mean).sample
        x[:part] = (back.float() / 2 + 0.5).clamp(0, 1)
        inputs.append(seen(x))
        labels.append(torch.tensor([[values.index(getattr(portrait, name))
                                     for name, values in HEADS.items()] for portrait in portraits]))
    return torch.cat(inputs).clone(), torch.cat(labels).clone()


def network(weights, x):
    for i in range(len(CHANNELS) - 1):
        x = torch.relu(functional.conv2d(x, weights[f"{i}.weight"], weights[f"{i}.bias"], 2, 1))
    out = x.flatten(1) @ weights["out.weight"].T + weights["out.bias"]
    return out.split([len(values) for values in HEADS.values()], 1)


def right(weights, x, labels):
    guesses = network(weights, x)
    return {name: (guess.argmax(1) == labels[:, i]).float().mean().item()
            for i, (name, guess) in enumerate(zip(HEADS, guesses))}


def sheet(output):
    """Forty portraits, drawn and not decoded, and what they show in the words of the tests."""
    chance = random.Random("sheet")
    portraits = [sample(chance, i % 5 == 0) for i in range(40)]
    pictures = [draw(portrait, chance) for portrait in portraits]
    rows = [np.concatenate(pictures[i : i + 8], 1) for i in range(0, 40, 8)]
    Image.fromarray(np.concatenate(rows, 0)).save(output / "portraits.png", optimize=True)
    labels = [dict(dataclasses.asdict(p), beard="beard" if p.beard else "none") for p in portraits]
    (output / "portraits.json").write_text(json.dumps(labels, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--count", type=int, default=12000)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.work / "vae").eval()
    x, labels = data(vae, random.Random("probe"), args.count, DECODED)
    test, test_labels = data(vae, random.Random("probe test"), 400, 1.0)
    outputs = sum(len(values) for values in HEADS.values())
    features = CHANNELS[-1] * (SIDE // 2 ** (len(CHANNELS) - 1)) ** 2
    weights = {
        "out.weight": torch.randn(outputs, features) * 0.03, "out.bias": torch.zeros(outputs),
    }
    for i, (inner, outer) in enumerate(zip(CHANNELS, CHANNELS[1:])):
        weights[f"{i}.weight"] = torch.randn(outer, inner, 3, 3) * (2 / (9 * inner)) ** 0.5
        weights[f"{i}.bias"] = torch.zeros(outer)
    parameters = [weight.requires_grad_() for weight in weights.values()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.02)
    steps = 3000
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (1 - step / steps) * 2)
        chosen = torch.randint(len(x), (128,))
        noisy = x[chosen] + torch.randn(128, 3, SIDE, SIDE) * 0.04
        guesses = network(weights, noisy)
        loss = sum(functional.cross_entropy(guess, labels[chosen, i])
                   for i, guess in enumerate(guesses))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kept = {name: weight.detach().to(torch.float16) for name, weight in weights.items()}
    print({name: round(share, 3) for name, share in
           right({n: w.float() for n, w in kept.items()}, test, test_labels).items()})
    args.output.mkdir(parents=True, exist_ok=True)
    save_file(kept, args.output / "probe.safetensors")
    sheet(args.output)


if __name__ == "__main__":
    main()
