"""The schema of the training configuration.

Hydra composes `conf/` and the command line; `check` turns the result into the dataclasses below. It refuses an
unknown key, a wrong type and a value out of range by the key's name, before anything heavy is imported. Each field
has a key's type, limits and meaning; rules between keys are their group's `rules`. Defaults are in `conf/`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from drrn.degradations import BI, DEGRADATIONS, READY, check_scales
from drrn.errors import UserError, printable
from drrn.losses import LOSSES
from drrn.optimisers import OPTIMISERS, SCHEDULES
from drrn.paper import depth
from drrn.schema import key, plain, typed
from drrn.sets import is_set, known_sets
from drrn.targets import check_node

DEFAULT = "drrn"  # the network if `model.network` is not given
DEEPEST = 10_000  # layers; the paper's deepest network has 52


@dataclass
class ModelConfig:
    """Arguments of `drrn.model.DRRN`, for their check; a structure is a plain dict everywhere (`in_full`)."""

    B: int = key("recursive blocks", at_least=1)
    U: int = key("residual units of a block; 0 is VDSR", at_least=0)
    features: int = key("filters of every convolution but the last", at_least=1, below=2**13)
    norm: str = key("normalisation before each ReLU", choices=("batch", "none"))
    bias: bool = key("biases on the convolutions, as in the release")
    weight_sharing: bool = key("false: DRRN_NS")
    multi_path: bool = key("false: DRRN_C, a unit's identity is its own input")
    rectified_identity: bool = key("ReLU on every identity, for the weights of two ports", default=False)
    input_relu: bool = key("ReLU before the first convolution; false: a port's VDSR", default=True)

    def rules(self) -> None:
        """Check the depth."""
        if (layers := depth(self.B, self.U)) > DEEPEST:
            raise UserError(f"model.B = {self.B} and model.U = {self.U} give {layers:,} layers: at most {DEEPEST:,}")


def in_full(model: Mapping[str, Any]) -> dict[str, Any]:
    """A structure as `Config.model` and records have it: the arguments, and `network` if it is no DRRN.

    A DRRN's arguments are checked, and get the defaults of those that an earlier file lacks; a wrong one is a
    UserError. Another network's are checked where torch is imported (`networks.complete`).
    """
    arguments = {key: value for key, value in model.items() if (key, value) != ("network", DEFAULT)}
    if not isinstance(arguments.get("network", DEFAULT), str):
        raise UserError(f"model.network = {arguments['network']}: must be a name")
    if "${" in str(arguments):  # OmegaConf would evaluate it, ${oc.env:…} too
        raise UserError("model: a file's values may not contain ${…}")
    if "network" in arguments:
        return arguments
    drrn = typed(ModelConfig, OmegaConf.create(arguments), "model.")
    drrn.rules()
    return asdict(drrn)


@dataclass
class DataConfig:
    """Training patches and evaluation sets."""

    name: str = key("first part of the patch file's name")
    train: list[str] = key("image sets, paths of folders, or parts: BSD200@1-180")
    val: list[str] = key("validation sets, folders or parts")
    root: str = key("folder of the sets; missing ones are downloaded to it")
    patches: str = key("folder of the patch files")
    scales: list[int] = key("of training and of the final test, one network for all", at_least=2, distinct=True)
    val_scales: list[int] = key("of the validations", at_least=2, distinct=True)
    patch_size: int = key("side of a patch, pixels", at_least=3)
    stride: int = key("pixels from patch to patch", at_least=1)
    augment: str = key("the 8 orientations are stored, or made on the device", choices=("offline", "online"))
    degradation: str = key("makes the low resolution", default=BI, choices=tuple(DEGRADATIONS))
    crops: int = key("random crops of each image an epoch; 0: stored patches", default=0, at_least=0)
    batch_size: int = key("pairs of an optimiser step, over all devices and micro-batches", at_least=1)
    num_workers: int = key("worker processes that read patches", at_least=0, below=2**10)
    test: list[str] | None = key("test sets at the end of a run, folders or parts; null: those of val", default=None)
    test_metrics: list[str] | None = key("of the test, beside psnr and ssim: [ifc]", default=None, distinct=True)

    def share(self, micro: int, processes: int = 1) -> int:
        """Pairs of one process's micro-batch; a UserError if the batch cannot be divided evenly."""
        if self.batch_size % (micro * processes):
            shares = f"{micro} micro-batches × {processes} processes"
            raise UserError(
                f"data.batch_size = {self.batch_size} is the whole batch of a step: it must be a multiple "
                f"of {shares} (trainer.accumulate_grad_batches = {micro})"
            )
        return self.batch_size // (micro * processes)

    @property
    def test_sets(self) -> list[str]:
        """Test sets at the end of a run."""
        return self.test or self.val

    def rules(self) -> None:
        """Check that sets and metrics exist, and that crops, augmentation and degradation are compatible."""
        for name in ("train", "val", "test"):
            if getattr(self, name) is not None:
                check_sets(f"data.{name}", getattr(self, name))
        if self.test_metrics is not None:
            from drrn.metrics import check_names

            check_names("data.test_metrics", self.test_metrics)
        if self.crops and self.augment == "offline":
            raise UserError("data.crops and data.augment = 'offline': crops are augmented on the device; give online")
        if self.crops and self.degradation == READY:
            raise UserError("data.crops and data.degradation = 'ready': crops are degraded here; give data.crops=0")
        check_scales("data.scales", [*self.scales, *self.val_scales], self.degradation)
        if os.sep in self.name:
            raise UserError(f"data.name = {self.name!r}: the first part of a file's name, without {os.sep}")


