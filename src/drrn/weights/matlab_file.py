"""MATLAB's files (v5 to v7): the parts that networks need.

Format: MathWorks, "MAT-File Format" (R2023a), chapter 1. `scipy.io.loadmat` allocates the size that an array
declares (2.3 GB for a file of 184 bytes, measured); this reader first checks every size against the file's bytes.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drrn.config import in_full
from drrn.weights.caffe import path_of_layers
from drrn.weights.files import OVERSHOOT, Foreign

NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}  # mi… types
MATRIX, COMPRESSED = 14, 15
CELL, STRUCT, DOUBLE, UINT64 = 1, 2, 6, 15  # mx… classes; DOUBLE to UINT64 are arrays of numbers
COMPLEX = 0x08  # a bit of an array's flags
DEEPEST = 10  # levels of cells and structs
INFLATION = 64  # the largest ratio; weights hardly compress, but zlib can inflate a byte to a thousand


class Reader:
    """Parses a file's elements (type, bytes) in its byte order."""

    def __init__(self, order: str, size: int) -> None:
        self.order = order  # "<" or ">"
        self.room = INFLATION * size + 1  # bytes left for inflated elements

    def integers(self, data: memoryview, kind: str = "u4") -> list[int]:
        """Parse bytes as integers."""
        return np.frombuffer(data, self.order + kind).tolist()

    def elements(self, data: memoryview) -> list[tuple[int, memoryview]]:
        """Parse bytes as a sequence of elements; compressed ones are inflated."""
        found, at = [], 0
        while len(data) - at >= 8:
            kind, size = self.integers(data[at : at + 8])
            start = at + 8
            if kind >> 16:  # small: type and size share a word, and four bytes of data follow
                kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
                at += 8
            else:
                at = start + size + (-size % 8) * (kind != COMPRESSED)
            if start + size > len(data) or len(found) > 100_000:
                raise ValueError("an element reaches beyond its end: truncated or damaged")
            content = data[start : start + size]
            found += self.elements(self._inflate(content)) if kind == COMPRESSED else [(kind, content)]
        return found

    def _inflate(self, data: memoryview) -> memoryview:
        inflater = zlib.decompressobj()
        content = inflater.decompress(data, self.room)
        self.room -= len(content)
        if self.room <= 0 or not inflater.eof:
            raise ValueError(f"it is truncated, or inflates to more than {INFLATION} times its size")
        return memoryview(content)

    def matrix(self, data: memoryview, depth: int = 0) -> tuple[str, Any]:
        """miMATRIX → (name, value): an array of numbers, a list for a cell, a dict for a struct."""
        parts = self.elements(data)
        if len(parts) < 3 or depth > DEEPEST:
            raise ValueError("an array without shape or name, or too deep")
        (_, flags), (_, sides), (_, title), *rest = parts
        flags, shape = self.integers(flags)[0], self.integers(sides, "i4")
        name, count, kind = bytes(title).decode("latin-1"), math.prod(shape), flags & 0xFF
        if not 2 <= len(shape) <= 8 or min(shape) < 0:
            raise ValueError(f"array {name[:40]!r} has an impossible shape")
        if kind == CELL:
            if count != len(rest):
                raise ValueError(f"cell {name[:40]!r} declares {count:,} items and holds {len(rest):,}")
            return name, self._inner(rest, depth)
        if kind == STRUCT and count == 1 and len(rest) >= 2:
            length, text = self.integers(rest[0][1], "i4")[0], bytes(rest[1][1])
            if length < 1 or len(text) // length != len(rest) - 2:
                raise ValueError(f"struct {name[:40]!r} has different numbers of fields and names")
            names = [text[i : i + length].split(b"\0")[0].decode("latin-1") for i in range(0, len(text), length)]
            return name, dict(zip(names, self._inner(rest[2:], depth), strict=True))
        if not DOUBLE <= kind <= UINT64 or not rest or rest[0][0] not in NUMBERS:
            raise ValueError(f"{name[:40]!r} is no array of numbers, no cell, no single struct: not read here")
        if flags >> 8 & COMPLEX:
            raise ValueError(f"array {name[:40]!r} is complex; weights are real")
        values = np.frombuffer(rest[0][1], self.order + NUMBERS[rest[0][0]])
        if len(values) != count:
            raise ValueError(f"array {name[:40]!r} declares {shape} and holds {len(values):,} values")
        return name, values.reshape(shape, order="F")

    def _inner(self, parts: list[tuple[int, memoryview]], depth: int) -> list[Any]:
        if any(kind != MATRIX for kind, _ in parts):
            raise ValueError("an item of a cell or a struct is no array")
        return [self.matrix(data, depth + 1)[1] for _, data in parts]


def read_variables(data: bytes) -> dict[str, Any]:
    """The variables of a file by name: arrays (Fortran order), lists for cells, dicts for structs.

    Raises:
        ValueError: the file is damaged, a size exceeds its bytes, or a variable is no data.
    """
    reader = Reader("<" if data[126:128] == b"IM" else ">", len(data))
    try:
        parts = reader.elements(memoryview(data)[128:])
        return dict(reader.matrix(part) for kind, part in parts if kind == MATRIX)
    except (IndexError, zlib.error) as error:
        raise ValueError(f"a damaged MATLAB file ({error})") from error


def read_vdsr(data: bytes, U: int | None) -> Foreign:
    """Read the VDSR of its authors (J. Kim et al., CVPR 2016): struct `model` with the cells `weight` and `bias`.

    A layer's filters are [3, 3, in, out] and its biases [out, 1]. MATLAB's convolution layers (MatConvNet)
    correlate, as torch does. There is no ReLU before the first layer.
    """
    if U:
        raise ValueError(f"it is a VDSR, which has U = 0, not {U}")
    found = read_variables(data)
    model = found.get("model")
    if not isinstance(model, dict) or not all(isinstance(model.get(key), list) for key in ("weight", "bias")):
        some = ", ".join(repr(name[:40]) for name in list(found)[:4])
        raise ValueError(f"it holds {some or 'nothing'}, not a struct `model` with the cells `weight` and `bias`")
    weights, biases = model["weight"], model["bias"]
    if len(weights) < 2 or len(biases) != len(weights):
        raise ValueError(f"it has {len(weights)} weights and {len(biases)} biases; a VDSR has two layers or more")
    state: dict[str, Tensor] = {}
    names = (conv for _, conv, _ in path_of_layers(len(weights) - 1, 0, True))
    for i, (conv, weight, bias) in enumerate(zip(names, weights, biases, strict=True), start=1):
        if not isinstance(weight, np.ndarray) or not isinstance(bias, np.ndarray):
            raise ValueError(f"layer {i} holds no arrays")
        filters = weight.reshape(*weight.shape, *[1] * (4 - weight.ndim))  # MATLAB drops last axes of 1
        if filters.ndim != 4 or filters.shape[:2] != (3, 3):
            raise ValueError(f"layer {i} has filters of {list(weight.shape)}; [3, 3, in, out] is needed")
        state[f"{conv}.weight"] = torch.from_numpy(np.array(filters.transpose(3, 2, 0, 1), np.float32, order="C"))
        state[f"{conv}.bias"] = torch.from_numpy(np.array(bias.ravel(), np.float32))
    structure = {
        "B": len(weights) - 1, "U": 0, "features": len(state["blocks.0.conv.weight"]), "norm": "none", "bias": True,
        "weight_sharing": True, "multi_path": True, "input_relu": False,
    }  # fmt: skip
    return Foreign(in_full(structure), state, "VDSR of its authors (MATLAB)", [2, 3, 4], [OVERSHOOT])
