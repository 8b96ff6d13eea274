"""The plan of a sweep, with the cost of each job, before it starts.

Operations and memory are counted. Seconds are measured in a few optimiser steps of the cheapest and of the costliest
job, on this machine, and interpolated linearly in the operations for the other jobs. A job's state (new, finished, to
be resumed, failed before) comes from its run's record, which every launcher leaves behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from drrn.config import Config
from drrn.errors import UserError, counted
from drrn.identity import run_dir, structure_name
from drrn.networks import count, pair_sides
from drrn.runs.record import FILE, done_before, read_record

SHORT = 800  # steps: a sweep with fewer in all is not timed


@dataclass(eq=False)
class Job:
    """One run of a sweep: its state before the sweep, its cost, and the error that it raised."""

    config: Config
    overrides: list[str] = field(default_factory=list)  # the command line for this run alone
    before: str = "new"  # or "finished", "resume", "failed"
    first: int = 0  # the step from which it resumes
    seconds: float | None = None  # None without an estimate
    bytes: int | None = None  # as `seconds`
    differs: str = ""  # the overrides in which it differs from jobs of the same structure and seed
    stamp: int = 0  # `written` before the sweep
    raised: BaseException | None = None  # the error that the launcher returned for it

    def __post_init__(self) -> None:
        self.folder = run_dir(self.config)

    @property
    def name(self) -> str:
        """`DRRN_B1U9 s1`; for a run with a name of its own, that name with this one in brackets."""
        name = f"{structure_name(self.config.model)} s{self.config.seed} {self.differs}".rstrip()
        return name if self.config.name is None else f"{self.config.name} ({name})"

    @property
    def steps(self) -> int:
        """Optimiser steps that are left; 0 for a run with `max_epochs`, whose steps depend on its data."""
        if self.before == "finished" or self.config.trainer.max_epochs is not None:
            return 0
        return max(0, self.config.trainer.max_steps - self.first)

    @property
    def record(self) -> dict[str, Any]:
        """The run's record; {} if there is none or it cannot be read."""
        try:
            return read_record(self.folder / FILE)
        except UserError:
            return {}

    def written(self) -> int:
        """The time of its record's last change, in nanoseconds; 0 if there is none."""
        file = self.folder / FILE
        return file.stat().st_mtime_ns if file.is_file() else 0


def job_of(config: Config, overrides: Sequence[str] = ()) -> Job:
    """A job with its state from its record and checkpoints; `make_plan` estimates its cost."""
    job = Job(config, list(overrides))
    job.stamp = job.written()
    if done_before(job.config) is not None:
        job.before, job.seconds, job.bytes = "finished", 0.0, 0
    elif (record := job.record) and config.ckpt_path is not None:  # null: it starts from scratch
        checkpoints = sorted(job.folder.glob("checkpoints/step*.ckpt"))
        job.first = int(checkpoints[-1].stem.removeprefix("step")) if checkpoints else 0
        job.before = "failed" if record.get("status") == "failed" else "resume"
    return job


def name_differences(jobs: Sequence[Job]) -> None:
    """Set `differs` of jobs that have the same name to the overrides that they do not share: `optim.lr=0.1`."""
    names = [job.name for job in jobs]
    for job, name in zip(jobs, names, strict=True):
        alike = [other.overrides for other, its in zip(jobs, names, strict=True) if its == name]
        if len(alike) > 1:
            job.differs = " ".join(o for o in job.overrides if not all(o in other for other in alike))


@dataclass
class Plan:
    """The jobs of a sweep, how many run at a time, and the reason if there are no estimates."""

    jobs: list[Job]
    workers: int
    note: str

    @property
    def seconds(self) -> float | None:
        """Estimated time until the last job is done; None if a job has no estimate."""
        seconds = [job.seconds for job in self.jobs]
        return None if None in seconds else max(sum(seconds) / self.workers, *seconds, 0)


def make_plan(jobs: list[Job], workers: int = 1, threads: int | None = None, always: bool = False) -> Plan:
    """Estimate the `seconds` and `bytes` of jobs, of which `workers` run at a time with `threads` threads each.

    `always`: also for a sweep of fewer steps than `SHORT`.
    """
    work = [job for job in jobs if job.before != "finished"]
    if not work:
        return Plan(jobs, workers, "")
    if any(job.config.trainer.max_epochs is not None for job in work):
        note = "trainer.max_epochs: the number of steps depends on the patches, so no time is estimated"
    elif not always and sum(job.steps for job in work) < SHORT:
        return Plan(jobs, workers, "too short to be estimated; plan=only estimates it all the same")
    else:
        note = estimate(work, threads)
    from drrn.sweep.cost import count_bytes, micro_batch  # imports Lightning: not for a finished sweep

    known: dict[str, int] = {}  # bytes, by everything that they depend on
    for job in work:
        c = job.config
        speed = (c.speed.checkpointing, c.trainer.precision)
        key = repr((c.model, micro_batch(c), c.data.patch_size, speed, c.optim.algorithm, c.optim.loss))
        job.bytes = known[key] = known.get(key) or count_bytes(c)
    return Plan(jobs, workers, note)


