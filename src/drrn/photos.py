"""People's images: reading what comes, enlarging it, writing it without losing anything in silence.

`drrn.images` reads benchmarks; here are the files that people have: PNG, JPEG, WebP, TIFF and BMP with 8 or 16 bits
or floating pixels, grey or colour, with palettes, transparency, profiles and orientations.

What becomes of what:

| read | kept as |
|---|---|
| grey, grey + alpha, RGB, RGBA of 8 or 16 bits | the same |
| one bit a pixel | 8-bit grey |
| palette; with transparency | 8-bit RGB; RGBA |
| a colour declared transparent (PNG's tRNS) | an alpha channel |
| CMYK | 8-bit RGB: through its profile to sRGB, or by Pillow's plain formula if it has none |
| floating TIFF | 32-bit floating TIFF; values outside 0…1 are mapped to 0…1 for the network and back |

Refused by name: NaN or infinity, 32-bit integers, Lab, premultiplied 16-bit alpha.

Files come from anywhere, so only these five formats are ever opened, the size is checked before anything is
decoded, and whatever a decoder raises becomes a `Refusal` that names the file.
"""

from __future__ import annotations

import os
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from drrn import Refusal
from drrn.matlab import resize_matrix, rgb2ycbcr, ycbcr2rgb

if TYPE_CHECKING:
    from PIL import Image

    from drrn.model import DRRN

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
LONGEST = {"JPEG": 65_500, "WEBP": 16_383}  # pixels of a side that the format can hold
MAX_PIXELS = 100_000_000  # an 8-bit picture of this size takes 0.7 GB to read
RESULT_FACTOR = 16  # a result has at most so many times max_pixels

ORIENTATION, EXIF_IFD, EXIF_WIDTH, EXIF_HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003  # EXIF tags
CHUNK = 1 << 20  # pixels that are converted or encoded at a time


@dataclass
class Photo:
    """An image as a person sees it: upright, channels last.

    Attributes:
        pixels: [H, W, C], uint8, uint16 or float32; C is 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA.
        icc: its colour profile, or None.
        exif: its EXIF data (camera, date, place; no orientation), or None. Not read from TIFF and BMP.
        notes: what was left out or changed on reading, in words for the user.
    """

    pixels: NDArray[Any]
    icc: bytes | None = None
    exif: Image.Exif | None = None
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------- reading


