"""How a study's points become jobs: a Hydra sweeper (Hydra finds sweepers in this package's name).

Hydra's own sweeper makes the Cartesian product of the command line. A study of the paper is a list of chosen
points (Fig. 6 is not a full grid), so this one multiplies `hydra.sweeper.points` by the command line's choices,
drops repetitions, checks every point before the first one starts, prints what they will cost, and says at the
end what became of each, whichever launcher ran them.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

import drrn
from drrn.errors import UserError


class StudySweeper(BasicSweeper):
    """Points × command line → jobs.

    Args:
        max_batch_size: jobs handed to the launcher at a time; None for all.
        params: further overrides, as for Hydra's own sweeper.
        points: one mapping of overrides a point; None for a single point without any.
    """

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
        points: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(max_batch_size, params)
        self.points = [dict(point) for point in points or [{}]]

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """As Hydra's, but that each of joblib's jobs has its own part of the machine.

        Raises:
            UserError: the launcher is not installed.
        """
        package = config.hydra.launcher._target_.rsplit(".", 2)[0]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"this hydra/launcher needs {package}: pip install '.[sweep]'")
        if is_joblib(config):
            from drrn.sweep.machine import OwnPart

            task_function = OwnPart(task_function, workers(config))
        source, path = str(Path(drrn.__file__).parents[1]), os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if source not in path:  # a clone's src/ is on no other process's path
            os.environ["PYTHONPATH"] = os.pathsep.join([source, *filter(None, path)])
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Print the plan, run every point once, say what became of each.

        Raises:
            UserError: a point's configuration is wrong (nothing has started then), or points failed (all the
                others have run).
            SystemExit: the sweep was stopped; what became of its points has been printed.
        """
        from drrn.disk import write_whole
        from drrn.identity import run_dir
        from drrn.launch import first_process

        jobs = self.jobs(arguments)
        configs = [self.check(job) for job in jobs]
        if not jobs:
            raise UserError("hydra.sweeper.points is empty: give at least one point, or null")
        runs = unique((run_dir(config), (config, job)) for config, job in zip(configs, jobs, strict=True))
        configs, jobs = [config for _, (config, _) in runs], [job for _, (_, job) in runs]
        if len({config.plan for config in configs}) > 1:
            raise UserError("plan is one for the whole sweep: give it once")

        from drrn.sweep.machine import threads
        from drrn.sweep.outcome import outcome, print_outcomes
        from drrn.sweep.plan import look, make_plan, print_plan

        n = workers(self.config)
        first = first_process()  # of several that torchrun or Slurm started: the one that writes and speaks
        if configs[0].plan == "none" or not first:
            points = [look(config) for config in configs]
            tell_apart(points, jobs)
        else:
            plan = make_plan(configs, n, threads(n), always=configs[0].plan == "only")
            points = plan.points
            tell_apart(points, jobs)
            print_plan(plan)
        if configs[0].plan == "only":
            return []

        folder = Path(self.config.hydra.sweep.dir)
        if first:
            write_whole(folder / "multirun.yaml", lambda path: OmegaConf.save(self.config, path))
        stamps = [stamp(config) for config in configs]
        errors = [""] * len(jobs)
        try:
            with stoppable(patient=is_joblib(self.config)):
                results = self.launch(jobs, errors)
        except KeyboardInterrupt as error:
            raise SystemExit(130) from error  # as a shell has it; no traceback
        finally:
            changed = [stamp(config) != before for config, before in zip(configs, stamps, strict=True)]
            rows = [
                (point, *outcome(point, touched, error))
                for point, touched, error in zip(points, changed, errors, strict=True)
            ]
            if first:
                print_outcomes(rows, folder)
        words = [word for _, word, _ in rows]
        if "interrupted" in words:  # by a signal to a job in another process
            raise SystemExit(130)
        if failed := words.count("failed"):
            raise UserError(f"{failed} of {len(rows)} points failed; the same command tries them again")
        return results

    def launch(self, jobs: list[list[str]], errors: list[str]) -> list[JobReturn]:
        """Hand the jobs to the launcher; `errors` gains what each job raised.

        A job that dies (killed, out of memory) takes joblib's other jobs with it: what had not begun by then is
        launched again, as long as something has begun.
        """
        results: list[JobReturn] = []
        numbers = list(range(len(jobs)))
        for batch in self.split_overrides_to_chunks(numbers, self.max_batch_size):
            left = list(batch)
            while left:
                if is_joblib(self.config):  # no process without a job: Ctrl-C would break it
                    self.launcher.joblib["n_jobs"] = min(workers(self.config), len(left))
                before = [stamp(self.check(jobs[i])) for i in left]
                try:
                    returned = self.launcher.launch([jobs[i] for i in left], initial_job_idx=left[0])
                except Exception as error:
                    after = [stamp(self.check(jobs[i])) for i in left]
                    begun = [i for i, b, a in zip(left, before, after, strict=True) if a != b]
                    for i in begun or left:
                        errors[i] = in_a_line(error)
                    if any(ended(self.check(jobs[i])) for i in begun):
                        raise KeyboardInterrupt from error
                    left = [i for i in left if i not in begun] if begun else []
                    continue
                for i, result in zip(left, returned, strict=True):
                    if result.status != JobStatus.COMPLETED:
                        errors[i] = in_a_line(result._return_value)
                results += returned
                left = []
        return results

    def jobs(self, arguments: list[str]) -> list[list[str]]:
        """The overrides of every job: each point with each combination of the command line's choices."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        combinations = self.split_arguments(parser.parse_overrides([*self._parse_config(), *arguments]), None)[0]
        named = {override.partition("=")[0] for override in itertools.chain(*combinations)}
        return [
            [*(f"{key}={literal(value)}" for key, value in point.items() if key not in named), *combination]
            for point in self.points
            for combination in combinations
        ]

    def check(self, job: list[str]) -> Any:
        """A job's configuration, composed and checked.

        Raises:
            UserError: it is wrong.
        """
        from drrn.runs.request import request

        composed = self.hydra_context.config_loader.load_sweep_config(self.config, job)
        OmegaConf.set_struct(composed, False)
        composed.pop("hydra")
        try:
            return request(composed, job)
        except UserError as error:
            raise UserError(f"{error} (in the point {' '.join(job)}; nothing has been started)") from error


def tell_apart(points: list[Any], jobs: list[list[str]]) -> None:
    """Give points of one name what differs in their overrides: `optim.lr=0.1`."""
    names = [point.name for point in points]
    for point, job, name in zip(points, jobs, names, strict=True):
        if names.count(name) > 1:
            alike = [other for other, its in zip(jobs, names, strict=True) if its == name]
            point.apart = " ".join(o for o in job if not all(o in other for other in alike))


def stamp(config: Any) -> int:
    """When a run's record was last written, in nanoseconds; 0 if there is none."""
    from drrn.identity import run_dir
    from drrn.runs.record import FILE

    try:
        return (run_dir(config) / FILE).stat().st_mtime_ns
    except OSError:
        return 0


