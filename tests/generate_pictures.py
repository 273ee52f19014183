"""Writes tests/fixtures/pictures.safetensors: what Pillow reads from files, and how it resizes.

Needs torch 2.15, diffusers 0.42, Pillow 13 and numpy. Run it from the repository's root:
python tests/generate_pictures.py

NAME.file are a file's bytes and NAME.rgb the pixels that diffusers' load_image gives for it (upright,
RGB). resize.N.from and resize.N.to are a picture before and after VaeImageProcessor's resize, and
mask.from, mask.to and mask.latents a mask before and after that of StableDiffusionInpaintPipeline, and
as large as the latents.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

OUTPUT = Path("tests/fixtures/pictures.safetensors")
RANDOM = np.random.default_rng(1)
ORIENTATION = 0x0112
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="7"/></x:xmpmeta>'


def smooth(height: int, width: int) -> np.ndarray:
    """Colours that JPEG keeps well, and that tell each corner from the others."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / width, 255 * y / height, 255 * (x + y) / (height + width)]
    return np.stack(channels, axis=2).astype(np.uint8)


def noise(height: int, width: int) -> np.ndarray:
    """Rough, and often at the ends of the range."""
    values = RANDOM.integers(-100, 356, (height, width, 3))
    return np.clip(values, 0, 255).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def deep_png() -> bytes:
    """16 bits a sample, which Pillow cannot write in RGB."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    samples = RANDOM.integers(0, 65536, (5, 6, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", 6, 5, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def oriented(number: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = number
    return exif.tobytes()


def files() -> dict[str, bytes]:
    picture = Image.fromarray(smooth(17, 24))
    rough = Image.fromarray(noise(6, 7))
    alpha = Image.fromarray(RANDOM.integers(0, 256, (6, 7, 4)).astype(np.uint8), "RGBA")
    palette = rough.quantize(9)
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", XMP)
    found = {
        "png-rgb": saved(rough, "PNG"),
        "png-rgba": saved(alpha, "PNG"),
        "png-palette": saved(palette, "PNG"),
        "png-palette-transparent": saved(palette, "PNG", transparency=3),
        "png-rgb-transparent": saved(rough, "PNG", transparency=rough.getpixel((0, 0))),
        "png-grey": saved(rough.convert("L"), "PNG"),
        "png-grey-alpha": saved(alpha.convert("LA"), "PNG"),
        "png-one-bit": saved(rough.convert("1"), "PNG"),
        "png-deep": deep_png(),
        "png-turned": saved(rough, "PNG", exif=oriented(6)),
        "png-turned-by-xmp": saved(rough, "PNG", pnginfo=xmp),
        "webp-lossless": saved(rough, "WEBP", lossless=True),
        "webp-lossless-alpha": saved(alpha, "WEBP", lossless=True, exact=True),
        "webp-turned": saved(rough, "WEBP", lossless=True, exif=oriented(8)),
        "lossy-webp": saved(picture, "WEBP", quality=90),
        "lossy-jpeg": saved(picture, "JPEG", quality=90),
        "lossy-jpeg-progressive": saved(picture, "JPEG", quality=90, progressive=True),
        "lossy-jpeg-full-colour": saved(picture, "JPEG", quality=90, subsampling=0),
        "lossy-jpeg-grey": saved(picture.convert("L"), "JPEG", quality=90),
        "lossy-jpeg-cmyk": saved(picture.convert("CMYK"), "JPEG", quality=90),
    }
    for number in range(1, 9):
        options = {"exif": oriented(number), "quality": 90, "subsampling": 0}
        found[f"lossy-jpeg-turned-{number}"] = saved(picture, "JPEG", **options)
    return found


RESIZES = [
    ((17, 24), (40, 56)),
    ((64, 48), (24, 16)),
    ((50, 33), (48, 32)),
    ((7, 5), (64, 8)),
    ((90, 80), (8, 8)),
    ((1, 1), (8, 8)),
    ((2, 3), (24, 40)),
    ((16, 16), (16, 40)),
    ((16, 16), (40, 16)),
    ((31, 29), (32, 24)),
    # Pillow 13 begins with the columns where height goes down by more than twice what width does.
    ((60, 50), (48, 64)),
    ((67, 24), (32, 16)),
    ((49, 64), (25, 50)),
    ((67, 30), (32, 16)),
]


def main() -> None:
    tensors = {}
    for name, file in files().items():
        pixels = np.array(load_image(Image.open(io.BytesIO(file))))
        tensors[f"{name}.file"] = torch.from_numpy(np.frombuffer(file, np.uint8).copy())
        tensors[f"{name}.rgb"] = torch.from_numpy(pixels)
    processor = VaeImageProcessor(vae_scale_factor=8)
    for index, (before, (height, width)) in enumerate(RESIZES):
        pixels = noise(*before)
        resized = processor.resize(Image.fromarray(pixels), height, width)
        tensors[f"resize.{index}.from"] = torch.from_numpy(pixels)
        tensors[f"resize.{index}.to"] = torch.from_numpy(np.array(resized))
    masks = VaeImageProcessor(
        vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    pixels = noise(60, 50)
    pixels[20:40, 10:30] = 255
    mask = masks.preprocess(Image.fromarray(pixels), height=48, width=64)
    latents = torch.nn.functional.interpolate(mask, size=(6, 8))
    tensors["mask.from"] = torch.from_numpy(pixels)
    tensors["mask.to"] = mask[0, 0].to(torch.uint8)
    tensors["mask.latents"] = latents[0, 0].to(torch.uint8)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, OUTPUT)
    print(f"{len(tensors)} tensors, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
