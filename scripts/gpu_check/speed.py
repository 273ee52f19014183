"""Sections about the whole picture of a model: times, launches, memory, and the same bits.

Separate from worker.py and beside_diffusers.py, which compare these pictures with others.
"""

import hashlib
import time

from . import ours, png, weights
from .context import Context
from .process import Failed
from .report import spread


def make_weights(context: Context) -> None:
    """The model of full size, unless --model names another."""
    options, report = context.options, context.report
    if options.model:
        context.model = options.model
        report.skip("random weights of full size", f"--model {options.model}")
        return
    folder = context.scratch / "full-size"
    started = time.monotonic()
    count = weights.make(folder, context.fixtures / "tokenizer")
    seconds = time.monotonic() - started
    context.model, context.model_is_full_size = folder, True
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.safetensors")):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    report.row("random weights of tiny-sd's full size", f"{count:,} bytes in {seconds:.1f} s",
               figures={"bytes": count, "seconds": seconds, "blake2b": digest.hexdigest()})


def pictures_f16(context: Context) -> None:
    whole_pictures(context, "f16")


def pictures_f32(context: Context) -> None:
    whole_pictures(context, "f32")


def whole_pictures(context: Context, dtype: str) -> None:
    """Several in one process, the first one again at its end; and the first in another process."""
    options, report, model = context.options, context.report, context.needed_model()
    count = 2 if options.quick else options.pictures
    wanted = ours.jobs(count, options.size, options.steps, options.guidance)
    one = ours.make(context, wanted[:1], options.device, dtype, model)
    # Under another name, or the batch would take it for the same file.
    again = wanted[0] | {"output": "again.png"}
    many = ours.make(context, [*wanted, again], options.device, dtype, model)
    context.found[f"ours {dtype}"] = many
    what = f"{options.size}x{options.size}, {options.steps} steps, {dtype}"
    seconds = many.later()
    report.row(f"{what}: a picture, weights loaded", spread(seconds),
               figures={"one": one.figures(), "many": many.figures()})
    gaps = many.gaps or seconds
    report.row(f"{what}: from one file to the next", spread(gaps))
    first = f"{one.seconds[0]:.2f} s, {many.seconds[0]:.2f} s; loading {one.load_s:.2f} s"
    report.row(f"{what}: the first picture of a process", first)
    if many.phases:
        before, steps, after = ours.median_phases(many)
        report.row(f"{what}: until step 0, steps, after", f"{before:.3f}, {steps:.3f}, "
                   f"{after:.3f} s (medians)")
    stages = ", ".join(f"{name} {value:g}" for name, value in many.stages.items())
    report.row(f"{what}: --stats of {len(many.files)} pictures", f"{stages} s")
    count_ops(context, what, one, many)
    same_bits(context, what, one, many)


def count_ops(context: Context, what: str, one: ours.Pictures, many: ours.Pictures) -> None:
    report = context.report
    if not many.counters:
        if context.is_gpu():
            raise Failed("--stats has no line of the device with its launches")
        report.skip(f"{what}: launches, memory", "the device does not count them")
        return
    for name, text in [("launches", "launches"), ("graph_replays", "graph replays")]:
        value = ours.per_picture(many, one, name)
        if value is not None:
            # Without replays each step is launched anew, kernel by kernel.
            bar, passed = ("> 0", value > 0) if name == "graph_replays" else ("", None)
            report.row(f"{what}: {text} a picture", f"{value:.1f}", bar, passed, {name: value})
    on_host = many.counters.get("ops_on_host")
    report.row(f"{what}: ops on the host", str(on_host), "0", on_host == 0)
    if (peak := many.counters.get("peak_bytes")) is not None:
        report.row(f"{what}: memory of the device at most", f"{peak / 1e6:.0f} MB",
                   figures={"peak_bytes": peak})


def same_bits(context: Context, what: str, one: ours.Pictures, many: ours.Pictures) -> None:
    pairs = {"in one process": many.files[-1], "in another process": one.files[0]}
    for where, file in pairs.items():
        is_same = png.same(file, many.files[0])
        context.report.row(f"{what}: the same picture {where}",
                           "every pixel the same" if is_same else "differs", "the same", is_same)
    if len(many.files) > 2 and png.same(many.files[1], many.files[0]):
        context.report.row(f"{what}: another prompt and seed", "the same picture", "differs", False)
    first = png.read(many.files[0])
    spread_of = png.deviation(first)
    context.report.row(f"{what}: the picture has contents", f"deviation {spread_of:.0f}, "
                       f"{png.saturated(first):.1%} at the ends", ">= 20", spread_of >= 20)