def read_photo(path: Path, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read an image file, by its content and not by its suffix; of several frames or pages the first.

    Raises:
        Refusal: naming the file: it is missing, not one of the five formats, damaged, truncated, larger than
            `max_pixels`, or of a kind that the module's table does not list.
    """
    if not path.exists():
        raise Refusal(f"{path} does not exist")
    if not path.is_file():
        raise Refusal(f"{path} is not a file")
    from PIL import Image, UnidentifiedImageError

    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # the same check is made below, with a limit that the user can raise
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            try:
                return _read_pillow(path, max_pixels)
            except UnidentifiedImageError:
                with path.open("rb") as file:
                    start = file.read(4)
                if start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):  # TIFF of a kind that Pillow does not know
                    return _read_tifffile(path, max_pixels)
                if not start:
                    raise Refusal(f"{path} is empty") from None
                raise Refusal(
                    f"{path} is not a PNG, JPEG, WebP, TIFF or BMP image, or its header is damaged"
                ) from None
    except Refusal:
        raise
    except Exception as error:  # decoders raise many kinds for a damaged file
        reason = str(error).strip() or type(error).__name__
        raise Refusal(f"{path} cannot be read as an image: {reason}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(path: Path, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise Refusal(f"{path} has no pixels: {width}×{height}")
    if width * height > max_pixels:
        raise Refusal(
            f"{path} claims {width}×{height} pixels, more than max_pixels = {max_pixels:,}; if that is right, "
            "raise max_pixels"
        )


def check_tiff(path: Path, image: Image.Image) -> None:
    """What Pillow does not: that the tiles have a sane size, and that no part of the picture is missing."""
    width, height = image.size
    side = [int(image.tag_v2.get(tag, 1)) for tag in (322, 323)]  # of a tile
    if side[0] * side[1] > max(4 * width * height, CHUNK):
        raise Refusal(f"{path} is damaged: a picture of {width}×{height} in tiles of {side[0]}×{side[1]}")
    parts = [tile for tile in image.tile if tile[0] != "libtiff"]  # libtiff counts for itself
    covered = sum((right - left) * (lower - upper) for left, upper, right, lower in (part[1] for part in parts))
    planes = len(image.getbands()) if image.tag_v2.get(284) == 2 else 1
    if parts and covered < width * height * planes:
        raise Refusal(f"{path} is damaged: it holds {covered / (width * height * planes):.0%} of its picture")


def _read_pillow(path: Path, max_pixels: int) -> Photo:
    """What Pillow knows."""
    from PIL import Image

    with Image.open(path, formats=KINDS) as image:
        _check_size(path, *image.size, max_pixels)
        kind, mode = image.format, image.mode
        raw = [tile.args if isinstance(tile.args, str) else tile.args[0] for tile in image.tile if tile.args]
        raw = str(raw[0]) if raw else ""
        bits = image.tag_v2.get(258, (8,)) if kind == "TIFF" else (8,)  # BitsPerSample
        if kind == "TIFF" and image.tag_v2.get(284) == 2 and max(bits) > 8:
            return _read_tifffile(path, max_pixels)  # planes of more than 8 bits, which Pillow muddles
        if kind == "TIFF":
            check_tiff(path, image)
        white_is_zero = kind == "TIFF" and image.tag_v2.get(262) == 0
        image.load()
        info, notes = dict(image.info), []
        exif, orientation = _exif(image, notes)
        try:
            if getattr(image, "is_animated", False):
                notes.append("only its first picture is read")
        except Exception:  # a damaged second page does not matter
            notes.append("only its first picture is read")
        icc = info.get("icc_profile") or None
        transparent = info.get("transparency")

        if raw == "LA;16B":  # 16-bit grey + alpha, 4 bytes a pixel, which Pillow shortens to 8 bits
            pixels = _decode_as(path, "RGBA").view(">u2").astype(np.uint16)
        elif mode in ("RGB", "RGBA") and raw.split(";")[-1] in ("16B", "16L", "16N"):
            if raw.startswith("RGBa"):
                raise Refusal(f"{path}: 16 bits with premultiplied alpha; save it with plain alpha first")
            # Pillow keeps one byte of two: the other one is what it keeps in the other byte order.
            little = raw.endswith("L") or (raw.endswith("N") and sys.byteorder == "little")
            pixels = np.asarray(image).astype(np.uint16)
            image.close()
            pixels <<= 8
            pixels |= _decode_as(path, raw.split(";")[0] + (";16B" if little else ";16L"))
        elif mode.startswith("I;16"):
            if tuple(bits) not in ((8,), (16,)):
                raise Refusal(f"{path} has {bits[0]} bits a pixel: 8 and 16 are read")
            pixels = np.asarray(image).astype(np.uint16)[..., None]
            pixels = 65535 - pixels if white_is_zero else pixels  # with 8 bits Pillow does it
        elif mode == "F":
            pixels = np.array(image, dtype=np.float32)[..., None]
        elif mode == "CMYK":
            image, icc = _cmyk_to_rgb(image, icc)
            notes.append("CMYK becomes RGB")
            pixels = np.asarray(image)
        elif mode in ("P", "PA"):
            pixels = np.asarray(image.convert("RGBA" if "transparency" in info or mode == "PA" else "RGB"))
            transparent = None
        elif mode in ("1", "L", "LA", "RGB", "RGBA"):
            pixels = np.asarray(image.convert("L") if mode == "1" else image)
            pixels = pixels.reshape(*pixels.shape[:2], -1)
            if isinstance(transparent, int):  # Pillow stretches few-bit greys, but not the one declared transparent
                transparent *= {"1": 255, "L;2": 85, "L;4": 17}.get(raw, 1)
        else:
            raise Refusal(f"{path}: pixels of the kind {mode} are not read; save it as RGB or grey first")

    if transparent is not None and pixels.shape[2] in (1, 3):
        seen = (pixels != np.asarray(transparent, pixels.dtype)).any(axis=2, keepdims=True)
        pixels = np.concatenate([pixels, seen * pixels.dtype.type(np.iinfo(pixels.dtype).max)], axis=2)
    if kind == "TIFF":  # Pillow has turned it
        orientation = 1
    return Photo(_upright(_finite(path, pixels), orientation), icc, exif, notes)


def _decode_as(path: Path, rawmode: str) -> NDArray[np.uint8]:
    """The file's pixels decoded once more, its bytes taken for another arrangement of the same length."""
    from PIL import Image

    with Image.open(path, formats=("PNG", "TIFF")) as image:
        image.tile = [
            tile._replace(args=rawmode if isinstance(tile.args, str) else (rawmode, *tile.args[1:]))
            for tile in image.tile
        ]
        return np.asarray(image)


def _exif(image: Image.Image, notes: list[str]) -> tuple[Image.Exif | None, int]:
    """EXIF data without the orientation, and the orientation 1…8."""
    try:
        exif = image.getexif()
        orientation = exif.get(ORIENTATION, 1)
        keep = image.format in ("JPEG", "MPO", "PNG", "WEBP") and len(exif) > 0
        exif.pop(ORIENTATION, None)
        if keep:
            exif.tobytes()  # that it can be written
    except Exception:  # it is nothing that a picture needs
        notes.append("its EXIF data are damaged and left out")
        return None, 1
    if orientation not in range(1, 9):
        orientation = 1
    return (exif if keep else None), orientation


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, bytes | None]:
    """A CMYK picture as RGB, and the profile of that."""
    from PIL import ImageCms

    if icc and icc[16:20] == b"CMYK":
        try:
            srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
            converted = ImageCms.profileToProfile(image, BytesIO(icc), srgb, outputMode="RGB")
            return converted, srgb.tobytes()
        except ImageCms.PyCMSError:  # a damaged profile
            pass
    return image.convert("RGB"), None


