"""What a sweep will cost before it starts, and what became of its points when it ends.

Operations and memory are counted, seconds are measured: a few real optimiser steps of the cheapest and of the
costliest point, on this machine, and a straight line in the operations for the points between. What a point is
(new, finished, to be resumed, failed before) is read from the records, which every launcher leaves behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from drrn.config import Config
from drrn.errors import UserError
from drrn.identity import run_dir, structure_name
from drrn.runs.record import FILE, finished_record, read_record
from drrn.sweep.cost import TIMED, count_bytes, evaluation_pixels, measure, micro_batch, multiplications, operations

SHARE = 100  # a sweep of fewer steps than this many times the timed ones is not worth timing


@dataclass
class Point:
    """One run of a sweep, and its cost.

    `before` is "new", "finished", "resume" or "failed"; `first` the step from which it goes on. `seconds` and
    `bytes` are None where they could not be estimated. `apart` is what tells it from points of the same structure
    and seed.
    """

    config: Config
    before: str
    first: int
    depth: int
    conv_weights: int
    operations: float
    seconds: float | None = None
    bytes: int | None = None
    apart: str = ""

    @property
    def name(self) -> str:
        """`DRRN_B1U9 s1`, and the structure too where the run has a name of its own."""
        name = f"{structure_name(self.config.model)} s{self.config.seed} {self.apart}".rstrip()
        return name if self.config.name is None else f"{self.config.name} ({name})"

    @property
    def steps(self) -> int:
        """Optimiser steps that are left; of a run measured in epochs none are known before its data is."""
        if self.before == "finished" or self.config.trainer.max_epochs is not None:
            return 0
        return max(0, self.config.trainer.max_steps - self.first)


def look(config: Config) -> Point:
    """A point as its records and checkpoints say it is now; nothing is estimated yet."""
    import torch

    from drrn.model import DRRN

    folder = run_dir(config)
    before, first = "new", 0
    if finished_record(folder) is not None:
        before = "finished"
    elif (record := record_of(folder)) is not None:
        if config.ckpt_path is not None:  # null starts afresh
            checkpoints = sorted(folder.glob("checkpoints/step*.ckpt"))
            first = int(checkpoints[-1].stem.removeprefix("step")) if checkpoints else 0
        before = "failed" if record.get("status") == "failed" else "resume"
    with torch.device("meta"):
        network = DRRN(**asdict(config.model))
    return Point(config, before, first, network.depth, network.conv_weight_count, operations(config))


def record_of(folder: Path) -> dict[str, Any] | None:
    """A run's record; None if there is none that can be read."""
    try:
        return read_record(folder / FILE)
    except UserError:
        return None


# ---------------------------------------------------------------------- the plan


@dataclass
class Plan:
    """The points of a sweep, how many are worked on at a time, and why there are no estimates."""

    points: list[Point]
    workers: int
    note: str

    @property
    def seconds(self) -> float | None:
        """Until the last point is done; None if it is not known."""
        seconds = [point.seconds for point in self.points]
        if None in seconds:
            return None
        return max(sum(seconds) / self.workers, *seconds, 0)


def make_plan(configs: Sequence[Config], workers: int = 1, threads: int | None = None, always: bool = False) -> Plan:
    """The points of a sweep and their cost.

    Args:
        configs: the checked configurations of the points.
        workers: points at a time.
        threads: CPU threads that each of them has; None for all.
        always: estimate time and memory even if that takes longer than a small share of the sweep.
    """
    points = [look(config) for config in configs]
    work = [point for point in points if point.before != "finished"]
    for point in points:
        if point.before == "finished":
            point.seconds, point.bytes = 0.0, 0
    if any(point.config.trainer.max_epochs is not None for point in work):
        note = "trainer.max_epochs: the steps are known when the patches are there, so no time is estimated"
    elif not always and sum(point.steps for point in work) < SHARE * (TIMED + 3):
        return Plan(points, workers, "too short to be worth estimating; plan=only does it" if work else "")
    else:
        note = estimate(work, threads)
    counted: dict[str, int] = {}
    for point in work:
        c = point.config
        of_a_step = (c.checkpointing, micro_batch(c), c.data.patch_size, c.trainer.precision, c.optim.algorithm)
        key = repr((c.model, *of_a_step))
        if key not in counted:
            counted[key] = count_bytes(c)
        point.bytes = counted[key]
    return Plan(points, workers, note)


def estimate(work: list[Point], threads: int | None) -> str:
    """Fill in the seconds of points: the cheapest and the costliest are timed, a line joins them.

    Returns:
        Why there are none; "" where there are.
    """
    if not work:
        return ""
    ends = sorted(work, key=lambda point: point.operations)
    cheap, dear = ends[0], ends[-1]
    try:
        at_dear = measure(dear.config, threads)
        at_cheap = measure(cheap.config, threads) if cheap.operations < dear.operations else at_dear
    except UserError as error:
        return f"not timed on this machine: {error}"
    span = dear.operations - cheap.operations
    slope = (at_dear.step - at_cheap.step) / span if span else 0.0
    for point in work:
        step = at_cheap.step + slope * (point.operations - cheap.operations)
        work_of_evaluation = 2 * multiplications(point.config.model) * evaluation_pixels(point.config, point.first)
        point.seconds = point.steps * step + work_of_evaluation / at_dear.evaluation
    return ""


STATES = {
    "new": "new",
    "finished": "finished: skipped",
    "resume": "to be resumed",
    "failed": "failed before: again",
}


def print_plan(plan: Plan) -> None:
    """The plan as a table on the standard output."""
    table = Table(title="Plan", title_justify="left")
    for heading in ("point", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("d", "k", "operations/step", "steps", "time", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in plan.points:
        state = STATES[point.before] + (f" at {point.first:,}" if point.before == "resume" else "")
        table.add_row(
            Text(point.name), state, str(point.depth), f"{point.conv_weights:,}", scaled(point.operations),
            "by epochs" if point.config.trainer.max_epochs is not None else f"{point.steps:,}",
            span_of_time(point.seconds), "–" if point.bytes is None else f"{point.bytes / 1e9:.2f} GB",
        )  # fmt: skip
    console().print(table)
    states = [point.before for point in plan.points]
    parts = [f"{states.count(state)} {text}" for state, text in STATES.items() if state in states]
    print(f"{len(plan.points)} points: {', '.join(parts)}. {plan.workers} at a time.")
    if plan.seconds is not None:
        most = sorted((point.bytes or 0 for point in plan.points), reverse=True)[: plan.workers]
        print(
            f"In all about {span_of_time(plan.seconds)}, and {sum(most) / 1e9:.2f} GB at a time, on machines like "
            "this one."
        )
    if plan.note:
        print(f"Time and memory: {plan.note}.")
    print(
        "k: convolution weights. Operations: multiply-adds × 2 × 3 (forward and backward). Time: from a few\n"
        "real steps and images here. Memory: the tensors of a step, counted; the process has about 0.5 GB\n"
        "besides, and on a CPU its allocator may hold up to twice the tensors.\n"
    )


def console() -> Console:
    """The terminal at its width; a file or pipe at 130 columns, where rich would assume 80."""
    out = Console()
    return out if out.is_terminal else Console(width=130)


def scaled(number: float) -> str:
    """1.5e12 → "1.50 T"."""
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.2f} {letter}"
    return f"{number:.0f}"


def span_of_time(seconds: float | None) -> str:
    """3700 → "1 h 02 min"; None → "–"."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 2880 else f"{minutes / 1440:.1f} days"
