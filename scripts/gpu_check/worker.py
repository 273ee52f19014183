"""The section about the device across the network: a worker on loopback beside the device itself.

Separate because it holds a process of its own and compares in turns.
"""

import queue
import re
import statistics

from . import ours, png
from .context import Context, number_before
from .process import Failed, Process
from .report import spread

MAX_RATIO = 1.05
STAGES = ["text", "unet", "vae"]


class Worker:
    """A worker on a free port, with token and cache of its own."""

    def __init__(self, context: Context):
        folder = context.folder("worker")
        command = [
            *[context.binary, "worker", "--device", context.options.device],
            *["--listen", "127.0.0.1:0", "--token-file", folder / "token"],
            *["--cache-dir", folder / "cache"],
        ]
        self.process = Process(command, context.environment())
        try:
            line = self.process.next_line(min(60, context.left()))
        except queue.Empty:
            line = None
        if line is None or not line[1].startswith("quic://"):
            result = self.process.stop(2)
            raise Failed(f"the worker does not listen: {result.err_text()[-300:]}")
        self.file = folder / "url"
        self.file.touch(0o600)
        self.file.write_text(line[1])

    def device(self) -> str:
        """As a file, so that the token does not show in the list of processes."""
        return f"@{self.file}"

    def stop(self):
        return self.process.stop(20)


def worker(context: Context) -> None:
    """The same bytes, about the same time, and all three stages over there."""
    options, report, model = context.options, context.report, context.needed_model()
    count = 2 if options.quick else 3
    wanted = ours.jobs(count, options.size, options.steps, options.guidance)
    lent = Worker(context)
    log = None
    try:
        # The worker gets the weights, and compiles what it needs.
        first = ours.make(context, wanted[:1], lent.device(), "f16", model)
        report.row("the first picture, weights sent", f"{first.result.seconds:.2f} s",
                   figures=first.figures())
        here, there = rounds(context, wanted, lent, 1 if options.quick else options.rounds)
        log = lent.stop()
    finally:
        lent.process.end()
    compare(context, here, there)
    placed(context, there[-1])
    replays(context, log.err_text())
    ended = log.code == 0
    report.row("the worker ends at SIGTERM", f"exit code {log.code}", "0", ended,
               {"log": [text for _, text in log.err][-60:]})


def rounds(context: Context, wanted: list, lent: Worker, count: int) -> tuple:
    """Both in turns; who goes first changes, so that a load that grows is nobody's."""
    made = {context.options.device: [], lent.device(): []}
    for index in range(count):
        order = list(made) if index % 2 == 0 else list(made)[::-1]
        for device in order:
            made[device].append(
                ours.make(context, wanted, device, "f16", context.needed_model())
            )
    return tuple(made.values())


def compare(context: Context, here: list, there: list) -> None:
    report = context.report
    pairs = [
        (one, other)
        for direct, lent in zip(here, there)
        for one, other in zip(direct.files, lent.files)
    ]
    same = sum(png.same(one, other) for one, other in pairs)
    report.row("pictures that are the same as without it", f"{same} of {len(pairs)}", "all",
               same == len(pairs))
    ratios = [
        statistics.median(lent.later()) / statistics.median(direct.later())
        for direct, lent in zip(here, there)
    ]
    ratio = statistics.median(ratios)
    passed = ratio <= MAX_RATIO if context.bars_hold() else None
    report.row("a picture's time, as a part of the direct one", spread(ratios, "x"),
               f"<= {MAX_RATIO}", passed,
               {"direct": [run.figures() for run in here],
                "lent": [run.figures() for run in there]})
    walls = [lent.result.seconds / direct.result.seconds for direct, lent in zip(here, there)]
    report.row("the whole process' time, likewise", spread(walls, "x"))


def placed(context: Context, last: ours.Pictures) -> None:
    """Text encoder, UNet and VAE are all over there, and nothing of them is here."""
    ops = {stage: last.worker_stages.get(stage, {}).get("ops", 0) for stage in STAGES}
    is_there = all(ops.values()) and not last.stages
    programs = sum(stage["programs"] for stage in last.worker_stages.values())
    value = ", ".join(f"{stage} {count} ops" for stage, count in ops.items())
    value += f"; {programs} programs replayed"
    context.report.row("stages on the worker", value, "all three", is_there,
                       {"stages_there": last.worker_stages, "stages_here": last.stages})


def replays(context: Context, log: str) -> None:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log)
    count = number_before(plain, "graph replays")
    if count is None and not context.is_gpu():
        context.report.skip("graph replays", "the worker's log has none on this device")
        return
    context.report.row("graph replays in the worker's log", str(count), "> 0", bool(count))
