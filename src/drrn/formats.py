"""The formats of images, by the suffix of a file's name."""

from __future__ import annotations

# Of sets, and of what is written: suffix → what Pillow calls it.
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
# Images too, but in no set: they are named where one would expect them to be read. None: Pillow does not know it.
OTHER_FORMATS = {
    ".gif": "GIF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pnm": "PPM",
    ".jp2": "JPEG2000",
    ".avif": "AVIF",
    ".heic": "HEIF",  # with the plugin pillow-heif
    ".heif": "HEIF",
    ".jxl": None,
}
