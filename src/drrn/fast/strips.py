"""Dividing an image into strips and tiles that fit the free memory."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import psutil
import torch

from drrn.fast.prepared import Prepared
from drrn.fast.stream import MAPS

ROOM = 1_000_000_000  # maximum bytes of feature maps on a CPU; at most half of the free memory is used
WHOLE_BYTES = 80_000_000  # of a feature map on a CPU: up to this size an image is not divided
STRIP_BYTES = 12_000_000  # of a strip's feature map: glibc reuses blocks below 32 MB by itself
STRIP_ROWS = 24  # minimum, also above STRIP_BYTES; of the 48 rows of a unit's two convolutions 2 are computed twice
TILE_PIXELS = 1 << 24  # of a row of tiles, which the caller has in memory


def free_room(device: torch.device) -> int:
    """Bytes that feature maps may take: half of the memory now free; on a CPU 1 GB at most."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if free < max(2 * ROOM, cached):
            torch.cuda.empty_cache()  # PyTorch's cached blocks
        return torch.cuda.mem_get_info(device)[0] // 2
    return min(ROOM, available_memory() // 2)


def at_once(ready: Prepared, shape: tuple[int, int], room: int) -> bool:
    """Whether an image [H, W] needs no strips."""
    return ready.maps * shape[0] * shape[1] * ready.pixel_bytes <= room


def most_rows(ready: Prepared, width: int, room: int) -> int:
    """Maximum rows of a strip; 0 or less if the layers' kept rows exceed `room`, or if rows must come all at once."""
    if not ready.streams:
        return 0
    return (room // (width * ready.pixel_bytes) - _kept_rows(ready)) // MAPS


def _kept_rows(ready: Prepared) -> int:
    """Rows of feature maps that all layers keep, at most. A unit, which lags two rows, keeps four rows of its input
    and four of an identity, two of which are copied. 4 · MAPS are for the edges of the maps being computed.
    """
    return 4 * ready.receptive_radius + 4 * MAPS


def strips(ready: Prepared, shape: tuple[int, int], room: int) -> list[tuple[int, int]]:
    """Divide an image [H, W] into strips (first, end): on a CPU, small enough to be fast.

    A feature map of a strip has at most STRIP_BYTES, but at least STRIP_ROWS; an image of at most WHOLE_BYTES is not
    divided. The last strip is lower than the others, since with it every layer makes up for its lag.
    """
    height, width = shape
    rows, on_cpu = most_rows(ready, width, room), ready.device.type == "cpu"
    small = height * width * ready.pixel_bytes <= WHOLE_BYTES
    if not ready.streams or (at_once(ready, shape, room) and (small or not on_cpu or rows < STRIP_ROWS)):
        return [(0, height)]
    if on_cpu:
        rows = min(rows, STRIP_BYTES // (width * ready.pixel_bytes))
    rows = max(rows, STRIP_ROWS)
    if height <= rows:
        return [(0, height)]
    rest = height - max(rows - ready.receptive_radius, 1)
    return list(itertools.pairwise([*range(0, rest, _equal(rest, rows)), rest, height]))


def tile_shape(ready: Prepared, shape: tuple[int, int], room: int) -> tuple[int, int]:
    """(h, w) of equal tiles of an image [H, W], each computed within `room` bytes, transposed or not.

    A side is at least twice the receptive radius, so that with its margin a tile has at most four times its own area.
    """
    (height, width), radius = shape, ready.receptive_radius
    if ready.streams:
        side = room // (ready.pixel_bytes * (MAPS * STRIP_ROWS + _kept_rows(ready))) - 2 * radius
    else:
        side = math.isqrt(room // (ready.pixel_bytes * ready.maps)) - 2 * radius
    least = max(TILE_PIXELS // width, 4 * radius)  # rows that the caller has in memory
    return _equal(height, max(min(side, least), 2 * radius)), _equal(width, max(side, 2 * radius))


def _equal(length: int, most: int) -> int:
    """The length of equal parts of at most `most`, as few as possible."""
    return -(-length // -(-length // most))


def available_memory() -> int:
    """Bytes of available memory: the machine's, or the control group's if that is less."""
    available = psutil.virtual_memory().available
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        return min(available, max(0, limit - used))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return available
