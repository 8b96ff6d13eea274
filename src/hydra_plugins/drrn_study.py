"""How a study's points become jobs: a Hydra sweeper (Hydra finds sweepers in this package's name).

Hydra's own sweeper makes the Cartesian product of the command line. A study of the paper is a list of chosen
points (Fig. 6 is not a full grid), so this one multiplies `hydra.sweeper.points` by the command line's choices,
drops repetitions, checks every point before the first one starts, and says at the end which did what.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf


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

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run every point once.

        Raises:
            Refusal: a point's configuration is wrong (nothing has started then), or points failed (all the
                others have run).
        """
        from drrn import Refusal
        from drrn.config import run_dir

        jobs = self.jobs(arguments)
        configs = [self.check(job) for job in jobs]
        jobs = [job for _, job in unique(zip(map(run_dir, configs), jobs, strict=True))]

        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        results: list[JobReturn] = []
        for batch in self.split_overrides_to_chunks(jobs, self.max_batch_size):
            results += self.launcher.launch(batch, initial_job_idx=len(results))

        failed = [result for result in results if result.status != JobStatus.COMPLETED]
        print(f"\n{len(results) - len(failed)} of {len(results)} points done, under {folder}")
        for result in failed:
            print(f"  failed: {' '.join(result.overrides)}\n    {type(result._return_value).__name__}: "
                  f"{result._return_value}")  # fmt: skip
        if failed:
            raise Refusal(f"{len(failed)} of {len(results)} points failed; the same command tries them again")
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
            Refusal: it is wrong.
        """
        from drrn import Refusal
        from drrn.config import check

        composed = self.hydra_context.config_loader.load_sweep_config(self.config, job)
        OmegaConf.set_struct(composed, False)
        composed.pop("hydra")
        try:
            return check(composed, job)
        except Refusal as error:
            raise Refusal(f"{error} (in the point {' '.join(job)}; nothing has been started)") from error


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
