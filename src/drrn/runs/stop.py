"""How a run is stopped: signals are noted, the step is finished and kept."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from drrn.launch import launched


class Stopped(SystemExit):
    """A signal ended the run; the exit code is what a shell gives for it (130 for Ctrl-C, 143 for SIGTERM)."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.signal = number

    def __str__(self) -> str:
        return self.signal.name


class StopSignals:
    """What Ctrl-C, SIGTERM, SIGUSR1 (Slurm's usual warning) and SIGHUP (a closed terminal) do while a run lasts.

    They end it, and nothing is lost.

    While a training step is under way (`busy`), the signal is only noted: the step is finished and kept, then
    `Checkpoints` raises `Stopped`. At all other times there is nothing to keep and `Stopped` is raised at once:
    before the training, in a validation or test, in a step so slow that the one before it has been kept. A
    second Ctrl-C never waits.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.busy = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self.process, self.before = os.getpid(), {s: signal.getsignal(s) for s in self.SIGNALS}
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def take(self) -> None:
        """Handle the signals, but for those that the shell has had ignored (nohup, jobs in the background).

        Again in every stage: Lightning's own SIGTERM handler ends a training wherever it is and saves nothing.
        """
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, self.handle)

    def handle(self, number: int, frame: object) -> None:
        """Note it, or raise `Stopped`."""
        if os.getpid() != self.process or (self.asked and number != signal.SIGINT):
            return  # in a worker just forked, or said already
        if self.asked and launched() and time.monotonic() - self.when < 1:
            return  # the same Ctrl-C, from the terminal and from torchrun
        self.when = time.monotonic()
        again, self.asked = self.asked is not None, self.asked or signal.Signals(number)
        if again or not self.busy:
            raise Stopped(self.asked)
        if rank_zero_only.rank:
            return
        with contextlib.suppress(OSError):  # no print: it may be what was interrupted
            os.write(2, f"\n{self.asked.name}: finishing this step; Ctrl-C ends at once\n".encode())
