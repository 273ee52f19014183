"""Pictures by the binary: several in one process, and what it says of them.

Separate from the sections, which all make pictures this way: `tiny-sd batch` loads once, takes
each picture's settings from a line, and tells by events when a picture begins, steps and is done.
"""

from __future__ import annotations  # for Python 3.9

import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from .context import Context, number_before
from .process import Failed, Result

COUNTERS = {
    "launches": "launches",
    "graph_replays": "graph replays",
    "ops_on_host": "ops on the host",
    "peak_bytes": "bytes of memory at most",
}
PROMPTS = [
    "Portrait of a pretty girl",
    "a lighthouse in the fog",
    "a red boat on a stormy sea",
    "a fox in the snow, oil on canvas",
    "an old man with a hat",
    "a city at night, rain",
    "three apples on a table",
    "a castle on a hill",
]


@dataclass
class Pictures:
    """One process' pictures, in the order of its jobs."""

    result: Result
    files: list = field(default_factory=list)
    seconds: list = field(default_factory=list)  # of each, as its event says
    gaps: list = field(default_factory=list)  # from one file to the next, as they came
    phases: list = field(default_factory=list)  # (until step 0, steps, after the last step)
    load_s: float = 0.0
    stages: dict = field(default_factory=dict)  # of all pictures together, by --stats
    counters: dict = field(default_factory=dict)
    worker_stages: dict = field(default_factory=dict)  # ops and programs there, by --stats

    def figures(self) -> dict:
        return {
            "seconds": self.seconds, "gaps_s": self.gaps, "phases_s": self.phases,
            "load_s": self.load_s, "stages_s": self.stages, "counters": self.counters,
            "worker_stages": self.worker_stages, "process_s": self.result.seconds,
        }

    def later(self) -> list:
        """Seconds of the pictures after the first, which pays for compiling and recording."""
        return self.seconds[1:] or self.seconds


def jobs(count: int, size: int, steps: int, guidance: float) -> list:
    """Pictures that differ in prompt and seed, so that each text is encoded; settings alike."""
    return [
        {"prompt": PROMPTS[index % len(PROMPTS)], "seed": 1 + index, "width": size,
         "height": size, "steps": steps, "guidance_scale": guidance}
        for index in range(count)
    ]


def make(context: Context, wanted: list, device: str, dtype: str, model, *more: str,
         limit_s: float = 1e9) -> Pictures:
    """Makes the pictures in one process, one after the other, or says why not."""
    folder = context.folder("pictures")
    listed = folder / "jobs.jsonl"
    listed.write_text("".join(json.dumps(job) + "\n" for job in wanted))
    result = context.run(
        "batch", listed, "--out-dir", folder / "out", "-m", model, "--device", device,
        "--dtype", dtype, "--batch-size", 1, "--json", "--stats", "--fail-fast", "--offline",
        *more, limit_s=limit_s,
    ).expect_success()
    pictures = Pictures(result)
    read_events(pictures, result)
    if len(pictures.files) != len(wanted):
        raise Failed(f"{len(pictures.files)} pictures came of {len(wanted)}")
    read_stats(pictures, result.err_text())
    return pictures


def read_events(pictures: Pictures, result: Result) -> None:
    first_step = last_step = done = None
    for moment, text in result.out:
        event = json.loads(text)
        kind = event.get("event")
        if kind == "step" and event["step"] == 0:
            first_step = moment
            if done is None:
                pictures.load_s = moment  # with the process' start and the first text
        elif kind == "step":
            last_step = moment
        elif kind == "done":
            if done is not None:
                pictures.gaps.append(moment - done)
                phases = (first_step - done, last_step - first_step, moment - last_step)
                pictures.phases.append([round(seconds, 4) for seconds in phases])
            done = moment
            pictures.files.append(Path(event["output"]))
            pictures.seconds.append(event["seconds"])


def read_stats(pictures: Pictures, text: str) -> None:
    """The tables and lines of --stats; a batch puts the device's name before them."""
    local = re.compile(r"^(?:\S+: )?(load|text|unet|vae) +(\d+\.\d+)\b")
    remote = re.compile(r"^(?:\S+: )?(load|text|unet|vae) +(\d+) +(\d+) +\d+ +\d+ +\d+ +\d+ +\d+")
    for line in text.splitlines():
        if found := local.match(line):
            pictures.stages[found[1]] = float(found[2])
        elif found := remote.match(line):
            pictures.worker_stages[found[1]] = {"ops": int(found[2]), "programs": int(found[3])}
    for name, words in COUNTERS.items():
        if (value := number_before(text, words)) is not None:
            pictures.counters[name] = value


def per_picture(many: Pictures, one: Pictures, name: str) -> float | None:
    """A counter per picture: what a process of several counted beyond a process of one."""
    if name not in many.counters or name not in one.counters:
        return None
    return (many.counters[name] - one.counters[name]) / (len(many.files) - len(one.files))


def median_phases(pictures: Pictures) -> list:
    return [statistics.median(column) for column in zip(*pictures.phases)]
