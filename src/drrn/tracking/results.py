"""What a finished evaluation gives to the loggers: mean scores and pictures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from drrn.module import SuperResolution

log = logging.getLogger(__name__)

PICTURES = 3  # test images drawn side by side: the first of the first set, so that runs can be compared


def test_means(record: dict[str, Any]) -> dict[str, float]:
    """`test/Set5_x3/psnr` → the mean over the set's images, for each set, scale and metric of a record."""
    return {
        f"test/{row['set']}_x{row['scale']}/{key}": value
        for row in record["means"]
        for key, value in row.items()
        if key not in ("set", "scale")
    }


def pictures(record: dict[str, Any], module: SuperResolution) -> dict[str, np.ndarray]:
    """`pictures/Set5_x3/baby` → [H, W, 4] uint8, ground truth, bicubic and this network side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from drrn.inference import super_resolve
    from drrn.pictures import side_by_side

    if not record["scores"]:
        return {}
    scales = sorted({row["scale"] for row in record["scores"]})
    scale, first = scales[len(scales) // 2], record["scores"][0]["set"]
    chosen = [r["image"] for r in record["scores"] if (r["set"], r["scale"]) == (first, scale)][:PICTURES]
    drawn = {}
    try:
        files = {path.name: path for path in module.trainer.datamodule.sets["test"][first]}
        name = record["structure"]["name"]
        low = [name] if module.network.input == "low" else []
        for image in chosen:
            figure = side_by_side(files[image], scale, {name: lambda x: super_resolve(module.network, x)}, low=low)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            drawn[f"pictures/{first}_x{scale}/{Path(image).stem}"] = np.asarray(canvas.buffer_rgba())
    except Exception as error:  # no reason to lose the scores
        log.warning("no picture of %s for the loggers: %s: %s", first, type(error).__name__, error)
    return drawn
