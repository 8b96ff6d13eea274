"""Which runs make a study: chosen by structure and recipe, whatever folder they are in.

One finished run may serve several studies: Fig. 8's DRRN_B3U4 is Fig. 6's and Table 4's. Runs that differ in
anything but their seed and what the study varies are of different *budgets* and never meet in one mean, line or
figure. A study's points stand in sweeps/, once.
"""

from __future__ import annotations

import os
import statistics
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from drrn.config import ModelConfig
from drrn.errors import UserError
from drrn.home import CONF
from drrn.identity import budget, structure_name
from drrn.model import DRRN
from drrn.report.tables import DIGITS, MISSING, Table, describe, over_seeds, paper_numbers
from drrn.sets import registered_sets

ABLATION = ("B", "U", "weight_sharing", "multi_path")
STRUCTURE = (*ABLATION, "features", "norm", "bias", "input_relu", "rectified_identity")
PLACE = ("Set5", 3)  # what Fig. 6, Fig. 8 and Table 4 measure
PAPER_PATCHES = 71 * 6536 * 128  # what the authors' B1U9 had seen when they published it (conf/budget/paper.yaml)
LATER = {"rectified_identity": False, "input_relu": True}  # keys that the first records do not have
VARIANTS = ("VDSR", "DRRN_NS_C", "DRRN_NS", "DRRN_C", "DRRN")


class Study(NamedTuple):
    """A figure or table of the paper."""

    title: str
    sweep: str | None  # the file of sweeps/ with its points; None: every run that there is
    varied: tuple[str, ...]  # what of `model` its points vary; everything else is the budget


STUDIES = {
    "fig6": Study("Fig. 6: recursive blocks B and residual units U", "fig6", ABLATION),
    "fig8": Study("Fig. 8: local residuals, weight sharing and multi-path by depth", "fig8", ABLATION),
    "table4": Study("Table 4: the components turned on and off at B3U4", "table4", ABLATION),
    "fig1": Study("Fig. 1: PSNR against weights and depth", "table2", STRUCTURE),
    "fig9": Study("Fig. 9: shallow, deep and very deep", "table2", STRUCTURE),
    "curves": Study("Learning curves", None, ABLATION),
}


def variant(model: dict[str, Any]) -> str:
    """The paper's name of a structure's family: one of VARIANTS."""
    if model["U"] == 0:
        return "VDSR"
    return f"DRRN{'' if model['weight_sharing'] else '_NS'}{'' if model['multi_path'] else '_C'}"


@dataclass
class Point:
    """One structure under one budget, and its runs."""

    model: dict[str, Any]  # the arguments of `drrn.model.DRRN`
    planned: bool  # a point of the study's own, not one that another study adds
    depth: int
    weights: int  # k, convolution weights
    runs: dict[int, dict[str, Any]] = field(
        default_factory=dict
    )  # seed → record; the finished one where there are two

    @property
    def name(self) -> str:
        """The paper's name: DRRN_B3U4, DRRN_NS_B3U2_16f."""
        return structure_name(ModelConfig(**self.model))

    @property
    def variant(self) -> str:
        """One of VARIANTS."""
        return variant(self.model)

    def finished(self) -> list[dict[str, Any]]:
        """The records of its finished runs, by seed."""
        return [run for _, run in sorted(self.runs.items()) if run["status"] == "finished"]

    def values(self, place: tuple[str, int] = PLACE, metric: str = "psnr") -> dict[int, float]:
        """Seed → mean over the whole set (a part of a set is not the set), of the finished runs."""
        values = {run["seed"]: _score(run, place, metric) for run in self.finished()}
        return {seed: value for seed, value in values.items() if value is not None}

    def mean(self, place: tuple[str, int] = PLACE) -> float | None:
        """PSNR in dB, the mean over the seeds; None if nobody has measured it."""
        values = self.values(place)
        return statistics.fmean(values.values()) if values else None


