"""Makes a model of segmind/tiny-sd's layout and size (1.06 GB, f16) with random weights.

Separate because it knows nothing of checks: full-size.json, which make_layout.py writes, says
names, shapes, means and deviations; here bytes are made of them, in seconds and with the standard
library alone, so that no weights have to be carried. The same bytes come out everywhere.

An f16 is two bytes. The upper one (sign, exponent, two bits of the mantissa) is a random byte that
a table sends to the normal distribution's quantile of its rank; the lower one is random as it is.
"""

import json
import random
import shutil
import struct
from pathlib import Path
from statistics import NormalDist, pstdev

LAYOUT = Path(__file__).resolve().parent / "full-size.json"
SEED = 20
CHUNK = 1 << 22  # elements


def make(folder: Path, tokenizer: Path) -> int:
    """Writes the model and says how many bytes its weights have."""
    layout = json.loads(LAYOUT.read_text())
    for path, value in layout["files"].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(value, indent=2) + "\n")
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    return sum(
        write(folder / path, rows, SEED + index)
        for index, (path, rows) in enumerate(layout["weights"].items())
    )


def write(path: Path, rows: list, seed: int) -> int:
    """One safetensors file: the header's length, the header, and the elements of all tensors."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, *_ in rows:
        start, end = end, end + 2 * elements(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = random.Random(seed)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape, mean, deviation, *runs in rows:
            draw(file, elements(shape), mean, deviation, runs[0] if runs else [], generator)
        return file.tell()


def draw(file, count: int, mean: float, deviation: float, runs: list, generator) -> None:
    upper = table(mean, deviation)
    for start in range(0, count, CHUNK):
        length = min(CHUNK, count - start)
        values = bytearray(2 * length)
        values[0::2] = generator.randbytes(length)
        values[1::2] = generator.randbytes(length).translate(upper)
        if runs:
            if length < count:
                raise ValueError(f"a tensor of {count} elements with runs is longer than a chunk")
            lay(values, runs)
        file.write(values)


def lay(values: bytearray, runs: list) -> None:
    """Writes runs [first element, elements, value] over what was drawn."""
    for first, length, value in runs:
        values[2 * first : 2 * (first + length)] = struct.pack("<e", value) * length


def table(mean: float, deviation: float) -> bytes:
    """For each byte, the upper byte of an f16 that stands for the quantile of its rank."""
    quantiles = [NormalDist().inv_cdf((rank + 0.5) / 256) for rank in range(256)]
    spread = pstdev(quantiles)  # a little below 1, as the tails end
    codes = [
        struct.pack("<e", mean + deviation * quantile / spread)[1] for quantile in quantiles
    ]
    return bytes(codes)


def elements(shape: list) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
