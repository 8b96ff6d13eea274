"""DRRN, the Deep Recursive Residual Network.

Y. Tai, J. Yang, X. Liu, "Image Super-Resolution via Deep Recursive Residual Network", CVPR 2017.
Equation and section numbers are that paper's. What it leaves out (where BatchNorm stands, what is
shared) follows the authors' Caffe release, tyshiwo/DRRN_CVPR17.

One class serves the whole family of the paper's experiments:

    DRRN(B=1, U=25)                                   the paper's best model, Sec. 4.4
    DRRN(B, U, weight_sharing=False)                  DRRN_NS,   Sec. 4.5
    DRRN(B, U, multi_path=False)                      DRRN_C,    Sec. 4.5
    DRRN(B, U, weight_sharing=False, multi_path=False)  DRRN_NS_C, Tab. 4
    DRRN(B=19, U=0, features=64)                      VDSR,      Sec. 3.3
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NORMS = ("batch", "none")


def conv3x3(in_channels: int, out_channels: int, bias: bool) -> nn.Conv2d:
    """A 3×3 convolution with the initialisation of Sec. 4.2: He normal over the fan-in, biases 0."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def normalisation(norm: str, channels: int) -> nn.Module:
    """BatchNorm with its own affine (Caffe's BatchNorm + Scale), or nothing."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def activate(norm: nn.Module, H: Tensor) -> Tensor:
    """BatchNorm, then ReLU: what stands before every convolution (Sec. 3.1). H itself stays as it is.

    The ReLU overwrites what BatchNorm made, of which nothing else has need, and saves a feature map; without a
    BatchNorm it would overwrite H, which Eq. 5 adds again.
    """
    return F.relu(H) if isinstance(norm, nn.Identity) else F.relu_(norm(H))


@contextmanager
def statistics_kept(norms: list[nn.Module]) -> Iterator[None]:
    """Inside, BatchNorm in training uses its batch's statistics and leaves its running ones as they are."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def residual_unit(
    H: Tensor,
    identity: Tensor,
    convs: tuple[tuple[Tensor, Tensor | None], ...],
    affines: tuple[tuple[Tensor, Tensor], ...],
    eps: float,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """H^u of Eq. 5 in training as a function of tensors alone, so that one compiled graph serves all U units.

    BatchNorm is written out: a graph of PyTorch's own would be compiled anew for every momentum
    (`SuperResolution.on_train_batch_start` sets one at every step) and for every unit's layers.

    Args:
        H: H^{u-1} [N, C, H, W].
        identity: what is added, [N, C, H, W].
        convs: weight [C, C, 3, 3] and bias of both convolutions.
        affines: weight and bias [C] of both BatchNorms; () without them.
        eps: of the BatchNorms.

    Returns:
        H^u, and mean and variance [C] of the batch before each BatchNorm, float32.
    """
    statistics = []
    for k, (weight, bias) in enumerate(convs):
        if affines:
            gain, shift = affines[k]
            wide = H.to(torch.promote_types(H.dtype, torch.float32))  # bfloat16 is too coarse for statistics
            variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
            statistics.append((mean, variance))
            scale = gain * torch.rsqrt(variance + eps)
            H = ((wide - mean[:, None, None]) * scale[:, None, None] + shift[:, None, None]).to(H.dtype)
        H = F.conv2d(F.relu(H), weight, bias, padding=1)
    return H + identity, statistics


