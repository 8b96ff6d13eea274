"""ESPCN: three convolutions of the low-resolution image; the channels of the last are the pixels of the result.

W. Shi, J. Caballero, F. Huszár, J. Totz, A. P. Aitken, R. Bishop, D. Rueckert, Z. Wang, "Real-Time Single Image and
Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network", CVPR 2016.
It is reference [25] of the DRRN paper: Fig. 9.

    f_1 = φ(W_1 ∗ x + b_1)         64 filters of 5×5, φ = tanh
    f_2 = φ(W_2 ∗ f_1 + b_2)       32 filters of 3×3
    y   = PS(W_3 ∗ f_2 + b_3)      r² filters of 3×3; PS arranges the r² channels of a pixel as r×r pixels
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drrn.layers import MOST, convolution, in_float32, within


class ESPCN(nn.Module):
    """y = PS(f_3(x)), on the luminance of the low-resolution image.

    Args:
        scale: r, 2 … 16; 20,032 + 288 r² weights.
        features: filters of the first layer; the second has half of them.
    """

    input = "low"
    loss = "euclidean"  # the mean squared error
    depth = 3
    receptive_radius = 2 + 1 + 1  # of the low-resolution image

    def __init__(self, scale: int, features: int = 64) -> None:
        within(2, 16, scale=scale)
        within(2, MOST, features=features)
        super().__init__()
        self.scale, self.features = scale, features
        self.conv1 = convolution(1, features, 5)
        self.conv2 = convolution(features, features // 2, 3)
        self.conv3 = convolution(features // 2, scale**2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Low-resolution luminance [N, 1, H, W], 0…1 → the estimate [N, 1, r·H, r·W], not clamped."""
        f1 = torch.tanh(in_float32(self.conv1, x))  # [N, 64, H, W]
        f2 = torch.tanh(self.conv2(f1))  # [N, 32, H, W]
        return F.pixel_shuffle(self.conv3(f2), self.scale)  # [N, r², H, W] → [N, 1, r·H, r·W]
