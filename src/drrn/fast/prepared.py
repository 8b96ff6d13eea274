"""Preparing a network for inference: the interface between `drrn.inference` and the fast implementations.

Networks of the classes in `FOLDINGS` are folded. Every other network runs unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from drrn.fast.folded import Folded
from drrn.fast.memory import TensorBytes
from drrn.fast.precision import tf32
from drrn.fast.stream import MAPS, Stream
from drrn.model import DRRN

Opened = Callable[[Tensor], Tensor]  # the image's next rows [N, 1, h, W] → newly completed rows [N, 1, h', W]


@dataclass(frozen=True)
class Prepared:
    """A network ready for inference, with the facts that divide an image into strips and tiles."""

    open: Callable[[int], Opened]  # an image's height → a function that takes its rows
    streams: bool  # whether rows may come in portions; otherwise all must come at once
    device: torch.device  # of the input, as is the dtype
    dtype: torch.dtype
    pixel_bytes: int  # of the widest feature map
    maps: int  # maximum number of feature maps of that width in memory at once
    receptive_radius: int  # input pixels to each side on which one output pixel depends
    scale: int  # of the result to the input; 1 unless the input is the low-resolution image


FOLDINGS: dict[type, Callable[..., Callable[[int], Opened]]] = {  # class → (network, precision) → `Prepared.open`
    DRRN: lambda network, precision: partial(Stream, Folded(network, precision))
}
_kept: WeakKeyDictionary[nn.Module, dict[str, tuple[list, Prepared]]] = WeakKeyDictionary()
_counted: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # `Prepared.maps`


def prepared(network: nn.Module, precision: str = "float32") -> Prepared:
    """Prepare a network; a folded one is cached until one of its tensors is changed, moved or replaced.

    PyTorch counts in-place changes of a tensor, but not those through `Tensor.data`: call `forget` after them.
    BatchNorm uses its running statistics, also if the network is in training mode.
    """
    tensors = [*network.parameters(), *network.buffers()]
    state = [None if t.is_inference() else (id(t), t.data_ptr(), t._version) for t in tensors]
    before, ready = _kept.get(network, {}).get(precision, (None, None))
    if before == state and None not in state:
        return ready
    first = next(iter(tensors), torch.empty(0))
    dtype = torch.promote_types(first.dtype, torch.float32)  # bfloat16 would round the image
    channels = max((layer.out_channels for layer in network.modules() if hasattr(layer, "out_channels")), default=1)
    same = {
        "device": first.device,
        "dtype": dtype,
        "receptive_radius": network.receptive_radius,
        "scale": getattr(network, "scale", 1),
    }
    if type(network) in FOLDINGS:
        open = FOLDINGS[type(network)](network, precision)
        pixel_bytes = channels * (2 if precision == "bf16" else dtype.itemsize)
        ready = Prepared(open, streams=True, pixel_bytes=pixel_bytes, maps=MAPS, **same)
        _kept.setdefault(network, {})[precision] = state, ready
        return ready
    wide = network if dtype == first.dtype else copy.deepcopy(network).to(dtype)
    if network not in _counted:
        _counted[network] = _maps(wide, first.to(dtype), channels)
    open, pixel_bytes = partial(_whole, wide, precision), channels * dtype.itemsize
    # Not cached: it would keep the network alive.
    return Prepared(open, streams=False, pixel_bytes=pixel_bytes, maps=_counted[network], **same)


def forget(network: nn.Module) -> None:
    """Drop the cached preparation of a network."""
    _kept.pop(network, None)


def _whole(network: nn.Module, precision: str, height: int) -> Opened:
    """`Prepared.open` of an unfolded network, which runs in evaluation mode."""

    def run(x: Tensor) -> Tensor:
        with _evaluating(network), tf32(precision == "tf32"):
            return network(x)

    return run


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    in_training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in in_training:
            module.training = True


def _maps(network: nn.Module, like: Tensor, channels: int) -> int:
    """`Prepared.maps` of an unfolded network, counted on a small image with device and dtype of `like`; plus one,
    since a layer of PyTorch may need a copy in another memory layout."""
    x = like.new_zeros(1, 1, 32, 32)
    with _evaluating(network), TensorBytes() as alive:
        network(x)
    return 1 + round(alive.peak / (x.nbytes * channels))
