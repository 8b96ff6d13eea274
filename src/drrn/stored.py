"""Files of training data: built once from images, and checked by their attributes when they are opened."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
from filelock import FileLock, Timeout

from drrn.disk import sha256
from drrn.errors import UserError, counted

log = logging.getLogger(__name__)
Attributes = dict[str, str | int]  # "format", "recipe" (JSON) and "sources" (a digest) of a file


def sources_digest(files: list[Path]) -> str:
    """SHA-256 over the names and contents of the source images, in order."""
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.name} {sha256(path)}\n".encode())
    return total.hexdigest()


def built_once(folder: Path, name: str, images: list[Path], attrs: Attributes, build: Callable[[Path], None]) -> Path:
    """Build a file unless it exists; a file of this name is complete. Other recipes or sources have another name.

    Concurrent processes wait for the one that builds. It writes under a temporary name in a folder of its own; the
    remains of killed builds are removed.

    Args:
        folder, name: of the file; its name has a digest too.
        images, attrs: its sources and its attributes.
        build: writes to the temporary path that it is given.

    Raises:
        UserError: a process of the build was killed, the images changed meanwhile, or the file cannot be written.
    """
    path = folder / f"{name}-{hashlib.sha256(json.dumps(attrs, sort_keys=True).encode()).hexdigest()[:10]}.h5"
    if path.is_file():  # complete: no lock is needed, and no permission to write
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)  # the kernel releases it when its holder ends, however that happens
        try:
            held = lock.acquire(timeout=1)
        except Timeout:
            log.info("waiting for another process that builds %s", path)
            held = lock.acquire()
        with held:
            if path.is_file():
                return path
            _remove_partials(folder)
            log.info("building %s from %s", path, counted(len(images), "image"))
            if others := ", ".join(sorted(other.name for other in folder.glob(f"{name}-*.h5"))):
                log.info("the folder also has %s, of other recipes, images or versions", others)
            partial = path.with_suffix(f".{os.getpid()}.partial") / path.name
            partial.parent.mkdir(exist_ok=True)
            try:
                build(partial)
                if sources_digest(images) != attrs["sources"]:
                    raise UserError(f"the images of {path} changed while it was built: run the same command again")
                partial.rename(path)
            finally:
                shutil.rmtree(partial.parent, ignore_errors=True)
        return path
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that built {path} was killed (out of memory?): run the same command again, with a smaller "
            "data.num_workers if memory is short"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error}. Set data.patches to a folder that can be written and has room."
        ) from error


def _lock(path: Path) -> FileLock:
    """The lock of a file that is built here: one object in each process, so that it is reentrant."""
    return FileLock(f"{path}.lock", is_singleton=True)


def _remove_partials(folder: Path) -> None:
    """Delete the remains of killed builds, up to 5.7 GB each; a running build holds the lock of its file."""
    for partial in folder.glob(f"*-{'[0-9a-f]' * 10}.*.partial"):  # other programs may have theirs here
        name, *_ = partial.name.rsplit(".", 2)  # name-digest.pid.partial
        with suppress(Timeout), _lock(folder / f"{name}.h5").acquire(timeout=0):  # else it is being built
            log.info("removing %s, left by a build that was killed", partial)
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)  # a file that another machine has open stays
            else:
                partial.unlink(missing_ok=True)  # earlier versions'


def check_room(folder: Path, needed: int) -> None:
    """Raise an OSError, before a build begins, if the disk has no room for so many bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    if free < needed:
        raise OSError(f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


@contextmanager
def trusted(path: Path, attrs: Attributes) -> Iterator[h5py.File]:
    """Open a stored file after a check that it has the attributes `attrs`.

    A UserError if it is truncated, damaged, of another format, recipe or source, or if the body of the `with`
    statement raises a ValueError or the like.
    """
    advice = f"Delete {path} to have it built again."
    try:
        with h5py.File(path, "r") as file:
            for key, expected in attrs.items():
                found = file.attrs.get(key)
                found = found.decode() if isinstance(found, bytes) else found  # str if another program wrote the file
                if found != expected:
                    raise UserError(f"{path}: its {key} is {found!r}, this run needs {expected!r}. {advice}")
            yield file
    except BlockingIOError as error:  # HDF5's own lock
        raise UserError(f"{path} is open for writing in another process: try again when that has ended") from error
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or another kind of file ({error}). {advice}") from error


class StoredFile:
    """A stored file that must not change while it is read."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, self._state(path)
        self.file: Any = None  # opened on first use, by each process

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "file": None}

    @staticmethod
    def _state(path: Path) -> tuple[int, int, int]:
        about = path.stat()
        return about.st_ino, about.st_size, about.st_mtime_ns

    def check_unchanged(self) -> None:
        """Refuse a file that has been modified or replaced since it was first opened.

        Inode, size and modification time are compared, which detects a new file of that name and any ordinary write,
        but not one that resets the time. A deleted file is still complete for processes that have it open.
        """
        if self.path.exists() and self._state(self.path) != self.seen:
            raise UserError(
                f"{self.path} was changed while it was in use: the steps since the last checkpoint may have used "
                "other pixels. Delete it to have it built again, then run the same command: it resumes from "
                "that checkpoint."
            )
