"""Every place where Lightning's behaviour is changed, and why.

A run of ours is one epoch of batches to Lightning, counts optimiser steps, can be stopped and resumed at each of
them, and writes its own checkpoints. Where Lightning's defaults differ, this file alone changes them.
"""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, RichProgressBar, Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from drrn.config import Config
from drrn.disk import write_whole
from drrn.errors import UserError
from drrn.runs.processes import broadcast
from drrn.targets import resolve

log = logging.getLogger(__name__)

# Arguments of the Trainer that a run sets itself → the key to use instead.
SETTLED = {
    "logger": "logger",
    "callbacks": "+callbacks.NAME={_target_: …}",
    "gradient_clip_val": "optim.clip",
    "gradient_clip_algorithm": "optim.clip",
    "limit_train_batches": "trainer.max_steps",  # a run is one epoch
    "overfit_batches": "trainer.max_steps",
    "check_val_every_n_epoch": "trainer.val_check_interval",
    "num_sanity_val_steps": "trainer.val_check_interval",
    "default_root_dir": "output",
    "enable_progress_bar": "trainer.log_every_n_steps",
    "plugins": "trainer.precision",
    "use_distributed_sampler": "data",  # batches would be divided between the ranks twice
    "reload_dataloaders_every_n_epochs": "data",
}
# Keys of `trainer.*` that are not arguments of Lightning's Trainer.
OUR_KEYS = ("max_steps", "max_epochs", "checkpoint_every", "channels_last", "tf32")
QUIET = (  # warnings that nobody can act on
    ".*LeafSpec.*deprecated",
    ".*does not have many workers",
    ".*`weights_only` was not set",
    ".*your dataloader is not resumable",  # ShuffledBatches starts at the step
    ".*setting `persistent_workers=True`",  # a run starts its workers once
    ".*smaller than the logging interval",  # `fit` logs it in one line
    ".*sync_dist=True",  # every rank has the rows of all
    "Checkpoint directory .* exists and is not empty",  # it is this run's own
)


