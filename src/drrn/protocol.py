"""The evaluation protocol behind the paper's Tables 2 and 3.

From an 8-bit luminance Y and a scale s: crop to a multiple of s, bicubic down and up in double precision
(the network's input), network, 8 bits, crop s pixels on every side, score. The paper does not describe it;
it is that of the released test code, and it reproduces every published Bicubic cell within 0.01 dB
and 0.001. Another degradation than bicubic (`drrn.degradations`) is another protocol.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drrn.degradations import BI, low_resolution
from drrn.images import luminance
from drrn.matlab import imresize, to_uint8, ycbcr2rgb
from drrn.metrics import METRICS, in_training


@dataclass(frozen=True)
class Protocol:
    """An evaluation protocol; two scores are comparable only if their protocols are equal.

    Attributes:
        name, version: "paper", 1 for the protocol above; other values below make another protocol.
        crop: pixels removed on every side; None is the scale, as in the paper.
        color: "y" scores the luminance; "rgb" computes PSNR over the three channels (SSIM and IFC over Y).
        rounding: "uint8" scores 8-bit values; "float" the unrounded ones, clamped to 0…255.
        degradation: of DEGRADATIONS.
        precision: of networks.
    """

    name: str = "paper"
    version: int = 1
    crop: int | None = None
    color: str = "y"
    rounding: str = "uint8"
    degradation: str = BI
    precision: str = "float32"

    def stamp(self) -> dict[str, Any]:
        """The protocol's entry in scores and records; later attributes only if they are not the paper's."""
        later = {"degradation": BI, "precision": "float32"}
        return {key: value for key, value in asdict(self).items() if key not in later or later[key] != value}


PAPER = Protocol()


def describe(protocol: dict[str, Any]) -> str:
    """A protocol's name with its departures from the paper: "protocol paper v1, but rounding=float"."""
    extra = departures(protocol)
    return f"protocol {protocol['name']} v{protocol['version']}" + (f", but {extra}" if extra else "")


def departures(protocol: dict[str, Any]) -> str:
    """A protocol's differences from the paper's: "rounding=float, degradation=BD"; "" if there are none."""
    usual = {key: value for key, value in asdict(PAPER).items() if key not in ("name", "version")}
    return ", ".join(f"{key}={value}" for key, value in protocol.items() if usual.get(key, value) != value)


def modcrop(image: NDArray, scale: int) -> NDArray:
    """Crop bottom and right to a multiple of the scale [H, W, …] → [H − H mod s, W − W mod s, …].

    A side that is smaller than the scale is a ValueError.
    """
    height, width = image.shape[0] - image.shape[0] % scale, image.shape[1] - image.shape[1] % scale
    if height == 0 or width == 0:
        raise ValueError(f"an image of {image.shape[0]}×{image.shape[1]} pixels is smaller than the scale {scale}")
    return image[:height, :width]


def shave(image: NDArray, border: int) -> NDArray:
    """Remove `border` pixels on every side [H, W, …] → [H − 2b, W − 2b, …]."""
    return image[border : image.shape[0] - border, border : image.shape[1] - border]


def prepare(
    pixels: NDArray[np.uint8],
    scale: int,
    input: str = "interpolated",
    degradation: str = BI,
    file: Path | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps 2 and 3: an 8-bit image → (network input, ground truth [H', W']), Y in 0…1.

    Args:
        pixels: [H, W] or [H, W, 3]; Y is enough unless the degradation is one of R, G and B.
        scale: s.
        input: the network's: "interpolated" [H', W'], or "low", step 3's first half [H' / s, W' / s].
        degradation, file: as in `low_resolution`.
    """
    pixels = modcrop(pixels, scale)
    x = low_resolution(pixels, scale, degradation, file=file)
    return x if input == "low" else imresize(x, scale), luminance(pixels) / 255.0


def with_chroma(
    prediction: NDArray[np.floating],
    pixels: NDArray[np.uint8],
    scale: int,
    degradation: str = BI,
    file: Path | None = None,
) -> NDArray[np.float64]:
    """Y [H', W'] of a network and bicubic Cb, Cr of the image [H, W, 3] → R, G, B [H', W', 3], 0…1."""
    ycbcr = imresize(low_resolution(modcrop(pixels, scale), scale, degradation, True, file), scale)
    ycbcr[..., 0] = prediction
    return ycbcr2rgb(ycbcr)


def over_colour(metrics: Iterable[str], protocol: Protocol = PAPER) -> tuple[str, ...]:
    """The metrics that are computed over R, G and B."""
    over = {"y": "y", "rgb": "rgb", "color": protocol.color}
    return tuple(name for name in metrics if over[METRICS[name].over] == "rgb")


def score_pixels(
    prediction: NDArray[np.floating],
    pixels: NDArray[np.uint8],
    scale: int,
    metrics: tuple[str, ...] | None = None,
    protocol: Protocol = PAPER,
    colours: NDArray[np.floating] | None = None,
    file: Path | None = None,
) -> dict[str, float]:
    """Steps 4 to 6 for an 8-bit image: each metric over Y, or over R, G and B if it or the protocol requires that.

    Args:
        prediction: Y [H', W'], 0…1.
        pixels: ground truth [H, W] or [H, W, 3].
        scale, metrics, protocol: as in `score`.
        colours: the prediction in R, G, B [H', W', 3], 0…1; None: `with_chroma`.
        file: of the image; ready pairs need it.
    """
    pixels, names = modcrop(pixels, scale), metrics or in_training()
    values = score(prediction, luminance(pixels) / 255.0, scale, names, protocol)
    if pixels.ndim == 3 and (over := over_colour(names, protocol)):  # a grey image's only channel is Y
        if colours is None:
            colours = with_chroma(prediction, pixels, scale, protocol.degradation, file)
        values |= score(colours, pixels / 255.0, scale, over, protocol)
    return values


def score(
    prediction: NDArray[np.floating],
    truth: NDArray[np.floating],
    scale: int,
    metrics: tuple[str, ...] | None = None,
    protocol: Protocol = PAPER,
) -> dict[str, float]:
    """Steps 4 to 6: one image against its ground truth.

    Args:
        prediction, truth: [H, W] (or [H, W, 3] for metrics over colour), 0…1.
        scale: s, which is also the border that is removed unless `protocol.crop` is given.
        metrics: names of METRICS; None: `in_training`.
        protocol: gives crop and rounding.

    Returns:
        metric → value.
    """
    border = scale if protocol.crop is None else protocol.crop
    a, b = (shave(_levels(image, protocol.rounding), border) for image in (prediction, truth))
    return {name: METRICS[name].function(b, a) for name in metrics or in_training()}


def _levels(image: NDArray[np.floating], rounding: str) -> NDArray:
    return to_uint8(image) if rounding == "uint8" else np.clip(image * 255.0, 0, 255)


def means(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of images → the arithmetic mean of every metric for each network, set and scale (protocol, step 7).

    A metric is left out of a group if an image of the group lacks it: the mean of a part is not the set's.
    """
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in scores:
        groups[tuple((key, row[key]) for key in ("method", "weights", "set", "scale") if key in row)].append(row)
    result = []
    for place, rows in groups.items():
        metrics = [key for key in rows[0] if key.removeprefix("bicubic_") in METRICS]
        metrics = [key for key in metrics if all(key in row for row in rows)]
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in metrics}
        result.append({**dict(place), "images": len(rows), **mean})
    return result
