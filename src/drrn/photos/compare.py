"""A page that shows a photograph before and after: bicubic and the network's result, with a slider between them."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from drrn.disk import write_whole
from drrn.errors import printable
from drrn.photos.enlarge import RESULT_FACTOR, enlarge
from drrn.photos.read import read_photo

SIDE = 1600  # pixels: the page shows the middle of a larger result, since it embeds both pictures without loss


def write_page(path: Path, source: Path, target: Path, method: str, max_pixels: int) -> None:
    """Write one self-contained HTML file: `source` enlarged by bicubic, and `target`, the result of `method`.

    Raises:
        UserError: a picture cannot be read, or the page cannot be written.
    """
    photo, after = read_photo(source, max_pixels), read_photo(target, RESULT_FACTOR * max_pixels)
    size = after.pixels.shape[:2]
    rows, columns = (slice((n - SIDE) // 2, (n + SIDE) // 2) if n > SIDE else slice(0, n) for n in size)
    before = np.concatenate([strip[:, columns].copy() for strip in enlarge(photo.pixels, size, None)])[rows]
    shown = f"the middle {columns.stop - columns.start}×{rows.stop - rows.start} of " if max(size) > SIDE else ""
    said = {
        "title": printable(target.name),
        "method": printable(method),
        "size": f"{shown}{size[1]}×{size[0]} pixels, from {photo.pixels.shape[1]}×{photo.pixels.shape[0]}",
        "width": str(min(size[1], SIDE)),
        "height": str(min(size[0], SIDE)),
    }
    pictures = {"before": data_url(before, photo.icc), "after": data_url(after.pixels[rows, columns], after.icc)}
    page = Template(Path(__file__).with_name("compare.html").read_text(encoding="utf-8"))
    text = page.substitute({key: html.escape(value) for key, value in said.items()}, **pictures)
    write_whole(path, text)


def data_url(pixels: NDArray[Any], icc: bytes | None) -> str:
    """A picture [H, W, C] as the data URL of an 8-bit PNG."""
    if pixels.dtype.kind == "f":
        pixels = np.clip(pixels, 0, 1) * 255
    elif pixels.dtype == np.uint16:
        pixels = pixels / 257
    pixels = np.floor(pixels + 0.5).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(content, "PNG", icc_profile=icc)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
