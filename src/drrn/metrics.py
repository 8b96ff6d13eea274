"""PSNR, SSIM and IFC, the metrics of the paper's Tables 2 and 3, and others, as functions of two images in 0…255.

The protocol applies them to 8-bit, shaved luminance images (`drrn.protocol`). All compute in float64, because in
float32 the IFC is wrong in the third decimal. Importing this module needs neither torch nor SciPy.
To add a metric, write a function and an entry in METRICS: evaluation, training, records and tables use it then.

Images are uint8, or floating on the scale 0…255 (without rounding). The functions raise TypeError for another dtype,
and ValueError for shapes that differ or are not [H, W], sides that are too small, no pixels, NaN or infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from drrn.errors import UserError

if TYPE_CHECKING:
    from scipy import sparse
    from torch import Tensor

Image = NDArray[np.uint8] | NDArray[np.floating]
FloatArray = NDArray[np.float64]

SSIM_WINDOW = 11  # pixels a side, Gaussian with σ = 1.5
IFC_LEVELS = 4
IFC_ORIENTATIONS = (0, 3)  # of the six of the sp5 filters
IFC_BLOCK = 3  # M: a block is 3×3 coefficients
IFC_SMALLEST_SIDE = 72  # the coarsest level is then 9×9: 3×3 blocks, of which the border rule leaves one
MSSSIM_SMALLEST_SIDE = 16 * SSIM_WINDOW  # an 11×11 window fits at the fifth scale
VIF_SMALLEST_SIDE = 41
IFC_TOLERANCE = 1e-15
IFC_NOISE = 1e-10  # σ_n², the variance of the visual noise


def psnr(a: Image, b: Image) -> float:
    """Peak signal-to-noise ratio, 20 log10(255 / √MSE), in dB. Symmetric in its arguments.

    Args:
        a, b: [H, W], or [H, W, 3]: one MSE over all pixels and channels.

    Returns:
        dB; inf if the images are equal.
    """
    x, y = _pair(a, b, "PSNR", 1, color=True)
    mse = np.mean((x - y) ** 2)
    return math.inf if mse == 0 else float(20 * np.log10(255 / np.sqrt(mse)))


def ssim(a: Image, b: Image) -> float:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004), as the authors' `ssim_index.m`.

    11×11 Gaussian windows with σ = 1.5, entirely inside the image, K = (0.01, 0.03), L = 255, population moments, no
    downsampling; the mean over all windows. Symmetric in its arguments.

    Args:
        a, b: [H, W], both sides at least 11.

    Returns:
        At most 1, the value of equal images.
    """
    x, y = _pair(a, b, "SSIM", SSIM_WINDOW)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mu_x, mu_y = _gaussian(x), _gaussian(y)
    mu_xx_yy, mu_xy = mu_x**2 + mu_y**2, mu_x * mu_y
    # σx² and σy² occur only as their sum, so one filtering serves both.
    var_xx_yy = _gaussian(x**2 + y**2) - mu_xx_yy
    cov_xy = _gaussian(x * y) - mu_xy
    index = ((2 * mu_xy + c1) * (2 * cov_xy + c2)) / ((mu_xx_yy + c1) * (var_xx_yy + c2))
    return float(index.mean())


def ifc(reference: Image, distorted: Image) -> float:
    """Information fidelity criterion (Sheikh, Bovik, de Veciana 2005), as the paper's Table 3 uses it.

    The information of the reference, in bits a pixel, that the distorted image preserves: a Gaussian scale
    mixture models the reference's steerable-pyramid coefficients and, block by block, a gain g with additive
    noise v models the distortion. Not symmetric.

    A direction in which the reference's 3×3 blocks do not vary (an eigenvalue of their covariance that is 0
    up to rounding) carries no information and is left out; the original's matrix inverse fails there. So a flat
    reference has IFC 0 whatever the other image is, the limit for vanishing contrast.

    Args:
        reference: [H, W], both sides at least 72.
        distorted: the same shape.

    Returns:
        IFC ≥ 0, without an upper bound.
    """
    x, y = _pair(reference, distorted, "IFC", IFC_SMALLEST_SIDE)
    bits = 0.0
    for level, (bands_x, bands_y) in enumerate(zip(_pyramid(x), _pyramid(y), strict=True)):
        window = 2 ** (IFC_LEVELS - level) + 1  # 17, 9, 5, 3 from the finest level to the coarsest
        bits += sum(_band_information(bx, by, window) for bx, by in zip(bands_x, bands_y, strict=True))
    return bits / x.size


