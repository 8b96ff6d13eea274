"""Colours under transparency: nobody sees them, so they may not show in the result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS = 512  # an even number; they are averaged at a time


def opacity(alpha: NDArray[Any]) -> NDArray[np.float64]:
    """Alpha as stored → 0…1."""
    return np.maximum(alpha, 0) / np.float64(1 if alpha.dtype.kind == "f" else np.iinfo(alpha.dtype).max)


def fill_hidden(pixels: NDArray[Any]) -> NDArray[Any]:
    """Give pixels of alpha 0 the colour of what is visible around them, since networks look at neighbours.

    By averages weighted by alpha, over 2×2 pixels, 4×4, 8×8 and so on: the smallest block that holds anything
    visible gives the colour. (A network is not linear, so its result cannot be divided by an enlarged alpha.)

    Args:
        pixels: [H, W, C], alpha last; left as they are.

    Returns:
        The same where nothing or everything is hidden; otherwise a copy.
    """
    hidden = pixels[..., -1] <= 0
    if not hidden.any() or hidden.all():
        return pixels
    levels = [np.concatenate([_halved(part) for part in _weighted(pixels)])]
    while max(levels[-1].shape[:2]) > 1:
        levels.append(_halved(levels[-1]))
    colour = levels[-1][..., :-1] / levels[-1][..., -1:]
    for level in reversed(levels[:-1]):
        weight = level[..., -1:]
        colour = _doubled(colour)[: level.shape[0], : level.shape[1]]
        colour = np.divide(level[..., :-1], weight, out=colour, where=weight > 0)
    filled = pixels.copy()
    y, x = np.nonzero(hidden)
    around = colour[y // 2, x // 2]
    filled[y, x, :-1] = np.rint(around) if pixels.dtype.kind == "u" else around
    return filled


def _weighted(pixels: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    """Colour times opacity, and opacity, in strips [h, W, C]."""
    for top in range(0, len(pixels), ROWS):
        part = pixels[top : top + ROWS]
        weight = opacity(part[..., -1:])
        yield np.concatenate([part[..., :-1] * weight, weight], axis=2).astype(np.float32)


def _halved(sums: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums over 2×2 pixels [h, w, C] → [⌈h/2⌉, ⌈w/2⌉, C]."""
    sums = np.pad(sums, ((0, len(sums) % 2), (0, sums.shape[1] % 2), (0, 0)))
    return sums[::2, ::2] + sums[1::2, ::2] + sums[::2, 1::2] + sums[1::2, 1::2]


def _doubled(colour: NDArray[np.float32]) -> NDArray[np.float32]:
    return colour.repeat(2, axis=0).repeat(2, axis=1)
