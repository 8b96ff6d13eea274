"""The protocol's PSNR and SSIM as torchmetrics metrics: the score of a set is the plain mean over its images.

torchmetrics' own PSNR pools the squared error of all images before the logarithm and its SSIM pads the
borders; neither gives the published numbers. These round, shave and measure image by image with
`drrn.metrics`, then average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from drrn.matlab import to_uint8
from drrn.metrics import psnr, ssim
from drrn.protocol import shave as shave_border


class _SetMean(Metric):
    """Mean over images of a function of two 8-bit images [H, W]; a subclass names the function."""

    is_differentiable = False  # measured on rounded values
    higher_is_better = True
    full_state_update = False  # an update does not depend on the state

    measure: ClassVar[Callable[[NDArray, NDArray], float]]
    total: Tensor
    images: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # float32, which every accelerator has; over 100 images it keeps the mean to better than 1e-3 dB.
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("images", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, shave: int) -> None:
        """Measure one image and add it to the set.

        Args:
            prediction: [1, 1, H, W], floating in 0…1 (clamped and rounded to 8 bits as MATLAB does) or uint8.
            target: ground truth, the same shape, likewise.
            shave: pixels to leave out on every side, in the protocol the scale.

        Raises:
            ValueError: shapes that differ or hold more than one image, a negative `shave`, or one that leaves
                too little to measure.
            TypeError: neither floating nor uint8.
        """
        if shave < 0:
            raise ValueError(f"shave must be at least 0 pixels, got {shave}")
        if prediction.shape != target.shape or prediction.ndim != 4 or prediction.shape[:2] != (1, 1):
            raise ValueError(
                "one image a call: prediction and target must both be [1, 1, H, W], got "
                f"{tuple(prediction.shape)} and {tuple(target.shape)}"
            )
        a, b = (shave_border(_eight_bit(image), shave) for image in (prediction, target))
        self.total += self.measure(a, b)
        self.images += 1

    def compute(self) -> Tensor:
        """The plain mean over the images seen since the last reset, float32; NaN if there was none."""
        return self.total / self.images


class SetPSNR(_SetMean):
    """Mean PSNR over the images of a set, in dB, as in the paper's Table 2.

    `update` and `forward` take one image a call: `prediction` and `target`, [1, 1, H, W], floating in 0…1 or
    uint8, and `shave`, the pixels to leave out on every side. `forward` returns that image's PSNR; `compute`
    returns the mean, a float32 scalar, which is inf as soon as one image equals its target.

    Args:
        kwargs: torchmetrics' own options, such as `dist_sync_on_step`.

    Example:
        >>> metric = SetPSNR()
        >>> target = torch.full((1, 1, 8, 8), 0.5)
        >>> metric.update(target + 1 / 255, target, shave=2)
        >>> metric.update(target + 2 / 255, target, shave=2)
        >>> metric.compute()  # of 48.13 and 42.11 dB
        tensor(45.1205)
    """

    measure = staticmethod(psnr)
    plot_lower_bound = 0.0


class SetSSIM(_SetMean):
    """Mean SSIM over the images of a set, as in the paper's Table 2.

    `update` and `forward` take one image a call: `prediction` and `target`, [1, 1, H, W], floating in 0…1 or
    uint8, and `shave`, the pixels to leave out on every side; at least 11×11 pixels must remain. `forward`
    returns that image's SSIM; `compute` returns the mean, a float32 scalar.

    Args:
        kwargs: torchmetrics' own options, such as `dist_sync_on_step`.

    Example:
        >>> metric = SetSSIM()
        >>> target = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16)
        >>> metric(target, target, shave=2)
        tensor(1.)
    """

    measure = staticmethod(ssim)
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0


def _eight_bit(image: Tensor) -> NDArray[np.uint8]:
    """[1, 1, H, W] on any device → uint8 [H, W] in NumPy."""
    plane = image[0, 0].detach()
    if plane.dtype == torch.uint8:
        return plane.cpu().numpy()
    if not plane.is_floating_point():
        raise TypeError(f"images must be floating in 0…1 or uint8, not {plane.dtype}")
    return to_uint8(plane.float().cpu().numpy())  # float(): NumPy has no bfloat16
