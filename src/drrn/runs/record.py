"""The run record: one JSON per run, enough to check a result by hand and to reproduce it.

Tables and figures read only these files, so they need no account and no network.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drrn.config import Config
from drrn.disk import check_regular
from drrn.environment import environment
from drrn.errors import UserError
from drrn.help import script
from drrn.identity import experiment, run_dir, run_name, structure_name
from drrn.targets import OF_OUR_SOLVERS

FORMAT = 1
FILE = "record.json"
LARGEST = 1 << 28  # maximum bytes; a record with 100,000 rows has 20 MB


def read_record(path: Path) -> dict[str, Any]:
    """Read a run record, a file or its folder; a missing file, invalid JSON or an unknown format is a UserError."""
    try:
        path = path / FILE if path.is_dir() else path
        check_regular(path, LARGEST)
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"{path} is not a readable run record: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        said = f"is of format {record['format']!r}" if isinstance(record, dict) and "format" in record else "has none"
        raise UserError(f"{path} is not a run record of format {FORMAT}, which this version reads: it {said}")
    return record


def own_record(folder: Path) -> dict[str, Any]:
    """The record of a run's earlier start; {} if there is none. A UserError for one that cannot be read."""
    if not os.path.lexists(folder / FILE):
        return {}
    try:
        record = read_record(folder / FILE)
        if not isinstance(record.get("status"), str):
            raise UserError(f"{folder / FILE} is an incomplete run record (it has no status)")
    except UserError as error:
        raise UserError(
            f"{error}. Restore it, or the version that wrote it; delete a damaged one, and the run resumes from its "
            "checkpoints"
        ) from error
    return record


def done_before(config: Config) -> Path | None:
    """The record of this run if it is finished already; None if it must be trained (also with `ckpt_path=null`)."""
    return None if config.ckpt_path is None else finished_record(run_dir(config))


def finished_message(config: Config, finished: Path) -> str:
    """The message when a finished run is started again."""
    return (
        f"{run_name(config)} is finished: {finished}. Delete its folder or give ckpt_path=null to train it again; "
        f"{script('evaluate')} scores its weights on other sets."
    )


def finished_record(folder: Path) -> Path | None:
    """The record of a finished run, in `folder` or in another study's folder of the same name; None if there is none.

    Fig. 8's DRRN_B3U4 is a point of Fig. 6 and Table 4 too: the folder is named by the run's identity.
    """
    own, others = folder / FILE, sorted(folder.parents[1].glob(f"*/{folder.name}/{FILE}"))
    paths = [*([own] if own.is_file() else []), *others]
    return next((path for path in paths if read_record(path).get("status") == "finished"), None)


def run_record(config: Config, network: Any) -> dict[str, Any]:
    """The record of a run that is about to start; `status`, `budget` and `scores` follow while it runs.

    `status` is "running", "finished", "stopped" or "failed". `ended_by` is the cause of an end before the last step:
    "signal SIGTERM" (or another), "timer" (`trainer.max_time`), "callback" (early stopping), "user error", "error";
    else null. Programs decide on these two; `error` is text for people. Records of earlier versions have no
    `ended_by`. `network` is built of `config.model`; its weights are not read.
    """
    from drrn.layers import conv_weights
    from drrn.protocol import Protocol  # here: a refused configuration must not wait for NumPy

    whole = asdict(config)
    if config.optim.optimiser is not None:
        for key in OF_OUR_SOLVERS:
            del whole["optim"][key]
    return {
        "format": FORMAT,
        "name": run_name(config),
        "study": config.study,
        "status": "running",
        "ended_by": None,
        "experiment": experiment(config),
        "seed": config.seed,
        "structure": {
            "name": structure_name(config.model),
            "depth": network.depth,
            "conv_weights": conv_weights(network),
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        "protocol": Protocol(degradation=config.data.degradation).stamp(),
        "config": whole,
        **environment(),
    }