def _score(run: dict[str, Any], place: tuple[str, int], metric: str) -> float | None:
    for row in run.get("means", ()):
        if (row["set"], row["scale"]) == place and row["images"] == registered_sets().get(row["set"], row["images"]):
            return row.get(metric)
    return None


@dataclass
class Budget:
    """What the paper's study is under one budget: every point, run or not."""

    study: str
    digest: str
    points: list[Point]
    seeds: list[int]

    @property
    def stem(self) -> str:
        """The name of its files: fig6-1a2b3c4d."""
        return f"{self.study}-{self.digest}"

    @property
    def runs(self) -> list[dict[str, Any]]:
        """All records."""
        return [run for point in self.points for run in point.runs.values()]

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The records that figures are drawn from."""
        return [run for point in self.points for run in point.finished()]

    @property
    def steps(self) -> list[int]:
        """How many steps its finished runs took, each number once; what was planned if none has finished."""
        planned = [run["config"]["trainer"]["max_steps"] for run in self.runs]
        return sorted({run["budget"]["steps"] for run in self.finished}) or sorted(set(planned))

    @property
    def missing(self) -> list[str]:
        """What the study lacks: "DRRN_B3U8_16f s2 (failed)"."""
        return [
            f"{point.name} s{seed}" + (f" ({status})" if status != "missing" else "")
            for point in self.points
            if point.planned
            for seed in self.seeds
            if (status := self.status(point, seed)) != "finished"
        ]

    @staticmethod
    def status(point: Point, seed: int) -> str:
        """What became of a run: its record's word, or "missing"; "not scored" without the whole of Set5 ×3."""
        if seed not in point.runs:
            return "missing"
        if point.runs[seed]["status"] == "finished" and seed not in point.values():
            return "not scored"
        return point.runs[seed]["status"]

    def short(self) -> str:
        """The budget in a few words: what a panel's title says."""
        return f"{self.widths()}, {self.share()} of the paper's patches"

    def widths(self) -> str:
        """ "16 features", or "16 and 64 features"."""
        return _and(sorted({point.model["features"] for point in self.points if point.runs})) + " features"

    def share(self) -> str:
        """Patches seen as a share of the paper's: "0.04 %"."""
        batch = self.runs[0]["config"]["data"]["batch_size"]
        return _and([f"{100 * steps * batch / PAPER_PATCHES:.2g} %" for steps in self.steps])

    def face(self) -> list[str]:
        """What every figure says of itself: budget, recipe, seeds, protocol, commit.

        So that a small study can't pass for the paper's.
        """
        runs = self.finished or self.runs
        config = runs[0]["config"]
        data, protocol = config["data"], runs[0]["protocol"]
        norms = sorted({run["config"]["model"]["norm"] for run in runs} - {"batch"})
        seeds = sorted({run["seed"] for run in runs})
        counts = [len(point.values()) for point in self.points if point.values()] or [0]
        uneven = f" ({min(counts)} to {max(counts)} a point)" if min(counts) < max(counts) else ""
        commits = {(run.get("git") or {}).get("commit", "unknown")[:7]: run.get("git") or {} for run in runs}
        steps = _and([f"{steps:,}" for steps in self.steps])
        unlike = f", norm {_and(norms)}" if norms else ""
        seed = "Seed" if len(seeds) == 1 else "Seeds" if self.study == "curves" else "Means over seeds"
        return [
            f"Ours: {self.widths()}{unlike}, {steps} steps × {data['batch_size']} patches, {self.share()} of the "
            f"paper's {PAPER_PATCHES // 128:,} × 128.",
            f"{recipe(config)}; {data['name']}, {_and([f'×{scale}' for scale in data['scales']])}.",
            f"{seed} {_and(seeds)}{uneven}; {describe(protocol)}; commit "
            + _and([commit + " with changes" * bool(git.get("changed")) for commit, git in sorted(commits.items())])
            + f"; budget {self.digest}.",
        ]


