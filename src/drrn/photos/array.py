"""Enlarging in Python: an image in memory, a PIL image or an array."""

from __future__ import annotations

import contextlib
import math
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from drrn.photos.enlarge import enlarge, result_size
from drrn.weights.shipped import load

if TYPE_CHECKING:
    from torch import nn

BICUBIC = "bicubic"
PLAIN = {"1": "L", "La": "LA", "P": "RGB", "PA": "RGBA", "RGBX": "RGB", "RGBa": "RGBA"} | dict.fromkeys(
    ("CMYK", "YCbCr", "HSV", "LAB"), "RGB"
)


def upscale(
    image: Image.Image | NDArray[Any],
    scale: float,
    network: nn.Module | str | Path | None = None,
    precision: str = "auto",
) -> Any:
    """Enlarge an image: Y by a network, Cb, Cr and alpha by bicubic.

    Args:
        image: a PIL image (turned upright by its EXIF orientation; palettes become RGB or RGBA, CMYK becomes RGB,
            one bit a pixel becomes grey), or an array [H, W] or [H, W, C] with C = 1…4 channels (grey, grey + alpha,
            RGB, RGBA) of uint8, uint16, or floating in 0…1.
        scale: above 1; may be a fraction. Sides become scale × side, rounded.
        network: a network of `drrn.load`, an argument for `drrn.load` (None: the best shipped weights), or "bicubic".
            For many images, load it once.
        precision: as in `drrn.inference.super_resolve`.

    Returns:
        A PIL image for a PIL image, with its `info` (profile, EXIF, resolution); an array of the same dtype and
        number of dimensions for an array.

    Raises:
        ValueError: the image is of another kind, or the scale is not above 1 or not the network's.
        UserError: the weights cannot be loaded, or the device lacks the precision.
    """
    if not isinstance(scale, Real) or not 1 < scale < math.inf:
        raise ValueError(f"scale = {scale!r}: must be a number above 1")
    if not isinstance(image, np.ndarray | Image.Image):
        kind = type(image).__name__
        raise ValueError(f"an image is a PIL image or an array, not {kind}: open a file by PIL.Image.open")
    if isinstance(image, Image.Image):
        image = _plain(image)
    pixels = np.asarray(image)
    if pixels.ndim not in (2, 3) or 0 in pixels.shape or (pixels.ndim == 3 and pixels.shape[2] > 4):
        raise ValueError(f"an image is [H, W] or [H, W, C] with 1…4 channels, not {pixels.shape}")
    if pixels.dtype.kind != "f" and pixels.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise ValueError(f"an image is uint8, uint16 or floating, not {pixels.dtype}")
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ValueError("the image holds values that are not finite")
    if network == BICUBIC:
        network = None
    elif network is None or isinstance(network, str | Path):
        network = load(network, scale)
    if network is not None and getattr(network, "scale", scale) != scale:
        raise ValueError(f"scale = {scale}: the network enlarges by {network.scale}")
    deep = pixels.reshape(*pixels.shape[:2], -1)
    result = np.concatenate(
        list(enlarge(deep, result_size(*pixels.shape[:2], scale), network, precision=precision)), dtype=pixels.dtype
    )
    result = result.reshape(*result.shape[:2], *pixels.shape[2:])
    if isinstance(image, np.ndarray):
        return result
    big = Image.fromarray(result)
    big.info = image.info
    return big


def _plain(image: Image.Image) -> Image.Image:
    """A PIL image upright and in a mode whose channels are grey, grey + alpha, RGB or RGBA."""
    with contextlib.suppress(Exception):  # damaged EXIF data: Pillow raises many kinds
        image = ImageOps.exif_transpose(image)
    mode = PLAIN.get(image.mode, image.mode)
    if "transparency" in image.info and mode in ("L", "RGB"):
        mode = {"L": "LA", "RGB": "RGBA"}[mode]
    if mode == image.mode:
        return image
    plain = image.convert(mode)
    if image.mode in ("CMYK", "LAB"):
        plain.info.pop("icc_profile", None)  # of other channels
    return plain