def in_a_line(error: BaseException) -> str:
    """An error's kind and text; of a trace from another process its last line, where the text is."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith(("-", "You can check"))]
    text = lines[-1] if any("Traceback" in line for line in lines) else " ".join(lines)
    return f"{type(error).__name__}: {text}"


def ended(config: Any) -> bool:
    """Whether a run's record says that a signal ended it."""
    from drrn.identity import run_dir
    from drrn.sweep.outcome import stopped_by_hand
    from drrn.sweep.plan import record_of

    return stopped_by_hand((record_of(run_dir(config)) or {}).get("error", ""))


@contextmanager
def stoppable(patient: bool) -> Iterator[None]:
    """SIGTERM ends the sweep as Ctrl-C does, with its table; a job in this process handles both for itself.

    Args:
        patient: the first Ctrl-C waits for the jobs in other processes, which the terminal has told too.
    """

    def terminate(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    def wait(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nwaiting for the points to save their checkpoints; Ctrl-C again ends them at once\n")

    before = {}
    if threading.current_thread() is threading.main_thread():
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, terminate)
        if patient:
            before[signal.SIGINT] = signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_joblib(config: DictConfig) -> bool:
    """Whether joblib launches the points."""
    return "joblib" in config.hydra.launcher._target_


def workers(config: DictConfig) -> int:
    """Points that the launcher works on at a time, where it says so; else 1."""
    from drrn.sweep.machine import cores

    n = config.hydra.launcher.get("n_jobs", 1)
    return n if n > 0 else max(1, len(cores()) + 1 + n)  # joblib: -1 for all cores


def literal(value: Any) -> str:
    """A point's value in the grammar of Hydra's command line, where None is null and a comma starts a choice."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "{" + ",".join(f"{literal(key)}:{literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    words = ("null", "true", "false", "inf", "nan")  # which are no strings there
    if isinstance(value, str) and (value.lower() in words or not re.fullmatch(r"[A-Za-z_][\w./-]*", value)):
        return "'" + value.replace("'", "\\'") + "'"
    return str(value)


def unique(pairs: Any) -> list[tuple[Any, Any]]:
    """(key, value) pairs without those whose key was there before."""
    return list({key: (key, value) for key, value in reversed(list(pairs))}.values())[::-1]
