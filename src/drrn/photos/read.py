"""Read users' images; a note tells of each loss.

`drrn.images` reads benchmarks; this module reads the files that people have: PNG, JPEG, WebP, TIFF and BMP (read and
written), GIF, PPM, JPEG 2000, AVIF and, with the plugin pillow-heif, HEIC (read), with 8 or 16 bits or floating
pixels, grey or colour, with palettes, transparency, profiles and orientations.

Conversions:

| read | kept as |
|---|---|
| grey, grey + alpha, RGB, RGBA of 8 or 16 bits | the same |
| one bit a pixel | 8-bit grey |
| palette; with transparency | 8-bit RGB; RGBA |
| a colour declared transparent (PNG's tRNS) | an alpha channel |
| CMYK | 8-bit RGB: through its profile to sRGB, or by Pillow's plain formula if it has none |
| floating TIFF | 32-bit floating TIFF; values outside 0…1 are mapped to 0…1 for the network and back |

Colour profile, EXIF, XMP, resolution and PNG's colour and text chunks are kept if the result's format can store them.

Refused by name: NaN or infinity, 32-bit integers, Lab, premultiplied 16-bit alpha.

Files come from anywhere, so only these ten formats are ever opened, the size is checked before anything is
decoded, and every error of a decoder becomes a `UserError` that names the file.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from drrn.errors import UserError
from drrn.formats import KINDS, OTHER_FORMATS
from drrn.images import check_whole
from drrn.photos.metadata import Chunks, colour_and_text, exif_and_orientation, resolution, upright_xmp

MAX_PIXELS = 100_000_000  # an 8-bit picture of this size takes 0.7 GB to read
READ = (*KINDS, *dict.fromkeys(kind for kind in OTHER_FORMATS.values() if kind))  # as Pillow calls them


@dataclass
class Photo:
    """An image as a person sees it: upright, channels last."""

    pixels: NDArray[Any]  # [H, W, C], uint8, uint16 or float32; C is 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA
    icc: bytes | None = None  # its colour profile
    exif: Image.Exif | None = None  # without the orientation; not read from TIFF and BMP
    notes: list[str] = field(default_factory=list)  # for the user: losses and changes in reading
    dpi: tuple[float, float] | None = None  # pixels an inch across and down
    xmp: bytes | None = None
    chunks: Chunks = field(default_factory=list)  # a PNG's own colour information and texts


def read_photo(path: Path, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read an image file, by its content and not by its suffix; of several frames or pages the first.

    Raises:
        UserError: it names the file, which is missing, not one of the ten formats, damaged, truncated, larger than
            `max_pixels`, or of a kind that the module's table does not list.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # the same check is made below, with a limit that the user can raise
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            try:
                return _read_pillow(path, max_pixels)
            except UnidentifiedImageError:
                with path.open("rb") as file:
                    start = file.read(12)
                if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):  # TIFF of a kind that Pillow does not know
                    return _read_tifffile(path, max_pixels)
                if not start:
                    raise UserError(f"{path} is empty") from None
                if start[4:] in (b"ftypheic", b"ftypheix", b"ftypmif1") and "HEIF" not in Image.OPEN:
                    raise UserError(f"{path} is HEIC: pip install pillow-heif, or save it as JPEG first") from None
                raise UserError(
                    f"{path} is not a PNG, JPEG, WebP, TIFF, BMP, GIF, PPM, JPEG 2000 or AVIF image, or its header "
                    "is damaged"
                ) from None
    except UserError:
        raise
    except Exception as error:  # decoders raise many kinds for a damaged file
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{path} cannot be read as an image: {reason}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(path: Path, width: int, height: int, max_pixels: int) -> None:
    if min(width, height) < 1:
        raise UserError(f"{path} has no pixels: {width}×{height}")
    if width * height > max_pixels:
        raise UserError(
            f"{path} claims {width}×{height} pixels, more than max_pixels = {max_pixels:,}; if that is right, "
            "raise max_pixels"
        )


def _read_pillow(path: Path, max_pixels: int) -> Photo:
    """Read a file by Pillow, or by tifffile if Pillow misreads it."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    with Image.open(path, formats=[kind for kind in READ if kind in Image.OPEN]) as image:
        _check_size(path, *image.size, max_pixels)
        kind, mode = image.format, image.mode
        raw = [tile.args if isinstance(tile.args, str) else tile.args[0] for tile in image.tile if tile.args]
        raw = str(raw[0]) if raw else ""
        bits = image.tag_v2.get(258, (8,)) if kind == "TIFF" else (8,)  # BitsPerSample
        if kind == "TIFF" and image.tag_v2.get(254, 0) & 1:  # NewSubfileType: of reduced resolution
            raise UserError(
                f"{path}: its first picture is a preview, as in a camera's raw file; develop it to TIFF or JPEG first"
            )
        if kind == "TIFF" and image.tag_v2.get(284) == 2 and max(bits) > 8:
            return _read_tifffile(path, max_pixels)  # Pillow misreads planes of more than 8 bits
        check_whole(path, image)
        white_is_zero = kind == "TIFF" and image.tag_v2.get(262) == 0
        shortened = _is_shortened(path, image)
        image.load()
        info, notes = dict(image.info), ["it has more than 8 bits a channel; 8 are read"] if shortened else []
        if kind == "TIFF" and "X" in raw:
            notes.append("its extra channels are left out")
        exif, orientation = exif_and_orientation(image, notes)
        try:
            several = getattr(image, "is_animated", False)
        except Exception:  # a damaged second page does not matter
            several = True
        icc, transparent = info.get("icc_profile") or None, info.get("transparency")

        deep = _sixteen_bits(path, image, raw, bits, white_is_zero)
        if deep is not None:
            pixels = deep
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
            if isinstance(transparent, int):  # Pillow scales few-bit greys, but not the transparent one
                transparent *= {"1": 255, "L;2": 85, "L;4": 17}.get(raw, 1)
        else:
            raise UserError(f"{path}: pixels of Pillow's mode {mode} are not read; save it as RGB or grey first")

    if transparent is not None and pixels.shape[2] in (1, 3):
        seen = (pixels != np.asarray(transparent, pixels.dtype)).any(axis=2, keepdims=True)
        pixels = np.concatenate([pixels, seen * pixels.dtype.type(np.iinfo(pixels.dtype).max)], axis=2)
    xmp, chunks = upright_xmp(info.get("xmp")), colour_and_text(path, notes) if kind == "PNG" else []
    photo = Photo(pixels, icc, exif, notes, resolution(info, exif), xmp, chunks)
    return _finished(path, photo, 1 if kind == "TIFF" else orientation, several)  # Pillow has turned a TIFF


