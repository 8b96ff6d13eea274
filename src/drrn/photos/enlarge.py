"""Enlarging pixels: Y by the network, Cb, Cr and alpha by bicubic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from drrn.matlab import resize_matrix, rgb2ycbcr, ycbcr2rgb

if TYPE_CHECKING:
    from torch import nn

RESULT_FACTOR = 16  # the largest result: this many times max_pixels
INVISIBLE = 2**-18  # an opacity that rounds to 0 in 8 and 16 bits
CHUNK = 1 << 20  # pixels that are converted or encoded at a time


def result_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(H, W) of the enlarged image: scale × side, rounded to the nearest, halves up; at least 1."""
    return max(1, int(scale * height + 0.5)), max(1, int(scale * width + 0.5))


def enlarge(
    pixels: NDArray[Any],
    size: tuple[int, int],
    network: nn.Module | None,
    tile: int | None = None,
    self_ensemble: bool = False,
    progress: Callable[[int, int], None] | None = None,
    room: int | None = None,
    precision: str = "float32",
) -> Iterator[NDArray[Any]]:
    """Super-resolve an image, colour as in the paper: Y by the network, Cb and Cr by bicubic.

    A grey image is its own Y (0…255); colour is converted by MATLAB's `rgb2ycbcr` (Y in 16…235), unrounded, as in
    the evaluation protocol. Alpha is enlarged by bicubic. Colours of transparent pixels never show: a network gets
    the nearest visible colour instead, and bicubic weights colours by alpha. The whole image is mapped to the whole
    result, so a fractional scale loses no border. Only strips are in memory at a time.

    Args:
        pixels: [H, W, C], uint8, uint16 or float32 as in `Photo`.
        size: (H', W') of the result; for a network that takes the low-resolution image, `scale` times [H, W].
        network: None enlarges everything by bicubic.
        tile, self_ensemble, progress, room, precision: as in `drrn.inference.super_resolve_strips`.

    Yields:
        Strips [h, W', C] of the result from the top, of the same dtype, rounded half up and clipped to its range;
        floating pixels are clipped to 0…1, extended to the image's own minimum and maximum.
    """
    clear = pixels.shape[2] in (2, 4)
    if clear and network is not None:
        pixels = fill_hidden(pixels)
    planes = _Planes(pixels, size, weighted=clear and network is None)

    def luminance(first: int, last: int) -> NDArray[np.float32]:
        """Rows of the interpolated Y."""
        parts = [planes.interpolated(slice(0, 1), a, b)[..., 0] for a, b in _chunks(first, last, size[1])]
        return np.concatenate(parts).astype(np.float32)

    def own_luminance(first: int, last: int) -> NDArray[np.float32]:
        """Rows of the image's own Y."""
        return planes.own(slice(0, 1), first, last)[..., 0].astype(np.float32)

    if network is None:
        strips: Iterator[NDArray[np.float32]] = (luminance(a, b) for a, b in _chunks(0, size[0], size[1]))
    else:
        from drrn.inference import super_resolve_strips

        given = (own_luminance, pixels.shape[:2]) if network.input == "low" else (luminance, size)
        parts = super_resolve_strips(network, *given, tile, self_ensemble, progress, room, precision)
        strips = (part.cpu().numpy() for part in parts)

    top = 0
    for y in strips:
        for a, b in _chunks(top, top + len(y), size[1]):
            result = y[a - top : b - top, :, None].astype(np.float64)
            if planes.colour:
                result = ycbcr2rgb(np.concatenate([result, planes.interpolated(slice(1, 3), a, b)], axis=2))
            if clear:
                result = np.concatenate([result, planes.alpha(a, b)], axis=2)
            yield planes.stored(result)
        top += len(y)


