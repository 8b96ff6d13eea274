"""How many threads to compute with: as many as the machine has cores free when a command starts.

Threads of a convolution wait for each other at its end. Beside one busy process on two cores a training step (B1U5,
16 features, batch 32) with two threads takes 3.3 times as long as with one; no setting of how they wait mends it.
So a command looks at the machine while it imports torch, says what it takes in a line, and keeps to it.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

WATCHED = 0.5  # seconds that the machine is looked at, at least


class Threads(NamedTuple):
    """A number of threads, and why it is that."""

    number: int
    why: str


class Watch:
    """Watches the machine; it begins here and ends with `choose`: torch is imported in between."""

    def __init__(self) -> None:
        self.cores = allowed_cores()
        self.since, self.busy, self.own = time.monotonic(), busy_seconds(self.cores), own_seconds()

    def choose(self, asked: int | None = None, before: int | None = None) -> Threads:
        """The threads to compute with: as the key `threads` asks, else as `before` in the run that is resumed."""
        if asked is not None:
            return Threads(asked, "threads")
        if (said := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(said) > 0:
            return Threads(int(said), "OMP_NUM_THREADS")
        if before is not None:
            return Threads(before, "as before: the last bits of a result depend on it")
        time.sleep(max(0.0, WATCHED - (time.monotonic() - self.since)))
        seconds = time.monotonic() - self.since
        others = max(0.0, busy_seconds(self.cores) - self.busy - (own_seconds() - self.own)) / seconds
        return free_threads(len(self.cores), others, quota())


def free_threads(cores: int, others: float, quota: float | None) -> Threads:
    """Threads for `cores` cores of which others keep `others` (0…cores) busy; one half busy counts as busy.

    The control group may use `quota` cores' worth of time; None for no limit.
    """
    free = max(1, math.ceil(cores - others - 0.5))
    if quota is not None and math.floor(quota) < free:
        return Threads(max(1, math.floor(quota)), f"the control group may use {quota:g} of {cores} cores")
    return Threads(
        free, f"{cores - free} of {cores} cores are busy" if free < cores else f"all {cores} cores are free"
    )


def allowed_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def busy_seconds(cores: list[int]) -> float:
    """Seconds since the machine's start in which these cores worked, but for processes that gave way (`nice`)."""
    times = psutil.cpu_times(percpu=True)
    return sum(t.user + t.system + getattr(t, "irq", 0) + getattr(t, "softirq", 0) for t in (times[c] for c in cores))


def own_seconds() -> float:
    """Seconds of processor time of this process and the children it has waited for."""
    return sum(os.times()[:4])


def quota(group: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that this process's control group may use; None for no limit, or none that is known."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # versions 2 and 1
        with suppress(OSError, ValueError):  # "max 100000" is no limit, nor is -1
            limit, period = map(float, " ".join((group / name).read_text() for name in files).split())
            return limit / period if limit > 0 else None
    return None
