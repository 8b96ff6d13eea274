"""Writing, reading and selecting the checkpoints of a run."""

from __future__ import annotations

import errno
import logging
import math
import signal
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from drrn.config import Config
from drrn.disk import check_regular
from drrn.errors import UserError
from drrn.identity import WEIGHTS, checkpoint_name
from drrn.runs.lightning import WholeSteps
from drrn.runs.record import FILE
from drrn.runs.stop import StopSignals
from drrn.tracking.rows import ROWS
from drrn.weights.files import LIMIT
from drrn.weights.pickles import read_torch

log = logging.getLogger(__name__)

SLOW = 5.0  # seconds; after a slower step every step is saved: clusters kill 30 s after their warning
NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "hyper_parameters")


class Damaged(Exception):
    """A run cannot be resumed from a file; the text says why."""


class Checkpoints(WholeSteps):
    """Keep the newest two checkpoints of a run, `step00001000.ckpt`: nothing is selected by a benchmark's score.

    A checkpoint is written every `every` steps, before and after a validation, after every slow step, when a
    signal stops the run, and at the end. It is written as the next step starts, when its own step has been logged
    and validated; a checkpoint from before a validation records that the validation is still due. An older file
    is deleted only after the newer one has been flushed to the disk.
    """

    def __init__(self, folder: Path, every: int, stop: StopSignals | None = None) -> None:
        self.folder, self.every, self.stop = folder, every, stop or StopSignals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the checkpoint that the run resumed from, so that it is not written again."""
        super().on_train_start(trainer, pl_module)
        self.stop.take()
        self.kept = (trainer.global_step, pl_module.validated)
        self.seconds = math.inf  # of the last step; the first may be slow, and before it there is nothing new to save
        self.group = torch.distributed.new_group(backend="gloo") if trainer.world_size > 1 else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two steps: save a checkpoint of the last step if it is due, and stop if a signal has come."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        asked, slow = self.stop.asked is not None, self.seconds > SLOW
        if trainer.world_size > 1:  # all ranks must decide alike
            any_of_all = torch.tensor([asked, slow], dtype=torch.int32)  # on the CPU: no step waits for a GPU
            torch.distributed.all_reduce(any_of_all, group=self.group)
            asked, slow = (any_of_all > 0).tolist()
        step = trainer.global_step
        if asked or slow or step % self.every == 0 or pl_module.validated == step:
            self.keep(trainer, pl_module)
        if asked:
            self.stop.asked = self.stop.asked or signal.SIGTERM  # another rank has received one
            self.stop.check()
        self.stop.busy = not slow
        self.started = time.monotonic()

    def on_before_backward(self, *_: Any) -> None:
        """Stop within a slow step, without waiting for its end: the step before it has been saved."""
        if not self.stop.busy:
            self.stop.check()

    on_before_optimizer_step = on_before_backward

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the time of a whole step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.seconds = time.monotonic() - self.started

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the step before a validation, so that a stop need not wait for the end of a long validation."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.keep(trainer, pl_module)
        self._evaluating()

    def _evaluating(self, *_: Any) -> None:
        self.stop.take()
        self.stop.busy = False
        self.stop.check()

    # Safe points between two images; a test has nothing to save.
    on_test_start = on_test_batch_start = on_test_batch_end = _evaluating
    on_validation_batch_start = on_validation_batch_end = _evaluating

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step before `on_train_end`, in which callbacks that average weights load the average."""
        self.keep(trainer, pl_module)
        self.stop.busy = False
        self.stop.check()

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint of this step if it has changed, then delete all but the newest two."""
        state = (trainer.global_step, pl_module.validated)
        if state == self.kept:
            return
        trainer.save_checkpoint(self.folder / checkpoint_name(trainer.global_step))
        self.kept = state
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step*.ckpt"))[:-2]:
                old.unlink()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint, after checks of its checksums, size and keys.

    The zip's checksums are verified: after a power failure a file may have its full length but not its content. Our
    own pickle parser reads it before torch.load: it calls nothing and refuses pickles that would take for ever.

    Raises:
        Damaged: a run cannot be resumed from it.
        UserError: reading failed for another reason (permissions, memory): the file may be sound.
    """
    check_regular(path, LIMIT)
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(entry.file_size for entry in file.infolist())
            if size > LIMIT:
                raise Damaged(f"it unpacks to {size:,} bytes")
            broken = file.testzip()
        if broken is not None:
            raise Damaged(f"{broken} in it is damaged")
        read_torch(path.read_bytes())
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = [key for key in NEEDED if key not in content]
    except Damaged:
        raise
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        # A torn directory of the zip points to invalid offsets: an OSError without errno, or with EINVAL.
        elsewhere = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if elsewhere or isinstance(error, MemoryError):
            raise UserError(f"{path} could not be read: {error!r}. Nothing was changed; try again") from error
        raise Damaged(f"{type(error).__name__}: {error}".split("\n")[0]) from error
    if missing:
        raise Damaged(f"it has no {', '.join(missing)}: it is not a checkpoint of a training")
    return content


def newest_checkpoint(folder: Path) -> Path | None:
    """The readable checkpoint of the highest step; None if there is none.

    A damaged one (power failure, full disk) is renamed to `.damaged` and skipped with a warning; errors other than
    damage are `read_checkpoint`'s.
    """
    kept = sorted(folder.glob("step*.ckpt"), reverse=True)
    for path in kept:
        try:
            read_checkpoint(path)
            return path
        except Damaged as reason:
            log.warning("%s cannot be read (%s): using the one before it", path, reason)
            path.rename(path.with_suffix(".damaged"))
    if kept:
        log.warning("no checkpoint in %s can be read: starting at step 0", folder)
    return None


def check_resumable(path: Path, config: Config, max_steps: float) -> None:
    """Refuse a checkpoint that is damaged, of another network or solver, or of a step after the run's last one."""
    try:
        content = read_checkpoint(path)
    except Damaged as reason:
        raise UserError(
            f"ckpt_path = {str(path)!r} cannot be resumed from: {reason}; init_from takes weights"
        ) from reason
    for group, asked in (("model", config.model), ("optim", asdict(config.optim))):
        held = content["hyper_parameters"].get(group, {})
        differing = [f"{group}.{key}={held.get(key)}" for key in asked if held.get(key, asked[key]) != asked[key]]
        if differing:
            raise UserError(
                f"ckpt_path: the checkpoint was trained with {', '.join(differing)}, and resuming keeps that. "
                "Give the same, or start a new training from its weights with init_from"
            )
    if content["global_step"] > max_steps:
        raise UserError(
            f"ckpt_path = {str(path)!r} is of step {content['global_step']}, beyond trainer.max_steps = {max_steps}: "
            "give more steps, or an earlier checkpoint"
        )


def set_aside(folder: Path) -> None:
    """Rename an earlier attempt's files (ckpt_path=null), so that `last` and reports do not find them."""
    number = 1
    while any(folder.glob(f"*.{number}*")):
        number += 1
    for old in ("checkpoints", FILE, WEIGHTS, ROWS):
        path = folder / old
        if path.exists():
            path.rename(folder / f"{path.stem}.{number}{path.suffix}")
