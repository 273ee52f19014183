"""Compares every CUDA kernel, run on the CPU, with torch, and compiles all of them with NVRTC. See
README.md. `check.py [WORD]…` checks only kernels whose names contain a word."""

import os
import pathlib
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import simple_cases
from emulated import Library
import compiled

try:
    import matrix_cases
    CASES = simple_cases.CASES + matrix_cases.CASES
except ImportError:
    CASES = simple_cases.CASES

NAMES = ["f32", "f16", "bf16"]
TOLERANCES = [1e-5, 2e-3, 1.6e-2]
# (dtype, architecture): 750 is the oldest; it has no cp.async and no tensor cores for bf16.
BUILDS = [(0, 800), (1, 800), (2, 800), (1, 750), (2, 750)]


def difference(found, expected, exact):
    """Relative to the largest value; for exact ones the number of differences."""
    found, expected = found.flatten(), expected.flatten()
    if found.numel() != expected.numel():
        return float("inf")
    if exact:
        found, expected = found.double(), expected.double()
        return float((~((found == expected) | (found.isnan() & expected.isnan()))).sum())
    error = (found.double() - expected).abs().max()
    largest = expected.abs().max().clamp(min=1e-30)
    return float(error / largest) if error == error else float("inf")


def check_case(case, library, tolerance):
    """The number of comparisons, the worst error, and the names of those that failed."""
    count, worst, failed = 0, 0.0, []
    torch.manual_seed(0)
    for name, found, expected, *exact in case(library):
        error = difference(found, expected, bool(exact))
        count, worst = count + 1, max(worst, error)
        if error > (0.0 if exact else tolerance):
            failed.append(f"{name}: {error:.2e}")
    return count, worst, failed


def main():
    words, failures, uses, all_names = sys.argv[1:], [], set(), set()
    with tempfile.TemporaryDirectory() as folder:
        libraries = [Library(pathlib.Path(folder), *build) for build in BUILDS]
        titles = [f"{NAMES[dtype]} sm_{arch // 10}" for dtype, arch in BUILDS]
        print(f"{'emulated':20}" + "".join(f"{title:>16}" for title in titles), flush=True)
        for case in CASES:
            if words and not any(word in case.__name__ for word in words):
                continue
            cells = []
            for library, title in zip(libraries, titles):
                count, worst, failed = check_case(case, library, TOLERANCES[library.dtype])
                cells.append(f"{count}: {worst:.1e}{' !' if failed else ''}")
                failures += [f"{title} {name}" for name in failed]
            print(f"{case.__name__:20}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
        for library in libraries:
            uses |= library.uses
            all_names |= library.names()
    if not words:
        failures += [f"{name} is not checked" for name in sorted(all_names - uses)]
        failures += compiled.check()
    for failure in failures:
        print("FAILED", failure)
    print(f"{len(failures)} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
