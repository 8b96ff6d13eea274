"""The networks by name, and the interface that every network has.

To add a network, write its file, a line in NETWORKS and a yaml in conf/model with `network: NAME` and the arguments
of its constructor. A network imports nothing from this module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, make_dataclass
from typing import Any, Protocol, get_type_hints

import torch
from omegaconf import MISSING, OmegaConf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from drrn.config import DEFAULT, in_full
from drrn.drcn import DRCN
from drrn.errors import UserError
from drrn.espcn import ESPCN
from drrn.fsrcnn import FSRCNN
from drrn.layers import conv_weights
from drrn.model import DRRN
from drrn.red30 import RED30
from drrn.resnet import ResNet
from drrn.schema import typed
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
    """The interface of the classes in NETWORKS, which are subclasses of `nn.Module`.

    The constructor raises a ValueError for an argument outside the range in its docstring. Input and output are
    luminance, [N, 1, H, W], floating, 0…1. Optional attributes:

        conv_rec       the last convolution of a global residual: `optim.residual_scale` scales its initial weights
        blocks         with `residual(H, u)`, which `speed.checkpointing` recomputes (`fast.training`)
        at_step(step)  called before each batch with the optimiser step, from 0: for a loss that changes in training
        scale          for the input "low": the factor by which the network enlarges
    """

    input: str  # "interpolated": the image enlarged by bicubic; "low": the low-resolution image itself
    loss: str | Callable[[Tensor, Tensor], Tensor]  # of its paper: a name of `losses.LOSSES`, or a function

    @property
    def depth(self) -> int:
        """Convolutions on the longest path."""

    @property
    def receptive_radius(self) -> int:
        """Input pixels to each side on which an output pixel depends."""

    def __call__(self, x: Tensor) -> Tensor:
        """The estimate of the high-resolution luminance, not clamped."""


def input_of(model: Mapping[str, Any]) -> str:
    """`Network.input` of a structure: "interpolated" or "low"."""
    return NETWORKS[model.get("network", DEFAULT)].input


def pair_sides(model: Mapping[str, Any], patch_size: int) -> tuple[int, int]:
    """Sides (input, truth) of the pair that is made of a patch (`pairs.low_pairs`)."""
    scale = model["scale"] if input_of(model) == "low" else 1
    return patch_size // scale, patch_size - patch_size % scale


def arguments_of(model: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a structure's network, and its arguments.

    Raises:
        UserError: no such network, or an unknown or missing argument.
    """
    arguments = dict(model)
    name = arguments.pop("network", DEFAULT)
    if name not in NETWORKS:
        raise UserError(f"model.network = {name!r}: allowed are {', '.join(NETWORKS)}")
    known = inspect.signature(NETWORKS[name]).parameters
    for key in arguments:
        if key not in known:
            raise UserError(f"model.{key}: the network {name!r} has no such argument; it has {', '.join(known)}")
    missing = [key for key, p in known.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise UserError(f"model.{missing[0]}: the network {name!r} needs it")
    return name, arguments


def schema(name: str) -> type:
    """A dataclass of a network's constructor arguments, as the schema of `model.*` for `schema.typed`."""
    hints, parameters = get_type_hints(NETWORKS[name].__init__), inspect.signature(NETWORKS[name]).parameters
    arguments = [  # default_factory: a dataclass does not take a list as a default
        (key, hints.get(key, Any), field(default_factory=lambda p=p: MISSING if p.default is p.empty else p.default))
        for key, p in parameters.items()
    ]
    return make_dataclass(NETWORKS[name].__name__, [("network", str, field(default=name)), *arguments])


def complete(model: Mapping[str, Any]) -> dict[str, Any]:
    """`config.in_full` for any network: all its arguments, of the right types. Errors: those of `arguments_of`, and a
    UserError for a value of another type."""
    name, _ = arguments_of(model)
    model = in_full(model)
    return asdict(typed(schema(name), OmegaConf.create(model), "model.")) if "network" in model else model


def build(model: Mapping[str, Any]) -> Any:
    """Build a network from its structure. Errors: those of `arguments_of`, and a UserError for an invalid value."""
    name, arguments = arguments_of(model)
    try:
        return NETWORKS[name](**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.*: the network {name!r} does not take this: {error}") from error


def on_paper(model: Mapping[str, Any]) -> Any:
    """`build` on the meta device: tensors with shapes but without contents, for counting and checking."""
    with torch.device("meta"):
        return build(model)


COUNTED: dict[str, Counts] = {}


@dataclass(frozen=True)
class Counts:
    """A network's depth and convolution weights; floating-point operations (a multiply-add is two) for one pixel of
    the output, in inference (`output`) and in an optimiser step (`step`)."""

    depth: int
    conv_weights: int
    output: float
    step: float


def count(model: Mapping[str, Any]) -> Counts:
    """The counts of a network, computed on the meta device and cached by structure."""
    if repr(model) not in COUNTED:
        network, x = on_paper(model), torch.rand(1, 1, 32, 32, device="meta")
        with FlopCounterMode(display=False) as forward:
            pixels = network.eval()(x).numel()
        with FlopCounterMode(display=False) as step:
            network.train()(x).sum().backward()
        counted = (forward.get_total_flops() / pixels, step.get_total_flops() / pixels)
        COUNTED[repr(model)] = Counts(network.depth, conv_weights(network), *counted)
    return COUNTED[repr(model)]
