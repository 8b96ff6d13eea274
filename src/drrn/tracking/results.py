"""An evaluation's mean scores and pictures, for the loggers."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer

from drrn.identity import structure_name
from drrn.module import SuperResolution

log = logging.getLogger(__name__)

PICTURES = 3  # the first images of the first set: the same in all runs, to be compared


def test_means(record: dict[str, Any]) -> dict[str, float]:
    """`test/Set5_x3/psnr` → the mean over the set's images, for each set, scale and metric of a record."""
    return {
        f"test/{row['set']}_x{row['scale']}/{key}": value
        for row in record["means"]
        for key, value in row.items()
        if key not in ("set", "scale")
    }


def score_table(record: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the scores of a record's images; None where a row lacks a column."""
    columns = list(dict.fromkeys(key for row in record["scores"] for key in row))
    return columns, [[row.get(key) for key in columns] for row in record["scores"]]


def pictures(module: SuperResolution, stage: str) -> dict[str, np.ndarray]:
    """`pictures/Set5_x3/baby` → [H, W, 4] uint8, ground truth, bicubic and this network side by side.

    Args:
        module: with the weights to show.
        stage: "test" or "validate"; its first set is shown at its middle scale.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from drrn.inference import super_resolve
    from drrn.pictures import draw, side_by_side

    data = module.trainer.datamodule
    tasks = data.evaluation_tasks(stage)
    first, scales = tasks[0].set_name, sorted({task.scale for task in tasks})
    scale, name = scales[len(scales) // 2], structure_name(module.hparams["model"])
    run = {name: lambda x: super_resolve(module.network, x)}
    low = [name] if module.network.input == "low" else []
    drawn = {}
    try:
        for path in data.sets[stage][first][:PICTURES]:
            canvas = FigureCanvasAgg(draw(side_by_side(path, scale, run, low=low, degradation=data.data.degradation)))
            canvas.draw()
            drawn[f"pictures/{first}_x{scale}/{path.stem}"] = np.asarray(canvas.buffer_rgba())
    except Exception as error:  # the scores must not be lost for a picture
        log.warning("no picture of %s for the loggers: %s: %s", first, type(error).__name__, error)
    return drawn


class ValidationPictures(Callback):
    """Log pictures at the validations whose step is a multiple of `every` (`logger.pictures_every`).

    It precedes callbacks that average weights: in the same hook they restore the weights that are trained.
    """

    def __init__(self, every: int, loggers: list[Any]) -> None:
        self.every, self.loggers = every, loggers

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: SuperResolution) -> None:
        if trainer.is_global_zero and trainer.global_step % self.every == 0:
            drawn = pictures(pl_module, "validate")
            for one in self.loggers:
                one.show(drawn)
