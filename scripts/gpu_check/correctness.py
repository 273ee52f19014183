"""Sections about what is right: the device, its tests, diffusers' pictures, the demo, the CPU."""

import json
import math
import queue
import re
import shutil
import time

from . import ours, png
from .context import Context
from .process import Failed, Process, run
from .report import decibels

TEST_LINE = re.compile(r"^test (\S+) \.\.\. (?:.*\b)?(ok|FAILED|ignored)\b")
TEST_START = re.compile(r"^test (\S+) \.\.\. ")
KEPT_LINES = 400
GOLDEN_DB = {"f32": 50.0, "f16": 35.0}  # diffusers' pictures are of f32; the CPU has 44 in f16
CPU_DB = 50.0


def devices(context: Context) -> None:
    """What the machine has, by its own words and by the binary's."""
    report = context.report
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,compute_cap,clocks.max.sm"
        answer = run(["nvidia-smi", query, "--format=csv,noheader"], min(30, context.left()))
        report.row("nvidia-smi", answer.out_text().strip().replace("\n", "; ")[:200])
    else:
        report.skip("nvidia-smi", "there is none")
    result = context.run("devices", "--json", limit_s=60)
    if result.code != 0 and not context.is_gpu():
        report.skip("tiny-sd devices", f"exit code {result.code}")
        return
    found = result.expect_success().out_text()
    kind = context.options.device.split(":")[0]
    lines = [json.loads(line) for line in found.splitlines() if line.startswith("{")]
    ours_here = [line for line in lines if str(line.get("device", "")).split(":")[0] == kind]
    usable = [line for line in ours_here if line.get("usable")]
    text = "; ".join(map(brief, usable or ours_here)) or "none of that kind"
    report.row(f"tiny-sd devices: {kind}", text, "usable", bool(usable), lines)


def brief(device: dict) -> str:
    parts = [device.get(key) for key in ("device", "name", "kernels", "problem")]
    for key, text in [("compute_capability", "capability"), ("driver", "driver"),
                      ("compiler", "NVRTC")]:
        parts.append(device.get(key) and f"{text} {device[key]}")
    return ", ".join(str(part) for part in parts if part)


def device_tests(context: Context) -> None:
    """The tests that need a GPU: one row each, by name."""
    report = context.report
    if context.tests is None:
        raise Failed("there is no test program")
    command = [context.tests, "--ignored", "gpu::", "--test-threads", "1", "--show-output"]
    environment = context.environment() | {
        "CARGO_MANIFEST_DIR": str(context.manifest),
        "TINY_SD_BINARY": str(context.binary),
    }
    process = Process(command, environment, context.manifest)
    began, seen = time.monotonic(), {}
    try:
        while (line := process.next_line(context.left())) is not None:
            if (found := TEST_LINE.match(line[1])) and found[1] not in seen:
                seconds, began = time.monotonic() - began, time.monotonic()
                seen[found[1]] = found[2]
                if found[2] == "ignored":
                    report.skip(found[1], "ignored")
                else:
                    report.row(found[1], f"{found[2]} in {seconds:.1f} s", "ok",
                               found[2] == "ok", {"seconds": seconds})
    except queue.Empty:
        report.row("all tests in their time", f"{len(seen)} ended", "all", False)
    finally:
        result = process.wait(1 if context.left() < 1 else 10)
        report.sections[report.section] = {
            "exit_code": result.code,
            "output": [text for _, text in result.out][-KEPT_LINES:],
            "errors": [text for _, text in result.err][-KEPT_LINES:],
        }
    begun = [found[1] for _, text in result.out if (found := TEST_START.match(text))]
    for name in begun:
        if name not in seen:
            report.row(name, "did not end", "ok", False)
    if not seen:
        raise Failed(f"no test ran: {result.err_text()[-300:]}")
    report.row("exit code of the tests", str(result.code), "0", result.code == 0)


def goldens(context: Context) -> None:
    """Miniature models of three families: every picture that diffusers made of them."""
    for model in ["tiny", "sd1", "sd2"]:
        folder = context.fixtures / "golden" / model
        cases = json.loads((folder / "cases.json").read_text())
        keys = ["prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "seed",
                "scheduler"]
        wanted = [{key: case[key] for key in keys if case.get(key) is not None} for case in cases]
        for dtype in ["f32", "f16"]:
            try:
                made = ours.make(context, wanted, context.options.device, dtype,
                                 context.fixtures / "models" / model, limit_s=120)
            except Failed as error:
                context.report.row(f"{model}, {dtype}: all pictures", str(error)[:300],
                                   "made", False)
                continue
            apart = {
                case["name"]: png.psnr(png.read(file), png.read(folder / f"{case['name']}.png"))
                for case, file in zip(cases, made.files)
            }
            least = min(apart, key=apart.get)
            bar = GOLDEN_DB[dtype]
            value = f"{decibels(apart[least])} at least ({least})"
            context.report.row(f"{model}, {dtype}: {len(cases)} pictures of diffusers", value,
                               f">= {bar:g} dB", apart[least] >= bar, apart)


def demo(context: Context) -> None:
    """The model that is in the program: the device's pictures beside the CPU's."""
    wanted = [{"prompt": "Portrait of a pretty girl with red hair", "seed": seed}
              for seed in range(1, 5)]
    host = ours.make(context, wanted, "cpu", "f32", "demo", limit_s=60)
    for dtype in ["f32", "f16"]:
        made = ours.make(context, wanted, context.options.device, dtype, "demo", limit_s=90)
        apart = [png.psnr(png.read(one), png.read(other))
                 for one, other in zip(made.files, host.files)]
        bar = CPU_DB if dtype == "f32" else GOLDEN_DB["f16"]
        seconds = ", ".join(f"{value:.3f}" for value in made.seconds)
        context.report.row(f"demo, {dtype}, beside the CPU in f32",
                           f"{decibels(min(apart))} at least; {seconds} s",
                           f">= {bar:g} dB", min(apart) >= bar,
                           made.figures() | {"decibels": apart})


def beside_cpu(context: Context) -> None:
    """The model of the other sections, one small picture, beside the CPU."""
    size, steps = min(context.options.size, 256), min(context.options.steps, 2)
    wanted = ours.jobs(1, size, steps, context.options.guidance)
    pictures = [
        png.read(ours.make(context, wanted, device, "f32", context.needed_model()).files[0])
        for device in ["cpu", context.options.device]
    ]
    apart = png.psnr(*pictures)
    context.report.row(f"{size}x{size}, {steps} steps, f32, beside the CPU", decibels(apart),
                       f">= {CPU_DB:g} dB", apart >= CPU_DB, {"decibels": apart})
    spread, ends = png.deviation(pictures[1]), png.saturated(pictures[1])
    is_picture = spread >= 20 and ends <= 0.3 and math.isfinite(spread)
    context.report.row("the picture has contents", f"deviation {spread:.0f}, {ends:.1%} at the "
                       "ends", "", is_picture, {"deviation": spread, "saturated": ends})
