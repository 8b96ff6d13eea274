"""The configuration: what every key may be, and the names that follow from it.

Hydra composes `conf/` and the command line; `check` then turns the result into the dataclasses below, refusing
an unknown key, a wrong type and a value out of range by the key's name, before anything heavy is imported.
Defaults stand in `conf/`, once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from drrn.errors import UserError
from drrn.sets import IMAGE_SETS

T = TypeVar("T")
DEEPEST = 10_000  # layers; the paper's deepest network has 52
LARGEST = 2**32  # of whole numbers: beyond it nothing here has a meaning


@dataclass
class ModelConfig:
    """`drrn.model.DRRN`'s arguments."""

    B: int = MISSING
    U: int = MISSING
    features: int = MISSING
    norm: str = MISSING
    bias: bool = MISSING
    weight_sharing: bool = MISSING
    multi_path: bool = MISSING
    rectified_identity: bool = False  # these two came later: weights written before do not name them
    input_relu: bool = True


@dataclass
class DataConfig:
    """Training patches and evaluation sets."""

    name: str = MISSING
    train: list[str] = MISSING
    val: list[str] = MISSING
    root: str = MISSING
    patches: str = MISSING
    scales: list[int] = MISSING
    val_scales: list[int] = MISSING
    patch_size: int = MISSING
    stride: int = MISSING
    augment: str = MISSING
    batch_size: int = MISSING
    num_workers: int = MISSING


@dataclass
class OptimConfig:
    """Sec. 4.2 and its alternatives."""

    algorithm: str = MISSING
    lr: float = MISSING
    momentum: float = MISSING
    weight_decay: float = MISSING
    bias_lr_mult: float = MISSING
    theta: float = MISSING
    clip: str = MISSING
    schedule: str = MISSING
    halve_every_epochs: float | None = MISSING
    halve_every_steps: int | None = MISSING
    residual_scale: float = MISSING
    bn_average: float = MISSING


@dataclass
class TrainerConfig:
    """Lightning's Trainer; the keys listed here are checked at once, others (`+trainer.x=…`) by Lightning."""

    accelerator: str = MISSING
    devices: Any = MISSING
    num_nodes: int = MISSING
    strategy: str = MISSING
    precision: str = MISSING
    max_steps: int = MISSING
    max_epochs: float | None = MISSING
    max_time: str | None = MISSING
    accumulate_grad_batches: int = MISSING
    val_check_interval: int = MISSING
    checkpoint_every: int = MISSING
    log_every_n_steps: int = MISSING
    deterministic: bool = MISSING
    sync_batchnorm: bool = MISSING
    channels_last: bool = MISSING
    tf32: bool = False  # came later, as did `rectified_identity`
    compile: bool = False
    cuda_graph: bool = False


@dataclass
class LoggerConfig:
    """Where metrics go besides the run record."""

    kind: str = MISSING
    project: str = MISSING
    mode: str = MISSING
    artifacts: str = MISSING


