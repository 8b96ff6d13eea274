"""What became of the points of a sweep."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from drrn.identity import run_dir
from drrn.runs.record import finished_record
from drrn.sweep.plan import Point, console, record_of

# ---------------------------------------------------------------------- what became of it

ELSEWHERE = "is being trained by another process"  # train.py's words when a run's folder is locked


def outcome(point: Point, touched: bool, error: str) -> tuple[str, str]:
    """What became of a point: a word for the table, and the reason where there is one.

    Args:
        point: as it was before the sweep.
        touched: its record was written during the sweep.
        error: what the launcher brought back from the job; "" for nothing.

    Returns:
        ("done" | "skipped" | "resumed" | "retried" | "stopped" | "interrupted" | "failed" | "elsewhere" |
        "not started", reason).
    """
    folder = run_dir(point.config)
    record = record_of(folder) or {}
    if point.before == "finished":
        return "skipped", "was finished"
    if ELSEWHERE in error:
        return "elsewhere", error
    if finished_record(folder) is not None:
        word = {"resume": "resumed", "failed": "retried"}.get(point.before, "done")
        return word, f"from step {point.first:,}" if point.first else ""
    if touched and record.get("status") == "stopped" and not stopped_by_hand(record.get("error", "")):
        return "stopped", f"after {record.get('budget', {}).get('steps', '?')} steps; the same command goes on"
    if touched and record.get("status") == "failed" and not stopped_by_hand(record.get("error", "")):
        return "failed", record.get("error", "")
    if error and not stopped_by_hand(error):
        return "failed", error
    if touched or (error and "before this point began" not in error):
        return "interrupted", "the same command goes on"
    return "not started", ""


def stopped_by_hand(error: str) -> bool:
    """Whether an error, as a record or a launcher has it, is Ctrl-C's or a signal's."""
    return error.startswith(("KeyboardInterrupt", "SystemExit", "SIG", "Ended"))


def print_outcomes(rows: list[tuple[Point, str, str]], folder: Path) -> None:
    """The closing table: every point, what became of it, and why."""
    table = Table(title="What became of it", title_justify="left")
    table.add_column("point", overflow="fold")
    table.add_column("outcome", no_wrap=True)
    table.add_column("", overflow="fold")
    for point, word, reason in rows:
        table.add_row(Text(point.name), word, Text(reason))  # Text: brackets in it are no markup
    console().print(table)
    words = [word for _, word, _ in rows]
    good = sum(words.count(word) for word in ("done", "skipped", "resumed", "retried"))
    print(f"{good} of {len(rows)} points done, under {folder}")
