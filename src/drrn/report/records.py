"""Read run records and scores files, and check their content.

A damaged or foreign record below a folder is named on stderr and left out. If the user named the file itself, it is
a UserError.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

from drrn.config import in_full
from drrn.disk import check_regular
from drrn.errors import UserError, counted, printable
from drrn.identity import run_group, structure_name
from drrn.metrics import METRICS
from drrn.runs.record import FILE, read_record
from drrn.scores import LARGEST

# The parts of a file that reports read, with their types: a type, several, a list of one kind, or a dict. A key that
# ends in "?" is optional.
SET_AND_SCALE = {"set": str, "scale": int}
PROTOCOL = {"name": str, "version": int, "crop": (int, NoneType), "color": str, "rounding": str}
RECORD = {
    "name": str,
    "status": str,
    "seed": int,
    "error?": (str, NoneType),
    "experiment?": str,
    "git?": (dict, NoneType),
    "structure": {"name": str, "depth": int, "conv_weights": int},
    "protocol": PROTOCOL,
    "budget?": {"steps": int},
    "means?": [{**SET_AND_SCALE, "images": int, "psnr": float, "bicubic_psnr": float}],
    "scores?": [{**SET_AND_SCALE, "image": str}],
    "validation?": [{**SET_AND_SCALE, "step": int, "psnr": float}],
    "config": {
        "model": dict,
        "data": {"train": [str], "batch_size": int, "scales": [int], "val": [str]},
        "trainer": {"max_steps": int, "precision": str},
        "optim": {"algorithm?": str, "lr": float},
    },
}
METHOD = {
    "weights": (str, NoneType), "structure": str, "seed": (int, NoneType), "steps": (int, NoneType),
    "experiment": (str, NoneType),
}  # fmt: skip
SCORES = {
    "protocol": PROTOCOL,
    "methods": [METHOD],
    "scores": [{**SET_AND_SCALE, "weights": (str, NoneType), "image": str}],
}


def read_runs(places: list[str]) -> list[dict[str, Any]]:
    """Read the run records below folders, sorted by path, or in the files named; add `path` to each.

    A damaged record below a folder is named on stderr and left out, and so is a run that was refused before its
    first step.

    Raises:
        UserError: a file of `places` is damaged, a folder has no record, or no record is left.
    """
    records, left_out = [], 0
    for place in map(Path, places):
        paths = [place] if os.path.lexists(place) else []
        if place.is_dir():
            paths = sorted(_below(place))
        if not paths:
            raise UserError(f"no run record ({FILE}) below {place}: train something first, or name another folder")
        for path in paths:
            try:
                records.append({**_checked_record(path), "path": str(path)})
            except UserError as error:
                if path == place:
                    raise
                print(f"left out: {error}", file=sys.stderr)
                left_out += 1
    refused = [record for record in records if _was_refused(record)]
    records = [record for record in records if not _was_refused(record)]
    if refused:
        reasons = "; ".join(dict.fromkeys(str(record.get("error")) for record in refused))
        print(f"left out: refused before the first step, {len(refused)} of the runs: {reasons}", file=sys.stderr)
    if not records:
        raise UserError(f"none of the {left_out + len(refused)} run records can be reported: the reasons are above")
    return records


def _below(place: Path) -> Iterator[Path]:
    """The records below a folder, also below links to folders (runs on another disk); each folder is read once."""
    seen = set()
    for folder, folders, files in os.walk(place, followlinks=True, onerror=_unreadable):
        folders[:] = sorted(folders) if (real := os.path.realpath(folder)) not in seen else []
        if FILE in folders + files and real not in seen:
            yield Path(folder) / FILE
        seen.add(real)


def _unreadable(error: OSError) -> None:
    print(f"left out: {printable(str(error))}", file=sys.stderr)


def _was_refused(record: dict[str, Any]) -> bool:
    """Whether a run ended with a user error before its first step."""
    return record["status"] == "failed" and record.get("ended_by") == "user error" and "budget" not in record


def _checked_record(path: Path) -> dict[str, Any]:
    record = read_record(path)
    try:
        record = checked(record, RECORD)
        _check_whole(record)
    except (ValueError, RecursionError, UserError) as error:
        raise UserError(f"{path} is not a run record that this version can report: {error}") from error
    return record


def _check_whole(record: dict[str, Any]) -> None:
    """Raise ValueError for a record that contradicts itself, UserError for a wrong argument of a DRRN."""
    record["config"]["model"] = model = in_full(record["config"]["model"])
    if record["status"] == "finished" and not {"budget", "means"} <= record.keys():
        raise ValueError("it is finished and has no scores")
    if record.get("means") and "budget" not in record:
        raise ValueError("it has scores and no length")
    try:
        run_group(record["config"], ())
        recipe(record["config"])
        if "network" in model:  # earlier records have longer names of the same networks
            from drrn.networks import NETWORKS

            if model["network"] in NETWORKS:  # else it is of another clone
                record["structure"]["name"] = printable(structure_name(model))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"its configuration is damaged ({error!r})") from error


def recipe(config: dict[str, Any]) -> str:
    """How a run was trained, in a line: "Adam 0.002, cosine, no clipping, bf16-mixed"."""
    optim, precision, residual = config["optim"], config["trainer"]["precision"], config["optim"]["residual_scale"]
    start = config["init_from"] or (config["ckpt_path"] if config["ckpt_path"] != "last" else None)
    solver = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}.get(name := optim.get("algorithm", ""), name)
    epochs, steps = optim["halve_every_epochs"], optim["halve_every_steps"]
    often = f"{epochs:g} epoch" + "s" * (epochs != 1) if epochs else f"{steps} step" + "s" * (steps != 1)
    schedule = {"halve": f"halved every {often}", "step": f"a tenth every {often}"}
    foreign = {key: optim[key] for key in ("optimiser", "scheduler", "loss") if isinstance(optim.get(key), dict)}
    classes = {key: node["_target_"].rpartition(".")[2] for key, node in foreign.items()}
    words = [
        classes.get("optimiser", solver) + f" {optim['lr']:g}",
        classes.get("scheduler", schedule.get(optim["schedule"], optim["schedule"])),
        optim.get("warmup_steps") and f"warm-up of {counted(optim['warmup_steps'], 'step')}",
        "no clipping" if optim["clip"] == "none" else f"clipping by {optim['clip']}, θ = {optim['theta']:g}",
        optim.get("last_lr_mult", 1) != 1 and f"last layer ×{optim['last_lr_mult']:g}",
        optim.get("loss") not in (None, "euclidean") and f"loss {classes.get('loss', optim['loss'])}",
        residual != 1 and (f"residual ×{residual:g}" if residual else "starting at bicubic"),
        precision != "32-true" and precision,
        start and f"from {Path(start).name}",
    ]
    return ", ".join(filter(None, words))


def read_scores(path: Path) -> dict[str, Any]:
    """Read a scores file of src/evaluate.py; a UserError if it is damaged or another file."""
    try:
        check_regular(path, LARGEST)
        content = checked(json.loads(path.read_bytes()), SCORES)
        known = {method["weights"] for method in content["methods"]}
        if any(row["weights"] not in known for row in content["scores"]):
            raise ValueError("it has scores of a method that it does not list")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a file of scores that src/evaluate.py wrote ({error})") from error
    return content


def checked(content: Any, kinds: dict[str, Any]) -> dict[str, Any]:
    """Check a file's content against `kinds`; return it with unprintable characters escaped.

    Raises:
        ValueError: a value has another type, a metric is no number, or a number is not finite.
        RecursionError: it is nested too deeply.
    """
    content = _tidy(content)
    _check(content, kinds, "it")
    return content


def _tidy(value: Any, name: str = "") -> Any:
    """Escape unprintable characters in strings, except in image names, by which files are found again."""
    metric = name.removeprefix("bicubic_") in METRICS
    if metric and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"its {name} is no number")
    if metric and value == math.inf:  # the PSNR of an image without an error; JSON has it as Python's Infinity
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"its {name or 'list'} holds {value}, which is no finite number")
    if isinstance(value, dict):
        return {printable(key): _tidy(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    return printable(" ".join(value.split("\n"))) if isinstance(value, str) and name != "image" else value


def _check(value: Any, kind: Any, where: str) -> None:
    allowed = type(kind) if isinstance(kind, dict | list) else (int, float) if kind is float else kind
    if not isinstance(value, allowed) or isinstance(value, bool):  # no key here has a bool
        raise ValueError(f"{where} is {str(value)[:40]!r}, of another type than this project writes")
    if isinstance(kind, list):
        for item in value:
            _check(item, kind[0], f"an item of {where}")
    if isinstance(kind, dict):
        for key, inner in kind.items():
            name = key.removesuffix("?")
            if name in value:
                _check(value[name], inner, f"{where}.{name}" if where != "it" else f"its {name}")
            elif name == key:
                raise ValueError(f"{where} has no {name}")
