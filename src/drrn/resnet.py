"""ResNet's chain of residual units, which Table 1 and Fig. 2 (a) of the DRRN paper compare with DRRN.

K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016: reference [8].

    x̂ = U(x) = σ(F(x, W) + x),   F(x, W) = W_2 σ(W_1 x)      Eq. 1, BatchNorm after each convolution
    y = f_Rec(U_U(U_{U-1}(… (U_1(f_1(x))) …)))               Table 1: no global residual

DRRN_NS_C (`model=drrn_ns_c`) is the same chain with activations before the convolutions and the global residual.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from drrn.layers import MOST, convolution, in_float32, normalisation, within


class Unit(nn.Module):
    """x̂ = σ(F(x, W) + x) of Eq. 1."""

    def __init__(self, features: int, norm: str) -> None:
        super().__init__()
        self.conv1, self.norm1 = convolution(features, features, 3), normalisation(norm, features)
        self.conv2, self.norm2 = convolution(features, features, 3), normalisation(norm, features)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → the same shape."""
        residual = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(residual)) + x)


class ResNet(nn.Module):
    """y = f_Rec(U_U(… U_1(f_1(x)) …)), on the luminance of an interpolated image.

    Args:
        U: residual units, ≥ 1; 2U + 2 layers.
        features: filters of every convolution but the last; 128 gives 2,304 + 294,912 U weights.
        norm: "batch" or "none".
    """

    input = "interpolated"
    loss = "euclidean"  # Eq. 10

    def __init__(self, U: int = 9, features: int = 128, norm: str = "batch") -> None:
        within(1, MOST, U=U, features=features)
        super().__init__()
        self.features = features
        self.depth = self.receptive_radius = 2 * U + 2  # every layer is 3×3
        self.conv1, self.norm1 = convolution(1, features, 3), normalisation(norm, features)
        self.units = nn.Sequential(*(Unit(features, norm) for _ in range(U)))
        self.rec = convolution(features, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Interpolated luminance [N, 1, H, W], 0…1 → the estimate, same shape, not clamped."""
        H = F.relu(self.norm1(in_float32(self.conv1, x)))  # [N, C, H, W]  f_1
        return self.rec(self.units(H))  # [N, 1, H, W]  f_Rec
