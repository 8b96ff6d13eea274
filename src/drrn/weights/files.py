"""A weight file's bytes and what kind of container they are."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from drrn.config import ModelConfig
from drrn.errors import UserError

LIMIT = 1 << 30  # bytes of a file; the paper's largest network, B17U1, takes 30 MB


class Foreign(NamedTuple):
    """What a foreign file holds, in our terms."""

    form: str
    model: ModelConfig
    state: dict[str, Tensor]  # the state dict of DRRN(**model), not yet checked against it
    origin: str
    scales: list[int]  # that it was trained for; empty if nobody says
    notes: list[str]  # what its reader should know


def read_bytes(path: Path) -> bytes:
    """A whole file.

    Raises:
        UserError: it is missing, unreadable or larger than `LIMIT`.
    """
    try:
        size = path.stat().st_size
        if size > LIMIT:
            raise UserError(f"{path} has {size:,} bytes: no network of this family needs more than {LIMIT:,}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def container(data: bytes) -> str:
    """By the first bytes: "zip" and "legacy" (torch's two), "safetensors", else "protobuf"."""
    if data[:4] == b"PK\x03\x04":
        return "zip"
    if data[:1] == b"\x80" and LEGACY_MAGIC in data[:32]:
        return "legacy"
    if data[257:262] == b"ustar":
        raise ValueError("it is torch's container of 2016 (a tar); load and save it with torch 0.2 to 2.5 first")
    if 2 <= int.from_bytes(data[:8], "little") <= len(data) - 8 and data[8:9] == b"{":
        return "safetensors"
    return "protobuf"


# ---------------------------------------------------------------------------------------- torch's containers
# pytorch/pytorch: torch/serialization.py; opcodes: Python's pickletools.

LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
