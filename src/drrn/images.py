"""Where images come from: folders, the benchmark sets, scikit-image's photographs; and how they are read.

A *set* is a folder of images. `T91`, `BSD200` (together the 291 training images), `Set5`, `Set14`, `BSD100`
and `Urban100` are folders of that name under the data root, listed with SHA-256 and URL in
`data/registry.txt` and fetched from there when absent. `demo_train` and `demo_test` are photographs inside
scikit-image's wheel. Any other name is taken as the path of a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from drrn.errors import UserError
from drrn.matlab import rgb2y
from drrn.photos.enlarge import CHUNK

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 50_000_000  # far above any benchmark image


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """An 8-bit image, [H, W] if it is grey and [H, W, 3] if it is colour.

    Raises:
        UserError: the file is missing or cannot be decoded, or it is not 8-bit grey or RGB.
    """
    try:
        with Image.open(path, formats=KINDS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{path}: {image.width}×{image.height} pixels; an image of a set has at most {MAX_PIXELS:,}"
                )
            if image.format == "TIFF":
                check_tiff(path, image)
            arrangement = str(image.tile[0].args) if image.tile else ""
            if image.mode == "RGB" and ";16" in arrangement:  # Pillow would keep one byte of two
                raise UserError(f"{path}: an 8-bit grey or RGB image is needed, this one has 16 bits a channel")
            if image.mode == "P" and "transparency" not in image.info:  # some copies of the sets hold palettes
                image = image.convert("RGB")
            if image.mode not in ("L", "RGB"):
                kind = f"{image.mode}{' with transparency' if 'transparency' in image.info else ''}"
                raise UserError(f"{path}: an 8-bit grey or RGB image is needed, this one is {kind}")
            return np.asarray(image)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image, from its header alone.

    Raises:
        UserError: the file is missing or no image, or it has more than `MAX_PIXELS`.
    """
    try:
        with Image.open(path, formats=KINDS) as image:
            width, height = image.size
    except Exception as error:  # Pillow's plugins raise many kinds for a damaged header
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    if width * height > MAX_PIXELS:
        raise UserError(f"{path}: {width}×{height} pixels; an image of a set has at most {MAX_PIXELS:,}")
    return height, width


def read_luminance(path: Path) -> NDArray[np.uint8]:
    """Y of an image as the protocol takes it [H, W].

    Colour goes through MATLAB's `rgb2ycbcr` on uint8 (Y in 16…235); a one-channel image is used as it is.

    Raises:
        UserError: as `read_pixels`.
    """
    pixels = read_pixels(path)
    if pixels.ndim == 2:
        return pixels
    return rgb2y(pixels)


def orientations(image: NDArray, which: Iterable[int] = range(8)) -> list[NDArray]:
    """The paper's eight versions of an image (Sec. 4.2) [H, W] → each [H, W] or [W, H].

    Orientation o is a rotation by 90° × (o mod 4), mirrored left–right if o ≥ 4; 0 is the image itself.
    Exact: pixels are moved, never interpolated.
    """
    return [np.fliplr(np.rot90(image, o % 4)) if o >= 4 else np.rot90(image, o) for o in which]


FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
KINDS = tuple(dict.fromkeys(FORMATS.values()))  # as Pillow calls them


def check_tiff(path: Path, image: Image.Image) -> None:
    """What Pillow does not: that the tiles have a sane size, and that no part of the picture is missing."""
    width, height = image.size
    side = [int(image.tag_v2.get(tag, 1)) for tag in (322, 323)]  # of a tile
    if side[0] * side[1] > max(4 * width * height, CHUNK):
        raise UserError(f"{path} is damaged: a picture of {width}×{height} in tiles of {side[0]}×{side[1]}")
    parts = [tile for tile in image.tile if tile[0] != "libtiff"]  # libtiff counts for itself
    covered = sum((right - left) * (lower - upper) for left, upper, right, lower in (part[1] for part in parts))
    planes = len(image.getbands()) if image.tag_v2.get(284) == 2 else 1
    if parts and covered < width * height * planes:
        raise UserError(f"{path} is damaged: it holds {covered / (width * height * planes):.0%} of its picture")
