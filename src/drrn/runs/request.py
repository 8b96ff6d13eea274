"""A composed configuration and its command line → a checked `Config`, for every entry point and point of a sweep.

The record of `from_record=` and the weights of `init_from=` are read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from drrn.config import Config, LoggerConfig, check
from drrn.degradations import BI
from drrn.errors import UserError
from drrn.targets import OF_OUR_SOLVERS, check_trusted
from drrn.weights.shipped import weights_file


def request(cfg: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """The configuration to train; an invalid key, record, weights file or network is a UserError.

    Args:
        cfg: as Hydra composed it.
        overrides: of the command line. With `init_from` the network is the file's, unless `model` or a key of it is
            overridden; with `from_record` they override the record.
    """
    if cfg.get("from_record") is not None:
        cfg = _recorded(cfg, overrides)
    config = check(cfg)
    given = _keys(overrides)
    ignored = [key for key in OF_OUR_SOLVERS if f"optim.{key}" in given]
    if config.optim.optimiser is not None and ignored:
        raise UserError(f"optim.{ignored[0]} and optim.optimiser: give that solver's arguments beside its _target_")
    network = [key for key in given if key.startswith("model") and key != "model.checkpointing"]
    if config.init_from is not None:
        weights = weights_file(config.init_from, key="init_from")
        if weights.parent == Path(config.init_from):  # a run's folder and its file are one identity
            config.init_from = str(weights)
        if not network:
            from drrn.weights.ours import load_network

            config.model = load_network(weights)[1]["model"]
    if "network" in config.model:
        _check_network(config)
    return config


def _keys(overrides: Sequence[str]) -> set[str]:
    return {override.lstrip("+~").partition("=")[0] for override in overrides}


def _check_network(config: Config) -> None:
    """Check the keys of a network other than DRRN against its constructor, and its scale against the data's."""
    from drrn.networks import complete, on_paper

    config.model = complete(config.model)
    name, network, data = config.model["network"], on_paper(config.model), config.data
    if network.input == "low" and data.degradation != BI and not data.crops:
        raise UserError(
            f"data.degradation = {data.degradation!r}: from stored patches {name!r} can only get a bicubic low "
            "resolution; give data.crops=16 data.augment=online"
        )
    scale = getattr(network, "scale", None)
    for key in ("scales", "val_scales"):
        if scale is not None and getattr(config.data, key) != [scale]:
            raise UserError(
                f"data.{key} = {getattr(config.data, key)} and model.scale = {scale}: the network {name!r} enlarges "
                f"by one scale; give data.scales=[{scale}] data.val_scales=[{scale}]"
            )


def _recorded(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration of the record `from_record`, with this machine's folders and the `overrides`."""
    from drrn.runs.record import read_record

    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    path = Path(str(cfg.from_record))
    try:
        recorded = read_record(path).get("config")
    except UserError as error:
        raise UserError(f"from_record: {error}") from error
    if not isinstance(recorded, dict) or not isinstance(recorded.get("trainer"), dict):
        raise UserError(f"from_record = {str(path)!r}: the record has no configuration")
    asked = _keys(overrides)
    check_trusted("from_record", {key: value for key, value in recorded.items() if key not in asked})
    recorded["trainer"] |= recorded.pop("trainer_extra", None) or {}
    if recorded.get("ckpt_path") is None:
        recorded.pop("ckpt_path", None)  # that run started afresh; this one may resume
    base = {**cfg, "model": {}}  # keys of the default network and of today's loggers must not mix with the record's
    if isinstance(recorded.get("logger"), dict) and OmegaConf.is_dict(cfg.get("logger")):
        recorded["logger"] |= recorded.pop("logger_extra", None) or {}
        ours = {its.name for its in fields(LoggerConfig)}
        base["logger"] = {name: value for name, value in cfg.logger.items() if name in ours}
    merged = OmegaConf.merge(base, recorded)
    here = ["from_record", "data.root", "data.patches", "output"]
    for key in (*here, *asked):
        if key in ("experiment", "sweeps"):
            raise UserError(f"from_record and {key}: the record is the whole configuration; give single keys instead")
        if not key.startswith("hydra"):
            OmegaConf.update(merged, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    return merged
