"""The training patches of Sec. 4.1–4.2: cut, stored in HDF5, read back shuffled.

Each training image is turned into its eight orientations *before* it is degraded; each version is cropped to
a multiple of the scale, degraded (`protocol.degrade`) and cut into 31×31 pairs at stride 21 from the top-left,
incomplete windows dropped. The 291 images give 1,722,720 pairs.

A build first degrades every image and keeps the pixels (0.7 GB, a seventh of the patches, which overlap), then
cuts the pairs in the order of the rows in which they are stored: what is written is written once and in order.

File format 2: two contiguous datasets whose rows belong together, in an order shuffled once at the build.

    data   [N, 31, 31] uint16   the network's input x; x = STEP · q + LOW, so within 1.91e-5
    label  [N, 31, 31] uint8    the ground truth Y, exact

Bicubic down and up can overshoot 0…1 by at most 0.72 (the square of the kernel's absolute sum, 1.25, in two
dimensions, twice), hence LOW and STEP. Attributes hold the recipe as JSON, the digest of the source images
and the format. A file's name holds the digest of both: another recipe or other sources are another file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import h5py
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from drrn import Refusal
from drrn.config import DataConfig
from drrn.images import image_files, image_size, orientations, read_luminance, sha256
from drrn.machine import keep_freed_memory
from drrn.protocol import degrade
from drrn.records import end_with_parent

log = logging.getLogger(__name__)

FORMAT = 2
LOW, HIGH = -0.75, 1.75
STEP = (HIGH - LOW) / 65535
ROWS = 8192  # that a building process cuts before it writes them: 24 MB, which the cache holds
JOB = 8 * ROWS  # that it is told to do at a time, at most
PAGE = 4096  # bytes; what is written past the page cache begins and ends at a multiple
RUN = 16  # rows read together: long enough to be one read, short enough that a batch mixes many places


@dataclass(frozen=True)
class Recipe:
    """What a patch file is made of; two files with equal recipes and sources are interchangeable."""

    sets: tuple[str, ...]
    scales: tuple[int, ...] = (2, 3, 4)
    patch_size: int = 31
    stride: int = 21
    augment: str = "offline"  # "offline": eight orientations stored; "online": one, turned on the device

    @classmethod
    def of(cls, data: DataConfig) -> Recipe:
        """The recipe that a run's `data.*` asks for."""
        return cls(tuple(data.train), tuple(data.scales), data.patch_size, data.stride, data.augment)

    @property
    def orientations(self) -> int:
        """Orientations stored."""
        return 8 if self.augment == "offline" else 1


class Places(NamedTuple):
    """Where the two datasets begin in a file, in bytes."""

    data: int
    label: int


class Version(NamedTuple):
    """An image in one orientation at one scale, from which pairs are cut; places count in the image as it is.

    What the crop to a multiple of the scale leaves of the *turned* image is the rectangle of the image that lies
    in the corner which the turn brings to the top left. So up to four rectangles serve the eight orientations.
    """

    orientation: int
    scale: int
    top: int
    left: int
    height: int
    width: int
    down: int  # windows below each other in the turned rectangle
    across: int  # and side by side

    @property
    def rectangle(self) -> tuple[int, int, int, int, int]:
        """What is degraded: (scale, top, left, height, width)."""
        return self[1:6]


