"""DRRN folded for inference: BatchNorm into the convolutions, sums and ReLUs fused.

Its speed-up is measured in docs/performance.md, "Measurements".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drrn.fast.precision import onednn
from drrn.model import DRRN

Affine = tuple[Tensor, Tensor] | None  # scale and shift of every channel; None without BatchNorm


def affine(norm: nn.Module) -> Affine:
    """BatchNorm in evaluation mode as scale and shift of every channel, float64 [C]; None for an Identity.

    Another norm is a TypeError.
    """
    if isinstance(norm, nn.Identity):
        return None
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        raise TypeError(f"{type(norm).__name__} cannot be folded into a convolution")
    values = norm.running_mean, norm.running_var, norm.weight, norm.bias
    mean, var, weight, bias = (value.detach().cpu().double() for value in values)
    scale = weight / torch.sqrt(var + norm.eps)
    return scale, bias - mean * scale


class Convolution:
    """A 3×3 convolution, the affine map `after` it (a BatchNorm), a sum and a ReLU, as one step.

    It computes in `dtype`; the result has the dtype `out` (None: `dtype`), the input either.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        after: Affine,
        dtype: torch.dtype = torch.float32,
        out: torch.dtype | None = None,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        weight, bias = conv.weight.detach(), conv.bias
        if after is not None:
            scale, shift = after
            weight = weight.cpu().double() * scale[:, None, None, None]
            bias = shift if bias is None else bias.cpu().double() * scale + shift
        self.dtype, self.out = dtype, out or dtype
        self.bias = None if bias is None else bias.detach().to(conv.weight.device, dtype)
        self.weight = weight.to(conv.weight.device, dtype).contiguous(memory_format=layout)
        self.fused = self.weight.device.type == "cpu" and onednn(dtype)
        if self.fused:
            size = [1, self.weight.shape[1], 256, 256]  # a typical tile; it determines the order of the weights only
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, [1, 1], [1, 1], [1, 1], 1, size)

    def __call__(self, x: Tensor, add: Tensor | None = None, relu: bool = True, padded: bool = True) -> Tensor:
        """x [N, C, H, W] → ReLU(W ∗ x + b + add) [N, C', H, W]; `add` is overwritten by the result.

        Without `padded` x gets no rows of zeros above and below: [N, C', H - 2, W].
        """
        what = x.to(self.dtype), self.weight, self.bias
        geometry = ([int(padded), 1], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
        if self.fused:  # the operators that Inductor emits on CPUs; tested with every torch version allowed
            mkldnn, after = torch.ops.mkldnn, "relu" if relu else None
            if add is None:
                y = mkldnn._convolution_pointwise(*what, *geometry, after or "none", [], "")
            else:
                y = mkldnn._convolution_pointwise_.binary(add, *what, *geometry, "add", 1.0, after, [], "")
        else:
            y = F.conv2d(*what, padding=geometry[0])
            y = y if add is None else add.add_(y)
            y = y.relu_() if relu else y
        return y.to(self.out)


class Unit(NamedTuple):
    """A residual unit, folded."""

    conv_a: Convolution  # with norm_b and its ReLU
    conv_b: Convolution  # with `norm` and its ReLU, unless H^u is kept
    norm: Affine  # the BatchNorm that is applied to H^u
    keep: bool  # whether H^u itself is needed: DRRN_C


class Folded:
    """A copy of a network for inference: Eq. 4–9 with every BatchNorm folded and every ReLU fused.

    Each convolution's input is ReLU(norm(H)). In the multi-path structure H^u itself has no other use (Eq. 5 adds
    H⁰), so with norm(H) = s·H + t

        ReLU(norm(H^u)) = ReLU((s·W_b) ∗ q + (s·b + t) + s·H⁰),

    one convolution with a sum and a ReLU. In DRRN_C H^u is the next unit's identity and stays.
    """

    @torch.inference_mode()
    def __init__(self, network: DRRN, precision: str = "float32") -> None:
        """In bf16 the first and the last convolution and the global residual stay in float32: bfloat16 would round
        the image to steps of 1/256, and the network would amplify the error."""
        parameter = next(network.parameters())
        self.device, self.tf32 = parameter.device, precision == "tf32"
        self.wide = torch.promote_types(parameter.dtype, torch.float32)  # of input and output
        self.dtype = torch.bfloat16 if precision == "bf16" else self.wide  # of the feature maps
        plain = self.device.type == "mps" or (self.device.type == "cuda" and precision == "float32")
        self.layout = torch.contiguous_format if plain else torch.channels_last  # tensor cores need channels last
        packed: dict[nn.Conv2d, Convolution] = {}

        def convolution(conv: nn.Conv2d, after: Affine) -> Convolution:
            shared = after is None  # by all units, if no unit's own BatchNorm is folded into it
            if shared and conv in packed:
                return packed[conv]
            first, last = conv is network.blocks[0].conv, conv is network.conv_rec
            dtype, out = self.wide if first or last else self.dtype, self.wide if last else self.dtype
            made = Convolution(conv, after, dtype, out, self.layout)
            return packed.setdefault(conv, made) if shared else made

        blocks = list(network.blocks)
        self.rectified, self.input_relu = network.rectified_identity, blocks[0].input_relu
        self.first = self._channels(affine(blocks[0].norm), self.wide)
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

    def _channels(self, values: Affine, dtype: torch.dtype | None = None) -> Affine:
        """Scale and shift [C] → [1, C, 1, 1], in the feature maps' dtype unless `dtype` is given."""
        return values and tuple(v.to(self.device, dtype or self.dtype)[None, :, None, None] for v in values)


def activate(H: Tensor, norm: Affine, out: Tensor, relu: bool = True) -> Tensor:
    """Write ReLU(norm(H)) into `out`."""
    if norm is not None:
        H = torch.addcmul(norm[1], H, norm[0], out=out)
    return torch.clamp_min(H, 0, out=out) if relu else out.copy_(H)
