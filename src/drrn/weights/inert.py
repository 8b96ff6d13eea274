"""What stands for the things that a pickle of torch names: tensors, modules, functions; all of it inert."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
        storage, offset = self.storage, count(self.offset)
        if not isinstance(self.size, tuple) or len(self.size) > 4 or len(self.size) != len(self.stride):
            raise ValueError("a tensor of an impossible size")
        size, stride = [count(n) for n in self.size], [count(n) for n in self.stride]
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


def is_module(name: Global) -> bool:
    """Whether a name is a layer of torch's or a class of the ports'."""
    layer = name.name in LAYERS and name.module.startswith("torch.nn.")
    return layer or (name.name in NETWORKS and not name.module.startswith("torch"))


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return {dict_key(key): value for key, value in pairs}


def _stored(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
    """`torch._utils._rebuild_tensor`, and `_v2` with requires_grad, hooks and metadata after it."""
    base, storage = storage
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    return Stored(storage, base + count(offset), size, stride)


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


def known(name: Global) -> Global:
    """A name that a pickle may hold.

    Raises:
        ValueError: any other.
    """
    storage = name.module in ("torch", "torch.cuda") and name.name in STORAGES
    if not storage and tuple(name) not in CALLS and not is_module(name):
        shown = f"{name.module}.{name.name}"[:100]
        raise ValueError(
            f"it names {shown!r}, which is no tensor, no plain container and no part of these networks; nothing in "
            "a foreign file is run"
        )
    return name


def dict_key(key: Any) -> Any:
    """A dict's key: text or a number (hashing nested tuples can be made to take forever)."""
    if not isinstance(key, str | int):
        raise ValueError(f"a dict key that is a {type(key).__name__}")
    return key


def count(value: Any) -> int:
    """A size, a stride or an offset.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError("a size, stride or offset that is not a count")
    return value