def operations(config: Config) -> float:
    """Floating-point operations of an optimiser step: forward, and backward for weights and inputs."""
    _, side = pair_sides(config.model, config.data.patch_size)
    return count(config.model).step * side**2 * config.data.batch_size


def estimate(work: list[Job], threads: int | None) -> str:
    """Estimate the seconds of jobs: the cheapest and the costliest are timed, the others interpolated.

    Returns:
        The reason if there is no estimate, else "".
    """
    from drrn.sweep.cost import evaluation_pixels, measure

    work = sorted(work, key=lambda job: operations(job.config))
    each = [operations(job.config) for job in work]
    try:
        dear = measure(work[-1].config, threads)
        cheap = measure(work[0].config, threads) if each[0] < each[-1] else dear
    except UserError as error:
        return f"not timed on this machine: {error}"
    steps = np.interp(each, [each[0], each[-1]], [cheap.step, dear.step])
    for job, step in zip(work, steps, strict=True):
        of_evaluation = count(job.config.model).output * evaluation_pixels(job.config, job.first)
        job.seconds = float(job.steps * step + of_evaluation / dear.evaluation)
    return ""


STATES = {"new": "new", "finished": "finished: skipped", "resume": "to be resumed", "failed": "failed: retried"}


def print_plan(plan: Plan) -> None:
    """Print the plan as a table."""
    table = new_table("Plan")
    table.add_column("state", overflow="fold")
    for heading in ("d", "k", "operations\n/step", "steps", "time", "memory\nGB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for job in plan.jobs:
        state = f"resume at {job.first:,}" if job.before == "resume" else job.before
        counts = count(job.config.model)
        table.add_row(
            Text(job.name), state, str(counts.depth), f"{counts.conv_weights:,}", scaled(operations(job.config)),
            "by epochs" if job.config.trainer.max_epochs is not None else f"{job.steps:,}",
            span_of_time(job.seconds), "–" if job.bytes is None else f"{job.bytes / 1e9:.2f}",
        )  # fmt: skip
    console().print(table)
    states = [job.before for job in plan.jobs]
    parts = [f"{states.count(state)} {text}" for state, text in STATES.items() if state in states]
    left = sum(job.steps * operations(job.config) for job in plan.jobs)
    work = f" {scaled(left)} operations in all." if left else ""
    print(f"{counted(len(plan.jobs), 'run')}: {', '.join(parts)}. {plan.workers} at a time.{work}")
    if plan.seconds is not None:
        most = sorted((job.bytes or 0 for job in plan.jobs), reverse=True)[: plan.workers]
        memory = f"{sum(most) / 1e9:.2f} GB at a time"
        print(f"In all about {span_of_time(plan.seconds)}, and {memory}, on machines like this one.")
    if plan.note:
        print(f"Time and memory: {plan.note.rstrip('.!')}.")
    print(
        "k: convolution weights. Operations: of the convolutions, forward and backward,\n"
        "a multiply-add is two. Time: from a few real steps and images here. Memory: the\n"
        "tensors of a step, counted; the process has about 0.5 GB besides, and on a CPU\n"
        "its allocator may hold up to twice the tensors.\n"
    )


def new_table(title: str) -> Table:
    """A table whose first column names runs."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold")
    return table


def console() -> Console:
    """A console with the terminal's width, or 130 columns for a file or pipe (rich's default is 80)."""
    out = Console()
    return out if out.is_terminal else Console(width=130)


def scaled(number: float) -> str:
    """1.5e12 → "1.50 T"."""
    for power, letter in zip((18, 15, 12, 9, 6), "EPTGM", strict=True):
        if number >= 10**power:
            return f"{number / 10**power:.2f} {letter}"
    return f"{number:.0f}"


def span_of_time(seconds: float | None) -> str:
    """3700 → "1 h 02 min"; None → "–"."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes >= 2880:
        return f"{minutes / 1440:.1f} days"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
