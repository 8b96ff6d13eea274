"""Writing an enlarged picture, strip by strip if the format allows it."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from drrn.disk import write_whole
from drrn.errors import UserError
from drrn.formats import FORMATS
from drrn.photos.enlarge import CHUNK
from drrn.photos.metadata import XMP, XMP_KEYWORD, Chunks, exif_bytes, lost_chunks, with_resolution
from drrn.photos.read import Photo

Strips = Iterator[NDArray[Any]]
Shape = tuple[int, int, int]  # H, W, C
Beside = dict[str, Any]  # metadata by Pillow's names
LONGEST = {"JPEG": 65_500, "WEBP": 16_383}  # the format's limit in pixels a side


def stored_dtype(path: Path, dtype: np.dtype, channels: int, size: tuple[int, int]) -> np.dtype:
    """The dtype in which a format can store a result; called before hours are spent on computing it.

    Args:
        path: its suffix names the format.
        dtype, channels, size: of the result, as in `Photo`; size is (H, W).

    Returns:
        `dtype`, or uint8 if the format has no 16 bits.

    Raises:
        UserError: the suffix is unknown, or the format cannot store transparency, floating pixels or the size.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: the name of an output ends in {', '.join(FORMATS)}")
    dtype = np.dtype(dtype)
    if dtype.kind == "f" and kind != "TIFF":
        raise UserError(f"{path}: {kind} holds no floating pixels, of these formats only TIFF does")
    if channels in (2, 4) and kind in ("JPEG", "BMP"):
        raise UserError(f"{path}: {kind} holds no transparency, which this image has; PNG, WebP and TIFF do")
    if max(size) > LONGEST.get(kind, sys.maxsize):
        raise UserError(
            f"{path}: {kind} holds at most {LONGEST[kind]:,} pixels a side, not {size[1]:,}×{size[0]:,}; "
            "PNG and TIFF hold more"
        )
    return np.dtype(np.uint8) if dtype == np.uint16 and kind not in ("PNG", "TIFF") else dtype


