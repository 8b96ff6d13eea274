"""Train, evaluate and record one network."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

from drrn.config import Config
from drrn.errors import UserError
from drrn.identity import run_dir, run_name
from drrn.launch import launched

if TYPE_CHECKING:
    from drrn.runs.stop import StopSignals


log = logging.getLogger("drrn.train")


def train(config: Config) -> None:
    """Train, evaluate and record one network.

    Raises:
        UserError: what the user can mend; the record says "failed" and why.
        Stopped: Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP; the record says "stopped", and the same command goes on.
    """
    from drrn.disk import locked
    from drrn.protocol import means
    from drrn.runs.record import FILE, finished_record, read_record, run_record

    folder = run_dir(config)
    earlier = read_record(folder / FILE) if (folder / FILE).is_file() else {}
    finished = finished_record(folder)
    message = f"{run_name(config)} is finished: {finished}. Delete its folder to train it again."
    if finished is not None and not launched():
        print(message)
        return

    import torch
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.utilities import rank_zero_only
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from drrn.datamodule import SuperResolutionData
    from drrn.fast.memory import freed_memory_kept
    from drrn.model import DRRN
    from drrn.module import SuperResolution
    from drrn.runs.checkpoints import Checkpoints, damage, newest_checkpoint
    from drrn.runs.processes import Processes
    from drrn.runs.progress import PlainProgress, TerminalProgress
    from drrn.runs.stop import StopSignals
    from drrn.tracking.loggers import make_logger
    from drrn.tracking.wandb_run import Tracker
    from drrn.weights.ours import initial_state, save_weights

    initial = initial_state(Path(config.init_from), config.model) if config.init_from is not None else None
    quiet_lightning()
    torch.backends.cudnn.allow_tf32 = config.trainer.tf32  # PyTorch's own default is True
    torch.set_float32_matmul_precision("high" if config.trainer.tf32 else "highest")
    if config.trainer.compile and not torch.cuda.is_available() and not which(os.environ.get("CXX", "g++")):
        raise UserError("trainer.compile = True: PyTorch needs a C++ compiler for it; install g++ or name one in CXX")
    if config.trainer.cuda_graph and not torch.cuda.is_available():
        raise UserError("trainer.cuda_graph = True: needs a GPU, and PyTorch sees none here")
    processes = Processes(config, trainer_arguments(config))
    if processes.to_be_started:
        processes.start(train, config, folder / FILE)
        return
    processes.join()
    earlier, message = processes.agree(lambda: (earlier, message if finished else None))
    if message is not None:
        print(message)
        return
    with torch.device("meta"):  # for its counts, before there is any data
        record = run_record(config, DRRN(**asdict(config.model)))
    for key in ("budget", "scores", "means", "validation"):  # of a stopped run: kept until there are new ones
        if key in earlier and config.ckpt_path is not None:
            record[key] = earlier[key]
    record["processes"] = processes.number
    agents = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    before = earlier.get("wandb_id") if config.ckpt_path else None  # afresh: a new one
    record["wandb_id"] = agents or before or uuid.uuid4().hex[:8]
    if config.from_record is not None and processes.first:
        warn_of_differences(Path(config.from_record), record)
    if processes.first:
        folder.mkdir(parents=True, exist_ok=True)
    with (
        processes.together(),
        locked(folder / ".lock", f"{record['name']} is being trained") if processes.first else nullcontext(),
        log_to(folder / "train.log"),
        StopSignals() as stop,
        recorded(folder / FILE, record, stop),
    ):
        if processes.first:
            for left in [*folder.glob(".*.partial"), *folder.glob("checkpoints/.*.partial")]:
                left.unlink()  # half written when a process was killed
        # 1. images → patches
        seed_everything(config.seed, workers=True, verbose=False)
        data = SuperResolutionData(config)
        processes.one_by_node(data.prepare_data)
        record["patches"] = data.patches.path.name  # its digest is that of the recipe and the source images
        if config.ckpt_path == "last" and earlier.get("patches", record["patches"]) != record["patches"]:
            raise UserError(
                f"{folder} was begun with the patches {earlier['patches']} and would go on with "
                f"{record['patches']}: its source images have changed, or this version makes patches otherwise. "
                "Put back what was, or start afresh with ckpt_path=null."
            )

        # 2. patches → module
        module = SuperResolution(asdict(config.model), asdict(config.optim), data.steps_per_epoch, data.max_steps)
        module.about = {
            "scales": config.data.scales,
            "origin": run_name(config),
            "seed": config.seed,
            "experiment": record["experiment"],
        }
        if initial is not None:
            module.network.load_state_dict(initial)
            module.averaged_before = 1_000_000  # BatchNorm goes on from the statistics that came with the weights
        module.network.checkpointing = config.checkpointing
        if config.trainer.channels_last:
            module.network.to(memory_format=torch.channels_last)
        if config.trainer.compile:
            module.network.compile_units()
        module.cuda_graph = config.trainer.cuda_graph
        if config.ckpt_path is None and processes.first:
            set_aside(folder / "checkpoints")
        resume = processes.agree(lambda: newest_checkpoint(folder / "checkpoints") or config.ckpt_path)
        resume = None if resume == "last" else resume  # this run has no checkpoint yet
        if resume == config.ckpt_path and resume is not None and (reason := damage(Path(resume))) is not None:
            raise UserError(f"ckpt_path = {resume!r} cannot be gone on from: {reason}")
        structure = record["structure"]
        if resume is not None:
            log.info("going on from %s", resume)
        log.info(
            "%s: depth %d, %s convolution weights; %d steps of %d pairs, %d steps an epoch; writing to %s",
            structure["name"], structure["depth"], f"{structure['conv_weights']:,}", data.max_steps,
            config.data.batch_size, data.steps_per_epoch, folder,
        )  # fmt: skip

        # 3. module → weights
        every = config.trainer.log_every_n_steps
        logger = make_logger(config, folder, record, module) if processes.first else False
        try:
            trainer = Trainer(
                **processes.arguments,
                max_steps=data.max_steps,
                logger=logger,
                default_root_dir=folder,
                callbacks=[
                    Checkpoints(folder / "checkpoints", config.trainer.checkpoint_every, stop),
                    TerminalProgress() if sys.stderr.isatty() else PlainProgress(every),
                ],
                enable_progress_bar=sys.stderr.isatty(),
            )
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise UserError(f"trainer.*: Lightning's Trainer does not take this: {error}") from error
        try:
            with freed_memory_kept(not config.checkpointing):
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
        missing = trainer.global_step % config.trainer.val_check_interval == 0
        missing = missing and module.validated != trainer.global_step  # the last validation was interrupted
        if missing:
            trainer.validate(module, datamodule=data, verbose=False)
            record["validation"] = module.validation
        final = folder / "checkpoints" / f"step{trainer.global_step:08d}.ckpt"
        if missing or not processes.agree(final.is_file):
            trainer.save_checkpoint(final)
        facts = {**module.about, "steps": trainer.global_step}
        rank_zero_only(save_weights)(folder / "weights.safetensors", module.network, config.model, facts)

        # 4. weights → scores
        trainer.test(module, datamodule=data, verbose=False)
        record["scores"], record["means"] = module.scores, means(module.scores)
        record["validation"] = module.validation
        if trainer.global_step >= data.max_steps:
            record["status"] = "finished"
        else:
            record["status"], record["ended_by"] = "stopped", "timer"
        for row in record["means"]:
            log.info(
                "%s ×%d: PSNR %.2f dB (bicubic %.2f), SSIM %.4f (bicubic %.4f), %d images",
                row["set"], row["scale"], row["psnr"], row["bicubic_psnr"], row["ssim"], row["bicubic_ssim"],
                row["images"],
            )  # fmt: skip
        if isinstance(logger, Tracker):
            logger.results()
        log.info("%s: %s", record["status"], folder / FILE)


def set_aside(checkpoints: Path) -> None:
    """Starting afresh (ckpt_path=null): rename what an earlier attempt left, which `last` must not find."""
    number = 1
    while checkpoints.with_name(f"checkpoints.{number}").exists():
        number += 1
    if checkpoints.is_dir():
        checkpoints.rename(checkpoints.with_name(f"checkpoints.{number}"))


def trainer_arguments(config: Config) -> dict[str, object]:
    """`trainer.*` as Lightning's Trainer takes it.

    Raises:
        UserError: an argument that Lightning does not have, or that is settled here.
    """
    import inspect

    from lightning.pytorch import Trainer

    from drrn.runs.checkpoints import WholeCheckpoints

    ours = ("max_steps", "max_epochs", "checkpoint_every", "channels_last", "tf32", "compile", "cuda_graph")
    extra = config.trainer_extra or {}
    unknown = set(extra) - set(inspect.signature(Trainer).parameters)
    if unknown:
        raise UserError(f"trainer.{unknown.pop()}: neither ours nor an argument of Lightning's Trainer")
    settled = {"logger": "logger.kind", "gradient_clip_val": "optim.clip", "gradient_clip_algorithm": "optim.clip"}
    settled |= dict.fromkeys(("limit_train_batches", "overfit_batches"), "trainer.max_steps")  # a run is one epoch
    settled |= dict.fromkeys(("check_val_every_n_epoch", "num_sanity_val_steps"), "trainer.val_check_interval")
    there = ("use_distributed_sampler", "reload_dataloaders_every_n_epochs")  # batches would be shared out twice
    for key in ("callbacks", "default_root_dir", "enable_progress_bar", "plugins", *there, *settled):
        if key in extra:
            raise UserError(f"trainer.{key} is settled by src/train.py; see {settled.get(key, 'there')}")
    arguments = {key: value for key, value in asdict(config.trainer).items() if key not in ours}
    return {
        **arguments,
        "max_epochs": -1,  # max_steps ends a run; an epoch that a checkpoint ends would end the next run too
        "check_val_every_n_epoch": None,  # so validation counts batches
        "val_check_interval": config.trainer.val_check_interval * config.trainer.accumulate_grad_batches,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the data module shares batches and images out itself
        "enable_model_summary": False,
        "plugins": [WholeCheckpoints()],
        **extra,
    }


def quiet_lightning() -> None:
    """Drop Lightning's tips and notices; warnings that a user can act on stay, said by the first process."""
    from lightning.pytorch.utilities import rank_zero_only

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR if rank_zero_only.rank else logging.WARNING)
    if rank_zero_only.rank:
        warnings.simplefilter("ignore")
        return
    for text in (
        ".*LeafSpec.*deprecated",
        ".*does not have many workers",
        ".*`weights_only` was not set",
        ".*your dataloader is not resumable",  # ShuffledBatches starts at the step
        "Checkpoint directory .* exists and is not empty",  # it is this run's own
    ):
        warnings.filterwarnings("ignore", text)


