"""Train, evaluate and record one network: open the run → prepare data → build module → fit → score."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

from drrn.config import Config
from drrn.disk import check_output, locked
from drrn.errors import UserError
from drrn.identity import run_dir, run_name
from drrn.launch import launched
from drrn.runs.record import FILE, done_before, own_record

if TYPE_CHECKING:  # torch and Lightning are imported when there is something to train
    from lightning.pytorch import Callback, Trainer

    from drrn.datamodule import SuperResolutionData
    from drrn.module import SuperResolution
    from drrn.runs.processes import Processes
    from drrn.runs.stop import StopSignals
    from drrn.tracking.loggers import Tracking

log = logging.getLogger("drrn.train")


def train(config: Config) -> None:
    """Train, evaluate and record one network.

    Raises:
        UserError: what the user can mend; the record says "failed" and why.
        Stopped: Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP; the record says "stopped", and the same command resumes.
    """
    with open_run(config) as run:
        if run is None:  # it is finished, or processes of its own have trained it
            return
        data = prepare_data(run)
        module = build_module(run, data)
        trainer = fit(run, data, module)
        score(run, data, module, trainer)


@dataclass
class Run:
    """What the steps of a training share."""

    config: Config
    folder: Path
    record: dict[str, Any]  # written when the run ends, however it ends
    earlier: dict[str, Any]  # the record that an earlier start left; {}: none
    processes: Processes
    stop: StopSignals
    callbacks: list[Callback]  # somebody's own
    tracking: Tracking
    initial: dict[str, Any] | None  # the weights that a fine-tuning starts from

    @property
    def checkpoints(self) -> Path:
        """Their folder."""
        return self.folder / "checkpoints"


# ---------------------------------------------------------------------- 1. open the run


@contextmanager
def open_run(config: Config) -> Iterator[Run | None]:
    """A run's folder, lock, log, record and signals for as long as it lasts; None if there is nothing to do here.

    Raises:
        UserError: something that can be known before the work: a place that cannot be written, arguments that
            Lightning does not take, another process that trains this run.
    """
    folder = run_dir(config)
    earlier, finished = own_record(folder), done_before(config)
    message = (
        f"{run_name(config)} is finished: {finished}. Delete its folder or give ckpt_path=null to train it again."
    )
    if finished is not None and not launched():
        print(message)
        yield None
        return
    check_output("output", folder, folder=True)

    from drrn.runs.callbacks import make_callbacks
    from drrn.runs.journal import log_to, recorded, warn_of_differences
    from drrn.runs.lightning import quiet_lightning, trainer_arguments
    from drrn.runs.processes import Processes
    from drrn.runs.stop import StopSignals
    from drrn.tracking.loggers import Tracking

    quiet_lightning()
    initial = _initial(config)
    _prepare_torch(config)
    processes = Processes(config, trainer_arguments(config))
    callbacks = make_callbacks(config, folder)
    if processes.to_be_started:
        processes.start(train, config, folder / FILE)
        yield None
        return
    processes.join()
    earlier, message = processes.broadcast(lambda: (earlier, message if finished else None))
    if message is not None:
        print(message)
        yield None
        return
    record = _new_record(config, earlier, processes)
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
        if processes.first:
            for left in [*folder.glob(".*.partial"), *folder.glob("checkpoints/.*.partial")]:
                left.unlink()  # half written when a process was killed
            if config.ckpt_path is None:
                from drrn.runs.checkpoints import set_aside

                set_aside(folder)
        with recorded(folder / FILE, record, stop, tracking):
            yield Run(config, folder, record, earlier, processes, stop, callbacks, tracking, initial)


def _initial(config: Config) -> dict[str, Any] | None:
    from drrn.weights.ours import initial_state

    return initial_state(Path(config.init_from), config.model) if config.init_from is not None else None


def _prepare_torch(config: Config) -> None:
    import torch

    torch.backends.cudnn.allow_tf32 = config.trainer.tf32  # PyTorch's own default is True
    torch.set_float32_matmul_precision("high" if config.trainer.tf32 else "highest")
    if config.speed.compile is True and not torch.cuda.is_available() and not which(os.environ.get("CXX", "g++")):
        raise UserError("speed.compile = True: PyTorch needs a C++ compiler for it; install g++ or name one in CXX")


def _new_record(config: Config, earlier: dict[str, Any], processes: Processes) -> dict[str, Any]:
    from drrn.networks import on_paper
    from drrn.runs.record import run_record

    record = run_record(config, on_paper(config.model))  # for its counts, before there is any data
    for key in ("budget", "scores", "means", "validation", "tracking"):  # of a stopped run, until there are new ones
        if key in earlier and config.ckpt_path is not None:
            record[key] = earlier[key]
    record["processes"] = processes.number
    agents = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    before = earlier.get("wandb_id") if config.ckpt_path else None  # afresh: a new one
    record["wandb_id"] = agents or before or uuid.uuid4().hex[:8]
    return record


# ---------------------------------------------------------------------- 2. prepare data


def prepare_data(run: Run) -> SuperResolutionData:
    """Images → patches, fetched and built where they are missing.

    Raises:
        UserError: images that cannot be used, or that are not those that the run was begun with.
    """
    from lightning.pytorch import seed_everything

    from drrn.datamodule import SuperResolutionData

    config, record, earlier = run.config, run.record, run.earlier
    seed_everything(config.seed, workers=True, verbose=False)
    data = SuperResolutionData(config)
    run.processes.one_by_node(lambda: run.stop.wait(data.prepare_data))
    record["patches"] = data.patches.path.name  # its digest is that of the recipe and the source images
    if config.ckpt_path == "last" and earlier.get("patches", record["patches"]) != record["patches"]:
        raise UserError(
            f"{run.folder} was begun with the patches {earlier['patches']} and would be resumed with "
            f"{record['patches']}: its source images have changed, or this version makes patches otherwise. "
            "Put back what was, or start afresh with ckpt_path=null."
        )
    return data


# ---------------------------------------------------------------------- 3. build module


def build_module(run: Run, data: SuperResolutionData) -> SuperResolution:
    """The network and its training, with initial weights."""
    import torch

    from drrn.module import SuperResolution
    from drrn.networks import structure

    config = run.config
    module = SuperResolution(structure(config.model), asdict(config.optim), data.steps_per_epoch, data.max_steps)
    module.about = {
        "scales": config.data.scales,
        "origin": run_name(config),
        "seed": config.seed,
        "experiment": run.record["experiment"],
    }
    if run.initial is not None:
        module.network.load_state_dict(run.initial)
        module.averaged_before = 1_000_000  # BatchNorm starts from the statistics that came with the weights
    module.compiled, module.checkpointing = config.speed.compile, config.speed.checkpointing
    if config.trainer.channels_last:
        module.network.to(memory_format=torch.channels_last)
    return module


# ---------------------------------------------------------------------- 4. fit


def fit(run: Run, data: SuperResolutionData, module: SuperResolution) -> Trainer:
    """Optimiser steps up to the end of the run, from where an earlier start left it.

    Returns:
        The Trainer; `module` has the weights of the last checkpoint.
    """
    from drrn.fast.memory import freed_memory_kept
    from drrn.fast.training import memory_errors

    config, record = run.config, run.record
    resume = _resume_from(run, data, module)
    structure = record["structure"]
    log.info(
        "%s: depth %d, %s convolution weights; %d steps of %d pairs, %d steps an epoch; writing to %s",
        structure["name"], structure["depth"], f"{structure['conv_weights']:,}", data.max_steps,
        config.data.batch_size, data.steps_per_epoch, run.folder,
    )  # fmt: skip
    if data.max_steps < config.trainer.val_check_interval:
        log.info(
            "no validation: the run has %d steps, and trainer.val_check_interval = %d",
            data.max_steps, config.trainer.val_check_interval,
        )  # fmt: skip
    trainer = _trainer(run, data, module)
    with _lightnings_refusals():
        try:
            with freed_memory_kept(not config.speed.checkpointing), memory_errors():
                trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        finally:
            if trainer.global_step:
                record["budget"] = {
                    "steps": trainer.global_step,
                    "patches": trainer.global_step * config.data.batch_size,
                    "epochs": trainer.global_step / data.steps_per_epoch,
                    "seconds": round(module.seconds, 1),
                }
                record["validation"] = module.validation
    _take_last(run, data, module, trainer)
    return trainer


def _resume_from(run: Run, data: SuperResolutionData, module: SuperResolution) -> Path | str | None:
    """The checkpoint to resume from: the run's own newest, or the one that `ckpt_path` names."""
    from drrn.runs.checkpoints import check_resumable, newest_checkpoint

    asked = run.config.ckpt_path

    def choose() -> Path | str | None:
        own = newest_checkpoint(run.checkpoints)
        if own is None and asked not in (None, "last"):
            check_resumable(Path(asked), module.hparams, data.max_steps)
            return asked
        return own

    resume = run.processes.broadcast(choose)
    if resume is not None:
        log.info("resuming from %s", resume)
    return resume