def write_photo(
    path: Path, strips: Strips, shape: Shape, dtype: np.dtype, photo: Photo, quality: int = 95
) -> list[str]:
    """Write an image that arrives in strips, with a photo's metadata; the file appears whole or not at all.

    PNG and TIFF (deflated) are written as the strips come; JPEG, WebP and BMP hold the result in memory, 4 bytes a
    pixel.

    Args:
        path: its suffix names the format; its folder is made.
        strips, shape: [h, W, C] from the top; (H, W, C) of the whole.
        dtype: of `stored_dtype`.
        photo: its profile, resolution, EXIF data, XMP and chunks are kept if the format can store them.
        quality: 1…100 of JPEG and WebP; a WebP of 100 is without loss. JPEG keeps the colours' full resolution.

    Returns:
        Notes for the user on what the format could not store.

    Raises:
        UserError: the file cannot be written (a full disk, no permission); nothing is left behind.
    """
    kind = FORMATS[path.suffix.lower()]
    beside, notes = _beside(photo, kind, shape)
    if dtype != photo.pixels.dtype:
        notes.append(f"{kind} holds 8 bits a channel: rounded from 16")
        strips = (((strip.astype(np.uint32) + 128) // 257).astype(np.uint8) for strip in strips)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            if kind == "PNG":
                _write_png(file, strips, shape, dtype, beside, photo.chunks)
            elif kind == "TIFF":
                _write_tiff(file, strips, shape, dtype, beside)
            else:
                _write_pillow(file, strips, shape, kind, quality, beside)

    write_whole(path, write)
    return notes


def _beside(photo: Photo, kind: str, shape: Shape) -> tuple[Beside, list[str]]:
    """The part of a photo's metadata that a format can store, by Pillow's names, and notes on the rest."""
    notes = [] if kind == "PNG" else lost_chunks(photo.chunks, kind)
    said = {"icc_profile": photo.icc, "xmp": photo.xmp, "dpi": photo.dpi}
    exif = photo.exif
    if kind == "WEBP" and photo.dpi:  # EXIF is its only place for a resolution
        exif = with_resolution(exif, photo.dpi)
    if exif is not None and kind in ("PNG", "JPEG", "WEBP"):
        said["exif"] = exif_bytes(exif, shape, 65_000 if kind == "JPEG" else None)
        if said["exif"] is None:
            notes.append("its EXIF data could not be kept")
    elif exif is not None:
        notes.append(f"{kind}: its EXIF data are left out")
    if photo.icc and kind == "BMP":
        del said["icc_profile"]
        notes.append("BMP holds no colour profile: left out")
    if photo.xmp and (kind == "BMP" or (kind == "JPEG" and len(photo.xmp) > 65_000)):
        del said["xmp"]
        notes.append(f"{kind}: its XMP data do not fit: left out")
    return {name: value for name, value in said.items() if value}, notes


def _write_pillow(file: BinaryIO, strips: Strips, shape: Shape, kind: str, quality: int, beside: Beside) -> None:
    """JPEG, WebP or BMP."""
    height, width, channels = shape
    canvas, top = Image.new(("L", "LA", "RGB", "RGBA")[channels - 1], (width, height)), 0
    for strip in strips:
        canvas.paste(Image.fromarray(strip[..., 0] if channels == 1 else strip), (0, top))
        top += len(strip)
    # Without a descriptor Pillow writes through Python; with one it misses a write that a full disk cut short.
    bare = SimpleNamespace(write=file.write, flush=file.flush)
    canvas.save(bare, kind, quality=quality, lossless=quality == 100, subsampling=0, **beside)


def _write_tiff(file: BinaryIO, strips: Strips, shape: Shape, dtype: np.dtype, beside: Beside) -> None:
    """Deflate with the horizontal predictor (integers), strip by strip."""
    import tifffile

    _, width, channels = shape
    integers, xmp = dtype.kind == "u", beside.get("xmp")
    rows = max(1, (CHUNK // 4) // (width * channels))

    def segments() -> Iterator[bytes]:
        for part in _in_rows(strips, rows):
            if integers:  # differences to the pixel on the left
                part = np.diff(part, axis=1, prepend=np.zeros_like(part[:, :1]))
            yield zlib.compress(np.ascontiguousarray(part).tobytes(), 6)

    tifffile.imwrite(
        file,
        segments(),
        shape=shape if channels > 1 else shape[:2],
        dtype=dtype,
        photometric="rgb" if channels >= 3 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        rowsperstrip=rows,
        compression="zlib",
        predictor=integers,
        metadata=None,
        software=False,
        iccprofile=beside.get("icc_profile"),
        resolution=beside.get("dpi"),
        resolutionunit="INCH" if "dpi" in beside else None,
        extratags=[(XMP, 1, len(xmp), xmp, True)] if xmp else (),
    )


def _in_rows(strips: Strips, rows: int) -> Strips:
    """The same rows in strips of `rows` rows each; the last may have fewer."""
    held: list[NDArray[Any]] = []
    for strip in strips:
        held.append(strip)
        while sum(map(len, held)) >= rows:
            whole = np.concatenate(held)
            yield whole[:rows]
            held = [whole[rows:]]
    if sum(map(len, held)):
        yield np.concatenate(held)


def _write_png(file: BinaryIO, strips: Strips, shape: Shape, dtype: np.dtype, beside: Beside, chunks: Chunks) -> None:
    """PNG of 8 or 16 bits, row by row: Pillow writes no 16-bit colour and needs the whole image in memory."""

    def chunk(name: bytes, data: bytes) -> None:
        file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))

    height, width, channels = shape
    step = channels * dtype.itemsize  # bytes of a pixel
    colour_type = (0, 4, 2, 6)[channels - 1]
    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * dtype.itemsize, colour_type, 0, 0, 0))
    if "icc_profile" in beside:
        chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(beside["icc_profile"]))
    for name, data in chunks:
        chunk(name, data)
    if "dpi" in beside:
        chunk(b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in beside["dpi"]), 1))  # a metre
    if "exif" in beside:
        chunk(b"eXIf", beside["exif"].removeprefix(b"Exif\0\0"))
    if "xmp" in beside:
        chunk(b"iTXt", XMP_KEYWORD + b"\0\0\0\0\0" + beside["xmp"])
    deflate, previous = zlib.compressobj(6), np.zeros((1, width * step), np.uint8)
    for strip in strips:
        stored = np.ascontiguousarray(strip, dtype=dtype.newbyteorder(">"))
        rows = stored.view(np.uint8).reshape(len(strip), width * step)
        data = deflate.compress(_png_filtered(rows, previous, step).tobytes())
        if data:
            chunk(b"IDAT", data)
        previous = rows[-1:]
    chunk(b"IDAT", deflate.flush())
    chunk(b"IEND", b"")


def _png_filtered(rows: NDArray[np.uint8], previous: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    """Apply PNG's filter Paeth to each row; the best filter for each row would save less than 1 % more.

    Args:
        rows: [n, bytes]. previous: the row above them [1, bytes]. step: bytes to the pixel on the left.

    Returns:
        [n, 1 + bytes], the filter's number first.
    """
    up = np.concatenate([previous, rows[:-1]]).astype(np.int16)
    left, corner = np.zeros_like(up), np.zeros_like(up)
    left[:, step:], corner[:, step:] = rows[:, :-step], up[:, :-step]
    to_left, to_up = np.abs(up - corner), np.abs(left - corner)  # |p − a|, |p − b| of p = a + b − c
    to_corner = np.abs(left + up - 2 * corner)
    paeth = np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))
    return np.insert((rows - paeth).astype(np.uint8), 0, 4, axis=1)
