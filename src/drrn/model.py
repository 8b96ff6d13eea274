"""DRRN, the Deep Recursive Residual Network.

Y. Tai, J. Yang, X. Liu, "Image Super-Resolution via Deep Recursive Residual Network", CVPR 2017.
Equation and section numbers are that paper's. Details that it omits (where BatchNorm is placed, which layers
are shared) follow the authors' Caffe release, tyshiwo/DRRN_CVPR17.

    Eq. 3     H^u = F(H^{u-1}, W^u) + H^{u-1}                     a residual unit in a chain
    Eq. 4, 5  H^u = G(H^{u-1}) = F(H^{u-1}, W) + H⁰               DRRN's, with H⁰ = f_b(x_{b-1})
    Eq. 6, 8  x_b = R_b(x_{b-1}) = H^U = G(G(… G(f_b(x_{b-1}))…))  a recursive block
    Eq. 7     d = (1 + 2U) · B + 1                                the depth
    Eq. 9     y = D(x) = f_Rec(R_B(… R_1(x) …)) + x               the network; Eq. 10 is in losses.py

One class serves the whole family of the paper's experiments:

    DRRN(B=1, U=25)                                     the paper's best model, Sec. 4.4
    DRRN(B, U, weight_sharing=False)                    DRRN_NS,   Sec. 4.5
    DRRN(B, U, multi_path=False)                        DRRN_C,    Sec. 4.5
    DRRN(B, U, weight_sharing=False, multi_path=False)  DRRN_NS_C, Tab. 4
    DRRN(B=19, U=0, features=64)                        VDSR,      Sec. 3.3
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from drrn import paper
from drrn.layers import conv_weights, convolution, in_float32, normalisation


class RecursiveBlock(nn.Module):
    """R_b of Eq. 8: one convolution f_b, then U residual units G (Sec. 3.2, Fig. 4).

    Pre-activation throughout (Sec. 3.1): every convolution is preceded by BatchNorm and ReLU. With `weight_sharing`
    all U units share one pair of convolutions, while each unit has its own BatchNorms, as in the release. The
    arguments are those of `DRRN`.
    """

    def __init__(
        self,
        in_channels: int,
        features: int,
        U: int,
        *,
        norm: str,
        bias: bool,
        weight_sharing: bool,
        multi_path: bool,
        rectified_identity: bool,
        input_relu: bool,
    ) -> None:
        super().__init__()
        self.U, self.weight_sharing, self.multi_path = U, weight_sharing, multi_path
        self.rectified_identity, self.input_relu = rectified_identity, input_relu
        sets = min(U, 1) if weight_sharing else U  # weight sets W of the residual function (Eq. 4)
        self.norm = normalisation(norm, in_channels)
        self.conv = convolution(in_channels, features, 3, bias)
        self.norm_a = nn.ModuleList(normalisation(norm, features) for _ in range(U))
        self.norm_b = nn.ModuleList(normalisation(norm, features) for _ in range(U))
        self.conv_a = nn.ModuleList(convolution(features, features, 3, bias) for _ in range(sets))
        self.conv_b = nn.ModuleList(convolution(features, features, 3, bias) for _ in range(sets))

    def first(self, x: Tensor) -> Tensor:
        """H⁰ = f_b(x_{b-1}) of Eq. 5."""
        x = self.norm(x)
        return self.conv(F.relu(x) if self.input_relu else x)

    def residual(self, H: Tensor, u: int) -> Tensor:
        """F(H^{u-1}, W) of Eq. 4, for u counted from 0: BN-ReLU-conv twice (Fig. 3)."""
        w = 0 if self.weight_sharing else u
        H = self.conv_a[w](F.relu(self.norm_a[u](H)))
        return self.conv_b[w](F.relu(self.norm_b[u](H)))

    def forward(self, x: Tensor) -> Tensor:
        """x_{b-1} [N, in_channels, H, W] → x_b [N, features, H, W]."""
        H0 = in_float32(self.first, x) if x.shape[1] == 1 else self.first(x)  # [N, C, H, W]
        H = H0
        for u in range(self.U):
            identity = H0 if self.multi_path else H  # Eq. 5; the chain of DRRN_C is Eq. 3
            H = self.residual(H, u) + (F.relu(identity) if self.rectified_identity else identity)  # H^u
        return H


class DRRN(nn.Module):
    """y = D(x) = f_Rec(R_B(… R_1(x) …)) + x (Eq. 9), on the luminance of an interpolated image.

    Args:
        B: recursive blocks, ≥ 1.
        U: residual units in each block, ≥ 0. U = 0 is VDSR: plain convolutions, d = B + 1.
        features: filters of every convolution but the last.
        norm: "batch" (the paper and the release) or "none".
        bias: biases on the convolutions (the release has them).
        weight_sharing: share the convolutions over a block's units; False is DRRN_NS.
        multi_path: identity from H⁰ (Eq. 5); False is the chain of DRRN_C (Eq. 3).
        rectified_identity: apply ReLU to every identity: F + ReLU(x) in Eq. 9, F + ReLU(H⁰) in Eq. 5. Not the
            paper's: jt827859032's and yjn870's weights need it, because of in-place ReLUs in their DRRN-pytorch.
        input_relu: a ReLU before the first convolution. False is the VDSR of huangzehao/caffe-vdsr and
            twtygqyy/pytorch-vdsr; they differ where bicubic interpolation overshoots below 0.
    """

    input = "interpolated"  # x is the low-resolution image, enlarged by bicubic
    loss = "euclidean"  # Eq. 10

    def __init__(
        self,
        B: int,
        U: int,
        features: int = 128,
        norm: str = "batch",
        bias: bool = True,
        weight_sharing: bool = True,
        multi_path: bool = True,
        rectified_identity: bool = False,
        input_relu: bool = True,
    ) -> None:
        for name, value, least in (("B", B, 1), ("U", U, 0), ("features", features, 1)):
            if value < least:
                raise ValueError(f"{name} = {value}: must be at least {least}")
        super().__init__()
        self.B, self.U, self.features, self.rectified_identity = B, U, features, rectified_identity
        shared = dict(norm=norm, bias=bias, weight_sharing=weight_sharing, multi_path=multi_path)
        shared |= dict(rectified_identity=rectified_identity)
        self.blocks = nn.ModuleList(
            RecursiveBlock(features if b else 1, features, U, input_relu=input_relu or b > 0, **shared)
            for b in range(B)
        )
        self.norm_rec = normalisation(norm, features)
        self.conv_rec = convolution(features, 1, 3, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Interpolated luminance [N, 1, H, W], float, 0…1, any H, W ≥ 1 → super-resolved, same shape, not clamped."""
        xb = x  # [N, 1, H, W]  x_0 = x
        for block in self.blocks:
            xb = block(xb)  # [N, C, H, W]  x_b = R_b(x_{b-1}), Eq. 8
        residual = self.conv_rec(F.relu(self.norm_rec(xb)))  # [N, 1, H, W]  f_Rec
        return residual + (F.relu(x) if self.rectified_identity else x)  # the global residual (GRL)

    @property
    def depth(self) -> int:
        """d, the number of convolutional layers on the longest path (Eq. 7)."""
        return paper.depth(self.B, self.U)

    @property
    def receptive_radius(self) -> int:
        """Pixels to each side on which an output pixel depends: d, since every layer is 3×3."""
        return self.depth

    @property
    def conv_weight_count(self) -> int:
        """k of the paper: convolution weights, shared ones counted once; no biases, no BatchNorm.

        At B2U3 they are 739,584; the 784K of Sec. 4.3 is a misprint (its other counts follow this rule).
        """
        return conv_weights(self)
