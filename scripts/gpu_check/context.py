"""What all sections share: where things are, what was asked for, and how much time is left."""

from __future__ import annotations  # for Python 3.9

import argparse
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from .process import Failed, Result, run
from .report import Report


@dataclass
class Context:
    options: argparse.Namespace
    fixtures: Path  # tests/fixtures
    manifest: Path  # the folder that has tests/fixtures, as CARGO_MANIFEST_DIR
    binary: Path
    tests: Path | None
    scratch: Path
    report: Report
    ends_at: float
    section_ends_at: float = 0.0
    model: Path | None = None
    model_is_full_size: bool = False
    found: dict = field(default_factory=dict)  # what later sections compare with

    def left(self) -> float:
        """Seconds until this section has to end."""
        return min(self.ends_at, self.section_ends_at) - time.monotonic()

    def is_gpu(self) -> bool:
        return self.options.device.startswith("cuda")

    def bars_hold(self) -> bool:
        """The bars on speed are for the whole picture of the full size, on a GPU."""
        asked = (self.options.size, self.options.steps)
        return self.is_gpu() and self.model_is_full_size and asked == (512, 25)

    def environment(self) -> dict:
        """No defaults of whoever runs this, no network, no cache of theirs."""
        own = {
            "TINY_SD_CONFIG": "",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(self.scratch / "cache"),
            "XDG_STATE_HOME": str(self.scratch / "state"),
        }
        kept = {key: value for key, value in os.environ.items()
                if key not in ("TINY_SD_MODEL", "TINY_SD_DEVICE")}
        return kept | own

    def run(self, *words, limit_s: float = 1e9) -> Result:
        """The binary with these words, until it ends or the section's time is over."""
        left_s = self.left()
        if left_s <= 0:
            raise Failed("the section's time is over")
        return run([self.binary, *words], min(limit_s, left_s), self.environment())

    def folder(self, name: str) -> Path:
        """A folder for files of one section, empty of what others wrote."""
        number = len(list(self.scratch.glob(f"{name}-*")))
        folder = self.scratch / f"{name}-{number}"
        folder.mkdir(parents=True)
        return folder

    def needed_model(self) -> Path:
        if self.model is None:
            raise Failed("there is no model: the section that makes it failed or was left out")
        return self.model


def number_before(text: str, words: str) -> int | None:
    """The number that stands before these words, as in `1234 launches`; the largest if several."""
    found = re.findall(rf"(\d+) {re.escape(words)}\b", text)
    return max(map(int, found)) if found else None