@dataclass
class Config:
    """A whole training configuration."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: LoggerConfig = MISSING
    seed: int = MISSING
    name: str | None = MISSING
    study: str = MISSING
    output: str = MISSING
    ckpt_path: str | None = MISSING
    init_from: str | None = None
    plan: str = "print"
    from_record: str | None = None
    checkpointing: bool = False  # typed model.checkpointing, but no part of what the network is
    trainer_extra: dict[str, Any] | None = None


CHOICES = {
    "model.norm": ("batch", "none"),
    "data.augment": ("offline", "online"),
    "optim.algorithm": ("sgd", "adam"),
    "optim.clip": ("value", "norm", "none"),
    "optim.schedule": ("halve", "cosine"),
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    # src/train.py starts the processes itself: no spawn, fork or notebook. Nothing sharded either: clipping by the
    # norm would see a part of the gradient.
    "trainer.strategy": ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"),
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
    "logger.kind": ("wandb", "csv", "none"),
    "logger.mode": ("offline", "online", "disabled"),
    "logger.artifacts": ("none", "weights", "checkpoints"),
    "plan": ("print", "only", "none"),
}
AT_LEAST = {
    "model.B": 1,
    "model.U": 0,
    "model.features": 1,
    "data.patch_size": 3,
    "data.stride": 1,
    "data.batch_size": 1,
    "data.num_workers": 0,
    "optim.momentum": 0,
    "optim.weight_decay": 0,
    "optim.bias_lr_mult": 0,
    "optim.residual_scale": 0,
    "trainer.num_nodes": 1,
    "trainer.max_steps": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.val_check_interval": 1,
    "trainer.checkpoint_every": 1,
    "trainer.log_every_n_steps": 1,
    "seed": 0,
}
ABOVE = {
    "optim.lr": 0,
    "optim.theta": 0,
    "optim.halve_every_epochs": 0,
    "optim.halve_every_steps": 0,
    "trainer.max_epochs": 0,
}
BELOW = {
    "model.features": 2**13,
    "data.num_workers": 2**10,
    "optim.momentum": 1,
    "optim.bn_average": 1,
    "seed": 2**32,
}


def typed(schema: type[T], cfg: DictConfig) -> T:
    """A composed configuration as an instance of the dataclass `schema`.

    Raises:
        UserError: an unknown key, or a value of the wrong type, by the key's name.
    """
    try:
        _check_kinds(schema, cfg)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))
    except OmegaConfBaseException as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{getattr(error, 'full_key', None) or 'configuration'}: {reason}") from error


def _check_kinds(schema: type, cfg: DictConfig, group: str = "") -> None:
    """What OmegaConf would take or refuse without a name: a number for a truth value, an empty text, lists inside
    lists or none at all, numbers beyond `LARGEST`."""
    for name, kind in get_type_hints(schema).items():
        if name not in cfg or OmegaConf.is_missing(cfg, name) or cfg[name] is None:
            continue
        key, value = group + name, cfg[name]
        kind = get_args(kind)[0] if isinstance(kind, UnionType) else kind  # X | None
        if is_dataclass(kind):
            if OmegaConf.is_dict(value):
                _check_kinds(kind, value, f"{key}.")
            continue
        if get_origin(kind) is list:
            if not OmegaConf.is_list(value):
                raise UserError(f"{key} = {value}: must be a list, such as [a,b]")
            if any(OmegaConf.is_config(item) for item in value):
                raise UserError(f"{key} = {value}: a plain list, without lists or mappings in it")
        if kind is bool and not isinstance(value, bool | str):
            raise UserError(f"{key} = {value}: must be true or false")
        for item in value if OmegaConf.is_list(value) else [value]:
            if isinstance(item, str) and not item.strip():
                raise UserError(f"{key} = {value!r}: is empty" if item is value else f"{key} = {value}: one is empty")
            if isinstance(item, int) and kind is not float and abs(item) >= LARGEST:
                raise UserError(f"{key} = {value}: must be below {LARGEST}")


def check_choices(config: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Keys that have a few values only.

    Raises:
        UserError: another value; the text names the key and the values allowed.
    """
    for key, allowed in choices.items():
        if _get(config, key) not in allowed:
            raise UserError(f"{key} = {_get(config, key)!r}: allowed are {', '.join(allowed)}")


def check_sets(key: str, names: Sequence[str]) -> None:
    """Names of image sets.

    Raises:
        UserError: none, two of one name, or neither a known set nor a folder.
    """
    if not names:
        raise UserError(f"{key} is empty: name at least one image set")
    if len({Path(name).name for name in names}) < len(names):
        raise UserError(f"{key} = {names}: two sets of one name cannot be told apart")
    for name in names:
        if os.sep in name and not Path(name).is_dir():
            raise UserError(f"{key}: the folder {name!r} does not exist")
        if name not in IMAGE_SETS and not Path(name).is_dir():
            raise UserError(
                f"{key}: no set and no folder named {name!r}: give a folder of images, or one of "
                f"{', '.join(IMAGE_SETS)}"
            )


