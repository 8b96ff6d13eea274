"""Building a patch file: degrade every image, then cut the pairs in the order in which they are stored."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from drrn.degradations import DEGRADATIONS, READY
from drrn.errors import UserError, counted
from drrn.images import image_size, luminance, orientations, read_pixels
from drrn.patches import HIGH, LOW, STEP, Recipe, attributes, check_patch_file
from drrn.protocol import prepare
from drrn.sets import image_files, ready_low
from drrn.stored import Attributes, built_once, check_room
from drrn.workers import end_with_parent

ROWS = 8192  # rows that a worker process cuts and writes at a time: 24 MB


class Version(NamedTuple):
    """An image in one orientation at one scale, from which pairs are cut; coordinates are the original image's.

    The rotated image is cropped to a multiple of the scale at its bottom and right. In the original image that is a
    rectangle in the corner that the rotation moves to the top left. So the eight orientations need up to four
    rectangles.
    """

    orientation: int
    scale: int
    top: int
    left: int
    height: int
    width: int
    down: int  # rows of windows in the rotated rectangle
    across: int  # columns of windows

    @property
    def rectangle(self) -> tuple[int, int, int, int, int]:
        """The region to degrade: (scale, top, left, height, width)."""
        return self[1:6]


def windows(length: int, recipe: Recipe) -> int:
    """The number of complete windows along a side of `length` pixels."""
    return max(0, (length - recipe.patch_size) // recipe.stride + 1)


def versions(height: int, width: int, recipe: Recipe) -> list[Version]:
    """The versions of an image [height, width] that have pairs, in the order of the pairs' numbers."""
    found = []
    for o, corners in enumerate(orientations(np.array([[0, 1], [2, 3]]), range(recipe.orientations))):
        bottom, right = divmod(int(corners[0, 0]), 2)  # the corner that moves to the top left
        for scale in recipe.scales:
            h, w = height - height % scale, width - width % scale
            down, across = (windows(side, recipe) for side in ((w, h) if o % 2 else (h, w)))
            found.append(Version(o, scale, bottom * (height - h), right * (width - w), h, w, down, across))
    return [version for version in found if version.down * version.across]


def pair_count(height: int, width: int, recipe: Recipe) -> int:
    """The number of pairs of one image [height, width] over all scales and stored orientations."""
    return sum(version.down * version.across for version in versions(height, width, recipe))


def rectangles(height: int, width: int, recipe: Recipe) -> list[tuple[int, int, int, int, int]]:
    """The distinct regions of an image [height, width] to degrade (`Version.rectangle`)."""
    return list(dict.fromkeys(version.rectangle for version in versions(height, width, recipe)))


class Source(NamedTuple):
    """An image, and the offset of its data in the build's temporary file: degraded rectangles, then Y."""

    path: Path
    height: int
    width: int
    at: int  # bytes, even


def pixel_bytes(height: int, width: int, recipe: Recipe) -> int:
    """Bytes of an image's data in the temporary file: 16 bits a pixel of rectangles, 8 of Y; rounded up to even."""
    size = sum(2 * h * w for *_, h, w in rectangles(height, width, recipe)) + height * width
    return size + size % 2


def quantise(x: NDArray[np.float64]) -> NDArray[np.uint16]:
    """x in LOW…HIGH → 16 bits, nearest (error at most STEP / 2 = 1.91e-5).

    Flat areas of every fifth grey level are half-way between two 16-bit levels. They are rounded up, whatever the
    last bits of x are, so that degrading and rotating an image in either order gives the same.
    """
    levels = x - LOW
    levels /= STEP
    if not (levels.min() >= -1e-6 and levels.max() <= 65535 + 1e-6):  # NaN too
        raise ValueError(f"bicubic values {x.min():.3f}…{x.max():.3f} are outside {LOW}…{HIGH}")
    levels += 0.5 + 1e-6
    return levels.astype(np.uint16)  # towards zero


def _degrade_image(source: Source, recipe: Recipe, pixels: Path) -> None:
    """Degrade one image and write it to the temporary file (runs in a worker process)."""
    image = read_pixels(source.path)
    y = np.ascontiguousarray(luminance(image))
    if y.shape != (source.height, source.width):
        raise UserError(f"{source.path} changed while its patches were cut: run the same command again")
    given = image if DEGRADATIONS[recipe.degradation].of_rgb or recipe.degradation == READY else y
    with pixels.open("r+b") as file:
        file.seek(source.at)
        for scale, top, left, h, w in rectangles(*y.shape, recipe):
            if recipe.degradation == READY and y.shape != (h, w):
                raise UserError(f"{source.path}: the sides of ready pairs must be multiples of data.scales")
            part = given[top : top + h, left : left + w]
            x, _ = prepare(part, scale, degradation=recipe.degradation, file=source.path)
            file.write(quantise(x))
        file.write(y)


