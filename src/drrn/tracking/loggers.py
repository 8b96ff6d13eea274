"""The loggers of a run: any number of destinations of its metrics besides its record.

W&B is ours (wandb_run.py); TensorBoard, CSV, MLflow and any other Lightning Logger are named by `_target_`.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

from drrn.config import Config
from drrn.identity import run_name
from drrn.module import SuperResolution
from drrn.targets import make, resolve
from drrn.tracking import Tracker
from drrn.tracking.results import ValidationPictures, pictures, score_table, test_means
from drrn.tracking.rows import ROWS, Rows
from drrn.tracking.wandb_run import WandB


class Tracking:
    """The loggers of a run.

    Args:
        config: the checked configuration.
        folder: the run's; the default `save_dir` of loggers that have one.
        record: the run record; its `tracking` is written here: each logger's kind and `problem` (None or its first
            error), for W&B also mode and folder. The second logger and later ones are in its list `also`.
        first: whether this is rank 0; the other ranks log nothing.

    Raises:
        UserError: a `_target_` that is no Logger, or refuses its arguments.
    """

    def __init__(self, config: Config, folder: Path, record: dict[str, Any], first: bool = True) -> None:
        self.config, self.folder, self.record, self.first = config, folder, record, first
        before = record.get("tracking") or {}
        ids = {state.get("kind"): state.get("run") for state in (before, *before.get("also", []))}
        self.made: list[Tracker] = [
            Other(name, node, config, folder, ids.get(name)) for name, node in config.logger_extra.items() if first
        ]

    def start(self, module: SuperResolution) -> list[Logger]:
        """Start the loggers for Lightning's Trainer. The last one is `Rows`, for rows that the others may lose."""
        if not self.first:
            return [Rows(None)]
        rows = Rows(self.folder / ROWS, module, self.config.data.batch_size)
        for other in self.made:
            other.start(self.record, rows)
        if self.config.logger.wandb:
            self.made.insert(0, WandB(self.config, self.folder, self.record, rows))
        first, *also = [one.state for one in self.made] or [{"kind": "none"}]
        if also:
            first["also"] = also
        self.record["tracking"] = first  # each logger updates its own `state`
        return [*(one.logger for one in self.made), rows]

    def callbacks(self) -> list[Callback]:
        """The callback for pictures at validations, if `logger.pictures_every` is set and there is a logger."""
        every = self.config.logger.pictures_every
        return [ValidationPictures(every, self.made)] if every is not None and self.made else []

    def results(self, module: SuperResolution) -> None:
        """Log the final evaluation: scores, their table, pictures."""
        drawn = pictures(module, "test") if self.made else {}
        for one in self.made:
            one.results(drawn)

    def finish(self) -> None:
        """End the loggers of a finished run; `record["tracking"]` may change."""
        for one in reversed(self.made):  # W&B last: it may wait for its service
            one.finish(self.record["status"] == "failed")


class Other(Tracker):
    """A logger named by `_target_`.

    Its methods are wrapped, so that none of them ends a run and each row is logged once. CSV rows have the optimiser
    step and `patches_seen` as columns; the others' x-axis is patches seen, so that runs of different batch sizes
    compare.

    Args:
        name, node: of the configuration: `logger.NAME={_target_: …, argument: value}`.
        run: the logger's own id of this run from an earlier start, or None.

    Raises:
        UserError: the class is no Logger, or refuses these arguments.
    """

    WRAPPED = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")

    def __init__(self, name: str, node: dict[str, Any], config: Config, folder: Path, run: Any) -> None:
        key = f"logger.{name}"
        kind, _ = resolve(key, node, Logger)
        offered = {"save_dir": str(folder), "run_name": run_name(config), "run_id": run}
        if str(node.get("tracking_uri")).startswith("sqlite:"):  # MLflow without a server: files next to its database
            offered["artifact_location"] = str(Path(config.output).resolve() / "mlflow")
        taken = inspect.signature(kind).parameters
        self.logger = make(key, node, Logger, **{key: value for key, value in offered.items() if key in taken})
        self.keeps_id = "run_id" in taken  # MLflow: a resumed run continues its MLflow run
        self.title, self.state = key, {"kind": name, "problem": None}
        self.own = {method: getattr(self.logger, method) for method in self.WRAPPED}

    def start(self, record: dict[str, Any], rows: Rows) -> None:
        """Wrap the logger's methods, and log the configuration."""
        self.record, self.rows = record, rows
        for method in self.WRAPPED:
            setattr(self.logger, method, partial(self.attempt, method, self.own[method]))
        self.logger.log_metrics = lambda metrics, step=None: self._log(rows.new(metrics, rows.step), rows.step)
        self.logger.log_hyperparams = lambda *_, **__: None  # Lightning would log the module's
        self.attempt("log_hyperparams", self.own["log_hyperparams"], record["config"])
        if self.keeps_id:
            self.attempt("start", lambda: self.state.update(run=self.logger.version))

    def _log(self, row: dict[str, float], steps: int) -> None:
        where = self.rows.place(steps)
        if row and isinstance(self.logger, CSVLogger):
            self.attempt("log_metrics", self.own["log_metrics"], {**row, **where}, steps)
        elif row:
            self.attempt("log_metrics", self.own["log_metrics"], row, int(where["patches_seen"]))

    def results(self, drawn: dict[str, np.ndarray]) -> None:
        """Log scores as metrics; their table and pictures where the logger can show them."""
        steps, patches = self.record["budget"]["steps"], self.record["budget"]["patches"]
        self._log(test_means(self.record), steps)
        self.attempt("results", self._table, patches)
        self.show(drawn)
        self.attempt("save", self.own["save"])

    def finish(self, failed: bool) -> None:
        self.attempt("finish", self.own["finalize"], "failed" if failed else "success")

    def show(self, drawn: dict[str, np.ndarray]) -> None:
        """Log pictures made with the current weights, where the logger can show them."""
        self.attempt("pictures", self._pictures, drawn, int(self.rows.place(self.rows.step)["patches_seen"]))

    def _pictures(self, drawn: dict[str, np.ndarray], patches: int) -> None:
        experiment = getattr(self.logger, "experiment", None)
        for key, pixels in drawn.items():
            if hasattr(experiment, "add_image"):  # TensorBoard
                experiment.add_image(key, pixels, patches, dataformats="HWC")
            elif hasattr(experiment, "log_image"):  # MLflow
                experiment.log_image(self.logger.run_id, pixels, f"{key}.png")

    def _table(self, patches: int) -> None:
        experiment = getattr(self.logger, "experiment", None)
        columns, rows = score_table(self.record)
        if hasattr(experiment, "add_text"):  # TensorBoard
            lines = [columns, ["---"] * len(columns), *rows]
            cells = ["| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines]
            experiment.add_text("scores", "\n".join(cells), patches)
        elif hasattr(experiment, "log_table"):  # MLflow
            table = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
            experiment.log_table(self.logger.run_id, table, "scores.json")
