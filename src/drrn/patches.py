"""The training patches of Sec. 4.1–4.2: cut, stored in HDF5, read back shuffled.

Each training image is turned into its eight orientations *before* it is degraded; each version is cropped to
a multiple of the scale, degraded (`protocol.degrade`) and cut into 31×31 pairs at stride 21 from the top-left,
incomplete windows dropped. The 291 images give 1,722,720 pairs.

File format 1: two contiguous datasets whose rows belong together, in an order shuffled once at the build.

    data   [N, 31, 31] uint16   the network's input x; x = STEP · q + LOW, so within 1.91e-5
    label  [N, 31, 31] uint8    the ground truth Y, exact

Bicubic down and up can overshoot 0…1 by at most 0.72 (the square of the kernel's absolute sum, 1.25, in two
dimensions, twice), hence LOW and STEP. Attributes hold the recipe as JSON, the digest of the source images
and the format. A file's name holds the digest of both: another recipe or other sources are another file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from drrn import Refusal
from drrn.config import DataConfig
from drrn.images import image_files, image_size, orientations, read_luminance, sha256
from drrn.protocol import degrade, modcrop
from drrn.records import end_with_parent

log = logging.getLogger(__name__)

FORMAT = 1
LOW, HIGH = -0.75, 1.75
STEP = (HIGH - LOW) / 65535
RUN = 16  # rows read together: long enough to be one read, short enough that a batch mixes many places


@dataclass(frozen=True)
class Recipe:
    """What a patch file is made of; two files with equal recipes and sources are interchangeable."""

    sets: tuple[str, ...]
    scales: tuple[int, ...] = (2, 3, 4)
    patch_size: int = 31
    stride: int = 21
    augment: str = "offline"  # "offline": eight orientations stored; "online": one, turned when read

    @classmethod
    def of(cls, data: DataConfig) -> Recipe:
        """The recipe that a run's `data.*` asks for."""
        return cls(tuple(data.train), tuple(data.scales), data.patch_size, data.stride, data.augment)

    @property
    def orientations(self) -> int:
        """Orientations stored."""
        return 8 if self.augment == "offline" else 1


@dataclass(frozen=True)
class Task:
    """One image file and the place of its pairs in the build's sequence."""

    path: Path
    first: int  # index of its first pair before shuffling
    count: int


