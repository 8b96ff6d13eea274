"""The formats of images, by the suffix of a file's name."""

from __future__ import annotations

# Formats of sets, and of written images: suffix → Pillow's name.
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
KINDS = tuple(dict.fromkeys(FORMATS.values()))
# Other images, which sets do not have: such a file in a set's folder is reported. None: unknown to Pillow.
OTHER_FORMATS = {
    ".gif": "GIF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pnm": "PPM",
    ".pbm": "PPM",
    ".jfif": "JPEG",  # as some browsers call it
    ".mpo": "JPEG",  # of two lenses
    ".jp2": "JPEG2000",
    ".j2k": "JPEG2000",
    ".avif": "AVIF",
    ".heic": "HEIF",  # with the plugin pillow-heif
    ".heif": "HEIF",
    ".jxl": None,
}
