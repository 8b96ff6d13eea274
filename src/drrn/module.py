"""Training as in Sec. 4.2: the loss of Eq. 10, SGD with a halving rate γ, gradients clipped to θ/γ."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from drrn.config import ModelConfig, OptimConfig
from drrn.errors import UserError
from drrn.fast.cuda_graph import Graphed
from drrn.inference import forget, super_resolve
from drrn.model import DRRN
from drrn.protocol import score
from drrn.torch_metrics import SetPSNR, SetSSIM


class Diverged(UserError):
    """The loss or a gradient is no longer a finite number."""


def euclidean_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """Eq. 10 over a mini-batch: 1/(2N) Σ ‖x̃ − D(x)‖², summed over pixels, N patches [N, 1, p, p] → scalar.

    A mean over pixels would be p² times smaller, and θ and γ would mean something else. In float32
    whatever the precision of the prediction.
    """
    return (prediction.float() - truth.float()).square().sum() / (2 * len(prediction))


def learning_rate_factor(optim: OptimConfig, step: int, steps_per_epoch: int, max_steps: int) -> float:
    """γ / optim.lr after `step` optimiser steps: halved every so often (Sec. 4.2), or a cosine to 0."""
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(step / max_steps, 1)))
    every = optim.halve_every_steps or max(1, round(optim.halve_every_epochs * steps_per_epoch))
    return 0.5 ** (step // every)


class SuperResolution(LightningModule):
    """A network of the DRRN family in training.

    Args:
        model: fields of `drrn.config.ModelConfig`.
        optim: fields of `drrn.config.OptimConfig`.
        steps_per_epoch: optimiser steps that see every training pair once.
        max_steps: optimiser steps of the whole run.

    All are plain scalars, so checkpoints load with `weights_only=True`.
    """

    def __init__(
        self, model: dict[str, Any], optim: dict[str, Any], steps_per_epoch: int = 1, max_steps: int = 1
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optim = OptimConfig(**optim)
        self.network = DRRN(**asdict(ModelConfig(**model)))
        with torch.no_grad():  # `optim.residual_scale` 0 starts at bicubic itself; 1 is the paper's start
            self.network.conv_rec.weight.mul_(self.optim.residual_scale)
        self.cuda_graph = False  # `trainer.cuda_graph`
        self.graphed: Graphed | None = None  # the network as one, from the first batch on
        self.metrics = nn.ModuleDict()
        self.scores: list[dict[str, Any]] = []  # rows of the evaluation that ran last, an image each
        self.rows: list[tuple[int, int, dict[str, Any]]] = []  # this process's, while it runs: (task, image, row)
        self.averaged_before = 0  # batches whose statistics the weights came with (fine-tuning)
        self.validation: list[dict[str, Any]] = []  # rows of all validations, with their step: the learning curve
        self.validated: int | None = None  # step of the last one
        self.losses: list[Tensor] = []  # of the step's micro-batches
        self.about: dict[str, Any] = {}  # what its checkpoints and weights say of it
        self.seconds_before = 0.0  # of training, before this process took it on
        self.since: float | None = None

    def setup(self, stage: str) -> None:
        """Metrics for every set and scale that the data module evaluates on."""
        for index in range(len(self.trainer.datamodule.evaluation_tasks(stage))):
            self.metrics[f"psnr_{index}"], self.metrics[f"ssim_{index}"] = SetPSNR(), SetSSIM()

    @property
    def batch_norms(self) -> list[nn.Module]:
        """Looked up when they are needed: `trainer.sync_batchnorm` puts others in their place."""
        return [m for m in self.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def forward(self, x: Tensor) -> Tensor:
        """Interpolated luminance [N, 1, H, W] in 0…1 → super-resolved, same shape."""
        return self.network(x)

    # ------------------------------------------------------------------ training

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Pairs (x, x̃) [N, 1, p, p] → the loss of Eq. 10 over this process's share of this micro-batch.

        The shares are of equal size, so the mean of their gradients, which DDP and accumulation take, is the
        gradient of Eq. 10 over the whole batch.
        """
        x, truth = batch
        if self.cuda_graph and self.graphed is None:
            self.graphed = Graphed(self.network, x)
        loss = euclidean_loss((self.graphed or self.network)(x), truth)
        self.losses.append(loss.detach())
        return loss

    def whole_batch_loss(self) -> Tensor:
        """Eq. 10 over the whole batch of a step, the same in every process.

        In the same message BatchNorm's running averages become their mean over the processes: each has seen its
        own share of the batch only (unless `trainer.sync_batchnorm`).
        """
        loss = torch.stack(self.losses).mean()
        self.losses.clear()
        if self.trainer.world_size == 1:
            return loss
        parts = [loss, *(average for m in self.batch_norms for average in (m.running_mean, m.running_var))]
        mean = self.trainer.strategy.reduce(torch.cat([part.flatten() for part in parts]), reduce_op="mean")
        for part, shared in zip(parts, mean.split([part.numel() for part in parts]), strict=True):
            part.copy_(shared.view_as(part))
        return loss

    @property
    def seconds(self) -> float:
        """Of training up to these weights, over all processes that it has gone on in."""
        return self.seconds_before + (time.monotonic() - self.since if self.since is not None else 0)

    def on_fit_start(self) -> None:
        """Start the clock; a graph that an exception left behind was of weights elsewhere."""
        self.graphed = None
        self.since = time.monotonic()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Average BatchNorm's statistics as Caffe does.

        Caffe keeps Σ λᵏ · statistic and divides by Σ λᵏ, so its average is right from the first batch; with
        PyTorch's constant momentum 1 − λ = 0.001 thousands of steps still evaluate with the starting values
        0 and 1. The same average in PyTorch's form is the momentum (1 − λ) / (1 − λⁿ) at the n-th batch.
        """
        decay = self.optim.bn_average
        n = self.averaged_before + self.trainer.fit_loop.epoch_loop.total_batch_idx + 1
        for layer in self.batch_norms:
            layer.momentum = (1 - decay) / (1 - decay**n)

    def on_train_start(self) -> None:
        """What the optimiser remembers lies in memory as its weights do.

        A checkpoint keeps the layout that it was trained with (`trainer.channels_last`), and fused kernels go
        through both in the order of their memory.
        """
        self.losses.clear()
        for optimizer in self.trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        state[key] = torch.empty_like(parameter).copy_(value)

    def on_train_end(self) -> None:
        """The test may have the memory that a graph keeps."""
        if self.graphed is not None:
            self.graphed = None
            gc.collect()  # there are cycles in what PyTorch makes of it
            torch.cuda.empty_cache()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume the learning curve and the clock."""
        self.validation = checkpoint.get("validation", [])
        self.validated = checkpoint.get("validated", checkpoint["global_step"])
        self.seconds_before = checkpoint.get("seconds", 0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the weights came from: the learning curve, the time, who they are."""
        checkpoint["validation"], checkpoint["validated"] = self.validation, self.validated
        checkpoint["seconds"] = self.seconds
        checkpoint["drrn"] = self.about

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Adjustable gradient clipping (Sec. 4.2): the bound is θ/γ with the current rate γ.

        `optim.clip=value` clips each gradient to [−θ/γ, θ/γ], the paper's words; `norm` scales the whole
        gradient to a norm of at most θ/γ, what the authors' Caffe does. Lightning calls this on the averaged,
        accumulated and unscaled gradients of every optimiser step, whatever the Trainer's own clip value.

        Raises:
            Diverged: the loss or a gradient is NaN or infinite; the step is not taken.
        """
        gamma = optimizer.param_groups[0]["lr"]
        bound = self.optim.theta / gamma if gamma > 0 else math.inf
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm, loss = get_total_norm(gradients), self.whole_batch_loss()
        # A loss scaler expects infinite gradients now and then, skips the step and lowers its scale.
        if not torch.isfinite(loss if self.loss_is_scaled else loss + norm):
            raise Diverged(
                f"training diverged at step {self.trainer.global_step}: loss {loss.item():.4g}, gradient norm "
                f"{norm.item():.4g}, γ = {gamma:.4g}, clip = {self.optim.clip} with θ = {self.optim.theta:g}. "
                "Try optim.clip=norm, a smaller optim.theta or optim.lr, or model.norm=batch. The step was not "
                "taken; the last good checkpoint is kept."
            )
        touched = torch.zeros_like(norm)
        if self.optim.clip == "value":
            count = sum(g.numel() for g in gradients)
            touched = sum((g.abs() > bound).sum() for g in gradients) / count
            clip_grad_value_(self.network.parameters(), bound)
        elif self.optim.clip == "norm":
            touched = (norm > bound).float()
            clip_grads_with_norm_(self.network.parameters(), bound, norm)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({"train/gamma": gamma, "train/gradient_norm": norm, "train/clipped": touched})

    @property
    def loss_is_scaled(self) -> bool:
        """Whether gradients are those of a multiple of the loss until the optimiser steps (`16-mixed` on a GPU)."""
        return self._trainer is not None and getattr(self._trainer.precision_plugin, "scaler", None) is not None

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD with weight decay on everything, biases of convolutions at `bias_lr_mult` times the rate.

        PyTorch's fused kernels take the whole step at once. With a loss scaler they would also undo the scaling,
        after the clipping, which needs it undone before.
        """
        optim = self.optim
        biases = [m.bias for m in self.network.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
        if optim.bias_lr_mult == 1:
            biases = []
        apart = {id(bias) for bias in biases}
        groups: list[dict[str, Any]] = [{"params": [p for p in self.network.parameters() if id(p) not in apart]}]
        if biases:
            groups.append({"params": biases, "lr": optim.lr * optim.bias_lr_mult})
        fused = not self.loss_is_scaled and self.device.type in ("cpu", "cuda")
        if optim.algorithm == "sgd":
            optimizer = torch.optim.SGD(
                groups, optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=fused
            )
        else:
            betas = (optim.momentum, 0.999)
            optimizer = torch.optim.Adam(groups, optim.lr, betas, weight_decay=optim.weight_decay, fused=fused)
        per_epoch, max_steps = self.hparams["steps_per_epoch"], self.hparams["max_steps"]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(optim, step, per_epoch, max_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------ evaluation (drrn.protocol)

    def _evaluate(self, batch: tuple[Tensor, Tensor, str], batch_idx: int, dataloader_idx: int, stage: str) -> None:
        x, truth, image = batch  # [1, 1, H, W] each
        if not image:
            return
        task = self.trainer.datamodule.evaluation_tasks(stage)[dataloader_idx]
        with torch.autocast(x.device.type, enabled=False):  # in float32 and in strips, as src/evaluate.py scores
            y = super_resolve(self.network, x[0, 0].float().cpu().numpy())
        prediction = torch.from_numpy(y)[None, None].to(x)
        row: dict[str, Any] = {"set": task.set_name, "scale": task.scale, "image": image}
        for name in ("psnr", "ssim"):
            metric = self.metrics[f"{name}_{dataloader_idx}"]
            row[name] = metric(prediction, truth, shave=task.scale).item()  # this image's value
        if stage == "test":
            bicubic = score(x[0, 0].float().cpu().numpy(), truth[0, 0].float().cpu().numpy(), task.scale)
            row |= {f"bicubic_{name}": value for name, value in bicubic.items()}
        self.rows.append((dataloader_idx, batch_idx * self.trainer.world_size + self.trainer.global_rank, row))

    def _begin(self) -> None:
        """A fresh list of rows; float32 without TF32 (`trainer.tf32`), as src/evaluate.py scores."""
        self.rows = []
        forget(self.network)  # a CUDA graph changes weights without PyTorch's notice
        self.tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False

    def _finish(self, stage: str) -> None:
        """Every process gets all rows, in the order of the images, and logs the means of the sets."""
        torch.backends.cudnn.allow_tf32 = self.tf32
        parts = [self.rows]
        if self.trainer.world_size > 1:
            parts = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(parts, self.rows)
        ordered = sorted((row for part in parts for row in part), key=lambda row: row[:2])
        self.scores = [row for _, _, row in ordered]
        for index, task in enumerate(self.trainer.datamodule.evaluation_tasks(stage)):
            for name in ("psnr", "ssim"):
                self.log(f"{stage}/{task}/{name}", self.metrics[f"{name}_{index}"])
        for name in ("psnr", "ssim"):  # over all images, for callbacks to monitor
            values = [row[name] for row in self.scores]
            self.log(f"{stage}/{name}", sum(values) / max(1, len(values)), logger=False)

    def on_validation_epoch_start(self) -> None:
        """Nothing measured yet."""
        self._begin()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """PSNR and SSIM of one image with the protocol."""
        self._evaluate(batch, batch_idx, dataloader_idx, "validate")

    def on_validation_epoch_end(self) -> None:
        """Onto the learning curve, image by image; the one that Lightning adds at `trainer.max_time` is not."""
        self._finish("validate")
        self.validated = step = self.trainer.global_step
        if step * self.trainer.accumulate_grad_batches % self.trainer.val_check_interval == 0:
            self.validation += [{"step": step, **row} for row in self.scores]

    def on_test_epoch_start(self) -> None:
        """Nothing measured yet."""
        self._begin()

    def on_test_epoch_end(self) -> None:
        """All images' rows, and the means."""
        self._finish("test")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """PSNR and SSIM of one image with the protocol."""
        self._evaluate(batch, batch_idx, dataloader_idx, "test")
