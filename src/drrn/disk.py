"""Atomic writes, locks, and checks of a file before it is read or written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from drrn.errors import InUse, UserError


def write_whole(path: Path, content: str | bytes | Callable[[Path], Any]) -> None:
    """Write to a temporary file next to `path`, flush it to the disk, then rename it.

    Whatever happens, power failures included, `path` is the old file or the new one. A write that fails is a
    UserError. `content` is bytes, a text (written as UTF-8, with lone surrogates of file names escaped) or a function
    that writes to a given path.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    where = f"{os.getpid()}-{threading.get_native_id()}"
    partial = path.parent / f".{path.name[-40:]}.{where}.partial"  # shortened: names have at most 255 bytes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            content(partial)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)  # the new name
    except UserError:
        raise
    except Exception as error:  # libraries raise their own exceptions for a full or read-only disk
        raise UserError(f"{path} could not be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # it must not replace the first error
            partial.unlink(missing_ok=True)


def check_output(name: str, path: Path, folder: bool = False) -> None:
    """Refuse an output that cannot be written, before the work that makes it. Nothing is left on the disk.

    Args:
        name: of its key, for the message.
        path: of the file or folder to be written; folders above it need not exist.
        folder: whether it is a folder.
    """
    if "\0" in str(path) or (not folder and path.name in ("", "..")):
        raise UserError(f"{name} = {str(path)!r}: name a file")
    try:
        long = next((part for part in path.parts if len(os.fsencode(part)) > 255), None)
        if long is not None:
            raise UserError(f"{name}: a name of {len(os.fsencode(long))} bytes ({long[:20]}…): at most 255")
        kind = path.stat().st_mode if os.path.lexists(path) else None
        if kind is not None and stat.S_ISDIR(kind) != folder:
            raise UserError(f"{name} = {path}: it is {'no folder' if folder else 'a folder: name a file in it'}")
        if kind is not None and not folder and not stat.S_ISREG(kind):
            raise UserError(f"{name} = {path}: it is no regular file")
        place = path if kind is not None and folder else path.parent
        while not os.path.lexists(place):
            place = place.parent
        with tempfile.TemporaryFile(dir=place):  # the only sure test: permissions, file system and quota all count
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} = {path}: it cannot be written there: {reason}") from error


def check_regular(path: Path, at_most: int) -> int:
    """The size in bytes of a file that is about to be read; links are followed.

    A missing file, one that is no regular file (reading a pipe or device may not end), and one of more than `at_most`
    bytes is a UserError.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} cannot be read: it is no regular file")
    if found.st_size > at_most:
        raise UserError(f"{path} has {found.st_size:,} bytes: at most {at_most:,} are read")
    return found.st_size


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file with `write_whole`."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; the kernel releases the lock when the process ends, however it ends. The file stays.

    Raises:
        InUse: another process holds the lock; `what` says what that process does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InUse(f"{what} by another process (it holds {path}): wait for it, or end it") from error
    try:
        yield
    finally:
        lock.release()
