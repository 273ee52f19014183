"""What the kernels of element.cu, copy.cu, norm.cu and matmul.cu must give. Separate from the large
ones, matrix_cases.py, which take the time."""

import itertools

import torch
import torch.nn.functional as F

from emulated import D, I, L, View, view

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.uint32, torch.int64]
UNARY = [
    torch.exp, lambda x: torch.log(x), torch.sin, torch.cos, torch.abs, torch.neg,
    lambda x: 1 / x, torch.square, torch.sqrt, lambda x: F.gelu(x, approximate="tanh"), F.gelu,
    torch.erf, F.relu, F.silu, torch.tanh, torch.floor, torch.ceil,
    lambda x: torch.sign(x) * torch.floor(torch.abs(x) + 0.5), torch.sign,
]
BINARY = [torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum]
# dims, strides, offset of views into 4096 elements
VIEWS = [
    ([1000], [1], 0), ([1003], [1], 8), ([7], [3], 2), ([], [], 5), ([5, 4], [0, 1], 3),
    ([3, 17, 5], [85, 5, 1], 0), ([2, 3, 5, 7], [105, 1, 21, 3], 11), ([4, 6], [1, 4], 1),
    ([2, 3, 4, 2, 3, 2], [144, 48, 12, 6, 2, 1], 16), ([3, 16, 24], [600, 32, 1], 32),
    ([2, 3, 4], [0, 0, 0], 7),
]
GRID, BLOCK = [2], [128]


def strided(stored, dims, strides, offset):
    return torch.as_strided(stored, dims, strides, offset)


def numbers(library, count, low=-3.0, high=3.0):
    return library.upload((torch.rand(count) * (high - low) + low).to(library.torch))


def unary(library):
    for op, (dims, strides, offset) in itertools.product(range(len(UNARY)), VIEWS):
        positive = op in (1, 8)
        stored = numbers(library, 4096, 0.1 if positive else -3.0)
        x = strided(stored, dims, strides, offset)
        y = library.buffer(x.numel(), library.torch)
        library.launch("unary", [stored, y, view(dims, strides, offset), (L, x.numel()), (I, op)],
                       GRID, BLOCK, 0, [y])
        yield f"unary {op} {dims}", y, UNARY[op](x.double())
        library.free()


def affine(library):
    for dims, strides, offset in VIEWS:
        stored = numbers(library, 4096)
        x = strided(stored, dims, strides, offset)
        y = library.buffer(x.numel(), library.torch)
        library.launch("affine", [stored, y, view(dims, strides, offset), (L, x.numel()),
                                  (D, 1.7), (D, -0.3)], GRID, BLOCK, 0, [y])
        yield f"affine {dims}", y, x.double() * 1.7 - 0.3
        library.free()


def binary(library):
    for op, (dims, strides, offset) in itertools.product(range(len(BINARY)), VIEWS):
        left, right = numbers(library, 4096), numbers(library, 4096, 0.5)
        x, dense = strided(left, dims, strides, offset), view(dims, None, 64)
        other = right[64:64 + x.numel()].view(dims)
        y = library.buffer(x.numel(), library.torch)
        library.launch("binary", [left, right, y, view(dims, strides, offset), dense,
                                  (L, x.numel()), (I, op)], GRID, BLOCK, 0, [y])
        yield f"binary {op} {dims}", y, BINARY[op](x.double(), other.double())
        library.free()
    # An image and a vector per channel, of which either broadcasts.
    for op, (shift, first) in itertools.product(range(len(BINARY)), [(0, 0), (4, 1), (3, 0)]):
        dims = [2, 9, 20]
        operands = [(numbers(library, 400, 0.5), dims, [180, 20, 1], 0),
                    (numbers(library, 200, 0.5), dims, [20, 0, 1], shift)]
        (left, *of_left), (right, *of_right) = operands[::-1] if first else operands
        y = library.buffer(360, library.torch)
        library.launch("binary", [left, right, y, view(*of_left), view(*of_right), (L, 360),
                                  (I, op)], GRID, BLOCK, 0, [y])
        yield f"binary {op} channels", y, BINARY[op](strided(left, *of_left).double(),
                                                     strided(right, *of_right).double())
        library.free()


