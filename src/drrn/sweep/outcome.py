"""The outcome of each job of a sweep, from its record's status and the type of the error that it raised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from drrn.config import Config
from drrn.errors import InUse, counted, signed
from drrn.help import script
from drrn.identity import run_dir
from drrn.report import STUDIES
from drrn.runs.record import finished_record, read_record
from drrn.sweep.machine import Ended, NotBegun
from drrn.sweep.plan import Job, console, new_table


def by_signal(record: dict[str, Any]) -> bool:
    """Whether a signal ended a record's run; a record older than `ended_by` has an error instead."""
    if (ended_by := record.get("ended_by")) is not None:
        return ended_by.partition(" ")[0] == "signal"
    return record.get("status") == "stopped" and "error" in record


def outcome(job: Job) -> tuple[str, str]:
    """A job's outcome in a word, and the reason, "" if there is none."""
    record, touched, raised = job.record, job.written() != job.stamp, job.raised
    if job.before == "finished":
        return "skipped", "was finished"
    if isinstance(raised, InUse):
        return "elsewhere", str(raised)
    if finished_record(job.folder) is not None:
        word = {"resume": "resumed", "failed": "retried"}.get(job.before, "done")
        return word, f"from step {job.first:,}" if job.first else ""
    if touched and record.get("status") == "stopped" and not by_signal(record):
        return "stopped", f"after {record.get('budget', {}).get('steps', '?')} steps; the same command resumes it"
    if touched and record.get("status") == "failed" and not by_signal(record):
        return "failed", record.get("error", "")
    if raised is not None and not isinstance(raised, Ended):
        return "failed", in_a_line(raised)
    if touched or (raised is not None and not isinstance(raised, NotBegun)):
        return "interrupted", "the same command resumes it"
    return "not started", ""


def in_a_line(error: BaseException) -> str:
    """An error's type and text in a line; of another process's traceback, the last line."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith(("-", "You can check"))]
    text = lines[-1] if any("Traceback" in line for line in lines) else " ".join(lines)
    return f"{type(error).__name__}: {text}"


def print_outcomes(rows: Sequence[tuple[Job, str, str]], folder: Path) -> None:
    """Print the closing table, the best PSNR first, and the command that draws the runs."""
    means = [scores_of(job.config) for job, _, _ in rows]
    known = [mean for mean in means if mean]
    heading = f"PSNR\n{known[0]['set']} ×{known[0]['scale']}" if known else "PSNR"
    table = new_table("Outcome")
    table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("above\nbicubic", justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("", overflow="fold")
    best_first = sorted(zip(rows, means, strict=True), key=lambda pair: -pair[1].get("psnr", float("-inf")))
    for (job, word, reason), mean in best_first:
        scores = (f"{mean['psnr']:.2f}", signed(mean["psnr"] - mean["bicubic_psnr"], 2)) if mean else ("", "")
        table.add_row(Text(job.name), *scores, word, Text(reason))  # Text: rich parses no markup in it
    console().print(table)
    good = sum(word in ("done", "skipped", "resumed", "retried") for _, word, _ in rows)
    print(f"{good} of {counted(len(rows), 'run')} done, under {folder}")
    if known:
        print(f"Drawn by: {script('report')} {what_draws(rows[0][0])}")


def what_draws(job: Job) -> str:
    """report.py's override for the runs of a job's sweep: the study of the paper, or the runs' folder."""
    study, output = job.config.study, job.config.output
    if study in STUDIES:
        return f"study={study}" + (f" runs={output}" if output != "runs" else "")
    return f"runs={Path(output) / study}"


def scores_of(config: Config) -> dict[str, Any]:
    """The means of a finished run on its first set at the first scale of its validations; {} if there are none."""
    path, data = finished_record(run_dir(config)), config.data
    for row in read_record(path).get("means", []) if path else []:
        if row["set"] == Path(data.test_sets[0]).name and row["scale"] == (data.val_scales or data.scales)[0]:
            return row
    return {}
