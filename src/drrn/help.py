"""`--help` of the commands, and one-line explanations of Hydra's errors.

`--help` prints a command's docstring with examples, its groups, and every key with its value and meaning. The
explanation of an error has a suggestion.
"""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from drrn.home import CONF, HOME

CONFIGS = {"train": "config", "prepare": "config"}  # the other commands' files have the command's name
GROUPS = {"train": None, "prepare": ("data",)}  # None: all of conf/ and sweeps/
ADDED = ("budget",)  # groups that no defaults list has
EXAMPLES = {"train": "model.B=3", "prepare": "data=demo", "evaluate": "method=bicubic", "report": "study=fig6"}


def command() -> str:
    """The command's name: `train` for src/train.py and for `drrn train`."""
    return Path(sys.argv[0]).stem.split()[-1]


def script(name: str) -> str:
    """A command in the form that this one was typed in: `python src/report.py` or `drrn report`."""
    return f"drrn {name}" if sys.argv[0].startswith("drrn ") else f"python src/{name}.py"


def show(about: str, schema: type, arguments: Sequence[str]) -> None:
    """Print the help of the running command: its docstring `about`, and its keys with the values of `arguments`."""
    name = command()
    cfg = composed(CONFIGS.get(name, name), [a for a in arguments if not a.startswith("-")])
    lines = [re.sub(r"python src/(\w+)\.py", lambda match: script(match[1]), about.strip()), ""]
    if groups := list(choices(name)):
        width = max(len(group) for group, _ in groups)
        lines += ["Groups (group=name):", *(f"  {group:{width}}  {', '.join(n)}" for group, n in groups), ""]
    lines.append("Keys (key=value; -m key=a,b for several):" if name == "train" else "Keys (key=value):")
    known = dict(meanings(schema)) | beside(cfg.hydra.runtime.choices)
    for key, value in flat(cfg):
        if name == "prepare" and not key.startswith("data."):
            continue  # prepare.py accepts every key of a training, but uses these only
        text = f"  {key}={shown(value)}"
        lines.append(f"{text:34}  # {known[key]}" if key in known else text)
    lines += ["", "Hydra's own options: --hydra-help. More: README.md, docs/, conf/."]
    print("\n".join(lines))


def composed(config: str, overrides: Sequence[str] = ()) -> Any:
    """Compose a command's configuration with Hydra."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(config, list(overrides), return_hydra_config=True)


def choices(name: str) -> Iterator[tuple[str, list[str]]]:
    """A command's config groups and the options of each."""
    wanted = GROUPS.get(name, ())
    for folder in [*sorted(Path(CONF).iterdir()), HOME / "sweeps"]:
        if folder.is_dir() and folder.name != "hydra" and (wanted is None or folder.name in wanted):
            yield folder.name, sorted(path.stem for path in folder.glob("*.yaml"))


