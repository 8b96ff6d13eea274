"""A study's networks and their runs: points, and run groups of one recipe."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from drrn.errors import UserError, counted
from drrn.identity import structure_name
from drrn.protocol import describe
from drrn.report.measurements import set_size
from drrn.report.records import recipe

ABLATION = ("B", "U", "weight_sharing", "multi_path")
# The paper's other arguments of DRRN; another width or norm changes the structure's name.
USUAL = {"features": 128, "norm": "batch", "bias": True, "rectified_identity": False, "input_relu": True}
Place = tuple[str, int]  # a set and a scale
PLACE: Place = ("Set5", 3)  # of Fig. 6, Fig. 8 and Table 4
PAPER_PATCHES = 71 * 6536 * 128  # seen in the training of the authors' published B1U9 (conf/budget/paper.yaml)


def in_paper(model: dict[str, Any]) -> str:
    """The paper's name of a structure, whatever its width (`paper.network_of`): DRRN_NS_B3U4, VDSR_d28, DRCN."""
    return model["network"].upper() if "network" in model else structure_name(model | USUAL)


def variant(model: dict[str, Any]) -> str:
    """The paper's name of a structure's family: one of `tables.VARIANTS`, or another network's class."""
    return structure_name(model).partition("_")[0] if "network" in model else family(in_paper(model))


def family(name: str) -> str:
    """A structure's name without B, U and depth: DRRN_NS_B3U4_16f → DRRN_NS_16f."""
    return re.sub(r"_(B\d+U\d+|d\d+)", "", name)


@dataclass
class Point:
    """One network of a study under one recipe, and its runs."""

    name: str  # the paper's: DRRN_B3U4, DRRN_NS_B3U2_16f
    model: dict[str, Any]  # its structure
    depth: int
    weights: int  # k, convolution weights
    place: Place  # the set and scale of its scores
    planned: bool = False  # whether the study's file in sweeps/ lists it
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)  # seed → record; see `add`

    def __post_init__(self) -> None:
        model, self.variant, features = self.model, variant(self.model), self.model.get("features")
        self.width = features if isinstance(features, int) else None  # a list, in a network of one's own
        if "network" in model:
            self.family = self.name
            self.short = self.name.partition("_")[0] + (f" {self.width}f" if self.width else "")
        else:
            self.family = family(self.name)
            self.short = f"B{model['B']}U{model['U']}" if model["U"] else f"VDSR d{self.depth}"

    def add(self, record: dict[str, Any]) -> None:
        """Add a run; of two with one seed, keep the finished one. Two with different scores are a UserError."""
        there = self.runs.get(record["seed"])
        if there is None or there["status"] != "finished" == record["status"]:
            self.runs[record["seed"]] = record
        elif there["status"] == record["status"] == "finished" and there["means"] != record["means"]:
            raise UserError(
                f"{there['path']} and {record['path']} are the same run with different scores: report one of them"
            )

    def finished(self) -> list[dict[str, Any]]:
        """The records of its finished runs, by seed."""
        return [run for _, run in sorted(self.runs.items()) if run["status"] == "finished"]

    def values(self, place: Place | None = None) -> dict[int, float]:
        """Seed → mean PSNR in dB of the finished runs that were scored on the whole set.

        An infinite PSNR (an image without an error) is left out: no axis can show it.
        """
        place = place or self.place
        return {
            run["seed"]: row["psnr"]
            for run in self.finished()
            for row in run["means"]
            if (row["set"], row["scale"]) == place
            and row["images"] == set_size(place[0], row["images"])
            and math.isfinite(row["psnr"])
        }

    def mean(self, place: Place | None = None) -> float | None:
        """PSNR in dB, the mean over the seeds; None if nobody has measured it."""
        values = self.values(place)
        return statistics.fmean(values.values()) if values else None

    def status(self, seed: int) -> str:
        """The status in a run's record, "missing" without a record, "not scored" if finished and not in `values`."""
        status = self.runs[seed]["status"] if seed in self.runs else "missing"
        return "not scored" if status == "finished" and seed not in self.values() else status


