"""Reading and repairing W&B's own files of a run."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb.proto.wandb_internal_pb2 import Record


def runs(folder: Path, wandb_id: str) -> list[Path]:
    """The W&B files of all legs of a run, oldest first."""
    place = folder / "wandb"
    found = [*place.glob(f"run-*-{wandb_id}/*.wandb"), *place.glob(f"offline-run-*-{wandb_id}/*.wandb")]
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))  # by their time


def messages(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The messages of a W&B file, each with the offset of its end, up to the first damaged or truncated one.

    The file is a LevelDB log: 32 KB blocks of fragments, each with CRC-32, length and kind (whole, first, middle,
    last). wandb 0.31 has a reader in Go only.
    """
    at, message = 7, b""  # the file's header has 7 bytes
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too little is left of the block for a fragment's header
            at += 32768 - at % 32768
            continue
        crc, length, kind = struct.unpack_from("<IHB", content, at)
        part = content[at + 7 : at + 7 + length]
        if len(part) < length or zlib.crc32(part, zlib.crc32(bytes([kind]))) != crc:
            return
        at += 7 + length
        message = part if kind in (1, 2) else message + part
        if kind in (1, 4):
            yield at, message


def records(path: Path) -> Iterator[Record]:
    """The records of a W&B file, as W&B's own `wandb_internal_pb2` defines them, up to the first damage."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    for _, message in messages(path.read_bytes()):
        try:
            yield Record.FromString(message)
        except DecodeError:
            return


def mend(path: Path) -> None:
    """Truncate an unfinished last message (process killed, disk full); rename the folder of a file without messages.

    `wandb sync` would stop at such a file, and upload none of the later legs.
    """
    content = path.read_bytes()
    whole = max((at for at, _ in messages(content)), default=0)
    if whole == 0:
        path.parent.rename(path.parent.with_name(f"empty-{path.parent.name}"))
    elif whole < len(content):
        os.truncate(path, whole)


def history(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a W&B file: step, {metric: value}."""
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            yield record.history.step.num, {key: value for key, value in row.items() if not key.startswith("_")}


def ended(path: Path) -> bool:
    """Whether a W&B file has the record of its run's exit."""
    return path.is_file() and any(record.WhichOneof("record_type") == "exit" for record in records(path))
