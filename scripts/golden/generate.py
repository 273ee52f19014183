#!/usr/bin/env python3
"""Makes tests/fixtures: miniature random-weight models as published, and what diffusers says.

    python -m pip install -r scripts/requirements.txt
    python scripts/golden/generate.py

Prints every figure it asserts. Everything is seeded: a second run gives the same files.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch

import checks
import goldens
import schedulers
import tokens
from configs import SPECS
from models import build, write

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
MERGES_IN_MINIATURE = 1000
LARGEST_BYTES = 7_000_000


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--output", type=Path, default=FIXTURES)
    arguments.add_argument("--only", choices=[spec.name for spec in SPECS], help="one model")
    options = arguments.parse_args()
    torch.set_num_threads(1)  # the order of additions is part of what is reproduced
    golden = options.output / "golden"
    golden.mkdir(parents=True, exist_ok=True)
    merges = tokens.download_merges()
    if options.only is None:
        tokens.write_tokenizer_goldens(options.output, merges)
        goldens.write_noise(golden)
        goldens.write_schedules({spec.name: spec.scheduler for spec in SPECS}, golden)
    for spec in SPECS:
        if options.only in [None, spec.name]:
            make(spec, merges[:MERGES_IN_MINIATURE], options.output)
    if options.only in [None, "tiny"]:
        schedulers.write(options.output)
    files = [path for path in options.output.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {total:,} bytes")
    assert total <= LARGEST_BYTES
    assert not checks.FAILED, checks.FAILED


def make(spec, merges: list[str], output: Path) -> None:
    started = time.monotonic()
    print(f"{spec.name}:")
    folder, golden = output / "models" / spec.name, output / "golden" / spec.name
    for path in [folder, golden]:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    networks = build(spec)
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}
    print(f"{spec.name}: parameters {counts}")
    write(spec, networks, folder)
    one_file = spec.layout == "safetensors"
    tokens.write_model_tokenizer(folder / "tokenizer", merges, spec.pad_token, one_file)
    if spec.layout == "pickle":
        checks.check_pickle(folder / "unet" / "diffusion_pytorch_model.bin", channels_last=True)
        checks.check_pickle(folder / "vae" / "diffusion_pytorch_model.bin", channels_last=False)
        checks.check_pickle(folder / "text_encoder" / "pytorch_model.bin", channels_last=False)
    pipe = goldens.load(folder, variant="fp16" if spec.layout == "sharded-fp16" else None)
    assert_loaded(pipe, networks)
    stages = goldens.write_stages(pipe, golden)
    checks.check_stages(pipe, stages)
    goldens.write_trajectories(pipe, golden)
    pictures = goldens.write_cases(pipe, spec, golden)
    checks.check_pictures(pictures, spec.own_scheduler)
    checks.check_precision(pipe, stages, pictures, spec.own_scheduler)
    print(f"{spec.name}: {time.monotonic() - started:.0f} s")


def assert_loaded(pipe, networks: dict) -> None:
    """What diffusers read back is what was written, whatever the files call it."""
    for name, network in networks.items():
        loaded = getattr(pipe, name).state_dict()
        for key, tensor in network.state_dict().items():
            assert torch.equal(loaded[key], tensor.float()), f"{name}: {key}"


if __name__ == "__main__":
    main()