def trainer_arguments(config: Config) -> dict[str, Any]:
    """`trainer.*` as arguments of Lightning's Trainer; one that is unknown or in `SETTLED` is a UserError."""
    extra = config.trainer_extra or {}
    known = inspect.signature(Trainer).parameters
    for name in extra:
        if name in SETTLED:
            raise UserError(f"trainer.{name} is set by src/train.py itself; see {SETTLED[name]}")
        if name not in known:
            raise UserError(f"trainer.{name}: neither ours nor an argument of Lightning's Trainer")
    kinds = [resolve(f"callbacks.{name}", node, Callback)[0] for name, node in config.callbacks.items()]
    return {
        **{name: value for name, value in asdict(config.trainer).items() if name not in OUR_KEYS},
        "max_epochs": -1,  # max_steps ends a run; a finished epoch in a checkpoint would end the resumed run too
        "check_val_every_n_epoch": None,  # then val_check_interval counts batches over the whole run
        "val_check_interval": config.trainer.val_check_interval * config.trainer.accumulate_grad_batches,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the data module divides batches and images between the ranks itself
        "enable_model_summary": False,
        "plugins": [WholeCheckpoints(keep_timer=any(issubclass(kind, Timer) for kind in kinds))],
        **extra,
    }


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips and notices; warnings that a user can act on stay, on rank 0."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR if rank_zero_only.rank else logging.WARNING)
    for text in QUIET if rank_zero_only.rank == 0 else ("",):  # "" matches every warning
        warnings.filterwarnings("ignore", text)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class TerminalProgress(RichProgressBar):
    """Lightning's bar, which would call the run "Epoch 0/-2": to Lightning a run is one epoch without an end."""

    shown: dict[str, Any] | None = None

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metrics logged last: Lightning would read them at every step, and wait for the GPU each time."""
        if self.shown is None or trainer.global_step % trainer.log_every_n_steps == 0:
            self.shown = super().get_metrics(trainer, pl_module)
        return self.shown


class PlainProgress(Callback):
    """A line every `trainer.log_every_n_steps` optimiser steps, for logs and terminals that cannot redraw."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started, self.first = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log step, loss, γ, the share of gradients clipped, speed and the remaining time."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if step % every or (batch_idx + 1) % trainer.accumulate_grad_batches or not trainer.is_global_zero:
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
        """Log the sets' means."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        shown = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("validate/") and k.count("/") == 2}
        log.info("step %d  %s", trainer.global_step, "  ".join(f"{k[9:]} {v:.4f}" for k, v in shown.items()))


class AverageOnDevice(EMAWeightAveraging):
    """Lightning's average of the weights, kept on the device of the weights.

    Lightning makes it before the weights move to the GPU and leaves it on the CPU: each step would copy all weights
    there. And PyTorch's `AveragedModel` tests in each step whether it is the first one. Both wait for the GPU.
    """

    state_key = EMAWeightAveraging.__qualname__  # in checkpoints

    def __init__(self, decay: float = 0.999, **others: Any) -> None:
        super().__init__(decay=decay, **others)
        self.decay = decay

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the average to the device. Integer counters are copied, and without `use_buffers` all buffers."""
        average = self._average_model.to(pl_module.device).module
        both = (chain(module.parameters(), module.buffers()) for module in (average, pl_module))
        self.averaged, self.copied = [], []
        for pair in zip(*both, strict=True):
            slow = pair[0].is_floating_point() and (self._use_buffers or isinstance(pair[0], torch.nn.Parameter))
            (self.averaged if slow else self.copied).append(pair)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Update the average if `should_update` allows it; the first update copies the weights."""
        step, before = trainer.global_step, self._latest_update_step
        if step > before and self.should_update(step_idx=step - 1):
            torch._foreach_lerp_(*zip(*self.averaged, strict=True), 1 - self.decay if before else 1.0)
            if self.copied:
                torch._foreach_copy_(*zip(*self.copied, strict=True))
            self._average_model.n_averaged += 1
            self._latest_update_step = step


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint I/O; a file is written completely and flushed to the disk, or not at all.

    Args:
        keep_timer: restore the state of a Timer among the callbacks, which counts over all starts. The Timer that
            Lightning makes of `trainer.max_time` begins anew with each start.
    """

    def __init__(self, keep_timer: bool = False) -> None:
        self.keep_timer = keep_timer

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; a callback's state that `weights_only=True` could not load is a UserError."""
        for name, state in checkpoint.get("callbacks", {}).items():
            if (kind := _not_plain(state)) is not None:
                raise UserError(
                    f"callbacks: {name} keeps a {kind} in its state; a checkpoint may have numbers, strings, "
                    "tensors, lists and dicts only, so that reading it runs no code"
                )
        write_whole(Path(path), lambda partial: torch.save(checkpoint, partial))

    def load_checkpoint(self, path: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """Read on rank 0 and broadcast: the other machines may not have the file."""
        read = super().load_checkpoint
        content = broadcast(lambda: read(path, *arguments, **keywords))
        if not self.keep_timer:
            content.get("callbacks", {}).pop("Timer", None)
        return content


def _not_plain(value: Any) -> str | None:
    if isinstance(value, dict | list | tuple):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return next(filter(None, map(_not_plain, items)), None)
    plain = value is None or type(value) in (bool, int, float, str, torch.Tensor, torch.nn.Parameter)
    return None if plain else type(value).__name__


class WholeSteps(Checkpoint):
    """Stop and resume a run only between two whole optimiser steps.

    A subclass of `Checkpoint`, because Lightning calls those after all other callbacks. Make one for each fit.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the optimisers' states the memory layout of their weights, and reset the stop.

        The states in a checkpoint have the layout of the run that wrote it (`trainer.channels_last`), and fused
        kernels read weight and state in the order of their memory.
        """
        self.stopping = False
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                        state[key] = torch.empty_like(parameter).copy_(value)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Delay a stop (`trainer.max_time`) to the end of the optimiser step: half a step cannot be resumed."""
        self.stopping = self.stopping or trainer.should_stop
        trainer.should_stop = self.stopping and (batch_idx + 1) % trainer.accumulate_grad_batches == 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set Lightning's loop counters to the state between `global_step` and the next step.

        They follow from the step alone, since a run is one epoch to Lightning; the checkpoint's own counters depend
        on the hook that wrote it. If a validation was due and is missing, the counters say that it was interrupted
        in its first batch, so that Lightning runs it.
        """
        step = checkpoint["global_step"]
        if not step:
            return
        batches = step * trainer.accumulate_grad_batches
        interval = trainer.val_check_interval
        due = trainer.enable_validation and isinstance(interval, int) and batches % interval == 0
        missing = due and pl_module.validated != step

        def count(ready: int, processed: int, completed: int) -> dict[str, int]:
            return {"ready": ready, "started": ready, "processed": processed, "completed": completed}

        done, epoch = count(batches, batches, batches - (not missing)), count(1, 0, 0)
        checkpoint["loops"]["fit_loop"] |= {
            "epoch_progress": {"total": epoch, "current": dict(epoch)},
            "epoch_loop.state_dict": {"_batches_that_stepped": step - 1},  # the loggers' step; it starts at 0
            "epoch_loop.batch_progress": {"total": done, "current": dict(done), "is_last_batch": False},
            "epoch_loop.val_loop.batch_progress": {
                "total": count(int(missing), 0, 0),
                "current": count(0, 0, 0),
                "is_last_batch": False,
            },
        }


@contextmanager
def lightnings_refusals() -> Iterator[None]:
    """Turn Lightning's MisconfigurationException (an argument or a callback that does not fit) into a UserError."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"trainer.* or callbacks.*: Lightning refuses this: {error}") from error


def ended_early(trainer: Trainer, max_steps: int) -> str | None:
    """The cause of a fit's end before `max_steps`: "timer" (resumable) or "callback" (finished); else None."""
    if trainer.global_step >= max_steps:
        return None
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    late = any(timer.time_remaining() is not None and timer.time_remaining() <= 0 for timer in timers)
    return "timer" if late else "callback"
