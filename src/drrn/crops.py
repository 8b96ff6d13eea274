"""Random crops of large images, drawn at each step: `data.crops`, for DIV2K.

DIV2K's 800 photographs have 120 million patches at stride 21, 350 GB; only the decoded images are stored: 2.2 GB.
A crop is aligned with the pixels of the low resolution, and degraded with a margin of all pixels that it depends on.
So it is a window of the degraded image; only its noise (DN) differs with the place, and is the same whenever that
place is drawn. The crops of a step and their orientations depend only on the seed and the step, not on the number of
workers or processes, nor on where a run was stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from drrn.config import DataConfig
from drrn.degradations import DEGRADATIONS
from drrn.errors import UserError, counted
from drrn.images import image_size, luminance, read_pixels
from drrn.patch_build import quantise
from drrn.patches import ShuffledBatches
from drrn.protocol import prepare
from drrn.sets import image_files
from drrn.stored import Attributes, StoredFile, built_once, check_room, sources_digest, trusted

AROUND = 5  # margin of a crop on each side when it is degraded, low-resolution pixels


def prepare_images(data: DataConfig) -> Path:
    """Download missing images of `data.train`, and build the file of the decoded images if it does not exist.

    Errors: those of `patch_build.prepare_patches`.
    """
    files = [file for set_name in data.train for file in image_files(set_name, Path(data.root))]
    of_rgb = DEGRADATIONS[data.degradation].of_rgb
    recipe = json.dumps({"images": "RGB" if of_rgb else "Y", "sets": data.train}, sort_keys=True)
    attrs: Attributes = {"format": "crops 1", "recipe": recipe, "sources": sources_digest(files)}

    def read(file: Path) -> NDArray[np.uint8]:
        return read_pixels(file) if of_rgb else luminance(read_pixels(file))

    def build(partial: Path) -> None:
        check_room(partial.parent, sum(math.prod(image_size(file)) for file in files) * (3 if of_rgb else 1))
        with h5py.File(partial, "w", libver="latest") as file, ThreadPoolExecutor(max(1, data.num_workers)) as pool:
            file.attrs.update({key: np.bytes_(value) for key, value in attrs.items()})
            what = f"Decoding {counted(len(files), 'image')}"
            images = track(pool.map(read, files), description=what, total=len(files))
            for number, pixels in enumerate(images):
                file[str(number)] = pixels

    path = built_once(Path(data.patches), data.name, files, attrs, build)
    with trusted(path, attrs) as file:
        if len(file) != len(files):
            raise ValueError(f"{len(file)} of {len(files)} images")
    return path


class Crops(StoredFile):
    """Crops of the images in a file, a whole batch in one call.

    Images that are too small for a crop at the largest scale are left out; a UserError if none remains.

    Args:
        path: returned by `prepare_images`.
        data: of the configuration.
        input: the network's, "interpolated" or "low".
    """

    def __init__(self, path: Path, data: DataConfig, input: str) -> None:
        super().__init__(path)
        self.data, self.input = data, input
        with h5py.File(path, "r") as file:
            shapes = {key: file[key].shape for key in sorted(file, key=int)}
        least = data.patch_size + max(data.scales)
        self.shapes = [(key, *shape[:2]) for key, shape in shapes.items() if min(shape[:2]) >= least]
        if not self.shapes:
            raise UserError(f"no image of {', '.join(data.train)} has sides of {least} pixels (data.patch_size)")
        self.process = 0

    def __len__(self) -> int:
        """The number of crops of an epoch."""
        return self.data.crops * len(self.shapes)

    def __getitem__(self, draws: NDArray[np.int64]) -> tuple[NDArray, ...]:
        """Draws [n, 5] → (data, label, orientations), in the form of `Patches`.

        For a network with the input "low", data is [n, p / s, p / s].
        """
        if self.file is None or self.process != os.getpid():  # a fork invalidates the handle
            self.process, self.file = os.getpid(), h5py.File(self.path, "r")
        pairs = [self._crop(*draw) for draw in draws.tolist()]
        x, y = (np.stack(part) for part in zip(*pairs, strict=True))
        return x, y, draws[:, 4] % 8

    def _crop(self, image: int, scale: int, row: int, column: int, _: int) -> tuple[NDArray, NDArray]:
        """(x, x̃) as integers; each random number, modulo the number of choices, selects one."""
        key, *sides = self.shapes[image % len(self.shapes)]
        s = self.data.scales[scale % len(self.data.scales)]
        shrunk = s if self.input == "low" else 1
        p = self.data.patch_size // shrunk * shrunk
        degraded, corner = [], []  # the region to degrade, and the crop's corner in it
        for place, side in zip((row, column), sides, strict=True):
            side -= side % s
            at = s * (place % ((side - p) // s + 1))
            start, end = max(0, at - AROUND * s), min(side, at + s * (-(-p // s) + AROUND))
            degraded.append(slice(start, end))
            corner.append(at - start)
        x, truth = prepare(self.file[key][tuple(degraded)], s, self.input, self.data.degradation)
        top, left = corner
        x = x[top // shrunk : (top + p) // shrunk, left // shrunk : (left + p) // shrunk]
        return quantise(x), np.rint(255 * truth[top : top + p, left : left + p]).astype(np.uint8)


class Draws(ShuffledBatches):
    """The draws of each step, [n, 5] random numbers for n crops: image, scale, row, column, orientation."""

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for step in range(self.start, self.steps):
            draws = np.random.default_rng([self.seed, step]).integers(2**48, size=(self.batch_size, 5))
            yield from draws.reshape(self.micro, self.world, -1, 5)[:, self.rank]
