"""Whole writes and locks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from drrn.errors import UserError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write to a temporary name beside `path`, flush it to the disk, then rename.

    Whatever happens, power failures included, `path` is the old file or the new one.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)  # the new name
    except UserError:
        raise
    except Exception as error:  # libraries raise their own kinds for a full or read-only disk
        raise UserError(f"{path} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """A file or a folder, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"  # before any file: what fails here is our bug
    write_whole(path, lambda partial: partial.write_text(text))


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; the kernel lets go of it when the process ends, however it ends. The file stays.

    Args:
        path: of the lock file.
        what: what another process does that holds it, for the message.

    Raises:
        UserError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{what} by another process (it holds {path}): wait for it, or end it") from error
    try:
        yield
    finally:
        lock.release()
