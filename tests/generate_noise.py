"""Writes tests/fixtures/noise.json: random numbers of torch's CPU generator.

Needs torch. Run it from the repository's root: python tests/generate_noise.py
"""

import json

import torch

SEEDS = [0, 1, 42, 2**32 + 5, 2**64 - 1]
COUNTS = [1, 4, 7, 15, 16, 17, 31, 64, 16384]
SUCCESSIONS = [
    # Each count of its own, then draws that leave an odd normal for the next small draw.
    *([count] for count in COUNTS),
    [3, 16, 1, 31, 2, 64, 15, 17, 5, 16384, 4],
]


def summary(values):
    doubles = values.double()
    places = (torch.arange(len(values)) % 97 - 48).double() / 48
    return {
        "count": len(values),
        "first": [float(f"{v:.9g}") for v in values[:6].tolist()],
        "last": [float(f"{v:.9g}") for v in values[-4:].tolist()],
        "sum": doubles.sum().item(),
        "placed_sum": (doubles * places).sum().item(),
    }


def generator(seed):
    return torch.Generator("cpu").manual_seed(seed)


cases = []
for seed in SEEDS:
    source = generator(seed)
    singles = torch.rand(8, generator=source)
    skipped = 2000  # the state is renewed every 624 outputs
    torch.rand(skipped, generator=source)
    doubles = torch.rand(8, generator=source, dtype=torch.float64)
    uniforms = {
        "seed": seed,
        "uniform_bits_24": [int(v * 2**24) for v in singles.tolist()],
        "skipped": skipped,
        "uniform_bits_53": [int(v * 2**53) for v in doubles.tolist()],
    }
    for index, counts in enumerate(SUCCESSIONS):
        source = generator(seed)
        draws = [summary(torch.randn(count, generator=source)) for count in counts]
        bits = uniforms if index == 0 else {
            "seed": seed, "uniform_bits_24": [], "skipped": 0, "uniform_bits_53": []
        }
        cases.append({**bits, "draws": draws})

with open("tests/fixtures/noise.json", "w") as out:
    out.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
