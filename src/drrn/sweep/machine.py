"""The machine's cores and GPUs, shared among several runs at once, and how those runs are told to end."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from drrn.errors import UserError
from drrn.fast.threads import allowed_cores

ENDED = "ended"  # the file in the shared folder that says: begin nothing more
LAST_STEP = 60.0  # seconds that a run has to keep its last step when the sweep's process is gone


def threads(n: int) -> int | None:
    """CPU threads of each of n jobs; None for what torch takes by itself."""
    return None if n == 1 or "OMP_NUM_THREADS" in os.environ else max(1, len(allowed_cores()) // n)


def workers(launcher: DictConfig) -> int:
    """Jobs that a launcher works on at a time, else 1; a UserError where its configuration gives no number."""
    n = launcher.get("n_jobs", 1)
    if type(n) is not int or n == 0:
        raise UserError(f"hydra.launcher.n_jobs = {n}: jobs at a time, or -1 for one a core")
    return n if n > 0 else max(1, len(allowed_cores()) + 1 + n)  # joblib: -1 for all cores


class Ended(Exception):
    """Ctrl-C or a signal ended a job in another process. Hydra takes an Exception home, and joblib then lets
    the other jobs save their checkpoints, where it would kill them for a KeyboardInterrupt."""


class NotBegun(Ended):
    """The sweep was told to end before this job began."""


class OwnPart:
    """A task for joblib's processes: each works on its own n-th of the cores, and on its own GPU.

    A process takes the first free of n lock files and keeps it: CUDA cannot change its device later. The kernel
    gives it back when the process ends. A terminal's Ctrl-C reaches the sweep's process alone, which passes every
    signal on (`tell`), wherever it came from. A process whose sweep is gone keeps its step and ends.

    Args:
        task: what Hydra calls with a job's configuration.
        n: jobs at a time.
    """

    lock: Any = None  # of this process
    busy = False  # whether this process works on a job

    def __init__(self, task: Callable[[DictConfig], Any], n: int) -> None:
        self.task, self.n, self.sweep = task, n, os.getpid()

    @cached_property
    def folder(self) -> Path:
        """What the sweep and its processes share, from the first job on until the last of them ends."""
        return Path(tempfile.mkdtemp(prefix="drrn-sweep-"))

    def __call__(self, cfg: DictConfig) -> Any:
        """Do the task on this process's part of the machine.

        Raises:
            Ended: a signal ended it.
            NotBegun: the sweep was told to end, or another of its jobs.
        """
        OwnPart.busy = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _exit)
        try:
            if (self.folder / ENDED).exists():
                raise NotBegun("the sweep was ended")
            return self.task(cfg)
        except (KeyboardInterrupt, SystemExit) as error:
            with suppress(OSError):  # gone with the sweep
                (self.folder / ENDED).touch()
            raise Ended(f"{type(error).__name__}: {error}") from error
        finally:
            self._idle()

    def _idle(self) -> None:
        """Wait for a job: a signal would break that."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        OwnPart.busy = False

    def take(self) -> None:
        """Keep this process, at its start and before it uses torch, to the first part of the machine that is free."""
        self._idle()
        os.setpgid(0, 0)  # out of the terminal's reach
        (self.folder / str(os.getpid())).touch()  # for `tell`
        threading.Thread(target=self._end_with_sweep, daemon=True).start()
        for number in itertools.cycle(range(self.n)):
            with suppress(Timeout):
                OwnPart.lock = FileLock(self.folder / f"{number}.lock").acquire(timeout=0.05).lock
                break
        # loky leaves its own way to start processes as the default, which the processes of a run do not know.
        multiprocessing.set_start_method(None, force=True)
        every, gpus = allowed_cores(), visible_gpus()
        mine = every[number :: self.n] or [every[number % len(every)]]
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, mine)
        os.environ.setdefault("OMP_NUM_THREADS", str(len(mine)))
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]

    def _end_with_sweep(self) -> None:
        """End this process when the sweep's is gone, however that ended; a run may keep its step first."""
        while os.getppid() == self.sweep:
            time.sleep(0.5)
        if OwnPart.busy:
            os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + LAST_STEP
        while OwnPart.busy and time.monotonic() < end:
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(1)

    def tell(self, number: int) -> None:
        """Pass a signal on to the processes that work on this task, and let none begin another job."""
        import psutil

        (self.folder / ENDED).touch()
        for child in psutil.Process().children():
            if (self.folder / str(child.pid)).exists():
                child.send_signal(number)


def _exit(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@contextmanager
def stoppable(task: Any) -> Iterator[list[int]]:
    """SIGTERM ends the sweep as Ctrl-C does, with its table. Yields the signals that come.

    Args:
        task: what the launcher calls. An `OwnPart` passes the signal on to joblib's processes, and the sweep waits
            until they have kept their steps. A second signal is passed on too, which ends them at once; a third
            one ends the sweep without them. Any other task, in this process, handles both signals for itself.
    """
    told: list[int] = []
    parts = task if isinstance(task, OwnPart) else None
    folder = parts and parts.folder  # before the processes are given the task

    def tell(number: int, frame: Any) -> None:
        told.append(number)
        if len(told) > 2:
            raise KeyboardInterrupt
        parts.tell(number)
        again = "ends them at once" if len(told) == 1 else "kills them"
        with suppress(OSError):  # no print: it may be what was interrupted
            os.write(2, f"\nwaiting for the runs to keep their steps; Ctrl-C again {again}\n".encode())

    handlers = {signal.SIGTERM: tell, signal.SIGINT: tell} if parts else {signal.SIGTERM: _exit}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if parts:
            shutil.rmtree(folder, ignore_errors=True)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES says, or the numbers of all GPUs; nothing is started on them."""
    if (said := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in said.split(",") if gpu not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