@dataclass
class OptimConfig:
    """Sec. 4.2 and its alternatives."""

    algorithm: str = key("solver", choices=tuple(OPTIMISERS))
    lr: float = key("initial learning rate γ", above=0)
    momentum: float = key("of SGD; β₁ of Adam", at_least=0, below=1)
    weight_decay: float = key("of all parameters, as in the release", at_least=0)
    bias_lr_mult: float = key("learning rate of convolution biases, relative to lr", at_least=0)
    theta: float = key("θ of the gradient clipping (the paper: 0.01; a translation: 1)", above=0)
    clip: str = key("clips each gradient (paper) or their total norm (release)", choices=("value", "norm", "none"))
    schedule: str = key("of γ; step: a tenth instead of a half; cosine: to 0 over the run", choices=tuple(SCHEDULES))
    halve_every_epochs: float | None = key("epochs of the data; or halve_every_steps", above=0)
    halve_every_steps: int | None = key("optimiser steps", above=0)
    residual_scale: float = key("factor on the last convolution's initial weights; 0: bicubic", at_least=0)
    bn_average: float = key("decay of BatchNorm's running averages a batch; Caffe's: 0.999", at_least=0, below=1)
    loss: Any = key(f"{', '.join(LOSSES)}, {{_target_: another, …}}; null: the network's own", default=None)
    last_lr_mult: float = key("learning rate of the last convolution, relative to lr", default=1.0, at_least=0)
    warmup_steps: int = key("steps of a linear warm-up of γ", default=0, at_least=0)
    optimiser: Any = key("{_target_: another solver, …} instead of algorithm", default=None)
    scheduler: Any = key("{_target_: another schedule, …} instead of schedule", default=None)

    def rules(self) -> None:
        """Check names and `_target_` nodes, that there is one schedule, and keys of a single solver."""
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise UserError(f"optim.loss = {self.loss!r}: allowed are {', '.join(LOSSES)}")
        loss = None if isinstance(self.loss, str) else self.loss
        for name, node in (("loss", loss), ("optimiser", self.optimiser), ("scheduler", self.scheduler)):
            if node is not None:
                check_node(f"optim.{name}", node)
        every = self.schedule != "cosine" and self.scheduler is None
        if every and (self.halve_every_epochs is None) == (self.halve_every_steps is None):
            raise UserError(
                "optim.halve_every_epochs and optim.halve_every_steps: give one of the two and set the other to null "
                f"(now {self.halve_every_epochs} and {self.halve_every_steps})"
            )
        if self.scheduler is not None and self.warmup_steps:
            raise UserError(
                f"optim.warmup_steps = {self.warmup_steps} and optim.scheduler: only optim.schedule has a warm-up"
            )
        if self.algorithm != "sgd" and self.bias_lr_mult != 1:
            raise UserError(f"optim.bias_lr_mult = {self.bias_lr_mult}: only optim.algorithm=sgd has it; set it to 1")


@dataclass
class TrainerConfig:
    """Lightning's Trainer; the keys listed here are checked by us, others (`+trainer.x=…`) by Lightning."""

    accelerator: str = key("kind of device", choices=("auto", "cpu", "gpu", "cuda", "mps", "tpu"))
    devices: Any = key("number of devices, a list of indices, -1 for all, or auto")
    num_nodes: int = key("machines", at_least=1)
    # src/train.py starts the processes itself: no spawn, fork or notebook. No sharded strategy either: clipping by
    # the norm would see only a shard of the gradient.
    strategy: str = key(
        "of several processes",
        choices=("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"),
    )
    precision: str = key("of training", choices=("32-true", "bf16-mixed", "16-mixed"))
    max_steps: int = key("optimiser steps of the run; B1U9 was published after 464,056", at_least=1)
    max_epochs: float | None = key("epochs of the data instead of max_steps; may be a fraction", above=0)
    max_time: str | None = key("DD:HH:MM:SS from each start to a resumable stop")
    accumulate_grad_batches: int = key("micro-batches of a step", at_least=1)
    val_check_interval: int = key("steps between validations", at_least=1)
    checkpoint_every: int = key("steps between checkpoints; the newest two are kept", at_least=1)
    log_every_n_steps: int = key("steps between rows of the log", at_least=1)
    deterministic: bool = key("bit-identical results in each run")
    sync_batchnorm: bool = key("BatchNorm over the batches of all GPUs")
    channels_last: bool = key("memory layout; faster on CPUs and on tensor cores")
    tf32: bool = key("TF32 for float32 operations in training, on GPUs that have it", default=False)

    def rules(self) -> None:
        """Check devices and max_time."""
        _check_devices(self.devices)
        if self.max_time is not None and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", self.max_time):
            raise UserError(f"trainer.max_time = {self.max_time!r}: must be days:hours:minutes:seconds, 00:12:00:00")


