"""Metadata of an image file: colour information, resolution, text, kept as raw bytes where possible."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

from PIL import Image

from drrn.images import LARGEST_CHUNK, png_chunks

ORIENTATION, EXIF_IFD, EXIF_WIDTH, EXIF_HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003  # EXIF tags
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, INCH, CENTIMETRE = 0x011A, 0x011B, 0x0128, 2, 3

COLOUR = (b"gAMA", b"cHRM", b"cICP", b"sRGB", b"mDCV", b"cLLI")  # chunks of PNG, beside iCCP
TEXT = (b"tEXt", b"zTXt", b"iTXt")
XMP = 700  # tag of TIFF
XMP_KEYWORD = b"XML:com.adobe.xmp"
ELSEWHERE = (XMP_KEYWORD, b"Raw profile type exif", b"Raw profile type APP1")  # in other fields of `Photo`
SRGB = (  # the chunks of sRGB, every format's default
    (b"gAMA", struct.pack(">I", 45455)),
    (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)),
)

Chunks = list[tuple[bytes, bytes]]


def colour_and_text(path: Path, notes: list[str]) -> Chunks:
    """A PNG's colour and text chunks (name, payload), unparsed; `notes` gains a line for each damaged or huge one."""
    found: Chunks = []
    for name, length, content, right in png_chunks(path, COLOUR + TEXT):
        if name not in COLOUR + TEXT:
            continue
        if length > LARGEST_CHUNK:
            notes.append(f"its {name.decode()} part of {length:,} bytes is left out")
        elif not right:
            notes.append(f"its {name.decode()} part is damaged and left out")
        elif name not in TEXT or content.partition(b"\0")[0] not in ELSEWHERE:
            found.append((name, content))
    return found


def lost_chunks(chunks: Chunks, kind: str) -> list[str]:
    """A note that names the chunks that another format cannot store; [] if none is lost."""
    lost = dict.fromkeys(name.decode() for name, data in chunks if name != b"sRGB" and (name, data) not in SRGB)
    return [f"{kind} has no place for {', '.join(lost)} of PNG: left out"] if lost else []


def resolution(info: dict[str, Any], exif: Image.Exif | None) -> tuple[float, float] | None:
    """Pixels per inch across and down, of Pillow's `info` or EXIF (WebP, AVIF, HEIC); None if missing or absurd."""
    dpi = info.get("dpi")
    try:
        if dpi is None and exif is not None and X_RESOLUTION in exif:
            unit = {INCH: 1.0, CENTIMETRE: 2.54}[exif.get(RESOLUTION_UNIT, INCH)]
            dpi = [float(exif[tag]) * unit for tag in (X_RESOLUTION, Y_RESOLUTION)]
        across, down = (float(value) for value in dpi or ())
    except (TypeError, ValueError, KeyError, ZeroDivisionError):
        return None
    # For a TIFF without a resolution, Pillow says 1.
    if all(math.isfinite(value) and 1 < value < 65_536 for value in (across, down)):
        return across, down
    return None


def with_resolution(exif: Image.Exif | None, dpi: tuple[float, float]) -> Image.Exif:
    """EXIF data with a resolution in pixels per inch."""
    exif = Image.Exif() if exif is None else exif
    exif[X_RESOLUTION], exif[Y_RESOLUTION], exif[RESOLUTION_UNIT] = (*dpi, INCH)
    return exif


def upright_xmp(xmp: Any) -> bytes | None:
    """XMP with an orientation of 1, since the pixels are turned upright."""
    if not isinstance(xmp, bytes | str) or not xmp:
        return None
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    return re.sub(rb'(tiff:Orientation(?:="|>))[0-9]', rb"\g<1>1", xmp)


def exif_and_orientation(image: Image.Image, notes: list[str]) -> tuple[Image.Exif | None, int]:
    """EXIF data without the orientation, and the orientation 1…8."""
    try:
        exif = image.getexif()
        orientation = exif.get(ORIENTATION, 1)
        keep = image.format in ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF") and len(exif) > 0
        exif.pop(ORIENTATION, None)
        if keep:
            exif.tobytes()  # raises if it cannot be written
    except Exception:  # Pillow raises many kinds; the picture is readable without it
        notes.append("its EXIF data are damaged and left out")
        return None, 1
    return (exif if keep else None), orientation if orientation in range(1, 9) else 1


def exif_bytes(exif: Image.Exif, shape: tuple[int, int, int], longest: int | None) -> bytes | None:
    """EXIF data with the new size, serialised; None if that fails or takes more than `longest` bytes."""
    try:
        inner = exif.get_ifd(EXIF_IFD)
        if EXIF_WIDTH in inner:
            exif[EXIF_IFD] = {**inner, EXIF_WIDTH: shape[1], EXIF_HEIGHT: shape[0]}
        data = exif.tobytes()
    except Exception:  # odd values in files of odd programs
        return None
    return data if longest is None or len(data) <= longest else None
