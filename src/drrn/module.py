"""Training as in Sec. 4.2: the loss of Eq. 10, SGD with a halved learning rate γ, gradients clipped to θ/γ."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from drrn.config import OptimConfig
from drrn.errors import Diverged
from drrn.fast.training import InTraining, Latch, worth_compiling
from drrn.images import read_pixels
from drrn.inference import forget, super_resolve
from drrn.losses import loss_of
from drrn.matlab import imresize
from drrn.networks import build
from drrn.optimisers import configured, takes_found_inf
from drrn.protocol import Protocol, prepare, score_pixels


class SuperResolution(LightningModule):
    """The Lightning module of a run: a network with its loss, solver and evaluation.

    Args:
        model: the network's structure, `drrn.networks.build`'s argument.
        optim: fields of `drrn.config.OptimConfig`.
        steps_per_epoch: optimiser steps of one pass over the training pairs.
        max_steps: optimiser steps of the whole run.

    All are plain scalars and dicts, so checkpoints load with `weights_only=True`.
    """

    def __init__(
        self, model: dict[str, Any], optim: dict[str, Any], steps_per_epoch: int = 1, max_steps: int = 1
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optim = OptimConfig(**optim)
        self.network = build(model)
        if hasattr(self.network, "conv_rec"):
            with torch.no_grad():  # with `optim.residual_scale` 0 the initial output is bicubic's; 1 is the paper's
                self.network.conv_rec.weight.mul_(self.optim.residual_scale)
        self.loss = loss_of(self.network, self.optim.loss)
        self.compiled: bool | str = False  # `speed.compile`
        self.checkpointing = False  # `speed.checkpointing`
        self.validated_in = "float32"  # precision of validations; the test's is float32
        self.averaged_before = 0  # batches in BatchNorm's initial running statistics (fine-tuning)
        self.about: dict[str, Any] = {}  # metadata for checkpoints and weights
        self.scores: list[dict[str, Any]] = []  # rows of the last evaluation, one for each image
        self.validation: list[dict[str, Any]] = []  # rows of all validations, with their step: the learning curve
        self.validated: int | None = None  # step of the last validation
        self.rows: list[tuple[int, int, dict[str, Any]]] = []  # this rank's, in an evaluation: (task, image, row)
        self.seconds_before = 0.0  # seconds of training in earlier starts
        self.since: float | None = None
        self._between_runs()

    def _between_runs(self) -> None:
        """Drop the state of an earlier `fit`, which may have been on another device."""
        self.trained: InTraining | None = None  # the network in training, from the first batch on
        self.latch: Latch | None = None
        self.losses: list[Tensor] = []  # of the step's micro-batches

    def forward(self, x: Tensor) -> Tensor:
        """`network(x)`."""
        return self.network(x)

    # ------------------------------------------------------------------ training

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Pairs (x, x̃) [N, 1, p, p] → the loss over this process's share of this micro-batch.

        The shares have equal sizes, so the mean of their gradients, which DDP and accumulation compute, is the
        gradient of the loss over the whole batch.
        """
        x, truth = batch
        if hasattr(self.network, "at_step"):
            self.network.at_step(self.trainer.global_step)
        if self.trained is None:
            compiled = worth_compiling(self.network, x) if self.compiled == "auto" else self.compiled
            self.trained = InTraining(self.network, compiled, self.checkpointing)
            self.latch = Latch(x.device)
        loss = self.loss(self.trained(x), truth)
        self.losses.append(loss.detach())
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Adjustable gradient clipping (Sec. 4.2): the bound is θ/γ with the current rate γ.

        `optim.clip=value` clips each gradient to [−θ/γ, θ/γ], as the paper says; `norm` scales the whole gradient to
        a norm of at most θ/γ, as the authors' Caffe does. Lightning calls this on the averaged, accumulated and
        unscaled gradients of every optimiser step, whatever the Trainer's own clip value is.

        Only a logged step waits for the device. A non-finite loss or gradient is noted on the device and raises
        `Diverged` later; from its step on neither the weights nor BatchNorm's averages change.
        """
        gamma = optimizer.param_groups[0]["lr"]
        bound = self.optim.theta / gamma if gamma > 0 else math.inf
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        loss, statistics = self.trained.of_all_processes(torch.stack(self.losses).mean(), self.trainer)
        self.losses = []
        # With a loss scaler infinite gradients are expected now and then: it skips the step and lowers its scale.
        good = self.latch.check(self.trainer.global_step, gamma, loss, norm, both=not self.loss_is_scaled)
        self.trained.follow(statistics, self._momenta(len(statistics)), good)
        logged = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0
        if takes_found_inf(optimizer):
            optimizer.found_inf = (~good).float()
        if logged or not takes_found_inf(optimizer):  # other solvers would apply the bad step
            self.refuse_divergence()
        clip, touched = self.optim.clip, torch.zeros_like(norm)
        if clip == "value":
            if logged:
                touched = sum((g.abs() > bound).sum() for g in gradients) / sum(g.numel() for g in gradients)
            clip_grad_value_(self.network.parameters(), bound)
        elif clip == "norm":
            touched = (norm > bound).float()
            clip_grads_with_norm_(self.network.parameters(), bound, norm)
        if logged:
            self.log("train/loss", loss, prog_bar=True)
            self.log_dict({"train/gamma": gamma, "train/gradient_norm": norm, "train/clipped": touched})

    def _momenta(self, batches: int) -> list[float]:
        """Weights of the micro-batches' statistics in BatchNorm's running averages, as in Caffe.

        Caffe keeps Σ λᵏ · statistic and divides by Σ λᵏ, so its average is unbiased from the first batch; with
        PyTorch's constant momentum 1 − λ = 0.001 the initial values 0 and 1 dominate for thousands of steps. In
        PyTorch's form Caffe's average has the momentum (1 − λ) / (1 − λⁿ) at the n-th batch.
        """
        decay = self.optim.bn_average
        last = self.averaged_before + self.trainer.fit_loop.epoch_loop.total_batch_idx + 1
        return [(1 - decay) / (1 - decay**n) for n in range(last - batches + 1, last + 1)]

    def refuse_divergence(self) -> None:
        """Wait for the device, and raise `Diverged` with the first non-finite step if there is one."""
        if self.latch is None or (bad := self.latch.read()) is None:
            return
        step, loss, norm, gamma = bad
        raise Diverged(
            f"training diverged at step {step}: loss {loss:.4g}, gradient norm {norm:.4g}, γ = {gamma:.4g}, "
            f"clip = {self.optim.clip} with θ = {self.optim.theta:g}. Try optim.clip=norm, a smaller optim.theta or "
            "optim.lr, or model.norm=batch. The step was not taken; the last good checkpoint is kept."
        )

    @property
    def loss_is_scaled(self) -> bool:
        """Whether there is a loss scaler, which scales loss and gradients until the step (`16-mixed` on a GPU)."""
        return self._trainer is not None and getattr(self._trainer.precision_plugin, "scaler", None) is not None

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser and the schedule of `optim.*`, updated at every step.

        PyTorch's fused kernels do a whole step at once. They are off with a loss scaler: they would undo its scaling
        within the step, but clipping needs unscaled gradients before.
        """
        fused = not self.loss_is_scaled and self.device.type in ("cpu", "cuda")
        per_epoch, steps = self.hparams["steps_per_epoch"], self.hparams["max_steps"]
        optimizer, schedule = configured(self.network, self.optim, per_epoch, steps, fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------ start, checkpoints, end

    @property
    def seconds(self) -> float:
        """Seconds of training up to these weights, over all starts of the run."""
        return self.seconds_before + (time.monotonic() - self.since if self.since is not None else 0)

    def on_fit_start(self) -> None:
        """Start the clock."""
        self._between_runs()
        self.since = time.monotonic()

    def on_validation_start(self) -> None:
        """Do not validate weights that have diverged."""
        self.refuse_divergence()

    def on_train_end(self) -> None:
        """Free the memory of training for the test."""
        self.refuse_divergence()
        self._between_runs()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume the learning curve and the clock."""
        self.validation = checkpoint.get("validation", [])
        self.validated = checkpoint.get("validated", checkpoint["global_step"])
        self.seconds_before = checkpoint.get("seconds", 0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the learning curve, the time and the metadata; raise `Diverged` instead if the weights diverged."""
        self.refuse_divergence()
        checkpoint["validation"], checkpoint["validated"] = self.validation, self.validated
        checkpoint["seconds"] = self.seconds
        checkpoint["drrn"] = self.about

    # ------------------------------------------------------------------ evaluation (drrn.protocol)

    @property
    def _stage(self) -> str:
        return "test" if self.trainer.testing else "validate"

    def validation_step(self, file: Path | None, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one image by the protocol; in the test bicubic too."""
        if file is None:
            return
        data, stage = self.trainer.datamodule, self._stage
        task, metrics = data.evaluation_tasks(stage)[dataloader_idx], data.evaluation_metrics(stage)
        pixels, protocol = read_pixels(file), Protocol(degradation=data.data.degradation)

        def scored(y: NDArray) -> dict[str, float]:
            return score_pixels(y, pixels, task.scale, metrics, protocol, file=file)

        given, _ = prepare(pixels, task.scale, self.network.input, protocol.degradation, file)
        given = given.astype(np.float32)
        precision = self.validated_in if stage == "validate" else "float32"
        with torch.autocast(self.device.type, enabled=False):  # in strips, as in src/evaluate.py
            prediction = super_resolve(self.network, given, precision=precision)
        row = {"set": task.set_name, "scale": task.scale, "image": file.name, **scored(prediction)}
        if stage == "test":
            interpolated = imresize(given, task.scale) if self.network.input == "low" else given
            row |= {f"bicubic_{name}": value for name, value in scored(interpolated).items()}
        self.rows.append((dataloader_idx, batch_idx * self.trainer.world_size + self.trainer.global_rank, row))

    def on_validation_epoch_start(self) -> None:
        """Start without rows."""
        self.rows = []
        forget(self.network)  # callbacks swap averaged weights in through `Tensor.data`, which PyTorch does not count

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def _finish(self) -> None:
        """Gather the rows of all ranks, in the order of the images, and log the means of the sets."""
        stage = self._stage
        parts = [self.rows]
        if self.trainer.world_size > 1:
            parts = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(parts, self.rows)
        ordered = sorted((row for part in parts for row in part), key=lambda row: row[:2])
        self.scores, data = [row for _, _, row in ordered], self.trainer.datamodule
        for name in data.evaluation_metrics(stage):
            for index, task in enumerate(data.evaluation_tasks(stage)):
                self.log(f"{stage}/{task}/{name}", mean(row[name] for place, _, row in ordered if place == index))
            overall = mean(row[name] for row in self.scores)
            self.log(f"{stage}/{name}", overall, logger=False)  # for callbacks to monitor

    on_test_epoch_end = _finish

    def on_validation_epoch_end(self) -> None:
        """Add the rows to the learning curve, except those of the validation that `trainer.max_time` triggers."""
        self._finish()
        self.validated = step = self.trainer.global_step
        if step * self.trainer.accumulate_grad_batches % self.trainer.val_check_interval == 0:
            self.validation += [{"step": step, **row} for row in self.scores]


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; NaN without values, as with `trainer.limit_val_batches=0`."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan
