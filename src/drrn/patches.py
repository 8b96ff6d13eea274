"""The training patches of Sec. 4.1–4.2: cut, stored in HDF5, read back shuffled.

Each training image is turned into its eight orientations *before* it is degraded; each version is cropped to
a multiple of the scale, degraded (`protocol.prepare`) and cut into 31×31 pairs at stride 21 from the top-left,
incomplete windows dropped. The 291 images give 1,722,720 pairs.

A build first degrades every image and stores the pixels (0.7 GB, a seventh of the patches, which overlap), then
cuts the pairs in the order of their rows in the file, which is so written once and sequentially.

File format 2: two contiguous datasets with corresponding rows, in an order shuffled once at the build.

    data   [N, 31, 31] uint16   the network's input x; x = STEP · q + LOW, exact to 1.91e-5
    label  [N, 31, 31] uint8    the ground truth Y, exact

Bicubic down and up can overshoot 0…1 by at most 0.72 (the square of the kernel's absolute sum, 1.25, in two
dimensions, twice), hence LOW and STEP. Attributes are the recipe as JSON, the digest of the source images
and the format. A file's name has a digest of them, so that other recipes or sources have other files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from drrn.config import DataConfig
from drrn.degradations import BI
from drrn.errors import UserError
from drrn.stored import Attributes, StoredFile, sources_digest, trusted

FORMAT = 2
LOW, HIGH = -0.75, 1.75
STEP = (HIGH - LOW) / 65535
RUN = 16  # rows read together: long enough to be read fast, short enough that a batch has pairs from many places


@dataclass(frozen=True)
class Recipe:
    """Parameters of a patch file; two files with equal recipes and sources are interchangeable."""

    sets: tuple[str, ...]
    scales: tuple[int, ...] = (2, 3, 4)
    patch_size: int = 31
    stride: int = 21
    augment: str = "offline"  # "offline": eight orientations stored; "online": one, rotated on the device
    degradation: str = BI

    @classmethod
    def of(cls, data: DataConfig) -> Recipe:
        """The recipe of a run's `data.*`."""
        whole = {its.name: getattr(data, its.name) for its in fields(cls) if its.name not in ("sets", "scales")}
        return cls(sets=tuple(data.train), scales=tuple(data.scales), **whole)

    def text(self) -> str:
        """JSON, for the file; without the paper's degradation, so that earlier files keep their names."""
        kept = {key: value for key, value in asdict(self).items() if (key, value) != ("degradation", BI)}
        return json.dumps(kept, sort_keys=True)

    @property
    def orientations(self) -> int:
        """Orientations stored."""
        return 8 if self.augment == "offline" else 1


def runs(rows: NDArray[np.integer]) -> Iterator[tuple[int, int]]:
    """The ranges a … b - 1 of consecutive row numbers in `rows`, each of which can be read at once."""
    ends = np.flatnonzero(np.diff(rows) != 1) + 1
    return zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True)


def _read(file: BinaryIO, into: NDArray, offset: int) -> None:
    if os.preadv(file.fileno(), [into.reshape(-1).view(np.uint8)], offset) != into.nbytes:
        raise OSError(f"{file.name} ended at byte {offset:,}: it was truncated while in use")


def attributes(recipe: Recipe, files: list[Path]) -> Attributes:
    """The attributes of a patch file, which readers compare before they use it."""
    return {"format": FORMAT, "recipe": recipe.text(), "sources": sources_digest(files)}


def check_patch_file(path: Path, attrs: dict[str, str | int]) -> int:
    """The number of pairs in a patch file, after checks of its attributes and size; errors: those of `trusted`."""
    with trusted(path, attrs) as file:
        data, label = file["data"], file["label"]
        p = json.loads(file.attrs["recipe"])["patch_size"]
        if data.shape != label.shape or data.shape[1:] != (p, p) or len(data) == 0:
            raise ValueError(f"data {data.shape} and label {label.shape} do not fit")
        if (data.dtype, label.dtype) != (np.uint16, np.uint8):
            raise ValueError(f"data is {data.dtype} and label {label.dtype}")
        end = max(d.id.get_offset() + d.id.get_storage_size() for d in (data, label))
        if path.stat().st_size < end:
            raise ValueError(f"{path.stat().st_size:,} bytes long instead of {end:,}")
        return len(data)


