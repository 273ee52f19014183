"""Sections that set our pictures beside diffusers': times in one run, and likeness.

Separate from peer.py, which is the program that has diffusers in it: here that program is started,
its findings are read as they come, and compared.
"""

from __future__ import annotations  # for Python 3.9

import json
import queue
import shutil
import statistics
import zipfile
from pathlib import Path

from . import ours, png
from .context import Context
from .process import Failed, Process, run
from .report import decibels, note, spread

NEEDED = ["torch", "transformers", "diffusers"]
# How much of diffusers' time ours may be.
BARS = {"eager": 0.7, "compile": 1.0}
PARITY_DB = 50.0
HALF_MARGIN_DB = 3.0
PROBE = (
    "import importlib.util, json, sys; "
    "print(json.dumps([n for n in sys.argv[1:] if importlib.util.find_spec(n) is None]))"
)


def missing(context: Context, names: list, site: Path | None = None) -> list:
    command = [context.options.python, "-c", PROBE, *names]
    result = run(command, min(60, context.left()), environment(context, site))
    return json.loads(result.expect_success().out_text().splitlines()[-1])


def environment(context: Context, site: Path | None) -> dict:
    values = context.environment()
    # What compiles takes its cache along: nothing of an earlier run makes it quick.
    values["TORCHINDUCTOR_CACHE_DIR"] = str(context.scratch / "inductor")
    if site is not None:
        path = [str(site), *filter(None, [values.get("PYTHONPATH")])]
        values["PYTHONPATH"] = ":".join(path)
    return values


def carried(context: Context) -> Path | None:
    """A folder with those of the carried wheels that are not installed; a wheel is an archive."""
    wheels = sorted(context.options.wheels.glob("*.whl")) if context.options.wheels else []
    if not wheels:
        return None
    tops = {wheel: top_folder(wheel) for wheel in wheels}
    absent = missing(context, list(tops.values()))
    site = context.scratch / "site"
    site.mkdir(exist_ok=True)
    for wheel, top in tops.items():
        if top in absent:
            note(f"not installed, so taken along: {wheel.name}")
            zipfile.ZipFile(wheel).extractall(site)
    return site


def top_folder(wheel: Path) -> str:
    """The name that is imported: the first folder that is not about the wheel itself."""
    names = [Path(name).parts[0] for name in zipfile.ZipFile(wheel).namelist()]
    return next(name for name in names if not name.endswith((".dist-info", ".data"))
                ).removesuffix(".py")


def diffusers(context: Context) -> None:
    """diffusers' times on the same model and settings, between two runs of ours."""
    modes = ["eager", "channels_last"]
    # Torch's f16 on processors is so slow that it may take all the time.
    findings = beside(context, [*modes, "f32"] if context.is_gpu() else ["f32", *modes])
    context.found["diffusers"] = findings


def compiled(context: Context) -> None:
    """The same through torch.compile, its warm-up outside of the timing."""
    if context.options.quick:
        return context.report.skip("torch.compile", "left out by --quick")
    beside(context, ["compile-graphs", "compile"])
    return None


def beside(context: Context, modes: list) -> dict:
    """Ours, diffusers in these modes, and ours again."""
    options, report = context.options, context.report
    model = context.needed_model()
    site = carried(context)
    if lacking := missing(context, NEEDED, site):
        report.skip("diffusers' times and pictures", f"not installed: {', '.join(lacking)}")
        return {}
    jobs = ours.jobs(2 if options.quick else 4, options.size, options.steps, options.guidance)
    asked = {"model": str(model), "device": options.device, "modes": modes, "jobs": jobs,
             "folder": str(context.folder("diffusers"))}
    before = ours.make(context, jobs, options.device, "f16", model)
    findings = listen(context, asked, site, 2 * before.result.seconds + 3)
    after = None
    if context.left() > 1.5 * before.result.seconds:
        after = ours.make(context, jobs, options.device, "f16", model)
    compare(context, before, after, findings)
    return findings


