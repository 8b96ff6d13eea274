"""Hydra sweepers that turn a study's points into jobs (Hydra finds plugins by this package's name).

Hydra's own sweeper makes the Cartesian product of the command line. A study of the paper is a list of chosen
points (Fig. 6 is not a full grid), so `StudySweeper` multiplies `hydra.sweeper.points` by the command line's choices
and checks every job before the first one starts. `drrn.sweep` runs them. A search, whose jobs depend on earlier ones,
is Optuna's.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import drrn
from drrn.errors import Diverged, UserError

MANY = 50  # jobs whose checks take more than some seconds


class StudySweeper(BasicSweeper):
    """Points × command line → jobs.

    Args:
        max_batch_size: jobs handed to the launcher at a time; None for all.
        params: further overrides, as for Hydra's own sweeper.
        points: a mapping of overrides for each point; None: a single point without overrides.
    """

    def __init__(
        self, max_batch_size: int | None = None, params: Any = None, points: list[dict[str, Any]] | None = None
    ) -> None:
        super().__init__(max_batch_size, params)
        self.points = points

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """As Hydra's, but each of joblib's jobs gets its own part of the machine.

        A wrong key of the sweeper and a launcher that is not installed are a UserError.
        """
        batch, points = self.max_batch_size, self.points
        if batch is not None and (type(batch) is not int or batch < 1):
            raise UserError(f"hydra.sweeper.max_batch_size = {batch}: at least 1, or null for all jobs")
        if points is not None and not (points and all(isinstance(point, dict | DictConfig) for point in points)):
            raise UserError(f"hydra.sweeper.points = {points}: a list of at least one {{key: value}}, or null")
        from drrn.sweep.machine import OwnPart, workers

        launcher = config.hydra.launcher
        package = launcher._target_.rsplit(".", 2)[0]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"this hydra/launcher needs {package}: pip install '.[sweep]'")
        self.n = workers(launcher)
        if "joblib" in package and self.n > 1:
            task_function = OwnPart(task_function, self.n)
        source, path = str(Path(drrn.__file__).parents[1]), os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if source not in path:  # other processes do not have a clone's src/ on their path
            os.environ["PYTHONPATH"] = os.pathsep.join([source, *filter(None, path)])
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if isinstance(task_function, OwnPart):
            self.launcher.joblib["initializer"] = task_function.take

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Check all jobs, with a UserError for a wrong one before any starts; then run them."""
        if len(jobs := self.jobs(arguments)) > MANY:
            print(f"checking {len(jobs)} jobs before the first one starts", file=sys.stderr)
        asked = [(self.check(job), job) for job in jobs]

        from drrn.sweep.run import run_sweep

        return run_sweep(asked, self.launcher, self.config, self.n)

    def jobs(self, arguments: list[str]) -> list[list[str]]:
        """The overrides of every job: each point with each combination of the command line's choices."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        if interval := next((override for override in overrides if override.is_interval_sweep()), None):
            raise UserError(f"{interval.input_line}: only hydra/sweeper=search takes intervals; give values, KEY=1,2")
        combinations = self.split_arguments(overrides, None)[0]
        named = {override.partition("=")[0] for override in itertools.chain(*combinations)}
        return [
            [*(f"{key}={literal(value)}" for key, value in point.items() if key not in named), *combination]
            for point in self.points or [{}]
            for combination in combinations
        ]

    def check(self, job: list[str]) -> Any:
        """Compose and check a job's configuration; an invalid one is a UserError."""
        from drrn.runs.request import request

        try:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, job)
            OmegaConf.set_struct(composed, False)
            composed.pop("hydra")
            config = request(composed, job)
            if (config.trainer_extra or {}).get("fast_dev_run"):
                raise UserError("trainer.fast_dev_run leaves no record, which a sweep needs: try a single point")
            return config
        except (UserError, ValueError) as error:  # ValueError: Hydra's, for a group without a name, model=5
            raise UserError(f"{error} (in the job {' '.join(job)}; nothing has been started)") from error


class SearchSweeper(StudySweeper):
    """Hydra's Optuna sweeper (`hydra/sweeper=search`), if it is installed; the arguments are that sweeper's."""

    def __init__(self, points: Any = None, **arguments: Any) -> None:
        super().__init__(points=points)
        self.arguments = arguments

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """As Optuna's, with the launcher of a study; a UserError if Optuna is not installed, or if there are points
        or another direction."""
        if self.points is not None:
            raise UserError("hydra.sweeper.points: a search chooses its points itself; leave out sweeps=")
        if (direction := self.arguments["direction"]) != "maximize":
            raise UserError(f"hydra.sweeper.direction = {direction}: a trial returns its PSNR, so give maximize")
        if importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
            raise UserError("hydra/sweeper=search needs Optuna: pip install '.[optuna]'")
        from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

        def task(cfg: DictConfig) -> Any:
            try:
                return task_function(cfg)
            except Diverged:
                return 0.0  # dB: a diverged trial is a bad one and does not end the search

        super().setup(hydra_context=hydra_context, task_function=task, config=config)
        sampler = instantiate(self.arguments.pop("sampler"))
        self.optuna = OptunaSweeper(sampler=sampler, search_space=None, custom_search_space=None, **self.arguments)
        self.optuna.setup(hydra_context=hydra_context, task_function=task, config=config)
        self.optuna.sweeper.launcher = self.launcher

    def sweep(self, arguments: list[str]) -> None:
        """Check the search space, run n_trials jobs with the sampler's choices, and print the best one."""
        for trial in self.trials(arguments):
            if self.check(trial).plan == "only":
                raise UserError("plan = only: the trials of a search depend on earlier ones, so it has no plan")
        self.optuna.sweep(arguments)
        best = OmegaConf.load(Path(self.config.hydra.sweep.dir) / "optimization_results.yaml")
        chosen = " ".join(f"{key}={literal(value)}" for key, value in best.best_params.items())
        print(f"{best.best_value:.2f} dB: {chosen}")

    def trials(self, arguments: list[str]) -> list[list[str]]:
        """Overrides of the fewest trials that together have each choice and the lower end of each interval."""
        from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

        searched = [f"{key}={value}" for key, value in (self.arguments["params"] or {}).items()]
        distributions, fixed = create_params_from_overrides([*searched, *arguments])
        values = {key: getattr(its, "choices", None) or [its.low] for key, its in distributions.items()}
        values |= {key: [value] for key, value in fixed.items()}
        return [
            [f"{key}={choices[min(number, len(choices) - 1)]}" for key, choices in values.items()]
            for number in range(max(map(len, values.values()), default=1))
        ]


def literal(value: Any) -> str:
    """A point's value in the grammar of Hydra's command line, where None is null and commas separate choices."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "{" + ",".join(f"{literal(key)}:{literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    words = ("null", "true", "false", "inf", "nan")  # not strings in that grammar
    if isinstance(value, str) and (value.lower() in words or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", value)):
        return QuotedString(value, Quote.single).with_quotes()
    return str(value)
