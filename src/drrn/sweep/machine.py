"""The machine's cores and GPUs, shared among several runs at once, and the signals that end those runs."""

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

ENDED = "ended"  # a file in the shared folder; while it exists, no job begins
LAST_STEP = 60.0  # seconds for a run to save its last step when the sweep's process has died


def threads(n: int) -> int | None:
    """CPU threads of each of n jobs; None for torch's default."""
    return None if n == 1 or "OMP_NUM_THREADS" in os.environ else max(1, len(allowed_cores()) // n)


def workers(launcher: DictConfig) -> int:
    """Jobs that a launcher runs at a time (1 if it has no `n_jobs`); a UserError if `n_jobs` is 0 or no integer."""
    n = launcher.get("n_jobs", 1)
    if type(n) is not int or n == 0:
        raise UserError(f"hydra.launcher.n_jobs = {n}: jobs at a time, or -1 for one a core")
    return n if n > 0 else max(1, len(allowed_cores()) + 1 + n)  # joblib: -1 for all cores


class Ended(Exception):
    """Ctrl-C or a signal ended a job in another process. It is an Exception, which Hydra returns as the job's result,
    while the other jobs save their checkpoints; for a KeyboardInterrupt joblib would kill them."""


class NotBegun(Ended):
    """The sweep was told to end before this job began."""


# Of a process of joblib's, in which `OwnPart` is unpickled anew for each job.
IDLE = threading.Event()  # it runs no job
HELD: list[Any] = []  # its lock, until it ends


class OwnPart:
    """A task for joblib's processes: each uses its own n-th of the cores, and its own GPU.

    A process locks the first free one of n lock files until it ends, since CUDA cannot change its device later. A
    terminal's Ctrl-C reaches only the sweep's process, which forwards every signal (`tell`). If the sweep's process
    dies, the others save their last step and exit.

    Args:
        task: the function that Hydra calls with a job's configuration.
        n: jobs at a time.
    """

    def __init__(self, task: Callable[[DictConfig], Any], n: int) -> None:
        self.task, self.n, self.sweep = task, n, os.getpid()

    @cached_property
    def folder(self) -> Path:
        """The folder that the sweep shares with its processes, from the first job until the last process ends."""
        return Path(tempfile.mkdtemp(prefix="drrn-sweep-"))

    def __call__(self, cfg: DictConfig) -> Any:
        """Run the task on this process's part of the machine.

        Raises:
            Ended: a signal ended it.
            NotBegun: a signal had ended the sweep or another job before.
        """
        IDLE.clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _exit)
        try:
            if (self.folder / ENDED).exists():
                raise NotBegun("the sweep was ended")
            return self.task(cfg)
        except (KeyboardInterrupt, SystemExit) as error:
            with suppress(OSError):  # the sweep has removed the folder
                (self.folder / ENDED).touch()
            self._tidy()
            raise Ended(f"{type(error).__name__}: {error}") from error
        finally:
            self._idle()

    def _idle(self) -> None:
        """Ignore signals while this process waits for a job: they would break joblib."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        IDLE.set()

    def take(self) -> None:
        """Bind this process to the first free part of the machine; called at its start, before it uses torch."""
        self._idle()
        os.setpgid(0, 0)  # the terminal's signals no longer reach it
        (self.folder / str(os.getpid())).touch()  # for `tell`
        threading.Thread(target=self._end_with_sweep, daemon=True).start()
        for number in itertools.cycle(range(self.n)):
            with suppress(Timeout):
                HELD.append(FileLock(self.folder / f"{number}.lock").acquire(timeout=0.05).lock)
                break
        # loky leaves its own start method as the default, which a run's own subprocesses do not have.
        multiprocessing.set_start_method(None, force=True)
        every, gpus = allowed_cores(), visible_gpus()
        mine = every[number :: self.n] or [every[number % len(every)]]
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, mine)
        os.environ.setdefault("OMP_NUM_THREADS", str(len(mine)))
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]

    def _end_with_sweep(self) -> None:
        """End this process when the sweep's process has ended in any way; a run may save its last step first."""
        while os.getppid() == self.sweep:
            time.sleep(0.5)
        if not IDLE.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
        IDLE.wait(LAST_STEP)
        self._tidy()
        os._exit(1)

    def _tidy(self) -> None:
        """Remove the temporary files of a sweep whose process has ended."""
        if self.sweep not in (os.getpid(), os.getppid()):
            shutil.rmtree(self.folder, ignore_errors=True)

    def tell(self, number: int) -> None:
        """Send a signal to the processes of this task, and let none begin another job."""
        import psutil

        (self.folder / ENDED).touch()
        for child in psutil.Process().children():
            if (self.folder / str(child.pid)).exists():
                child.send_signal(number)


def _exit(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@contextmanager
def stoppable(task: Any) -> Iterator[list[int]]:
    """Let SIGTERM end the sweep as Ctrl-C does, with the closing table. Yields the list of signals received.

    Args:
        task: the launcher's task. An `OwnPart` forwards the signal to joblib's processes, and the sweep waits until
            they have saved their steps. A second signal is forwarded too and ends them at once; a third ends the
            sweep without waiting. Any other task runs in this process and handles both signals itself.
    """
    told: list[int] = []
    parts = task if isinstance(task, OwnPart) else None
    folder = parts and parts.folder  # created before the task is pickled for the processes

    def tell(number: int, frame: Any) -> None:
        told.append(number)
        if len(told) > 2:
            raise KeyboardInterrupt
        parts.tell(number)
        again = "ends them at once" if len(told) == 1 else "kills them"
        with suppress(OSError):  # no print: the signal may have interrupted one
            os.write(2, f"\nwaiting for the runs to save their steps; Ctrl-C again {again}\n".encode())

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
    """The GPUs of CUDA_VISIBLE_DEVICES, or the numbers of all GPUs; CUDA is not initialised."""
    if (said := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in said.split(",") if gpu not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
