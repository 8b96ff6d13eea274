"""Caffe's networks: as much of protobuf as they need."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrn.config import ModelConfig
from drrn.errors import printable
from drrn.weights.files import OVERSHOOT, Foreign


def path_of_layers(B: int, U: int, weight_sharing: bool) -> Iterator[tuple[str, str]]:
    """`DRRN`'s (convolution, BatchNorm before it) along its longest path; shared ones come again and again."""
    for b in range(B):
        yield f"blocks.{b}.conv", f"blocks.{b}.norm"
        for u in range(U):
            for ab in "ab":
                yield f"blocks.{b}.conv_{ab}.{0 if weight_sharing else u}", f"blocks.{b}.norm_{ab}.{u}"
    yield "conv_rec", "norm_rec"


# ---------------------------------------------------------------------------------------- protobuf and Caffe
# https://protobuf.dev/programming-guides/encoding; field numbers are those of BVLC/caffe's caffe.proto.


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A base-128 number at a position → (number, the position after it)."""
    value = 0
    for shift in range(10):
        if at + shift >= len(data):
            raise ValueError("it ends within a number: truncated, or not protobuf")
        byte = data[at + shift]
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, at + shift + 1
    raise ValueError("a number of more than 10 bytes: not protobuf")


def _message(data: int | memoryview) -> dict[int, list[int | memoryview]]:
    """The fields of a message by number: varints as int, everything else as its bytes."""
    if isinstance(data, int):
        raise ValueError("a number where a message should be: not Caffe's")
    fields: dict[int, list[int | memoryview]] = defaultdict(list)
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            fields[number].append(value)
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}: damaged, or not protobuf")
        if length > len(data) - at:
            raise ValueError(f"a field of {length:,} bytes where {len(data) - at:,} are left: truncated")
        fields[number].append(data[at : at + length])
        at += length
    return fields


def _text(values: list[int | memoryview]) -> str:
    """A string field, "" if it is not there; control characters are replaced, since it gets printed."""
    if not values:
        return ""
    if isinstance(values[-1], int):
        raise ValueError("a number where a name should be: not Caffe's")
    return printable(bytes(values[-1][:100]).decode(errors="replace"))


def _integers(values: list[int | memoryview]) -> list[int]:
    """A repeated integer field, packed or not."""
    result: list[int] = []
    for value in values:
        if isinstance(value, int):
            result.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            result.append(number)
    return result


class Layer(NamedTuple):
    """A layer of a Caffe network, as much of it as matters here."""

    name: str
    type: str
    bottoms: list[str]
    blobs: list[Tensor]


UNIT = r"conv(\d{1,4})_(\d{1,4})([ab])"
V1_TYPES = {4: "Convolution", 18: "ReLU", 25: "Eltwise"}  # V1LayerParameter.LayerType
# Type → the field of its parameters in (LayerParameter, V1LayerParameter), and what they must be where they are
# given: 3×3, padding 1, no stride, groups or dilation; eps 1e-5; no leak; a sum.
SETTINGS: dict[str, tuple[tuple[int, int], dict[int, float]]] = {
    "Convolution": ((106, 10), {3: 1, 4: 3, 5: 1, 6: 1, 9: 1, 10: 1, 11: 3, 12: 3, 13: 1, 14: 1, 18: 1}),
    "BatchNorm": ((139, 139), {3: 1e-5}),
    "ReLU": ((123, 30), {1: 0}),
    "Eltwise": ((110, 24), {1: 1}),
}


def caffe_layers(data: bytes) -> tuple[str, list[Layer]]:
    """NetParameter → its name and its layers, in the new list (`layer` = 100) or the old (`layers` = 2).

    Raises:
        ValueError: no layers, damaged, or a layer set to what this family of networks does not have.
    """
    net = _message(memoryview(data))
    new = bool(net[100])
    layers = [_layer(layer, new) for layer in (net[100] if new else net[2])]
    if not any(layer.type == "Convolution" for layer in layers):
        raise ValueError("no network with convolutions")
    return _text(net[1]), layers


def _layer(data: int | memoryview, new: bool) -> Layer:
    """LayerParameter or V1LayerParameter → Layer; of an unknown type, by its blobs."""
    fields = _message(data)
    name, kind, bottom, blob = (1, 2, 3, 7) if new else (4, 5, 2, 6)
    title = _text(fields[name])
    blobs = [_blob(value, title) for value in fields[blob]]
    if not new and fields[kind] and isinstance(fields[kind][-1], int):
        type_ = V1_TYPES.get(fields[kind][-1], "")
    else:
        type_ = _text(fields[kind])
    if blobs and not type_:  # the old list knows no BatchNorm and no Scale
        kernels = blobs[0].dim() == 4 and blobs[0].shape[-2:] == (3, 3)
        type_ = "Convolution" if kernels else "BatchNorm" if len(blobs) == 3 else "Scale"
    if blobs and type_ not in ("Convolution", "BatchNorm", "Scale"):
        raise ValueError(f"layer {title!r} is a {type_} with weights: no network of this family has one")
    if type_ in SETTINGS:
        places, wanted = SETTINGS[type_]
        for message in fields[places[0] if new else places[1]]:
            _check_settings(title, type_, _message(message), wanted)
    return Layer(title, type_, [_text([value]) for value in fields[bottom]], blobs)


def _check_settings(
    title: str, type_: str, given: dict[int, list[int | memoryview]], wanted: dict[int, float]
) -> None:
    if type_ == "Convolution" and not (given[3] or given[9] or given[10]):
        raise ValueError(f"layer {title!r} is a convolution without padding; ours have padding 1")
    for number, want in wanted.items():
        for value in given[number]:
            if isinstance(value, memoryview) and len(value) == 4:
                have = [float(np.frombuffer(value, "<f4")[0])]
            else:
                have = _integers([value])
            if any(abs(number_ - want) > 1e-9 for number_ in have):
                raise ValueError(f"layer {title!r} ({type_}) has parameter {number} = {have}; {want} is needed")


def _blob(data: int | memoryview, title: str) -> Tensor:
    """BlobProto → float32 tensor: shape (7) or num, channels, height, width (1…4); data (5) or double_data (8)."""
    fields = _message(data)
    raw, kind = (fields[8], "<f8") if fields[8] else (fields[5], "<f4")
    if any(isinstance(value, int) for value in raw):
        raise ValueError(f"layer {title!r} holds integers, not weights")
    values = np.frombuffer(b"".join(raw), kind).astype(np.float32)
    if fields[7]:
        shape = _integers(_message(fields[7][-1])[1])
    else:
        shape = [(_integers(fields[number]) or [0])[-1] for number in (1, 2, 3, 4)]
    if not 1 <= len(shape) <= 4 or not len(values) or math.prod(shape) != len(values):
        raise ValueError(f"layer {title!r} says {shape[:8]} and holds {len(values):,} values")
    return torch.from_numpy(values).reshape(shape)


class Convolution(NamedTuple):
    """A convolution of a Caffe network with what stands before it."""

    name: str
    weight: Tensor  # [out, in, 3, 3]; Caffe correlates, as torch does
    bias: Tensor | None  # [out]
    norm: dict[str, Tensor] | None  # state of our BatchNorm, [in] each
    relu: bool


def read_caffe(data: bytes, U: int | None, stem: str) -> Foreign:
    """A `.caffemodel` of the DRRN family.

    Layers follow one another as Caffe runs them; of each convolution BatchNorm, Scale and ReLU stand before it.
    Names say the structure: `conv{b}` and `conv{b}_{u}a`, `conv{b}_{u}b`, `conv_end` is a DRRN, anything else a
    chain of convolutions (U = 0, VDSR). Caffe stores shared convolutions once for each layer that uses them;
    if these copies differ, it is the network without weight sharing.
    """
    name, layers = caffe_layers(data)
    convolutions = _convolutions(layers)
    B, found_U = _structure([c.name for c in convolutions])
    if U is not None and found_U != U:
        raise ValueError(f"it has U = {found_U}, not {U}")
    notes = _differing_copies(convolutions)
    shared = not notes
    if all(not c.relu for c in convolutions):  # only layers with weights were kept in the file
        first_relu = convolutions[0].norm is not None
        notes.append("the file lists no ReLU: one is taken to stand before every convolution")
    else:
        first_relu = convolutions[0].relu
        bare = [c.name for c in convolutions[1:] if not c.relu]
        if bare:
            raise ValueError(f"there is no ReLU before {', '.join(bare[:3])}")
    if not first_relu:
        notes.append(OVERSHOOT)
    chain = any(b.startswith("eltwise") for layer in layers if layer.type == "Eltwise" for b in layer.bottoms)

    norms = {c.norm is not None for c in convolutions}
    biases = {c.bias is not None for c in convolutions}
    if len(norms) > 1 or len(biases) > 1:
        raise ValueError("some of its convolutions have a BatchNorm or a bias and some have none")
    model = ModelConfig(
        B=B,
        U=found_U,
        features=len(convolutions[0].weight),
        norm="batch" if norms.pop() else "none",
        bias=biases.pop(),
        weight_sharing=shared,
        multi_path=not chain,
        input_relu=first_relu,
    )
    state: dict[str, Tensor] = {}
    for c, (conv, norm) in zip(convolutions, path_of_layers(B, found_U, shared), strict=True):
        state[f"{conv}.weight"] = c.weight
        if c.bias is not None:
            state[f"{conv}.bias"] = c.bias
        if c.norm is not None:
            state |= {f"{norm}.{key}": value for key, value in c.norm.items()}
    return Foreign("caffe", model, state, f"{name or 'network'} (Caffe)", [2, 3, 4], notes)


def _structure(names: list[str]) -> tuple[int, int]:
    """Convolutions by name, in order → (B, U).

    Raises:
        ValueError: a DRRN of which some are missing, or are in another order.
    """
    units = [m for name in names if (m := re.fullmatch(UNIT, name))]
    if not units:
        return len(names) - 1, 0
    B, U = max(int(m[1]) for m in units), max(int(m[2]) for m in units)
    expected = []
    if len(names) == (1 + 2 * U) * B + 1:
        for b in range(1, B + 1):
            expected += [f"conv{b}", *(f"conv{b}_{u}{ab}" for u in range(1, U + 1) for ab in "ab")]
        expected.append("conv_end")
    if names != expected:
        raise ValueError(f"its {len(names)} convolutions ({', '.join(names[:5])}, …) are not all of a B{B}U{U}")
    return B, U


def _differing_copies(convolutions: list[Convolution]) -> list[str]:
    """What to say if the convolutions of a block's units are not the same; empty if they are."""
    by_name = {c.name: c for c in convolutions}
    for c in convolutions:
        if (m := re.fullmatch(UNIT, c.name)) is None:
            continue
        first = by_name[f"conv{m[1]}_1{m[3]}"]
        for kind in ("weight", "bias"):
            a, b = getattr(c, kind), getattr(first, kind)
            if (a is None) != (b is None) or (a is not None and (a.shape != b.shape or not torch.equal(a, b))):
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
            # Running sums: the factor is what they have to be divided by, and 0 before the first step.
            factor = 1 / blobs[2].item() if blobs[2].item() else 0.0
            mean, variance = (blob.flatten() * factor for blob in blobs[:2])
            norm = {
                "weight": torch.ones_like(mean),
                "bias": torch.zeros_like(mean),
                "running_mean": mean,
                "running_var": variance,
                "num_batches_tracked": torch.tensor(0),
            }
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
