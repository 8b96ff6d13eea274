"""torch's pickles read by a machine that calls nothing.

The machine knows tensors, plain containers and the names of the ports' modules; a module becomes the dict of its
attributes. Sizes are held against what the file has before memory is taken for them. Opcodes: Python's pickletools.

`pickle.Unpickler` with `find_class` is not as safe: it takes memory by a memo index of the file (4 GB for 2²⁸,
measured), it hashes whatever the file makes a key of (of nested tuples: for ever), and BUILD sets attributes on the
very stand-ins that `find_class` returns. `torch.load(weights_only=True)` hashes such keys too, and reads no modules.
So our own checkpoints are read here as well: one reader for torch's files.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from drrn.weights.files import LIMIT, container
from drrn.weights.inert import CALLS, STORAGES, Global, Module, Storage, Stored, count, dict_key, is_module, known


class _Machine:
    """The stack, the marks and the memo of one pickle. Its methods are what opcodes do; `STEPS` names them."""

    def __init__(self, persistent: Callable[[Any], Any] | None) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.persistent = persistent

    def since_mark(self) -> list[Any]:
        """What was pushed since the last mark, taken from the stack."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, count: int) -> list[Any]:
        """The last items, taken from the stack."""
        return [self.stack.pop() for _ in range(count)][::-1]

    def extend(self, items: list[Any]) -> None:
        """Append to the list on top."""
        if not isinstance(self.stack[-1], list):
            raise TypeError("items for what is no list")
        self.stack[-1].extend(items)

    def fill(self, items: list[Any]) -> None:
        """Keys and values in turn, for the dict on top."""
        if not isinstance(self.stack[-1], dict):
            raise TypeError("items for what is no dict")
        self.stack[-1].update((dict_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def dict_since_mark(self) -> None:
        """A new dict of what was pushed since the mark."""
        items = self.since_mark()
        self.stack.append({})
        self.fill(items)

    def name(self, module: Any, name: Any) -> None:
        """A name, known or refused."""
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name that is no text")
        self.stack.append(known(Global(module, name)))

    def call(self) -> None:
        """What CALLS does instead of the function."""
        function, arguments = self.last(2)
        if not isinstance(function, Global) or function not in CALLS:
            raise TypeError("a call of what is no function")
        self.stack.append(CALLS[function](*arguments))

    def new(self) -> None:
        """A module without attributes yet."""
        function, arguments = self.last(2)
        if arguments != () or not isinstance(function, Global) or not is_module(function):
            raise TypeError("an object that is no module")
        self.stack.append(Module({}))

    def build(self) -> None:
        """A module's attributes; a state dict's `_metadata` and a parameter's hooks are dropped."""
        attributes = self.stack.pop()
        if isinstance(self.stack[-1], Module) and isinstance(attributes, dict):
            self.stack[-1].attributes.update(attributes)
        elif not isinstance(self.stack[-1], dict | Stored):
            raise TypeError("attributes for what has none")

    def persistent_id(self) -> None:
        """A storage, or a module's class."""
        if self.persistent is None:
            raise TypeError("a persistent id where there are none")
        self.stack.append(self.persistent(self.stack.pop()))


def _steps() -> dict[str, Callable[[_Machine, Any], Any]]:
    """Opcode → what it does with its argument; an opcode that is not here is refused by name."""
    push = lambda m, arg: m.stack.append(arg)  # noqa: E731
    values = (
        "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
        "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8"
    )
    put = lambda m, arg: m.memo.__setitem__(arg, m.stack[-1])  # noqa: E731
    get = lambda m, arg: m.stack.append(m.memo[arg])  # noqa: E731
    return {
        **dict.fromkeys(("PROTO", "FRAME"), lambda m, arg: None),
        **dict.fromkeys((*values.split(), "NONE"), push),
        **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), put),
        **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), get),
        "MEMOIZE": lambda m, _: put(m, len(m.memo)),
        "NEWTRUE": lambda m, _: m.stack.append(True),
        "NEWFALSE": lambda m, _: m.stack.append(False),
        "MARK": lambda m, _: m.marks.append(len(m.stack)),
        "POP": lambda m, _: m.stack.pop(),
        "POP_MARK": lambda m, _: m.since_mark(),
        "DUP": lambda m, _: m.stack.append(m.stack[-1]),
        "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
        "TUPLE1": lambda m, _: m.stack.append(tuple(m.last(1))),
        "TUPLE2": lambda m, _: m.stack.append(tuple(m.last(2))),
        "TUPLE3": lambda m, _: m.stack.append(tuple(m.last(3))),
        "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
        **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda m, _: m.stack.append([])),
        **dict.fromkeys(("LIST", "FROZENSET"), lambda m, _: m.stack.append(m.since_mark())),
        "APPEND": lambda m, _: m.extend(m.last(1)),
        **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, _: m.extend(m.since_mark())),
        "EMPTY_DICT": lambda m, _: m.stack.append({}),
        "DICT": lambda m, _: m.dict_since_mark(),
        "SETITEM": lambda m, _: m.fill(m.last(2)),
        "SETITEMS": lambda m, _: m.fill(m.since_mark()),
        "GLOBAL": lambda m, arg: m.name(*arg.split(" ", 1)),
        "STACK_GLOBAL": lambda m, _: m.name(*m.last(2)),
        "REDUCE": lambda m, _: m.call(),
        "NEWOBJ": lambda m, _: m.new(),
        "BUILD": lambda m, _: m.build(),
        "BINPERSID": lambda m, _: m.persistent_id(),
    }


STEPS = _steps()


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
    machine = _Machine(persistent)
    try:
        for opcode, arg, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return machine.stack.pop()
            if opcode.name not in STEPS:
                raise ValueError(f"opcode {opcode.name} {str(arg)[:80]!r} is not run here")
            STEPS[opcode.name](machine, arg)
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
    key, numel = rest[0], count(rest[2])
    dtype = STORAGES[name.name]
    storage = storages.setdefault(key, Storage(dtype, numel))
    if (storage.dtype, storage.numel) != (dtype, numel):
        raise TypeError(f"storage {key[:40]!r} is described in two ways")
    view = rest[3] if len(rest) > 3 else None
    return (count(view[1]) if view else 0), storage


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
