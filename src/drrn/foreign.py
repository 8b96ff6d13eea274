"""Weights that others trained, read without running anything that their files say.

Four forms, told apart by what a file holds:

    caffe        the authors' DRRN and VDSR (tyshiwo/DRRN_CVPR17), and huangzehao/caffe-vdsr
    jt827859032  jt827859032/DRRN-pytorch: a pickled module, `input`, `conv1`, `conv2`, `output`
    yjn870       yjn870/DRRN-pytorch: a state dict, `rbs.{b}.h0…`, `rbs.{b}.ru…`, `rec…`
    twtygqyy     twtygqyy/pytorch-vdsr: a pickled module, `input`, `residual_layer.{i}.conv`, `output`

Caffe's is protobuf, of which the wire format is all that is needed here. The others are pickles in one of
torch's two containers. They are read by a machine of our own that knows tensors, plain containers and the names
of these networks' modules, and calls nothing: a module becomes the dict of its attributes. Sizes are held
against what the file has before memory is taken for them.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrn import Refusal
from drrn.config import ModelConfig

LIMIT = 1 << 30  # bytes of a file; the paper's largest network, B17U1, takes 30 MB


class Foreign(NamedTuple):
    """What a foreign file holds, in our terms."""

    form: str
    model: ModelConfig
    state: dict[str, Tensor]  # the state dict of DRRN(**model), not yet checked against it
    origin: str
    scales: list[int]  # that it was trained for; empty if nobody says
    notes: list[str]  # what its reader should know


def recognise(path: Path) -> str:
    """The form of a weight file by its content: "drrn" for this project's own, or one of `FORMS`.

    Raises:
        Refusal: it is none of them, damaged, or holds what is not read here (by name).
    """
    data = read_bytes(path)
    try:
        kind = container(data)
        if kind == "safetensors":
            return "drrn"
        if kind == "protobuf":
            try:
                caffe_layers(data)
            except ValueError as error:
                raise ValueError(f"neither torch's nor safetensors, and as Caffe's protobuf: {error}") from error
            return "caffe"
        root = read_torch(data)
        if is_lightning(root):
            return "drrn"
        names = set(named_tensors(root))
        for form, pattern in NAMES.items():
            if names and all(re.fullmatch(pattern, name) for name in names):
                return form
        some = ", ".join(repr(name[:40]) for name in sorted(names)[:4])
        raise ValueError(f"its tensors ({some}, …) are named as in none of {', '.join(NAMES)}")
    except Exception as error:  # zipfile, struct and torch raise many kinds for a damaged file
        raise Refusal(f"{path} is not a weight file that is known here: {error}") from error


def read_foreign(path: Path, form: str, U: int | None = None) -> Foreign:
    """Read a foreign file.

    Args:
        path: the file.
        form: one of `FORMS`.
        U: residual units of a block, for the forms that share weights and so do not show it; if None it is
            taken from a file name that says B1U25.

    Raises:
        Refusal: the file is damaged, hostile or not of this form, or U is not to be known.
    """
    data = read_bytes(path)
    try:
        if form == "caffe":
            return read_caffe(data, U)
        tensors = read_tensors(named_tensors(read_torch(data)))
        for name in tensors:
            if not re.fullmatch(NAMES[form], name):
                raise ValueError(f"its tensor {name[:80]!r} is not one of that form")
        return READERS[form](tensors, U, path.stem)
    except Refusal:
        raise
    except KeyError as error:
        raise Refusal(f"{path} cannot be read as {form}: {error} is missing") from error
    except Exception as error:
        raise Refusal(f"{path} cannot be read as {form}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """A whole file.

    Raises:
        Refusal: it is missing, unreadable or larger than `LIMIT`.
    """
    try:
        size = path.stat().st_size
        if size > LIMIT:
            raise Refusal(f"{path} has {size:,} bytes: no network of this family needs more than {LIMIT:,}")
        return path.read_bytes()
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror}") from error


def container(data: bytes) -> str:
    """By the first bytes: "zip" and "legacy" (torch's two), "safetensors", else "protobuf"."""
    if data[:4] == b"PK\x03\x04":
        return "zip"
    if data[:1] == b"\x80" and LEGACY_MAGIC in data[:32]:
        return "legacy"
    if data[257:262] == b"ustar":
        raise ValueError("it is torch's container of 2016 (a tar); load and save it with torch 0.2 to 2.5 first")
    if 2 <= int.from_bytes(data[:8], "little") <= len(data) - 8 and data[8:9] == b"{":
        return "safetensors"
    return "protobuf"


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
    text = bytes(values[-1][:100]).decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)


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


