"""The networks that can be trained, by name, and what the rest of the house asks of one.

A network of one's own is its file, a line in NETWORKS and a yaml in conf/model with `network: NAME` and the arguments
of its constructor. A network imports nothing from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass, make_dataclass
from typing import Any, Protocol, get_type_hints

import torch
from omegaconf import MISSING
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from drrn.config import DEFAULT
from drrn.drcn import DRCN
from drrn.errors import UserError
from drrn.espcn import ESPCN
from drrn.fsrcnn import FSRCNN
from drrn.layers import conv_weights
from drrn.model import DRRN
from drrn.red30 import RED30
from drrn.resnet import ResNet
from drrn.srcnn import SRCNN

NETWORKS: dict[str, type[nn.Module]] = {
    DEFAULT: DRRN,
    "drcn": DRCN,
    "espcn": ESPCN,
    "fsrcnn": FSRCNN,
    "red30": RED30,
    "resnet": ResNet,
    "srcnn": SRCNN,
}


class Network(Protocol):
    """What a class of NETWORKS, an `nn.Module`, offers beside its constructor.

    The constructor raises a ValueError for an argument outside what its docstring says. The network works on the
    luminance, [N, 1, H, W], floating, 0…1. It may also have

        conv_rec       the last convolution of a global residual: `optim.residual_scale` multiplies its first weights
        blocks         with `residual(H, u)`, which `speed.checkpointing` computes twice (`fast.training`)
        at_step(step)  told the optimiser step, from 0, before each batch: for a loss that changes in training
        scale          of an input "low": how much larger the result is than the image; one network, one scale
    """

    input: str  # "interpolated": the image enlarged by bicubic; "low": the low-resolution image itself
    loss: str | Callable[[Tensor, Tensor], Tensor]  # of its paper: a name of `losses.LOSSES`, or a function

    @property
    def depth(self) -> int:
        """Convolutions on the longest path."""

    @property
    def receptive_radius(self) -> int:
        """Pixels of the input to each side that an output pixel depends on."""

    def __call__(self, x: Tensor) -> Tensor:
        """The estimate of the high-resolution luminance, not clamped."""


def structure(model: Any) -> dict[str, Any]:
    """A network's structure, a dataclass or a mapping, as a plain dict; `network` is left out where it is DRRN."""
    fields = asdict(model) if is_dataclass(model) else dict(model)
    return {key: value for key, value in fields.items() if (key, value) != ("network", DEFAULT)}


def input_of(model: Any) -> str:
    """What a structure's network takes: "interpolated" or "low"."""
    return NETWORKS[structure(model).get("network", DEFAULT)].input


def pair_sides(model: Any, patch_size: int) -> tuple[int, int]:
    """Sides of the two images, (input, truth), of the pair that a patch gives (`pairs.low_pairs`)."""
    scale = structure(model)["scale"] if input_of(model) == "low" else 1
    return patch_size // scale, patch_size - patch_size % scale


def arguments_of(model: Any) -> tuple[str, dict[str, Any]]:
    """The name of a structure's network, and its arguments.

    Raises:
        UserError: no such network, or arguments that it does not take or lacks.
    """
    arguments = structure(model)
    name = arguments.pop("network", DEFAULT)
    if name not in NETWORKS:
        raise UserError(f"model.network = {name!r}: allowed are {', '.join(NETWORKS)}")
    known = inspect.signature(NETWORKS[name]).parameters
    for key in arguments:
        if key not in known:
            raise UserError(f"model.{key}: the network {name!r} does not take it; it takes {', '.join(known)}")
    missing = [key for key, p in known.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise UserError(f"model.{missing[0]}: the network {name!r} needs it")
    return name, arguments


def schema(name: str) -> type:
    """What `model.*` may hold for a network, as a dataclass of its constructor's arguments, for `schema.typed`."""
    hints, parameters = get_type_hints(NETWORKS[name].__init__), inspect.signature(NETWORKS[name]).parameters
    arguments = [
        (key, hints.get(key, Any), field(default=MISSING if p.default is p.empty else p.default))
        for key, p in parameters.items()
    ]
    return make_dataclass(NETWORKS[name].__name__, [("network", str, field(default=name)), *arguments])


def build(model: Any) -> Any:
    """A network from its structure; errors as of `arguments_of`, and for a value that it does not take."""
    name, arguments = arguments_of(model)
    try:
        return NETWORKS[name](**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.*: the network {name!r} does not take this: {error}") from error


def on_paper(model: Any) -> Any:
    """`build` without memory: tensors with shapes and no contents, for counting and checking."""
    with torch.device("meta"):
        return build(model)


COUNTED: dict[str, Counts] = {}


@dataclass(frozen=True)
class Counts:
    """A network's depth and convolution weights; floating-point operations for one pixel, a multiply-add is two:
    of its output, and of an optimiser step."""

    depth: int
    conv_weights: int
    output: float
    step: float


def count(model: Any) -> Counts:
    """The counts of a network, of which only the shapes are made; once for each structure."""
    if repr(model) not in COUNTED:
        network, x = on_paper(model), torch.rand(1, 1, 32, 32, device="meta")
        with FlopCounterMode(display=False) as forward:
            pixels = network.eval()(x).numel()
        with FlopCounterMode(display=False) as step:
            network.train()(x).sum().backward()
        counted = (forward.get_total_flops() / pixels, step.get_total_flops() / pixels)
        COUNTED[repr(model)] = Counts(network.depth, conv_weights(network), *counted)
    return COUNTED[repr(model)]