def average(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Let a BatchNorm's running statistics follow a batch's, as the layer does when it is called.

    Raises:
        ValueError: one value a channel has no variance.
    """
    if count < 2:
        raise ValueError("BatchNorm needs more than one value a channel in training")
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)


class RecursiveBlock(nn.Module):
    """R_b of Eq. 8: one convolution f_b, then U residual units G (Sec. 3.2, Fig. 4).

    Pre-activation throughout (Sec. 3.1): every convolution is preceded by BatchNorm and ReLU. With
    `weight_sharing` the two convolutions of a unit exist once and serve all U units, while the
    BatchNorm of every unit is its own, as in the release.
    """

    def __init__(
        self,
        in_channels: int,
        features: int,
        U: int,
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
        self.checkpointing = False  # see `DRRN.checkpointing`
        self.compiled: Callable | None = None  # `residual_unit`, see `DRRN.compile_units`
        sets = min(U, 1) if weight_sharing else U  # weight sets W of the residual function (Eq. 4)
        self.norm = normalisation(norm, in_channels)
        self.conv = conv3x3(in_channels, features, bias)
        self.norm_a = nn.ModuleList(normalisation(norm, features) for _ in range(U))
        self.norm_b = nn.ModuleList(normalisation(norm, features) for _ in range(U))
        self.conv_a = nn.ModuleList(conv3x3(features, features, bias) for _ in range(sets))
        self.conv_b = nn.ModuleList(conv3x3(features, features, bias) for _ in range(sets))

    def residual(self, H: Tensor, u: int) -> Tensor:
        """F(H^{u-1}, W) of Eq. 4, for u counted from 0: BN-ReLU-conv twice (Fig. 3)."""
        w = 0 if self.weight_sharing else u
        H = self.conv_a[w](activate(self.norm_a[u], H))
        return self.conv_b[w](activate(self.norm_b[u], H))

    def recomputed_residual(self, H: Tensor, u: int) -> Tensor:
        """`residual` that keeps nothing but H for its gradient and computes the rest once more when that is due."""
        norms = [self.norm_a[u], self.norm_b[u]]
        norms = [] if isinstance(norms[0], nn.Identity) else norms
        return checkpoint(
            self.residual,
            H,
            u,
            use_reentrant=False,
            preserve_rng_state=False,  # there is no randomness in a unit
            context_fn=lambda: (nullcontext(), statistics_kept(norms)),  # forward, and once more
        )

    def compiled_unit(self, H: Tensor, identity: Tensor, u: int) -> Tensor:
        """`residual` + identity through the compiled function."""
        w = 0 if self.weight_sharing else u
        convs = tuple((conv.weight, conv.bias) for conv in (self.conv_a[w], self.conv_b[w]))
        norms = [norm for norm in (self.norm_a[u], self.norm_b[u]) if not isinstance(norm, nn.Identity)]
        if not all(type(norm) is nn.BatchNorm2d for norm in norms):
            raise TypeError(f"a compiled unit has BatchNorm2d written out, not {type(norms[0]).__name__}")
        arguments = (H, identity, convs, tuple((n.weight, n.bias) for n in norms), norms[0].eps if norms else 0.0)
        if self.checkpointing:
            H, statistics = checkpoint(self.compiled, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            H, statistics = self.compiled(*arguments)
        for norm, (mean, variance) in zip(norms, statistics, strict=True):
            average(norm, mean, variance, H.numel() // H.shape[1])
        return H

    def forward(self, x: Tensor) -> Tensor:
        """x_{b-1} [N, in_channels, H, W] → x_b [N, features, H, W]."""
        x = self.norm(x)
        H0 = self.conv(F.relu(x) if self.input_relu else x)  # [N, C, H, W]  H⁰_b = f_b(x_{b-1}), itself no ReLU
        H = H0
        learns = self.training and torch.is_grad_enabled()
        again = self.checkpointing and learns
        residual = self.recomputed_residual if again else self.residual
        for u in range(self.U):
            identity = H0 if self.multi_path else H  # Eq. 5; the chain of DRRN_C is Eq. 3
            if self.rectified_identity:
                identity = F.relu(identity)
            fused = self.compiled is not None and learns
            H = self.compiled_unit(H, identity, u) if fused else residual(H, u).add_(identity)  # [N, C, H, W]
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
        rectified_identity: every identity passes a ReLU: x̂ = F + ReLU(x) in Eq. 9, H^u = F + ReLU(H⁰) in Eq. 5.
            Not the paper's: it is what the weights of jt827859032/DRRN-pytorch and yjn870/DRRN-pytorch mean,
            whose in-place ReLUs overwrite the tensors that their identities use.
        input_relu: a ReLU before the first convolution. False is the VDSR of huangzehao/caffe-vdsr and
            twtygqyy/pytorch-vdsr, which convolves its input as it is; they differ where bicubic
            interpolation overshoots below 0.

    Raises:
        ValueError: for a value outside the above.
    """

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
        super().__init__()
        if B < 1:
            raise ValueError(f"B = {B}: a DRRN has at least one recursive block")
        if U < 0:
            raise ValueError(f"U = {U}: the number of residual units is 0 (VDSR) or more")
        if features < 1:
            raise ValueError(f"features = {features}: a convolution needs at least one filter")
        if norm not in NORMS:
            raise ValueError(f"norm = {norm!r}: allowed are {', '.join(NORMS)}")
        self.B, self.U, self.features, self.rectified_identity = B, U, features, rectified_identity
        self.blocks = nn.ModuleList(
            RecursiveBlock(
                1 if b == 0 else features,
                features,
                U,
                norm,
                bias,
                weight_sharing,
                multi_path,
                rectified_identity,
                input_relu=input_relu or b > 0,
            )
            for b in range(B)
        )
        self.norm_rec = normalisation(norm, features)
        self.conv_rec = conv3x3(features, 1, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Super-resolve.

        Args:
            x: interpolated low-resolution luminance [N, 1, H, W], float, 0…1; any H, W ≥ 1.

        Returns:
            The estimate of the high-resolution luminance, same shape, not clamped.
        """
        xb = x  # [N, 1, H, W]  x_0 = x
        for block in self.blocks:
            xb = block(xb)  # [N, C, H, W]  x_b = R_b(x_{b-1}), Eq. 8
        residual = self.conv_rec(activate(self.norm_rec, xb))  # [N, 1, H, W]  f_Rec
        return residual + (F.relu(x) if self.rectified_identity else x)  # the global residual (GRL)

    @property
    def checkpointing(self) -> bool:
        """Whether training keeps one feature map a unit instead of four, and computes the others once more.

        Off at first. The gradients, BatchNorm's statistics and the result are the same; a step takes about a
        sixth longer, since the last convolution of a unit need not be computed again (compiled units compute it).
        """
        return self.blocks[0].checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        for block in self.blocks:
            block.checkpointing = on

    def compile_units(self) -> None:
        """Train through `torch.compile`: what stands between the convolutions of a unit becomes few passes over it.

        Gradients and statistics are the same to rounding. The first step takes the compiler's time, once for all
        units and blocks; evaluation and inference stay as they are (`drrn.inference` has its own fusion).
        """
        torch._dynamo.config.optimize_ddp = False  # it would split the unit where DDP's buckets of gradients end
        compiled = torch.compile(
            residual_unit, dynamic=False, fullgraph=True, isolate_recompiles=True, recompile_limit=64
        )
        for block in self.blocks:
            block.compiled = compiled

    @property
    def depth(self) -> int:
        """d, the number of convolutional layers on the longest path (Eq. 7)."""
        return (1 + 2 * self.U) * self.B + 1

    @property
    def receptive_radius(self) -> int:
        """Pixels to each side that one output pixel depends on: every layer is 3×3, so d."""
        return self.depth

    @property
    def conv_weight_count(self) -> int:
        """k of the paper: convolution weights, each shared one once; no biases, no BatchNorm.

        Eq. 9 at B2U3 gives 739,584; the 784K that Sec. 4.3 prints there is a misprint (every other
        count in the paper follows this rule).
        """
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Conv2d))