def msssim(a: Image, b: Image) -> float:
    """Multi-scale structural similarity (Wang, Simoncelli, Bovik 2003), as torchmetrics computes it. Symmetric.

    At most 1, the value of equal images; both sides are at least 176.
    """
    x, y = _pair(a, b, "MS-SSIM", MSSSIM_SMALLEST_SIDE)
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    return multiscale_structural_similarity_index_measure(*_tensors(x, y), data_range=255.0).item()


def vif(reference: Image, distorted: Image) -> float:
    """Visual information fidelity in the pixel domain (Sheikh, Bovik 2006), as torchmetrics computes it.

    The share of the reference's information that the distorted image preserves: 1 for equal images, more for
    enhanced contrast. Not symmetric. A flat reference has no information to lose: 1. Both sides are at least 41.
    """
    x, y = _pair(reference, distorted, "VIF", VIF_SMALLEST_SIDE)
    if np.ptp(x) == 0:
        return 1.0
    from torchmetrics.functional.image import visual_information_fidelity

    return visual_information_fidelity(*_tensors(y, x)).item()


def _tensors(*images: FloatArray) -> list[Tensor]:
    """[H, W] → [1, 1, H, W] each, float64."""
    import torch

    return [torch.from_numpy(image)[None, None] for image in images]


def _pair(a: Image, b: Image, metric: str, smallest: int, color: bool = False) -> tuple[FloatArray, FloatArray]:
    """Both images in float64; raises if they are not valid for a metric."""
    if a.shape != b.shape:
        raise ValueError(f"the images have different shapes: {a.shape} and {b.shape}")
    if not (a.ndim == 2 or (color and a.ndim == 3 and a.shape[2] == 3)) or a.size == 0:
        raise ValueError(f"images must be [H, W]{' or [H, W, 3]' if color else ''} with pixels, got {a.shape}")
    for image in (a, b):
        if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
            raise TypeError(f"images must be uint8 or floating on the scale 0…255, not {image.dtype}")
        if not np.isfinite(image).all():
            raise ValueError("an image holds NaN or infinity: look for the overflow that made it")
    if min(a.shape[:2]) < smallest:
        raise ValueError(f"{metric} needs sides of at least {smallest} pixels, got {a.shape[0]}×{a.shape[1]}")
    return a.astype(np.float64), b.astype(np.float64)


def _gaussian(image: FloatArray) -> FloatArray:
    """Gaussian means of all windows inside the image, [H, W] → [H − 10, W − 10]; the window is separable."""
    from scipy import ndimage

    radius = SSIM_WINDOW // 2
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()
    rows = ndimage.correlate1d(image, taps, axis=0)[radius:-radius]
    return ndimage.correlate1d(rows, taps, axis=1)[:, radius:-radius]


@lru_cache(maxsize=1)
def _sp5_filters() -> tuple[FloatArray, FloatArray, list[FloatArray]]:
    """Simoncelli's steerable pyramid with six orientations: (first low-pass, low-pass, the bands used)."""
    # Here, since importing pyrtools takes a second and brings matplotlib; only IFC needs it.
    from pyrtools.pyramids.filters import parse_filter

    filters = parse_filter("sp5_filters", normalize=False)
    bands = [filters["bfilts"][:, k].reshape(7, 7).T for k in IFC_ORIENTATIONS]
    return filters["lo0filt"], filters["lofilt"], bands


def _pyramid(image: FloatArray) -> list[list[FloatArray]]:
    """The bands of orientations 0 and 3 of every level, finest first; borders mirror without repetition."""
    from scipy import ndimage

    lo0_filter, lo_filter, band_filters = _sp5_filters()
    low = ndimage.correlate(image, lo0_filter, mode="mirror")
    levels = []
    for level in range(IFC_LEVELS):
        if level > 0:
            low = ndimage.correlate(low, lo_filter, mode="mirror")[::2, ::2]
        levels.append([ndimage.correlate(low, band, mode="mirror") for band in band_filters])
    return levels


