"""The precision of inference: float32, TF32 or bfloat16, and which of them is fast on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from drrn.errors import UserError


def chosen(precision: str, device: torch.device, folded: bool = True) -> str:
    """ "float32", "tf32" or "bf16"; "auto" becomes the fastest that the device computes in hardware.

    Args:
        precision: one of these, or "auto".
        device: of the network.
        folded: whether the network is one of `prepared.FOLDINGS`; the others cannot run in bfloat16.

    Raises:
        ValueError: another precision.
        UserError: the device or the network does not support TF32 or bfloat16.
    """
    if precision not in ("auto", "float32", "tf32", "bf16"):
        raise ValueError(f"precision = {precision!r}: one of auto, float32, tf32, bf16")
    if precision == "auto":
        return "bf16" if folded and _has_bf16(device) else "float32"
    if precision == "bf16" and not folded:
        raise UserError("precision = bf16: networks other than DRRN and VDSR compute in float32 or tf32")
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision = tf32: only NVIDIA's GPUs have it, not {device.type}; float32 or bf16")
    return precision


def _has_bf16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware; an emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        in_hardware = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return in_hardware and onednn(torch.bfloat16)
    return False


def onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused convolutions support this dtype on this CPU."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Switch TF32 (relative error 1e-3) on or off, and cuDNN's benchmark off: it would run for every strip height."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = on, False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before
