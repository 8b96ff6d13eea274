"""What a training run says while it runs, and how its checkpoints are kept."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar

log = logging.getLogger(__name__)


class TerminalProgress(RichProgressBar):
    """Lightning's bar, which would call the run "Epoch 0/-2": to Lightning a run is one epoch without an end."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"


class PlainProgress(Callback):
    """A line every `every` optimiser steps, for logs and terminals that cannot redraw."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started, self.first = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step, loss, γ, the share of gradients clipped, speed and the time that remains."""
        step = trainer.global_step
        if step % self.every or (batch_idx + 1) % trainer.accumulate_grad_batches or not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        rate = (step - self.first) / (time.monotonic() - self.started)
        left = (trainer.max_steps - step) / rate
        log.info(
            "step %d/%d  loss %.4f  γ %.3g  |g| %.3g  clipped %.3f  %.1f steps/s  %d:%02d left",
            step, trainer.max_steps, metrics["train/loss"], metrics["train/gamma"], metrics["train/gradient_norm"],
            metrics["train/clipped"], rate, left // 60, left % 60,
        )  # fmt: skip

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The sets' means."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        shown = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("validate/")}
        log.info("step %d  %s", trainer.global_step, "  ".join(f"{k[9:]} {v:.4f}" for k, v in shown.items()))


def checkpoints(folder: Path, every: int) -> ModelCheckpoint:
    """Keep the newest two checkpoints, one every `every` steps: nothing is selected by a benchmark's score."""
    return ModelCheckpoint(
        dirpath=folder,
        filename="step{step:08d}",
        auto_insert_metric_name=False,
        monitor="step",
        mode="max",
        save_top_k=2,
        every_n_train_steps=every,
        save_on_train_epoch_end=False,
        enable_version_counter=False,  # a file's name says its step, nothing else
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step that can be read whole; None if there is none.

    A newer one that cannot be read (power failed, the disk filled) is named in a warning and passed over.
    """
    for path in sorted(folder.glob("step*.ckpt"), reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            log.warning("%s cannot be read (%s): using the one before it", path, error)
        else:
            return path
    return None
