"""The record and the log of a run, kept up to date while it lasts."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from drrn.disk import write_json
from drrn.errors import UserError
from drrn.runs.processes import failure, note_failure
from drrn.runs.record import read_record
from drrn.runs.stop import Stopped, StopSignals
from drrn.tracking.loggers import Tracking

log = logging.getLogger("drrn.train")


@contextmanager
def recorded(path: Path, record: dict[str, Any], stop: StopSignals, tracking: Tracking) -> Iterator[None]:
    """Write a run's record: at the start with status "running", so that a killed run leaves one, and at its end.

    Ends the tracking, so that the next job of a multirun starts its own W&B run.
    """
    write = rank_zero_only(write_json)

    def close(asked: signal.Signals) -> None:
        if record["status"] == "running":
            record.update(status="stopped", ended_by=f"signal {asked.name}", error=f"{asked.name}: a signal ended it")
        write(path, record)

    write(path, record)
    stop.close = close
    try:
        yield
    except BaseException as error:
        elsewhere = failure(path) if rank_zero_only.rank == 0 and not isinstance(error, UserError) else None
        if elsewhere is not None:  # another rank failed first; this one lost the connection or was terminated
            record.update(status="failed", ended_by="error", error=elsewhere)
            log.error("%s failed: %s", record["name"], elsewhere)
            raise
        if stop.asked is not None or isinstance(error, Stopped):  # or the error of a worker that it ended
            stopped = error if isinstance(error, Stopped) else Stopped(stop.asked)
            stop.acted = True
            close(stopped.signal)
            step = record.get("budget", {}).get("steps", 0)
            name, *words = sys.argv
            name = name if name.startswith("drrn ") else f"python {shlex.quote(name)}"  # as it was typed
            command = f"{name} {shlex.join(word for word in words if word != 'ckpt_path=null')}"  # null starts afresh
            log.warning("stopped by %s at step %d; the same command resumes from there: %s", stopped, step, command)
            raise stopped from None
        by = "user error" if isinstance(error, UserError) else "error"
        record.update(status="failed", ended_by=by, error=f"{type(error).__name__}: {error}")
        if rank_zero_only.rank > 0:
            note_failure(path, f"{record['error']} (in process {rank_zero_only.rank})", by)
        if not isinstance(error, UserError | SystemExit):
            log.exception("%s failed", record["name"])  # into the run's log too
        raise
    finally:
        write(path, record)
        tracking.finish()
        write(path, record)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Log to the console and to the run's file, Lightning's profiler included; ranks above 0 log errors only, to the
    console."""
    form = logging.Formatter("%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    loggers = [logging.getLogger(name) for name in ("drrn", "lightning.pytorch.profilers.profiler")]
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if rank_zero_only.rank == 0:
        handlers.append(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
        handlers[-1].handleError = lambda line: None  # a full disk: the console has the line, the record the error
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    loggers[1].propagate = False  # to Lightning's own handler
    for logger in loggers:
        logger.setLevel(logging.INFO if rank_zero_only.rank == 0 else logging.ERROR)
        logger.handlers += handlers
    for handler in handlers:
        handler.setFormatter(form)
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers = [handler for handler in logger.handlers if handler not in handlers]
        for handler in handlers:
            with suppress(OSError):  # a full disk
                handler.close()


def warn_of_differences(path: Path, record: dict[str, Any]) -> None:
    """Warn where code or versions differ from those of the record that is trained again (`from_record`)."""
    old = read_record(path)
    then = {"commit": (old.get("git") or {}).get("commit"), **old.get("versions", {})}
    now = {"commit": (record["git"] or {}).get("commit"), **record["versions"]}
    differing = [f"{key} {then[key]} is now {now.get(key)}" for key in then if then[key] != now.get(key)]
    if (old.get("git") or {}).get("changed") or (record["git"] or {}).get("changed"):
        differing.append("not all of the code was, or is, in the commit")
    if differing:
        print(f"{path}: the result may differ: {'; '.join(differing)}", file=sys.stderr)
