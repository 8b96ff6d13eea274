"""Train, evaluate and record one network: open the run → prepare data → build module → fit → score."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only

from drrn.config import Config
from drrn.datamodule import SuperResolutionData
from drrn.disk import write_whole
from drrn.errors import UserError, counted
from drrn.fast.memory import freed_memory_kept
from drrn.fast.threads import Watch
from drrn.fast.training import memory_errors
from drrn.identity import WEIGHTS, checkpoint_name, run_name
from drrn.module import SuperResolution
from drrn.protocol import means
from drrn.runs.callbacks import refuse_unknown_monitors
from drrn.runs.checkpoints import Checkpoints, check_resumable, newest_checkpoint
from drrn.runs.lightning import PlainProgress, TerminalProgress, ended_early, lightnings_refusals, quiet_lightning
from drrn.runs.opening import Run, open_run
from drrn.runs.processes import broadcast
from drrn.runs.record import FILE
from drrn.weights.ours import save_weights

log = logging.getLogger("drrn.train")


def train(config: Config, watch: Watch, start: Callable[[Config], None]) -> None:
    """Train, evaluate and record one network; arguments of `open_run`, errors of `runs.start.start`."""
    with quiet_lightning(), open_run(config, watch, start) as run:
        if run is None:  # it was finished before, or child processes have trained it
            return
        data = prepare_data(run)
        module = build_module(run, data)
        trainer = fit(run, data, module)
        score(run, data, module, trainer)


def prepare_data(run: Run) -> SuperResolutionData:
    """Download images and build patches where missing; a UserError if the run began with other patches."""
    config, record, earlier = run.config, run.record, run.earlier
    seed_everything(config.seed, workers=True, verbose=False)
    data = SuperResolutionData(config)
    run.processes.one_by_node(lambda: run.stop.wait(data.prepare_data))
    record["patches"] = data.pairs.path.name  # its digest is that of the recipe and the source images
    if config.ckpt_path == "last" and earlier.get("patches", record["patches"]) != record["patches"]:
        raise UserError(
            f"{run.folder} was begun with the patches {earlier['patches']} and would be resumed with "
            f"{record['patches']}: its source images have changed, or this version makes patches differently. "
            "Restore the images or the version, or start afresh with ckpt_path=null."
        )
    return data


def build_module(run: Run, data: SuperResolutionData) -> SuperResolution:
    """The Lightning module of the run, with initial weights."""
    config = run.config
    module = SuperResolution(config.model, asdict(config.optim), data.steps_per_epoch, data.max_steps)
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
    module.validated_in = config.speed.validation
    if config.trainer.channels_last:
        module.network.to(memory_format=torch.channels_last)
    return module


def fit(run: Run, data: SuperResolutionData, module: SuperResolution) -> Trainer:
    """Train up to the run's last step, from the newest checkpoint on; then load the last checkpoint into `module`."""
    config, record = run.config, run.record
    resume = _resume_from(run, data)
    network = record["structure"]
    log.info(
        "%s: depth %d, %s; %s of %s, %s an epoch; writing to %s",
        network["name"], network["depth"], counted(network["conv_weights"], "convolution weight"),
        counted(data.max_steps, "step"), counted(config.data.batch_size, "pair"),
        counted(data.steps_per_epoch, "step"), run.folder,
    )  # fmt: skip
    for what, key in (("loss in the log", "log_every_n_steps"), ("validation", "val_check_interval")):
        if data.max_steps < (every := getattr(config.trainer, key)):
            log.info("no %s: the run has %s, and trainer.%s = %d", what, counted(data.max_steps, "step"), key, every)
    refuse_unknown_monitors(config.callbacks, run.callbacks, data)
    with lightnings_refusals():
        trainer = _trainer(run, data, module)
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


def _resume_from(run: Run, data: SuperResolutionData) -> Path | str | None:
    """The checkpoint to resume from: the run's own newest, or the one that `ckpt_path` names."""
    asked = run.config.ckpt_path

    def choose() -> Path | str | None:
        own = newest_checkpoint(run.checkpoints)
        if own is None and asked not in (None, "last"):
            check_resumable(Path(asked), run.config, data.max_steps)
            return asked
        return own

    resume = broadcast(choose)
    if resume is not None:
        log.info("resuming from %s", resume)
    return resume


def _trainer(run: Run, data: SuperResolutionData, module: SuperResolution) -> Trainer:
    config, terminal = run.config, sys.stderr.isatty()
    return Trainer(
        **run.processes.arguments,
        max_steps=data.max_steps,
        logger=run.tracking.start(module),
        default_root_dir=run.folder,
        callbacks=[
            *run.tracking.callbacks(),
            *run.callbacks,
            TerminalProgress() if terminal else PlainProgress(),
            Checkpoints(run.checkpoints, config.trainer.checkpoint_every, run.stop),
        ],
        enable_progress_bar=terminal,
    )


def _take_last(run: Run, data: SuperResolutionData, module: SuperResolution, trainer: Trainer) -> None:
    """Load the last checkpoint's weights into the module; if a callback averages weights, they are the average.

    If the last validation was interrupted, it is run now and added to the checkpoint.
    """
    step, last = trainer.global_step, run.checkpoints / checkpoint_name(trainer.global_step)
    if not broadcast(last.is_file):
        trainer.save_checkpoint(last)
    content = trainer.strategy.checkpoint_io.load_checkpoint(last, map_location="cpu", weights_only=True)
    module.load_state_dict(content["state_dict"])
    if step % run.config.trainer.val_check_interval == 0 and module.validated != step:
        trainer.validate(module, datamodule=data, verbose=False)
        run.record["validation"] = content["validation"] = module.validation
        content["validated"] = step
        if run.processes.first:
            write_whole(last, lambda partial: torch.save(content, partial))


def score(run: Run, data: SuperResolutionData, module: SuperResolution, trainer: Trainer) -> None:
    """Save the weights, score them on every set and scale, and set the record's status."""
    record = run.record
    facts = {**module.about, "steps": trainer.global_step}
    rank_zero_only(save_weights)(run.folder / WEIGHTS, module.network, run.config.model, facts)
    trainer.test(module, datamodule=data, verbose=False)
    record["scores"], record["means"] = module.scores, means(module.scores)
    record["validation"] = module.validation
    record["ended_by"] = ended_early(trainer, data.max_steps)
    record["status"] = "stopped" if record["ended_by"] == "timer" else "finished"
    for row in record["means"]:
        log.info(
            "%s ×%d: PSNR %.2f dB (bicubic %.2f), SSIM %.4f (bicubic %.4f), %s",
            row["set"], row["scale"], row["psnr"], row["bicubic_psnr"], row["ssim"], row["bicubic_ssim"],
            counted(row["images"], "image"),
        )  # fmt: skip
    run.tracking.results(module)
    log.info("%s: %s", record["status"], run.folder / FILE)
