"""A network folded for inference: BatchNorm into the convolutions, sums and ReLUs fused."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drrn.model import DRRN

Affine = tuple[Tensor, Tensor] | None  # scale and shift of every channel; None: there is no BatchNorm


# ---------------------------------------------------------------------- the network, folded


def affine(norm: nn.Module) -> Affine:
    """BatchNorm in evaluation mode as scale and shift of every channel, float64 [C]; None for no norm."""
    if not isinstance(norm, nn.BatchNorm2d):
        return None
    values = norm.running_mean, norm.running_var, norm.weight, norm.bias
    mean, var, weight, bias = (value.detach().cpu().double() for value in values)
    scale = weight / torch.sqrt(var + norm.eps)
    return scale, bias - mean * scale


class Convolution:
    """A 3×3 convolution, the affine map of a BatchNorm after it, a sum and a ReLU, as one step.

    Args:
        conv: weights and bias; copied.
        after: affine map of every output channel, folded into them.
    """

    def __init__(self, conv: nn.Conv2d, after: Affine) -> None:
        weight, bias = conv.weight, conv.bias
        if after is not None:
            scale, shift = after
            weight = weight.cpu().double() * scale[:, None, None, None]
            bias = shift if bias is None else bias.cpu().double() * scale + shift
        self.bias = None if bias is None else bias.to(conv.weight)
        self.weight = weight.to(conv.weight).contiguous(memory_format=torch.channels_last)
        self.fused = (
            self.weight.device.type == "cpu"
            and self.weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
        )
        if self.fused:
            size = [1, self.weight.shape[1], 256, 256]  # a typical tile; only the order of the weights follows it
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, [1, 1], [1, 1], [1, 1], 1, size)

    def __call__(self, x: Tensor, add: Tensor | None = None, relu: bool = True, padded: bool = True) -> Tensor:
        """x [N, C, H, W] → ReLU(W ∗ x + b + add) [N, C', H, W]; `add` is overwritten by the result.

        Not `padded`, there are no zeros above and below x: [N, C', H - 2, W].
        """
        padding = [int(padded), 1]
        if self.fused:  # the operators that Inductor emits on CPUs; torch's version is pinned
            geometry = (padding, [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
            if add is None:
                return torch.ops.mkldnn._convolution_pointwise(
                    x, self.weight, self.bias, *geometry, "relu" if relu else "none", [], ""
                )
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                add, x, self.weight, self.bias, *geometry, "add", 1.0, "relu" if relu else None, [], ""
            )
        y = F.conv2d(x, self.weight, self.bias, padding=padding)
        y = y if add is None else add.add_(y)
        return y.relu_() if relu else y


class Unit(NamedTuple):
    """A residual unit, folded."""

    conv_a: Convolution  # with norm_b and its ReLU
    conv_b: Convolution  # with `norm` and its ReLU, unless H^u is kept
    norm: Affine  # what H^u passes next
    keep: bool  # H^u itself is needed: DRRN_C


class Folded:
    """A copy of a network for inference: Eq. 4–9 with every BatchNorm folded and every ReLU fused.

    Between two convolutions stands ReLU(norm(H)). In the multi-path structure H^u itself is needed by nobody
    else (Eq. 5 adds H⁰), so with norm(H) = s·H + t

        ReLU(norm(H^u)) = ReLU((s·W_b) ∗ q + (s·b + t) + s·H⁰),

    one convolution with a sum and a ReLU. In DRRN_C H^u is the next unit's identity and stays.
    """

    @torch.inference_mode()
    def __init__(self, network: DRRN) -> None:
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        packed: dict[nn.Conv2d, Convolution] = {}

        def convolution(conv: nn.Conv2d, after: Affine) -> Convolution:
            if after is not None:
                return Convolution(conv, after)
            if conv not in packed:  # shared by all units when no BatchNorm tells them apart
                packed[conv] = Convolution(conv, None)
            return packed[conv]

        blocks = list(network.blocks)
        self.rectified, self.input_relu = network.rectified_identity, blocks[0].input_relu
        self.first = self._channels(affine(blocks[0].norm))
        self.blocks = []
        for b, block in enumerate(blocks):
            following = affine(blocks[b + 1].norm if b + 1 < len(blocks) else network.norm_rec)
            norms = [affine(norm) for norm in block.norm_a] + [following]  # norms[u] is applied to H^u
            units = []
            for u in range(block.U):
                w = 0 if block.weight_sharing else u
                keep = not block.multi_path and u + 1 < block.U  # H^{u+1} itself is needed
                units.append(
                    Unit(
                        convolution(block.conv_a[w], affine(block.norm_b[u])),
                        convolution(block.conv_b[w], None if keep else norms[u + 1]),
                        self._channels(norms[u + 1]),
                        keep,
                    )
                )
            conv = convolution(block.conv, None if units else following)
            self.blocks.append((conv, self._channels(norms[0]), units))
        self.rec = convolution(network.conv_rec, None)

    def _channels(self, values: Affine) -> Affine:
        """Scale and shift [C] → [1, C, 1, 1] as the feature maps are."""
        return values and tuple(v.to(self.device, self.dtype)[None, :, None, None] for v in values)

    def __call__(self, x: Tensor) -> Tensor:
        """What `network(x)` gives [N, 1, H, W] → [N, 1, H, W]."""
        from drrn.fast.stream import Stream

        return Stream(self, x.shape[2])(x)


def _activate(H: Tensor, norm: Affine, out: Tensor, relu: bool = True) -> Tensor:
    """ReLU(norm(H)) into `out`."""
    if norm is not None:
        H = torch.mul(H, norm[0], out=out).add_(norm[1])
    return torch.clamp_min(H, 0, out=out) if relu else out.copy_(H)
