"""How checkpoints of a run are kept, written and read."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from drrn.disk import write_whole
from drrn.errors import UserError
from drrn.runs.stop import Stopped, StopSignals

log = logging.getLogger(__name__)

SLOW = 5.0  # seconds of a step from which on every step is kept: clusters kill 30 s after they ask
NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "hyper_parameters")


class Checkpoints(Checkpoint):
    """Keep the newest two checkpoints of a run, `step00001000.ckpt`: nothing is selected by a benchmark's score.

    One is written every `every` steps, before and after a validation, after every step that took long, when a
    signal asks the run to stop, and at the end. It is written when its step is over with all that belongs to
    it (logged, validated), that is as the next one starts; one from before a validation knows that the
    validation is still to come. An older file is deleted only once the newer one is safe on the disk.

    Args:
        folder: of the checkpoints.
        every: steps.
        stop: the signals that end the run.
    """

    def __init__(self, folder: Path, every: int, stop: StopSignals | None = None) -> None:
        self.folder, self.every, self.stop = folder, every, stop or StopSignals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What has been resumed from is kept already."""
        self.stop.take()
        self.kept = (trainer.global_step, pl_module.validated)
        self.seconds = math.inf  # of the last step: the first may be slow, and nothing is new before it

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing to keep in a test."""
        self.stop.take()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two steps: keep the one that is over if it is due, and stop if that was asked."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        asked, slow = self.stop.asked is not None, self.seconds > SLOW
        if trainer.world_size > 1:  # all processes do the same
            mine = torch.tensor([asked, slow], dtype=torch.float32, device=pl_module.device)
            asked, slow = (trainer.strategy.reduce(mine, reduce_op="sum") > 0).tolist()
        step = trainer.global_step
        if asked or slow or step % self.every == 0 or pl_module.validated == step:
            self.keep(trainer, pl_module)
        if asked:
            raise Stopped(self.stop.asked or signal.SIGTERM)
        self.stop.busy = not slow
        self.started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The time of a whole step."""
        self.seconds = time.monotonic() - self.started

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation can be long: keep the step before it, so that a stop need not wait for its end."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.keep(trainer, pl_module)
        else:
            self.stop.take()
        self._now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step."""
        self.keep(trainer, pl_module)
        self._now()

    def _now(self) -> None:
        self.stop.busy = False
        if self.stop.asked is not None:
            raise Stopped(self.stop.asked)

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint of this step if it has changed, then delete all but the newest two."""
        state = (trainer.global_step, pl_module.validated)
        if state == self.kept:
            return
        trainer.save_checkpoint(self.folder / f"step{trainer.global_step:08d}.ckpt")
        self.kept = state
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step*.ckpt"))[:-2]:
                old.unlink()


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning writes its checkpoints with this, whole and flushed to the disk or not at all, and reads them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` under `path`.

        Raises:
            UserError: it cannot be written.
        """
        write_whole(Path(path), lambda partial: torch.save(checkpoint, partial))

    def load_checkpoint(self, path: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """Of several processes the first one reads, and sends it to the others: their machines may not have it."""
        if not torch.distributed.is_initialized():
            return super().load_checkpoint(path, *arguments, **keywords)
        content = [super().load_checkpoint(path, *arguments, **keywords) if rank_zero_only.rank == 0 else None]
        torch.distributed.broadcast_object_list(content)
        return content[0]


def damage(path: Path) -> str | None:
    """Why a run cannot go on from a checkpoint file; None if it can.

    The zip's own checksums are compared: after a power failure a file may have its length and not its content.

    Raises:
        UserError: it could not be looked at, which says nothing of what it holds.
    """
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken is not None:
            return f"{broken} in it is damaged"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = [key for key in NEEDED if key not in content]
    except (OSError, MemoryError) as error:
        # Places that a torn directory of the zip points to are an EINVAL.
        if isinstance(error, OSError) and error.errno in (None, errno.EINVAL):
            return f"{type(error).__name__}: {error}"
        raise UserError(f"{path} could not be read: {error!r}. Nothing was changed; try again") from error
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return f"it holds no {', '.join(missing)}: no checkpoint of a training" if missing else None


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step that a run can go on from; None if there is none.

    A newer one that is damaged (power failed, the disk filled) is named in a warning, renamed and passed over.

    Raises:
        UserError: one could not be looked at.
    """
    kept = sorted(folder.glob("step*.ckpt"), reverse=True)
    for path in kept:
        reason = damage(path)
        if reason is None:
            return path
        log.warning("%s cannot be read (%s): using the one before it", path, reason)
        with contextlib.suppress(FileNotFoundError):  # another process of this run has done so
            path.rename(path.with_suffix(".damaged"))
    if kept:
        log.warning("no checkpoint in %s can be read: beginning again at step 0", folder)
    return None
