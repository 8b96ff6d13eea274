"""Caffe's files of this family's networks (`.caffemodel`)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from torch import Tensor, nn

from drrn.config import in_full
from drrn.errors import printable
from drrn.weights.files import OVERSHOOT, Foreign


def path_of_layers(B: int, U: int, weight_sharing: bool) -> Iterator[tuple[str, str, str]]:
    """(Caffe's convolution, ours, BatchNorm before it) along `DRRN`'s longest path; shared ones are repeated."""
    for b in range(B):
        yield f"conv{b + 1}", f"blocks.{b}.conv", f"blocks.{b}.norm"
        for u in range(U):
            for ab in "ab":
                ours = f"blocks.{b}.conv_{ab}.{0 if weight_sharing else u}"
                yield f"conv{b + 1}_{u + 1}{ab}", ours, f"blocks.{b}.norm_{ab}.{u}"
    yield "conv_end", "conv_rec", "norm_rec"


# ---------------------------------------------------------------------- caffe.proto, the fields used here

# Message → fields, NAME=NUMBER:TYPE, repeated ones with *. A layer's parameters have the name of its type. Names in a
# file are bytes, since they may not be UTF-8.
PARAMETERS = "Convolution={}:Convolution BatchNorm=139:BatchNorm ReLU={}:ReLU Eltwise={}:Eltwise"
PROTO = {
    "Net": "name=1:bytes layers=2:V1Layer* layer=100:Layer*",
    "Layer": f"name=1:bytes type=2:bytes bottom=3:bytes* blobs=7:Blob* {PARAMETERS.format(106, 123, 110)}",
    "V1Layer": f"name=4:bytes type=5:int32 bottom=2:bytes* blobs=6:Blob* {PARAMETERS.format(10, 30, 24)}",
    "Blob": "num=1:int32 channels=2:int32 height=3:int32 width=4:int32 shape=7:Shape "
    "data=5:float* double_data=8:double*",
    "Shape": "dim=1:int64*",
    "Convolution": "pad=3:uint32* pad_h=9:uint32 pad_w=10:uint32 kernel_size=4:uint32* kernel_h=11:uint32 "
    "kernel_w=12:uint32 stride=6:uint32* stride_h=13:uint32 stride_w=14:uint32 group=5:uint32 dilation=18:uint32*",
    "BatchNorm": "eps=3:float",
    "ReLU": "negative_slope=1:float",
    "Eltwise": "operation=1:int32",
}


def _net() -> type:
    """The message class of NetParameter (BVLC/caffe, caffe.proto)."""
    file = FileDescriptorProto(name="drrn/caffe.proto", package="drrn")
    for message, fields in PROTO.items():
        described = file.message_type.add(name=message)
        for name, number, kind, many in re.findall(r"(\w+)=(\d+):(\w+)(\*?)", fields):
            field = described.field.add(name=name, number=int(number), label=3 if many else 1)  # repeated, optional
            if kind in PROTO:
                field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".drrn.{kind}"
            else:
                field.type = getattr(FieldDescriptorProto, f"TYPE_{kind.upper()}")
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return GetMessageClass(pool.FindMessageTypeByName("drrn.Net"))


Net = _net()


def _text(value: bytes) -> str:
    """A name with unprintable characters escaped, at most 100 bytes."""
    return printable(value[:100].decode(errors="replace"))


class Layer(NamedTuple):
    name: str
    type: str
    bottoms: list[str]
    blobs: list[Tensor]


UNIT = r"conv(\d{1,4})_(\d{1,4})([ab])"
V1_TYPES = {4: "Convolution", 18: "ReLU", 25: "Eltwise"}  # V1LayerParameter.LayerType
# The required values of a layer's parameters, if given: 3×3, padding 1, no stride, groups or dilation; a sum.
SETTINGS: dict[str, dict[str, float]] = {
    "Convolution": dict.fromkeys(("kernel_size", "kernel_h", "kernel_w"), 3)
    | dict.fromkeys(("pad", "pad_h", "pad_w", "stride", "stride_h", "stride_w", "group", "dilation"), 1),
    "BatchNorm": {"eps": 1e-5},
    "ReLU": {"negative_slope": 0},
    "Eltwise": {"operation": 1},
}


def caffe_layers(data: bytes) -> tuple[str, list[Layer]]:
    """NetParameter → its name and its layers, from the new list (`layer`) or the old one (`layers`).

    Raises:
        ValueError: damaged, without layers, or a layer has a setting that no network of this family has.
    """
    try:
        net = Net.FromString(data)
    except DecodeError as error:
        raise ValueError("truncated, damaged, or not protobuf") from error
    layers = [_layer(layer) for layer in net.layer or net.layers]
    if not any(layer.type == "Convolution" for layer in layers):
        raise ValueError("no network with convolutions")
    return _text(net.name), layers


def _layer(layer: Any) -> Layer:
    """LayerParameter or V1LayerParameter → Layer."""
    title = _text(layer.name)
    blobs = [_blob(blob, title) for blob in layer.blobs]
    kind = _type(layer.type, blobs)
    if blobs and kind not in ("Convolution", "BatchNorm", "Scale"):
        raise ValueError(f"layer {title!r} is a {kind} with weights: no network of this family has one")
    if kind in SETTINGS and layer.HasField(kind):
        _check_settings(title, kind, getattr(layer, kind))
    return Layer(title, kind, [_text(name) for name in layer.bottom], blobs)


def _type(said: bytes | int, blobs: list[Tensor]) -> str:
    """A layer's type; the old list has no numbers for BatchNorm and Scale, which are known by their blobs."""
    name = V1_TYPES.get(said, "") if isinstance(said, int) else _text(said)
    if name or not blobs:
        return name
    kernels = blobs[0].dim() == 4 and blobs[0].shape[-2:] == (3, 3)
    return "Convolution" if kernels else "BatchNorm" if len(blobs) == 3 else "Scale"


def _check_settings(title: str, kind: str, parameters: Any) -> None:
    """Refuse parameters that no network of this family has. A convolution's padding is 0 unless it is given."""
    given = {field.name: value for field, value in parameters.ListFields()}
    if kind == "Convolution" and not given.keys() & {"pad", "pad_h", "pad_w"}:
        raise ValueError(f"layer {title!r} is a convolution without padding; ours have padding 1")
    for name, value in given.items():
        wanted, have = SETTINGS[kind][name], [value] if isinstance(value, int | float) else list(value)
        if any(abs(number - wanted) > 1e-9 for number in have):
            raise ValueError(f"layer {title!r} ({kind}) has {name} = {have[:4]}; {wanted} is needed")


def _blob(blob: Any, title: str) -> Tensor:
    """BlobProto → float32 tensor, of `shape` or (num, channels, height, width), from `double_data` or `data`."""
    raw = blob.double_data or blob.data
    values = np.fromiter(raw, np.float32, len(raw))
    shape = list(blob.shape.dim) if blob.HasField("shape") else [blob.num, blob.channels, blob.height, blob.width]
    if not 1 <= len(shape) <= 4 or not len(values) or min(shape) < 1 or math.prod(shape) != len(values):
        raise ValueError(f"layer {title!r} declares {shape[:8]} and holds {len(values):,} values")
    return torch.from_numpy(values).reshape(shape)


class Convolution(NamedTuple):
    """A convolution of a Caffe network, with the BatchNorm and the ReLU before it."""

    name: str
    weight: Tensor  # [out, in, 3, 3]; Caffe correlates, as torch does
    bias: Tensor | None  # [out]
    norm: dict[str, Tensor] | None  # state of our BatchNorm, [in] each
    relu: bool


def read_caffe(data: bytes, U: int | None) -> Foreign:
    """Read a `.caffemodel` of the DRRN family.

    Layers are listed in Caffe's order of execution. Their names tell the structure: `conv{b}`, `conv{b}_{u}a`,
    `conv{b}_{u}b`, `conv_end` are a DRRN's, others a chain of convolutions (U = 0, VDSR). Caffe stores a shared
    convolution once for each layer that uses it; if the copies differ, it is the network without weight sharing.
    """
    name, layers = caffe_layers(data)
    convolutions = _convolutions(layers)
    B, found_U = _structure([c.name for c in convolutions])
    if U is not None and found_U != U:
        raise ValueError(f"it has U = {found_U}, not {U}")
    notes = _differing_copies(convolutions)
    shared, first_relu = not notes, convolutions[0].relu
    if not any(c.relu for c in convolutions):  # the file contains only layers with weights
        first_relu = convolutions[0].norm is not None
        notes.append("the file lists no ReLU: one is assumed before every convolution")
    elif bare := [c.name for c in convolutions[1:] if not c.relu]:
        raise ValueError(f"there is no ReLU before {', '.join(bare[:3])}")
    if not first_relu:
        notes.append(OVERSHOOT)
    chain = any(b.startswith("eltwise") for layer in layers if layer.type == "Eltwise" for b in layer.bottoms)

    kinds = {(c.norm is None, c.bias is None) for c in convolutions}
    if len(kinds) > 1:
        raise ValueError("some of its convolutions have a BatchNorm or a bias and some have none")
    [(no_norm, no_bias)] = kinds
    model = {
        "B": B,
        "U": found_U,
        "features": len(convolutions[0].weight),
        "norm": "none" if no_norm else "batch",
        "bias": not no_bias,
        "weight_sharing": shared,
        "multi_path": not chain,
        "input_relu": first_relu,
    }
    state: dict[str, Tensor] = {}
    for c, (_, conv, norm) in zip(convolutions, path_of_layers(B, found_U, shared), strict=True):
        state[f"{conv}.weight"] = c.weight
        if c.bias is not None:
            state[f"{conv}.bias"] = c.bias
        if c.norm is not None:
            state |= {f"{norm}.{key}": value for key, value in c.norm.items()}
    return Foreign(in_full(model), state, f"{name or 'network'} (Caffe)", [2, 3, 4], notes)


def _structure(names: list[str]) -> tuple[int, int]:
    """Names of convolutions, in order → (B, U); a ValueError if a DRRN's are incomplete or in another order."""
    units = [m for name in names if (m := re.fullmatch(UNIT, name))]
    if not units:
        return len(names) - 1, 0
    B, U = max(int(m[1]) for m in units), max(int(m[2]) for m in units)
    if names != [caffe for caffe, _, _ in islice(path_of_layers(B, U, True), len(names) + 1)]:
        raise ValueError(f"its {len(names)} convolutions ({', '.join(names[:5])}, …) are not all of a B{B}U{U}")
    return B, U


def _differing_copies(convolutions: list[Convolution]) -> list[str]:
    """A note if the convolutions of a block's units differ; [] if they are equal."""
    by_name = {c.name: c for c in convolutions}
    for c in convolutions:
        if (m := re.fullmatch(UNIT, c.name)) is None:
            continue
        first = by_name[f"conv{m[1]}_1{m[3]}"]
        for kind, a, b in (("weight", c.weight, first.weight), ("bias", c.bias, first.bias)):
            if a is not b and (a is None or b is None or not torch.equal(a, b)):
                return [
                    f"the copies of shared convolutions are not the same (the {kind} of {c.name} differs from that "
                    f"of {first.name}): read as a network without weight sharing"
                ]
    return []


def _convolutions(layers: list[Layer]) -> list[Convolution]:
    """Layers in their order → convolutions, each with the BatchNorm, Scale and ReLU since the one before it."""
    result: list[Convolution] = []
    norm: dict[str, Tensor] | None = None
    relu = False
    for layer in layers:
        blobs = layer.blobs
        if layer.type == "BatchNorm":
            if len(blobs) != 3 or blobs[2].numel() != 1:
                raise ValueError(f"BatchNorm {layer.name!r} needs mean, variance and a scale factor")
            # Caffe stores running sums, to be divided by the factor, which is 0 before the first step.
            factor = 1 / blobs[2].item() if blobs[2].item() else 0.0
            norm = nn.BatchNorm2d(blobs[0].numel()).state_dict()
            norm |= {"running_mean": blobs[0].flatten() * factor, "running_var": blobs[1].flatten() * factor}
        elif layer.type == "Scale":
            if norm is None or not 1 <= len(blobs) <= 2:
                raise ValueError(f"Scale {layer.name!r} is not a BatchNorm's factor and shift")
            norm |= dict(zip(("weight", "bias"), (blob.flatten() for blob in blobs), strict=False))
        elif layer.type == "ReLU":
            relu = True
        elif layer.type == "Convolution":
            if not 1 <= len(blobs) <= 2 or blobs[0].dim() != 4:
                raise ValueError(f"convolution {layer.name!r} has no weights [out, in, 3, 3]")
            bias = blobs[1].flatten() if len(blobs) == 2 else None
            result.append(Convolution(layer.name, blobs[0], bias, norm, relu))
            norm, relu = None, False
    if len({c.name for c in result}) < len(result):
        raise ValueError("two of its convolutions have the same name")
    if len(result) < 2 or norm is not None:
        raise ValueError("its last layers are missing")
    return result
