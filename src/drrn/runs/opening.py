"""Opening a run: its folder, lock, log, record, signals and threads."""

from __future__ import annotations

import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import torch
from lightning.pytorch import Callback

from drrn.config import Config
from drrn.disk import locked
from drrn.errors import UserError, counted
from drrn.fast.threads import Watch
from drrn.identity import run_dir
from drrn.launch import launched
from drrn.losses import loss_of
from drrn.networks import on_paper
from drrn.optimisers import configured
from drrn.runs.callbacks import make_callbacks
from drrn.runs.checkpoints import check_resumable, set_aside
from drrn.runs.journal import log_to, recorded, warn_of_differences
from drrn.runs.lightning import trainer_arguments
from drrn.runs.processes import Processes, broadcast
from drrn.runs.record import FILE, done_before, finished_message, own_record, run_record
from drrn.runs.stop import StopSignals
from drrn.tracking.loggers import Tracking
from drrn.weights.ours import initial_state
from drrn.weights.shipped import weights_file

log = logging.getLogger("drrn.train")


@dataclass
class Run:
    """State shared by the steps of a training."""

    config: Config
    folder: Path
    record: dict[str, Any]  # written to record.json when the run ends, however it ends
    earlier: dict[str, Any]  # the record of an earlier start; {} if there is none
    processes: Processes
    stop: StopSignals
    callbacks: list[Callback]  # the user's, `config.callbacks`
    tracking: Tracking
    initial: dict[str, Any] | None  # state dict of `init_from`

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"


@contextmanager
def open_run(config: Config, watch: Watch, start: Callable[[Config], None]) -> Iterator[Run | None]:
    """Open a run: folder, lock, log, record and signals. Yields None if there is nothing to do in this process.

    If the run needs several processes, they are started here and each calls `start(config)`. Arguments that Lightning
    refuses and a run that another process is training are UserErrors, before any work. `watch` measures the
    machine's load since the command's start.
    """
    folder, initial = run_dir(config), None
    earlier, finished = own_record(folder), done_before(config)
    if config.init_from is not None:
        initial = initial_state(weights_file(config.init_from, key="init_from"), config.model)
    said = _prepare_torch(config, watch, earlier)
    processes = Processes(config, trainer_arguments(config))
    callbacks = make_callbacks(config, folder)
    network = on_paper(config.model)
    _try_on_paper(config, network)
    if processes.to_be_started:
        processes.start(start, config, folder / FILE)
        yield None
        return
    processes.join()
    earlier, finished = broadcast(lambda: (earlier, finished))
    if finished is not None:
        print(finished_message(config, finished))
        yield None
        return
    record = _new_record(config, network, earlier, processes)
    tracking = Tracking(config, folder, record, processes.first)
    if config.from_record is not None and processes.first:
        warn_of_differences(Path(config.from_record), record)
    if processes.first:
        folder.mkdir(parents=True, exist_ok=True)
    with (
        processes.together(),
        locked(folder / ".lock", f"{record['name']} is being trained") if processes.first else nullcontext(),
        StopSignals() as stop,
        log_to(folder / "train.log"),
    ):
        if said is not None:
            log.info(said)
        if processes.first:
            for left in [*folder.glob(".*.partial"), *folder.glob("checkpoints/.*.partial")]:
                left.unlink()  # a killed process was writing it
            if config.ckpt_path is None:
                set_aside(folder)
        with recorded(folder / FILE, record, stop, tracking):
            yield Run(config, folder, record, earlier, processes, stop, callbacks, tracking, initial)


def _try_on_paper(config: Config, network: Any) -> None:
    """Refuse a loss, solver, schedule or checkpoint that does not fit, before patches or a folder are made."""
    loss_of(network, config.optim.loss)
    configured(network, config.optim, steps_per_epoch=1, max_steps=1, fused=False)
    if config.ckpt_path not in (None, "last") and not any(run_dir(config).glob("checkpoints/step*.ckpt")):
        steps = config.trainer.max_steps if config.trainer.max_epochs is None else math.inf  # not known yet
        check_resumable(Path(config.ckpt_path), config, steps)


def _prepare_torch(config: Config, watch: Watch, earlier: dict[str, Any]) -> str | None:
    """Set TF32 and the number of threads; return a log line on these, None if processes share the machine."""
    torch.backends.cudnn.allow_tf32 = config.trainer.tf32  # PyTorch's own default is True
    torch.set_float32_matmul_precision("high" if config.trainer.tf32 else "highest")
    if config.speed.compile is True and not torch.cuda.is_available() and not which(os.environ.get("CXX", "g++")):
        raise UserError("speed.compile = True: PyTorch needs a C++ compiler for it; install g++ or name one in CXX")
    if launched() or config.trainer.devices not in (1, "1", "auto") or config.trainer.num_nodes > 1:
        return None
    before = (earlier.get("machine") or {}).get("threads") if config.ckpt_path is not None else None
    number, why = watch.choose(config.threads, before)
    torch.set_num_threads(number)
    return f"{counted(number, 'thread')}: {why}"


def _new_record(config: Config, network: Any, earlier: dict[str, Any], processes: Processes) -> dict[str, Any]:
    record = run_record(config, network)
    for key in ("budget", "scores", "means", "validation", "tracking"):  # a resumed run's, until there are new ones
        if key in earlier and config.ckpt_path is not None:
            record[key] = earlier[key]
    record["processes"] = processes.number
    agents = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    before = earlier.get("wandb_id") if config.ckpt_path else None  # a run that starts afresh gets a new id
    record["wandb_id"] = agents or before or uuid.uuid4().hex[:8]
    return record
