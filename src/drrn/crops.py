"""Random crops of large images, drawn as they are needed: `data.crops`, for DIV2K.

Its 800 photographs hold 120 million patches at stride 21, 350 GB; here only the images are stored, decoded: 2.2 GB.
A crop begins at a pixel of the low resolution. It is degraded with as much around it as its pixels depend on, so it
is a window of the degraded image; only its noise (DN) is another in each place, and the same whenever that place is
drawn. Which crops a step draws, in which orientations, depends on the seed and the step alone: not on the number of
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

AROUND = 5  # low-resolution pixels that a crop is degraded with on each side


def prepare_images(data: DataConfig) -> Path:
    """The file of the images to crop, decoded: what `data.train` names is fetched, the file built if need be.

    Errors as of `patch_build.prepare_patches`.
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

    Images that hold no crop at the largest scale are left out; none that does is a UserError.

    Args:
        path: what `prepare_images` returned.
        data: of the configuration.
        input: what the network takes, "interpolated" or "low".
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
        """Crops of an epoch."""
        return self.data.crops * len(self.shapes)

    def __getitem__(self, draws: NDArray[np.int64]) -> tuple[NDArray, ...]:
        """Draws [n, 5] → (data, label, orientations), as `Patches` gives stored pairs.

        For a network that takes the low resolution, data is [n, p / s, p / s].
        """
        if self.file is None or self.process != os.getpid():  # a handle does not survive a fork
            self.process, self.file = os.getpid(), h5py.File(self.path, "r")
        pairs = [self._crop(*draw) for draw in draws.tolist()]
        x, y = (np.stack(part) for part in zip(*pairs, strict=True))
        return x, y, draws[:, 4] % 8

    def _crop(self, image: int, scale: int, row: int, column: int, _: int) -> tuple[NDArray, NDArray]:
        """(x, x̃) as integers; each number picks one of what there is."""
        key, *sides = self.shapes[image % len(self.shapes)]
        s = self.data.scales[scale % len(self.data.scales)]
        shrunk = s if self.input == "low" else 1
        p = self.data.patch_size // shrunk * shrunk
        degraded, corner = [], []  # what is degraded, and where the crop begins in it
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
    """What each step draws, [n, 5] random numbers for n crops: the image, the scale, two places, the orientation."""

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for step in range(self.start, self.steps):
            draws = np.random.default_rng([self.seed, step]).integers(2**48, size=(self.batch_size, 5))
            yield from draws.reshape(self.micro, self.world, -1, 5)[:, self.rank]