def paths(key: str, value: Any) -> list[str]:
    """A key that takes one path, a list of them or null, as a list.

    Raises:
        UserError: it is something else.
    """
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in listed):
        raise UserError(f"{key} = {value}: must be a path, or a list of paths")
    return listed


def check(cfg: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """A composed configuration as typed dataclasses.

    Args:
        cfg: as Hydra composed it.
        overrides: what the command line says. With `init_from` the network is the file's, unless `model` or a
            key of it is among them; with `from_record` they are what differs from the record.

    Raises:
        UserError: unknown key, wrong type, value out of range, or keys that contradict each other; the text
            names the key, its value and what is allowed.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    if "trainer_extra" in cfg:
        raise UserError("trainer_extra: an argument of Lightning's Trainer is given as +trainer.NAME=VALUE")
    if cfg.get("from_record") is not None:
        cfg = _recorded(cfg, overrides)
    known = {field.name for field in fields(TrainerConfig)}
    extra = {}
    if OmegaConf.is_dict(cfg.get("trainer")):
        extra = {key: cfg.trainer.pop(key) for key in list(cfg.trainer) if key not in known}
    if OmegaConf.is_dict(cfg.get("model")):
        cfg.checkpointing = cfg.model.pop("checkpointing", cfg.get("checkpointing", False))
        if not isinstance(cfg.checkpointing, bool):
            raise UserError(f"model.checkpointing = {cfg.checkpointing!r}: allowed are true, false")
    config = typed(Config, cfg)
    config.trainer_extra = extra or None
    check_choices(config, CHOICES)
    for limits, words, good in (
        (AT_LEAST, "at least", lambda value, limit: value >= limit),
        (ABOVE, "above", lambda value, limit: value > limit),
        (BELOW, "below", lambda value, limit: value < limit),
    ):
        for key, limit in limits.items():
            value = _get(config, key)
            if value == math.inf:
                raise UserError(f"{key} = {value}: must be a finite number")
            if value is not None and not good(value, limit):
                raise UserError(f"{key} = {value}: must be {words} {limit}")
    _check_together(config)
    asked = [o.lstrip("+~") for o in overrides]
    asked = [o for o in asked if o.startswith("model") and not o.startswith("model.checkpointing")]
    if config.init_from is not None and not asked:
        from drrn.weights.ours import load_network

        config.model = ModelConfig(**load_network(Path(config.init_from))[1]["model"])
    return config


def _recorded(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration of the record that `from_record` names, but for this machine's folders and `overrides`."""
    from drrn.runs.record import read_record

    path = Path(str(cfg.from_record))
    try:
        recorded = read_record(path).get("config")
    except UserError as error:
        raise UserError(f"from_record: {error}") from error
    if not isinstance(recorded, dict) or not isinstance(recorded.get("trainer"), dict):
        raise UserError(f"from_record = {str(path)!r}: the record has no configuration")
    recorded["trainer"] |= recorded.pop("trainer_extra", None) or {}
    if recorded.get("ckpt_path") is None:
        recorded.pop("ckpt_path", None)  # it set aside what that run found; this one goes on with itself
    merged = OmegaConf.merge(cfg, recorded)
    here = ["from_record", "data.root", "data.patches", "output"]
    for key in (*here, *(override.lstrip("+~").partition("=")[0] for override in overrides)):
        if key in ("experiment", "sweeps"):
            raise UserError(
                f"from_record and {key}: the record is the whole configuration; give single keys beside it"
            )
        if not key.startswith("hydra"):
            OmegaConf.update(merged, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    return merged


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_together(config: Config) -> None:
    """What one key alone does not show."""
    data, optim, trainer = config.data, config.optim, config.trainer
    for key in ("scales", "val_scales"):
        scales = getattr(data, key)
        if not scales or min(scales) < 2 or len(set(scales)) != len(scales):
            raise UserError(f"data.{key} = {scales}: one or more different whole numbers, each at least 2")
    for key in ("train", "val"):
        check_sets(f"data.{key}", getattr(data, key))
    if os.sep in data.name:
        raise UserError(f"data.name = {data.name!r}: the first part of a file's name, without {os.sep}")
    depth = (1 + 2 * config.model.U) * config.model.B + 1
    if depth > DEEPEST:
        raise UserError(
            f"model.B = {config.model.B} and model.U = {config.model.U} make {depth:,} layers: at most {DEEPEST:,}"
        )
    _check_devices(trainer.devices)
    if trainer.max_time is not None and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", trainer.max_time):
        raise UserError(f"trainer.max_time = {trainer.max_time!r}: must be days:hours:minutes:seconds, 00:12:00:00")
    if optim.bn_average < 0:
        raise UserError(f"optim.bn_average = {optim.bn_average}: must be at least 0")
    if optim.schedule == "halve" and (optim.halve_every_epochs is None) == (optim.halve_every_steps is None):
        raise UserError(
            "optim.halve_every_epochs and optim.halve_every_steps: give one of the two and set the other to null "
            f"(now {optim.halve_every_epochs} and {optim.halve_every_steps})"
        )
    if trainer.compile and trainer.sync_batchnorm:
        raise UserError(
            "trainer.compile and trainer.sync_batchnorm: a compiled unit sees its own process only; give one"
        )
    if trainer.cuda_graph:
        needed = {"strategy": "auto", "devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1}
        for key, value in needed.items():
            one = isinstance(trainer.devices, list) and len(trainer.devices) == 1  # [3]: the fourth
            if getattr(trainer, key) not in (value, str(value)) and not (key == "devices" and one):
                raise UserError(
                    f"trainer.cuda_graph = True and trainer.{key} = {getattr(trainer, key)}: the graph is of one "
                    f"process's step with a single backward pass; it needs trainer.{key}={value}"
                )
        if trainer.accelerator not in ("auto", "gpu", "cuda"):
            raise UserError(
                f"trainer.cuda_graph = True: needs a GPU, not trainer.accelerator = {trainer.accelerator}"
            )
        if (config.trainer_extra or {}).get("detect_anomaly"):
            raise UserError(
                "trainer.cuda_graph = True and trainer.detect_anomaly = True: a graph cannot look for NaN"
            )
    if optim.algorithm == "adam" and optim.bias_lr_mult != 1:
        raise UserError(f"optim.bias_lr_mult = {optim.bias_lr_mult}: it is the release's, for optim.algorithm=sgd")
    if data.batch_size % trainer.accumulate_grad_batches:
        raise UserError(
            f"data.batch_size = {data.batch_size} is the whole batch of a step: it must be a multiple of "
            f"trainer.accumulate_grad_batches = {trainer.accumulate_grad_batches}"
        )
    if config.ckpt_path not in (None, "last") and not Path(config.ckpt_path).is_file():
        raise UserError(f"ckpt_path = {config.ckpt_path!r}: no such file; give a checkpoint, `last` or null")
    if config.init_from is not None and not Path(config.init_from).is_file():
        raise UserError(f"init_from = {config.init_from!r}: no such file; give weights.safetensors, a .ckpt or null")
    if config.init_from is not None and config.ckpt_path not in (None, "last"):
        raise UserError(
            "init_from and ckpt_path: init_from starts a new run from weights, ckpt_path goes on with a run; give "
            "one (`ckpt_path=last` may stand beside init_from: it goes on with this fine-tuning)"
        )


def _check_devices(devices: Any) -> None:
    """`trainer.devices` as Lightning takes it: how many, which, all (-1) or auto."""
    if isinstance(devices, str):
        good = devices == "auto" or re.fullmatch(r"-1|[1-9]\d*|\d+(,\d+)+", devices)
    elif isinstance(devices, list):
        good = devices and len(set(map(str, devices))) == len(devices)
        good = good and all(type(index) is int and index >= 0 for index in devices)
    else:
        good = type(devices) is int and (devices > 0 or devices == -1)
    if not good:
        raise UserError(f"trainer.devices = {devices}: a number of at least 1, -1 for all, auto, or a list as [0,1]")
