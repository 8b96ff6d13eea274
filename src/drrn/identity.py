"""What a run is: the name of its structure, its identity, its folder and files."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from drrn.config import DEFAULT, Config, DataConfig, ModelConfig, OptimConfig, TrainerConfig
from drrn.paper import depth
from drrn.targets import OF_OUR_SOLVERS

SHORT = {"features": "{}f", "scale": "x{}"}  # arguments of networks, in their names
TRAINED = ("alpha_steps",)  # of how a network is trained, not of what it is
WEIGHTS = "weights.safetensors"  # in a run's folder
Structure = ModelConfig | dict[str, Any]  # what a network is: another than DRRN has its name as `network`


def model_of(values: Mapping[str, Any]) -> Structure:
    """`Config.model` from what a record or a weights file holds of it."""
    arguments = {key: value for key, value in values.items() if (key, value) != ("network", DEFAULT)}
    return arguments if "network" in arguments else ModelConfig(**arguments)


def structure_name(model: ModelConfig | Mapping[str, Any]) -> str:
    """The paper's name of a structure: DRRN_B1U9, DRRN_NS_B3U4, DRRN_C_B3U2, VDSR_d20; departures follow.

    Another network is called by its class and what departs from its constructor: SRCNN, SRCNN_middle5, FSRCNN_x3.
    """
    if isinstance(model, Mapping):
        if model.get("network", DEFAULT) != DEFAULT:
            return _name_of_another(model)
        model = model_of(model)
    if model.U == 0:
        name = f"VDSR_d{depth(model.B, 0)}"
    else:
        ns, c = "" if model.weight_sharing else "_NS", "" if model.multi_path else "_C"
        name = f"DRRN{ns}{c}_B{model.B}U{model.U}"
    departures = {
        f"{model.features}f": model.features != 128,
        "noBN": model.norm == "none",
        "rectified": model.rectified_identity,
        "noinputReLU": not model.input_relu,
        "nobias": not model.bias,
    }
    return "_".join([name, *(word for word, departs in departures.items() if departs)])


def _name_of_another(model: Mapping[str, Any]) -> str:
    from drrn.networks import NETWORKS

    network = NETWORKS.get(model["network"])
    usual = inspect.signature(network).parameters if network else {}
    parts = [network.__name__ if network else model["network"].upper()]
    for key, value in model.items():
        if key not in ("network", *TRAINED) and not (key in usual and usual[key].default == value):
            parts.append(SHORT.get(key, f"{key}{{}}").format(value))
    return "_".join(parts)


# What does not change the result of a run, or only its rounding: left out of a run's identity, so that it
# can be resumed with other workers, another logger or on another machine.
NOT_IDENTITY = {
    "data": ("root", "patches", "num_workers", "val_scales", "test", "test_metrics"),
    "trainer": (
        "accelerator", "devices", "num_nodes", "strategy", "log_every_n_steps", "checkpoint_every", "compile",
        "cuda_graph",
    ),
}  # fmt: skip
# Callbacks that watch a run, or end it resumably: no part of what it is.
WATCHING = {
    f"lightning.pytorch.callbacks.{name}"
    for name in (
        "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint",
        "RichModelSummary", "ThroughputMonitor", "Timer",
    )
}  # fmt: skip
GROUPS = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "trainer": TrainerConfig}
# Keys that came later, which are those with a default in the schema, and `network`: they count only where they are
# used, so that earlier runs keep their folders.
LATER = {name: {its.name: its.default for its in fields(group)} for name, group in GROUPS.items()}
LATER["model"]["network"] = DEFAULT


def identity(config: Config) -> dict[str, Any]:
    """The part of a configuration that makes two runs the same experiment."""
    return _identity(asdict(config))


def _identity(whole: dict[str, Any], as_written: bool = False) -> dict[str, Any]:
    """`identity` of a configuration as a record keeps it; `as_written`: as digests were made before both names of a
    callback's class counted as one, and with keys that another library's solver does not read."""
    kept: dict[str, Any] = {"trainer_extra": whole["trainer_extra"], "seed": whole["seed"]}
    for group, defaults in LATER.items():
        items = (item for item in whole[group].items() if item[0] not in NOT_IDENTITY.get(group, ()))
        kept[group] = {key: value for key, value in items if defaults.get(key, MISSING) != value}
    devices, nodes = whole["trainer"]["devices"], whole["trainer"]["num_nodes"]
    devices = str(len(devices) if isinstance(devices, list) else devices)
    shared_out = (devices, nodes) != ("1", 1) and not whole["trainer"]["sync_batchnorm"]
    if shared_out and _normalises(whole["model"]):  # each process by its share of a batch
        kept["processes"] = [devices, nodes]
    kept["trainer"]["max_time"] = None  # a run that was stopped by it is resumed in the same folder
    if "optimiser" in kept["optim"] and not as_written:
        kept["optim"] = {key: value for key, value in kept["optim"].items() if key not in OF_OUR_SOLVERS}
    if "crops" in kept["data"]:
        kept["data"].pop("stride", None)  # of stored patches
    # Callbacks that change weights or length; one that is not known here may.
    nodes = (whole.get("callbacks") or {}).values()
    if not as_written:
        nodes = [{**node, "_target_": _short(node["_target_"])} for node in nodes]
    counted = [node for node in nodes if node["_target_"] not in WATCHING]
    if counted:
        kept["callbacks"] = sorted(counted, key=lambda node: json.dumps(node, sort_keys=True))
    if whole["init_from"] is not None:
        kept["init_from"] = whole["init_from"]
    if whole["ckpt_path"] not in (None, "last"):  # resuming another run's file is a run of its own
        kept["ckpt_path"] = whole["ckpt_path"]
    return kept


def _short(target: str) -> str:
    """Lightning's callbacks have two names, `…callbacks.Timer` and `…callbacks.timer.Timer`; nothing is imported to
    tell, since a record may name what would run."""
    package = "lightning.pytorch.callbacks."
    return package + target.rpartition(".")[2] if target.startswith(package) else target


def _normalises(model: dict[str, Any]) -> bool:
    """Whether a structure has BatchNorm; of a network without a key for it, its modules say so."""
    if "norm" in model or "network" not in model:
        return model.get("norm") == "batch"
    from torch.nn.modules.batchnorm import _BatchNorm

    from drrn.networks import NETWORKS, on_paper

    known = model["network"] in NETWORKS  # a record may be of somebody else's
    return known and any(isinstance(module, _BatchNorm) for module in on_paper(model).modules())


def experiment(config: Config) -> str:
    """A digest of what makes two runs the same experiment but for their seed: what may be averaged over seeds."""
    return _digest({key: value for key, value in identity(config).items() if key != "seed"})


def run_group(config: dict[str, Any], varied: Sequence[str] | None) -> str:
    """A digest of what the points of a study share: a run's identity without its seed and what the study varies.

    Args:
        config: a run's configuration as its record keeps it (`asdict(Config)`).
        varied: the keys of `model` that are the study's own: B and U for Fig. 6; None: the whole network.
    """
    kept = {key: value for key, value in _identity(config).items() if key != "seed"}
    kept["model"] = {} if varied is None else {k: v for k, v in kept["model"].items() if k not in varied}
    return _digest(kept)


def _digest(kept: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def run_name(config: Config) -> str:
    """For people and W&B: `DRRN_B1U9 s1`."""
    return config.name or f"{structure_name(config.model)} s{config.seed}"


def run_dir(config: Config) -> Path:
    """Where a run lives, named by what it is and never by the clock: `runs/main/DRRN_B1U9_s1-3f2a9c01`."""
    parent = Path(config.output) / config.study
    names = [run_name(config).replace(" ", "_").replace("/", "_")]
    if isinstance(config.model, dict) and config.name is None:  # the name that such runs had before
        values = (f"{key}{value}" for key, value in config.model.items() if key != "network")
        names.append("_".join([config.model["network"].upper(), *values, f"s{config.seed}"]))
    digests = [_digest(identity(config)), _digest(_identity(asdict(config), as_written=True))]
    folder, *earlier = (parent / f"{name}-{digest}" for digest in digests for name in names)
    return next((one for one in earlier if one.is_dir()), folder)


def checkpoint_name(step: int) -> str:
    """The file of an optimiser step, in `checkpoints/` of a run's folder."""
    return f"step{step:08d}.ckpt"
