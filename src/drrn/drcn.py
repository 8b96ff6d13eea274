"""DRCN: one convolution applied recursively, with supervision of every recursion.

J. Kim, J. K. Lee, K. M. Lee, "Deeply-Recursive Convolutional Network for Image Super-Resolution", CVPR 2016.
It is reference [14] of the DRRN paper: Sec. 2.3, Eq. 2, Fig. 2 (c), Table 1.

    H_0 = f_1(x)                                  the embedding, two convolutions
    H_t = f_2(H_{t-1}),  t = 1 … T                the recursive layer: one convolution, T = 16 times
    y_t = f_Rec(H_t) + x                          Eq. 2; two convolutions, the same ones for every t
    y   = Σ_t w_t · y_t                           the ensemble, w learned

    loss = α · mean_t L(y_t) + (1 − α) · L(y)     L is Eq. 10; α falls from 1 to 0 while it trains
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drrn.layers import MOST, convolution, in_float32, within
from drrn.losses import euclidean


class DRCN(nn.Module):
    """y = Σ_t w_t · (f_Rec(f_2^(t)(f_1(x))) + x), on the luminance of an interpolated image.

    Args:
        T: recursions, ≥ 1; T + 4 layers.
        features: filters of every convolution but the last; 256 gives 1,774,080 weights.
        alpha_steps: optimiser steps over which α falls linearly from 1 to 0.

    In training mode `forward` returns all predictions, for `loss`; else y only.
    """

    input = "interpolated"

    def __init__(self, T: int = 16, features: int = 256, alpha_steps: int = 100_000) -> None:
        within(1, MOST, T=T, features=features)
        within(1, 2**32, alpha_steps=alpha_steps)
        super().__init__()
        self.T, self.features, self.alpha_steps = T, features, alpha_steps
        self.depth = self.receptive_radius = T + 4  # every layer is 3×3
        self.embed1, self.embed2 = convolution(1, features, 3), convolution(features, features, 3)
        self.recursion = convolution(features, features, 3)
        nn.init.dirac_(self.recursion.weight)  # initialised as the identity
        self.rec1, self.conv_rec = convolution(features, features, 3), convolution(features, 1, 3)
        self.w = nn.Parameter(torch.full((T,), 1 / T))
        self.alpha = 1.0  # of the current step: `at_step`

    def at_step(self, step: int) -> None:
        """Set α for the next step, counted from 0; it depends on nothing else, so resuming needs no state."""
        self.alpha = max(0.0, 1 - step / self.alpha_steps)

    def forward(self, x: Tensor) -> Tensor:
        """Interpolated luminance [N, 1, H, W], 0…1 → the estimate y, same shape, not clamped.

        In training [N, 1 + T, H, W]: y, then y_1 … y_T.
        """
        H = F.relu(in_float32(self.embed1, x))  # [N, C, H, W]
        H = F.relu(self.embed2(H))  # [N, C, H, W]  H_0
        estimates = []
        for _ in range(self.T):
            H = F.relu(self.recursion(H))  # [N, C, H, W]  H_t
            estimates.append(self.conv_rec(F.relu(self.rec1(H))) + x)  # [N, 1, H, W]  y_t
        y = sum(w * y_t for w, y_t in zip(self.w, estimates, strict=True))  # [N, 1, H, W]
        return torch.cat([y, *estimates], dim=1) if self.training else y

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """α · mean_t L(y_t) + (1 − α) · L(y) of `forward`'s output in training, [N, 1 + T, p, p] → scalar.

        The authors' term β‖W‖² is `optim.weight_decay`.
        """
        y, estimates = prediction[:, :1], prediction[:, 1:]
        each = euclidean(estimates, truth.expand_as(estimates)) / self.T
        return self.alpha * each + (1 - self.alpha) * euclidean(y, truth)
