"""What convolutions, linear layers and attention must give. Separate from simple_cases.py because
these are run with every tile size and take most of the time."""

import ctypes
import itertools

import torch
import torch.nn.functional as F

from emulated import I, L

FLOAT = ctypes.c_float

ACTIVATIONS = [lambda x: x, F.silu, lambda x: x * torch.sigmoid(1.702 * x), F.gelu]
TILES = [("conv2d_large", 128, 256), ("conv2d_small", 64, 128)]


def normal(library, count, factor=1.0):
    return library.upload((torch.randn(count) * factor).to(library.torch))


# batch, height, width, channels, out, kernel, stride, padding, enlarged, bias, residual, activation
CONVOLUTIONS = [
    (1, 9, 7, 4, 70, 3, 1, 1, None, 1, 0, 0), (1, 6, 5, 3, 5, 3, 1, 1, None, 1, 1, 1),
    (2, 13, 11, 40, 132, 3, 1, 1, None, 1, 1, 0), (1, 12, 12, 8, 24, 3, 2, 1, None, 1, 0, 2),
    (3, 5, 4, 16, 64, 3, 1, 1, (10, 8), 1, 0, 3), (1, 7, 5, 48, 65, 3, 1, 1, (11, 9), 0, 1, 0),
    (2, 8, 8, 96, 33, 1, 1, 0, None, 0, 0, 1), (1, 10, 9, 12, 8, 5, 3, 2, None, 1, 0, 0),
    (1, 4, 4, 1, 1, 1, 1, 0, None, 0, 0, 0), (1, 8, 9, 10, 6, 3, 2, 0, None, 1, 1, 0),
    (1, 3, 3, 320, 136, 3, 1, 1, None, 1, 0, 0), (1, 2, 2, 8, 8, 3, 1, 1, None, 1, 0, 0),
]


