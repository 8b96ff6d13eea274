"""A sweep from its plan to its closing table."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from drrn.config import Config
from drrn.disk import write_whole
from drrn.errors import UserError, counted
from drrn.identity import run_dir
from drrn.launch import first_process
from drrn.sweep.machine import stoppable, threads
from drrn.sweep.outcome import by_signal, outcome, print_outcomes
from drrn.sweep.plan import Job, job_of, make_plan, name_differences, print_plan


def run_sweep(
    asked: Sequence[tuple[Config, list[str]]], launcher: Launcher, hydra: DictConfig, n: int
) -> list[JobReturn]:
    """Print the plan, run every job once, n at a time, and print the outcomes.

    Args:
        asked: each job's checked configuration and its overrides. The same run twice is one job.
        launcher: Hydra's.
        hydra: the whole composed configuration of the sweep.
        n: jobs at a time.

    Raises:
        UserError: jobs failed (all the others have run).
        SystemExit: a signal ended the sweep; the outcomes have been printed.
    """
    plan, *others = {config.plan for config, _ in asked}
    if others:
        raise UserError("plan has several values, but one plan is for the whole sweep: give it once")
    unique: dict[Path, Job] = {}
    for config, overrides in asked:
        unique.setdefault(run_dir(config), job_of(config, overrides))
    jobs = list(unique.values())
    name_differences(jobs)
    first = first_process()  # of torchrun's or Slurm's processes, only the first prints
    if plan != "none" and first:
        print_plan(make_plan(jobs, n, threads(n), always=plan == "only"))
    if plan == "only":
        return []
    folder = Path(hydra.hydra.sweep.dir)
    if first:
        write_whole(folder / "multirun.yaml", lambda path: OmegaConf.save(hydra, path))
    rows: list[tuple[Job, str, str]] = []
    try:
        with stoppable(getattr(launcher, "task_function", None)) as told:
            results = launch(jobs, launcher, hydra.hydra.sweeper.max_batch_size)
    except KeyboardInterrupt as error:
        raise SystemExit(128 + next(iter(told), signal.SIGINT)) from error  # a shell's exit code; no traceback
    finally:
        rows += [(job, *outcome(job)) for job in jobs]
        if first:
            print_outcomes(rows, folder)
    words = [word for _, word, _ in rows]
    if "interrupted" in words or told:  # by a signal to a job in another process
        raise SystemExit(128 + next(iter(told), signal.SIGINT))
    if failed := words.count("failed"):
        raise UserError(f"{failed} of {counted(len(rows), 'run')} failed; the same command tries them again")
    return results


def launch(jobs: Sequence[Job], launcher: Launcher, batch: int | None) -> list[JobReturn]:
    """Pass jobs to the launcher, `batch` at a time (None: all), and set the `raised` of each to its error.

    If a job's process dies (killed, out of memory), joblib's other jobs die with it. The jobs that had not begun are
    launched again; if none had begun, all of the batch have failed.
    """
    results: list[JobReturn] = []
    waiting = list(jobs)
    while waiting:
        left = waiting[:batch]
        before = [job.written() for job in left]
        try:
            returned = launcher.launch([job.overrides for job in left], initial_job_idx=jobs.index(left[0]))
        except Exception as error:  # the launcher's own
            begun = [job for job, then in zip(left, before, strict=True) if job.written() != then]
            for job in begun or left:
                job.raised = error
            if any(by_signal(job.record) for job in begun):
                raise KeyboardInterrupt from error
            waiting = [job for job in waiting if job not in (begun or left)]
            continue
        for job, result in zip(left, returned, strict=True):
            if result.status != JobStatus.COMPLETED:
                job.raised = result._return_value
        results += returned
        waiting = waiting[len(left) :]
    return results