def linear_combination(library):
    for terms, (dims, strides, offset) in itertools.product((1, 3, 8), VIEWS):
        stored = [numbers(library, 4096) for _ in range(terms)]
        xs = [strided(x, dims, strides, offset) for x in stored]
        factors = [0.3 * (-1.7) ** i for i in range(terms)]
        y = library.buffer(xs[0].numel(), library.torch)
        views = [view(dims, strides, offset) for _ in range(terms)]
        fields = [y] + stored + [None] * (8 - terms) + views + [View()] * (8 - terms)
        fields += [(D, factor) for factor in factors] + [(D, 0.0)] * (8 - terms)
        library.launch("linear_combination", fields + [(L, y.numel()), (I, terms)], GRID, BLOCK, 0,
                       [y])
        expected = torch.zeros(dims, dtype=torch.float64)
        for factor, x in zip(factors, xs):
            expected = expected + factor * x.double()
        yield f"linear_combination {terms} {dims}", y, expected
        library.free()


def geglu(library):
    for rows, size in [(1, 1), (5, 7), (3, 64), (7, 132)]:
        x = numbers(library, rows * size * 2)
        y = library.buffer(rows * size, library.torch)
        library.launch("geglu", [x, y, (L, rows), (I, size)], GRID, BLOCK, 0, [y])
        value, gate = x.double().view(rows, 2, size).unbind(1)
        yield f"geglu {rows} {size}", y, value * F.gelu(gate)
        library.free()


def pixels(library):
    for batch, height, width in [(1, 1, 1), (2, 5, 7), (3, 8, 6)]:
        count = batch * 3 * height * width
        x = numbers(library, count + 3, -1.3, 1.3)
        strides = [height * width * 3, 1, width * 3, 3]
        picture = strided(x, [batch, 3, height, width], strides, 3)
        y = library.buffer(count, torch.uint8)
        library.launch("pixels", [x, y, view([batch, 3, height, width], strides, 3)], GRID, BLOCK,
                       0, [y])
        wide = (picture.float() / 2 + 0.5).clamp(0, 1) * 255
        yield f"pixels {batch} {height} {width}", y, wide.round().permute(0, 2, 3, 1), True
        library.free()


def integers(count, size):
    return torch.randint(0, 256, (count * size,), dtype=torch.uint8)


def copy_view(library):
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for (size, kind), (dims, strides, offset) in itertools.product(kinds.items(), VIEWS):
        stored = library.upload(integers(4096, size).view(kind))
        x = strided(stored, dims, strides, offset)
        # Into a part of a wider tensor, as a concatenation does.
        wide = list(dims)
        if wide:
            wide[-1] += 16
        target = library.buffer(max(1, int(torch.tensor(wide or [1]).prod())), kind)
        target_strides = view(wide).strides[:len(dims)]
        at = 16 if wide else 0
        expected = target.clone()
        strided(expected, dims, target_strides, at).copy_(x)
        library.launch(f"copy_view_{size}", [stored, target, view(dims, strides, offset),
                                             view(dims, target_strides, at), (L, x.numel())],
                       GRID, BLOCK, 0, [target])
        yield f"copy_view_{size} {dims}", target, expected, True
        library.free()


def fill(library):
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for size, kind in kinds.items():
        for dims, strides, offset in VIEWS:
            if 0 in strides:
                continue
            y = library.buffer(4096, kind)
            expected = y.clone()
            strided(expected, dims, strides, offset).fill_(77)
            count = int(torch.tensor(dims or [1]).prod())
            library.launch(f"fill_{size}", [y, view(dims, strides, offset), (L, count), (L, 77)],
                           GRID, BLOCK, 0, [y])
            yield f"fill_{size} {dims}", y, expected, True
            library.free()


