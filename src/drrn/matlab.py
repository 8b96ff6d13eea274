"""MATLAB's image functions of the evaluation protocol, in NumPy float64.

The published PSNR and SSIM depend on how the low-resolution image is made and on how results are rounded.
Pillow, OpenCV and scikit-image each resize and round differently, so these functions follow MATLAB:
`imresize(…, 'bicubic')`, `rgb2ycbcr`, `ycbcr2rgb` and `uint8(…)`. They raise TypeError for a dtype that their
docstring does not name, ValueError for another shape.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

FloatArray = NDArray[np.float64]

# ITU-R BT.601 in limited range, as in MATLAB's rgb2ycbcr, in thousandths: sums of products with 8-bit levels
# are then whole numbers, exact in float64, and the 194 colours whose Y is half-way between two levels
# round as they should.
YCBCR_FROM_RGB = np.array(
    [[65_481, 128_553, 24_966], [-37_797, -74_203, 112_000], [112_000, -93_786, -18_214]], dtype=np.float64
)
YCBCR_OFFSET = np.array([16.0, 128.0, 128.0])


def imresize(
    array: NDArray[np.floating], scale: float | None = None, size: tuple[int, int] | None = None
) -> FloatArray:
    """Resize an image as MATLAB's `imresize(array, scale, 'bicubic')` does for a double array.

    The kernel is Keys' cubic with a = -0.5, widened by 1/scale when shrinking (antialiasing); borders are
    mirrored with the edge pixel repeated; weights are normalised. Nothing is rounded or clamped, so a result
    may overshoot the range of its input.

    Args:
        array: [H, W] or [H, W, C], floating, any range. Computed in float64.
        scale: output side / input side, for both dimensions; the sides become ceil(scale * side).
        size: (height, width) of the output, instead of `scale`: each dimension then has its own scale,
            out / in.

    Returns:
        float64, [h, w] or [h, w, C].
    """
    array = np.asarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(
            f"imresize needs a floating image, not {array.dtype}: convert it first, for uint8 with "
            "array / 255.0 (MATLAB's integer imresize rounds its result, which the protocol does not)"
        )
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"imresize needs [H, W] or [H, W, C] with at least one pixel, got shape {array.shape}")
    if (scale is None) == (size is None):
        raise ValueError(f"give either scale or size, got scale={scale} and size={size}")

    sides = array.shape[:2]
    if size is None:
        _check_scale(scale)
        # A plain ceil, as in MATLAB: (1/s) * (s*k) never exceeds k in float64 for the scales used here.
        size, scales = (math.ceil(scale * sides[0]), math.ceil(scale * sides[1])), (scale, scale)
    else:
        size = (operator.index(size[0]), operator.index(size[1]))
        if min(size) < 1:
            raise ValueError(f"size must be (height, width) of at least 1 pixel each, got {size}")
        scales = (size[0] / sides[0], size[1] / sides[1])

    result = array.astype(np.float64, copy=False)
    for axis in sorted((0, 1), key=lambda a: scales[a]):  # smaller scale first; rows first if equal
        weights = resize_matrix(sides[axis], scales[axis], size[axis])
        lines = np.moveaxis(result, axis, 0)
        resized = weights @ lines.reshape(sides[axis], -1)
        result = np.moveaxis(resized.reshape(size[axis], *lines.shape[1:]), 0, axis)
    return np.ascontiguousarray(result)


@lru_cache(maxsize=512)
def resize_matrix(length: int, scale: float, out_length: int) -> sparse.csr_array:
    """The weights with which `imresize` resizes one dimension: output = matrix @ input.

    To resize many images of one size, compute `resize_matrix(H, s, h) @ image @ resize_matrix(W, s, w).T`.
    The result is cached and shared; its arrays are read-only.

    Args:
        length: pixels of the input along the dimension.
        scale: output / input; below 1 the kernel is widened against aliasing.
        out_length: pixels of the output, usually ceil(scale * length).

    Returns:
        float64 csr_array [out_length, length]; every row sums to 1.
    """
    _check_scale(scale)
    if length < 1 or out_length < 1:
        raise ValueError(f"lengths must be at least 1 pixel, got {length} resized to {out_length}")

    shrink = min(scale, 1.0)
    width = 4.0 / shrink
    # Pixel centres are whole numbers from 1, as in MATLAB; u is the centre of each output pixel on the
    # input's axis: 0.5, the image's edge, maps to 0.5.
    u = np.arange(1, out_length + 1) / scale + 0.5 * (1 - 1 / scale)
    leftmost = np.floor(u - width / 2)
    taps = leftmost[:, None] + np.arange(math.ceil(width) + 2)
    weights = _cubic(shrink * (u[:, None] - taps))
    weights /= weights.sum(axis=1, keepdims=True)

    position = (taps.astype(np.int64) - 1) % (2 * length)  # mirrored borders: … 2 1 | 1 2 … n | n n-1 …
    columns = np.where(position < length, position, 2 * length - 1 - position)
    rows = np.broadcast_to(np.arange(out_length)[:, None], columns.shape)
    matrix = sparse.coo_array(
        (weights.ravel(), (rows.ravel(), columns.ravel())), shape=(out_length, length)
    ).tocsr()  # taps that the mirror sends to one pixel are summed
    matrix.eliminate_zeros()
    for part in (matrix.data, matrix.indices, matrix.indptr):
        part.flags.writeable = False
    return matrix


def rgb2ycbcr(rgb: NDArray[np.uint8] | NDArray[np.floating]) -> NDArray[np.uint8] | FloatArray:
    """MATLAB's `rgb2ycbcr`: ITU-R BT.601 with Y in 16…235 and Cb, Cr in 16…240 of 255.

        Y  =  16 + ( 65.481 R + 128.553 G +  24.966 B) / 255
        Cb = 128 + (-37.797 R -  74.203 G + 112     B) / 255
        Cr = 128 + (112     R -  93.786 G -  18.214 B) / 255         (R, G, B in 0…255)

    Args:
        rgb: [H, W, 3], uint8 or floating in 0…1.

    Returns:
        [H, W, 3]: uint8, rounded half away from zero, for uint8; float64 in 0…1, not rounded, for floating.
    """
    levels = _levels(rgb, "rgb")
    ycbcr = levels @ YCBCR_FROM_RGB.T / 255_000 + YCBCR_OFFSET
    return _round_to_uint8(ycbcr) if rgb.dtype == np.uint8 else ycbcr / 255


def rgb2y(rgb: NDArray[np.uint8] | NDArray[np.floating]) -> NDArray[np.uint8] | FloatArray:
    """`rgb2ycbcr(rgb)[..., 0]` alone: [H, W, 3] → [H, W]."""
    parts = []
    for rows in np.array_split(rgb, 1 + rgb.size // 2**18):  # float64 of a whole photo takes 32 bytes a pixel
        y = _levels(rows, "rgb") @ YCBCR_FROM_RGB[0] / 255_000 + YCBCR_OFFSET[0]
        parts.append(_round_to_uint8(y) if rgb.dtype == np.uint8 else y / 255)
    return np.concatenate(parts)


def ycbcr2rgb(ycbcr: NDArray[np.uint8] | NDArray[np.floating]) -> NDArray[np.uint8] | FloatArray:
    """MATLAB's `ycbcr2rgb`, the inverse of `rgb2ycbcr`.

    Args:
        ycbcr: [H, W, 3], uint8 or floating in 0…1.

    Returns:
        [H, W, 3], clipped to the colours that exist: uint8, rounded half away from zero, for uint8; float64
        in 0…1 for floating. From uint8 the round trip loses up to 2 levels.
    """
    levels = _levels(ycbcr, "ycbcr")
    rgb = (levels - YCBCR_OFFSET) @ np.linalg.inv(YCBCR_FROM_RGB / 255_000).T
    return _round_to_uint8(rgb) if ycbcr.dtype == np.uint8 else np.clip(rgb / 255, 0.0, 1.0)


def to_uint8(array: NDArray[np.floating]) -> NDArray[np.uint8]:
    """MATLAB's `uint8(single(array) * 255)`: the protocol's last step before measuring.

    Args:
        array: any shape, floating; 0…1 is the nominal range, values outside are clamped.

    Returns:
        uint8 of the same shape, rounded half away from zero (NumPy's `round` rounds half to even). NaN, which
        MATLAB would turn into 0, is a ValueError.
    """
    array = np.asarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"to_uint8 needs a floating array in 0…1, not {array.dtype}")
    if np.isnan(array).any():
        raise ValueError(
            f"{np.count_nonzero(np.isnan(array))} of {array.size} values are NaN, which have no grey level: "
            "look for the overflow or division that made them"
        )
    return _round_to_uint8(array.astype(np.float32) * np.float32(255))


def _cubic(x: FloatArray) -> FloatArray:
    """Keys' cubic convolution kernel with a = -0.5 (Keys 1981, Eq. 15)."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _levels(image: NDArray[np.uint8] | NDArray[np.floating], name: str) -> FloatArray:
    """A colour image on the scale 0…255 in float64; raises for a wrong shape or dtype."""
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{name} must be [H, W, 3], got shape {image.shape}")
    if image.dtype == np.uint8:
        return image.astype(np.float64)
    if np.issubdtype(image.dtype, np.floating):
        return image.astype(np.float64) * 255
    raise TypeError(f"{name} must be uint8 or floating in 0…1, not {image.dtype}")


def _round_to_uint8(levels: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Clamp to 0…255, then round half up, which for numbers >= 0 is half away from zero."""
    # float64, because in float32 the greatest number below 0.5 plus 0.5 is already 1.
    return np.floor(np.clip(levels, 0, 255).astype(np.float64) + 0.5).astype(np.uint8)


def _check_scale(scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number (1/3 shrinks, 3 enlarges), got {scale}")
