"""The evaluation protocol behind the paper's Tables 2 and 3.

From an 8-bit luminance Y and a scale s: crop to a multiple of s, bicubic down and up in double precision
(the network's input), network, 8 bits, crop s pixels on every side, score. The paper does not write it
down; it is that of the released test code and it reproduces every published Bicubic cell within 0.01 dB
and 0.001.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from drrn.matlab import imresize, to_uint8
from drrn.metrics import psnr, ssim

NAME, VERSION = "paper", 1


def modcrop(y: NDArray, scale: int) -> NDArray:
    """Crop bottom and right to a multiple of the scale [H, W] → [H − H mod s, W − W mod s]."""
    height, width = y.shape[0] - y.shape[0] % scale, y.shape[1] - y.shape[1] % scale
    if height == 0 or width == 0:
        raise ValueError(f"an image of {y.shape[0]}×{y.shape[1]} pixels is smaller than the scale {scale}")
    return y[:height, :width]


def degrade(y: NDArray[np.floating], scale: int) -> NDArray[np.float64]:
    """ILR, the interpolated low-resolution image: bicubic to 1/s and back to size, never rounded.

    Args:
        y: ground truth [H, W], 0…1, H and W multiples of the scale.
        scale: s ≥ 2.

    Returns:
        [H, W] float64; overshoots 0…1 a little at edges, as bicubic does.
    """
    return imresize(imresize(y, 1 / scale), scale)


def shave(image: NDArray, border: int) -> NDArray:
    """Remove `border` pixels on every side [H, W] → [H − 2b, W − 2b]."""
    return image[border : image.shape[0] - border, border : image.shape[1] - border]


def prepare(y: NDArray[np.uint8], scale: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps 2 and 3: 8-bit Y [H, W] → (network input, ground truth), each [H', W'] in 0…1."""
    truth = modcrop(y, scale) / 255.0
    return degrade(truth, scale), truth


def score(prediction: NDArray[np.floating], truth: NDArray[np.floating], scale: int) -> dict[str, float]:
    """Steps 4 to 6: PSNR (dB) and SSIM of one image [H, W] against its ground truth, both in 0…1."""
    a, b = (shave(to_uint8(image), scale) for image in (prediction, truth))
    return {"psnr": psnr(a, b), "ssim": ssim(a, b)}
