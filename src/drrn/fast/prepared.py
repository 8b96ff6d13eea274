"""A network made ready for inference, once: the one seam between `drrn.inference` and what makes it fast.

`FOLDINGS` says which classes can be folded. Every other network runs as it is.
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

Opened = Callable[[Tensor], Tensor]  # the image's next rows [N, 1, h, W] → the rows complete now [N, 1, h', W]


@dataclass(frozen=True)
class Prepared:
    """What divides and runs an image needs of a network."""

    open: Callable[[int], Opened]  # called with an image's height, gives what its rows are put into
    streams: bool  # whether rows may come in portions; otherwise all come at once
    device: torch.device  # of the input, as the type
    dtype: torch.dtype
    pixel_bytes: int  # of the widest feature map
    maps: int  # feature maps of that width that are in memory at once, at most
    receptive_radius: int  # pixels of the input to each side that one output pixel depends on
    scale: int  # how much larger the result is than the input; 1 unless that is the low-resolution image


FOLDINGS: dict[type, Callable[..., Callable[[int], Opened]]] = {  # class → (network, precision) → `Prepared.open`
    DRRN: lambda network, precision: partial(Stream, Folded(network, precision))
}
_kept: WeakKeyDictionary[nn.Module, dict[str, tuple[list, Prepared]]] = WeakKeyDictionary()
_counted: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # `Prepared.maps`


def prepared(network: nn.Module, precision: str = "float32") -> Prepared:
    """The network ready to run. Folded once, and again when one of its tensors was changed, moved or replaced.

    PyTorch counts the changes of a tensor, but not those through `Tensor.data`: `forget` after them. BatchNorm uses
    its running statistics whatever mode the network is in.
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
    # Not kept: it would keep the network alive.
    return Prepared(open, streams=False, pixel_bytes=pixel_bytes, maps=_counted[network], **same)


def forget(network: nn.Module) -> None:
    """Prepare the network afresh the next time."""
    _kept.pop(network, None)


def _whole(network: nn.Module, precision: str, height: int) -> Opened:
    """A network as it is, in evaluation mode for as long as it runs."""

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
    """`Prepared.maps` of a network that runs as it is, counted on a small image of the kind of `like`; a layer of
    PyTorch's may need one more, in another order of its values."""
    x = like.new_zeros(1, 1, 32, 32)
    with _evaluating(network), TensorBytes() as alive:
        network(x)
    return 1 + round(alive.peak / (x.nbytes * channels))