def read_caffe(data: bytes, U: int | None = None) -> Foreign:
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
        notes.append("no ReLU before the first convolution: negative overshoot of the bicubic input is kept")
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


# ---------------------------------------------------------------------------------------- torch's containers
# pytorch/pytorch: torch/serialization.py; opcodes: Python's pickletools.

LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


@dataclass(eq=False)
class Storage:
    """The numbers behind tensors: torch.FloatStorage and its like, read when a tensor needs them."""

    dtype: torch.dtype
    numel: int
    read: Callable[[], bytes] | None = None


class Stored(NamedTuple):
    """A tensor in a file: numbers of a storage from `offset` on, `stride` apart."""

    storage: Storage
    offset: Any
    size: Any
    stride: Any

    def tensor(self) -> Tensor:
        """The tensor, floating ones as float32.

        Raises:
            ValueError: it reaches beyond its storage, or the storage beyond the file.
        """
        storage, offset = self.storage, _count(self.offset)
        if not isinstance(self.size, tuple) or len(self.size) > 4 or len(self.size) != len(self.stride):
            raise ValueError("a tensor of an impossible size")
        size, stride = [_count(n) for n in self.size], [_count(n) for n in self.stride]
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 in size or math.prod(size) > storage.numel or last >= storage.numel:
            raise ValueError(f"a tensor of size {size} in a storage of {storage.numel:,} numbers")
        raw = storage.read() if storage.read else b""
        if len(raw) != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"a storage of {storage.numel:,} numbers has {len(raw):,} bytes: truncated")
        values = torch.frombuffer(bytearray(raw), dtype=storage.dtype).as_strided(size, stride, offset)
        return values.float().contiguous() if values.is_floating_point() else values.contiguous()


class Global(NamedTuple):
    """A name in a pickle. It is never looked up."""

    module: str
    name: str


class Module(NamedTuple):
    """What a pickled torch.nn.Module becomes: its attributes."""

    attributes: dict[str, Any]


STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LAYERS = {"Conv2d", "ReLU", "BatchNorm2d", "Sequential", "ModuleList", "DataParallel"}
NETWORKS = {"DRRN", "RecursiveBlock", "ResidualUnit", "ConvLayer", "Net", "VDSR", "Conv_ReLU_Block"}


def _is_module(name: Global) -> bool:
    layer = name.name in LAYERS and name.module.startswith("torch.nn.")
    return layer or (name.name in NETWORKS and not name.module.startswith("torch"))


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return {_key(key): value for key, value in pairs}


def _stored(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
    """`torch._utils._rebuild_tensor`, and `_v2` with requires_grad, hooks and metadata after it."""
    base, storage = storage
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    return Stored(storage, base + _count(offset), size, stride)


# What a pickle may call, and what is done instead.
CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _stored,
    ("torch._utils", "_rebuild_tensor_v2"): _stored,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch.nn.parameter", "Parameter"): lambda data, *_: data,
    ("torch.nn.backends.thnn", "_get_thnn_function_backend"): lambda: None,  # Module._backend until torch 1.4
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *_: None,
    ("__builtin__", "set"): list,
    ("builtins", "set"): list,
}


def _known(name: Global) -> Global:
    storage = name.module in ("torch", "torch.cuda") and name.name in STORAGES
    if not storage and tuple(name) not in CALLS and not _is_module(name):
        shown = f"{name.module}.{name.name}"[:100]
        raise ValueError(
            f"it names {shown!r}, which is no tensor, no plain container and no part of these networks; nothing in "
            "a foreign file is run"
        )
    return name


def _key(key: Any) -> Any:
    """A dict's key: text or a number (hashing nested tuples can be made to take forever)."""
    if not isinstance(key, str | int):
        raise ValueError(f"a dict key that is a {type(key).__name__}")
    return key


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError("a size, stride or offset that is not a count")
    return value


