"""Where metrics go besides the run record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Tracker:
    """A place where a run is watched. It never decides over the run.

    Whatever it raises (no account, no network, a full or read-only folder, a service that was killed) is said once,
    in the run's log and in `state["problem"]`. From then on it is only ended; training continues.
    """

    title: str  # for people
    state: dict[str, Any]  # what the run record keeps of it

    def attempt(self, what: str, call: Callable[..., Any], *arguments: Any, **more: Any) -> bool:
        """Whether a call succeeded; `what` was tried, for people."""
        if self.state["problem"] is not None and what != "finish":
            return False
        try:
            call(*arguments, **more)
        except Exception as error:  # every kind: the tracker's own, the disk's, the socket's
            self.complain(f"{self.title} failed at {what}: {type(error).__name__}: {error}")
            return False
        return True

    def complain(self, problem: str) -> None:
        """Say what went wrong first."""
        if self.state["problem"] is None:
            self.state["problem"] = problem
            log.warning("%s. What it has is kept; the run and its record continue without it.", problem)
