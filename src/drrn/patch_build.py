"""Building a patch file: degrade every image, then cut the pairs in the order in which they are stored."""

from __future__ import annotations

import errno
import logging
import math
import multiprocessing
import os
import shutil
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from drrn.errors import UserError
from drrn.images import image_size, orientations, read_luminance
from drrn.patches import HIGH, LOW, STEP, Recipe, attributes, check_patch_file, patch_path, sources_digest
from drrn.protocol import degrade
from drrn.sets import image_files
from drrn.workers import end_with_parent

log = logging.getLogger(__name__)
ROWS = 8192  # that a building process cuts before it writes them: 24 MB, which the cache holds
JOB = 8 * ROWS  # that it is told to do at a time, at most
PAGE = 4096  # bytes; what is written past the page cache begins and ends at a multiple


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
        raise UserError(f"{source.path} changed while its patches were cut: run the same command again")
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
        p = recipe.patch_size
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

    def __call__(self, numbers: NDArray[np.int64], data: NDArray[np.uint16], label: NDArray[np.uint8]) -> None:
        """Numbers of pairs → the pairs, into data and label, each [len(numbers), p, p]."""
        version = np.searchsorted(self.first, numbers, side="right") - 1
        down, across = np.divmod(numbers - self.first[version], self.across[version])
        order = np.argsort(numbers)  # neighbours in an image one after the other
        places = np.stack([order, version[order], down[order], across[order]], axis=1)
        for k, v, i, j in places.tolist():
            x, y = self.windows[v]
            data[k], label[k] = x[i, j], y[i, j]


_cutter = lru_cache(maxsize=1)(Cutter)


def _fill(
    first: int, numbers: NDArray[np.int64], build: tuple[tuple[Source, ...], Recipe, Path], path: Path, at: list[int]
) -> None:
    """Cut the pairs of the rows first, first + 1, … and write them (runs in a worker process).

    Args:
        first: row.
        numbers: of the pairs in these rows.
        build: what `Cutter` takes.
        path: of the file.
        at: where its two datasets begin, in bytes.
    """
    cutter, p = _cutter(*build), build[1].patch_size
    # Two pieces in turn: the disk works on one while this thread cuts the other.
    pieces = [[_aligned((ROWS, p, p), dtype) for dtype in ("<u2", "u1")] for _ in range(2)]
    with ThreadPoolExecutor(1) as writer:
        writing: Future | None = None
        for k, a in enumerate(range(0, len(numbers), ROWS)):
            part = numbers[a : a + ROWS]
            pair = [rows[: len(part)] for rows in pieces[k % 2]]
            cutter(part, *pair)
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


def _write(path: Path, arrays: list[NDArray], places: list[int]) -> None:
    """Write arrays to their places (bytes) in a file, whole pages past the page cache where the system can.

    Through the page cache a build of the 291 images takes 1.4 times as long and 1.8 times the processor: 62 and 43 s
    (median of two in turns on two busy cores), 25 and 14 s of processor time. The kernel copies and clears 5 GB.

    Raises:
        OSError: the disk is full, or fails.
    """
    plain = os.open(path, os.O_WRONLY)
    try:
        direct = os.open(path, os.O_WRONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # this file system cannot; if there is another reason, the plain write meets it too
        direct = None
    try:
        for array, at in zip(arrays, places, strict=True):
            content, done = array.reshape(-1).view(np.uint8), 0
            whole = 0 if direct is None or at % PAGE else len(content) // PAGE * PAGE
            while done < len(content):
                try:
                    if done < whole:
                        done += os.pwrite(direct, content[done:whole], at + done)
                    else:
                        done += os.pwrite(plain, content[done:], at + done)
                except OSError as error:
                    if done >= whole or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                        raise
                    whole = 0  # the rest as usual
    finally:
        for descriptor in (plain, direct):
            if descriptor is not None:
                os.close(descriptor)


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
        UserError: a source is missing, unreadable or changes meanwhile, no image is as large as a patch, the disk
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
        raise UserError(
            f"a process that cut patches was killed (out of memory?) and {path} is not built: run the same command "
            "again, with a smaller data.num_workers if memory is short"
        ) from error
    except OSError as error:
        raise UserError(
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
        raise UserError(
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
        with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
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
            raise UserError(f"the images of {path} changed while it was built: run the same command again")
        partial.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _allocate(path: Path, total: int, p: int, attrs: dict[str, str | int], beside: int) -> list[int]:
    """Create the file with both datasets at their full size.

    Returns:
        Where the two begin, in bytes.

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
    return offsets