def windows(length: int, recipe: Recipe) -> int:
    """Complete windows along a side of `length` pixels."""
    return max(0, (length - recipe.patch_size) // recipe.stride + 1)


def pair_count(height: int, width: int, recipe: Recipe) -> int:
    """Pairs that one image [height, width] gives over all scales and stored orientations."""
    count = 0
    for turn in range(recipe.orientations):
        h, w = (width, height) if turn % 2 else (height, width)
        count += sum(windows(h - h % s, recipe) * windows(w - w % s, recipe) for s in recipe.scales)
    return count


def cut(image: NDArray, recipe: Recipe) -> NDArray:
    """Windows of an image [H, W] → [n, p, p], top-left first, row by row (a copy)."""
    p, stride = recipe.patch_size, recipe.stride
    view = np.lib.stride_tricks.sliding_window_view(image, (p, p))[::stride, ::stride]
    return view.reshape(-1, p, p)


def quantise(x: NDArray[np.float64]) -> NDArray[np.uint16]:
    """x in LOW…HIGH → 16 bits, nearest (error at most STEP / 2 = 1.91e-5)."""
    if not (x.min() >= LOW and x.max() <= HIGH):  # NaN too
        raise ValueError(f"bicubic values {x.min():.3f}…{x.max():.3f} are outside {LOW}…{HIGH}")
    return np.rint((x - LOW) / STEP).astype(np.uint16)


def image_pairs(y: NDArray[np.uint8], recipe: Recipe) -> Iterator[tuple[NDArray, NDArray]]:
    """(data, label) [n, p, p] of one image, a pair of arrays for each stored orientation and scale."""
    for turned in orientations(y, range(recipe.orientations)):
        for scale in recipe.scales:
            if min(turned.shape) < scale:
                continue
            label = modcrop(turned, scale)
            if min(label.shape) < recipe.patch_size:
                continue
            data = quantise(degrade(label / 255.0, scale))
            yield cut(data, recipe), cut(label, recipe)


def _write_pairs(
    task: Task, recipe: Recipe, rows: NDArray[np.int64], path: Path, data_at: int, label_at: int
) -> int:
    """Cut one image and write each pair to its shuffled row (runs in a worker process).

    Rows are written with pwrite at the datasets' offsets, so several processes fill one file without a lock
    and the shuffled file is made in one pass with no patch held for longer than its image.
    """
    size = recipe.patch_size**2
    done = 0
    file = os.open(path, os.O_WRONLY)
    try:
        for data, label in image_pairs(read_luminance(task.path), recipe):
            data_bytes, label_bytes = memoryview(data.reshape(-1)), memoryview(label.reshape(-1))
            for k, row in enumerate(rows[done : done + len(data)].tolist()):
                _pwrite(file, data_bytes[k * size : (k + 1) * size], data_at + row * size * 2)
                _pwrite(file, label_bytes[k * size : (k + 1) * size], label_at + row * size)
            done += len(data)
    finally:
        os.close(file)
    if done != task.count:
        raise Refusal(f"{task.path} changed while its patches were cut: run the same command again")
    return done


def _pwrite(file: int, buffer: memoryview, offset: int) -> None:
    if os.pwrite(file, buffer, offset) != buffer.nbytes:
        raise OSError("short write: is the disk full?")


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
                _build(path, recipe, files, attrs, workers)
    except BrokenProcessPool as error:
        raise Refusal(
            f"a process that cut patches was killed (out of memory?) and {path} is not built: run the same command "
            "again, with a smaller data.num_workers if memory is short"
        ) from error
    except OSError as error:
        raise Refusal(
            f"{path} could not be written: {error}. Free space, or set data.patches to a folder with "
            "room (the full 291-image file needs 5.0 GB)."
        ) from error
    return path


def _remove_partials(folder: Path, path: Path) -> None:
    """Delete what builds that were killed have left: up to 5 GB each. Whoever builds holds the lock of its file.

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
        partial.unlink(missing_ok=True)
        lock.release()


def _build(path: Path, recipe: Recipe, files: list[Path], attrs: dict[str, str | int], workers: int) -> None:
    from rich.progress import track

    tasks, total = [], 0
    for file in files:
        count = pair_count(*image_size(file), recipe)
        tasks.append(Task(file, total, count))
        total += count
    if total == 0:
        raise Refusal(
            f"no image of {', '.join(recipe.sets)} is as large as a patch of {recipe.patch_size} pixels "
            "(data.patch_size)"
        )

    p = recipe.patch_size
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        data_at, label_at = _allocate(partial, total, p, attrs)
        rows = np.random.default_rng(0).permutation(total)  # part of format 1: the same file every time
        context = multiprocessing.get_context("spawn")  # fork is unsafe once torch has started its threads
        with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
            jobs = [
                pool.submit(_write_pairs, t, recipe, rows[t.first : t.first + t.count], partial, data_at, label_at)
                for t in tasks
            ]
            try:
                for job in track(jobs, description=f"Cutting {total:,} pairs from {len(files)} images"):
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if sources_digest(files) != attrs["sources"]:
            raise Refusal(f"the images of {path} changed while it was built: run the same command again")
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _allocate(path: Path, total: int, p: int, attrs: dict[str, str | int]) -> tuple[int, int]:
    """Create the file with both datasets at their full size; return their offsets in bytes."""
    size = total * p * p
    free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    if free < 3 * size:
        raise OSError(f"{3 * size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
    with h5py.File(path, "w", libver="latest") as file:
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
    return offsets[0], offsets[1]


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
                found = found.decode() if isinstance(found, bytes) else found  # str in files of earlier versions
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
    pair i mod N in orientation i div N, so an epoch sees every orientation once, as offline does.

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

    def __getitem__(self, indices: NDArray[np.integer]) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        """A batch (data, label) [len(indices), p, p]; consecutive indices are read together."""
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        x = np.empty((len(indices), self.size, self.size), np.dtype("<u2"))
        y = np.empty((len(indices), self.size, self.size), np.uint8)
        turn, row = np.divmod(np.asarray(indices, dtype=np.int64), self.stored)
        starts = np.flatnonzero(np.r_[True, (np.diff(row) != 1) | (np.diff(turn) != 0)])
        for a, b in zip(starts.tolist(), [*starts[1:].tolist(), len(row)], strict=True):
            self._read(x[a:b], self.data_at + int(row[a]) * x[0].nbytes)
            self._read(y[a:b], self.label_at + int(row[a]) * y[0].nbytes)
            if turn[a]:
                x[a:b], y[a:b] = self._turned(x[a:b], int(turn[a])), self._turned(y[a:b], int(turn[a]))
        return x, y

    def _read(self, into: NDArray, offset: int) -> None:
        if os.preadv(self._file.fileno(), [into.reshape(-1).view(np.uint8)], offset) != into.nbytes:
            raise OSError(f"{self.path} ended at byte {offset:,}: it was cut short while in use")

    @staticmethod
    def _turned(patches: NDArray, o: int) -> NDArray:
        """Orientation o (`images.orientations`) of [n, p, p], a copy."""
        patches = np.rot90(patches, o % 4, axes=(1, 2))
        return (patches[..., ::-1] if o >= 4 else patches).copy()

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
