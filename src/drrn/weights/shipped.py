"""Shipped weights by name: the files of data/weights/, each with its record, are part of the package."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from drrn.errors import UserError
from drrn.home import DATA
from drrn.identity import WEIGHTS

if TYPE_CHECKING:
    from torch import nn

FOLDER = DATA / "weights"


def shipped(scale: float = 3) -> dict[str, Path]:
    """Name → file of the shipped weights, sorted by the PSNR on Set5 at a scale in their records, the best first.

    If no record has the scale, ×3 is used.
    """

    def psnr(path: Path, scale: float) -> float:
        record = path.with_suffix(".json")
        means = json.loads(record.read_text()).get("means", []) if record.is_file() else []
        there = [row for row in means if (row["set"], row["scale"]) == ("Set5", scale)]
        return max((row["psnr"] for row in there if row.get("method") != "bicubic"), default=-math.inf)

    files = sorted(FOLDER.glob("*.safetensors"))
    scale = scale if any(psnr(path, scale) > 0 for path in files) else 3
    return {path.stem: path for path in sorted(files, key=lambda path: psnr(path, scale), reverse=True)}


def weights_file(checkpoint: str | Path | None, scale: float = 3, key: str = "checkpoint") -> Path:
    """The file of a checkpoint: a path, a run's folder, the name of shipped weights, or None for the best of them.

    Args:
        checkpoint: the value of `key` in the configuration.
        scale: the scale by which images will be enlarged.
        key: the name of the key, for messages.

    Raises:
        UserError: there is neither such a file nor such a name.
    """
    if checkpoint is not None:
        for path in (Path(checkpoint), Path(checkpoint) / WEIGHTS):
            if path.is_file():
                return path
    known = shipped(scale)
    if checkpoint is None and known:
        return next(iter(known.values()))
    if str(checkpoint) in known:
        return known[str(checkpoint)]
    names = f", or one of {', '.join(known)}" if known else " (this version ships none)"
    if checkpoint is None:
        raise UserError("checkpoint is missing: give weights.safetensors or a .ckpt, or method=bicubic" + names)
    there = f"a folder without {WEIGHTS}" if Path(checkpoint).is_dir() else "no such file"
    raise UserError(f"{key} = {str(checkpoint)!r}: {there}; give weights.safetensors or a .ckpt{names}")


def load(checkpoint: str | Path | None = None, scale: float = 3) -> nn.Module:
    """Load a network in evaluation mode, float32, on the CPU.

    Args:
        checkpoint: a path, the name of shipped weights, or None for the best of them at `scale`.

    Raises:
        UserError: there is no such file, or it contains no weights of this package.
    """
    from drrn.weights.ours import load_network

    return load_network(weights_file(checkpoint, scale))[0]
