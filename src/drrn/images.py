"""Reading, checking and rotating an image of a set. (Users' photographs: `drrn.photos`.)"""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from drrn.disk import check_regular
from drrn.errors import UserError
from drrn.formats import KINDS
from drrn.matlab import rgb2y

MAX_PIXELS = 50_000_000  # far above any benchmark image
LARGEST_TILE = 1 << 20  # pixels of a TIFF tile that are accepted for a picture of any size
LARGEST_FILE = 1 << 30  # bytes
MEND = "convert it, or take it out of the set"
LARGEST_CHUNK = 16 << 20  # bytes of a PNG chunk that is kept
PIECE = 1 << 20  # bytes read or decompressed at a time


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image of a set, and check its size, mode and checksums; its pixels are not decoded yet."""
    try:
        check_regular(path, LARGEST_FILE)
        with Image.open(path, formats=KINDS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{path}: {image.width}×{image.height} pixels; an image of a set has at most {MAX_PIXELS:,}"
                )
            check_whole(path, image)
            arrangement = str(image.tile[0].args) if image.tile else ""
            if image.mode == "RGB" and ";16" in arrangement:  # Pillow would drop every second byte
                raise UserError(
                    f"{path}: an 8-bit grey or RGB image is needed, this one has 16 bits a channel: {MEND}"
                )
            palette = image.mode == "P" and "transparency" not in image.info  # some copies of the sets have these
            if image.mode not in ("L", "RGB") and not palette:
                kind = f"{image.mode}{' with transparency' if 'transparency' in image.info else ''}"
                raise UserError(f"{path}: an 8-bit grey or RGB image is needed, this one is {kind}: {MEND}")
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many exceptions for a damaged file
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """An 8-bit image, [H, W] if it is grey and [H, W, 3] if it is colour.

    A file that is missing, damaged, or not 8-bit grey or RGB is a UserError.
    """
    with _opened(path) as image:
        return np.asarray(image.convert("RGB") if image.mode == "P" else image)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image; errors: those of `read_pixels`, except for damage that only decoding shows."""
    with _opened(path) as image:
        return image.height, image.width


def read_luminance(path: Path) -> NDArray[np.uint8]:
    """Y of an image file [H, W]; errors: those of `read_pixels`."""
    return luminance(read_pixels(path))


def luminance(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Y of an 8-bit image [H, W] or [H, W, 3] → [H, W], as in the protocol.

    Colour is converted by MATLAB's `rgb2ycbcr` on uint8 (Y in 16…235); a one-channel image is its own Y.
    """
    return pixels if pixels.ndim == 2 else rgb2y(pixels)


def orientations(image: NDArray, which: Iterable[int] = range(8)) -> list[NDArray]:
    """The paper's eight versions of an image (Sec. 4.2) [H, W] → each [H, W] or [W, H].

    Orientation o is a rotation by 90° × (o mod 4), mirrored left–right if o ≥ 4; 0 is the image itself.
    Exact: pixels are moved, never interpolated.
    """
    return [np.fliplr(np.rot90(image, o % 4)) if o >= 4 else np.rot90(image, o) for o in which]


def check_whole(path: Path, image: Image.Image) -> None:
    """Refuse damage that Pillow does not report: wrong checksums, missing parts, invalid codes."""
    if image.format == "PNG":
        for name, _, _, right in png_chunks(path):  # Pillow skips the checksums of the pixels' chunks
            if right is False and name[:1].isupper():  # critical chunks
                raise UserError(f"{path} is damaged: the checksum of its {name.decode('latin-1')} part is wrong")
    elif image.format == "TIFF":
        _check_tiff(path, image)


def png_chunks(path: Path, kept: Sequence[bytes] = ()) -> Iterator[tuple[bytes, int, bytes, bool | None]]:
    """The chunks of a PNG up to its end: name, length, content, whether the checksum is right (None: it is cut off).

    The content is empty unless the name is in `kept` and the length at most `LARGEST_CHUNK` bytes.
    """
    with path.open("rb") as file:
        file.seek(8)
        name = b""
        while name != b"IEND" and len(head := file.read(8)) == 8:
            left = length = int.from_bytes(head[:4], "big")
            name, content = head[4:], b""
            checksum = zlib.crc32(name)
            while left and (piece := file.read(min(left, PIECE))):
                checksum, left = zlib.crc32(piece, checksum), left - len(piece)
                content += piece if name in kept and length <= LARGEST_CHUNK else b""
            stored = file.read(4)
            yield name, length, content, int.from_bytes(stored, "big") == checksum if len(stored) == 4 else None


def _check_tiff(path: Path, image: Image.Image) -> None:
    """Check the size of tiles, that no part of the picture is missing, zlib's checksums, and fax codes."""
    (width, height), tags = image.size, image.tag_v2
    side = [int(tags.get(tag, 1)) for tag in (322, 323)]  # of a tile
    if side[0] * side[1] > max(4 * width * height, LARGEST_TILE):
        raise UserError(f"{path} is damaged: a picture of {width}×{height} in tiles of {side[0]}×{side[1]}")
    parts = [tile for tile in image.tile if tile[0] != "libtiff"]  # libtiff checks its own
    covered = sum((right - left) * (lower - upper) for left, upper, right, lower in (part[1] for part in parts))
    planes = len(image.getbands()) if tags.get(284) == 2 else 1
    if parts and covered < width * height * planes:
        raise UserError(f"{path} is damaged: it holds {covered / (width * height * planes):.0%} of its picture")
    if tags.get(259) in (8, 32946):  # deflate; libtiff stops before the checksum where a strip is full
        places = zip(*(tags.get(a, tags.get(b, ())) for a, b in ((273, 324), (279, 325))), strict=False)
        room = 64 * width * height + PIECE  # bytes: no picture of this size has more
        with path.open("rb") as file:
            for at, length in places:
                file.seek(at)
                _check_deflated(path, file.read(min(length, path.stat().st_size)), room)
    if tags.get(259) in (2, 3, 4):  # fax: libtiff reports invalid codes on stderr only, and decodes something else
        code = "import sys; from PIL import Image; Image.open(sys.argv[1], formats=['TIFF']).load()"
        said = subprocess.run([sys.executable, "-W", "ignore", "-c", code, path], stderr=subprocess.PIPE)
        if said.stderr:
            raise UserError(f"{path} is damaged: its fax code is invalid")


def _check_deflated(path: Path, content: bytes, room: int) -> None:
    """Decompress to the end, where zlib verifies the checksum; at most `room` bytes, which are dropped."""
    stream = zlib.decompressobj()
    try:
        while content and not stream.eof and room > 0:
            room -= len(stream.decompress(content, PIECE))
            content = stream.unconsumed_tail
    except zlib.error as error:
        raise UserError(f"{path} is damaged: {error}") from error
