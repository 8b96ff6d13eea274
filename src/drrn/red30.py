"""RED30: convolutions and as many transposed ones, with symmetric skip connections.

X.-J. Mao, C. Shen, Y.-B. Yang, "Image Restoration Using Very Deep Convolutional Encoder-Decoder Networks with
Symmetric Skip Connections", NIPS 2016. It is reference [17] of the DRRN paper: Fig. 1 and 9.

With n = 15 convolutions c_i and n transposed ones t_j, σ = ReLU:

    h_i = σ(c_i(h_{i-1})),                      h_0 = x
    g_j = σ(t_j(g_{j-1}) [+ h_{n-j}]),          g_0 = h_n; a skip if n - j is even, that is at every second layer
    y   = t_n(g_{n-1}) + x                      the global residual
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from drrn.layers import MOST, convolution, he_normal, in_float32, within


class RED30(nn.Module):
    """y = t_n(g_{n-1}) + x, on the luminance of an interpolated image.

    Args:
        layers: n ≥ 2, the number of convolutions and of transposed ones; 15 is RED30.
        features: filters of every layer but the last; 128 gives 4,131,072 weights.
    """

    input = "interpolated"
    loss = "euclidean"  # the mean squared error

    def __init__(self, layers: int = 15, features: int = 128) -> None:
        within(2, MOST, layers=layers)
        within(1, MOST, features=features)
        super().__init__()
        self.features = features
        self.depth = self.receptive_radius = 2 * layers  # every layer is 3×3
        self.convs = nn.ModuleList(convolution(features if i else 1, features, 3) for i in range(layers))
        self.deconvs = nn.ModuleList(self._transposed(features, features) for _ in range(layers - 1))
        self.conv_rec = self._transposed(features, 1)

    @staticmethod
    def _transposed(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
        return he_normal(nn.ConvTranspose2d(in_channels, out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Interpolated luminance [N, 1, H, W], 0…1 → the estimate, same shape, not clamped."""
        n, skips = len(self.convs), {}
        h = x  # [N, 1, H, W]  h_0
        for i, conv in enumerate(self.convs, start=1):
            h = F.relu(conv(h) if i > 1 else in_float32(conv, h))  # [N, C, H, W]  h_i
            if i % 2 == 0 and i < n:
                skips[i] = h
        g = h  # [N, C, H, W]  g_0
        for j, deconv in enumerate(self.deconvs, start=1):
            g = deconv(g)
            g = F.relu(g + skips.pop(n - j) if n - j in skips else g)  # [N, C, H, W]  g_j
        return self.conv_rec(g) + x  # [N, 1, H, W]
