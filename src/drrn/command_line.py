"""`drrn train`, `drrn upscale`, …: the scripts of src/ as one installed command.

Its arguments are those of the script, `key=value`. `drrn upscale` also accepts file names and `--key value`:

    drrn upscale photo.jpg -x 2
    drrn upscale holidays -x 3 -c weights.safetensors -o large --compare
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from typing import get_type_hints

from hydra.core.override_parser.types import Quote, QuotedString

from drrn import __version__
from drrn.help import closest
from drrn.launch import launch

COMMANDS = {
    "train": "train a network, or a grid of them",
    "evaluate": "score bicubic and networks on image sets",
    "upscale": "enlarge photographs",
    "convert": "read weights from elsewhere, write ours for others",
    "report": "tables, figures and pictures from what was run",
    "prepare": "fetch the images and build the patch file",
}
SHORT = {"-x": "scale", "-o": "output", "-c": "checkpoint"}
KEY = re.compile(r"[+~]*[\w./@-]+=")
OPTION = re.compile(r"(-x(?=[\d.])|-[xoc](?==|$)|--[\w-]*|)=?(.*)", re.DOTALL)  # -x2 and --scale=2 hold their value


def main() -> None:
    """Run the command named by the first argument."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name == "--version":
        print(f"drrn {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        if name not in ("-h", "--help"):
            print(f"drrn: there is no command {name!r}{closest(name, COMMANDS)}\n", file=sys.stderr)
        lines = "\n".join(f"  drrn {command:9} {what}" for command, what in COMMANDS.items())
        print(f"{lines}\n\n`drrn train --help` shows a command's keys and examples.")
        sys.exit(0 if name in ("-h", "--help") else 2)
    # pyproject.toml installs src/NAME.py as drrn.commands.NAME; in a clone src/ is on the path.
    installed = importlib.util.find_spec("drrn.commands") is not None
    module = importlib.import_module(f"drrn.commands.{name}" if installed else name)
    if name == "upscale":
        arguments = plain_words(arguments, module.KEYS)
    sys.argv = [f"drrn {name}", *arguments]
    launch(module.main)


def plain_words(arguments: Sequence[str], schema: type) -> list[str]:
    """Convert `photo.jpg -x 2 -o big.png` to `input=photo.jpg scale=2 output=big.png`; `key=value` is kept."""
    inputs, keys, rest, kinds = [], [], list(arguments), get_type_hints(schema)
    while rest:
        word = rest.pop(0)
        option, value = OPTION.fullmatch(word).groups()
        key = SHORT.get(option, option[2:].replace("-", "_"))
        if os.path.lexists(word):  # a photograph may be called a=b.png or -1.png; a long list is no path
            inputs.append(word)
        elif kinds.get(key) is bool:
            keys.append(f"{key}={value or 'true'}")
        elif key in kinds and (value or rest):
            keys.append(f"{key}={quoted(value or rest.pop(0))}")
        elif word.startswith("-") or KEY.match(word):
            keys.append(word)
        else:
            inputs.append(word)
    if len(inputs) == 1:
        return [f"input={quoted(inputs[0])}", *keys]
    return [f"input=[{','.join(map(quoted, inputs))}]", *keys] if inputs else keys


def quoted(word: str) -> str:
    """Quote a word for the grammar of Hydra's command line."""
    return QuotedString(word, Quote.single).with_quotes()