def as_rust(x, to):
    """Rust's `as`, which torch leaves undefined where floats do not fit."""
    if to.is_floating_point:
        wide = x.to(torch.int64) if x.dtype == torch.uint32 else x
        return wide.to(torch.float32).to(to)
    if not x.dtype.is_floating_point:
        low = x.to(torch.int64)
        return low & 0xff if to == torch.uint8 else low & 0xffffffff if to == torch.uint32 else low
    limit = {torch.uint8: (0, 255), torch.uint32: (0, 2**32 - 1),
             torch.int64: (-2**63, 2**63 - 1)}[to]
    cut = [0 if v != v else int(min(max(v, limit[0]), limit[1])) if abs(v) < 2.0**62
           else (limit[1] if v > 0 else limit[0]) for v in x.double().flatten().tolist()]
    return torch.tensor(cut, dtype=torch.int64)


def cast(library):
    special = [0.0, -0.0, 1.5, 2.5, -2.5, 255.5, 256.0, -1.0, 65504.0, 65519.9, 65520.0, 1e10,
               -1e10, 5e-8, 6e-8, 2.98e-8, 3e-8, 1e-5, 6.1e-5, float("inf"), float("-inf"),
               float("nan"), 4294967040.0, 1e19, -1e19, 1.00048828125, 3.3895e38, 1e-40]
    floats = torch.cat([torch.tensor(special), torch.randn(500) * 100, torch.randn(472) * 1e-6])
    for source, target in itertools.product(range(6), repeat=2):
        if source < 3:
            x = floats.to(TYPES[source])
        else:
            x = integers(1000, 8).view(torch.int64).to(TYPES[source])
        stored, dims, strides = library.upload(x), [10, 20, 5], [100, 1, 20]
        y = library.buffer(1000, TYPES[target])
        library.launch("cast", [stored, y, view(dims, strides), (L, 1000), (I, source),
                                (I, target)], GRID, BLOCK, 0, [y])
        expected = as_rust(strided(stored, dims, strides, 0).contiguous(), TYPES[target])
        found = y if target < 3 else y.to(torch.int64)
        yield f"cast {source} {target}", found, expected, True
        library.free()


def index_select(library):
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for (size, kind), id_type in itertools.product(kinds.items(), (3, 4, 5)):
        for dims, strides, offset, dim in [([9, 7], [8, 1], 3, 0), ([5, 9, 4], [1, 5, 45], 2, 1),
                                           ([3, 8], [8, 1], 0, 1)]:
            stored = library.upload(integers(400, size).view(kind))
            x = strided(stored, dims, strides, offset)
            ids = torch.randint(0, dims[dim], (11,)).to(TYPES[id_type])
            ids[5] = 200
            dims_out = dims[:dim] + [11] + dims[dim + 1:]
            y = library.buffer(int(torch.tensor(dims_out).prod()), kind)
            fault = library.upload(torch.zeros(1, dtype=torch.int32))
            library.launch(f"index_select_{size}", [stored, library.upload(ids), y, fault,
                                                    view(dims, strides, offset), (L, 11),
                                                    (I, dim), (I, id_type)], GRID, BLOCK, 0, [y])
            chosen = ids.to(torch.int64)
            chosen[5] = 0
            expected = x.index_select(dim, chosen).contiguous()
            expected.select(dim, 5).zero_()
            assert fault.item() == 1, "index_select: a wrong id is not noticed"
            yield f"index_select_{size} {dims}", y, expected, True
            library.free()


NORMS = [(1, 1, 4, 2), (2, 64, 32, 8), (3, 77, 30, 3), (1, 1000, 96, 32), (2, 130, 320, 32),
         (1, 50, 1284, 4), (1, 9, 10, 5)]