class Cutter:
    """Cut pairs of a build by their numbers (each worker process has its own Cutter).

    Pairs are numbered by image, orientation, scale, and windows row by row. The data of all images is in one file:
    a mapped file stays open, and on many machines a process may open no more than 1024.
    """

    def __init__(self, sources: tuple[Source, ...], recipe: Recipe, pixels: Path) -> None:
        p = recipe.patch_size
        memory = np.memmap(pixels, np.uint8, "r").view(np.ndarray)  # a memmap's own slices are slow
        self.windows: list[tuple[NDArray[np.uint16], NDArray[np.uint8]]] = []  # [down, across, p, p] of a version
        for _, height, width, at in sources:
            degraded = {}
            for rectangle in rectangles(height, width, recipe):
                *_, h, w = rectangle
                degraded[rectangle] = memory[at : at + 2 * h * w].view("<u2").reshape(h, w)
                at += 2 * h * w
            y = memory[at : at + height * width].reshape(height, width)
            for version in versions(height, width, recipe):
                _, top, left, h, w = version.rectangle
                label = y[top : top + h, left : left + w]
                pair = (orientations(z, [version.orientation])[0] for z in (degraded[version.rectangle], label))
                views = (np.lib.stride_tricks.sliding_window_view(z, (p, p)) for z in pair)
                self.windows.append(tuple(z[:: recipe.stride, :: recipe.stride] for z in views))
        grids = np.array([data.shape[:2] for data, _ in self.windows])
        self.first, self.across = np.cumsum([0, *grids.prod(axis=1)])[:-1], grids[:, 1]

    def __call__(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        """Numbers of pairs → the pairs (data, label), each [len(numbers), p, p]."""
        data, label = (np.empty((len(numbers), *z.shape[2:]), z.dtype) for z in self.windows[0])
        version = np.searchsorted(self.first, numbers, side="right") - 1
        down, across = np.divmod(numbers - self.first[version], self.across[version])
        order = np.argsort(numbers)  # neighbours in an image are read one after the other
        places = np.stack([order, version[order], down[order], across[order]], axis=1)
        for k, v, i, j in places.tolist():
            x, y = self.windows[v]
            data[k], label[k] = x[i, j], y[i, j]
        return data, label


_cutter = lru_cache(maxsize=1)(Cutter)


def _fill(
    first: int, numbers: NDArray[np.int64], build: tuple[tuple[Source, ...], Recipe, Path], path: Path, at: list[int]
) -> None:
    """Cut pairs and write them to the rows first, first + 1, … (runs in a worker process).

    `numbers` are those of the pairs, `build` the arguments of `Cutter`, `at` the byte offsets of the two datasets.
    """
    with path.open("r+b") as file:
        for rows, begin in zip(_cutter(*build)(numbers), at, strict=True):
            file.seek(begin + first * rows[0].nbytes)
            file.write(rows)


def prepare_patches(name: str, recipe: Recipe, root: Path, folder: Path, workers: int = 2) -> Path:
    """Download missing images, and build the patch file of a recipe if it does not exist; return its path.

    Args:
        name: first part of the file's name ("train291").
        recipe: of the file.
        root, folder: of the image sets, and of the patch files.
        workers: worker processes.

    Raises:
        UserError: a source is missing, unreadable or changes meanwhile, no image is as large as a patch, the disk
            is full, or an existing file is damaged.
    """
    files = [file for set_name in recipe.sets for file in image_files(set_name, root)]
    read = files
    if recipe.degradation == READY:
        read = [*files, *(ready_low(file, scale) for file in files for scale in recipe.scales)]
    attrs = attributes(recipe, read)
    path = built_once(folder, name, read, attrs, lambda partial: _build(partial, recipe, files, attrs, workers))
    check_patch_file(path, attrs)
    return path


def _build(partial: Path, recipe: Recipe, files: list[Path], attrs: Attributes, workers: int) -> None:
    """Write a patch file, with a temporary file of the degraded images beside it."""
    from rich.progress import track

    shapes = [image_size(file) for file in files]
    *starts, end = accumulate((pixel_bytes(*shape, recipe) for shape in shapes), initial=0)
    sources = tuple(Source(file, *shape, at) for file, shape, at in zip(files, shapes, starts, strict=True))
    total = sum(pair_count(*shape, recipe) for shape in shapes)
    if total == 0:
        raise UserError(
            f"no image of {', '.join(recipe.sets)} is as large as a patch of {recipe.patch_size} pixels "
            "(data.patch_size)"
        )
    at = _allocate(partial, total, recipe.patch_size, attrs, beside=end)
    pixels = partial.with_name("pixels")
    pixels.touch()
    os.truncate(pixels, end)
    numbers = np.empty(total, np.int64)  # row → number of its pair
    numbers[np.random.default_rng(0).permutation(total)] = np.arange(total)  # the same file every time
    context = multiprocessing.get_context("spawn")  # fork is unsafe once torch has started its threads
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        try:
            jobs = [pool.submit(_degrade_image, source, recipe, pixels) for source in sources]
            for job in track(jobs, description=f"Degrading {counted(len(files), 'image')}"):
                job.result()
            jobs = [
                pool.submit(_fill, first, numbers[first : first + ROWS], (sources, recipe, pixels), partial, at)
                for first in range(0, total, ROWS)
            ]
            with partial.open("rb") as file:
                for job in track(jobs, description=f"Cutting {total:,} pairs"):
                    job.result()
                    os.fsync(file.fileno())  # while the workers cut; a full disk is reported here
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _allocate(path: Path, total: int, p: int, attrs: Attributes, beside: int) -> list[int]:
    """Create the file with both datasets at their full size; return their offsets in bytes.

    Raises:
        OSError: the disk has too little room for the file and `beside` bytes more.
    """
    size = total * p * p
    check_room(path.parent, 3 * size + beside)
    with h5py.File(path, "w", libver="latest") as file:
        for key, value in attrs.items():
            # Strings of fixed length are stored in the header, under HDF5's checksum. The heap for others has none:
            # a flipped bit there can make HDF5 search it for ever.
            file.attrs[key] = np.bytes_(value) if isinstance(value, str) else value
        early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        offsets = [
            file.create_dataset(key, (total, p, p), dtype, dcpl=early.copy(), fill_time="never").id.get_offset()
            for key, dtype in (("data", "<u2"), ("label", "u1"))
        ]
    os.truncate(path, max(path.stat().st_size, offsets[0] + 2 * size, offsets[1] + size))
    return offsets