def launch_tiles(library, fields, y, out, name, expected):
    """With both tiles, and with the sum in one piece, in 3, and in more than there are steps."""
    rows = y.numel() // out
    for (kernel, tile, threads), splits in itertools.product(TILES, (1, 3, 40)):
        if splits == 40 and y.numel() > 1000:
            continue
        y.fill_(float("nan"))
        grid = [-(-rows // tile), -(-out // tile), splits]
        partials = library.buffer(splits * y.numel(), torch.float32) if splits > 1 else None
        given = fields[:5] + [partials] + fields[5:] + [(I, splits)]
        library.launch(kernel, given, grid, [threads], 0, [y if splits == 1 else partials])
        if splits > 1:
            library.launch("conv2d_join", given, [3], [128], 0, [y])
        yield f"{kernel} {splits} {name}", y, expected


def conv2d(library):
    for case in CONVOLUTIONS:
        (batch, height, width, channels, out, kernel, stride, padding, enlarged, with_bias,
         with_residual, activation) = case
        x = normal(library, batch * height * width * channels)
        weight = normal(library, out * kernel * kernel * channels, (kernel**2 * channels)**-0.5)
        picture = x.double().view(batch, height, width, channels).permute(0, 3, 1, 2)
        if enlarged:
            rows = torch.arange(enlarged[0]) * height // enlarged[0]
            columns = torch.arange(enlarged[1]) * width // enlarged[1]
            picture = picture[:, :, rows][:, :, :, columns]
        filters = weight.double().view(out, kernel, kernel, channels).permute(0, 3, 1, 2)
        bias = normal(library, out) if with_bias else None
        wide = F.conv2d(picture, filters, bias.double() if with_bias else None, stride, padding)
        expected = ACTIVATIONS[activation](wide.permute(0, 2, 3, 1))
        out_h, out_w = expected.shape[1:3]
        residual = normal(library, expected.numel()) if with_residual else None
        if with_residual:
            expected = expected + residual.double().view(expected.shape)
        y = library.buffer(expected.numel(), library.torch)
        fields = [x, weight, bias, residual, y]
        fields += [(I, n) for n in (batch, height, width, channels, out, kernel, kernel, stride,
                                    padding, *(enlarged or (0, 0)), out_h, out_w, activation)]
        yield from launch_tiles(library, fields, y, out, case, expected)
        library.free()


# rows, in, out, bias, residual, activation, elements by which x is off the aligned address
LINEARS = [
    (1, 1, 1, 0, 0, 0, 0), (77, 768, 64, 1, 0, 2, 0), (130, 40, 129, 1, 1, 0, 0),
    (5, 37, 11, 1, 0, 3, 0), (200, 72, 200, 0, 1, 1, 0), (33, 64, 130, 1, 0, 0, 3),
    (2, 1280, 8, 1, 0, 1, 0), (64, 32, 64, 1, 0, 0, 0), (257, 8, 3, 1, 1, 0, 0),
]


def linear(library):
    for case in LINEARS:
        rows, size, out, with_bias, with_residual, activation, shift = case
        x = normal(library, shift + rows * size)[shift:]
        weight = normal(library, out * size, size**-0.5)
        bias = normal(library, out) if with_bias else None
        expected = F.linear(x.double().view(rows, size), weight.double().view(out, size),
                            bias.double() if with_bias else None)
        expected = ACTIVATIONS[activation](expected)
        residual = normal(library, rows * out) if with_residual else None
        if with_residual:
            expected = expected + residual.double().view(rows, out)
        y = library.buffer(rows * out, library.torch)
        fields = [x, weight, bias, residual, y]
        fields += [(I, n) for n in (rows, 1, 1, size, out, 1, 1, 1, 0, 0, 0, 1, 1, activation)]
        yield from launch_tiles(library, fields, y, out, case, expected)
        library.free()


# batch, heads, head_dim, queries, keys, causal, what a row has beside the heads, spread of scores
ATTENTIONS = [
    (1, 1, 8, 1, 1, 0, 0, 1), (2, 3, 40, 70, 77, 0, 0, 1), (1, 2, 40, 65, 65, 1, 80, 1),
    (3, 2, 64, 33, 33, 1, 0, 1), (1, 8, 80, 5, 130, 0, 16, 4), (1, 1, 128, 64, 64, 0, 0, 1),
    (2, 1, 160, 66, 77, 0, 0, 1), (1, 2, 160, 100, 100, 1, 3, 1), (1, 2, 48, 129, 200, 0, 0, 8),
    (1, 1, 72, 130, 31, 0, 1, 1), (1, 1, 512, 40, 70, 0, 0, 1), (1, 2, 37, 35, 35, 1, 5, 1),
    (1, 1, 104, 3, 64, 0, 0, 1), (1, 1, 300, 33, 32, 0, 2, 1),
]
HEADS = [48, 64, 80, 128, 160]


def attention(library):
    for case in ATTENTIONS:
        batch, heads, head_dim, queries, keys, causal, beside, spread = case
        inner = heads * head_dim
        row = inner + beside
        stored = [normal(library, batch * count * row, factor)
                  for count, factor in ((queries, spread), (keys, 1.0), (keys, 1.0))]
        # The last row of a buffer ends where it may no longer be touched: heads lie at its end.
        stored = [x[beside:] for x in stored]
        views = [torch.as_strided(x, (batch, count, inner), (count * row, row, 1))
                 for x, count in zip(stored, (queries, keys, keys))]
        split = [x.double().reshape(batch, -1, heads, head_dim).transpose(1, 2) for x in views]
        scale = head_dim**-0.5
        scores = split[0] @ split[1].transpose(2, 3) * scale
        if causal:
            scores += torch.full((queries, keys), float("-inf")).triu(1)
        expected = (scores.softmax(-1) @ split[2]).transpose(1, 2).reshape(batch, queries, inner)
        y = library.buffer(expected.numel(), library.torch)
        fields = list(stored) + [y]
        fields += [(L, n) for count in (queries, keys, keys) for n in (count * row, row)]
        fields += [(I, n) for n in (batch, heads, head_dim, queries, keys, causal)]
        fields.append((FLOAT, scale))
        chosen = [("attention_general", 32, 256)]
        if head_dim % 8 == 0:
            # Larger forms than the one that fits must be right too.
            chosen += [(f"attention_{limit}", 64, 128) for limit in HEADS if limit >= head_dim]
        for kernel, tile, threads in chosen:
            if kernel in library.names():
                y.fill_(float("nan"))
                library.launch(kernel, fields, [-(-queries // tile), heads, batch], [threads], 0,
                               [y])
                yield f"{kernel} {case}", y, expected
        library.free()


CASES = [conv2d, linear, attention]
