"""A run in Weights & Biases."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers.logger import Logger

from drrn.config import Config
from drrn.identity import WEIGHTS, checkpoint_name, run_name, structure_name
from drrn.tracking import Tracker
from drrn.tracking.results import score_table, test_means
from drrn.tracking.rows import Rows
from drrn.tracking.wandb_files import ended, history, mend, runs

log = logging.getLogger(__name__)

FINISH_SECONDS = 180  # for uploading at the end (logger.mode=online); the rest stays on the disk
ARTIFACTS = {"none": (), "weights": ("weights",), "checkpoints": ("weights", "checkpoint")}


class WandB(Tracker, Logger):
    """A run of ours as one W&B run, however often it is interrupted.

    A leg is W&B's part of one start. W&B's step is the optimiser step and its x-axis `patches_seen`. The history of
    all legs together has every metric at every step once: rows missing in a killed leg's file are logged again from
    `rows`, and repeated steps are not.

    Args:
        config: the checked configuration.
        folder: the run's folder; W&B's files go to `wandb/` below it.
        record: the run record; its `wandb_id` is the W&B run to resume.
        rows: the rows of earlier starts, and the current step.
    """

    title = "W&B"
    name = version = save_dir = None  # of Lightning's interface

    def __init__(self, config: Config, folder: Path, record: dict[str, Any], rows: Rows) -> None:
        super().__init__()
        self.save_dir = str(folder)
        self.config, self.folder, self.record, self.rows, self.logger = config, folder, record, rows, self
        self.run: Any = None
        self.logged: dict[str, int] = {}  # metric → the highest step that it was logged at, in any leg
        self.state = {"kind": "wandb", "mode": config.logger.mode, "folder": None, "problem": None}
        self.attempt("start", self._start)

    def log_hyperparams(self, *arguments: Any, **more: Any) -> None:
        """Nothing: `wandb.init` got the whole configuration."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """A training or validation line; the test's scores come from the record (`results`)."""
        self._log(self.rows.new(metrics, self.rows.step), self.rows.step)

    def _log(self, row: Mapping[str, float], step: int) -> None:
        new = {key: value for key, value in row.items() if self.logged.get(key, -1) < step}
        if new and self.attempt("log", lambda: self.run.log({**new, **self.rows.place(step)}, step=step)):
            self.logged |= dict.fromkeys(new, step)

    def _start(self) -> None:
        import wandb

        record, mode = self.record, self.config.logger.mode
        legs = runs(self.folder, record["wandb_id"])
        for path in legs:
            for step, row in history(path):
                self.logged |= {key: max(step, self.logged.get(key, -1)) for key in row}
            mend(path)
        # W&B names a leg's folder by the second of its start; two legs in one folder would lose rows.
        while legs and f"{datetime.fromtimestamp(time.time()):%Y%m%d_%H%M%S}" in legs[-1].parent.name:
            time.sleep(0.05)
        arguments = self._about()
        arguments["settings"] = wandb.Settings(
            silent=True,
            console="off",  # train.log has the output; captured, it would pass through W&B's service
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        if mode == "online":
            try:
                _end_service()  # it may have the settings of an earlier run
                wandb.setup(wandb.Settings(mode="online", silent=True))
                if not wandb.login(prompt=False, verify=False):  # `init` would prompt at a terminal, and wait
                    raise RuntimeError("no account is configured (`wandb login`)")
                self.run = wandb.init(**arguments, mode=mode)
            except Exception as error:
                mode = self.state["mode"] = "offline"
                log.warning("logger.mode=online does not work: %s. Tracked offline; upload it later.", error)
                _end_service()
        if self.run is None:
            self.run = wandb.init(**arguments, mode=mode)
        if mode != "disabled":
            record["wandb_id"] = self.run.id  # under a W&B agent, the agent's
            self.state["folder"] = f"wandb/{Path(self.run.dir).parent.name}"
        self.run.define_metric("patches_seen")
        self.run.define_metric("*", step_metric="patches_seen", step_sync=True)
        for step, row in self.rows.earlier:
            self._log(row, step)
        if mode == "offline":
            log.info("W&B is offline; `wandb sync %s` uploads it", self.folder / "wandb/offline-run-*")

    def _about(self) -> dict[str, Any]:
        """Arguments of `wandb.init`: names, tags and configuration of the W&B run."""
        config, record = self.config, self.record
        model, structure, steps = config.model, record["structure"], self.rows.module.hparams["max_steps"]
        sizes = [] if "network" in model else [f"B{model['B']}", f"U{model['U']}"]
        tags = [structure_name(model), *sizes, f"d{structure['depth']}", *config.logger.tags]
        tags += os.environ.get("WANDB_TAGS", "").split(",")
        about = ("structure", "experiment", "patches", "protocol", "versions", "machine", "git")
        return {
            "project": config.logger.project,
            "name": os.environ.get("WANDB_NAME") or run_name(config),
            "group": os.environ.get("WANDB_RUN_GROUP") or config.study,
            "tags": list(dict.fromkeys(filter(None, tags))),
            "entity": config.logger.entity,
            "notes": config.logger.notes,
            "job_type": config.logger.job_type,
            "id": record["wandb_id"],
            "resume": "allow",
            "dir": self.folder,
            "config": {
                **record["config"],
                "d": structure["depth"],
                "k": structure["conv_weights"],
                **{key: record.get(key) for key in about},
                "budget": {"steps": steps, "patches": steps * config.data.batch_size},
            },
        }

    def show(self, drawn: Mapping[str, np.ndarray]) -> None:
        """Log pictures of a validation, in the row of its step."""
        self.attempt("pictures", lambda: self.run.log(_images(drawn), step=self.rows.step))

    def results(self, drawn: Mapping[str, np.ndarray]) -> None:
        """Log the final evaluation, scores first: media and artifacts are more likely to fail."""
        self.attempt("results", self._scores)
        self.attempt("results", self._media, drawn)
        self.attempt("results", self._artifacts)

    def _scores(self) -> None:
        """Log means by set and scale in a last row of their own; these, budget and status in the run's summary."""
        record = self.record
        means = test_means(record)
        last = max([record["budget"]["steps"], *self.logged.values()]) + 1
        self.run.log({"patches_seen": record["budget"]["patches"], **means}, step=last)
        budget = {f"budget/{key}": value for key, value in record["budget"].items()}
        self.run.summary.update({**means, **budget, "status": record["status"]})

    def _media(self, drawn: Mapping[str, np.ndarray]) -> None:
        """Log the table of all images' scores, and pictures, in the row of `_scores`."""
        import wandb

        columns, rows = score_table(self.record)
        table = wandb.Table(columns=columns, data=rows)
        before = os.environ.get("WANDB_DATA_DIR")
        # W&B uploads the table later from a copy in this directory: the run's folder, not the user's home.
        os.environ.setdefault("WANDB_DATA_DIR", str(self.folder.resolve() / "wandb"))
        try:
            self.run.log({"scores": table, **_images(drawn)})
        finally:
            if before is None:
                del os.environ["WANDB_DATA_DIR"]

    def _artifacts(self) -> None:
        """Log the weights, and for "checkpoints" the last checkpoint too, with aliases for status and step."""
        import wandb

        steps = self.record["budget"]["steps"]
        about = {"structure": self.record["structure"], "steps": steps, "means": self.record["means"]}
        files = {"weights": WEIGHTS, "checkpoint": f"checkpoints/{checkpoint_name(steps)}"}
        for kind in ARTIFACTS[self.config.logger.artifacts]:
            path = self.folder / files[kind]
            artifact = wandb.Artifact(f"{self.folder.name}-{kind}", "model", metadata=about)
            artifact.add_file(str(path), policy="immutable")  # uploaded in place, without a copy
            self.run.log_artifact(artifact, aliases=[self.record["status"], f"step{steps}"])
            log.info("W&B artifact %s: %.1f MB", artifact.name, path.stat().st_size / 1e6)

    def finish(self, failed: bool) -> None:
        """End the W&B run, and check that its file on the disk is complete."""
        folder = self.state["folder"]
        if self.run is not None:
            self.attempt("finish", self.run.finish, exit_code=int(failed))
        _end_service()  # it writes the remaining rows
        if folder is not None:
            path = self.folder / folder / f"run-{self.record['wandb_id']}.wandb"
            if not ended(path):
                self.complain(f"{path} is incomplete: is the disk full?")
            if self.state["mode"] == "online" and self.state["problem"] is not None:
                log.warning("Upload the rest with: wandb sync %s", path.parent)


def _images(drawn: Mapping[str, np.ndarray]) -> dict[str, Any]:
    import wandb

    return {key: wandb.Image(pixels) for key, pixels in drawn.items()}


def _end_service() -> None:
    """End W&B's service process, so that a run's last rows are on the disk and the next run starts its own."""
    with suppress(Exception):  # the import too: a signal may have interrupted the first one
        import wandb

        wandb.teardown()
