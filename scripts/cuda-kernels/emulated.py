"""Builds the kernels for the CPU and runs them on numpy arrays. Separate from check.py because that
says what is right, this only how to run."""

import ctypes
import functools
import pathlib
import subprocess

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ROOT / "src/backend/cuda/kernels"
EMULATOR = ROOT / "tests/cuda"
TORCH = [torch.float32, torch.float16, torch.bfloat16]

P, I, L, D = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_double


class View(ctypes.Structure):
    _fields_ = [("rank", I), ("dims", I * 6), ("strides", L * 6), ("offset", L)]


def view(dims, strides=None, offset=0):
    if strides is None:
        strides = [int(np.prod(dims[d + 1:])) for d in range(len(dims))]
    return View(len(dims), (I * 6)(*dims), (L * 6)(*strides), offset)


class Library:
    """The kernels of one dtype as they would be compiled for one architecture."""

    def __init__(self, folder, dtype, arch):
        self.dtype, self.arch, self.torch = dtype, arch, TORCH[dtype]
        path = folder / f"kernels-{dtype}-{arch}.so"
        command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
                   "-ffp-contract=off", f"-DDTYPE={dtype}", f"-DARCH={arch}", f"-I{KERNELS}",
                   f"-I{EMULATOR}", "-o", str(path), "-xc"]
        command += [str(source) for source in sorted(KERNELS.glob("*.cu"))]
        command += [str(EMULATOR / "emulator.c"), "-lm"]
        subprocess.run(command, check=True)
        self.library, self.path = ctypes.CDLL(str(path)), path
        self.library.guarded.restype = P
        self.library.guarded.argtypes = [ctypes.c_ulonglong, ctypes.c_uint]
        self.library.guarded_free.argtypes = [P, ctypes.c_ulonglong]
        self.kept, self.uses = [], set()

    @functools.cache
    def names(self):
        """All kernels of this build."""
        symbols = subprocess.run(["nm", "-D", "--defined-only", str(self.path)], check=True,
                                 capture_output=True, text=True).stdout.split()
        return {name[:-8] for name in symbols if name.endswith("_threads")}

    def buffer(self, count, dtype, alignment=16):
        """A tensor of NaN bytes whose end is the end of what may be touched."""
        size = torch.empty(0, dtype=dtype).element_size() * count
        address = self.library.guarded(size, alignment)
        self.kept.append((address, size))
        raw = (ctypes.c_ubyte * max(size, 1)).from_address(address)
        if size == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(raw, dtype=dtype, count=count)

    def upload(self, tensor):
        """A copy in guarded memory, dense."""
        result = self.buffer(tensor.numel(), tensor.dtype)
        result.copy_(tensor.reshape(-1))
        return result

    def free(self):
        for address, size in self.kept:
            self.library.guarded_free(address, size)
        self.kept = []

    def launch(self, name, fields, grid, block, shared, outputs):
        """Runs with the threads in both orders and compares what came out. `fields` are the
        members of the argument in their order: (type, value) pairs; tensors are addresses."""
        types, values = [], []
        for i, value in enumerate(fields):
            kind = P
            if isinstance(value, tuple):
                kind, value = value
            elif isinstance(value, View):
                kind = View
            elif value is not None:
                value = value.data_ptr()
            types.append((f"field{i}", kind))
            values.append(value)
        struct = type("Arguments", (ctypes.Structure,), {"_fields_": types})(*values)
        arguments = (P * 1)(ctypes.addressof(struct))
        threads = ctypes.c_int.in_dll(self.library, name + "_threads").value
        assert int(np.prod(block)) <= threads, f"{name}: more threads than it is built for"
        kernel = ctypes.cast(getattr(self.library, name), P)
        self.uses.add(name)
        grid, block = (list(size) + [1, 1, 1] for size in (grid, block))
        before = [output.clone() for output in outputs]
        found = []
        for backwards in (0, 1):
            for output, start in zip(outputs, before):
                output.copy_(start)
            stuck = self.library.emulate(kernel, (ctypes.c_uint * 3)(*grid[:3]),
                                         (ctypes.c_uint * 3)(*block[:3]), shared, arguments,
                                         backwards)
            assert not stuck, f"{name}: not all threads reach a barrier"
            found.append([output.clone().view(torch.uint8) for output in outputs])
        same = all(torch.equal(a, b) for a, b in zip(*found))
        assert same, f"{name}: the order of threads changes the result"
