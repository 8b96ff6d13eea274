"""FSRCNN: an hourglass of small layers on the low-resolution image, enlarged by the last layer.

C. Dong, C. C. Loy, X. Tang, "Accelerating the Super-Resolution Convolutional Neural Network", ECCV 2016.
It is reference [3] of the DRRN paper: Fig. 9. In its notation

    Conv(5, d, 1) – Conv(1, s, d) – m × Conv(3, s, s) – Conv(1, d, s) – DeConv(9, 1, d)

with a PReLU after each convolution: extraction, shrinking, mapping, expanding, deconvolution. The stride of the last
is the scale; no other layer depends on it.
"""

from __future__ import annotations

from torch import Tensor, nn

from drrn.layers import MOST, convolution, he_normal, in_float32, within


class FSRCNN(nn.Module):
    """y = DeConv(Expand(Map(Shrink(Extract(x))))), on the luminance of the low-resolution image.

    Args:
        scale: n, the stride of the deconvolution, 2 … 9.
        features: d, filters of extraction and expansion.
        s: filters of the layers between.
        m: mapping layers, ≥ 1.

    FSRCNN(scale, 56, 12, 4), the authors' best, has 12,464 weights.
    """

    input = "low"
    loss = "euclidean"  # the mean squared error

    def __init__(self, scale: int, features: int = 56, s: int = 12, m: int = 4) -> None:
        within(2, 9, scale=scale)  # a larger stride leaves pixels that no filter reaches
        within(1, MOST, features=features, s=s, m=m)
        super().__init__()
        d = self.features = features
        self.scale, self.depth = scale, m + 4
        # In low-resolution pixels: extraction 2, each mapping layer 1; the deconvolution (radius 4) reaches output
        # pixel n·i + r from pixels k ≤ i + (r + 4) / n.
        self.receptive_radius = 2 + m + (scale - 1 + 4) // scale
        self.extract = nn.Sequential(convolution(1, d, 5), nn.PReLU(d))
        self.shrink = nn.Sequential(convolution(d, s, 1), nn.PReLU(s))
        self.map = nn.Sequential(*(layer for _ in range(m) for layer in (convolution(s, s, 3), nn.PReLU(s))))
        self.expand = nn.Sequential(convolution(s, d, 1), nn.PReLU(d))
        # Height of the output: (H − 1) · n − 2 · 4 + 9 + (n − 1) = n · H.
        self.deconv = he_normal(nn.ConvTranspose2d(d, 1, 9, stride=scale, padding=4, output_padding=scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Low-resolution luminance [N, 1, H, W], 0…1 → the estimate [N, 1, n·H, n·W], not clamped."""
        maps = in_float32(self.extract, x)  # [N, d, H, W]
        maps = self.map(self.shrink(maps))  # [N, s, H, W]
        return self.deconv(self.expand(maps))  # [N, 1, n·H, n·W]