@dataclass
class RunGroup:
    """A study under one recipe: all its points, trained or not."""

    study: str
    digest: str
    points: list[Point]
    place: Place = PLACE
    tries: list[RunGroup] = field(default_factory=list)  # of this recipe, with too few steps to be drawn

    def __post_init__(self) -> None:
        self.stem = f"{self.study}-{self.digest}"  # of its files
        self.seeds = sorted({seed for point in self.points for seed in point.runs})
        self.runs = [run for point in self.points for run in point.runs.values()]
        self.finished = [run for point in self.points for run in point.finished()]  # shown in figures
        planned = {run["config"]["trainer"]["max_steps"] for run in self.runs}
        self.steps = sorted({run["budget"]["steps"] for run in self.finished} or planned)  # each number once
        self.states = {  # the status of each planned run
            (point.name, seed): point.status(seed) for point in self.points if point.planned for seed in self.seeds
        }

    @property
    def missing(self) -> list[str]:
        """The planned runs that are not finished: "DRRN_B3U8_16f s2 (failed)"."""
        return [
            f"{name} s{seed}" + (f" ({status})" if status != "missing" else "")
            for (name, seed), status in self.states.items()
            if status != "finished"
        ]

    def summary(self) -> str:
        """The number of planned runs by status: "18 of 20 runs finished, 1 failed, 1 missing."."""
        states = Counter(self.states.values())
        if not states:
            return f"{counted(len(self.finished), 'finished run')}."
        others = [f"{count} {status}" for status, count in sorted(states.items()) if status != "finished"]
        return ", ".join([f"{states['finished']} of {counted(sum(states.values()), 'run')} finished", *others]) + "."

    def where(self) -> str:
        """ "Set5 ×3"."""
        return f"{self.place[0]} ×{self.place[1]}"

    def short(self) -> str:
        """The recipe in a few words, for a panel's title."""
        return ", ".join([*self.widths(), f"{self.share()} of the paper's patches"])

    def widths(self) -> list[str]:
        """["16 features"], or ["16 and 64 features"]; [] if no network of the group has a width."""
        widths = {point.width for point in self.points if point.runs} - {None}
        return [f"{listed(sorted(widths))} features"] if widths else []

    def share(self) -> str:
        """Patches seen as a share of the paper's: "0.04 %"."""
        batch = self.runs[0]["config"]["data"]["batch_size"]
        shares = [f"{100 * steps * batch / PAPER_PATCHES:.2g}" for steps in self.steps]
        return listed([f"{Decimal(share):f} %" for share in shares])  # 0.00002, not 2e-05

    def origin(self) -> list[str]:
        """The text below every figure: length, recipe, seeds, protocol, commit.

        It keeps a small study from passing for the paper's.
        """
        runs = self.finished or self.runs
        config = runs[0]["config"]
        data = config["data"]
        norms = sorted({run["config"]["model"].get("norm", "batch") for run in runs} - {"batch"})
        seeds = sorted({run["seed"] for run in runs})
        counts = [len(point.values()) for point in self.points if point.values()] or [0]
        uneven = f" ({min(counts)} to {max(counts)} a point)" if min(counts) < max(counts) else ""
        commits = {str((run.get("git") or {}).get("commit", "unknown"))[:7]: run.get("git") or {} for run in runs}
        steps = listed([*(f"{steps:,}" for steps in self.steps[:-1]), counted(self.steps[-1], "step")])
        steps += f" × {counted(data['batch_size'], 'patch', 'patches')}"
        length = [*self.widths(), *([f"norm {listed(norms)}"] if norms else []), steps]
        sets = listed([Path(name).name for name in data["train"]])
        seed = "Seed" if len(seeds) == 1 else "Seeds" if self.study == "curves" else "Means over seeds"
        return [
            f"Ours: {', '.join(length)}, {self.share()} of the paper's {PAPER_PATCHES // 128:,} × 128.",
            f"{recipe(config)}; {sets}, {listed([f'×{scale}' for scale in data['scales']])}.",
            f"{seed} {listed(seeds)}{uneven}; {describe(runs[0]['protocol'])}; commit "
            + listed([commit + " with changes" * bool(git.get("changed")) for commit, git in sorted(commits.items())])
            + f"; run group {self.digest}.",
        ]


def listed(items: list[Any]) -> str:
    """ "1", "1 and 2", "1, 2 and 3"."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