def _sixteen_bits(
    path: Path, image: Image.Image, raw: str, bits: tuple[int, ...], white_is_zero: bool
) -> NDArray[np.uint16] | None:
    """Pixels [H, W, C] of a 16-bit picture; None for others. `raw` is Pillow's raw mode."""
    if raw == "LA;16B":  # 4 bytes a pixel, which Pillow shortens to 8 bits
        return _decode_as(path, "RGBA").view(">u2").astype(np.uint16)
    if image.mode in ("RGB", "RGBA") and raw.split(";")[-1] in ("16B", "16L", "16N"):
        if raw.startswith("RGBa"):
            raise UserError(f"{path}: 16 bits with premultiplied alpha; save it with plain alpha first")
        # Pillow keeps one byte of two; decoding in the other byte order keeps the other byte.
        little = raw.endswith("L") or (raw.endswith("N") and sys.byteorder == "little")
        pixels = np.asarray(image).astype(np.uint16)
        image.close()
        pixels <<= 8
        pixels |= _decode_as(path, raw.split(";")[0] + (";16B" if little else ";16L"))
        return pixels
    if image.mode.startswith("I;16"):
        if tuple(bits) not in ((8,), (16,)):
            raise UserError(f"{path} has {bits[0]} bits a pixel: 8 and 16 are read")
        pixels = np.asarray(image).astype(np.uint16)[..., None]
        return 65535 - pixels if white_is_zero else pixels  # Pillow inverts 8 bits itself
    if image.mode == "I" and image.format == "PPM":
        return np.asarray(image).astype(np.uint16)[..., None]
    return None