def _read_tifffile(path: Path, max_pixels: int) -> Photo:
    """TIFF files that Pillow does not know: floating colour, 16-bit grey + alpha, 16-bit planes."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        _check_size(path, page.imagewidth, page.imagelength, max_pixels)
        samples, dtype = page.samplesperpixel, page.dtype
        grey = page.photometric in (0, 1)
        alphas = [int(extra) for extra in page.extrasamples]
        if (
            page.photometric not in (0, 1, 2)
            or dtype is None
            or dtype.name not in ("uint8", "uint16", "float16", "float32", "float64")
            or samples - len(alphas) != (1 if grey else 3)
            or alphas not in ([], [0], [2])
            or page.imagedepth != 1
            or page.nbytes > 16 * max_pixels
            or page.tilewidth * page.tilelength > max(max_pixels, 1 << 20)
        ):
            raise Refusal(
                f"{path}: a TIFF of {samples} samples of {dtype or 'an unknown type'} a pixel, photometric "
                f"{page.photometric}, is not read; save it as grey or RGB with at most one plain alpha channel"
            )
        pixels = page.asarray(maxworkers=1)
        notes = ["only its first picture is read"] if len(file.pages) > 1 else []
        icc, orientation = page.iccprofile, page.tags.valueof(274, default=1)
        separate = page.planarconfig == 2 and samples > 1
    if dtype.kind == "f":
        pixels = pixels.astype(np.float32)
    pixels = np.moveaxis(pixels, 0, -1) if separate else pixels.reshape(*pixels.shape[:2], samples)
    if page.photometric == 0 and dtype.kind == "u":
        pixels[..., 0] = np.iinfo(dtype).max - pixels[..., 0]
    orientation = int(orientation) if orientation in range(1, 9) else 1
    return Photo(_upright(_finite(path, pixels), orientation), icc, None, notes)


def _finite(path: Path, pixels: NDArray[Any]) -> NDArray[Any]:
    """The pixels, if all are numbers."""
    if pixels.dtype.kind == "f":
        bad = pixels.size - np.count_nonzero(np.isfinite(pixels))
        if bad:
            raise Refusal(f"{path}: {bad:,} of {pixels.size:,} values are NaN or infinite; replace them first")
    return pixels


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Apply an EXIF orientation [H, W, C] → [H, W, C] or [W, H, C]."""
    if orientation >= 5:  # the stored rows are what is seen as columns
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):  # bottom to top
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):  # right to left
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# ---------------------------------------------------------------------- enlarging


