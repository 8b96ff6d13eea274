"""How a run is stopped: signals are noted, safe points act on them, the step is finished and kept."""

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
GRACE = 20.0  # seconds for the next safe point: clusters kill 30 s after they ask
TOGETHER = 0.3  # seconds within which signals are one request (a terminal that is closed sends two)


class Stopped(SystemExit):
    """A signal ended the run; the exit code is what a shell gives for it (130 for Ctrl-C, 143 for SIGTERM)."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.signal = number

    def __str__(self) -> str:
        return self.signal.name


class StopSignals:
    """What Ctrl-C, SIGTERM, SIGUSR1 (Slurm's usual warning) and SIGHUP (a closed terminal) do while a run lasts.

    They end it, and nothing is lost. The handler only notes the signal, since an exception of a handler may be raised
    where Python drops it (in a callback of fork, in a finaliser). `check`, at safe points, raises `Stopped`: between
    two steps, between two images, inside a step that is not waited for, while patches are built. A thread reads the
    signals too, from the descriptor that Python's own C handler writes to, so it sees them while this process is
    inside a collective or the compiler. It ends the process, with the record closed by `close`, at a second signal
    and when no safe point has come for `GRACE` seconds.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    current: StopSignals | None = None

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.acted = False  # a safe point has raised `Stopped`: what follows has its own time limits
        self.busy = False  # a step is under way that will be finished and kept
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
            os.write(self.writer, b"\0")  # the thread ends; the other end may be open in workers that were forked
            os.close(self.writer)
            for number, handler in self.before.items():
                signal.signal(number, handler)
            if error is None and not self.acted and callable(before := self.before.get(self.asked)):
                before(self.asked, None)  # it came after the last safe point: a sweep begins no other run

    def take(self) -> None:
        """Handle the signals, but for those that the shell has had ignored (nohup, jobs in the background).

        Again in every stage: Lightning's own SIGTERM handler ends a training wherever it is and saves nothing.
        """
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, self.note)

    def note(self, number: int, frame: object = None) -> None:
        """The handler."""
        if os.getpid() == self.process:  # else in a worker just forked
            self.asked = self.asked or signal.Signals(number)

    def check(self) -> None:
        """A safe point: `Stopped` if a signal has come."""
        if self.asked is not None:
            self.acted = True
            raise Stopped(self.asked)

    def wait(self, work: Callable[[], T]) -> T:
        """Do long work that has no safe points of its own (downloads, building patches) in a thread.

        A signal raises `Stopped`: the processes that do the work are ended, and the thread ends with this process.
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
                thread.join(2.0)  # for its cleaning up
                self.check()
        return done.result()

    def _watch(self, reader: int) -> None:
        when: float | None = None  # of the first signal
        while True:
            waiting = when is not None and not self.acted
            left = max(0.0, when + GRACE - time.monotonic()) if waiting else None
            if not select.select([reader], [], [], left)[0]:
                if not self.acted:
                    self._end("nothing could be waited for any longer")
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
                        f"{self.asked.name}: stopping as soon as the step is kept; a second signal ends at once"
                    )
                elif now - when > (1.0 if launched() else TOGETHER):  # torchrun passes on a terminal's Ctrl-C
                    self._end("a second signal")

    def _say(self, text: str) -> None:
        if rank_zero_only.rank == 0:
            os.write(2, f"\n{text}\n".encode())  # no print: it may be what was interrupted

    def _end(self, why: str) -> None:
        try:
            self._say(f"{self.asked.name}: ended at once, {why}; the same command resumes from the last checkpoint")
            self.close(self.asked)
        finally:
            os._exit(128 + self.asked)


def _forked() -> None:
    """A worker's signals are none of this process's: it has inherited the descriptor."""
    if StopSignals.current is not None:
        with contextlib.suppress(ValueError):  # forked by a thread: there is no main thread any more
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forked)