def unpickle(file: io.BytesIO, persistent: Callable[[Any], Any] | None = None) -> Any:
    """One pickle from a file's position on, as data: nothing is imported, called or constructed.

    Args:
        file: left after the pickle's STOP.
        persistent: what a persistent id stands for.

    Returns:
        None, bool, int, float, str, bytes, list, tuple, dict, `Stored`, `Module` or `Global`; sets as lists.

    Raises:
        ValueError: damaged, or something else is in it, by name.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def fill(items: list[Any]) -> None:
        if not isinstance(stack[-1], dict):
            raise TypeError("items for what is no dict")
        stack[-1].update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def extend(items: list[Any]) -> None:
        if not isinstance(stack[-1], list):
            raise TypeError("items for what is no list")
        stack[-1].extend(items)

    try:
        for opcode, arg, _ in pickletools.genops(file):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(len(stack))
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case (
                    "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT"
                    | "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE"
                    | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
                ):  # fmt: skip
                    stack.append(arg)
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "EMPTY_LIST" | "EMPTY_SET":
                    stack.append([])
                case "LIST" | "FROZENSET":
                    stack.append(since_mark())
                case "APPEND":
                    extend([stack.pop()])
                case "APPENDS" | "ADDITEMS":
                    extend(since_mark())
                case "EMPTY_DICT":
                    stack.append({})
                case "DICT":
                    items = since_mark()
                    stack.append({})
                    fill(items)
                case "SETITEM":
                    items = stack[-2:]
                    del stack[-2:]
                    fill(items)
                case "SETITEMS":
                    fill(since_mark())
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    since_mark()
                case "DUP":
                    stack.append(stack[-1])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "GLOBAL":
                    stack.append(_known(Global(*arg.split(" ", 1))))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    if not isinstance(name, str) or not isinstance(module, str):
                        raise TypeError("a name that is no text")
                    stack.append(_known(Global(module, name)))
                case "REDUCE":
                    arguments, function = stack.pop(), stack.pop()
                    if not isinstance(function, Global) or function not in CALLS:
                        raise TypeError("a call of what is no function")
                    stack.append(CALLS[function](*arguments))
                case "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    if arguments != () or not isinstance(function, Global) or not _is_module(function):
                        raise TypeError("an object that is no module")
                    stack.append(Module({}))
                case "BUILD":
                    attributes = stack.pop()
                    if isinstance(stack[-1], Module) and isinstance(attributes, dict):
                        stack[-1].attributes.update(attributes)
                    elif not isinstance(stack[-1], dict | Stored):  # a state dict's _metadata, a parameter's hooks
                        raise TypeError("attributes for what has none")
                case "BINPERSID" if persistent:
                    stack.append(persistent(stack.pop()))
                case _:
                    raise ValueError(f"opcode {opcode.name} {str(arg)[:80]!r} is not run here")
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a damaged or foreign pickle ({type(error).__name__}: {error})") from error
    raise ValueError("a pickle without an end")


def _persistent(identity: Any, storages: dict[str, Storage]) -> Any:
    """A persistent id of torch → (offset, storage), or a module's class.

    ("storage", torch.FloatStorage, key, location, numel[, view]) with view None or (key, offset, numel) of a
    part, in files of 2017; ("module", class, file, source) is the class with its source, which is left alone.
    """
    kind, name, *rest = identity
    if kind == "module":
        return name
    if kind != "storage" or not isinstance(rest[0], str):
        raise TypeError("a persistent id that is not torch's")
    key, numel = rest[0], _count(rest[2])
    dtype = STORAGES[name.name]
    storage = storages.setdefault(key, Storage(dtype, numel))
    if (storage.dtype, storage.numel) != (dtype, numel):
        raise TypeError(f"storage {key[:40]!r} is described in two ways")
    view = rest[3] if len(rest) > 3 else None
    return (_count(view[1]) if view else 0), storage


def read_torch(data: bytes) -> Any:
    """The object in a file of `torch.save`, as `unpickle` gives it, from either of torch's containers.

    Raises:
        ValueError: damaged, compressed, of another byte order, or something that is not read here.
    """
    storages: dict[str, Storage] = {}
    if container(data) == "legacy":
        return _read_legacy(io.BytesIO(data), storages)
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file, but not one of torch.save")
        prefix = pickles[0].removesuffix("data.pkl")

        def record(name: str) -> bytes:
            info = archive.getinfo(prefix + name)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data):
                raise ValueError(f"record {name[:40]!r} is compressed or larger than the file")
            return archive.read(info)

        if f"{prefix}byteorder" in archive.namelist() and record("byteorder") != b"little":
            raise ValueError("its byte order is not little-endian")
        root = unpickle(io.BytesIO(record("data.pkl")), lambda identity: _persistent(identity, storages))
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        raise ValueError(f"a damaged zip file ({error})") from error
    for key, storage in storages.items():
        storage.read = partial(record, f"data/{key}")
    return root


def _read_legacy(file: io.BytesIO, storages: dict[str, Storage]) -> Any:
    """torch before 1.6: pickles of a magic number, protocol 1001, the system and the object, then the storages.

    These are a pickled list of keys, then for each an int64 count and the numbers.
    """
    unpickle(file)  # the magic number, known from `container`
    protocol, system = unpickle(file), unpickle(file)
    if protocol != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("torch's legacy container of another protocol or byte order")
    root = unpickle(file, lambda identity: _persistent(identity, storages))
    keys = unpickle(file)
    if not isinstance(keys, list):
        raise ValueError("no list of storages")
    left = len(file.getbuffer()) - file.tell()
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or int.from_bytes(file.read(8), "little", signed=True) != storage.numel:
            raise ValueError("a storage that no tensor uses, or of another size than they say: truncated?")
        size = storage.numel * storage.dtype.itemsize
        left -= 8 + size
        if left < 0:
            raise ValueError(f"a storage of {storage.numel:,} numbers where fewer are left: truncated")
        storage.read = partial(bytes, file.read(size))
    return root


def is_lightning(root: Any) -> bool:
    """Whether an unpickled object is a checkpoint of this project's Lightning module."""
    hyper = root.get("hyper_parameters") if isinstance(root, dict) else None
    return isinstance(hyper, dict) and isinstance(hyper.get("model"), dict) and "state_dict" in root