@dataclass
class SpeedConfig:
    """Keys that change time and memory of training, and its result only by rounding."""

    compile: Any = key("torch.compile of the whole network: true, false; auto: on a GPU", default="auto")
    checkpointing: bool = key("a third of the memory: feature maps are recomputed", default=False)
    validation: str = key("precision; auto: bf16 where it is fast", choices=("float32", "auto"), default="float32")

    def rules(self) -> None:
        """Check `compile`: a boolean, or auto."""
        if self.compile != "auto" and not isinstance(self.compile, bool):
            raise UserError(f"speed.compile = {self.compile!r}: allowed are auto, true, false")


@dataclass
class LoggerConfig:
    """W&B, as a logger besides the run record; `Config.logger_extra` has the other loggers."""

    wandb: bool = key("log to Weights & Biases", default=False)
    project: str = key("W&B's project")
    mode: str = key("W&B's mode", choices=("offline", "online", "disabled"))
    artifacts: str = key(
        "files that W&B stores; checkpoints have the momentum too", choices=("none", "weights", "checkpoints")
    )
    entity: str | None = key("user or team; null: WANDB_ENTITY, else your own", default=None)
    tags: list[str] = key("besides those of the structure and of WANDB_TAGS")
    notes: str | None = key("of the W&B run", default=None)
    job_type: str | None = key("of the W&B run", default=None)
    pictures_every: int | None = key(
        "steps; pictures at validations at its multiples; null: only at the end", default=None, at_least=1
    )
    kind: str | None = key("a single logger; earlier records have it", default=None, choices=("wandb", "csv", "none"))

    def rules(self) -> None:
        """Refuse now what W&B would refuse only when the training starts."""
        if len(self.project) > 128 or set(self.project) & set("/\\#?%:"):
            raise UserError(f"logger.project = {self.project!r}: at most 128 characters, none of / \\ # ? % :")
        if any(len(tag) > 64 for tag in self.tags):
            raise UserError(f"logger.tags = {self.tags}: at most 64 characters each")


CSV = {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "csv"}


@dataclass
class Config:
    """A whole training configuration."""

    model: dict[str, Any] = key("structure; `runs.request` checks another network's", keys=ModelConfig)
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: LoggerConfig = MISSING
    seed: int = key("of initial weights and the order of the patches", at_least=0, below=2**32)
    threads: int | None = key("CPU threads; null: OMP_NUM_THREADS or by load", default=None, at_least=1, below=2**12)
    name: str | None = key("display name, also W&B's; null: from the structure, DRRN_B1U9 s1")
    study: str = key("folder and W&B group that runs share")
    output: str = key("a run is written to output/study/<structure>_s<seed>-<digest>")
    ckpt_path: str | None = key("last: resume this run; or a checkpoint file; null: start afresh")
    init_from: str | None = key("weights to fine-tune with their network: a file, run or shipped name", default=None)
    plan: str = key("show a sweep's plan; only: then stop", default="print", choices=("print", "only", "none"))
    from_record: str | None = key("a record.json or its folder to train again; other keys win", default=None)
    callbacks: dict[str, Any] | None = key("callbacks=[ema,timer], +callbacks.mine={_target_: …}", default=None)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    trainer_extra: dict[str, Any] | None = key("+trainer.NAME=…, for Lightning", default=None)
    logger_extra: dict[str, Any] | None = key("logger.NAME={_target_: a Logger of Lightning's kind, …}", default=None)

    def rules(self) -> None:
        """Check rules between groups, and that named files exist."""
        self.data.share(self.trainer.accumulate_grad_batches)
        if self.speed.compile is True and self.trainer.sync_batchnorm:
            raise UserError(
                "speed.compile = True and trainer.sync_batchnorm = True: a compiled network sees its own process only"
            )
        if self.ckpt_path not in (None, "last") and not Path(self.ckpt_path).is_file():
            raise UserError(f"ckpt_path = {self.ckpt_path!r}: no such file; give a checkpoint, `last` or null")
        if Path(self.study).is_absolute() or ".." in Path(self.study).parts:
            raise UserError(f"study = {self.study!r}: must be a name, or a path of names with {os.sep}, below output")
        below = [(key, part) for key in ("output", "study") for part in Path(getattr(self, key)).parts]
        for where, part in (("name", self.name or ""), *below):
            if len(os.fsencode(part)) > 200:  # a digest is appended, and names have at most 255 bytes
                raise UserError(f"{where} = {part[:20]}…: {len(os.fsencode(part))} bytes; at most 200")
        for group, nodes in (("callbacks", self.callbacks), ("logger", self.logger_extra)):
            for name, node in nodes.items():
                check_node(f"{group}.{name}", node)
        if self.init_from is not None and self.ckpt_path not in (None, "last"):
            raise UserError(
                "init_from and ckpt_path: init_from starts a new run from weights, ckpt_path resumes a run; give one "
                "(`ckpt_path=last` is allowed with init_from: it resumes this fine-tuning)"
            )


