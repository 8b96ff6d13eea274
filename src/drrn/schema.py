"""Schemas: dataclasses whose fields have a key's type, limits and meaning, and the checker for all of them.

Every entry point has such a dataclass, with fields made by `key`; `typed` converts Hydra's configuration to it.
"""

from __future__ import annotations

import math
import operator
from dataclasses import field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from drrn.errors import UserError
from drrn.help import shown

T = TypeVar("T")
LARGEST = 2**32  # for integers; no key has a use for larger ones
WORDS = {bool: "true or false", float: "a number", int: "a whole number", str: "a text"}
ORDER = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt}


def key(meaning: str, default: Any = MISSING, **limits: Any) -> Any:
    """A field of a configuration.

    Args:
        meaning: for `--help` and readers of the schema.
        default: only for keys that earlier records lack; the others have their default in conf/ alone.
        limits: `at_least`, `above`, `below` (for each item of a list), `choices`, `distinct` (a non-empty list
            without duplicates), `keys` (a schema of the keys of a mapping, for `--help`).
    """
    return field(default=default, metadata={"meaning": meaning, **limits})


def typed(schema: type[T], cfg: DictConfig, group: str = "") -> T:
    """Convert a composed configuration to the dataclass `schema`, and check each key's limits.

    `group` is before each key's name in messages: "model.".

    Raises:
        UserError: an unknown key, a wrong type or a value out of range; it names the key.
    """
    try:
        _check_kinds(schema, cfg, group)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))
    except OmegaConfBaseException as error:
        raise UserError(f"{group}{_reason(error)}") from error
    _check_limits(config, group)
    return config


def _reason(error: OmegaConfBaseException) -> str:
    """An error of OmegaConf in our words: the key, what was given, what is needed."""
    where, inside = error.full_key or "configuration", error.object_type
    kinds = [get_type_hints(inside).get(error.key) if is_dataclass(inside) else error.ref_type]
    for kind in kinds:
        kinds += get_args(kind) if get_origin(kind) in (UnionType, Union, list) else ()
    needed = " or ".join(WORDS[kind] for kind in kinds if kind in WORDS)
    if needed and isinstance(error, ValidationError):
        return f"{where} = {shown(error.value)}: must be {needed}"
    words = {ConfigKeyError: "there is no such key", MissingMandatoryValue: "it is missing"}
    return f"{where}: {words.get(type(error)) or str(error).splitlines()[0]}"


def _check_kinds(schema: type, cfg: DictConfig, group: str) -> None:
    """Refuse what OmegaConf would accept, or refuse without the key's name: a number for a boolean, an empty string,
    nested lists, a scalar for a list, integers beyond `LARGEST`."""
    for name, kind in get_type_hints(schema).items():
        if name not in cfg or OmegaConf.is_missing(cfg, name):
            continue
        where, value = group + name, cfg[name]
        kind, *null = get_args(kind) if isinstance(kind, UnionType) else (kind,)  # X | None
        if value is None and (null or kind is Any):
            continue
        if (is_dataclass(kind) or get_origin(kind) is dict) and not OmegaConf.is_dict(value):
            raise UserError(f"{where} = {shown(value)}: must be a mapping, such as {{a: 1}}")
        if is_dataclass(kind):
            _check_kinds(kind, value, f"{where}.")
        if get_origin(kind) is list:
            if not OmegaConf.is_list(value):
                raise UserError(f"{where} = {shown(value)}: must be a list, {where}=[{value or '…'}]")
            if any(OmegaConf.is_config(item) for item in value):
                raise UserError(f"{where} = {value}: a plain list, without lists or mappings in it")
        if kind is bool and not isinstance(value, bool | str):
            raise UserError(f"{where} = {shown(value)}: must be {WORDS[bool]}")
        for item in value if OmegaConf.is_list(value) else [value]:
            if isinstance(item, str) and not item.strip():
                raise UserError(f"{where} = {value!r}: {'is' if item is value else 'one is'} empty")
            if isinstance(item, int) and kind is not float and abs(item) >= LARGEST:
                raise UserError(f"{where} = {value}: must be below {LARGEST}")


def _check_limits(config: Any, group: str) -> None:
    """Check each value against the limits of its `key`."""
    for its in fields(config):
        where, value, limits = group + its.name, getattr(config, its.name), its.metadata
        if is_dataclass(value):
            _check_limits(value, f"{where}.")
        if value is None or not limits:
            continue
        if "choices" in limits and value not in limits["choices"]:
            raise UserError(f"{where} = {value!r}: allowed are {', '.join(limits['choices'])}")
        if limits.get("distinct") and not value:
            optional = NoneType in get_args(get_type_hints(type(config))[its.name])
            raise UserError(f"{where} = []: give one or more values" + ", or null" * optional)
        if limits.get("distinct") and len(set(value)) < len(value):
            raise UserError(f"{where} = {value}: must be different values")
        for limit in (limit for limit in ORDER if limit in limits):
            for item in value if isinstance(value, list) else [value]:
                if item == math.inf:
                    raise UserError(f"{where} = {value}: must be a finite number")
                if not ORDER[limit](item, limits[limit]):
                    raise UserError(f"{where} = {value}: must be {limit.replace('_', ' ')} {limits[limit]}")


def plain(value: Any) -> Any:
    """Convert OmegaConf's lists and dicts to plain ones; other values are returned unchanged."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def paths(name: str, value: Any) -> list[str]:
    """The value of a key for one path, a list of paths or null, as a list; anything else is a UserError."""
    if value is None:
        return []
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in listed):
        raise UserError(f"{name} = {value}: must be a path, or a list of paths")
    return listed
