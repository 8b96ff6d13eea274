"""Enlarging pixels: Y by the network, Cb, Cr and alpha by bicubic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from drrn.matlab import resize_matrix, rgb2ycbcr, ycbcr2rgb

if TYPE_CHECKING:
    from drrn.model import DRRN

RESULT_FACTOR = 16  # a result has at most so many times max_pixels
CHUNK = 1 << 20  # pixels that are converted or encoded at a time


# ---------------------------------------------------------------------- enlarging


def result_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(H, W) of the enlarged image: scale × side, rounded to the nearest, halves up; at least 1."""
    return max(1, int(scale * height + 0.5)), max(1, int(scale * width + 0.5))


def enlarge(
    pixels: NDArray[Any],
    size: tuple[int, int],
    network: DRRN | None,
    tile: int | None = None,
    self_ensemble: bool = False,
    progress: Callable[[int, int], None] | None = None,
    room: int | None = None,
) -> Iterator[NDArray[Any]]:
    """Super-resolve an image, colour as in the paper: Y by the network, Cb and Cr by bicubic.

    A grey image is its own Y (0…255), colour goes through MATLAB's `rgb2ycbcr` (Y in 16…235), unrounded, as in
    the evaluation protocol. Alpha is enlarged by bicubic. The whole image is mapped on the whole result, so at a
    fractional scale no border is lost. Only strips are ever in memory.

    Args:
        pixels: [H, W, C], uint8, uint16 or float32 as in `Photo`.
        size: (H', W') of the result.
        network: None enlarges everything by bicubic.
        tile, self_ensemble, progress, room: as in `drrn.inference.super_resolve_strips`.

    Yields:
        Strips [h, W', C] of the result from the top, of the same dtype, rounded half up and clipped to its range;
        floating pixels are clipped to 0…1, or to the image's own extremes where they lie outside.
    """
    height, width, channels = pixels.shape
    weights = (
        resize_matrix(height, size[0] / height, size[0]),
        resize_matrix(width, size[1] / width, size[1]),
    )
    if pixels.dtype.kind == "f":
        low, high = min(0.0, float(pixels.min())), max(1.0, float(pixels.max()))
    else:
        low, high = 0.0, float(np.iinfo(pixels.dtype).max)
    colour = channels >= 3

    def unit(part: NDArray[Any]) -> NDArray[np.float64]:
        return (part - np.float64(low)) / (high - low)

    def luminance(first: int, last: int) -> NDArray[np.float32]:
        """Rows of the interpolated Y."""
        y = np.empty((last - first, size[1]), np.float32)
        for a, b in _chunks(first, last, size[1]):
            y[a - first : b - first] = _resized(
                lambda r, s: rgb2ycbcr(unit(pixels[r:s, :, :3]))[..., :1] if colour else unit(pixels[r:s, :, :1]),
                weights, a, b,
            )[..., 0]  # fmt: skip
        return y

    if network is None:
        strips: Iterator[NDArray[np.float32]] = (luminance(a, b) for a, b in _chunks(0, size[0], size[1]))
    else:
        from drrn.inference import super_resolve_strips

        strips = super_resolve_strips(network, luminance, size, tile, self_ensemble, progress, room)

    top = 0
    for y in strips:
        for a, b in _chunks(top, top + len(y), size[1]):
            result = np.empty((b - a, size[1], channels), np.float64)
            part = y[a - top : b - top, :, None]
            if colour:
                chroma = _resized(lambda r, s: rgb2ycbcr(unit(pixels[r:s, :, :3]))[..., 1:], weights, a, b)
                result[..., :3] = ycbcr2rgb(np.concatenate([part.astype(np.float64), chroma], axis=2))
            else:
                result[..., :1] = part
            if channels in (2, 4):
                result[..., -1:] = _resized(lambda r, s: unit(pixels[r:s, :, -1:]), weights, a, b)
            np.clip(result, 0, 1, out=result)
            result = result * (high - low) + low
            yield (np.floor(result + 0.5) if pixels.dtype.kind == "u" else result).astype(pixels.dtype)
        top += len(y)


def _chunks(first: int, last: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows first…last in parts of about `CHUNK` pixels."""
    step = max(1, CHUNK // width)
    return ((a, min(a + step, last)) for a in range(first, last, step))


def _resized(
    source: Callable[[int, int], NDArray[np.float64]],
    weights: tuple[sparse.csr_array, sparse.csr_array],
    first: int,
    last: int,
) -> NDArray[np.float64]:
    """Rows first…last of what `imresize` would make of the whole image.

    Args:
        source: rows (a, b) of the image [b − a, W, C].
        weights: `resize_matrix` of rows and columns.

    Returns:
        [last − first, W', C].
    """
    vertical, horizontal = weights[0][first:last], weights[1]
    a, b = int(vertical.indices.min()), int(vertical.indices.max()) + 1
    part = source(a, b)
    lines = vertical[:, a:b] @ part.reshape(b - a, -1)  # [rows, W·C]
    lines = lines.reshape(last - first, *part.shape[1:]).swapaxes(0, 1)  # [W, rows, C]
    result = horizontal @ np.ascontiguousarray(lines).reshape(len(lines), -1)
    return result.reshape(-1, last - first, part.shape[2]).swapaxes(0, 1)