def windows(length: int, recipe: Recipe) -> int:
    """Complete windows along a side of `length` pixels."""
    return max(0, (length - recipe.patch_size) // recipe.stride + 1)


def versions(height: int, width: int, recipe: Recipe) -> list[Version]:
    """The versions of an image [height, width] that give pairs, in the order in which they are cut."""
    found = []
    for o, corners in enumerate(orientations(np.array([[0, 1], [2, 3]]), range(recipe.orientations))):
        bottom, right = divmod(int(corners[0, 0]), 2)  # the corner that comes to lie at the top left
        for scale in recipe.scales:
            h, w = height - height % scale, width - width % scale
            down, across = (windows(side, recipe) for side in ((w, h) if o % 2 else (h, w)))
            found.append(Version(o, scale, bottom * (height - h), right * (width - w), h, w, down, across))
    return [version for version in found if version.down * version.across]


def pair_count(height: int, width: int, recipe: Recipe) -> int:
    """Pairs that one image [height, width] gives over all scales and stored orientations."""
    return sum(version.down * version.across for version in versions(height, width, recipe))


def kept(height: int, width: int, recipe: Recipe) -> tuple[dict[tuple[int, int, int, int, int], int], int]:
    """How a build keeps the pixels of an image: first Y, then what is made of each rectangle, 16 bits a pixel.

    Returns:
        `Version.rectangle` → where its degraded pixels begin; and where they all end (bytes, even).
    """
    places, end = {}, height * width + height * width % 2
    for version in versions(height, width, recipe):
        if version.rectangle not in places:
            places[version.rectangle] = end
            end += 2 * version.height * version.width
    return places, end


@dataclass(frozen=True)
class Source:
    """An image file, and where a build keeps its pixels."""

    path: Path
    height: int
    width: int
    at: int  # bytes


def quantise(x: NDArray[np.float64]) -> NDArray[np.uint16]:
    """x in LOW…HIGH → 16 bits, nearest (error at most STEP / 2 = 1.91e-5).

    Flat areas of every fifth grey level lie half-way between two levels: those go up, whatever the last bits of
    x are, so that an image which is degraded and then turned gives what the turned one does.
    """
    levels = x - LOW
    levels /= STEP
    if not (levels.min() >= -1e-6 and levels.max() <= 65535 + 1e-6):  # NaN too
        raise ValueError(f"bicubic values {x.min():.3f}…{x.max():.3f} are outside {LOW}…{HIGH}")
    levels += 0.5 + 1e-6
    return levels.astype(np.uint16)  # towards zero


def _degrade_image(source: Source, recipe: Recipe, pixels: Path) -> None:
    """Y of one image and its degraded rectangles, into their place (runs in a worker process)."""
    y = read_luminance(source.path)
    if y.shape != (source.height, source.width):
        raise Refusal(f"{source.path} changed while its patches were cut: run the same command again")
    truth = y / 255.0
    with pixels.open("r+b") as file:
        file.seek(source.at)
        file.write(np.ascontiguousarray(y))
        for (scale, top, left, h, w), at in kept(*y.shape, recipe)[0].items():
            file.seek(source.at + at)
            file.write(quantise(degrade(truth[top : top + h, left : left + w], scale)))


class Cutter:
    """Cuts any pair of a build, by its number (each worker process has its own).

    Pairs are numbered as they come: images, orientations, scales, windows row by row.
    """

    def __init__(self, sources: tuple[Source, ...], recipe: Recipe, pixels: Path) -> None:
        memory = np.memmap(pixels, np.uint8, "r").view(np.ndarray)  # a memmap's own slices are slow
        self.p = p = recipe.patch_size
        self.windows: list[tuple[NDArray[np.uint16], NDArray[np.uint8]]] = []  # [down, across, p, p] of a version
        for source in sources:
            y = memory[source.at : source.at + source.height * source.width].reshape(source.height, source.width)
            places, _ = kept(*y.shape, recipe)
            for version in versions(source.height, source.width, recipe):
                _, top, left, h, w = version.rectangle
                at = source.at + places[version.rectangle]
                data = memory[at : at + 2 * h * w].view("<u2").reshape(h, w)
                label = y[top : top + h, left : left + w]
                pair = (orientations(z, [version.orientation])[0] for z in (data, label))
                views = (np.lib.stride_tricks.sliding_window_view(z, (p, p)) for z in pair)
                self.windows.append(tuple(z[:: recipe.stride, :: recipe.stride] for z in views))
        grids = np.array([data.shape[:2] for data, _ in self.windows])
        self.first, self.across = np.cumsum([0, *grids.prod(axis=1)])[:-1], grids[:, 1]

    def __call__(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        """Numbers of pairs → (data, label), each [len(numbers), p, p]."""
        p = self.p
        data, label = (_aligned((len(numbers), p, p), dtype) for dtype in ("<u2", "u1"))
        version = np.searchsorted(self.first, numbers, side="right") - 1
        down, across = np.divmod(numbers - self.first[version], self.across[version])
        order = np.argsort(numbers)  # neighbours in an image one after the other
        places = np.stack([order, version[order], down[order], across[order]], axis=1)
        for k, v, i, j in places.tolist():
            x, y = self.windows[v]
            data[k], label[k] = x[i, j], y[i, j]
        return data, label


_cutter = lru_cache(maxsize=1)(Cutter)


def _fill(
    first: int, numbers: NDArray[np.int64], build: tuple[tuple[Source, ...], Recipe, Path], path: Path, at: Places
) -> None:
    """Cut the pairs of the rows first, first + 1, … and write them (runs in a worker process)."""
    cutter = _cutter(*build)
    with ThreadPoolExecutor(1) as writer:  # the disk works while this thread cuts what comes next
        writing: Future | None = None
        for a in range(0, len(numbers), ROWS):
            pair = cutter(numbers[a : a + ROWS])
            if writing:
                writing.result()
            places = [offset + (first + a) * rows[0].nbytes for offset, rows in zip(at, pair, strict=True)]
            writing = writer.submit(_write, path, pair, places)
        writing.result()


def _aligned(shape: tuple[int, ...], dtype: str) -> NDArray:
    """An array that begins at a multiple of PAGE."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + PAGE, np.uint8)
    begin = -memory.ctypes.data % PAGE
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _write(path: Path, arrays: Sequence[NDArray], places: Sequence[int]) -> None:
    """Write arrays to their places (bytes) in a file.

    Raises:
        OSError: the disk is full, or fails.
    """
    with path.open("r+b") as file:
        for array, at in zip(arrays, places, strict=True):
            content = array.reshape(-1).view(np.uint8)
            done = _write_directly(path, content, at)
            file.seek(at + done)
            file.write(content[done:])


def _write_directly(path: Path, content: NDArray[np.uint8], at: int) -> int:
    """Write whole pages past the page cache, whose own pages cost the processor more than cutting what is in them.

    Returns:
        Bytes written: fewer, or 0, where a system or file system cannot.

    Raises:
        OSError: the disk is full, or fails.
    """
    whole, done = len(content) // PAGE * PAGE if at % PAGE == 0 else 0, 0
    if not whole or not hasattr(os, "O_DIRECT"):
        return 0
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return 0  # if there is another reason, the plain write meets it too
    try:
        while done < whole and (written := os.pwrite(descriptor, content[done:whole], at + done)):
            done += written
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)
    return done


def _start_worker() -> None:
    end_with_parent()
    keep_freed_memory()  # the kernel maps and zeroes what is allocated afresh


def runs(rows: NDArray[np.integer]) -> Iterator[tuple[int, int]]:
    """The stretches a … b - 1 of `rows` that count up by one: what can be read at once."""
    ends = np.flatnonzero(np.diff(rows) != 1) + 1
    return zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True)


def _read(file: BinaryIO, into: NDArray, offset: int) -> None:
    if os.preadv(file.fileno(), [into.reshape(-1).view(np.uint8)], offset) != into.nbytes:
        raise OSError(f"{file.name} ended at byte {offset:,}: it was cut short while in use")


def sources_digest(files: list[Path]) -> str:
    """SHA-256 over the names and contents of the source images, in order."""
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.name} {sha256(path)}\n".encode())
    return total.hexdigest()


def attributes(recipe: Recipe, files: list[Path]) -> dict[str, str | int]:
    """What the file says of itself, and what a reader compares before it trusts a single row."""
    return {
        "format": FORMAT,
        "recipe": json.dumps(asdict(recipe), sort_keys=True),
        "sources": sources_digest(files),
    }


def patch_path(folder: Path, name: str, attrs: dict[str, str | int]) -> Path:
    """Where a patch file lives: recipes and sources that differ have names that differ."""
    digest = hashlib.sha256(json.dumps(attrs, sort_keys=True).encode()).hexdigest()[:10]
    return folder / f"{name}-{digest}.h5"


def prepare_patches(name: str, recipe: Recipe, root: Path, folder: Path, workers: int = 2) -> Path:
    """The patch file of a recipe: fetch the images that are missing, build the file if it is not there.

    Processes that ask at the same time wait for the one that builds. The file is written under a temporary
    name and renamed when it is complete, so what has the final name is whole; what killed builds have left
    is removed.

    Args:
        name: first part of the file's name, for people ("train291").
        recipe: what to build.
        root: data root, where the image sets are.
        folder: where patch files are kept.
        workers: building processes.

    Returns:
        Path of the HDF5 file.

    Raises:
        Refusal: a source is missing, unreadable or changes meanwhile, no image is as large as a patch, the disk
            is full, or the file that is there cannot be trusted.
    """
    files = [file for set_name in recipe.sets for file in image_files(set_name, root)]
    attrs = attributes(recipe, files)
    path = patch_path(folder, name, attrs)
    if path.is_file():  # whole, so it takes no lock, nor a folder that one may write to
        check_patch_file(path, attrs)
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")  # the system frees it when its holder dies, however that happens
        try:
            held = lock.acquire(timeout=1)
        except Timeout:
            log.info("waiting for another process that builds %s", path)
            held = lock.acquire()
        with held:
            if path.is_file():
                check_patch_file(path, attrs)
            else:
                _remove_partials(folder, path)
                log.info("building %s from %d images", path, len(files))
                if others := sorted(other.name for other in folder.glob(f"{name}-*.h5")):
                    log.info("beside it are %s, of other recipes, images or versions", ", ".join(others))
                _build(path, recipe, files, attrs, workers)
    except BrokenProcessPool as error:
        raise Refusal(
            f"a process that cut patches was killed (out of memory?) and {path} is not built: run the same command "
            "again, with a smaller data.num_workers if memory is short"
        ) from error
    except OSError as error:
        raise Refusal(
            f"{path} could not be written: {error}. Free space, or set data.patches to a folder with "
            "room (the 291 images need 5.7 GB, of which 5.0 GB stay)."
        ) from error
    return path


def _remove_partials(folder: Path, path: Path) -> None:
    """Delete what builds that were killed have left: up to 5.7 GB each. Whoever builds holds the lock of its file.

    Args:
        folder: all patch files' folder.
        path: the file whose lock this process holds.
    """
    for partial in folder.glob(f"*-{'[0-9a-f]' * 10}.*.partial"):  # other programs may have theirs here
        name = partial.name.split(".")[:-2]  # name-digest.pid.partial
        lock = FileLock(folder / f"{'.'.join(name)}.h5.lock")
        try:
            if Path(lock.lock_file) != Path(f"{path}.lock"):
                lock.acquire(timeout=0)
        except Timeout:
            continue  # it is being built
        log.info("removing %s, left by a build that was killed", partial)
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)  # what another machine has open stays, and harms nobody
        else:
            partial.unlink(missing_ok=True)  # earlier versions'
        lock.release()


def _build(path: Path, recipe: Recipe, files: list[Path], attrs: dict[str, str | int], workers: int) -> None:
    from rich.progress import track

    sources, total, end = [], 0, 0
    for file in files:
        height, width = image_size(file)
        sources.append(Source(file, height, width, end))
        total += pair_count(height, width, recipe)
        end += kept(height, width, recipe)[1]
    if total == 0:
        raise Refusal(
            f"no image of {', '.join(recipe.sets)} is as large as a patch of {recipe.patch_size} pixels "
            "(data.patch_size)"
        )

    folder = path.with_suffix(f".{os.getpid()}.partial")
    folder.mkdir(exist_ok=True)
    try:
        partial, pixels = folder / path.name, folder / "pixels"
        at = _allocate(partial, total, recipe.patch_size, attrs, beside=end)
        pixels.touch()
        os.truncate(pixels, end)
        numbers = np.empty(total, np.int64)  # of the pair in every row
        numbers[np.random.default_rng(0).permutation(total)] = np.arange(total)  # the same file every time
        build = tuple(sources), recipe, pixels
        context = multiprocessing.get_context("spawn")  # fork is unsafe once torch has started its threads
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
            try:
                jobs = [pool.submit(_degrade_image, source, recipe, pixels) for source in sources]
                for job in track(jobs, description=f"Degrading {len(files)} images"):
                    job.result()
                rows = min(JOB, ROWS * math.ceil(total / (4 * workers * ROWS)))  # some for every worker
                jobs = [
                    pool.submit(_fill, first, numbers[first : first + rows], build, partial, at)
                    for first in range(0, total, rows)
                ]
                with partial.open("rb") as file:
                    for job in track(jobs, description=f"Cutting {total:,} pairs"):
                        job.result()
                        os.fsync(file.fileno())  # what is in a cache, the disk's too, while the others cut
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if sources_digest(files) != attrs["sources"]:
            raise Refusal(f"the images of {path} changed while it was built: run the same command again")
        partial.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _allocate(path: Path, total: int, p: int, attrs: dict[str, str | int], beside: int) -> Places:
    """Create the file with both datasets at their full size.

    Raises:
        OSError: the disk has no room for it and for `beside` bytes more.
    """
    size = total * p * p
    free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    if free < 3 * size + beside:
        raise OSError(f"{(3 * size + beside) / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
    # Where the datasets begin, and every piece of ROWS of theirs, can be written directly.
    with h5py.File(path, "w", libver="latest", alignment_threshold=PAGE, alignment_interval=PAGE) as file:
        for key, value in attrs.items():
            # Texts of fixed length stand in the header, under HDF5's checksum. The heap where others stand has
            # none: a bit flipped there can make HDF5 search it for ever.
            file.attrs[key] = np.bytes_(value) if isinstance(value, str) else value
        offsets = []
        for key, dtype in (("data", h5py.h5t.STD_U16LE), ("label", h5py.h5t.STD_U8LE)):
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_layout(h5py.h5d.CONTIGUOUS)
            layout.set_obj_track_times(False)  # no clock in the file: equal builds are equal bytes
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # every row is written below
            dataset = h5py.h5d.create(file.id, key.encode(), dtype, h5py.h5s.create_simple((total, p, p)), layout)
            offsets.append(dataset.get_offset())
    with path.open("r+b") as file:
        file.truncate(max(file.seek(0, os.SEEK_END), offsets[0] + 2 * size, offsets[1] + size))
    return Places(*offsets)


def check_patch_file(path: Path, attrs: dict[str, str | int]) -> int:
    """Pairs in a patch file, after making sure that it is whole and what `attrs` says.

    Raises:
        Refusal: truncated, damaged, of another format, recipe or source.
    """
    advice = f"Delete {path} to have it built again."
    try:
        with h5py.File(path, "r") as file:
            for key, expected in attrs.items():
                found = file.attrs.get(key)
                found = found.decode() if isinstance(found, bytes) else found  # str where others wrote the file
                if found != expected:
                    raise Refusal(f"{path}: its {key} is {found!r}, this run needs {expected!r}. {advice}")
            data, label = file["data"], file["label"]
            p = json.loads(file.attrs["recipe"])["patch_size"]
            if data.shape != label.shape or data.shape[1:] != (p, p) or len(data) == 0:
                raise Refusal(f"{path}: data {data.shape} and label {label.shape} do not fit. {advice}")
            if (data.dtype, label.dtype) != (np.uint16, np.uint8):
                raise Refusal(f"{path}: data is {data.dtype} and label {label.dtype}. {advice}")
            end = max(d.id.get_offset() + d.id.get_storage_size() for d in (data, label))
            if path.stat().st_size < end:
                raise Refusal(f"{path} is {path.stat().st_size:,} bytes long instead of {end:,}. {advice}")
            return len(data)
    except BlockingIOError as error:  # HDF5's own lock
        raise Refusal(f"{path} is open for writing in another process: try again when that has ended") from error
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise Refusal(f"{path} is damaged or not a patch file ({error}). {advice}") from error


class Patches:
    """Pairs of a patch file by index, a whole batch in one call.

    With online augmentation (`turns` = 8) the indices run over turns × stored pairs: index i is stored
    pair i mod N in orientation i div N, so an epoch sees every orientation once, as offline does. The pairs come
    as they are stored, with their orientations; `datamodule.turned` turns them, on the device.

    The datasets are contiguous, so h5py is asked once where they start and rows are read with preadv: ten
    times as fast as slicing through HDF5, and it needs no handle that would not survive a fork. Every reading
    process opens the file for itself on first use.

    Args:
        path: a file that `prepare_patches` returned or `check_patch_file` passed.
        turns: orientations to read each stored pair in, 1 or 8.
    """

    def __init__(self, path: Path, turns: int = 1) -> None:
        self.path, self.turns = path, turns
        with h5py.File(path, "r") as file:
            self.stored, self.size, _ = file["data"].shape
            self.data_at, self.label_at = (file[key].id.get_offset() for key in ("data", "label"))
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return self.stored * self.turns

    def __getitem__(self, indices: NDArray[np.integer]) -> tuple[NDArray, ...]:
        """A batch (data, label) [len(indices), p, p]; consecutive indices are read together.

        With online augmentation their orientations [len(indices)], int64, are the third.
        """
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        x = np.empty((len(indices), self.size, self.size), np.dtype("<u2"))
        y = np.empty((len(indices), self.size, self.size), np.uint8)
        turn, row = np.divmod(np.asarray(indices, dtype=np.int64), self.stored)
        for a, b in runs(row + turn * (self.stored + 1)):
            _read(self._file, x[a:b], self.data_at + int(row[a]) * x[0].nbytes)
            _read(self._file, y[a:b], self.label_at + int(row[a]) * y[0].nbytes)
        return (x, y) if self.turns == 1 else (x, y, turn)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}


class ShuffledBatches:
    """The index batches of a whole run: every epoch shuffled afresh, the same again for the same seed.

    Runs of 16 neighbouring rows are shuffled, and the rows of the file are in random order already, so a
    batch of 128 holds eight runs from eight random places. A row-by-row shuffle would read each row by
    itself, which a disk does many times more slowly. An epoch's last incomplete batch is left out; which
    pairs that is differs from epoch to epoch.

    The order depends on nothing but the arguments, so a run goes on exactly where it was: batch `start` of a
    resumed run is the batch that the interrupted one would have read next.

    Args:
        length: pairs in all.
        batch_size: pairs of an optimiser step, over all processes and micro-batches.
        seed: the run's seed.
        steps: optimiser steps of the whole run; None for one epoch.
        start: optimiser steps already taken.
        micro: micro-batches in a step (gradient accumulation).
        rank, world: this process's share of every micro-batch.

    Raises:
        Refusal: the batch is larger than the data or cannot be shared evenly.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        steps: int | None = None,
        start: int = 0,
        micro: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size > length:
            raise Refusal(f"data.batch_size = {batch_size} is more than the {length} pairs there are")
        if batch_size % (micro * world):
            raise Refusal(
                f"data.batch_size = {batch_size} is the whole batch of a step: it must be a multiple of "
                f"{micro} micro-batches × {world} processes"
            )
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.steps = self.steps_per_epoch if steps is None else steps
        self.micro, self.rank, self.world = micro, rank, world

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data."""
        return self.length // self.batch_size

    def __len__(self) -> int:
        """Micro-batches of the whole run, those before `start` included."""
        return self.steps * self.micro

    def epoch_order(self, epoch: int) -> NDArray[np.int32]:
        """Every index once [length]."""
        runs = np.random.default_rng([self.seed, epoch]).permutation(-(-self.length // RUN))
        order = (runs.astype(np.int32)[:, None] * RUN + np.arange(RUN, dtype=np.int32)).ravel()
        return order[order < self.length]

    def __iter__(self) -> Iterator[NDArray[np.int32]]:
        epoch, share = -1, self.batch_size // (self.micro * self.world)
        for step in range(self.start, self.steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.epoch_order(epoch)
            first = (step % self.steps_per_epoch) * self.batch_size
            batch = order[first : first + self.batch_size].reshape(self.micro, self.world, share)
            yield from batch[:, self.rank]
