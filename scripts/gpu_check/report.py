"""What was found: one table on standard output, and the same with all figures as JSON.

Separate from what finds it. The JSON file is written after every section, so that a run that is
killed leaves what it had.
"""

from __future__ import annotations  # for Python 3.9

import json
import math
import statistics
import sys
import time
from pathlib import Path

MAX_WIDTH, MAX_VALUE = 84, 100  # columns of the table


class Report:
    def __init__(self, target: Path, facts: dict):
        self.target, self.facts = target, facts
        self.rows: list = []
        self.not_run: list = []
        self.sections: dict = {}
        self.section = ""

    def row(self, what: str, value: str, bar: str = "", passed: bool | None = None,
            figures=None) -> None:
        """One finding. `passed` is None where there is no bar."""
        row = {"section": self.section, "what": what, "value": value, "bar": bar,
               "passed": passed}
        if figures is not None:
            row["figures"] = figures
        self.rows.append(row)
        note(f"{self.section}: {what}: {value}{verdict(passed)}")

    def skip(self, what: str, reason: str, section: str | None = None) -> None:
        section = section or self.section
        self.not_run.append({"section": section, "what": what, "reason": reason})
        note(f"{section}: {what}: not run: {reason}")

    def has(self, section: str) -> bool:
        """Whether anything is said of that section."""
        return any(row["section"] == section for row in [*self.rows, *self.not_run])

    def failed(self) -> list:
        return [row for row in self.rows if row["passed"] is False]

    def write(self, ended: bool) -> None:
        content = {
            "v": 1,
            "ended": ended,
            "passed": ended and not self.failed(),
            "facts": self.facts,
            "sections": self.sections,
            "rows": self.rows,
            "not_run": self.not_run,
        }
        text = json.dumps(finite(content), indent=1) + "\n"
        self.target.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.target.with_name(self.target.name + ".part")
        scratch.write_text(text)
        scratch.replace(self.target)

    def print(self) -> None:
        lines = [("section", "what", "value", "bar", "")]
        for row in self.rows:
            value = row["value"]
            if len(value) > MAX_VALUE:  # The JSON file has all of it.
                value = value[:MAX_VALUE] + "…"
            cells = (row["section"], row["what"], value, row["bar"])
            lines.append((*cells, verdict(row["passed"]).strip()))
        for row in self.not_run:
            lines.append((row["section"], row["what"], "not run", "", row["reason"]))
        widths = [min(MAX_WIDTH, max(map(len, column))) for column in zip(*lines)]
        for *padded, last in lines:
            text = "  ".join(f"{cell:<{width}}" for cell, width in zip(padded, widths))
            print(f"{text}  {last}".rstrip())
        failed = len(self.failed())
        passed = sum(row["passed"] is True for row in self.rows)
        print(f"{passed} passed, {failed} failed, {len(self.not_run)} not run; {self.target}")


def verdict(passed: bool | None) -> str:
    return {None: "", True: "  ok", False: "  FAILED"}[passed]


def note(text: str) -> None:
    """Progress, for whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def spread(values: list, unit: str = "s", digits: int = 3) -> str:
    """The median (least to most)."""
    if not values:
        return "nothing"
    middle = f"{statistics.median(values):.{digits}f} {unit}".strip()
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def decibels(value: float) -> str:
    return "every pixel the same" if math.isinf(value) else f"{value:.1f} dB"


def finite(value):
    """JSON has no infinity; equal pictures have an infinite PSNR."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