def _trainer(run: Run, data: SuperResolutionData, module: SuperResolution) -> Trainer:
    from lightning.pytorch import Trainer

    from drrn.runs.checkpoints import Checkpoints
    from drrn.runs.lightning import TerminalProgress
    from drrn.runs.progress import PlainProgress

    config = run.config
    with _lightnings_refusals():
        return Trainer(
            **run.processes.arguments,
            max_steps=data.max_steps,
            logger=run.tracking.start(module),
            default_root_dir=run.folder,
            callbacks=[
                *run.callbacks,
                TerminalProgress() if sys.stderr.isatty() else PlainProgress(config.trainer.log_every_n_steps),
                Checkpoints(run.checkpoints, config.trainer.checkpoint_every, run.stop),
            ],
            enable_progress_bar=sys.stderr.isatty(),
        )


@contextmanager
def _lightnings_refusals() -> Iterator[None]:
    """What Lightning refuses by its own kind of error is the user's: an argument, or a callback that does not fit."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"trainer.* or callbacks.*: Lightning does not take this: {error}") from error


def _take_last(run: Run, data: SuperResolutionData, module: SuperResolution, trainer: Trainer) -> None:
    """Put the weights of the last checkpoint into the module: of a callback that averages them, the average.

    A last validation that was interrupted is made up for, and the checkpoint learns of it.
    """
    import torch

    from drrn.disk import write_whole
    from drrn.runs.checkpoints import name

    step, last = trainer.global_step, run.checkpoints / name(trainer.global_step)
    if not run.processes.broadcast(last.is_file):
        trainer.save_checkpoint(last)
    content = trainer.strategy.checkpoint_io.load_checkpoint(last, map_location="cpu", weights_only=True)
    module.load_state_dict(content["state_dict"])
    if step % run.config.trainer.val_check_interval == 0 and module.validated != step:
        trainer.validate(module, datamodule=data, verbose=False)
        run.record["validation"] = content["validation"] = module.validation
        content["validated"] = step
        if run.processes.first:
            write_whole(last, lambda partial: torch.save(content, partial))


# ---------------------------------------------------------------------- 5. score


def score(run: Run, data: SuperResolutionData, module: SuperResolution, trainer: Trainer) -> None:
    """The weights, their scores on every set and scale, and what became of the run."""
    from lightning.pytorch.utilities import rank_zero_only

    from drrn.protocol import means
    from drrn.runs.lightning import ended_early
    from drrn.weights.ours import save_weights

    record = run.record
    facts = {**module.about, "steps": trainer.global_step}
    rank_zero_only(save_weights)(run.folder / "weights.safetensors", module.network, run.config.model, facts)
    trainer.test(module, datamodule=data, verbose=False)
    record["scores"], record["means"] = module.scores, means(module.scores)
    record["validation"] = module.validation
    record["ended_by"] = ended_early(trainer, data.max_steps)
    record["status"] = "stopped" if record["ended_by"] == "timer" else "finished"
    for row in record["means"]:
        log.info(
            "%s ×%d: PSNR %.2f dB (bicubic %.2f), SSIM %.4f (bicubic %.4f), %d images",
            row["set"], row["scale"], row["psnr"], row["bicubic_psnr"], row["ssim"], row["bicubic_ssim"],
            row["images"],
        )  # fmt: skip
    run.tracking.results(module)
    log.info("%s: %s", record["status"], run.folder / FILE)
