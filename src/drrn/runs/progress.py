"""What a run says while it trains."""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


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
        shown = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("validate/") and k.count("/") == 2}
        log.info("step %d  %s", trainer.global_step, "  ".join(f"{k[9:]} {v:.4f}" for k, v in shown.items()))