class Patches(StoredFile):
    """Pairs of a patch file by index, a whole batch in one call.

    With online augmentation (`turns` = 8) the indices run over turns × stored pairs: index i is stored pair i mod N
    in orientation i div N, so an epoch has every orientation once, as with offline augmentation. Pairs are returned
    as stored, with their orientations; `pairs.turned` rotates them, on the device.

    The datasets are contiguous, so h5py is used once for their offsets, and rows are read with preadv: ten times as
    fast as slicing through HDF5, and without a handle that a fork would invalidate.

    Args:
        path: a file that `prepare_patches` returned or `check_patch_file` accepted.
        turns: orientations of each stored pair, 1 or 8.
    """

    def __init__(self, path: Path, turns: int = 1) -> None:
        super().__init__(path)
        self.turns = turns
        with h5py.File(path, "r") as file:
            self.stored, self.size, _ = file["data"].shape
            self.data_at, self.label_at = (file[key].id.get_offset() for key in ("data", "label"))

    def __len__(self) -> int:
        return self.stored * self.turns

    def __getitem__(self, indices: NDArray[np.integer]) -> tuple[NDArray, ...]:
        """A batch (data, label) [len(indices), p, p]; consecutive indices are read together.

        With online augmentation the third item is their orientations [len(indices)], int64.
        """
        if self.file is None:
            self.file = self.path.open("rb", buffering=0)
        x = np.empty((len(indices), self.size, self.size), np.dtype("<u2"))
        y = np.empty((len(indices), self.size, self.size), np.uint8)
        turn, row = np.divmod(np.asarray(indices, dtype=np.int64), self.stored)
        for a, b in runs(row + turn * (self.stored + 1)):
            _read(self.file, x[a:b], self.data_at + int(row[a]) * x[0].nbytes)
            _read(self.file, y[a:b], self.label_at + int(row[a]) * y[0].nbytes)
        return (x, y) if self.turns == 1 else (x, y, turn)


def whole_batches(pairs: int, batch_size: int) -> int:
    """Optimiser steps of an epoch; a UserError if a batch is larger than the data."""
    if batch_size > pairs:
        raise UserError(f"data.batch_size = {batch_size} is more than the {pairs} pairs there are")
    return pairs // batch_size


@dataclass(eq=False)
class ShuffledBatches:
    """The index batches of a whole run, shuffled anew for every epoch, reproducibly from the seed.

    Runs of 16 neighbouring rows are shuffled; as the rows of the file are in random order, a batch of 128 has eight
    runs from eight random places. Shuffling single rows would mean reading each row separately, which is many times
    slower on a disk. An epoch's last incomplete batch is left out; its pairs differ from epoch to epoch.

    The order depends only on the arguments, so a run resumes exactly: batch `start` of a resumed run is the batch
    that the interrupted one would have read next.

    Args:
        length: number of pairs; fewer than a batch are a UserError.
        batch_size: pairs of an optimiser step, over all processes and micro-batches.
        seed: the run's.
        steps, start: optimiser steps of the whole run (None: of one epoch), and those already done.
        micro: micro-batches in a step (gradient accumulation).
        rank, world: this process's share of every micro-batch.
    """

    length: int
    batch_size: int
    seed: int
    steps: int | None = None
    start: int = 0
    micro: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        self.steps_per_epoch = whole_batches(self.length, self.batch_size)
        self.steps = self.steps_per_epoch if self.steps is None else self.steps

    def __len__(self) -> int:
        """Micro-batches of the whole run, including those before `start`."""
        return self.steps * self.micro

    def epoch_order(self, epoch: int) -> NDArray[np.int32]:
        """A permutation of the indices [length]."""
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
