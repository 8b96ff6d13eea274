"""Classes that a configuration names: `{_target_: package.Class, argument: value, …}`.

What somebody brings along (a callback, a logger, a solver of another library) is named so. It is resolved to a class
of the right kind before anything is called, and arguments are plain values: nothing else in them is looked up.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from drrn.errors import UserError

TRUSTED = ("lightning.", "torch.")  # packages whose classes are taken from a record too
OF_OUR_SOLVERS = ("algorithm", "momentum", "weight_decay")  # keys of `optim` without a meaning for another's solver


def check_node(name: str, node: Any) -> str:
    """The `_target_` of a node, a UserError where it names no class of an installed package; nothing is imported."""
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
        node: what the configuration holds there.
        kind: what the class has to be a subclass of.

    Raises:
        UserError: no `_target_`, nothing of that name, another kind of class, a `_target_` among the arguments.
    """
    path = check_node(name, node)
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{name}._target_ = {path!r}: there is no such class ({error})") from error
    if not isinstance(found, type) or not issubclass(found, kind):
        raise UserError(f"{name}._target_ = {path!r}: is no {kind.__module__}.{kind.__name__}")
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    if nested := list(targets(arguments)):
        raise UserError(f"{name}: _target_ = {nested[0]!r} among the arguments of another; give plain values")
    return found, arguments


def make(name: str, node: Any, kind: type, *first: Any, **more: Any) -> Any:
    """An object of a node; `first` come before its arguments, `more` are taken where it gives none.

    Errors as of `resolve`, and a UserError where the class does not take the arguments.
    """
    found, arguments = resolve(name, node, kind)
    try:
        return found(*first, **{**more, **arguments})
    except Exception as error:  # of anybody's class
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
    """Refuse what a record names but Lightning's and torch's: it is a file of somebody's, and an import runs code."""
    for path in targets(recorded):
        if not isinstance(path, str) or not path.startswith(TRUSTED):
            raise UserError(
                f"{name}: the record names {path!r}; only classes of lightning and torch are taken from a record. "
                "Give it on the command line"
            )
