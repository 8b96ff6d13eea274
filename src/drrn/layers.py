"""Building blocks of networks: convolutions with He's initialisation, BatchNorm, the count of weights, limits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MOST = 2**13  # maximum filters of a layer, and layers
NORMS = ("batch", "none")
WITH_AUTOCAST = ("cpu", "cuda", "mps")  # torch.compile before 2.13 does not support is_autocast_available


def he_normal(conv: nn.Conv2d | nn.ConvTranspose2d) -> nn.Conv2d | nn.ConvTranspose2d:
    """Initialise `conv` as in Sec. 4.2 and return it: He normal over the fan-in, biases 0.

    The fan-in is the number of terms in an output value: C · k² / s² with transposed weights [C, C', k, k], stride s.
    """
    transposed = isinstance(conv, nn.ConvTranspose2d)
    taps = conv.kernel_size[0] * conv.kernel_size[1] / (conv.stride[0] * conv.stride[1] if transposed else 1)
    nn.init.normal_(conv.weight, std=math.sqrt(2) / math.sqrt(conv.in_channels * taps))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def within(least: int, most: int, **values: int) -> None:
    """Raise a ValueError for the first of a network's arguments that is not in least … most."""
    for name, value in values.items():
        if not least <= value <= most:
            raise ValueError(f"{name} = {value}: must be {least} … {most}")


def convolution(in_channels: int, out_channels: int, size: int, bias: bool = True) -> nn.Conv2d:
    """A size×size convolution, zero-padded so that height and width stay the same; `size` is odd."""
    return he_normal(nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=bias))


def normalisation(norm: str, channels: int) -> nn.Module:
    """BatchNorm with affine parameters (Caffe's BatchNorm + Scale), or Identity; a ValueError for another name."""
    if norm not in NORMS:
        raise ValueError(f"norm = {norm!r}: allowed are {', '.join(NORMS)}")
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def conv_weights(network: nn.Module) -> int:
    """k of the paper: weights of convolutions, also transposed ones; shared ones count once, biases do not."""
    return sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d))


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute `layer(x)` without autocast and convert the result to autocast's dtype.

    Autocast would round the image in `x` to steps of 1/256, which costs published weights 0.03 dB at ×3 and 0.11 dB
    at ×4.
    """
    kind = x.device.type
    if kind not in WITH_AUTOCAST or not torch.is_autocast_enabled(kind):
        return layer(x)
    with torch.autocast(kind, enabled=False):
        return layer(x.float()).to(torch.get_autocast_dtype(kind))