def _band_information(x: FloatArray, y: FloatArray, window: int) -> float:
    """Σ log2(1 + g² s² λ_j / (v + σ_n²)) over one band's blocks and eigenvalues, in bits.

    Args:
        x, y: the band of the reference and of the distorted image, the same shape [H, W].
        window: side w of the box in which a block's gain and noise are estimated.
    """
    m = IFC_BLOCK
    height, width = x.shape[0] - x.shape[0] % m, x.shape[1] - x.shape[1] % m
    x, y = x[:height, :width], y[:height, :width]

    # Source: x is a Gaussian scale mixture, s² times a Gaussian of covariance C = Q diag(λ) Qᵀ.
    overlapping = np.lib.stride_tricks.sliding_window_view(x, (height - m + 1, width - m + 1))
    covariance = np.cov(overlapping.reshape(m * m, -1), bias=True)
    eigenvalues, q = np.linalg.eigh(covariance)
    rounding = m * m * np.finfo(np.float64).eps * eigenvalues[-1]
    informative = eigenvalues > max(rounding, IFC_TOLERANCE)
    eigenvalues, q = eigenvalues[informative], q[:, informative]
    # [blocks down, blocks across, 9], a block's coefficients in the order of the covariance's
    blocks = x.reshape(height // m, m, width // m, m).swapaxes(1, 2).reshape(height // m, width // m, m * m)
    s2 = ((blocks @ q) ** 2 / eigenvalues).sum(axis=-1) / (m * m)  # uᵀ C⁻¹ u / 9, the mean of u not removed

    # Channel: y = g x + noise of variance v, by least squares in the box around the block's centre.
    down, across = _box_at_blocks(height, window), _box_at_blocks(width, window)

    def box_sum(z: FloatArray) -> FloatArray:
        return down @ z @ across.T

    n = window**2
    sum_x, sum_y = box_sum(x), box_sum(y)
    s_xy = box_sum(x * y) - sum_x * sum_y / n
    s_xx = np.maximum(box_sum(x * x) - sum_x**2 / n, 0)
    s_yy = np.maximum(box_sum(y * y) - sum_y**2 / n, 0)
    g = s_xy / (s_xx + IFC_TOLERANCE)
    v = (s_yy - g * s_xy) / n
    g[(s_xx < IFC_TOLERANCE) | (s_yy < IFC_TOLERANCE) | (g < 0)] = 0
    v = np.maximum(v, IFC_TOLERANCE)

    border = _border_blocks(window)
    s2 = s2[border:-border, border:-border]
    snr = (g**2 * s2 / (v + IFC_NOISE))[..., None] * eigenvalues
    return float(np.log2(1 + snr).sum())


def _border_blocks(window: int) -> int:
    """Blocks to leave out on every side, so that no window reaches past the band."""
    return math.ceil((window - 1) / 2 / IFC_BLOCK)


def _box_at_blocks(length: int, window: int) -> sparse.csr_array:
    """0/1 matrix [blocks inside the border, length]: row k sums the window around the centre of block k."""
    from scipy import sparse

    border = _border_blocks(window)
    centres = np.arange(border, length // IFC_BLOCK - border) * IFC_BLOCK + IFC_BLOCK // 2
    columns = centres[:, None] + np.arange(-(window // 2), window // 2 + 1)
    starts = np.arange(len(centres) + 1) * window
    return sparse.csr_array((np.ones(columns.size), columns.ravel(), starts), shape=(len(centres), length))


@dataclass(frozen=True)
class Metric:
    """A measure of one image against its ground truth.

    Attributes:
        function: (ground truth, estimate), both [H, W] in 0…255 → a number.
        digits: decimals in tables.
        over: channels of colour images: "y", "rgb" [H, W, 3], or "color", those that the protocol scores.
        training: computed in each validation and in the test of a run; other metrics only in the test, if
            `data.test_metrics` names them. evaluate.py computes any.
        smallest: minimum side of the images, pixels.
    """

    function: Callable[[Image, Image], float]
    digits: int
    over: str = "y"
    training: bool = False
    smallest: int = 1


METRICS: dict[str, Metric] = {
    "psnr": Metric(psnr, 2, over="color", training=True),
    "ssim": Metric(ssim, 4, training=True, smallest=SSIM_WINDOW),
    "ifc": Metric(ifc, 3, smallest=IFC_SMALLEST_SIDE),
    "msssim": Metric(msssim, 4, smallest=MSSSIM_SMALLEST_SIDE),
    "vif": Metric(vif, 4, smallest=VIF_SMALLEST_SIDE),
    "psnr_rgb": Metric(psnr, 2, over="rgb"),
}


def in_training() -> tuple[str, ...]:
    """The metrics that every run computes."""
    return tuple(name for name, metric in METRICS.items() if metric.training)


def check_names(key: str, names: list[str]) -> None:
    """Refuse unknown metrics among the names of a key."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"{key}: {name!r} is not one of {', '.join(METRICS)}")