def named_tensors(root: Any) -> dict[str, Stored]:
    """The parameters and buffers of an unpickled module or state dict.

    Either may stand under `model` or `state_dict` in a dict; DataParallel's `module.` is dropped.
    """
    if isinstance(root, dict):
        root = root.get("model", root.get("state_dict", root))
    tensors: dict[str, Any] = {}
    if isinstance(root, dict):
        tensors = {str(name): value for name, value in root.items()}
    elif isinstance(root, Module):
        pending = [("", root)]
        for prefix, module in pending:  # grows as it goes
            if not isinstance(module, Module) or len(pending) > 10_000 or len(prefix) > 1000:
                raise ValueError("modules that are not a network's")
            for kind in ("_parameters", "_buffers"):
                for name, value in dict(module.attributes.get(kind, {})).items():
                    if value is not None:
                        tensors[f"{prefix}{name}"] = value
            for name, child in dict(module.attributes.get("_modules", {})).items():
                pending.append((f"{prefix}{name}.", child))
    if any(not isinstance(value, Stored) for value in tensors.values()):
        raise ValueError("neither a module nor a state dict")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def read_tensors(stored: dict[str, Stored]) -> dict[str, Tensor]:
    """Their values.

    Raises:
        ValueError: one reaches beyond its storage, or together they are larger than any network.
    """
    if sum(s.storage.numel * s.storage.dtype.itemsize for s in stored.values()) > LIMIT:
        raise ValueError(f"its tensors ask for more than {LIMIT:,} bytes")
    return {name: s.tensor() for name, s in stored.items()}


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
        raise Refusal(
            f"U cannot be read from the shared weights of a {form} file: give U=… (jt827859032's own code has "
            "U=25), or call the file …_B1U25…"
        )
    if U is None and int(named[1]) != B:
        raise Refusal(f"the file is called B{named[1]}U{named[2]} but holds B = {B}: give U=…")
    result = int(named[2]) if U is None else U
    if result < 1:
        raise Refusal(f"U = {result}: the file has the convolutions of residual units, so U is at least 1")
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
FORMS = ("caffe", *READERS)