def group_norm(library):
    for (batch, count, channels, groups), silu, large in itertools.product(NORMS, (0, 1), (0, 1)):
        # A mean far from 0 shows sums that cancel out.
        x = library.upload((torch.randn(batch * count * channels) + 8.0).to(library.torch))
        weight, bias = numbers(library, channels), numbers(library, channels)
        y = library.buffer(x.numel(), library.torch)
        chunk = max(1, 4096 // channels)
        chunks = -(-count // chunk)
        partials = library.buffer(batch * groups * chunks * 2, torch.float32)
        stats = library.buffer(batch * groups * 2, torch.float32)
        fields = [x, weight, bias, y, partials, stats, (L, count), (I, batch), (I, channels),
                  (I, groups), (I, chunk), (I, chunks), (I, silu), (D, 1e-5)]
        if large:
            shared = 4 * (max(channels, 1024) + groups)
            library.launch("group_norm_partials", fields, [chunks, batch], [256], shared,
                           [partials])
            library.launch("group_norm_combine", fields, [groups, batch], [128], 0, [stats])
            library.launch("group_norm_apply", fields, [3, batch], [256], 0, [y])
        else:
            library.launch("group_norm", fields, [groups, batch], [256], 0, [y])
        wide = x.double().view(batch, count, channels).transpose(1, 2)
        expected = F.group_norm(wide, groups, weight.double(), bias.double(), 1e-5).transpose(1, 2)
        yield f"group_norm {large} {count} {channels}", y, F.silu(expected) if silu else expected
        library.free()


def layer_norm(library):
    for rows, size in [(1, 1), (5, 7), (17, 320), (9, 1283)]:
        x = library.upload((torch.randn(rows * size) + 8.0).to(library.torch))
        weight, bias = numbers(library, size), numbers(library, size)
        y = library.buffer(x.numel(), library.torch)
        library.launch("layer_norm", [x, weight, bias, y, (L, rows), (I, size), (D, 1e-5)],
                       [-(-rows // 8)], [256], 0, [y])
        wide = x.double().view(rows, size)
        yield f"layer_norm {rows} {size}", y, F.layer_norm(wide, [size], weight.double(),
                                                           bias.double(), 1e-5)
        library.free()


def reduce(library):
    for op, (rows, size) in itertools.product(range(3), [(1, 1), (5, 7), (17, 320), (9, 1283)]):
        x = numbers(library, rows * size)
        wide = x.double().view(rows, size)
        expected = [wide.sum(1), wide.amin(1), wide.amax(1)][op]
        for name, grid, block in [("reduce", -(-rows // 8), 256), ("reduce_long", rows, 1024)]:
            y = library.buffer(rows, library.torch)
            library.launch(name, [x, y, (L, rows), (L, size), (I, op)], [grid], [block], 0, [y])
            yield f"{name} {op} {size}", y, expected
        library.free()


# dims and strides of both operands, with an offset
MATRICES = [
    ([1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]), ([2, 5, 7], [35, 7, 1], [2, 7, 3], [21, 3, 1]),
    ([3, 33, 70], [0, 70, 1], [3, 70, 40], [2800, 1, 70]),
    ([1, 64, 32], [0, 1, 64], [1, 32, 31], [0, 40, 1]),
    ([1, 1, 500], [0, 0, 1], [1, 500, 9], [0, 9, 1]),
]


def matmul(library):
    for dims, strides, other_dims, other_strides in MATRICES:
        left, right = numbers(library, 9000), numbers(library, 9000)
        of_left, of_right = (dims, strides, 5), (other_dims, other_strides, 3)
        expected = strided(left, *of_left).double() @ strided(right, *of_right).double()
        y = library.buffer(expected.numel(), library.torch)
        grid = [-(-other_dims[2] // 32), -(-dims[1] // 32), dims[0]]
        library.launch("matmul", [left, right, y, view(*of_left), view(*of_right)], grid, [256], 0,
                       [y])
        yield f"matmul {dims} {strides}", y, expected
        library.free()


CASES = [unary, affine, binary, linear_combination, geglu, pixels, copy_view, fill, cast,
         index_select, group_norm, layer_norm, reduce, matmul]
