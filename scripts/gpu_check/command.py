"""The command line of gpu-check: what is run, in which order, and within what time."""

import argparse
import os
import platform
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path

from . import beside_diffusers, correctness, pack, speed, worker
from .context import Context
from .process import Failed
from .report import Report, note

# Where the script is: a folder that pack made, or scripts/ of a checkout.
HOME = Path(__file__).resolve().parents[1]
# By importance: the time that there is may end before they do. Seconds at most of each.
SECTIONS = [
    ("devices", correctness.devices, 60),
    ("tests", correctness.device_tests, 150),
    ("weights", speed.make_weights, 60),
    ("pictures-f16", speed.pictures_f16, 90),
    ("diffusers", beside_diffusers.diffusers, 120),
    ("worker", worker.worker, 120),
    ("goldens", correctness.goldens, 120),
    ("demo", correctness.demo, 60),
    ("pictures-f32", speed.pictures_f32, 90),
    ("parity", beside_diffusers.parity, 30),
    ("beside-cpu", correctness.beside_cpu, 60),
    ("compile", beside_diffusers.compiled, 300),  # last: compiling takes all the time there is
]
NAMES = [name for name, _, _ in SECTIONS]
NEEDS_GPU = {"tests"}
NEED_MODEL = {"pictures-f16", "pictures-f32", "diffusers", "worker", "beside-cpu", "compile"}


def main(description: str) -> int:
    options = parse(description)
    if options.command == "pack":
        return pack.pack(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=options.work) as scratch:
        return check(options, Path(scratch))


def parse(description: str) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = arguments.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="make the folder for the machine with the GPU")
    packing.add_argument("folder", type=Path, metavar="DIR", help="must not be there yet")
    packing.add_argument("--wheels", type=Path, metavar="DIR",
                         help="wheels to take along where they are not installed, as diffusers'")
    packing.add_argument("--toolchain", default="", help="such as +1.95, for cargo")
    running = commands.add_parser("run", help="check the device of this machine")
    running.add_argument("--device", default="cuda", help="cuda, cuda:1, …; cpu to try this script")
    running.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="the report")
    running.add_argument("--model", type=Path, metavar="DIR",
                         help="a folder in diffusers layout [default: a random one of full size]")
    running.add_argument("--size", type=int, default=512, help="width and height in pixels")
    running.add_argument("--steps", type=int, default=25)
    running.add_argument("--guidance", type=float, default=7.5)
    running.add_argument("--pictures", type=int, default=5, help="in a process that is timed")
    running.add_argument("--rounds", type=int, default=3, help="of direct and by way of a worker")
    running.add_argument("--limit", type=float, default=540, help="seconds of the whole run")
    running.add_argument("--patience", type=float, default=1, metavar="FACTOR",
                         help="so many times as long for each section, within --limit")
    running.add_argument("--quick", action="store_true", help="fewer pictures, no torch.compile")
    running.add_argument("--skip", type=names, default=set(), metavar="NAMES",
                         help=f"of {','.join(NAMES)}")
    running.add_argument("--only", type=names, metavar="NAMES", help="none but these sections")
    running.add_argument("--python", default=sys.executable, help="the one that has PyTorch")
    running.add_argument("--wheels", type=Path, default=HOME / "wheels", metavar="DIR")
    running.add_argument("--keep", type=Path, metavar="DIR",
                         help="keep the pictures that parity compares there")
    running.add_argument("--work", type=Path, metavar="DIR",
                         help="for 1.2 GB of scratch files [default: the system's]")
    for command in [packing, running]:
        command.add_argument("--binary", type=Path, help="instead of a built or packed tiny-sd")
        command.add_argument("--tests", type=Path, help="instead of a built or packed test program")
    options = arguments.parse_args()
    if options.command == "run" and options.only and options.only & NEED_MODEL:
        options.only.add("weights")
    return options


def names(text: str) -> set:
    given = set(filter(None, text.split(",")))
    if unknown := given - set(NAMES):
        raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}: {', '.join(NAMES)}")
    return given


def check(options: argparse.Namespace, scratch: Path) -> int:
    began = time.monotonic()
    report = Report(options.out.absolute(), facts(options))
    try:
        context = find(options, scratch, report, began + options.limit)
    except Failed as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    ended = False
    try:
        for name, function, limit_s in SECTIONS:
            section(context, name, function, limit_s)
        ended = True
    finally:
        for name in NAMES:
            if not report.has(name):
                report.skip("all of it", "ended from outside", name)
        report.facts["seconds"] = round(time.monotonic() - began, 1)
        report.write(ended)
        report.print()
    return 1 if report.failed() else 0


def section(context: Context, name: str, function, limit_s: float) -> None:
    """One section; whatever happens in it, the next one has its turn."""
    report, options = context.report, context.options
    report.section = name
    everything = "all of it"
    if name in options.skip or (options.only is not None and name not in options.only):
        return report.skip(everything, "left out by the command line")
    if name in NEEDS_GPU and not context.is_gpu():
        return report.skip(everything, f"--device {options.device} is no GPU")
    if context.ends_at - time.monotonic() < 5:
        return report.skip(everything, "time")
    began = time.monotonic()
    context.section_ends_at = began + limit_s * options.patience
    note(f"{name} …")
    try:
        function(context)
    except Failed as error:
        if context.ends_at - time.monotonic() < 1:
            # Not its own limit, which would be a fault of what is checked.
            report.skip("the rest of it", f"time: {str(error)[:200]}")
        else:
            report.row(everything, str(error)[:1000], "", False)
    except Exception as error:
        report.row(everything, f"{type(error).__name__}: {error}"[:300], "", False,
                   {"trace": traceback.format_exc()})
    finally:
        kept = report.sections.setdefault(name, {})
        kept["seconds"] = round(time.monotonic() - began, 2)
        report.write(False)
    return None


def find(options: argparse.Namespace, scratch: Path, report: Report, ends_at: float) -> Context:
    """The programs and fixtures: given, packed beside this script, or built in its checkout."""
    packed, checkout = HOME / "programs.tar.xz", HOME.parent
    manifest = HOME if (HOME / "tests" / "fixtures").is_dir() else checkout
    found = {"tiny-sd": options.binary, "tests": options.tests}
    if packed.is_file() and not all(found.values()):
        note("unpacking the programs")
        with tarfile.open(packed) as archive:
            for name in found:
                (scratch / name).write_bytes(archive.extractfile(name).read())
                (scratch / name).chmod(0o755)
                found[name] = found[name] or scratch / name
    found["tiny-sd"] = found["tiny-sd"] or checkout / "target" / "release" / "tiny-sd"
    found["tests"] = found["tests"] or pack.newest_tests(checkout / "target" / "debug" / "deps")
    if not found["tiny-sd"].is_file():
        raise Failed(f"there is no {found['tiny-sd']}: cargo build --release, or --binary PATH")
    if not (manifest / "tests" / "fixtures").is_dir():
        raise Failed(f"there is no {manifest / 'tests' / 'fixtures'}")
    programs = {name: path and path.absolute() for name, path in found.items()}
    if options.model is not None:
        options.model = options.model.absolute()
    return Context(options, manifest / "tests" / "fixtures", manifest, programs["tiny-sd"],
                   programs["tests"], scratch, report, ends_at)


def facts(options: argparse.Namespace) -> dict:
    asked = {key: str(value) if isinstance(value, Path) else value
             for key, value in vars(options).items()}
    for key in ["skip", "only"]:
        asked[key] = sorted(asked[key]) if asked[key] else None
    build = HOME / "build.json"
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "asked": asked,
        "build": build.read_text() if build.is_file() else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }
