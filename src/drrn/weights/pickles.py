"""torch's pickles, read by Python's own unpickler; opcodes that call, import or hash are removed or replaced.

The remaining opcodes build tensors, plain containers and the ports' modules; a module becomes the dict of its
attributes. Sizes are checked against the file's bytes before memory is allocated.

Overriding `find_class` alone is not safe: BUILD sets attributes on its result, and every dict key in the file is
hashed (nested tuples take forever), by `torch.load(weights_only=True)` too; the unpickler in C allocates memory by an
index in the file. In `pickle._Unpickler`, the one in Python, each opcode can be replaced.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drrn.weights.files import LIMIT, container

HOLDERS = ("model", "state_dict", "params_ema", "params")  # the last two are BasicSR's

# ---------------------------------------------------------------------- substitutes for a pickle's names


@dataclass(eq=False)
class Storage:
    """The numbers of tensors, like torch.FloatStorage; they are read when a tensor needs them."""

    dtype: torch.dtype
    numel: int
    read: Callable[[], bytes] | None = None


class Stored(NamedTuple):
    """A tensor in a file: numbers of a storage from `offset` on, every `stride`-th."""

    storage: Storage
    offset: Any
    size: Any
    stride: Any

    def tensor(self) -> Tensor:
        """The tensor, floating ones as float32; a ValueError if it exceeds its storage, or the storage the file."""
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


class Module(NamedTuple):
    """The substitute for a pickled torch.nn.Module: its attributes."""

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
MODULES = {"DRRN", "RecursiveBlock", "ResidualUnit", "ConvLayer", "Net", "VDSR", "Conv_ReLU_Block"}


def _stored(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
    """`torch._utils._rebuild_tensor`, and `_v2` with further arguments: requires_grad, hooks, metadata."""
    base, storage = storage
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    return Stored(storage, base + count(offset), size, stride)


# The functions that a pickle may call → the function called instead.
CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): lambda pairs=(): {dict_key(key): value for key, value in pairs},
    ("torch._utils", "_rebuild_tensor"): _stored,
    ("torch._utils", "_rebuild_tensor_v2"): _stored,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch.nn.parameter", "Parameter"): lambda data, *_: data,
    ("torch.nn.backends.thnn", "_get_thnn_function_backend"): lambda: None,  # Module._backend until torch 1.4
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *_: None,
    ("__builtin__", "set"): lambda items=(): [dict_key(item) for item in items],
    ("builtins", "set"): lambda items=(): [dict_key(item) for item in items],
}


def dict_key(key: Any) -> Any:
    """A dict's key or a set's member: text or a number (hashing nested tuples can be made to take forever)."""
    if not isinstance(key, str | int):
        raise ValueError(f"a dict key, or a member of a set, that is a {type(key).__name__}")
    return key


def count(value: Any) -> int:
    """Check a size, a stride or an offset; a ValueError if it is no count."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError("a size, stride or offset that is not a count")
    return value


# ---------------------------------------------------------------------- the unpickler

CODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
# Opcodes with Python's own implementation: they push values, keep the stack and the memo, and make tuples and lists.
PLAIN = """
PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE
INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE
EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT GLOBAL STACK_GLOBAL BINPERSID"""


class _Refusing(dict):
    def __missing__(self, code: int) -> Any:
        raise ValueError(f"opcode {pickletools.code2op[chr(code)].name} is not run here")


class _Inert(pickle._Unpickler):
    """Calls only functions of `CALLS`, and constructs only `Module`."""

    def __init__(self, file: io.BytesIO, persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(file, encoding="latin-1")
        if persistent is not None:
            self.persistent_load = persistent

    def find_class(self, module: str, name: str) -> Any:
        """The substitute for a name, which is never imported; a ValueError for a name that these networks lack."""
        if (module, name) in CALLS:
            return CALLS[module, name]
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return STORAGES[name]
        layer = name in LAYERS and module.startswith("torch.nn.")
        if layer or (name in MODULES and not module.startswith("torch")):
            return Module
        shown = f"{module}.{name}"[:100]
        raise ValueError(
            f"it names {shown!r}, which is no tensor, no plain container and no part of these networks; nothing in "
            "a foreign file is run"
        )

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if function not in CALLS.values():
            raise TypeError("a call of something that is no function")
        self.stack[-1] = function(*arguments)

    def _new(self) -> None:
        if self.stack.pop() != () or self.stack[-1] is not Module:
            raise TypeError("an object that is no module")
        self.stack[-1] = Module({})

    def _build(self) -> None:
        """A module's attributes; a state dict's `_metadata` and a parameter's hooks are dropped."""
        attributes = self.stack.pop()
        if isinstance(self.stack[-1], Module) and isinstance(attributes, dict):
            self.stack[-1].attributes.update(attributes)
        elif not isinstance(self.stack[-1], dict | Stored):
            raise TypeError("attributes for an object that has none")

    def _fill(self, items: list[Any]) -> None:
        """Add alternating keys and values to the dict on top of the stack."""
        if not isinstance(self.stack[-1], dict):
            raise TypeError("items for an object that is no dict")
        self.stack[-1].update((dict_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._fill(items)

    def _add(self) -> None:
        members = self.pop_mark()
        self.stack[-1].extend(map(dict_key, members))

    own = {  # noqa: RUF012 — as in its base
        "REDUCE": _call,
        "NEWOBJ": _new,
        "BUILD": _build,
        "DICT": _dict,
        "SETITEM": lambda self: self._fill([self.stack.pop(), self.stack.pop()][::-1]),
        "SETITEMS": lambda self: self._fill(self.pop_mark()),
        "EMPTY_SET": pickle._Unpickler.load_empty_list,  # sets as lists: nothing is hashed
        "ADDITEMS": _add,
    }
    dispatch = _Refusing({CODES[name]: pickle._Unpickler.dispatch[CODES[name]] for name in PLAIN.split()})
    dispatch.update({CODES[name]: step for name, step in own.items()})


def unpickle(file: io.BytesIO, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle from a file's position on, as data: nothing of it is imported, called or constructed.

    Args:
        file: it is read up to the pickle's STOP.
        persistent: the function from a persistent id to its object.

    Returns:
        None, bool, int, float, str, bytes, list (for a set too), tuple, dict, `Stored`, `Module`, or the substitute
        for a name.

    Raises:
        ValueError: it is damaged, or contains something else, which the text names.
    """
    try:
        return _Inert(file, persistent).load()
    except (LookupError, TypeError, AttributeError, EOFError, struct.error, pickle.UnpicklingError) as error:
        raise ValueError(f"a damaged or foreign pickle ({type(error).__name__}: {error})") from error


# ---------------------------------------------------------------------- torch's two containers


def _persistent(identity: Any, storages: dict[str, Storage]) -> Any:
    """A persistent id of torch → (offset, storage), or a module's class.

    ("storage", torch.FloatStorage, key, location, numel[, view]) with view None or (key, offset, numel) of a
    part, in files of 2017; ("module", class, file, source) is the class with its source, which is not read.
    """
    kind, name, *rest = identity
    if kind == "module":
        return name
    if kind != "storage" or not isinstance(name, torch.dtype) or not isinstance(rest[0], str):
        raise TypeError("a persistent id that is not torch's")
    key, numel = rest[0], count(rest[2])
    storage = storages.setdefault(key, Storage(name, numel))
    if (storage.dtype, storage.numel) != (name, numel):
        raise TypeError(f"storage {key[:40]!r} is described in two ways")
    view = rest[3] if len(rest) > 3 else None
    return (count(view[1]) if view else 0), storage


def read_torch(data: bytes) -> Any:
    """The object in a file of `torch.save`, as `unpickle` returns it, from either of torch's containers.

    Raises:
        ValueError: it is damaged, compressed, big-endian, or contains something that is not read here.
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
    """A file of torch before 1.6: pickles of a magic number, protocol 1001, system and object, then the storages.

    The storages are a pickled list of keys, then for each key an int64 count and the numbers.
    """
    unpickle(file)  # the magic number, known from `container`
    protocol, system = unpickle(file), unpickle(file)
    if protocol != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("torch's legacy container of another protocol or byte order")
    root = unpickle(file, lambda identity: _persistent(identity, storages))
    keys = unpickle(file)
    if not isinstance(keys, list):
        raise ValueError("no list of storages")
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or int.from_bytes(file.read(8), "little", signed=True) != storage.numel:
            raise ValueError("a storage that no tensor uses, or of another size than they say: truncated?")
        size = storage.numel * storage.dtype.itemsize
        if size > len(file.getbuffer()) - file.tell():
            raise ValueError(f"a storage of {storage.numel:,} numbers where fewer are left: truncated")
        storage.read = partial(bytes, file.read(size))
    return root


def is_lightning(root: Any) -> bool:
    """Whether an unpickled object is a checkpoint of this project's Lightning module."""
    hyper = root.get("hyper_parameters") if isinstance(root, dict) else None
    return isinstance(hyper, dict) and isinstance(hyper.get("model"), dict) and "state_dict" in root


def named_tensors(root: Any) -> dict[str, Stored]:
    """The parameters and buffers of an unpickled module or state dict.

    Either may be an item of a dict, called as in `HOLDERS`; DataParallel's prefix `module.` is dropped.
    """
    if isinstance(root, dict):
        root = next((root[name] for name in HOLDERS if name in root), root)
    tensors: dict[str, Any] = {}
    if isinstance(root, dict):
        tensors = {str(name): value for name, value in root.items()}
    elif isinstance(root, Module):
        pending = [("", root)]
        for prefix, module in pending:  # grows in the loop
            if not isinstance(module, Module) or len(pending) > 10_000 or len(prefix) > 1000:
                raise ValueError("modules that are not a network's")
            held = {**module.attributes.get("_parameters", {}), **module.attributes.get("_buffers", {})}
            tensors |= {f"{prefix}{name}": value for name, value in held.items() if value is not None}
            pending += [(f"{prefix}{name}.", child) for name, child in module.attributes.get("_modules", {}).items()]
    if any(not isinstance(value, Stored) for value in tensors.values()):
        raise ValueError("neither a module nor a state dict")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def read_tensors(stored: dict[str, Stored]) -> dict[str, Tensor]:
    """Read tensors; a ValueError if one exceeds its storage, or all together exceed `LIMIT` bytes."""
    if sum(s.storage.numel * s.storage.dtype.itemsize for s in stored.values()) > LIMIT:
        raise ValueError(f"its tensors ask for more than {LIMIT:,} bytes")
    return {name: s.tensor() for name, s in stored.items()}
