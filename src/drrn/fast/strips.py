"""How much of an image goes through at a time: strips and tiles by the memory that is free."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import psutil
import torch

from drrn.fast.prepared import Prepared
from drrn.fast.stream import MAPS

ROOM = 1_000_000_000  # bytes that feature maps may take, when twice as many are free
WHOLE_BYTES = 80_000_000  # of one map on a CPU: a smaller image goes at once, with `freed_memory_kept`
STRIP_BYTES = 12_000_000  # of one map of a larger one: glibc keeps blocks below 32 MB by itself
STRIP_ROWS = 24  # or about so many, where a map of them is larger; two of each unit's 48 are computed twice
TILE_PIXELS = 1 << 24  # of the strip of an image that tiles make up


def free_room(device: torch.device) -> int:
    """Bytes that feature maps may take: half of the memory now free; on a CPU 1 GB at most."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if free < max(2 * ROOM, cached):
            torch.cuda.empty_cache()  # what PyTorch keeps for later
        return torch.cuda.mem_get_info(device)[0] // 2
    return min(ROOM, available_memory() // 2)


def at_once(ready: Prepared, shape: tuple[int, int], room: int) -> bool:
    """Whether an image [H, W] needs no strips."""
    return ready.maps * shape[0] * shape[1] * ready.pixel_bytes <= room


def most_rows(ready: Prepared, width: int, room: int) -> int:
    """Rows that may go through a stream at a time; 0 or less where what the layers keep needs more than `room`, or
    where rows come all at once.
    """
    if not ready.streams:
        return 0
    return (room // (width * ready.pixel_bytes) - _kept_rows(ready)) // MAPS


def _kept_rows(ready: Prepared) -> int:
    """Rows of a map that the layers keep, for each by which they lag: a unit four of its input, and four of an
    identity, two of them beside the new map that they are copied to. And some at the edges of the maps in work.
    """
    return 4 * ready.receptive_radius + 4 * MAPS


def strips(ready: Prepared, shape: tuple[int, int], room: int) -> list[tuple[int, int]]:
    """The rows (first, end) of an image [H, W] that go through a stream together: on a CPU, few enough to be fast.

    A map has at most WHOLE_BYTES, or else STRIP_BYTES, or STRIP_ROWS where those are more. The last strip is lower
    than the others, since with it every layer makes up for its lag.
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
    """(h, w) of equal tiles of an image [H, W], each computed within `room`, whichever way it is turned.

    At least twice the receptive radius: a tile computes at most four times what it adds.
    """
    (height, width), radius = shape, ready.receptive_radius
    if ready.streams:
        side = room // (ready.pixel_bytes * (MAPS * STRIP_ROWS + _kept_rows(ready))) - 2 * radius
    else:
        side = math.isqrt(room // (ready.pixel_bytes * ready.maps)) - 2 * radius
    least = max(TILE_PIXELS // width, 4 * radius)  # rows that the caller has in memory
    return _equal(height, max(min(side, least), 2 * radius)), _equal(width, max(side, 2 * radius))


def _equal(length: int, most: int) -> int:
    """The size of the fewest equal parts of at most so many."""
    return -(-length // -(-length // most))


def available_memory() -> int:
    """Bytes of memory that can still be had: of the machine, or of the control group if that allows less."""
    available = psutil.virtual_memory().available
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        return min(available, max(0, limit - used))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return available
