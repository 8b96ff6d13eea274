"""The runs of a study, chosen by structure and recipe, whatever folder they are in.

One finished run may serve several studies: Fig. 8's DRRN_B3U4 is Fig. 6's and Table 4's. Runs of one recipe (solver,
length, data, and everything else that the study does not vary) are a *run group*; a mean, line or figure never mixes
two groups. A study's points are listed only in sweeps/.
"""

from __future__ import annotations

import copy
import json
import os
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from drrn.config import in_full
from drrn.errors import UserError
from drrn.home import CONF
from drrn.identity import run_group, structure_name
from drrn.paper import paper_numbers, printed
from drrn.report import STUDIES
from drrn.report.groups import ABLATION, PLACE, Place, Point, RunGroup, in_paper, variant
from drrn.report.measurements import MISSING, over_seeds
from drrn.report.tables import Cell, Table

TRY = 0.05  # of the longest run of a recipe: a shorter one is a try


def planned(study: str) -> list[dict[str, Any]]:
    """The structures of a study, from its file in sweeps/; a UserError if there is no such file."""
    sweep = STUDIES[study].sweep
    if sweep is None:
        return []
    path = Path(os.environ["DRRN_HOME"]) / "sweeps" / f"{sweep}.yaml"
    if not path.is_file():
        raise UserError(f"{path} is not there: studies are drawn from a clone of the repository (DRRN_HOME names it)")
    models = []
    for point in OmegaConf.to_container(OmegaConf.load(path))["hydra"]["sweeper"]["points"]:
        chosen = {key[6:]: value for key, value in point.items() if key.startswith("model.")}
        models.append(preset(point.get("model", "drrn"), **chosen))
    return models


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """All arguments of a network: conf/model/<name>.yaml with changes; a network of one scale gets ×3."""
    around = {"trainer": {"max_steps": 1}, "data": {"scales": [PLACE[1]]}}  # conf/model interpolates these
    model = OmegaConf.to_container(OmegaConf.merge(around, _preset(name), changes), resolve=True)
    return in_full({key: value for key, value in model.items() if key not in (*around, "checkpointing")})


def _preset(name: str) -> DictConfig:
    content = OmegaConf.load(Path(CONF) / "model" / f"{name}.yaml")
    below = [base for base in content.pop("defaults", ()) if base != "_self_"]  # it is the last in all of them
    return OmegaConf.merge(*map(_preset, below), content)


def run_groups(study: str, records: list[dict[str, Any]]) -> list[RunGroup]:
    """The runs of a study, one `RunGroup` for each recipe; the longest first.

    A group is in the `tries` of a longer one if it differs from it only in its length, which is below `TRY` of it.

    Raises:
        UserError: runs of one recipe were trained on different images or measured by different protocols, or a run is
            there twice with different scores.
    """
    plan = planned(study)
    varied = ABLATION if STUDIES[study].ablation else None
    recipes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        recipes[run_group(record["config"], varied)].append(record)
    groups = []
    for digest, runs in recipes.items():
        place = PLACE if plan else _place(runs)
        group = RunGroup(study, digest, _points(study, plan, runs, place), place)
        if any(point.runs and (point.planned or not plan) for point in group.points):
            _comparable(group.finished)
            groups.append(group)
    kept: dict[str, RunGroup] = {}
    for group in sorted(groups, key=lambda group: (-max(group.steps), group.digest)):
        config = copy.deepcopy(group.runs[0]["config"])
        config["trainer"] |= dict.fromkeys(("max_steps", "val_check_interval", "limit_val_batches"))
        longer = kept.setdefault(run_group(config, varied), group)
        if max(group.steps) < TRY * max(longer.steps):
            longer.tries.append(group)
        elif longer is not group:
            kept[group.digest] = group
    return list(kept.values())


def _place(runs: list[dict[str, Any]]) -> Place:
    """The set and scale with the most scored runs; Set5 ×3 comes before all others."""
    rows = [(row["set"], row["scale"]) for run in runs for row in run.get("means") or ()]
    return max(rows, key=lambda place: (place == PLACE, rows.count(place), place[1] == PLACE[1]), default=PLACE)


