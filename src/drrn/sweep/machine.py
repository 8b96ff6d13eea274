"""The machine's cores and GPUs, shared among several runs at once."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig


def cores() -> list[int]:
    """The CPU cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def threads(n: int) -> int | None:
    """CPU threads of each of n jobs; None for what torch takes by itself."""
    return None if n == 1 or "OMP_NUM_THREADS" in os.environ else max(1, len(cores()) // n)


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
