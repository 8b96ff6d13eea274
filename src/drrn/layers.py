"""What networks are made of: convolutions with He's initialisation, BatchNorm, the count of weights, limits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MOST = 2**13  # filters of a layer, and layers
NORMS = ("batch", "none")
WITH_AUTOCAST = ("cpu", "cuda", "mps")  # torch.amp.is_autocast_available is not for torch.compile before 2.13


def he_normal(conv: nn.Conv2d | nn.ConvTranspose2d) -> nn.Conv2d | nn.ConvTranspose2d:
    """`conv` with the initialisation of Sec. 4.2: He normal over the fan-in, biases 0.

    The fan-in is what one output is a sum of: a transposed convolution [C, C', k, k] of stride s reaches each
    output with C · k² / s² weights.
    """
    transposed = isinstance(conv, nn.ConvTranspose2d)
    taps = conv.kernel_size[0] * conv.kernel_size[1] / (conv.stride[0] * conv.stride[1] if transposed else 1)
    nn.init.normal_(conv.weight, std=math.sqrt(2) / math.sqrt(conv.in_channels * taps))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def within(least: int, most: int, **values: int) -> None:
    """Refuse arguments of a network that are not least … most: a ValueError that names one."""
    for name, value in values.items():
        if not least <= value <= most:
            raise ValueError(f"{name} = {value}: must be {least} … {most}")


def convolution(in_channels: int, out_channels: int, size: int, bias: bool = True) -> nn.Conv2d:
    """A size×size convolution that keeps height and width, zeros around the image; `size` is odd."""
    return he_normal(nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=bias))


def normalisation(norm: str, channels: int) -> nn.Module:
    """BatchNorm with its own affine (Caffe's BatchNorm + Scale), or nothing; a ValueError for another name."""
    if norm not in NORMS:
        raise ValueError(f"norm = {norm!r}: allowed are {', '.join(NORMS)}")
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def conv_weights(network: nn.Module) -> int:
    """k of the paper: weights of convolutions, transposed ones too, each shared one once; no biases."""
    return sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d))


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` without autocast, which would round the image in `x` to steps of 1/256; then in autocast's type.

    The network sharpens that rounding: it costs published weights 0.03 dB at ×3 and 0.11 dB at ×4.
    """
    kind = x.device.type
    if kind not in WITH_AUTOCAST or not torch.is_autocast_enabled(kind):
        return layer(x)
    with torch.autocast(kind, enabled=False):
        return layer(x.float()).to(torch.get_autocast_dtype(kind))
