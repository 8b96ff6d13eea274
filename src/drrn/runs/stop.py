"""Stopping a run: signals are noted, safe points act on them, the current step is finished and saved."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_only

from drrn.launch import launched

T = TypeVar("T")
GRACE = 20.0  # seconds until the next safe point: clusters kill 30 s after their warning
TOGETHER = 0.3  # seconds within which signals are one request (a terminal that is closed sends two)


class Stopped(SystemExit):
    """A signal ended the run; the exit code is the shell's, 128 + number (130 for Ctrl-C, 143 for SIGTERM)."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.signal = number

    def __str__(self) -> str:
        return self.signal.name


class StopSignals:
    """Handling of Ctrl-C, SIGTERM, SIGUSR1 (Slurm's usual warning) and SIGHUP (a closed terminal) while a run lasts.

    They stop the run without loss. The handler only notes the signal, since Python drops exceptions of a handler that
    interrupts a fork callback or a finaliser. `check`, at safe points, raises `Stopped`: between two steps, between
    two images, inside a slow step, while patches are built. A thread reads the signals too, from the file descriptor
    that Python's C handler writes to, so it sees them while the main thread is inside a collective or the compiler.
    It calls `close`, for the record, and ends the process: at a second signal, or when no safe point has come for
    `GRACE` seconds.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    current: StopSignals | None = None

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.acted = False  # a safe point has raised `Stopped`: what follows has its own time limits
        self.busy = False  # a step is running that will be finished and saved
        self.close: Callable[[signal.Signals], Any] = lambda asked: None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self.process, self.before = os.getpid(), {s: signal.getsignal(s) for s in self.SIGNALS}
        if threading.current_thread() is threading.main_thread():
            reader, self.writer = os.pipe()
            os.set_blocking(self.writer, False)
            self.wakeup = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
            StopSignals.current = self
        self.take()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if StopSignals.current is self:
            StopSignals.current = None
            signal.set_wakeup_fd(self.wakeup)
            os.write(self.writer, b"\0")  # ends the thread; closing would not: forked workers hold the pipe open too
            os.close(self.writer)
            for number, handler in self.before.items():
                signal.signal(number, handler)
            if error is None and not self.acted and callable(before := self.before.get(self.asked)):
                before(self.asked, None)  # a signal after the last safe point: a sweep must not start its next run

    def take(self) -> None:
        """Install the handler, except for signals that the shell ignores (nohup, background jobs).

        Called again in every stage: Lightning installs its own SIGTERM handler, which ends a training without saving.
        """
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, self.note)

    def note(self, number: int, frame: object = None) -> None:
        """The signal handler."""
        if os.getpid() == self.process:  # else this is a worker that has just been forked
            self.asked = self.asked or signal.Signals(number)

    def check(self) -> None:
        """A safe point: raise `Stopped` if a signal has come."""
        if self.asked is not None:
            self.acted = True
            raise Stopped(self.asked)

    def wait(self, work: Callable[[], T]) -> T:
        """Do long work without safe points of its own (downloads, building patches) in a thread.

        A signal terminates the child processes and raises `Stopped`; the thread ends with this process.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            if self.asked is not None:
                for child in multiprocessing.active_children():
                    child.terminate()
                thread.join(2.0)  # time to clean up
                self.check()
        return done.result()

    def _watch(self, reader: int) -> None:
        when: float | None = None  # of the first signal
        while True:
            waiting = when is not None and not self.acted
            left = max(0.0, when + GRACE - time.monotonic()) if waiting else None
            if not select.select([reader], [], [], left)[0]:
                if not self.acted:
                    self._end(f"no safe point in {GRACE:.0f} s")
                continue
            for number in os.read(reader, 64):
                if number == 0:
                    os.close(reader)
                    return
                if number not in self.SIGNALS:
                    continue
                now = time.monotonic()
                if when is None:
                    when = now
                    self.note(number)
                    self._say(
                        f"{self.asked.name}: stopping as soon as the step is saved; a second signal ends at once"
                    )
                elif now - when > (1.0 if launched() else TOGETHER):  # torchrun sends a terminal's Ctrl-C once more
                    self._end("a second signal")

    def _say(self, text: str) -> None:
        if rank_zero_only.rank == 0:
            os.write(2, f"\n{text}\n".encode())  # not print, which the signal may have interrupted

    def _end(self, why: str) -> None:
        try:
            self._say(f"{self.asked.name}: ended at once, {why}; the same command resumes from the last checkpoint")
            self.close(self.asked)
        finally:
            os._exit(128 + self.asked)


def _forked() -> None:
    """Disconnect a forked worker from the inherited descriptor: its signals are not this process's."""
    if StopSignals.current is not None:
        with contextlib.suppress(ValueError):  # forked by another thread, so this is not the main thread
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forked)