def flat(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a configuration, as `model.B`, with its value; Hydra's own are left out."""
    for key in cfg:
        if key == "hydra":
            continue
        value = cfg._get_node(key)
        if OmegaConf.is_dict(value) and len(value):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", cfg[key] if not OmegaConf.is_interpolation(cfg, key) else value._value()


def shown(value: Any) -> str:
    """A value as it would be typed on the command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return "[" + ",".join(map(shown, value)) + "]" if OmegaConf.is_list(value) else str(value)


def beside(chosen: Mapping[str, Any]) -> dict[str, str]:
    """Comments on keys without a schema (of other networks, callbacks, loggers), from the chosen files of conf/."""
    found: dict[str, str] = {}
    for group in ("model", "callbacks", "logger"):
        names = chosen.get(group) or []
        for name in [names] if isinstance(names, str) else names:
            path, parent = Path(CONF) / group / f"{name}.yaml", group
            text = path.read_text() if path.is_file() else ""
            for indent, key, comment in re.findall(r"^( *)(\w+):(?:.*? # (.*)|.*)$", text, re.MULTILINE):
                where = f"{parent}.{key}" if indent else f"{group}.{key}"
                if not indent:
                    parent = where
                if comment:
                    found[where] = comment
    return found


def meanings(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a schema with its meaning and choices."""
    kinds = get_type_hints(schema)
    for its in fields(schema):
        kind = its.metadata.get("keys", kinds[its.name])
        if is_dataclass(kind):
            yield from meanings(kind, f"{prefix}{its.name}.")
        else:
            allowed = ", ".join(its.metadata.get("choices", ()))
            yield f"{prefix}{its.name}", ": ".join(filter(None, (its.metadata.get("meaning"), allowed)))


def closest(word: str, words: Iterable[str]) -> str:
    """`; did you mean model.B?` with the most similar of `words`, or ""."""
    by_small = {known.lower(): known for known in words}
    near = difflib.get_close_matches(word.lower(), by_small, n=1, cutoff=0.6)
    return f"; did you mean {by_small[near[0]]}?" if near else ""


def explained(error: Exception, arguments: Sequence[str]) -> str:
    """Explain an error of Hydra's in one line that says what to type."""
    from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException

    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals:
            return f"{error.override!r}: give KEY=VALUE, such as {EXAMPLES.get(command(), 'input=FILE')}"
        if value.endswith(","):
            return f"{error.override!r} ends in a comma: several values are typed without a space, {key}=a,b"
        quoted = value.replace('"', '\\"')
        typed = shlex.quote(f'{key}="{quoted}"')
        return (
            f"{error.override!r} has characters with a meaning in Hydra's grammar: quote the value once more, {typed}"
        )
    groups = dict(choices(command()))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if options := error.options or groups.get(group):
            return f"{group}={name}: allowed are {', '.join(options)}{closest(name, options)}"
    if isinstance(error, ConfigCompositionException):
        for argument in arguments:
            key = argument.partition("=")[0]
            if key in ADDED:
                return f"{argument}: no default has this group; add it with +{argument}"
            if key[:1] == "+" and key[1:] in groups and key[1:] not in ADDED:
                return f"{argument}: the group has a default, which is replaced by {argument[1:]}"
    several = [a for a in arguments if is_sweep(a)]
    if several and "-m" not in arguments and "--multirun" not in arguments:
        key, _, value = several[0].partition("=")
        return f"{several[0]}: several values make a sweep: add -m; a list is typed {key}=[{value}]"
    if isinstance(error.__cause__, ConfigKeyError | ConfigAttributeError):
        key, name = error.__cause__.full_key or "", command()
        chosen = [a for a in arguments if a.partition("=")[0] in groups and not is_sweep(a)]
        known = [*(k for k, _ in flat(composed(CONFIGS.get(name, name), chosen))), *groups]
        if "." not in key:  # model.b says `model.b`, modle.B only `modle`
            key = next((a.partition("=")[0] for a in arguments if a.startswith(f"{key}.")), key)
        if key.startswith("model.") and any(a.startswith("from_record=") for a in arguments):
            return f"{key}: DRRN has no such key; to change it in the record of another network, give +{key}=VALUE"
        return f"{key}: there is no such key{closest(key, known)} (`--help` lists them)"
    lines = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    return " ".join(" ".join(lines).split())


def unknown_option(arguments: Sequence[str]) -> str | None:
    """Explain `--max_steps 5`, for which argparse would print Hydra's own options; None if there is none."""
    from hydra._internal.utils import get_args_parser

    unknown = next((word for word in get_args_parser().parse_known_args(arguments)[1] if word.startswith("-")), None)
    example = EXAMPLES.get(command(), "input=FILE")
    return unknown and f"{unknown}: keys are given as KEY=VALUE, such as {example} (`--help` lists them)"


def is_sweep(argument: str) -> bool:
    """Whether `key=a,b` gives several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(argument).is_sweep_override()
    except HydraException:
        return False


def unnamed_group(arguments: Sequence[str]) -> str | None:
    """Explain `model=5`, a group without a name, for which Hydra raises a ValueError; None if there is none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    groups = dict(choices(command()))
    for override in OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("-")]):
        if override.key_or_group in groups and not isinstance(override.value(), str | list):
            return f"{override.input_line}: must be one of {', '.join(groups[override.key_or_group])}"
    return None
