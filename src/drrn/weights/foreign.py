"""Weights that others trained, read without running any code from their files.

Their form is recognised by content: "caffe", "matlab", or one of `PORTS`, as safetensors or as a pickle in one of
torch's two containers.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load as load_safetensors

from drrn.errors import UserError
from drrn.weights.caffe import caffe_layers, read_caffe
from drrn.weights.files import Foreign, container, read_bytes, safetensors_header
from drrn.weights.matlab_file import read_vdsr
from drrn.weights.pickles import is_lightning, named_tensors, read_tensors, read_torch
from drrn.weights.ports import PORTS, Said

WHOLE = {"caffe": read_caffe, "matlab": read_vdsr}  # form → its reader of (bytes, U)
FORMS = (*WHOLE, *PORTS)


def recognise(path: Path) -> str:
    """A weight file's form, by its content: "drrn" for this project's own, or one of `FORMS`; else a UserError."""
    data = read_bytes(path)
    try:
        kind = container(data)
        if kind == "matlab":
            return "matlab"
        if kind == "protobuf":
            try:
                caffe_layers(data)
            except ValueError as error:
                raise ValueError(f"neither torch's nor safetensors, and as Caffe's protobuf: {error}") from error
            return "caffe"
        if kind == "safetensors":
            header = safetensors_header(data)
            own, names = "drrn" in header["__metadata__"], header.keys() - {"__metadata__"}
        else:
            root = read_torch(data)
            own = is_lightning(root)
            names = set() if own else set(named_tensors(root))
        if own:
            return "drrn"
        strange = {form: sorted(n for n in names if not re.fullmatch(its.names, n)) for form, its in PORTS.items()}
        nearest = min(strange, key=lambda form: len(strange[form]))
        if names and not strange[nearest]:
            return nearest
        if len(strange[nearest]) < len(names):
            raise ValueError(f"most of its tensors are named as in {nearest}, but not {strange[nearest][0][:80]!r}")
        some = ", ".join(repr(name[:40]) for name in sorted(names)[:4])
        raise ValueError(f"its tensors ({some}, …) are named as in none of {', '.join(PORTS)}")
    except Exception as error:  # zipfile, struct and torch raise many kinds for a damaged file
        raise UserError(f"{path} is not a weight file that is known here: {error}") from error


def read_foreign(path: Path, form: str, U: int | None = None, scales: list[int] | None = None) -> Foreign:
    """Read a foreign file.

    Args:
        path, form: the file and one of `FORMS`.
        U: residual units per block, which shared weights do not show; None: from a file name with B1U25.
        scales: of an FSRCNN, whose weights do not show it; None: from a file name with scale3.

    Raises:
        UserError: the file is damaged, hostile or not of this form, or U or the scale is unknown.
    """
    data = read_bytes(path)
    try:
        if form in WHOLE:
            return WHOLE[form](data, U)
        if container(data) == "safetensors":
            tensors = load_safetensors(data)
        else:
            tensors = read_tensors(named_tensors(read_torch(data)))
        for name in tensors:
            if not re.fullmatch(PORTS[form].names, name):
                raise ValueError(f"its tensor {name[:80]!r} is not one of that form")
        return PORTS[form].read(tensors, Said(path.stem, U, scales))
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path} cannot be read as {form}: {error} is missing") from error
    except Exception as error:  # as above
        raise UserError(f"{path} cannot be read as {form}: {error}") from error