def fill_hidden(pixels: NDArray[Any]) -> NDArray[Any]:
    """Give pixels of alpha 0 the colour of the nearest visible one, since a network reads neighbours.

    (A network is not linear, so its result cannot be divided by an enlarged alpha.)

    Args:
        pixels: [H, W, C], alpha last; not changed.

    Returns:
        `pixels` itself if nothing or everything is hidden; otherwise a copy.
    """
    hidden = pixels[..., -1] <= 0
    if not hidden.any() or hidden.all():
        return pixels
    nearest = distance_transform_edt(hidden, return_distances=False, return_indices=True)  # [2, H, W]
    filled = pixels.copy()
    filled[hidden, :-1] = pixels[(*nearest[:, hidden], slice(-1))]
    return filled


class _Planes:
    """An image's Y, Cb, Cr (or grey) and alpha, interpolated some rows at a time; `weighted`: by alpha."""

    def __init__(self, pixels: NDArray[Any], size: tuple[int, int], weighted: bool) -> None:
        self.pixels, self.weighted, self.colour = pixels, weighted, pixels.shape[2] >= 3
        self.weights = [resize_matrix(n, new / n, new) for n, new in zip(pixels.shape, size, strict=False)]
        self.top = 1.0 if pixels.dtype.kind == "f" else float(np.iinfo(pixels.dtype).max)  # full opacity
        self.low, self.high = 0.0, self.top
        if pixels.dtype.kind == "f":
            self.low, self.high = min(self.low, float(pixels.min())), max(self.high, float(pixels.max()))

    def _unit(self, part: NDArray[Any]) -> NDArray[np.float64]:
        return (part - np.float64(self.low)) / (self.high - self.low)

    def own(self, which: slice, first: int, last: int) -> NDArray[np.float64]:
        """Rows first…last of planes of Y, Cb, Cr, or of grey, not enlarged: [h, W, C], 0…1."""
        part = self._unit(self.pixels[first:last, :, : 3 if self.colour else 1])
        return (rgb2ycbcr(part) if self.colour else part)[..., which]

    def interpolated(self, which: slice, first: int, last: int) -> NDArray[np.float64]:
        """Rows first…last of the enlarged planes [h, W', C], 0…1."""
        a, b = self._needed(first, last)
        own = self.own(which, a, b)
        plain = self._resized(own, first, last)
        if not self.weighted:
            return plain
        opaque = np.maximum(self.pixels[a:b, :, -1:], 0) / np.float64(self.top)
        sums, seen = self._resized(own * opaque, first, last), self._resized(opaque, first, last)
        return np.divide(sums, seen, out=plain, where=seen > INVISIBLE)

    def alpha(self, first: int, last: int) -> NDArray[np.float64]:
        """Rows first…last of the enlarged alpha [h, W', 1], 0…1."""
        a, b = self._needed(first, last)
        return self._resized(self._unit(self.pixels[a:b, :, -1:]), first, last)

    def stored(self, result: NDArray[np.float64]) -> NDArray[Any]:
        """0…1 → the image's own range and dtype, clipped, rounded half up."""
        result = np.clip(result, 0, 1) * (self.high - self.low) + self.low
        return (np.floor(result + 0.5) if self.pixels.dtype.kind == "u" else result).astype(self.pixels.dtype)

    def _needed(self, first: int, last: int) -> tuple[int, int]:
        """The image's rows, (first, end), from which rows first…last of the result are computed."""
        indices = self.weights[0][first:last].indices
        return int(indices.min()), int(indices.max()) + 1

    def _resized(self, part: NDArray[np.float64], first: int, last: int) -> NDArray[np.float64]:
        """Rows `_needed` of the image [h, W, C] → rows first…last of its `imresize` [h', W', C]."""
        a, b = self._needed(first, last)
        lines = self.weights[0][first:last, a:b] @ part.reshape(b - a, -1)  # [h', W·C]
        lines = lines.reshape(last - first, *part.shape[1:]).swapaxes(0, 1)  # [W, h', C]
        result = self.weights[1] @ np.ascontiguousarray(lines).reshape(len(lines), -1)
        return result.reshape(-1, last - first, part.shape[2]).swapaxes(0, 1)


def _chunks(first: int, last: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows first…last in parts of about `CHUNK` pixels."""
    step = max(1, CHUNK // width)
    return ((a, min(a + step, last)) for a in range(first, last, step))
