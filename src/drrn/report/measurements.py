"""Measurements: the mean of one method on one set at one scale, from run records and files of scores alike."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drrn.errors import UserError, counted
from drrn.metrics import METRICS
from drrn.protocol import describe, means
from drrn.report.records import read_scores
from drrn.sets import registered_sets

MISSING = "–"  # a cell without a measurement


@dataclass
class Measurement:
    """The mean of one run's network (or of bicubic) over one set at one scale."""

    method: str  # the structure's name ("DRRN_B1U9") or "Bicubic"
    seed: int | None
    steps: int | None  # optimiser steps of its training; None if the file does not have them
    set_name: str
    scale: int
    images: int
    values: dict[str, float]  # by metric
    protocol: dict[str, Any]
    source: str
    weights: str | None = None  # SHA-256, if the file has it
    experiment: str | None = None  # digest, equal for runs that differ only in the seed: those may be averaged


def from_record(record: dict[str, Any]) -> list[Measurement]:
    """Measurements of one finished run, bicubic's included."""
    name, experiment = record["structure"]["name"], record.get("experiment", record["path"])
    common = (record["protocol"], record["path"])
    result = []
    for row in record.get("means", ()):
        place = (row["set"], row["scale"], row["images"])
        ours = {k: row[k] for k in METRICS if k in row}
        bicubic = {k: row[f"bicubic_{k}"] for k in METRICS if f"bicubic_{k}" in row}
        steps = record["budget"]["steps"]
        result.append(Measurement(name, record["seed"], steps, *place, ours, *common, experiment=experiment))
        result.append(Measurement("Bicubic", None, None, *place, bicubic, *common))
    return result


def from_scores(path: Path) -> list[Measurement]:
    """Measurements in a scores file of src/evaluate.py; a UserError for any other file."""
    content = read_scores(path)
    methods = {method["weights"]: method for method in content["methods"]}
    result = []
    for row in means(content["scores"]):
        method = methods[row["weights"]]
        values = {k: row[k] for k in METRICS if k in row}
        result.append(
            Measurement(method["structure"], method["seed"], method["steps"], row["set"], row["scale"], row["images"],
                        values, content["protocol"], str(path), row["weights"], method["experiment"])
        )  # fmt: skip
    return result


def one_protocol(measurements: list[Measurement]) -> dict[str, Any]:
    """The protocol of all measurements; a UserError if there are several, whose numbers do not compare."""
    first = measurements[0]
    for other in measurements[1:]:
        if other.protocol != first.protocol:
            raise UserError(
                f"{first.source} was measured by {describe(first.protocol)}, {other.source} by "
                f"{describe(other.protocol)}: their numbers do not compare. Report each in a command of its own."
            )
    return first.protocol


def by_method(measurements: list[Measurement]) -> dict[tuple[str, str], dict[tuple[str, int], list[Measurement]]]:
    """(method, heading) → (set, scale) → measurements, one for each seed.

    Only runs of one experiment are averaged. If a method was trained in several ways, the headings end in
    the digest of the experiment, which the run's folder and record contain too.
    """
    keys = dict.fromkeys((m.method, m.steps, m.experiment) for m in measurements)
    groups: dict = defaultdict(lambda: defaultdict(list))
    for m in measurements:
        heading = m.method if m.steps is None else f"{m.method}, {counted(m.steps, 'step')}"
        if sum(key[:2] == (m.method, m.steps) for key in keys) > 1:
            heading += f" [{m.experiment}]"
        cell = groups[m.method, heading][m.set_name, m.scale]
        if all(m.seed != other.seed for other in cell):
            cell.append(m)
    return groups


def set_size(set_name: str, counted: int) -> int:
    """Number of images in a set: the registry's, or `counted` for a folder that the registry does not list."""
    return registered_sets().get(set_name, counted)


def over_seeds(values: list[float], metric: str) -> str:
    """One value, or mean ± sample standard deviation over several seeds; "–" for none."""
    if not values:
        return MISSING
    digits = METRICS[metric].digits
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 or mean == "inf" else f"{mean}±{statistics.stdev(values):.{digits}f}"
