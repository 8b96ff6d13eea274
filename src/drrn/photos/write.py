"""Writing an enlarged picture, strip by strip where the format can."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drrn.disk import write_whole
from drrn.errors import UserError
from drrn.images import FORMATS
from drrn.photos.enlarge import CHUNK
from drrn.photos.metadata import XMP, XMP_KEYWORD, Chunks, exif_bytes, lost_chunks, with_resolution
from drrn.photos.read import Photo

LONGEST = {"JPEG": 65_500, "WEBP": 16_383}  # pixels of a side that the format can hold


def stored_dtype(path: Path, dtype: np.dtype, channels: int, size: tuple[int, int]) -> np.dtype:
    """The pixel type with which a format can hold a result; asked before hours are spent on computing it.

    Args:
        path: its suffix names the format.
        dtype, channels, size: of the result, as in `Photo`; size is (H, W).

    Returns:
        `dtype`, or uint8 where a format has no 16 bits.

    Raises:
        UserError: another suffix, or the format cannot hold transparency, floating pixels or the size.
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
    path: Path,
    strips: Iterator[NDArray[Any]],
    shape: tuple[int, int, int],
    dtype: np.dtype,
    photo: Photo,
    quality: int = 95,
) -> list[str]:
    """Write an image that arrives in strips, whole or not at all, with what another's file says beside its pixels.

    PNG and TIFF (deflated) are written as the strips come; JPEG, WebP and BMP hold the result in memory, 4 bytes a
    pixel.

    Args:
        path: its suffix names the format; its folder is made.
        strips, shape: [h, W, C] from the top; (H, W, C) of the whole.
        dtype: what `stored_dtype` said.
        photo: whose profile, resolution, EXIF data, XMP and chunks are kept where the format can hold them.
        quality: 1…100 of JPEG and WebP. JPEG keeps the colours' full resolution.

    Returns:
        What the format could not hold, in words for the user.

    Raises:
        UserError: the file cannot be written (a full disk, no permission); nothing is left behind.
    """
    kind = FORMATS[path.suffix.lower()]
    result, notes = _result(photo, kind, shape, dtype, quality)
    if dtype != photo.pixels.dtype:
        notes.append(f"{kind} holds 8 bits a channel: rounded from 16")
        strips = (((strip.astype(np.uint32) + 128) // 257).astype(np.uint8) for strip in strips)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            {"PNG": _write_png, "TIFF": _write_tiff}.get(kind, _write_pillow)(file, strips, result)

    write_whole(path, write)
    return notes


class Result(NamedTuple):
    """A result without its pixels: their shape and type, and what goes beside them, as its format takes it."""

    kind: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    quality: int
    icc: bytes | None
    exif: bytes | None
    xmp: bytes | None
    dpi: tuple[float, float] | None
    chunks: Chunks


def _result(
    photo: Photo, kind: str, shape: tuple[int, int, int], dtype: np.dtype, quality: int
) -> tuple[Result, list[str]]:
    """What a format can hold of what a photograph says, and notes on the rest."""
    exif, exif_data, notes = photo.exif, None, []
    if kind == "WEBP" and photo.dpi:  # its one place for a resolution
        exif = with_resolution(exif, photo.dpi)
    if exif is not None and kind in ("PNG", "JPEG", "WEBP"):
        exif_data = exif_bytes(exif, shape, 65_000 if kind == "JPEG" else None)
        if exif_data is None:
            notes.append("its EXIF data could not be kept")
    elif exif is not None:
        notes.append(f"{kind}: its EXIF data are left out")
    icc, xmp = photo.icc, photo.xmp
    if icc and kind == "BMP":
        icc = None
        notes.append("BMP holds no colour profile: left out")
    if xmp and (kind == "BMP" or (kind == "JPEG" and len(xmp) > 65_000)):
        xmp = None
        notes.append(f"{kind}: its XMP data do not fit: left out")
    if kind != "PNG":
        notes += lost_chunks(photo.chunks, kind)
    return Result(kind, shape, dtype, quality, icc, exif_data, xmp, photo.dpi, photo.chunks), notes


def _write_pillow(file: BinaryIO, strips: Iterator[NDArray[Any]], result: Result) -> None:
    """JPEG, WebP or BMP."""
    from PIL import Image

    height, width, channels = result.shape
    canvas, top = Image.new(("L", "LA", "RGB", "RGBA")[channels - 1], (width, height)), 0
    for strip in strips:
        canvas.paste(Image.fromarray(strip[..., 0] if channels == 1 else strip), (0, top))
        top += len(strip)
    said = {"icc_profile": result.icc, "exif": result.exif, "xmp": result.xmp, "dpi": result.dpi}
    options = {name: value for name, value in said.items() if value is not None}
    # Without a descriptor Pillow writes through Python; by itself it overlooks a write that a full disk cut short.
    bare = SimpleNamespace(write=file.write, flush=file.flush)
    canvas.save(bare, result.kind, quality=result.quality, subsampling=0, **options)


def _write_tiff(file: BinaryIO, strips: Iterator[NDArray[Any]], result: Result) -> None:
    """Deflate with the horizontal predictor (integers), strip by strip."""
    import tifffile

    _, width, channels = result.shape
    integers = result.dtype.kind == "u"
    rows = max(1, (CHUNK // 4) // (width * channels))

    def segments() -> Iterator[bytes]:
        for part in _in_rows(strips, rows):
            if integers:  # differences to the pixel on the left
                part = np.diff(part, axis=1, prepend=np.zeros_like(part[:, :1]))
            yield zlib.compress(np.ascontiguousarray(part).tobytes(), 6)

    tifffile.imwrite(
        file,
        segments(),
        shape=result.shape if channels > 1 else result.shape[:2],
        dtype=result.dtype,
        photometric="rgb" if channels >= 3 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        rowsperstrip=rows,
        compression="zlib",
        predictor=integers,
        metadata=None,
        software=False,
        iccprofile=result.icc,
        resolution=result.dpi,
        resolutionunit="INCH" if result.dpi else None,
        extratags=[(XMP, 1, len(result.xmp), result.xmp, True)] if result.xmp else (),
    )


def _in_rows(strips: Iterator[NDArray[Any]], rows: int) -> Iterator[NDArray[Any]]:
    """The same rows in strips of `rows` each; the last may be lower."""
    held: list[NDArray[Any]] = []
    for strip in strips:
        held.append(strip)
        while sum(map(len, held)) >= rows:
            whole = np.concatenate(held)
            yield whole[:rows]
            held = [whole[rows:]]
    if sum(map(len, held)):
        yield np.concatenate(held)


def _write_png(file: BinaryIO, strips: Iterator[NDArray[Any]], result: Result) -> None:
    """PNG of 8 or 16 bits, row by row: Pillow writes no 16-bit colour and needs the whole image in memory."""

    def chunk(name: bytes, data: bytes) -> None:
        file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))

    height, width, channels = result.shape
    step = channels * result.dtype.itemsize  # bytes of a pixel
    colour_type = (0, 4, 2, 6)[channels - 1]
    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * result.dtype.itemsize, colour_type, 0, 0, 0))
    if result.icc:
        chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(result.icc))
    for name, data in result.chunks:
        chunk(name, data)
    if result.dpi:
        chunk(b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in result.dpi), 1))  # a metre
    if result.exif:
        chunk(b"eXIf", result.exif.removeprefix(b"Exif\0\0"))
    if result.xmp:
        chunk(b"iTXt", XMP_KEYWORD + b"\0\0\0\0\0" + result.xmp)
    deflate, previous = zlib.compressobj(6), np.zeros((1, width * step), np.uint8)
    for strip in strips:
        stored = np.ascontiguousarray(strip, dtype=result.dtype.newbyteorder(">"))
        rows = stored.view(np.uint8).reshape(len(strip), width * step)
        data = deflate.compress(_png_filtered(rows, previous, step).tobytes())
        if data:
            chunk(b"IDAT", data)
        previous = rows[-1:]
    chunk(b"IDAT", deflate.flush())
    chunk(b"IEND", b"")


def _png_filtered(rows: NDArray[np.uint8], previous: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    """Each row by PNG's filter Paeth: what the best filter of each row would save beside it is below a hundredth.

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