def listen(context: Context, asked: dict, site: Path | None, spare_s: float) -> dict:
    """Runs peer.py and keeps what it finds, by mode, until it ends or the time is over.

    `spare_s` is what our own pictures after it need.
    """
    report, findings = context.report, {}
    program = Path(__file__).resolve().parent / "peer.py"
    process = Process([context.options.python, program, json.dumps(asked)],
                      environment(context, site))
    is_over = False
    try:
        while (line := process.next_line(context.left() - spare_s)) is not None:
            if not line[1].startswith("{"):
                continue
            finding = json.loads(line[1])
            findings[finding.get("mode", "versions")] = finding
            note(f"diffusers: {line[1][:200]}")
    except queue.Empty:
        is_over = True
    finally:
        result = process.wait(0.1 if is_over else 20)
    report.sections[report.section] = {
        "findings": findings, "errors": [text for _, text in result.err][-60:]
    }
    if "versions" in findings:
        versions = findings["versions"]["versions"]
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        report.row("versions", text, figures=findings["versions"])
    for mode in asked["modes"]:
        if "error" in findings.get(mode, {}):
            report.skip(f"diffusers, {mode}", findings[mode]["error"])
        elif mode not in findings:
            last = "; ".join(result.err_text().strip().splitlines()[-2:])
            why = "time" if is_over else f"exit code {result.code}: {last[-300:]}"
            report.skip(f"diffusers, {mode}", why)
    return findings


def compare(context: Context, before, after, findings: dict) -> None:
    report = context.report
    seconds = before.later() + (after.later() if after else [])
    mine = statistics.median(seconds)
    report.row("ours, f16, before and after diffusers", spread(seconds),
               figures={"seconds": seconds, "after": after.figures() if after else None})
    half = {mode: finding for mode, finding in findings.items() if "seconds" in finding}
    for mode, finding in half.items():
        memory = finding["peak_bytes"]
        text = f"; {memory / 1e6:.0f} MB" if memory else ""
        report.row(f"diffusers, {mode}", spread(finding["seconds"]) + text, figures=finding)
    ratios = {
        mode: mine / statistics.median(finding["seconds"])
        for mode, finding in half.items() if mode != "f32"
    }
    for mode in ["eager", "channels_last"]:
        if mode in ratios:
            bar = BARS.get(mode)
            ratio_row(context, f"ours / diffusers, {mode}", ratios[mode], bar)
    compiled = {mode: ratio for mode, ratio in ratios.items() if mode.startswith("compile")}
    if compiled:
        # The quicker of the two ways to compile is the one to be measured by.
        mode = max(compiled, key=compiled.get)
        ratio_row(context, f"ours / diffusers, torch.compile ({mode})", compiled[mode],
                  BARS["compile"])


def ratio_row(context: Context, what: str, ratio: float, bar: float | None) -> None:
    passed = ratio <= bar if bar is not None and context.bars_hold() else None
    context.report.row(what, f"{ratio:.3f} x", f"<= {bar}" if bar else "", passed,
                       {"ratio": ratio})


def parity(context: Context) -> None:
    """Our f32 picture beside diffusers' f32 one; what f16 costs us beside what it costs them."""
    report = context.report
    files, theirs = {}, context.found.get("diffusers", {})
    for dtype in ["f32", "f16"]:
        if made := context.found.get(f"ours {dtype}"):
            files[f"our {dtype}"] = made.files[0]
    for mode, name in [("f32", "their f32"), ("eager", "their f16")]:
        if "picture" in theirs.get(mode, {}):
            files[name] = Path(theirs[mode]["picture"])
    pictures = {name: png.read(file) for name, file in files.items()}
    if context.options.keep:
        context.options.keep.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            shutil.copy(file, context.options.keep / f"{name.replace(' ', '-')}.png")

    def apart(one: str, other: str) -> float | None:
        if one in pictures and other in pictures:
            return png.psnr(pictures[one], pictures[other])
        absent = [name for name in (one, other) if name not in pictures]
        report.skip(f"{one} beside {other}", f"there is no {' and no '.join(absent)} picture")
        return None

    full = apart("our f32", "their f32")
    if full is not None:
        report.row("our f32 picture beside diffusers'", decibels(full), f">= {PARITY_DB:g} dB",
                   full >= PARITY_DB, {"decibels": full})
    ours_half, their_half = apart("our f16", "our f32"), apart("their f16", "their f32")
    if ours_half is not None:
        their_text = "" if their_half is None else f", diffusers' {decibels(their_half)}"
        passed = None if their_half is None else ours_half >= their_half - HALF_MARGIN_DB
        report.row("f16 beside f32, each its own", f"ours {decibels(ours_half)}{their_text}",
                   f"-{HALF_MARGIN_DB:g} dB", passed,
                   {"ours": ours_half, "theirs": their_half})
    if not pictures:
        raise Failed("there are no pictures to compare")
