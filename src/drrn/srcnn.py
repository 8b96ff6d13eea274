"""SRCNN: three convolutions.

C. Dong, C. C. Loy, K. He, X. Tang, "Image Super-Resolution Using Deep Convolutional Networks", TPAMI 38(2),
2016. It is reference [2] of the DRRN paper: Fig. 1, 7 and 9, Tables 2 and 3.

    F_1(x) = max(0, W_1 ∗ x + B_1)         64 filters of 9×9: features of patches
    F_2(x) = max(0, W_2 ∗ F_1(x) + B_2)    32 filters of 1×1 (9-1-5), 3×3 or 5×5 (9-3-5, 9-5-5): the mapping
    F(x)   = W_3 ∗ F_2(x) + B_3            one filter of 5×5: the image, without a residual
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from drrn.layers import MOST, convolution, in_float32, within


class SRCNN(nn.Module):
    """y = F(x), on the luminance of an interpolated image.

    Args:
        middle: side of the second layer's filters, 1, 3 or 5: 9-1-5 has 8,032 weights, 9-5-5 has 57,184.
        features: filters of the first layer; the second has half of them.
    """

    input = "interpolated"
    loss = "euclidean"  # the mean squared error
    depth = 3

    def __init__(self, middle: int = 1, features: int = 64) -> None:
        within(2, MOST, features=features)
        if middle not in (1, 3, 5):
            raise ValueError(f"middle = {middle}: must be 1, 3 or 5")
        super().__init__()
        self.features, self.receptive_radius = features, 4 + middle // 2 + 2
        self.conv1 = convolution(1, features, 9)
        self.conv2 = convolution(features, features // 2, middle)
        self.conv3 = convolution(features // 2, 1, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Interpolated luminance [N, 1, H, W], 0…1 → the estimate, same shape, not clamped."""
        F1 = F.relu(in_float32(self.conv1, x))  # [N, 64, H, W]
        F2 = F.relu(self.conv2(F1))  # [N, 32, H, W]
        return self.conv3(F2)  # [N, 1, H, W]
