"""Train one network, or a grid of them.

    python src/train.py model.B=1 model.U=9
    python src/train.py -m model.B=1,3 model.U=9,25

Each run has its own folder, named by what it is, with its log, its checkpoints, its weights
(`weights.safetensors`) and its record (`record.json`).
"""

from __future__ import annotations

import logging
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from drrn import Refusal
from drrn.config import CONF, Config, check, launch, run_dir, run_name

log = logging.getLogger("drrn.train")


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def main(cfg: DictConfig) -> None:
    """Check the configuration before anything heavy is imported, then train."""
    train(check(cfg, HydraConfig.get().overrides.task))


def train(config: Config) -> None:
    """Train, evaluate and record one network.

    Raises:
        Refusal: what the user can mend; the record says "failed" and why.
    """
    from drrn.records import FILE, means, read_record, run_record

    folder = run_dir(config)
    earlier = read_record(folder / FILE) if (folder / FILE).is_file() else {}
    # Fig. 8's DRRN_B3U4 is Fig. 6's and Table 4's too: the same run in another study's folder is not trained twice.
    others = sorted(folder.parents[1].glob(f"*/{folder.name}/{FILE}"))
    for path, record in [(folder / FILE, earlier), *((path, read_record(path)) for path in others)]:
        if record.get("status") == "finished":
            print(f"{run_name(config)} is finished: {path}. Delete its folder to train it again.")
            return

    import torch
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from drrn.callbacks import PlainProgress, TerminalProgress, checkpoints, newest_checkpoint
    from drrn.datamodule import SuperResolutionData
    from drrn.model import DRRN
    from drrn.module import SuperResolution, freed_memory_kept
    from drrn.tracking import Tracker, make_logger
    from drrn.weights import initial_state, save_weights

    initial = initial_state(Path(config.init_from), config.model) if config.init_from is not None else None
    arguments = trainer_arguments(config)
    quiet_lightning()
    with torch.device("meta"):  # for its counts, before there is any data
        record = run_record(config, DRRN(**asdict(config.model)))
    for key in ("budget", "scores", "means", "validation"):  # of a stopped run: kept until there are new ones
        if key in earlier and config.ckpt_path is not None:
            record[key] = earlier[key]
    record["wandb_id"] = (config.ckpt_path and earlier.get("wandb_id")) or uuid.uuid4().hex[:8]  # afresh: a new one
    folder.mkdir(parents=True, exist_ok=True)
    with log_to(folder / "train.log"), recorded(folder / FILE, record):
        # 1. images → patches
        seed_everything(config.seed, workers=True, verbose=False)
        data = SuperResolutionData(config)
        data.prepare_data()
        record["patches"] = data.patches.path.name  # its digest is that of the recipe and the source images
        if config.ckpt_path == "last" and earlier.get("patches", record["patches"]) != record["patches"]:
            raise Refusal(
                f"{folder} was begun with the patches {earlier['patches']} and would go on with "
                f"{record['patches']}: its source images have changed. Put them back, or start afresh with "
                "ckpt_path=null."
            )

        # 2. patches → module
        module = SuperResolution(asdict(config.model), asdict(config.optim), data.steps_per_epoch, data.max_steps)
        if initial is not None:
            module.network.load_state_dict(initial)
            module.averaged_before = 1_000_000  # BatchNorm goes on from the statistics that came with the weights
        module.network.checkpointing = config.checkpointing
        if config.trainer.channels_last:
            module.network.to(memory_format=torch.channels_last)
        if config.ckpt_path is None:
            set_aside(folder / "checkpoints")
        resume = newest_checkpoint(folder / "checkpoints") or config.ckpt_path
        resume = None if resume == "last" else resume  # this run has no checkpoint yet
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
        logger = make_logger(config, folder, record, module)
        try:
            trainer = Trainer(
                **arguments,
                max_steps=data.max_steps,
                logger=logger,
                default_root_dir=folder,
                callbacks=[
                    checkpoints(folder / "checkpoints", config.trainer.checkpoint_every),
                    TerminalProgress() if sys.stderr.isatty() else PlainProgress(every),
                ],
                enable_progress_bar=sys.stderr.isatty(),
            )
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise Refusal(f"trainer.*: Lightning's Trainer does not take this: {error}") from error
        spent, start = earlier.get("budget", {}).get("seconds", 0) if resume else 0, time.monotonic()
        with freed_memory_kept(not config.checkpointing):
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        record["budget"] = {
            "steps": trainer.global_step,
            "patches": trainer.global_step * config.data.batch_size,
            "epochs": trainer.global_step / data.steps_per_epoch,
            "seconds": round(spent + time.monotonic() - start, 1),
        }
        final = folder / "checkpoints" / f"step{trainer.global_step:08d}.ckpt"
        if not final.is_file():
            trainer.save_checkpoint(final)
        save_weights(
            folder / "weights.safetensors",
            module.network,
            config.model,
            {
                "scales": config.data.scales,
                "origin": run_name(config),
                "seed": config.seed,
                "experiment": record["experiment"],
                "steps": trainer.global_step,
            },
        )

        # 4. weights → scores
        trainer.test(module, datamodule=data, verbose=False)
        record["scores"], record["means"] = module.scores, means(module.scores)
        record["validation"] = module.validation
        record["status"] = "finished" if trainer.global_step >= data.max_steps else "stopped"
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
        Refusal: an argument that Lightning does not have, or that is settled here.
    """
    import inspect

    from lightning.pytorch import Trainer

    ours = ("max_steps", "max_epochs", "checkpoint_every", "channels_last")
    extra = config.trainer_extra or {}
    unknown = set(extra) - set(inspect.signature(Trainer).parameters)
    if unknown:
        raise Refusal(f"trainer.{unknown.pop()}: neither ours nor an argument of Lightning's Trainer")
    settled = {"logger": "logger.kind", "gradient_clip_val": "optim.clip", "gradient_clip_algorithm": "optim.clip"}
    for key in ("callbacks", "default_root_dir", "enable_progress_bar", *settled):
        if key in extra:
            raise Refusal(f"trainer.{key} is settled by src/train.py; see {settled.get(key, 'there')}")
    arguments = {key: value for key, value in asdict(config.trainer).items() if key not in ours}
    return {
        **arguments,
        "max_epochs": -1,  # max_steps ends a run; an epoch that a checkpoint ends would end the next run too
        "check_val_every_n_epoch": None,  # so validation counts batches
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the data module shares batches and images out itself
        "enable_model_summary": False,
        **extra,
    }


def quiet_lightning() -> None:
    """Drop Lightning's tips and notices; warnings that a user can act on stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        ".*LeafSpec.*deprecated",
        ".*does not have many workers",
        ".*`weights_only` was not set",
        ".*your dataloader is not resumable",  # ShuffledBatches starts at the step
        "Checkpoint directory .* exists and is not empty",  # it is this run's own
    ):
        warnings.filterwarnings("ignore", text)


@contextmanager
def recorded(path: Path, record: dict) -> Iterator[None]:
    """Keep a run's record: "running" while it runs, so that a killed run leaves its configuration and W&B run;
    then what became of it. Ends the W&B run, so that the next job of a multirun starts its own."""
    from lightning.pytorch.utilities import rank_zero_only

    from drrn.records import write_json
    from drrn.tracking import finish

    write = rank_zero_only(write_json)
    write(path, record)
    try:
        yield
    except BaseException as error:
        record["status"], record["error"] = "failed", f"{type(error).__name__}: {error}"
        if not isinstance(error, Refusal | SystemExit):
            log.exception("%s failed", record["name"])  # into the run's log too
        raise
    finally:
        write(path, record)
        if finish(record):
            write(path, record)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Log to the console and to a run's file for as long as the run lasts."""
    form = logging.Formatter("%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    root, handlers = logging.getLogger("drrn"), [logging.StreamHandler(sys.stderr), logging.FileHandler(path)]
    root.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(form)
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


if __name__ == "__main__":
    launch(main)
