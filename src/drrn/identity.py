"""The identity of a run, and the names made of it: structure, folder and files."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from drrn.config import Config, DataConfig, ModelConfig, OptimConfig, TrainerConfig
from drrn.paper import depth
from drrn.targets import OF_OUR_SOLVERS

SHORT = {"features": "{}f", "scale": "x{}"}  # an argument's form in the name of a network
TRAINED = ("alpha_steps",)  # arguments that concern training only: not in the name
WEIGHTS = "weights.safetensors"  # in a run's folder


def structure_name(model: Mapping[str, Any]) -> str:
    """The paper's name of a structure, then what differs from the defaults: DRRN_NS_B3U4, VDSR_d20, DRRN_B1U9_nobias.

    Another network is named by its class and the arguments that are not the defaults: SRCNN_middle5, FSRCNN_x3.
    """
    if "network" in model:
        return _name_of_another(model)
    if model["U"] == 0:
        name = f"VDSR_d{depth(model['B'], 0)}"
    else:
        ns, c = "" if model["weight_sharing"] else "_NS", "" if model["multi_path"] else "_C"
        name = f"DRRN{ns}{c}_B{model['B']}U{model['U']}"
    departures = {
        f"{model['features']}f": model["features"] != 128,
        "noBN": model["norm"] == "none",
        "rectified": model["rectified_identity"],
        "noinputReLU": not model["input_relu"],
        "nobias": not model["bias"],
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


# Keys that do not change the result of a run, or only its rounding. They are no part of its identity, so that it can
# be resumed with other workers, another logger or on another machine.
NOT_IDENTITY = {
    "data": ("root", "patches", "num_workers", "val_scales", "test", "test_metrics"),
    "trainer": (
        "accelerator", "devices", "num_nodes", "strategy", "log_every_n_steps", "checkpoint_every", "compile",
        "cuda_graph",
    ),
}  # fmt: skip
# Callbacks that observe a run or end it resumably: no part of its identity.
WATCHING = {
    f"lightning.pytorch.callbacks.{name}"
    for name in (
        "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint",
        "RichModelSummary", "ThroughputMonitor", "Timer",
    )
}  # fmt: skip
GROUPS = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "trainer": TrainerConfig}
# Keys added in later versions: those with a default in the schema. They enter the identity only if they differ from
# the default, so that earlier runs keep their folders.
LATER = {name: {its.name: its.default for its in fields(group)} for name, group in GROUPS.items()}


def identity(config: Config) -> dict[str, Any]:
    """The part of a configuration that makes two runs the same experiment."""
    return _identity(asdict(config))


def _identity(whole: dict[str, Any], as_written: bool = False) -> dict[str, Any]:
    """`identity` of a configuration in a record. `as_written` gives that of earlier versions, which distinguished the
    two names of a callback's class and included keys that another library's solver does not read."""
    kept: dict[str, Any] = {"trainer_extra": whole["trainer_extra"], "seed": whole["seed"]}
    for group, defaults in LATER.items():
        items = (item for item in whole[group].items() if item[0] not in NOT_IDENTITY.get(group, ()))
        kept[group] = {key: value for key, value in items if defaults.get(key, MISSING) != value}
    devices, nodes = whole["trainer"]["devices"], whole["trainer"]["num_nodes"]
    devices = str(len(devices) if isinstance(devices, list) else devices)
    shared_out = (devices, nodes) != ("1", 1) and not whole["trainer"]["sync_batchnorm"]
    if shared_out and _normalises(whole["model"]):  # each process normalises its own share of a batch
        kept["processes"] = [devices, nodes]
    kept["trainer"]["max_time"] = None  # a run stopped by it resumes in the same folder with another one
    if "optimiser" in kept["optim"] and not as_written:
        kept["optim"] = {key: value for key, value in kept["optim"].items() if key not in OF_OUR_SOLVERS}
    if "crops" in kept["data"]:
        kept["data"].pop("stride", None)  # only stored patches have one
    # Unknown callbacks may change weights or length, so they count too.
    nodes = (whole.get("callbacks") or {}).values()
    if not as_written:
        nodes = [{**node, "_target_": _short(node["_target_"])} for node in nodes]
    counted = [node for node in nodes if node["_target_"] not in WATCHING]
    if counted:
        kept["callbacks"] = sorted(counted, key=lambda node: json.dumps(node, sort_keys=True))
    if whole["init_from"] is not None:
        kept["init_from"] = whole["init_from"]
    if whole["ckpt_path"] not in (None, "last"):  # resuming another run's checkpoint is a run of its own
        kept["ckpt_path"] = whole["ckpt_path"]
    return kept


def _short(target: str) -> str:
    """Shorten the second name of Lightning's callbacks, `…callbacks.timer.Timer`, to the first, `…callbacks.Timer`,
    without an import: a record may name any module."""
    package = "lightning.pytorch.callbacks."
    return package + target.rpartition(".")[2] if target.startswith(package) else target


def _normalises(model: dict[str, Any]) -> bool:
    """Whether a structure has BatchNorm: by its key `norm`, else by the network's modules."""
    if "norm" in model or "network" not in model:
        return model.get("norm") == "batch"
    from torch.nn.modules.batchnorm import _BatchNorm

    from drrn.networks import NETWORKS, on_paper

    known = model["network"] in NETWORKS  # a record may have a network of another clone
    return known and any(isinstance(module, _BatchNorm) for module in on_paper(model).modules())


def experiment(config: Config) -> str:
    """A digest of the identity without the seed: runs with the same one may be averaged over seeds."""
    return _digest({key: value for key, value in identity(config).items() if key != "seed"})


def run_group(config: dict[str, Any], varied: Sequence[str] | None) -> str:
    """A digest of what the points of a study share: the identity without the seed and the keys that the study varies.

    Args:
        config: a run's configuration from its record (`asdict(Config)`).
        varied: keys of `model`, such as B and U for Fig. 6; None: all of `model`.
    """
    kept = {key: value for key, value in _identity(config).items() if key != "seed"}
    kept["model"] = {} if varied is None else {k: v for k, v in kept["model"].items() if k not in varied}
    return _digest(kept)


def _digest(kept: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def run_name(config: Config) -> str:
    """The display name, also W&B's: `name`, else `DRRN_B1U9 s1`."""
    return config.name or f"{structure_name(config.model)} s{config.seed}"


def run_dir(config: Config) -> Path:
    """The folder of a run, named by its identity and not by the time: `runs/main/DRRN_B1U9_s1-3f2a9c01`."""
    parent = Path(config.output) / config.study
    names = [run_name(config).replace(" ", "_").replace("/", "_")]
    if "network" in config.model and config.name is None:
        # Without what has a meaning in a shell or in Hydra's grammar, as in Mine_widths[1,_2]; then earlier names.
        names.insert(0, re.sub(r"[^\w.=+-]", "", re.sub(",_?", "-", names[0])))
        values = (f"{key}{value}" for key, value in config.model.items() if key != "network")
        names.append("_".join([config.model["network"].upper(), *values, f"s{config.seed}"]))
    digests = [_digest(identity(config)), _digest(_identity(asdict(config), as_written=True))]
    folder, *earlier = (parent / f"{name}-{digest}" for digest in digests for name in names)
    return next((one for one in earlier if one.is_dir()), folder)


def checkpoint_name(step: int) -> str:
    """Name of an optimiser step's checkpoint, in `checkpoints/` of a run's folder."""
    return f"step{step:08d}.ckpt"