def result_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(H, W) of the enlarged image: scale × side, rounded to the nearest, halves up; at least 1."""
    return max(1, int(scale * height + 0.5)), max(1, int(scale * width + 0.5))


def enlarge(
    pixels: NDArray[Any],
    size: tuple[int, int],
    network: DRRN | None,
    tile: int | None = None,
    self_ensemble: bool = False,
    progress: Callable[[int, int], None] | None = None,
    room: int | None = None,
) -> Iterator[NDArray[Any]]:
    """Super-resolve an image, colour as in the paper: Y by the network, Cb and Cr by bicubic.

    A grey image is its own Y (0…255), colour goes through MATLAB's `rgb2ycbcr` (Y in 16…235), unrounded, as in
    the evaluation protocol. Alpha is enlarged by bicubic. The whole image is mapped on the whole result, so at a
    fractional scale no border is lost. Only strips are ever in memory.

    Args:
        pixels: [H, W, C], uint8, uint16 or float32 as in `Photo`.
        size: (H', W') of the result.
        network: None enlarges everything by bicubic.
        tile, self_ensemble, progress, room: as in `drrn.inference.super_resolve_strips`.

    Yields:
        Strips [h, W', C] of the result from the top, of the same dtype, rounded half up and clipped to its range;
        floating pixels are clipped to 0…1, or to the image's own extremes where they lie outside.
    """
    height, width, channels = pixels.shape
    weights = (
        resize_matrix(height, size[0] / height, size[0]),
        resize_matrix(width, size[1] / width, size[1]),
    )
    if pixels.dtype.kind == "f":
        low, high = min(0.0, float(pixels.min())), max(1.0, float(pixels.max()))
    else:
        low, high = 0.0, float(np.iinfo(pixels.dtype).max)
    colour = channels >= 3

    def unit(part: NDArray[Any]) -> NDArray[np.float64]:
        return (part - np.float64(low)) / (high - low)

    def luminance(first: int, last: int) -> NDArray[np.float32]:
        """Rows of the interpolated Y."""
        y = np.empty((last - first, size[1]), np.float32)
        for a, b in _chunks(first, last, size[1]):
            y[a - first : b - first] = _resized(
                lambda r, s: rgb2ycbcr(unit(pixels[r:s, :, :3]))[..., :1] if colour else unit(pixels[r:s, :, :1]),
                weights, a, b,
            )[..., 0]  # fmt: skip
        return y

    if network is None:
        strips: Iterator[NDArray[np.float32]] = (luminance(a, b) for a, b in _chunks(0, size[0], size[1]))
    else:
        from drrn.inference import super_resolve_strips

        strips = super_resolve_strips(network, luminance, size, tile, self_ensemble, progress, room)

    top = 0
    for y in strips:
        for a, b in _chunks(top, top + len(y), size[1]):
            result = np.empty((b - a, size[1], channels), np.float64)
            part = y[a - top : b - top, :, None]
            if colour:
                chroma = _resized(lambda r, s: rgb2ycbcr(unit(pixels[r:s, :, :3]))[..., 1:], weights, a, b)
                result[..., :3] = ycbcr2rgb(np.concatenate([part.astype(np.float64), chroma], axis=2))
            else:
                result[..., :1] = part
            if channels in (2, 4):
                result[..., -1:] = _resized(lambda r, s: unit(pixels[r:s, :, -1:]), weights, a, b)
            np.clip(result, 0, 1, out=result)
            result = result * (high - low) + low
            yield (np.floor(result + 0.5) if pixels.dtype.kind == "u" else result).astype(pixels.dtype)
        top += len(y)


def _chunks(first: int, last: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows first…last in parts of about `CHUNK` pixels."""
    step = max(1, CHUNK // width)
    return ((a, min(a + step, last)) for a in range(first, last, step))


def _resized(
    source: Callable[[int, int], NDArray[np.float64]],
    weights: tuple[sparse.csr_array, sparse.csr_array],
    first: int,
    last: int,
) -> NDArray[np.float64]:
    """Rows first…last of what `imresize` would make of the whole image.

    Args:
        source: rows (a, b) of the image [b − a, W, C].
        weights: `resize_matrix` of rows and columns.

    Returns:
        [last − first, W', C].
    """
    vertical, horizontal = weights[0][first:last], weights[1]
    a, b = int(vertical.indices.min()), int(vertical.indices.max()) + 1
    part = source(a, b)
    lines = vertical[:, a:b] @ part.reshape(b - a, -1)  # [rows, W·C]
    lines = lines.reshape(last - first, *part.shape[1:]).swapaxes(0, 1)  # [W, rows, C]
    result = horizontal @ np.ascontiguousarray(lines).reshape(len(lines), -1)
    return result.reshape(-1, last - first, part.shape[2]).swapaxes(0, 1)


# ---------------------------------------------------------------------- writing


def stored_dtype(path: Path, dtype: np.dtype, channels: int, size: tuple[int, int]) -> np.dtype:
    """The pixel type with which a format can hold a result; asked before hours are spent on computing it.

    Args:
        path: of the result; its suffix names the format.
        dtype: of the pixels, uint8, uint16 or float32.
        channels: 1…4 as in `Photo`.
        size: (H, W) of the result.

    Returns:
        `dtype`, or uint8 where a format has no 16 bits.

    Raises:
        Refusal: another suffix, or the format cannot hold transparency, floating pixels or the size.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise Refusal(f"{path}: the name of an output ends in {', '.join(FORMATS)}")
    dtype = np.dtype(dtype)
    if dtype.kind == "f" and kind != "TIFF":
        raise Refusal(f"{path}: {kind} holds no floating pixels, of these formats only TIFF does")
    if channels in (2, 4) and kind in ("JPEG", "BMP"):
        raise Refusal(f"{path}: {kind} holds no transparency, which this image has; PNG, WebP and TIFF do")
    if max(size) > LONGEST.get(kind, sys.maxsize):
        raise Refusal(
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
    """Write an image that arrives in strips, whole or not at all, with another's profile and EXIF data.

    PNG and TIFF (deflated) are written as the strips come; JPEG, WebP and BMP hold the result in memory, 4 bytes a
    pixel.

    Args:
        path: its suffix names the format; its folder is made.
        strips: [h, W, C] from the top.
        shape: (H, W, C) of the whole.
        dtype: what `stored_dtype` said.
        photo: whose profile, and for PNG, JPEG and WebP EXIF data, are kept.
        quality: 1…100 of JPEG and WebP. JPEG keeps the colours' full resolution.

    Returns:
        What the format could not hold, in words for the user.

    Raises:
        Refusal: the file cannot be written (a full disk, no permission); nothing is left behind.
    """
    kind = FORMATS[path.suffix.lower()]
    notes: list[str] = []
    exif = None
    if photo.exif is not None and kind in ("PNG", "JPEG", "WEBP"):
        exif = _exif_bytes(photo.exif, shape, 65_000 if kind == "JPEG" else None)
        if exif is None:
            notes.append("its EXIF data could not be kept")
    if photo.icc and kind == "BMP":
        notes.append("BMP holds no colour profile: left out")
    if dtype != photo.pixels.dtype:
        notes.append(f"{kind} holds 8 bits a channel: rounded from 16")
        strips = (_to_eight_bits(strip) for strip in strips)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            if kind == "PNG":
                _write_png(file, strips, shape, dtype, photo.icc, exif)
            elif kind == "TIFF":
                _write_tiff(file, strips, shape, dtype, photo.icc)
            else:
                _write_pillow(file, kind, strips, shape, photo.icc, exif, quality)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise Refusal(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return notes


def _to_eight_bits(strip: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """0…65535 → 0…255, to the nearest."""
    return ((strip.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _exif_bytes(exif: Image.Exif, shape: tuple[int, int, int], longest: int | None) -> bytes | None:
    """EXIF data with the new size; None if they cannot be written."""
    try:
        inner = exif.get_ifd(EXIF_IFD)
        if EXIF_WIDTH in inner:
            exif[EXIF_IFD] = {**inner, EXIF_WIDTH: shape[1], EXIF_HEIGHT: shape[0]}
        data = exif.tobytes()
    except Exception:  # odd values in files of odd programs
        return None
    return data if longest is None or len(data) <= longest else None


def _write_pillow(
    file: BinaryIO,
    kind: str,
    strips: Iterator[NDArray[np.uint8]],
    shape: tuple[int, int, int],
    icc: bytes | None,
    exif: bytes | None,
    quality: int,
) -> None:
    """JPEG, WebP or BMP."""
    from PIL import Image

    height, width, channels = shape
    canvas, top = Image.new(("L", "LA", "RGB", "RGBA")[channels - 1], (width, height)), 0
    for strip in strips:
        canvas.paste(Image.fromarray(strip[..., 0] if channels == 1 else strip), (0, top))
        top += len(strip)
    options: dict[str, Any] = {}
    if kind != "BMP":
        options = {"quality": quality, **({"icc_profile": icc} if icc else {}), **({"exif": exif} if exif else {})}
    if kind == "JPEG":
        options["subsampling"] = 0
    # Without a descriptor Pillow writes through Python; by itself it overlooks a write that a full disk cut short.
    canvas.save(SimpleNamespace(write=file.write, flush=file.flush), kind, **options)


def _write_tiff(
    file: BinaryIO,
    strips: Iterator[NDArray[Any]],
    shape: tuple[int, int, int],
    dtype: np.dtype,
    icc: bytes | None,
) -> None:
    """Deflate with the horizontal predictor (integers), strip by strip."""
    import tifffile

    _, width, channels = shape
    rows = max(1, (CHUNK // 4) // (width * channels))

    def segments() -> Iterator[bytes]:
        for part in _in_rows(strips, rows):
            if dtype.kind == "u":  # differences to the pixel on the left
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
        predictor=dtype.kind == "u",
        metadata=None,
        software=False,
        iccprofile=icc,
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


def _write_png(
    file: BinaryIO,
    strips: Iterator[NDArray[Any]],
    shape: tuple[int, int, int],
    dtype: np.dtype,
    icc: bytes | None,
    exif: bytes | None,
) -> None:
    """PNG of 8 or 16 bits, row by row: Pillow writes no 16-bit colour and needs the whole image in memory."""

    def chunk(name: bytes, data: bytes) -> None:
        file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))

    height, width, channels = shape
    step = channels * dtype.itemsize  # bytes of a pixel
    colour_type = (0, 4, 2, 6)[channels - 1]
    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * dtype.itemsize, colour_type, 0, 0, 0))
    if icc:
        chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))
    if exif:
        chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
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
    """Each row by the one of PNG's filters that leaves the smallest differences (PNG, ch. 9 and 12.7).

    Args:
        rows: [n, bytes]. previous: the row above them [1, bytes]. step: bytes to the pixel on the left.

    Returns:
        [n, 1 + bytes], the filter's number first.
    """
    up = np.concatenate([previous, rows[:-1]]).astype(np.int16)
    left, corner = np.zeros_like(up), np.zeros_like(up)
    left[:, step:], corner[:, step:] = rows[:, :-step], up[:, :-step]
    to_left, to_up = np.abs(up - corner), np.abs(left - corner)  # |p − a|, |p − b| of Paeth, p = a + b − c
    to_corner = np.abs(left + up - 2 * corner)
    paeth = np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))
    best = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
    smallest = np.full(len(rows), np.iinfo(np.int64).max)
    for number, guess in ((0, None), (1, left), (2, up), (4, paeth)):
        difference = rows if guess is None else (rows - guess).astype(np.uint8)
        size = np.abs(difference.view(np.int8).astype(np.int16)).sum(axis=1, dtype=np.int64)
        better = size < smallest
        best[better, 0], best[better, 1:], smallest[better] = number, difference[better], size[better]
    return best