def _is_shortened(path: Path, image: Image.Image) -> bool:
    """Whether Pillow silently reduces a picture to 8 bits a channel, in a format whose depth it does not report."""
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if image.format == "PPM":
        args = image.tile[0].args  # for 8 bits, only the raw mode's name
        return image.mode == "RGB" and not isinstance(args, str) and args[-1] > 255
    if image.format == "JPEG2000":  # the codestream's SIZ, 42 bytes before the depth of its first channel
        depth = start[start.find(b"\xff\x4f\xff\x51") + 42 :][:1]
        return image.mode != "I;16" and depth != b"" and depth[0] & 127 > 7
    if image.format == "HEIF":
        return image.info.get("bit_depth", 8) > 8
    flags = start[start.find(b"av1C") + 6 :][:1]
    return image.format == "AVIF" and flags != b"" and bool(flags[0] & 0x40)  # high_bitdepth


def _decode_as(path: Path, rawmode: str) -> NDArray[np.uint8]:
    """Decode the file's pixels again, by another raw mode of the same length."""
    with Image.open(path, formats=("PNG", "TIFF")) as image:
        image.tile = [
            tile._replace(args=rawmode if isinstance(tile.args, str) else (rawmode, *tile.args[1:]))
            for tile in image.tile
        ]
        return np.asarray(image)


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, bytes | None]:
    """A CMYK picture as RGB, and the profile of the RGB picture."""
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
            raise UserError(
                f"{path}: a TIFF of {samples} samples of {dtype or 'an unknown type'} a pixel, photometric "
                f"{page.photometric}, is not read; save it as grey or RGB with at most one plain alpha channel"
            )
        pixels, several = page.asarray(maxworkers=1), len(file.pages) > 1
        icc, orientation = page.iccprofile, page.tags.valueof(274, default=1)
        dpi = resolution({"dpi": page.get_resolution("INCH")}, None) if page.resolutionunit in (2, 3) else None
        separate = page.planarconfig == 2 and samples > 1
    if dtype.kind == "f":
        pixels = pixels.astype(np.float32)
    pixels = np.moveaxis(pixels, 0, -1) if separate else pixels.reshape(*pixels.shape[:2], samples)
    if page.photometric == 0 and dtype.kind == "u":
        pixels[..., 0] = np.iinfo(dtype).max - pixels[..., 0]
    return _finished(path, Photo(pixels, icc, dpi=dpi), orientation if orientation in range(1, 9) else 1, several)


def _finished(path: Path, photo: Photo, orientation: int, several: bool) -> Photo:
    """Turn a photo upright by its EXIF orientation 1…8; refuse NaN. `several`: its file has more pictures."""
    pixels = photo.pixels
    if pixels.dtype.kind == "f" and (bad := pixels.size - np.count_nonzero(np.isfinite(pixels))):
        raise UserError(f"{path}: {bad:,} of {pixels.size:,} values are NaN or infinite; replace them first")
    if orientation >= 5:  # stored rows are displayed as columns
        pixels, photo.dpi = pixels.swapaxes(0, 1), photo.dpi and photo.dpi[::-1]
    if orientation in (3, 4, 7, 8):  # bottom to top
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):  # right to left
        pixels = pixels[:, ::-1]
    photo.pixels = np.ascontiguousarray(pixels)
    if several:
        photo.notes.append("only its first picture is read")
    return photo
