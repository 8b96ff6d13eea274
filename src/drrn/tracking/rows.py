"""A run's logged rows in a file of our own, so that neither a kill nor a logger's failure loses them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from drrn.module import SuperResolution

log = logging.getLogger(__name__)

ROWS = "rows.jsonl"


class Rows(Logger):
    """The last of a run's loggers: append each row to a file in the run's folder, `{"step": 3, "train/loss": …}`.

    A resumed run repeats the steps that a killed start had logged after its last checkpoint, with the same results:
    their rows are neither written again nor given to the other loggers (`new`).

    Args:
        path: of the file, with the rows of earlier starts. None: nothing is read or written.
        module: the module in training, which has the step.
        batch_size: pairs of a step.
    """

    name = version = save_dir = None  # of Lightning's interface

    def __init__(self, path: Path | None, module: SuperResolution | None = None, batch_size: int = 0) -> None:
        super().__init__()
        self.path, self.module, self.batch_size = path, module, batch_size
        self.earlier: list[tuple[int, dict[str, float]]] = []
        self.last: dict[str, int] = {}  # metric → the highest step that an earlier start logged it at
        if path is not None:
            self.save_dir = str(path.parent)
            try:
                self._read()
            except OSError as error:
                self._give_up(error)

    @property
    def step(self) -> int:
        """Optimiser steps done; Lightning's count for loggers is too low in validations and resumed runs."""
        return self.module.trainer.global_step

    def place(self, step: int) -> dict[str, float]:
        """A number of optimiser steps, converted to patches and epochs."""
        return {"patches_seen": step * self.batch_size, "epoch": step / self.module.hparams["steps_per_epoch"]}

    def _read(self) -> None:
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole = 0
        for line in content.splitlines(keepends=True):
            try:
                row = json.loads(line)
                step = int(row.pop("step"))
            except (ValueError, TypeError, KeyError, AttributeError):
                break
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            self.earlier.append((step, row))
            self.last |= {key: max(step, self.last.get(key, -1)) for key in row}
        if whole < len(content):
            os.truncate(self.path, whole)  # remove the line that a kill or a full disk cut off

    def new(self, metrics: Mapping[str, float], step: int) -> dict[str, float]:
        """The metrics that no earlier start has logged at this step; the test's scores come from the record."""
        return {
            key: value
            for key, value in metrics.items()
            if key != "epoch" and not key.startswith("test/") and self.last.get(key, -1) < step
        }

    def log_hyperparams(self, *arguments: Any, **more: Any) -> None:
        """Nothing: the record has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.path is None or not (row := self.new(metrics, self.step)):
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": self.step, **row}) + "\n")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("%s: %s; the run continues without it", self.path, error)
        self.path = None
