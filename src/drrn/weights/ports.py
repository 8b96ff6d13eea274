"""The networks of common PyTorch ports: their tensors' names, and the conversion to ours.

A port is an entry of `PORTS`: the pattern of its tensors' names, and a function of the tensors and of facts
that the file does not contain (`Said`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from drrn.config import in_full
from drrn.errors import UserError
from drrn.weights.files import OVERSHOOT, Foreign

if TYPE_CHECKING:
    from torch import Tensor

RECTIFIED = "its in-place ReLUs make every identity a ReLU's output: kept so (rectified_identity=true)"


class Said(NamedTuple):
    """Facts about a file from its name and the command line."""

    stem: str  # of its name
    U: int | None = None
    scales: list[int] | None = None

    def its_scales(self) -> list[int]:
        """The scales of the command line, else of the file's name (…_scale3…, …_x3…), else []."""
        named = re.search(r"(?:scale|[_-]x)(\d)(?!\d)", self.stem)
        return self.scales or ([int(named[1])] if named else [])


class Port(NamedTuple):
    """A port's form."""

    names: str  # a regular expression that each tensor's name matches
    read: Callable[[dict[str, Tensor], Said], Foreign]


def shared_units(form: str, B: int, U: int | None, stem: str) -> int:
    """U of a network whose file cannot show it: from the command line, else from the file's name."""
    named = re.search(r"B(\d{1,4})_?U(\d{1,4})(?!\d)", stem)
    if U is None and named is None:
        raise UserError(
            f"U cannot be read from the shared weights of a {form} file: give U=… (jt827859032's own code has "
            "U=25), or call the file …_B1U25…"
        )
    if U is None and int(named[1]) != B:
        raise UserError(f"the file is called B{named[1]}U{named[2]} but holds B = {B}: give U=…")
    result = int(named[2]) if U is None else U
    if result < 1:
        raise UserError(f"U = {result}: the file has the convolutions of residual units, so U is at least 1")
    return result


def renamed(tensors: dict[str, Tensor], ours: dict[str, str]) -> dict[str, Tensor]:
    """Rename tensors: replace each part of their names by ours, one after the other."""
    for theirs, mine in ours.items():
        tensors = {name.replace(theirs, mine): tensor for name, tensor in tensors.items()}
    return tensors


def plain(B: int, U: int, first: Tensor, **switches: bool) -> dict[str, Any]:
    """The structure of a port's DRRN: neither BatchNorm nor bias. `first` is the first convolution's weight."""
    paths = {"weight_sharing": True, "multi_path": True}
    return in_full({"B": B, "U": U, "features": len(first), "norm": "none", "bias": False, **paths, **switches})


def read_jt827859032(tensors: dict[str, Tensor], said: Said) -> Foreign:
    """jt827859032/DRRN-pytorch: one block."""
    block = {"input": "blocks.0.conv", "conv1": "blocks.0.conv_a.0", "conv2": "blocks.0.conv_b.0"}
    state = renamed(tensors, {**block, "output": "conv_rec"})
    U = shared_units("jt827859032", 1, said.U, said.stem)
    model = plain(1, U, state["blocks.0.conv.weight"], rectified_identity=True)
    return Foreign(model, state, "jt827859032/DRRN-pytorch", [2, 3, 4], [RECTIFIED])


def read_yjn870(tensors: dict[str, Tensor], said: Said) -> Foreign:
    """yjn870/DRRN-pytorch: any B."""
    block = {"h0.module.1": "conv", "ru.module.0.module.1": "conv_a.0", "ru.module.1.module.1": "conv_b.0"}
    state = renamed(tensors, {"rbs": "blocks", **block, "rec.module.1": "conv_rec"})
    B = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    U = shared_units("yjn870", B, said.U, said.stem)
    model = plain(B, U, state["blocks.0.conv.weight"], rectified_identity=True)
    return Foreign(model, state, "yjn870/DRRN-pytorch", [], [RECTIFIED])


def read_twtygqyy(tensors: dict[str, Tensor], said: Said) -> Foreign:
    """twtygqyy/pytorch-vdsr: U = 0, no ReLU before the first convolution."""
    if said.U:
        raise ValueError(f"it is a VDSR, which has U = 0, not {said.U}")
    last = len(tensors) - 2  # of the blocks
    order = ["input", *(f"residual_layer.{i}.conv" for i in range(last)), "output"]
    ours = [*(f"blocks.{b}.conv" for b in range(last + 1)), "conv_rec"]
    state = {f"{conv}.weight": tensors[f"{name}.weight"] for name, conv in zip(order, ours, strict=True)}
    model = plain(last + 1, 0, tensors["input.weight"], input_relu=False)
    return Foreign(model, state, "twtygqyy/pytorch-vdsr", [2, 3, 4], [OVERSHOOT])


def read_srcnn(tensors: dict[str, Tensor], said: Said) -> Foreign:
    """SRCNN as PyTorch ports have it: `conv1`, `conv2`, `conv3`, zeros around the image."""
    first, middle = tensors["conv1.weight"], tensors["conv2.weight"]
    model = {"network": "srcnn", "middle": middle.shape[-1], "features": len(first)}
    return Foreign(model, tensors, "SRCNN (PyTorch)", said.its_scales(), [])


def read_fsrcnn(tensors: dict[str, Tensor], said: Said) -> Foreign:
    """FSRCNN as PyTorch ports have it; if a PReLU has one slope for all channels, it is repeated for each."""
    scales = said.its_scales()
    if len(scales) != 1:
        raise UserError(
            "the scale cannot be read from the weights of an FSRCNN: give scales=[3], or call the file …_scale3…"
        )
    state = renamed(tensors, {"extraction": "extract", "nonlinear_map": "map"})
    for part in [name.removesuffix(".bias") for name in state if name.endswith(".bias") and name != "deconv.bias"]:
        layer, place = part.split(".")
        slope = f"{layer}.{int(place) + 1}.weight"
        state[slope] = state[slope].expand(len(state[f"{part}.weight"])).contiguous()
    mapping = sum(name.startswith("map.") and name.endswith(".bias") for name in state)
    d, s = len(state["extract.0.weight"]), len(state["shrink.0.weight"])
    model = {"network": "fsrcnn", "scale": scales[0], "features": d, "s": s, "m": mapping}
    return Foreign(model, state, "FSRCNN (PyTorch)", scales, [])


PORTS = {
    "jt827859032": Port(r"(input|conv1|conv2|output)\.weight", read_jt827859032),
    "yjn870": Port(
        r"(rbs\.\d{1,4}\.(h0\.module\.1|ru\.module\.[01]\.module\.1)|rec\.module\.1)\.weight", read_yjn870
    ),
    "twtygqyy": Port(r"(input|residual_layer\.\d{1,4}\.conv|output)\.weight", read_twtygqyy),
    "srcnn": Port(r"conv[123]\.(weight|bias)", read_srcnn),
    "fsrcnn": Port(
        r"((extraction|shrink|expand)\.0|nonlinear_map\.\d{1,3}|deconv)\.(weight|bias)"
        r"|(extraction|shrink|expand)\.1\.weight",
        read_fsrcnn,
    ),
}
