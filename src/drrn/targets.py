"""Classes named in a configuration: `{_target_: package.Class, argument: value, …}`.

Callbacks, loggers and solvers of other libraries are named so. A `_target_` is resolved to a subclass of the right
base class before anything is called; its arguments are plain values, without further `_target_`s.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from drrn.errors import UserError

TRUSTED = ("lightning.", "torch.")  # packages whose classes a record may name
OF_OUR_SOLVERS = ("algorithm", "momentum", "weight_decay")  # keys of `optim` that other libraries' solvers ignore


def check_node(name: str, node: Any) -> str:
    """The `_target_` of a node; a UserError if it cannot be a class of an installed package. Nothing is imported."""
    path = node.get("_target_") if isinstance(node, Mapping) else None
    package, *rest = path.split(".") if isinstance(path, str) else [""]
    if not rest or not all(map(str.isidentifier, (package, *rest))):
        raise UserError(f"{name} = {node}: must name a class and its arguments, {{_target_: package.Class, …}}")
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise UserError(f"{name}._target_ = {path!r}: there is no such class (no package {package!r} is installed)")
    return path


def resolve(name: str, node: Any, kind: type) -> tuple[type, dict[str, Any]]:
    """(class, arguments) of a node.

    Args:
        name: of the key, for messages.
        node: the key's value.
        kind: the required base class.

    Raises:
        UserError: no `_target_`, no such class, no subclass of `kind`, or a `_target_` among the arguments.
    """
    path = check_node(name, node)
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{name}._target_ = {path!r}: there is no such class ({error})") from error
    if not isinstance(found, type) or not issubclass(found, kind):
        raise UserError(f"{name}._target_ = {path!r}: it is no {kind.__module__}.{kind.__name__}")
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    if nested := list(targets(arguments)):
        raise UserError(f"{name}: _target_ = {nested[0]!r} among the arguments of another; give plain values")
    return found, arguments


def make(name: str, node: Any, kind: type, *first: Any, **more: Any) -> Any:
    """Instantiate the class of a node, with `first` before its arguments and defaults `more` for them.

    Errors: those of `resolve`, and a UserError if the constructor raises.
    """
    found, arguments = resolve(name, node, kind)
    try:
        return found(*first, **{**more, **arguments})
    except Exception as error:  # the constructor of any library
        raise UserError(f"{name}: {node['_target_']} does not take these arguments: {error}") from error


def targets(node: Any) -> Iterator[Any]:
    """Every `_target_` in nested mappings and lists."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from targets(value)


def check_trusted(name: str, recorded: Any) -> None:
    """Refuse classes in a record that are not Lightning's or torch's: imports run code, and it may be anybody's."""
    for path in targets(recorded):
        if not isinstance(path, str) or not path.startswith(TRUSTED):
            raise UserError(
                f"{name}: the record names {path!r}; only classes of lightning and torch are accepted from a record. "
                "Give it on the command line"
            )
