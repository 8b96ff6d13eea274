"""The number of CPU threads: as many as there are idle cores when a command starts.

Threads of a convolution wait for each other at its end. On two cores, beside one busy process, a training step (B1U5,
16 features, batch 32) with two threads takes 3.3 times as long as with one; no OpenMP wait policy avoids that.
So a command measures the machine's load while it imports torch, logs its number of threads, and keeps it.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

WATCHED = 0.5  # seconds; the load is measured for at least so long


class Threads(NamedTuple):
    """A number of threads, and the reason for it."""

    number: int
    why: str


class Watch:
    """Measure the machine's load from construction to `choose`; torch is imported in between."""

    def __init__(self) -> None:
        self.cores = allowed_cores()
        self.since, self.busy, self.own = time.monotonic(), busy_seconds(self.cores), own_seconds()

    def choose(self, asked: int | None = None, before: int | None = None) -> Threads:
        """The key `threads` (`asked`), else OMP_NUM_THREADS, else the resumed run's (`before`), else idle cores."""
        if asked is not None:
            return Threads(asked, "threads")
        if (said := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(said) > 0:
            return Threads(int(said), "OMP_NUM_THREADS")
        if before is not None:
            return Threads(before, "as before; rounding depends on the number")
        time.sleep(max(0.0, WATCHED - (time.monotonic() - self.since)))
        seconds = time.monotonic() - self.since
        others = max(0.0, busy_seconds(self.cores) - self.busy - (own_seconds() - self.own)) / seconds
        return free_threads(len(self.cores), others, quota())


def free_threads(cores: int, others: float, quota: float | None) -> Threads:
    """Threads for `cores` cores of which other processes keep `others` (0…cores) busy; half a core counts as one.

    `quota` is the control group's limit in cores; None for no limit.
    """
    free = max(1, math.ceil(cores - others - 0.5))
    if quota is not None and math.floor(quota) < free:
        return Threads(max(1, math.floor(quota)), f"the control group may use {quota:g} of {cores} cores")
    return Threads(
        free, f"{cores - free} of {cores} cores are busy" if free < cores else f"all {cores} cores are free"
    )


def allowed_cores() -> list[int]:
    """The indices of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def busy_seconds(cores: list[int]) -> float:
    """Busy seconds of these cores since the machine's start, without those of `nice`d processes."""
    times = psutil.cpu_times(percpu=True)
    return sum(t.user + t.system + getattr(t, "irq", 0) + getattr(t, "softirq", 0) for t in (times[c] for c in cores))


def own_seconds() -> float:
    """CPU seconds of this process and of children that it has waited for."""
    return sum(os.times()[:4])


def quota(group: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPU limit of this process's control group, in cores; None if there is none or it cannot be read."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # versions 2 and 1
        with suppress(OSError, ValueError):  # "max 100000" is no limit, nor is -1
            limit, period = map(float, " ".join((group / name).read_text() for name in files).split())
            return limit / period if limit > 0 else None
    return None