def recipe(config: dict[str, Any]) -> str:
    """How a run was trained, in a line: "Adam 0.002, cosine, no clipping, bf16-mixed"."""
    optim, trainer = config["optim"], config["trainer"]
    halving = (
        f"halved every {optim['halve_every_epochs']:g} epochs"
        if optim["halve_every_epochs"]
        else f"halved every {optim['halve_every_steps']} steps"
    )
    words = [
        {"sgd": "SGD", "adam": "Adam"}.get(optim["algorithm"], optim["algorithm"]) + f" {optim['lr']:g}",
        "cosine" if optim["schedule"] == "cosine" else halving,
        "no clipping" if optim["clip"] == "none" else f"clipping by {optim['clip']}, θ = {optim['theta']:g}",
    ]
    if optim["residual_scale"] != 1:
        words.append(
            "starting at bicubic" if not optim["residual_scale"] else f"residual ×{optim['residual_scale']:g}"
        )
    if trainer["precision"] != "32-true":
        words.append(trainer["precision"])
    if config["init_from"] or config["ckpt_path"] not in (None, "last"):
        words.append(f"from {Path(config['init_from'] or config['ckpt_path']).name}")
    return ", ".join(words)


def _and(items: list[Any]) -> str:
    """ "1", "1 and 2", "1, 2 and 3"."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def planned(study: str) -> list[dict[str, Any]]:
    """The structures of a study, as sweeps/<its sweep>.yaml lists its points: arguments of `drrn.model.DRRN`.

    Raises:
        UserError: the file is not there (drrn is installed without its clone).
    """
    sweep = STUDIES[study].sweep
    if sweep is None:
        return []
    path = Path(os.environ["DRRN_HOME"]) / "sweeps" / f"{sweep}.yaml"
    if not path.is_file():
        raise UserError(f"{path} is not there: studies are drawn from a clone of the repository (DRRN_HOME names it)")
    models = []
    for point in OmegaConf.to_container(OmegaConf.load(path))["hydra"]["sweeper"]["points"]:
        chosen = [f"{key[6:]}={value}" for key, value in point.items() if key.startswith("model.")]
        model = OmegaConf.merge(_preset(point.get("model", "drrn")), OmegaConf.from_dotlist(chosen))
        models.append({key: model[key] for key in STRUCTURE})  # the file also has what is for training only
    return models


def _preset(name: str) -> DictConfig:
    """conf/model/<name>.yaml on top of what it builds on."""
    content = OmegaConf.load(Path(CONF) / "model" / f"{name}.yaml")
    below = [base for base in content.pop("defaults", ()) if base != "_self_"]  # which is the last, in all of them
    return OmegaConf.merge(*map(_preset, below), content)


def budgets(study: str, records: list[dict[str, Any]]) -> list[Budget]:
    """The runs of a study, one `Budget` for each set of runs that may be shown together; the largest first.

    Args:
        study: a key of STUDIES.
        records: run records with `path` (`drrn.records.find_records`).

    Raises:
        UserError: runs of one budget were trained on different images or measured by different protocols, a run is
            there twice with different scores, or a record is of a later version with networks unknown to this one.
    """
    plan = planned(study)
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if unknown := sorted(set(record["config"]["model"]) - set(STRUCTURE)):
            raise UserError(f"{record['path']} has model.{unknown[0]}, which this version does not know: update it")
        groups[budget(record["config"], STUDIES[study].varied)].append(record)
    result = []
    for digest, group in groups.items():
        points = _points(study, plan, group)
        seeds = sorted({seed for point in points for seed in point.runs})
        if any(point.runs and (point.planned or not plan) for point in points):
            result.append(Budget(study, digest, points, seeds))
    for one in result:
        _comparable(one.finished)
    return sorted(result, key=lambda one: (-max(one.steps), one.digest))


def _points(study: str, plan: list[dict[str, Any]], group: list[dict[str, Any]]) -> list[Point]:
    """The study's points, run or not, and what else it shows of the runs of one budget."""
    trained = [{**LATER, **record["config"]["model"]} for record in group]
    # The plan says B, U and the variant; width, norm and the like are the budget's, where it has one of each.
    shared = {key: trained[0][key] for key in trained[0] if all(model[key] == trained[0][key] for model in trained)}
    shared = {key: value for key, value in shared.items() if key not in ABLATION}
    shown = []
    for model in plan:
        alike = [other for other in trained if all(other[key] == model[key] for key in ABLATION)]
        shown += [(other, True) for other in alike or [model | shared]]  # alike: of several widths in Fig. 1
    shown += [(model, False) for model in trained if wanted(study, model)]
    points: dict[str, Point] = {}
    for model, is_planned in shown:
        name = structure_name(ModelConfig(**model))
        if name not in points:
            points[name] = Point(model, is_planned, *_counts(**model))
    for model, record in zip(trained, group, strict=True):
        point = points.get(structure_name(ModelConfig(**model)))
        if point is None:
            continue
        there = point.runs.get(record["seed"])
        if there is None or there["status"] != "finished" == record["status"]:
            point.runs[record["seed"]] = record
        elif there["status"] == record["status"] == "finished" and there["means"] != record["means"]:
            raise UserError(
                f"{there['path']} and {record['path']} are the same run with different scores: report them apart"
            )
    return list(points.values())


