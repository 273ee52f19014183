"""Compiles the kernels with NVRTC for every architecture and looks at the registers they take.
Separate because it needs NVIDIA's library (but no GPU), and says nothing about what they give."""

import ctypes
import pathlib
import re
import site

from emulated import KERNELS

NAMES = ["f32", "f16", "bf16"]
ARCHITECTURES = [75, 80, 90, 120]


def find_library():
    for folder in site.getsitepackages() + [site.getusersitepackages()]:
        for path in sorted(pathlib.Path(folder).glob("nvidia/*/lib/libnvrtc.so*")):
            return ctypes.CDLL(str(path))
    return None


def text_of(library, program, kind):
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{kind}")(program, buffer)
    return buffer.raw


def compile_source(library, source, dtype, target):
    """(error code, the compiler's log)."""
    headers = sorted(KERNELS.glob("*.cuh"))
    texts = (ctypes.c_char_p * len(headers))(*[path.read_bytes() for path in headers])
    names = (ctypes.c_char_p * len(headers))(*[path.name.encode() for path in headers])
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(),
                               len(headers), texts, names)
    options = [f"--gpu-architecture={target}", f"-DDTYPE={dtype}", "--std=c++17"]
    if target.startswith("sm"):
        options += ["--ptxas-options=-v"]
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    code = library.nvrtcCompileProgram(program, len(options), array)
    log = text_of(library, program, "ProgramLog").rstrip(b"\0").decode()
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return code, log


def resources(log):
    """Of each kernel: name, registers, shared bytes, bytes of its stack, spilled bytes."""
    pattern = (r"Compiling entry function '(\w+)' for .*?(\d+) bytes stack frame, (\d+) bytes "
               r"spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n")
    for match in re.finditer(pattern, log, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", match[6])
        yield (match[1], int(match[5]), int(shared[1]) if shared else 0,
               int(match[2]), int(match[3]) + int(match[4]))


def check():
    """The failures, after a table."""
    library = find_library()
    if library is None:
        return ["there is no libnvrtc: pip install nvidia-cuda-nvrtc"]
    failures, most = [], {}
    for source in sorted(KERNELS.glob("*.cu")):
        for dtype in range(3):
            for number in ARCHITECTURES:
                for target in (f"compute_{number}", f"sm_{number}"):
                    code, log = compile_source(library, source, dtype, target)
                    where = f"{source.name} {NAMES[dtype]} {target}"
                    if code != 0:
                        failures.append(f"{where}: {code}\n{log}")
                        continue
                    found = list(resources(log))
                    if target.startswith("sm") and not found:
                        failures.append(f"{where}: no word of registers\n{log}")
                    for name, registers, shared, stack, spilled in found:
                        row = most.setdefault(name, {})
                        row[(dtype, number)] = (registers, shared)
                        # The arithmetic of sin and cos has a table of its own.
                        if spilled or (stack and name != "unary"):
                            failures.append(f"{where}: {name} keeps {stack} bytes in "
                                            f"local memory, {spilled} of them spilled")
    print("\nregisters (static shared bytes) of f32, f16, bf16 on sm_75 / 80 / 90 / 120")
    for name, row in most.items():
        cells = []
        for dtype in range(3):
            values = [row.get((dtype, number)) for number in ARCHITECTURES]
            shared = max((value[1] for value in values if value), default=0)
            numbers = "/".join(str(value[0]) if value else "-" for value in values)
            cells.append(f"{numbers} ({shared})")
        print(f"{name:22}" + "".join(f"{cell:>24}" for cell in cells))
    return failures