def warn_of_differences(path: Path, record: dict) -> None:
    """Say where the present code and machine are not those of the record that is trained again."""
    from drrn.runs.record import read_record

    old = read_record(path)
    then = {"commit": (old.get("git") or {}).get("commit"), **old.get("versions", {})}
    now = {"commit": (record["git"] or {}).get("commit"), **record["versions"]}
    differing = [f"{key} {then[key]} is now {now.get(key)}" for key in then if then[key] != now.get(key)]
    if (old.get("git") or {}).get("changed") or (record["git"] or {}).get("changed"):
        differing.append("not all of the code was, or is, in the commit")
    if differing:
        print(f"{path}: the result may differ: {'; '.join(differing)}", file=sys.stderr)


@contextmanager
def recorded(path: Path, record: dict, stop: StopSignals) -> Iterator[None]:
    """Keep a run's record: "running" while it runs, so that a killed run leaves its configuration and W&B run;
    then what became of it. Ends the W&B run, so that the next job of a multirun starts its own."""
    from lightning.pytorch.utilities import rank_zero_only

    from drrn.disk import write_json
    from drrn.runs.processes import failure, note_failure
    from drrn.runs.stop import Stopped
    from drrn.tracking.loggers import finish

    write = rank_zero_only(write_json)
    write(path, record)
    try:
        yield
    except BaseException as error:
        elsewhere = failure(path) if rank_zero_only.rank == 0 and not isinstance(error, UserError) else None
        if elsewhere is not None:  # another process failed, and this one lost it or was ended
            record |= {"status": "failed", "ended_by": "error", "error": elsewhere}
            log.error("%s failed: %s", record["name"], elsewhere)
            raise
        if stop.asked is not None or isinstance(error, Stopped):  # a worker may have been ended before we were
            stopped = error if isinstance(error, Stopped) else Stopped(stop.asked)
            record |= {"status": "stopped", "ended_by": f"signal {stopped}", "error": f"{stopped}: a signal ended it"}
            step = record.get("budget", {}).get("steps", 0)
            command = shlex.join(word for word in sys.argv if word != "ckpt_path=null")  # that starts afresh
            log.warning(
                "stopped by %s at step %d; the same command goes on from there: python %s", stopped, step, command
            )
            raise stopped from None
        if isinstance(error, KeyboardInterrupt):
            record |= {"status": "stopped", "ended_by": "signal SIGINT", "error": "KeyboardInterrupt"}
            raise
        by = "user error" if isinstance(error, UserError) else "error"
        record |= {"status": "failed", "ended_by": by, "error": f"{type(error).__name__}: {error}"}
        if rank_zero_only.rank > 0:
            note_failure(path, f"{record['error']} (in process {rank_zero_only.rank})", by)
        if not isinstance(error, UserError | SystemExit):
            log.exception("%s failed", record["name"])  # into the run's log too
        raise
    finally:
        write(path, record)
        if finish(record):
            write(path, record)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Log to the console and to a run's file for as long as the run lasts; of several processes the first one,
    and the others' errors to the console."""
    from lightning.pytorch.utilities import rank_zero_only

    form = logging.Formatter("%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    root, handlers = logging.getLogger("drrn"), [logging.StreamHandler(sys.stderr)]
    if rank_zero_only.rank == 0:
        handlers.append(logging.FileHandler(path))
    root.setLevel(logging.INFO if rank_zero_only.rank == 0 else logging.ERROR)
    for handler in handlers:
        handler.setFormatter(form)
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
