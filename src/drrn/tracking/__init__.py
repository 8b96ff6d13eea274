"""Loggers: destinations of a run's metrics besides its record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Tracker:
    """Base of the loggers of a run; a failure of one never ends the run.

    Its first error (no account, no network, a full or read-only folder, a killed service) is written to the run's log
    and to `state["problem"]`. From then on it is only asked to finish; training continues.
    """

    title: str  # for messages
    state: dict[str, Any]  # its part of the run record

    def attempt(self, what: str, call: Callable[..., Any], *arguments: Any, **more: Any) -> bool:
        """Call `call(*arguments, **more)`; whether it succeeded. `what` names the attempt in the message."""
        if self.state["problem"] is not None and what != "finish":
            return False
        try:
            call(*arguments, **more)
        except Exception as error:  # of any kind: the tracker's own, the disk's, the socket's
            self.complain(f"{self.title} failed at {what}: {type(error).__name__}: {error}")
            return False
        return True

    def complain(self, problem: str) -> None:
        """Note and log the first problem."""
        if self.state["problem"] is None:
            self.state["problem"] = problem
            log.warning("%s. The run and its record continue without it; rows that it has are kept.", problem)
