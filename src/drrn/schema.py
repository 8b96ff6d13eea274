"""Schemas: a key's type, limits and meaning beside each other, and the one checker that walks them.

Every entry point has a dataclass whose fields are made by `key`; `typed` turns what Hydra composed into it.
"""

from __future__ import annotations

import math
import operator
from dataclasses import field, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from drrn.errors import UserError

T = TypeVar("T")
LARGEST = 2**32  # of whole numbers: beyond it nothing here has a meaning
ORDER = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt}


def key(meaning: str, default: Any = MISSING, **limits: Any) -> Any:
    """A field of a configuration.

    Args:
        meaning: for who reads the schema.
        default: where conf/ gives none: of keys that earlier records do not have.
        limits: `at_least`, `above`, `below` (each item of a list), `choices`, `distinct` (a list of one or more,
            no item twice).
    """
    return field(default=default, metadata={"meaning": meaning, **limits})


def typed(schema: type[T], cfg: DictConfig) -> T:
    """A composed configuration as an instance of the dataclass `schema`, each value within its key's limits.

    An unknown key, a wrong type and a value out of range are a UserError by the key's name.
    """
    try:
        _check_kinds(schema, cfg)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))
    except OmegaConfBaseException as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{getattr(error, 'full_key', None) or 'configuration'}: {reason}") from error
    _check_limits(config)
    return config


def _check_kinds(schema: type, cfg: DictConfig, group: str = "") -> None:
    """What OmegaConf would take or refuse without a name: a number for a truth value, an empty text, lists inside
    lists or none at all, numbers beyond `LARGEST`."""
    for name, kind in get_type_hints(schema).items():
        if name not in cfg or OmegaConf.is_missing(cfg, name) or cfg[name] is None:
            continue
        where, value = group + name, cfg[name]
        kind = get_args(kind)[0] if isinstance(kind, UnionType) else kind  # X | None
        if is_dataclass(kind):
            if OmegaConf.is_dict(value):
                _check_kinds(kind, value, f"{where}.")
            continue
        if get_origin(kind) is dict and not OmegaConf.is_dict(value):
            raise UserError(f"{where} = {value}: must be a mapping, such as {{a: 1}}")
        if get_origin(kind) is list:
            if not OmegaConf.is_list(value):
                raise UserError(f"{where} = {value}: must be a list, {where}=[{value}]")
            if any(OmegaConf.is_config(item) for item in value):
                raise UserError(f"{where} = {value}: a plain list, without lists or mappings in it")
        if kind is bool and not isinstance(value, bool | str):
            raise UserError(f"{where} = {value}: must be true or false")
        for item in value if OmegaConf.is_list(value) else [value]:
            if isinstance(item, str) and not item.strip():
                raise UserError(f"{where} = {value!r}: {'is' if item is value else 'one is'} empty")
            if isinstance(item, int) and kind is not float and abs(item) >= LARGEST:
                raise UserError(f"{where} = {value}: must be below {LARGEST}")


def _check_limits(config: Any, group: str = "") -> None:
    """Each value against what `key` says of it."""
    for its in fields(config):
        where, value, limits = group + its.name, getattr(config, its.name), its.metadata
        if is_dataclass(value):
            _check_limits(value, f"{where}.")
        if value is None or not limits:
            continue
        if "choices" in limits and value not in limits["choices"]:
            raise UserError(f"{where} = {value!r}: allowed are {', '.join(limits['choices'])}")
        if limits.get("distinct") and not value:
            raise UserError(f"{where} = []: give one or more values" + ", or null" * ("None" in its.type))
        if limits.get("distinct") and len(set(value)) < len(value):
            raise UserError(f"{where} = {value}: must be different values")
        for limit in (limit for limit in ORDER if limit in limits):
            for item in value if isinstance(value, list) else [value]:
                if item == math.inf:
                    raise UserError(f"{where} = {value}: must be a finite number")
                if not ORDER[limit](item, limits[limit]):
                    raise UserError(f"{where} = {value}: must be {limit.replace('_', ' ')} {limits[limit]}")


def plain(value: Any) -> Any:
    """A value as JSON has it: lists and dicts, no longer OmegaConf's."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def paths(name: str, value: Any) -> list[str]:
    """A key that takes one path, a list of them or null, as a list; a UserError for something else."""
    if value is None:
        return []
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in listed):
        raise UserError(f"{name} = {value}: must be a path, or a list of paths")
    return listed
