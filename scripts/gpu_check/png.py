"""Pixels of PNG files, and how far two pictures are apart.

Separate because files of equal pictures differ (each records the device that made it), so pixels
have to be compared, on machines where no library for pictures is installed.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}


@dataclass
class Picture:
    width: int
    height: int
    pixels: bytes


def same(one: Path, other: Path) -> bool:
    """Whether every pixel is the same; quick where the filtered rows are, too."""
    return chunks(one) == chunks(other) or read(one) == read(other)


def chunks(path: Path) -> tuple:
    """The header and the filtered rows."""
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{path} is no PNG")
    place, parts, head = 8, [], b""
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        content = data[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            head = content
        elif kind == b"IDAT":
            parts.append(content)
        place += 12 + length
    return head, zlib.decompress(b"".join(parts))


def read(path: Path) -> Picture:
    """An 8-bit PNG that is neither indexed nor interlaced; alpha, if any, is left out."""
    head, rows = chunks(path)
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", head)
    if depth != 8 or interlace or colour not in CHANNELS:
        raise ValueError(f"{path}: {depth} bits, colour type {colour}, interlace {interlace}")
    channels = CHANNELS[colour]
    pixels = unfilter(rows, width * channels, height, channels)
    if channels == 4:
        kept = bytearray(width * height * 3)
        for channel in range(3):
            kept[channel::3] = pixels[channel::4]
        pixels = bytes(kept)
    return Picture(width, height, pixels)


def unfilter(data: bytes, row_bytes: int, height: int, step: int) -> bytes:
    if len(data) != (row_bytes + 1) * height:
        raise ValueError(f"{len(data)} bytes of pixels where {(row_bytes + 1) * height} are due")
    above, rows = bytearray(row_bytes), []
    for index in range(height):
        start = index * (row_bytes + 1)
        row = bytearray(data[start + 1 : start + 1 + row_bytes])
        undo(data[start], row, above, step)
        rows.append(row)
        above = row
    return b"".join(rows)


def undo(kind: int, row: bytearray, above: bytearray, step: int) -> None:
    """Undoes the filter of one row in place."""
    if kind == 1:
        for place in range(step, len(row)):
            row[place] = (row[place] + row[place - step]) & 255
    elif kind == 2:
        for place, up in enumerate(above):
            row[place] = (row[place] + up) & 255
    elif kind == 3:
        for place, up in enumerate(above):
            left = row[place - step] if place >= step else 0
            row[place] = (row[place] + (left + up) // 2) & 255
    elif kind == 4:
        for place, up in enumerate(above):
            left, corner = (row[place - step], above[place - step]) if place >= step else (0, 0)
            row[place] = (row[place] + paeth(left, up, corner)) & 255
    elif kind != 0:
        raise ValueError(f"there is no filter {kind}")


def paeth(left: int, up: int, corner: int) -> int:
    to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    if to_left <= to_up and to_left <= to_corner:
        return left
    return up if to_up <= to_corner else corner


def psnr(one: Picture, other: Picture) -> float:
    """In dB; infinite where every pixel is the same."""
    if (one.width, one.height) != (other.width, other.height):
        raise ValueError("the sizes differ")
    if one.pixels == other.pixels:
        return math.inf
    squares = sum((a - b) ** 2 for a, b in zip(one.pixels, other.pixels))
    return 10 * math.log10(255**2 * len(one.pixels) / squares)


def deviation(picture: Picture) -> float:
    """The standard deviation of all samples: near 0 in a picture of nothing."""
    count = len(picture.pixels)
    mean = sum(picture.pixels) / count
    return math.sqrt(sum(value * value for value in picture.pixels) / count - mean * mean)


def saturated(picture: Picture) -> float:
    """The share of samples that are 0 or 255."""
    ends = picture.pixels.count(0) + picture.pixels.count(255)
    return ends / len(picture.pixels)