def check(cfg: DictConfig) -> Config:
    """Convert a composed training configuration to typed dataclasses; `runs.request` reads the files that it names.

    Raises:
        UserError: unknown key, wrong type, value out of range, or keys that contradict each other.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    for group in ("trainer", "logger"):
        if f"{group}_extra" in cfg:
            raise UserError(f"{group}_extra: further keys of {group} are given as +{group}.NAME=…")
    _old_names(cfg)
    extra, loggers = _beyond(cfg, "trainer", TrainerConfig), _beyond(cfg, "logger", LoggerConfig)
    config = typed(Config, cfg)
    config.trainer_extra = extra or None
    config.logger_extra = {name: node for name, node in loggers.items() if node is not None}
    if (kind := config.logger.kind) is not None:  # of versions with a single logger
        config.logger.wandb, config.logger.kind = kind == "wandb", None
        config.logger_extra = {"csv": CSV} if kind == "csv" else {}
    config.callbacks = {name: node for name, node in (config.callbacks or {}).items() if node is not None}
    config.model = in_full(config.model)
    for part in (config.data, config.optim, config.trainer, config.logger, config.speed, config):
        part.rules()
    return config


def _beyond(cfg: DictConfig, group: str, schema: type) -> dict[str, Any]:
    """Move the keys that its schema lacks out of a group: `+trainer.x`, `+logger.x`."""
    if not OmegaConf.is_dict(cfg.get(group)):
        return {}
    known = {its.name for its in fields(schema)}
    return {name: plain(cfg[group].pop(name)) for name in list(cfg[group]) if name not in known}


def _old_names(cfg: DictConfig) -> None:
    """Rename keys of earlier versions and their records to those of `speed`."""
    groups = {"": cfg} | {name: cfg[name] for name in ("model", "trainer") if OmegaConf.is_dict(cfg.get(name))}
    if groups.get("trainer", {}).pop("cuda_graph", None):
        print("trainer.cuda_graph was removed: on a GPU the network is compiled (speed.compile)", file=sys.stderr)
    for group, name in (("trainer", "compile"), ("", "checkpointing"), ("model", "checkpointing")):
        value = groups.get(group, {}).pop(name, None)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{group}.{name} = {value!r}: allowed are true, false")
        if value is not None:
            OmegaConf.update(cfg, f"speed.{name}", value, force_add=True)


def check_sets(name: str, sets: Sequence[str]) -> None:
    """Refuse the image sets of the key `name` if there is none, two share a name, or one is unknown and no folder."""
    if not sets:
        raise UserError(f"{name} is empty: name at least one image set")
    if len({Path(one).name for one in sets}) < len(sets):
        raise UserError(f"{name} = {sets}: two sets have the same name, by which scores identify them")
    for one in sets:
        if one != printable(one):
            raise UserError(f"{name}: {one}: the name has control codes or bytes that are not UTF-8; rename it")
        if not is_set(one):
            wrong = f"the folder {one!r} does not exist" if os.sep in one else f"no set and no folder named {one!r}"
            raise UserError(f"{name}: {wrong}: give a folder of images, or one of {', '.join(known_sets())}")


def _check_devices(devices: Any) -> None:
    """Check `trainer.devices`: a number, a list of indices, -1 (all) or auto."""
    if isinstance(devices, str):
        good = devices == "auto" or re.fullmatch(r"-1|[1-9]\d*|\d+(,\d+)+", devices)
    elif isinstance(devices, list):
        good = devices and len(set(map(str, devices))) == len(devices)
        good = good and all(type(index) is int and index >= 0 for index in devices)
    else:
        good = type(devices) is int and (devices > 0 or devices == -1)
    if not good:
        raise UserError(f"trainer.devices = {devices}: a number of at least 1, -1 for all, auto, or a list as [0,1]")
