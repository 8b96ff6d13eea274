"""The schema of `evaluate.py`, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from drrn.config import check_sets
from drrn.degradations import BI, DEGRADATIONS, check_scales
from drrn.disk import check_output
from drrn.errors import UserError
from drrn.schema import key, paths, typed
from drrn.weights.shipped import weights_file

# Keys that explain sets itself.
NOT_EXPLAINED = ("crop", "color", "rounding", "metrics", "images", "check_protocol")


@dataclass
class EvaluateConfig:
    """The keys of conf/evaluate.yaml."""

    method: str = key("the method to score", choices=("network", "bicubic", "images"))
    checkpoint: Any = key("networks: weights.safetensors or .ckpt, one or a list")
    folder: str | None = key("images of method=images: baby_x3.png, or Set5/x3/baby.png", default=None)
    sets: list[str] = key("Set5, Set14, BSD100, Urban100, demo_test, or folders", distinct=True)
    scales: list[int] = key("of the evaluation", at_least=2, distinct=True)
    metrics: list[str] = key("psnr, ssim, ifc, msssim, vif, psnr_rgb (Tab. 3)", distinct=True)
    output: str = key("file of every image's scores; existing ones are not computed again")
    images: str | None = key("folder for the super-resolved Y images; null: they are not saved")
    root: str = key("folder of the sets; missing ones are downloaded to it")
    workers: int = key("processes; worker i uses GPU i mod the number of GPUs", at_least=1, below=1001)
    threads: int | None = key("CPU threads of all processes; null: idle cores", at_least=1, below=2**12)
    precision: str = key("of networks; noted in the scores", default="float32", choices=("float32", "tf32", "bf16"))
    explain: float | None = key(
        "a published PSNR, or SSIM up to 1, with its digits: find the way of measuring that gives it", None, above=0
    )
    check_protocol: bool = key("first check that bicubic gives the published numbers")
    crop: int | None = key("pixels shaved off each side; null: the scale", at_least=0)
    color: str = key("luminance, or PSNR over R, G and B", choices=("y", "rgb"))
    rounding: str = key("of the compared values", choices=("uint8", "float"))
    degradation: str = key("makes the low resolution; noted in the scores", choices=tuple(DEGRADATIONS))


def check(cfg: DictConfig, overrides: Sequence[str] = ()) -> EvaluateConfig:
    """Check a composed configuration; an invalid key is a UserError, before anything heavy is imported."""
    config = typed(EvaluateConfig, cfg)
    check_sets("sets", config.sets)
    check_scales("scales", config.scales, config.degradation)
    config.checkpoint = paths("checkpoint", config.checkpoint)
    if config.method == "network" or config.checkpoint:
        config.checkpoint = [str(weights_file(path)) for path in config.checkpoint or [None]]
    if (config.method == "images") != (config.folder is not None):
        raise UserError("method=images and folder=FOLDER: each needs the other")
    if config.folder is not None and not Path(config.folder).is_dir():
        raise UserError(f"folder = {config.folder}: no such folder")
    check_output("output", Path(config.output))
    if config.images is not None:
        check_output("images", Path(config.images), folder=True)
    if config.explain is not None:
        _check_explain(config, overrides)
    from drrn.metrics import check_names  # last, since the import is slow

    check_names("metrics", config.metrics)
    return config


def _check_explain(config: EvaluateConfig, overrides: Sequence[str]) -> None:
    """Check that there is one set, scale and method, bicubic degradation, and no override of `NOT_EXPLAINED`."""
    if config.degradation != BI:
        raise UserError(f"explain = {config.explain}: it explains bicubic degradation only; give degradation={BI}")
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    if idle := ", ".join(name for name in NOT_EXPLAINED if name in given):
        what = "it measures PSNR, or SSIM up to 1, in all ways, and saves no images"
        raise UserError(f"explain = {config.explain}: {what}; leave out {idle}")
    methods = [*config.checkpoint, *(["bicubic"] if config.method == "bicubic" else [])]
    for name, asked in (("sets", config.sets), ("scales", config.scales), ("checkpoint", methods)):
        if len(asked) > 1:
            raise UserError(f"explain = {config.explain}: it explains a single number; give one of {name}")