def _points(study: str, plan: list[dict[str, Any]], records: list[dict[str, Any]], place: Place) -> list[Point]:
    """The study's points, trained or not, and the other networks that it shows, with their runs of one recipe."""
    trained: dict[str, Point] = {}
    for record in records:
        name, depth, weights = (record["structure"][key] for key in ("name", "depth", "conv_weights"))
        trained[name] = Point(name, record["config"]["model"], depth, weights, place)
    # The plan sets B, U and the variant. An untrained point takes each other argument that all trained DRRNs share.
    drrns = [point.model for point in trained.values() if "network" not in point.model]
    settled = {key for key in drrns[0] if len({model[key] for model in drrns}) == 1} if drrns else set()
    points: dict[str, Point] = {}
    for model in plan:
        alike = [point for point in trained.values() if _same_point(model, point.model)]  # several widths in Fig. 1
        if not alike:
            if "network" not in model:
                model = model | {key: drrns[0][key] for key in settled.difference(ABLATION)}
            alike = [Point(*_described(json.dumps(model)), place)]
        for point in alike:
            point.planned = True
            points[point.name] = point
    points |= {name: point for name, point in trained.items() if name not in points and wanted(study, point.model)}
    for record in records:
        if record["structure"]["name"] in points:
            points[record["structure"]["name"]].add(record)
    return list(points.values())


def _same_point(planned: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a trained network is a point of the plan: of any width, and of any normalisation if it is a DRRN."""
    keys = planned.keys() - {"features", "alpha_steps"} if "network" in planned else ("network", *ABLATION)
    return all(other.get(key) == planned.get(key) for key in keys)


@cache
def _described(written: str) -> tuple[str, dict[str, Any], int, int]:
    """Name, structure, depth and convolution weights of an untrained network, from its structure in JSON."""
    from drrn.layers import conv_weights
    from drrn.networks import on_paper

    model = json.loads(written)
    network = on_paper(model)
    return structure_name(model), model, network.depth, conv_weights(network)


def wanted(study: str, model: dict[str, Any]) -> bool:
    """Whether a study also shows a structure that is not among its points, if somebody has trained it."""
    if study in ("curves", "runs"):
        return True
    if study in ("fig1", "fig9"):  # the proposed network of any size, VDSR, and every other network
        return variant(model) not in ("DRRN_NS_C", "DRRN_NS", "DRRN_C")
    drawn = {(row.get("method", "DRRN"), row["B"], row["U"]) for row in paper_numbers(study)}
    return (variant(model), str(model.get("B")), str(model.get("U"))) in drawn


def _comparable(runs: list[dict[str, Any]]) -> None:
    for key, what in (("patches", "trained on the patches"), ("protocol", "measured with the protocol")):
        known = [run for run in runs if run.get(key) is not None]
        for run in known[1:]:
            if run[key] != known[0][key]:
                raise UserError(
                    f"{known[0]['path']} was {what} {known[0][key]} and {run['path']} with {run[key]}: they do not "
                    "compare. Report each in a command of its own."
                )


def points_table(group: RunGroup) -> Table:
    """Every point of a study under one recipe: depth, weights, each seed, their mean, and the paper's number."""
    paper, seeds = printed(*PLACE) if group.place == PLACE else {}, group.seeds
    several = len(seeds) > 1
    columns = ["structure", "depth", "weights", *(f"seed {seed}" for seed in seeds)]
    columns += ["mean"] * several + ["paper"] * bool(paper)
    rows = []
    for point in group.points:
        values = point.values()
        cells = [_run_cell(point, seed, values) for seed in seeds]
        mean = [over_seeds(list(values.values()), "psnr")] * several
        theirs = [paper.get(in_paper(point.model), {}).get("psnr", MISSING)] * bool(paper)
        rows.append([point.name, str(point.depth), f"{point.weights:,}", *cells, *mean, *theirs])
    notes = [*group.origin(), *(["± is the sample standard deviation over the seeds."] if several else [])]
    return Table(f"{STUDIES[group.study].title} (PSNR in dB, {group.where()})", columns, rows, notes)


def _run_cell(point: Point, seed: int, values: dict[int, float]) -> Cell:
    """A run's PSNR or else its status, with the path of its record, which the page links to."""
    run, status = point.runs.get(seed), point.status(seed)
    cell = Cell(over_seeds([values[seed]], "psnr") if seed in values else status)
    cell.path, cell.bad = Path(run["path"]) if run else None, status != "finished"
    cell.error = run.get("error") if run and status == "failed" else None
    return cell
