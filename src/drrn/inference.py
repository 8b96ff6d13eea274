"""Running a trained network on whole images: any size, in bounded memory, as fast as is simple.

What the speed is made of (CPU, 128 features; `Folded` gives the same output to rounding):

- BatchNorm disappears. Before its ReLU it is an affine map a channel; where the tensor in front of it is needed
  nowhere else it is folded into the convolution that made that tensor, and into the identity added there.
- The sum and the ReLU that follow a convolution run inside it (oneDNN post-ops), while its result is in cache.
  Elsewhere (CUDA, a CPU without oneDNN) they run in place after it.
- Channels last, weights in oneDNN's own order, three feature maps in work at any time.
- An image goes through in strips, and each layer keeps the rows that it needs again (`Stream`): maps small enough
  that memory need not be had from the kernel afresh (`machine.keep_heap`), and no overlap to compute twice.

Further ideas belong into `Convolution` (another kernel) or `Stream` (another order of work); everything above them
divides images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from drrn.fast.folded import Folded
from drrn.fast.stream import Stream
from drrn.fast.strips import (
    LOW_STRIP_BYTES,
    STRIP_BYTES,
    STRIP_ROWS,
    at_once,
    free_room,
    most_rows,
    strips,
    tile_shape,
)
from drrn.images import orientations
from drrn.model import DRRN


def super_resolve(
    network: DRRN,
    x: NDArray[np.floating],
    tile: int | None = None,
    self_ensemble: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """The network's estimate of an image of any size; in parts when it is large, with the same result.

    Args:
        network: on any device; BatchNorm uses its running statistics whatever mode the network is in.
        x: interpolated luminance [H, W], 0…1.
        tile: side in pixels of what a tile adds to the result; it is computed with `receptive_radius` more
            pixels on every side that is not a border of the image. None: strips as wide as the image, which need
            no such overlap, or large tiles where there is no memory for them or the image is turned.
        self_ensemble: average the results for the 8 orientations of the image; takes 8 times as long.
        progress: called with (parts done, parts in all), first with 0.

    Returns:
        [H, W], not clamped. The division changes it by rounding only (1e-5).

    Raises:
        ValueError: `x` is not [H, W] with at least one pixel, or `tile` is below 1.
    """
    x = np.asarray(x)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"x is [H, W] with at least one pixel, not {x.shape}")
    result, top = np.empty(x.shape, np.float32), 0
    for strip in super_resolve_strips(network, lambda a, b: x[a:b], x.shape, tile, self_ensemble, progress):
        result[top : top + len(strip)] = strip
        top += len(strip)
    return result


def super_resolve_strips(
    network: DRRN,
    rows: Callable[[int, int], NDArray[np.floating]],
    shape: tuple[int, int],
    tile: int | None = None,
    self_ensemble: bool = False,
    progress: Callable[[int, int], None] | None = None,
    room: int | None = None,
) -> Iterator[NDArray[np.float32]]:
    """`super_resolve` for an image that is never in memory as a whole.

    Args:
        network, tile, self_ensemble, progress: as in `super_resolve`.
        rows: called with (first, last + 1), gives those rows of the interpolated luminance [rows, W], 0…1, from
            the top. With tiles, neighbouring calls overlap by twice the receptive radius.
        shape: (H, W) of the whole.
        room: bytes that feature maps may take; None: `free_room`.

    Yields:
        Strips [h, W] of the result, from the top.

    Raises:
        ValueError: `tile` is below 1.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"tile = {tile}: a tile has at least 1 pixel")
    room = free_room(network) if room is None else room
    fits = at_once(network, shape, room) or most_rows(network, shape[1], room) >= STRIP_ROWS
    streams = tile is None and not self_ensemble and fits
    folded, progress = Folded(network), progress or (lambda done, total: None)
    if streams:
        yield from _stream(folded, rows, shape, strips(network, shape, room), progress)
        return

    def whole(x: NDArray[np.floating]) -> NDArray[np.float32]:
        parts = strips(network, x.shape, room, LOW_STRIP_BYTES if tile else STRIP_BYTES)
        return np.concatenate(list(_stream(folded, lambda a, b: x[a:b], x.shape, parts, lambda a, b: None)))

    (height, width), radius = shape, network.receptive_radius
    tile_height, tile_width = (tile, tile) if tile else tile_shape(network, shape, room)
    tops, lefts = range(0, height, tile_height), range(0, width, tile_width)
    done, total = 0, len(tops) * len(lefts)
    progress(done, total)
    for top in tops:
        bottom = min(top + tile_height, height)
        above, below = max(top - radius, 0), min(bottom + radius, height)
        x = np.asarray(rows(above, below), dtype=np.float32)
        strip = np.empty((bottom - top, width), np.float32)
        for left in lefts:
            right = min(left + tile_width, width)
            before, after = max(left - radius, 0), min(right + radius, width)
            region = x[:, before:after]
            y = ensemble(whole, region) if self_ensemble else whole(region)
            strip[:, left:right] = y[top - above : bottom - above, left - before : right - before]
            done += 1
            progress(done, total)
        yield strip


def _stream(
    folded: Folded,
    rows: Callable[[int, int], NDArray[np.floating]],
    shape: tuple[int, int],
    parts: list[tuple[int, int]],
    progress: Callable[[int, int], None],
) -> Iterator[NDArray[np.float32]]:
    """An image in strips of its whole width, rows (first, end) of it at a time."""
    stream = Stream(folded, shape[0])
    progress(0, len(parts))
    for done, (first, end) in enumerate(parts, start=1):
        x = torch.from_numpy(np.array(rows(first, end), np.float32))
        y = stream(x.to(folded.device, folded.dtype)[None, None])[0, 0].float().cpu().numpy()
        progress(done, len(parts))
        if len(y):
            yield y


def ensemble(whole: Callable[[NDArray], NDArray], x: NDArray[np.floating]) -> NDArray[np.float32]:
    """The mean of `whole` over the 8 orientations, each turned back [h, w] → [h, w]."""
    total = np.zeros(x.shape, np.float64)
    for o, turned in enumerate(orientations(x)):
        y = whole(turned)
        total += np.rot90(np.fliplr(y) if o >= 4 else y, -(o % 4))
    return (total / 8).astype(np.float32)
