"""Makes the folder that is carried to the machine with the GPU: programs, fixtures, this script.

Separate because it runs on the machine that builds, with a Rust toolchain; nothing of it is needed
afterwards.
"""

from __future__ import annotations  # for Python 3.9

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT_BYTES = 60_000_000
LEFT_OUT = ["make_layout.py", "__pycache__"]


def pack(options: argparse.Namespace) -> int:
    folder = options.folder
    if folder.exists() and any(folder.iterdir()):
        print(f"gpu-check: {folder} is there already", file=sys.stderr)
        return 2
    binary = options.binary or build_binary(options.toolchain)
    tests = options.tests or build_tests(options.toolchain)
    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns(*LEFT_OUT)
    shutil.copy2(HERE.parent / "gpu-check", folder / "gpu-check")
    shutil.copytree(HERE, folder / "gpu_check", ignore=ignored)
    shutil.copytree(ROOT / "tests" / "fixtures", folder / "tests" / "fixtures")
    if options.wheels:
        (folder / "wheels").mkdir()
        for wheel in sorted(options.wheels.glob("*.whl")):
            shutil.copy2(wheel, folder / "wheels")
    pack_programs({"tiny-sd": binary, "tests": tests}, folder / "programs.tar.xz")
    (folder / "build.json").write_text(json.dumps(build_facts(binary), indent=1) + "\n")
    return say_sizes(folder)


def build_binary(toolchain: str) -> Path:
    cargo(toolchain, "build", "--release", "--locked")
    return target() / "release" / "tiny-sd"


def build_tests(toolchain: str) -> Path:
    """The integration test's program, as cargo names it."""
    output = cargo(toolchain, "test", "--locked", "--no-run", "--message-format=json")
    for line in output.splitlines():
        message = json.loads(line) if line.startswith("{") else {}
        about = message.get("target", {})
        if about.get("name") == "main" and "test" in about.get("kind", []):
            if message.get("executable"):
                return Path(message["executable"])
    sys.exit("gpu-check: cargo names no program of the test `main`")


def cargo(toolchain: str, *words: str) -> str:
    command = ["cargo", *filter(None, [toolchain]), *words]
    print(" ".join(command), file=sys.stderr, flush=True)
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"gpu-check: {' '.join(command)} ended with exit code {result.returncode}")
    return result.stdout


def target() -> Path:
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def newest_tests(folder: Path) -> Path | None:
    """The test program that was built last, if there is one."""
    found = [path for path in folder.glob("main-*")
             if path.suffix == "" and os.access(path, os.X_OK)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def pack_programs(programs: dict, archive: Path) -> None:
    """Stripped copies; together, because what they have in common is then there once."""
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(archive, "w:xz", preset=6) as file:
            for name, path in programs.items():
                copy = Path(scratch) / name
                shutil.copy2(path, copy)
                if shutil.which("strip"):
                    subprocess.run(["strip", copy], check=True)
                file.add(copy, name, filter=plain)


def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of the machine that builds: no owner, no time."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o755
    return member


def build_facts(binary: Path) -> dict:
    def output(*command) -> str | None:
        try:
            answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return answer.stdout.strip()

    return {
        "commit": output("git", "rev-parse", "HEAD"),
        "changed": bool(output("git", "status", "--porcelain")),
        "version": output(binary, "--version"),
    }


def say_sizes(folder: Path) -> int:
    sizes = {
        entry.name: sum(file.stat().st_size for file in [entry, *entry.rglob("*")]
                        if file.is_file())
        for entry in sorted(folder.iterdir())
    }
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size:>12,} {name}")
    total = sum(sizes.values())
    print(f"{total:>12,} {folder}")
    if total > LIMIT_BYTES:
        print(f"gpu-check: more than {LIMIT_BYTES:,} bytes", file=sys.stderr)
        return 1
    return 0
