"""Super-resolving whole images with any network: any size, in bounded memory.

`drrn.fast.prepared` prepares a network, folded if `FOLDINGS` has its class; this module divides images. A folded
network processes an image in strips of its whole width, and each layer keeps the rows that it needs again, so almost
nothing is computed twice. Any other network processes a large image in tiles that overlap by its receptive radius,
and so does a folded one if tiles are requested or memory is short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from drrn.fast.memory import freed_memory_kept
from drrn.fast.precision import chosen
from drrn.fast.prepared import FOLDINGS, Prepared, forget, prepared
from drrn.fast.strips import STRIP_ROWS, at_once, free_room, most_rows, strips, tile_shape

__all__ = ["forget", "super_resolve", "super_resolve_strips"]

Image = TypeVar("Image", NDArray[np.floating], Tensor)
Rows = Callable[[int, int], NDArray[np.floating] | Tensor]
Progress = Callable[[int, int], None]


def super_resolve(
    network: nn.Module,
    x: Image,
    tile: int | None = None,
    self_ensemble: bool = False,
    progress: Progress | None = None,
    precision: str = "float32",
) -> Image:
    """Super-resolve an image of any size; a large one in parts, with the same result.

    Args:
        network: a `drrn.networks.Network` on any device; BatchNorm uses its running statistics, also in training
            mode. The prepared network is cached for the next image.
        x: the network's `input`, interpolated or low-resolution luminance [H, W], 0…1; a tensor on any device.
        tile: side in pixels of a tile without its margin; the margin has `receptive_radius` pixels on every side that
            is not a border of the image. None: strips as wide as the image, which need no margin, or large tiles if
            memory is short or `self_ensemble` is set.
        self_ensemble: average the results for the 8 orientations of the image; takes 8 times as long.
        progress: called with (parts done, parts in all), first with 0.
        precision: "float32", "tf32", "bf16", or "auto" for the fastest that the device computes in hardware.

    Returns:
        [H, W], float32, not clamped; [s · H, s · W] if the network has a `scale` s. An array for an array, a tensor
        on the network's device for a tensor. The division changes it only by rounding (1e-5).

    Raises:
        ValueError: `x` is not [H, W] with at least one pixel, or `tile` is below 1.
        UserError: the device does not support the precision.
    """
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x is [H, W] with at least one pixel, not {tuple(x.shape)}")
    shape = tuple(x.shape)
    parts = super_resolve_strips(network, lambda a, b: x[a:b], shape, tile, self_ensemble, progress, None, precision)
    y = torch.cat(list(parts))
    return y if isinstance(x, Tensor) else y.cpu().numpy()


def super_resolve_strips(
    network: nn.Module,
    rows: Rows,
    shape: tuple[int, int],
    tile: int | None = None,
    self_ensemble: bool = False,
    progress: Progress | None = None,
    room: int | None = None,
    precision: str = "float32",
) -> Iterator[Tensor]:
    """`super_resolve` for an image that is never entirely in memory.

    Args:
        network, tile, self_ensemble, progress, precision: as in `super_resolve`.
        rows: called with (first, last + 1), returns those rows of the network's input [rows, W], 0…1, from the
            top. With tiles, neighbouring calls overlap by twice the receptive radius.
        shape: (H, W) of the whole input.
        room: bytes that feature maps may take; None: `free_room`.

    Yields:
        Strips [h, W] of the result ([h, s · W] where the network enlarges), from the top, float32, on the network's
        device.

    Raises:
        ValueError, UserError: as in `super_resolve`.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"tile = {tile}: a tile has at least 1 pixel")
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    ready = prepared(network, chosen(precision, device, type(network) in FOLDINGS))
    room = free_room(device) if room is None else room
    progress = progress or (lambda done, total: None)
    fits = at_once(ready, shape, room) or most_rows(ready, shape[1], room) >= STRIP_ROWS
    if tile is None and not self_ensemble and fits:
        parts = strips(ready, shape, room)
        with freed_memory_kept(len(parts) == 1):  # strips of different heights would fragment the heap
            yield from _run(ready, rows, shape, parts, progress)
        return

    def whole(x: Tensor) -> Tensor:
        parts = strips(ready, x.shape, room)
        return torch.cat(list(_run(ready, lambda a, b: x[a:b], x.shape, parts, lambda done, total: None)))

    (height, width), radius, s = shape, ready.receptive_radius, ready.scale
    tile_height, tile_width = (tile, tile) if tile else tile_shape(ready, shape, room)
    tops, lefts = range(0, height, tile_height), range(0, width, tile_width)
    done, total = 0, len(tops) * len(lefts)
    progress(done, total)
    for top in tops:
        bottom = min(top + tile_height, height)
        above, below = max(top - radius, 0), min(bottom + radius, height)
        x = _tensor(rows(above, below)).to(device)
        strip = torch.empty((s * (bottom - top), s * width), device=device)
        for left in lefts:
            right = min(left + tile_width, width)
            before, after = max(left - radius, 0), min(right + radius, width)
            region = x[:, before:after]
            y = ensemble(whole, region) if self_ensemble else whole(region)
            inner = y[s * (top - above) : s * (bottom - above), s * (left - before) : s * (right - before)]
            strip[:, s * left : s * right] = inner
            done += 1
            progress(done, total)
        yield strip


def _run(
    ready: Prepared, rows: Rows, shape: tuple[int, int], parts: list[tuple[int, int]], progress: Progress
) -> Iterator[Tensor]:
    """Process an image in strips of its whole width, rows (first, end) at a time."""
    put = ready.open(shape[0])
    progress(0, len(parts))
    for done, (first, end) in enumerate(parts, start=1):
        x = _tensor(rows(first, end)).to(ready.device, ready.dtype)
        y = put(x[None, None])[0, 0].float()
        progress(done, len(parts))
        if len(y):
            yield y


def _tensor(x: NDArray[np.floating] | Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x, np.float32))


def ensemble(whole: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The mean of `whole` over the paper's 8 orientations (Sec. 4.2), each rotated back; [h, w] → `whole`'s shape."""
    total = 0
    for mirrored in (False, True):
        for quarters in range(4):
            y = torch.rot90(whole(torch.rot90(x.fliplr() if mirrored else x, quarters)), -quarters)
            total = total + (y.fliplr() if mirrored else y)
    return total / 8
