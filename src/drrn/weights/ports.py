"""The common PyTorch ports' forms."""

from __future__ import annotations

import re

from torch import Tensor

from drrn.config import ModelConfig
from drrn.errors import UserError
from drrn.weights.caffe import path_of_layers
from drrn.weights.files import Foreign

# ---------------------------------------------------------------------------------------- the networks of ports

NAMES = {
    "jt827859032": r"(input|conv1|conv2|output)\.weight",
    "yjn870": r"(rbs\.\d{1,4}\.(h0\.module\.1|ru\.module\.[01]\.module\.1)|rec\.module\.1)\.weight",
    "twtygqyy": r"(input|residual_layer\.\d{1,4}\.conv|output)\.weight",
}
RECTIFIED = "its in-place ReLUs make every identity a ReLU's output: kept so (rectified_identity=true)"


def _shared_units(form: str, B: int, U: int | None, stem: str) -> int:
    """U of a network whose file cannot show it: as asked, or as the file is called."""
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


def _read_jt(tensors: dict[str, Tensor], U: int | None, stem: str) -> Foreign:
    """jt827859032/DRRN-pytorch: one block, neither BatchNorm nor bias."""
    ours = {"input": "blocks.0.conv", "conv1": "blocks.0.conv_a.0", "conv2": "blocks.0.conv_b.0"}
    ours["output"] = "conv_rec"
    state = {f"{ours[name.removesuffix('.weight')]}.weight": tensor for name, tensor in tensors.items()}
    model = ModelConfig(
        B=1,
        U=_shared_units("jt827859032", 1, U, stem),
        features=len(tensors["input.weight"]),
        norm="none",
        bias=False,
        weight_sharing=True,
        multi_path=True,
        rectified_identity=True,
    )
    return Foreign("jt827859032", model, state, "jt827859032/DRRN-pytorch", [2, 3, 4], [RECTIFIED])


def _read_yjn870(tensors: dict[str, Tensor], U: int | None, stem: str) -> Foreign:
    """yjn870/DRRN-pytorch: any B, neither BatchNorm nor bias."""
    ours = {"h0.module.1": "conv", "ru.module.0.module.1": "conv_a.0", "ru.module.1.module.1": "conv_b.0"}
    state, blocks = {}, set()
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if layer == "rec.module.1":
            state["conv_rec.weight"] = tensor
        else:
            _, b, rest = layer.split(".", 2)
            blocks.add(int(b))
            state[f"blocks.{int(b)}.{ours[rest]}.weight"] = tensor
    model = ModelConfig(
        B=len(blocks),
        U=_shared_units("yjn870", len(blocks), U, stem),
        features=len(tensors["rbs.0.h0.module.1.weight"]),
        norm="none",
        bias=False,
        weight_sharing=True,
        multi_path=True,
        rectified_identity=True,
    )
    return Foreign("yjn870", model, state, "yjn870/DRRN-pytorch", [], [RECTIFIED])


def _read_twtygqyy(tensors: dict[str, Tensor], U: int | None, stem: str) -> Foreign:
    """twtygqyy/pytorch-vdsr: U = 0, neither BatchNorm nor bias, no ReLU before the first convolution."""
    if U:
        raise ValueError(f"it is a VDSR, which has U = 0, not {U}")
    B = len(tensors) - 1
    order = ["input", *(f"residual_layer.{i}.conv" for i in range(B - 1)), "output"]
    layers = zip(order, path_of_layers(B, 0, True), strict=True)
    state = {f"{conv}.weight": tensors[f"{name}.weight"] for name, (conv, _) in layers}
    model = ModelConfig(
        B=B,
        U=0,
        features=len(tensors["input.weight"]),
        norm="none",
        bias=False,
        weight_sharing=True,
        multi_path=True,
        input_relu=False,
    )
    notes = ["no ReLU before the first convolution: negative overshoot of the bicubic input is kept"]
    return Foreign("twtygqyy", model, state, "twtygqyy/pytorch-vdsr", [2, 3, 4], notes)


READERS = {"jt827859032": _read_jt, "yjn870": _read_yjn870, "twtygqyy": _read_twtygqyy}