@cache
def _counts(**model: Any) -> tuple[int, int]:
    """Depth and convolution weights of a structure."""
    with torch.device("meta"):
        network = DRRN(**model)
    return network.depth, network.conv_weight_count


def wanted(study: str, model: dict[str, Any]) -> bool:
    """Whether a study also shows a structure that is not among its points, if somebody has trained it."""
    if study == "curves":
        return True
    if study in ("fig1", "fig9"):  # the proposed network of any size, and VDSR
        return variant(model) in ("DRRN", "VDSR")
    drawn = {(row.get("method", "DRRN"), row["B"], row["U"]) for row in paper_numbers(study)}
    return (variant(model), str(model["B"]), str(model["U"])) in drawn


def _comparable(runs: list[dict[str, Any]]) -> None:
    for key, what in (("patches", "trained on the patches"), ("protocol", "measured with the protocol")):
        known = [run for run in runs if run.get(key) is not None]
        for run in known[1:]:
            if run[key] != known[0][key]:
                raise UserError(
                    f"{known[0]['path']} was {what} {known[0][key]} and {run['path']} with {run[key]}: they do not "
                    "compare. Report them apart."
                )


def points_table(one: Budget) -> Table:
    """Every point of a study under one budget: depth, weights, each seed, their mean, and the paper's number."""
    paper = paper_psnr()
    several = len(one.seeds) > 1
    columns = ["structure", "depth", "weights", *(f"seed {seed}" for seed in one.seeds)]
    columns += ["mean"] * several + ["paper (128 features)"]
    rows = []
    for point in one.points:
        values = point.values()
        cells = [
            f"{values[seed]:.{DIGITS['psnr']}f}" if seed in values else one.status(point, seed) for seed in one.seeds
        ]
        mean = [over_seeds([values[seed] for seed in sorted(values)], "psnr")] * several
        printed = paper.get((point.variant, point.model["B"], point.model["U"]), MISSING)
        rows.append([point.name, str(point.depth), f"{point.weights:,}", *cells, *mean, printed])
    notes = [*one.face(), *(["± is the sample standard deviation over the seeds."] if several else [])]
    return Table(f"{STUDIES[one.study].title} (PSNR in dB, {PLACE[0]} ×{PLACE[1]})", columns, rows, notes)


def paper_psnr() -> dict[tuple[str, int, int], str]:
    """(variant, B, U) → the PSNR that the paper prints on Set5 ×3, for every structure it prints one of."""
    result = {}
    for name in ("fig6", "fig8", "table4"):
        for row in paper_numbers(name):
            if row["psnr"]:
                method = row.get("method", "DRRN")
                B, U = (int(row["depth"]) - 1, 0) if method == "VDSR" else (int(row["B"]), int(row["U"]))
                result[method, B, U] = row["psnr"]
    return result


def wrapped(lines: list[str], width: int) -> str:
    """Lines of at most `width` characters."""
    return "\n".join(line for text in lines for line in textwrap.wrap(text, width))
