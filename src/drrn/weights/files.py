"""A weight file's bytes, the kind of their container, and the content of a foreign file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from drrn.disk import check_regular
from drrn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 1 << 30  # bytes of a file; the paper's largest network, B17U1, takes 30 MB
LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # pytorch/pytorch: torch/serialization.py
OVERSHOOT = "no ReLU before the first convolution: negative overshoot of the bicubic input is kept"


class Foreign(NamedTuple):
    """The content of a foreign file, in our terms."""

    model: dict[str, Any]  # the network's structure, `config.in_full`
    state: dict[str, Tensor]  # the network's state dict, not yet checked against the structure
    origin: str
    scales: list[int]  # of its training; empty if unknown
    notes: list[str]  # for the user


def read_bytes(path: Path) -> bytes:
    """A whole file; a UserError if it is missing, unreadable, no regular file or larger than `LIMIT`."""
    check_regular(path, LIMIT)  # /dev/zero never ends, and a FIFO may never begin
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def container(data: bytes) -> str:
    """The container, by its first bytes: "zip" and "legacy" (torch's two), "safetensors", "matlab", else "protobuf".

    A known container without a reader is a ValueError.
    """
    if data[:4] == b"PK\x03\x04":
        return "zip"
    if data[:1] == b"\x80" and LEGACY_MAGIC in data[:32]:
        return "legacy"
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS, not the file itself: git lfs pull")
    if data[257:262] == b"ustar":
        raise ValueError("it is torch's container of 2016 (a tar); load and save it with torch 0.2 to 2.5 first")
    if data[:8] == b"\x89HDF\r\n\x1a\n" or data[:10] == b"MATLAB 7.3":
        raise ValueError("it is HDF5 (MATLAB's -v7.3, or Keras's); in MATLAB: save -v7 FILE model")
    if data[:6] == b"MATLAB" and data[126:128] in (b"IM", b"MI"):
        return "matlab"
    if 2 <= int.from_bytes(data[:8], "little") <= len(data) - 8 and data[8:9] == b"{":
        return "safetensors"
    return "protobuf"


def safetensors_header(data: bytes) -> dict[str, Any]:
    """The tensors' places by name, and as `__metadata__` texts by name; a ValueError or TypeError if damaged."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {"__metadata__": {}, **header}
