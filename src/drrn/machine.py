"""The machine: its cores and GPUs shared among several runs at once, and the memory that glibc gives back."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


def cores() -> list[int]:
    """The CPU cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def threads(n: int) -> int | None:
    """CPU threads of each of n jobs; None for what torch takes by itself."""
    return None if n == 1 or "OMP_NUM_THREADS" in os.environ else max(1, len(cores()) // n)


def keep_freed_memory() -> None:
    """From now on glibc keeps the large blocks that are freed and hands them out again (Linux; elsewhere nothing).

    Otherwise every large array is mapped afresh by the kernel and zeroed page by page: a tenth of a training step.
    The price is a process that does not shrink and a heap with gaps.
    """
    _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def keep_heap() -> None:
    """From now on glibc keeps the end of its heap when that is free (Linux; elsewhere nothing).

    A stream of strips frees its feature maps after every layer. By glibc's own rule many of them go back to the
    kernel at once and come again, zeroed. Blocks of 32 MB or more are still mapped and given back.
    """
    _mallopt({M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 2**31 - 1})


def ask_for_huge_pages() -> None:
    """Let torch, from its first tensor on, ask Linux for pages of 2 MB, which take less time than many of 4 KB."""
    with suppress(OSError):  # not Linux, or without such pages
        if "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def freed_memory_kept(on: bool = True) -> Iterator[None]:
    """`keep_freed_memory` for a while, or not at all where memory is what counts (`on` = False)."""
    if on:
        keep_freed_memory()
    try:
        yield
    finally:
        if on:  # what glibc's own rule comes to with large blocks; a first call of mallopt ends that rule
            _mallopt({M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20})


def _mallopt(values: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for parameter, value in values.items():
        if mallopt:
            mallopt(parameter, value)


class Ended(Exception):
    """Ctrl-C or a signal ended a job in another process. Hydra takes an Exception home, and joblib then lets
    the other jobs save their checkpoints, where it would kill them for a KeyboardInterrupt."""


class OwnPart:
    """A task for joblib's processes: each works on its own n-th of the cores, and on its own GPU.

    A process takes the first free of n lock files and keeps it: CUDA cannot change its device later. The kernel
    gives it back when the process ends.

    Args:
        task: what Hydra calls with a job's configuration.
        n: jobs at a time.
    """

    lock: Any = None  # of this process
    ended = False  # in a process that was told to end, no further job starts

    def __init__(self, task: Callable[[DictConfig], Any], n: int) -> None:
        self.task, self.n = task, n
        self.folder = tempfile.mkdtemp(prefix="drrn-sweep-")

    def __call__(self, cfg: DictConfig) -> Any:
        """Do the task on a part of the machine.

        Raises:
            Ended: a signal ended it, or the one before it.
        """
        if OwnPart.ended:
            raise Ended("before this point began")
        if OwnPart.lock is None:
            self.take()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return self.task(cfg)
        except (KeyboardInterrupt, SystemExit) as error:
            OwnPart.ended = True
            raise Ended(f"{type(error).__name__}: {error}") from error
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C breaks a process that waits for a job

    def take(self) -> None:
        """Keep this process, before it has used torch, to the first part of the machine that is free."""
        for number in itertools.cycle(range(self.n)):
            try:
                OwnPart.lock = FileLock(f"{self.folder}/{number}.lock").acquire(timeout=0.05).lock
                break
            except Timeout:
                continue
        # loky leaves its own way to start processes as the default, which the processes of a point do not know.
        multiprocessing.set_start_method(None, force=True)
        every, gpus = cores(), visible_gpus()
        mine = every[number :: self.n] or [every[number % len(every)]]
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, mine)
        os.environ.setdefault("OMP_NUM_THREADS", str(len(mine)))
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES says, or the numbers of all GPUs; nothing is started on them."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [gpu for gpu in said.split(",") if gpu not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
