"""What was asked for: a composed configuration and the command line → a checked `Config`.

A record (`from_record=`) or weights (`init_from=`) that the configuration names are read here, for every entry point
and every point of a sweep alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, make_dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from drrn.config import Config, LoggerConfig, check
from drrn.degradations import BI
from drrn.errors import UserError
from drrn.identity import model_of
from drrn.schema import typed
from drrn.targets import OF_OUR_SOLVERS, check_trusted
from drrn.weights.shipped import weights_file


def request(cfg: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """The configuration that is trained; what is wrong with it, a record or a network is a UserError.

    Args:
        cfg: as Hydra composed it.
        overrides: what the command line says. With `init_from` the network is the file's, unless `model` or a
            key of it is among them; with `from_record` they are what differs from the record.
    """
    if cfg.get("from_record") is not None:
        cfg = _recorded(cfg, overrides)
    config = check(cfg)
    given = _keys(overrides)
    ignored = [key for key in OF_OUR_SOLVERS if f"optim.{key}" in given]
    if config.optim.optimiser is not None and ignored:
        raise UserError(f"optim.{ignored[0]} and optim.optimiser: give what another solver takes beside its _target_")
    network = [key for key in given if key.startswith("model") and key != "model.checkpointing"]
    if config.init_from is not None:
        weights = weights_file(config.init_from, key="init_from")
        if not network:
            from drrn.weights.ours import load_network

            config.model = model_of(load_network(weights)[1]["model"])
    if isinstance(config.model, dict):
        _check_network(config)
    return config


def _keys(overrides: Sequence[str]) -> set[str]:
    return {override.lstrip("+~").partition("=")[0] for override in overrides}


def _check_network(config: Config) -> None:
    """Hold a network that is not DRRN against its constructor, and its scale against those of the data."""
    from drrn.networks import arguments_of, on_paper, schema

    name, _ = arguments_of(config.model)
    own = make_dataclass("Own", [("model", schema(name))])
    config.model = asdict(typed(own, OmegaConf.create({"model": config.model})).model)
    network, data = on_paper(config.model), config.data
    if network.input == "low" and data.degradation != BI and not data.crops:
        raise UserError(
            f"data.degradation = {data.degradation!r}: of stored patches {name!r} gets a low resolution that bicubic "
            "makes; give data.crops=16 data.augment=online"
        )
    scale = getattr(network, "scale", None)
    for key in ("scales", "val_scales"):
        if scale is not None and getattr(config.data, key) != [scale]:
            raise UserError(
                f"data.{key} = {getattr(config.data, key)} and model.scale = {scale}: the network {name!r} enlarges "
                f"by one scale; give data.scales=[{scale}] data.val_scales=[{scale}]"
            )


def _recorded(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration of the record that `from_record` names, but for this machine's folders and `overrides`."""
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
        recorded.pop("ckpt_path", None)  # it set aside what that run found; this one resumes itself
    base = {**cfg, "model": {}}  # another network's keys are none of this one's, nor are the loggers of now
    if isinstance(recorded.get("logger"), dict) and OmegaConf.is_dict(cfg.get("logger")):
        recorded["logger"] |= recorded.pop("logger_extra", None) or {}
        ours = {its.name for its in fields(LoggerConfig)}
        base["logger"] = {name: value for name, value in cfg.logger.items() if name in ours}
    merged = OmegaConf.merge(base, recorded)
    here = ["from_record", "data.root", "data.patches", "output"]
    for key in (*here, *asked):
        if key in ("experiment", "sweeps"):
            raise UserError(
                f"from_record and {key}: the record is the whole configuration; give single keys beside it"
            )
        if not key.startswith("hydra"):
            OmegaConf.update(merged, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    return merged
