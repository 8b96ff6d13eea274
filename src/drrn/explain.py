"""Why a published PSNR or SSIM differs from ours: `evaluate.py explain=37.69`.

The field measures in several ways, which papers do not describe. `explain` measures one network, or another program's
images, on one set at one scale in all these ways, and marks those that give the claimed number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch.nn.functional import interpolate

from drrn.errors import UserError, printable
from drrn.evaluation import ImageJob, jobs_of, made_by_another, methods_of, run_network
from drrn.evaluation_config import EvaluateConfig
from drrn.fast.threads import Watch
from drrn.images import read_pixels
from drrn.matlab import imresize, rgb2y, rgb2ycbcr, to_uint8, ycbcr2rgb
from drrn.metrics import METRICS, psnr
from drrn.protocol import modcrop, shave, with_chroma
from drrn.sets import set_label

Levels = NDArray[np.uint8]
Plane = NDArray[np.floating]  # 0…1

# The choices, with their names in the table; the protocol's choice comes first.
RESIZED = {
    "matlab": "MATLAB, of Y",
    "matlab 8 bits": "MATLAB, 8-bit RGB",  # a file of low-resolution colours
    "pillow": "Pillow, of RGB",
    "opencv": "OpenCV, of RGB",
    "made": "(images given)",
}
PLANES = {
    "y": "Y",
    "y float": "Y, not rounded",
    "pillow": "Pillow's Y or grey",
    "opencv": "OpenCV's Y or grey",
    "rgb": "RGB",
}
VALUES = {"uint8": "8 bits", "clipped": "float", "float": "float, not clipped"}
GREY = {"one channel": "as they are", "three channels": "as RGB"}
HEADS = {"resized": "bicubic", "plane": "compared", "crop": "crop", "values": "values", "grey": "grey images"}
# Pairs of RESIZED and PLANES that no program uses: one library's bicubic with another's Y.
NEVER = {("matlab 8 bits", "pillow"), ("matlab 8 bits", "opencv"), ("pillow", "opencv"), ("opencv", "pillow")}
SHOWN = 8  # maximum number of printed ways with several departures


class Way(NamedTuple):
    """A way of measuring: the network's input, and what is compared how."""

    resized: str  # makes the low-resolution image: a key of RESIZED
    plane: str  # network input and compared plane: a key of PLANES; for "rgb" the input is Y
    crop: int  # pixels removed on every side
    values: str  # of the comparison: a key of VALUES
    grey: str  # treatment of grey images: a key of GREY

    def departures(self, protocol: Way) -> int:
        """The number of choices that differ from the protocol's."""
        return sum(mine != other for mine, other in zip(self, protocol, strict=True))


def explain(config: EvaluateConfig, overrides: Sequence[str] = ()) -> None:
    """Print the ways of measuring that give `config.explain`, and the effect of each single departure.

    Args:
        config: the checked configuration.
        overrides: of the command line. A number typed with one digit is compared with one digit.

    Raises:
        UserError: a file has no network, or an image cannot be read.
    """
    given = {name.lstrip("+"): text for name, _, text in (override.partition("=") for override in overrides)}
    methods = methods_of(config)
    metric = "psnr" if config.explain > 1 else "ssim"
    jobs = jobs_of(config, methods, lambda name, members: set_label(name, list(members)))
    threads = Watch().choose(config.threads).number if config.checkpoint else 1
    values = []
    for job in track(jobs, "measuring", console=Console(stderr=True), transient=True):
        try:
            values.append(ways_of(job, metric, threads, config.precision))
        except ValueError as error:  # too small for the scale, the crop or the metric
            raise UserError(f"{job.path} at ×{job.scale}: {error}") from error
    shared = [way for way in values[0] if all(way in of_image for of_image in values)]  # grey images have no RGB
    means = {way: float(np.mean([of_image[way] for of_image in values])) for way in shared}
    title = f"{printable(methods[0].name)}, {jobs[0].set_name} ×{jobs[0].scale}"
    print_ways(means, as_typed(given.get("explain"), config.explain), metric, title)


def as_typed(text: str | None, value: float) -> str:
    """A number with the digits that were typed: "37.70" keeps its zero; `value` if the text is no plain number."""
    text = (text or "").strip("'\"")
    return text if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) else f"{value}"


def ways_of(job: ImageJob, metric: str, threads: int = 1, precision: str = "float32") -> dict[Way, float]:
    """Measure one image in all ways that apply to it; the protocol's comes first."""
    pixels = modcrop(read_pixels(job.path), job.scale)
    made, is_grey = None if job.made is None else made_by_another(job, pixels), pixels.ndim == 2
    images = {"one channel": (pixels, made)}
    if is_grey:
        images["three channels"] = np.dstack([pixels] * 3), None if made is None else np.dstack([made] * 3)
    result: dict[Way, float] = {}
    for grey, pair in images.items():
        for resized, plane, truth, y in compared(job, *pair, threads, precision):
            for values in VALUES:
                a, b = _compared(truth, values), _compared(y, values)
                for crop in (job.scale, 0, job.scale + 6):
                    value = _value(METRICS[metric].function, shave(a, crop), shave(b, crop))
                    result[Way(resized, plane, crop, values, grey)] = value
    return result if is_grey else result | {way._replace(grey="three channels"): result[way] for way in result}


def _compared(image: Plane, values: str) -> NDArray:
    if values == "uint8":
        return to_uint8(image)
    return np.clip(image * 255.0, 0, 255) if values == "clipped" else image * 255.0


def _value(function: Callable[[NDArray, NDArray], float], a: NDArray, b: NDArray) -> float:
    """PSNR over all channels together; for SSIM the mean over the channels."""
    if a.ndim == 2 or function is psnr:
        return function(a, b)
    return float(np.mean([function(x, y) for x, y in zip(np.moveaxis(a, 2, 0), np.moveaxis(b, 2, 0), strict=True)]))


# ---------------------------------------------------------------------- compared planes


def plane_of(pixels: Levels, plane: str) -> Plane:
    """The compared plane of an image: [H, W] or [H, W, 3] in 8 bits → Y [H, W], or [H, W, 3] for "rgb", 0…1.

    A grey image is its own Y. MATLAB's Y is in 16…235, the others' in 0…255:

        Pillow    (19595 R + 38470 G + 7471 B + 2¹⁵) >> 16     `convert("L")`, libImaging/Convert.c
        OpenCV    (4899 R + 9617 G + 1868 B + 2¹³) >> 14       `COLOR_BGR2YCrCb`, imgproc/color_yuv
    """
    if pixels.ndim == 2 or plane == "rgb":
        return pixels / 255.0
    if plane == "y":
        return rgb2y(pixels) / 255.0
    if plane == "y float":
        return rgb2y(pixels / 255.0)
    weights, bits = {"pillow": ((19595, 38470, 7471), 16), "opencv": ((4899, 9617, 1868), 14)}[plane]
    return ((pixels.astype(np.int64) @ weights + (1 << (bits - 1))) >> bits) / 255.0


def compared(
    job: ImageJob, pixels: Levels, made: Levels | None, threads: int, precision: str
) -> Iterator[tuple[str, str, Plane, Plane]]:
    """(`Way.resized`, `Way.plane`, the truth, the method's result) for all combinations that apply, 0…1.

    The network runs once for each input.
    """
    truth = {plane: plane_of(pixels, plane) for plane in PLANES}
    scale, checkpoint = job.scale, job.method.checkpoint
    if made is not None:
        for plane in PLANES:
            if plane != "rgb" or made.ndim == pixels.ndim:
                yield "made", plane, truth[plane], plane_of(made, plane)
        return
    for resized in RESIZED:
        if resized == "made":
            continue
        planes = [plane for plane in PLANES if (resized, plane) not in NEVER]
        of_network = ["y"] if pixels.ndim == 2 else [plane for plane in planes if plane != "rgb"]
        results = {plane: given(pixels, resized, plane, scale, job.method.input) for plane in of_network}
        if checkpoint is not None:
            results = {plane: run_network(checkpoint, x, threads, precision) for plane, x in results.items()}
        if pixels.ndim == 2:
            results = dict.fromkeys(planes, results["y"])
        elif resized == "matlab" and "rgb" in planes:
            results["rgb"] = with_chroma(results["y"], pixels, scale)
        elif "rgb" in planes:
            ycbcr = rgb2ycbcr(np.clip(given(pixels, resized, "rgb", scale, "interpolated"), 0, 1))
            ycbcr[..., 0] = results["y float"]
            results["rgb"] = ycbcr2rgb(ycbcr)
        for plane in planes:
            yield resized, plane, truth[plane], results[plane]


def given(pixels: Levels, resized: str, plane: str, scale: int, input: str) -> Plane:
    """A plane of the image, shrunk to 1/s and, unless `input` is "low", enlarged again, 0…1."""
    if resized in ("pillow", "opencv"):
        resize, (height, width) = pillow_resize if resized == "pillow" else opencv_resize, pixels.shape[:2]
        image = resize(pixels, (height // scale, width // scale))
        return plane_of(image if input == "low" else resize(image, (height, width)), plane)
    if resized == "matlab":
        low = imresize(plane_of(pixels, plane), 1 / scale)
    else:  # the low resolution is a file of 8-bit colours
        low = plane_of(to_uint8(imresize(pixels / 255.0, 1 / scale)), plane)
    return low if input == "low" else imresize(low, scale)


def pillow_resize(pixels: Levels, size: tuple[int, int]) -> Levels:
    """`Image.resize(…, BICUBIC)` to (height, width): a = -0.5, antialiased when shrinking, 8 bits."""
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def opencv_resize(pixels: Levels, size: tuple[int, int]) -> Levels:
    """`cv2.resize(…, INTER_CUBIC)` to (height, width): a = -0.75, never antialiased, replicated edges, 8 bits.

    Computed with PyTorch's bicubic, which is the same except that OpenCV's uses fixed-point numbers: up to one value
    in a hundred differs by one level.
    """
    planes = torch.from_numpy(np.atleast_3d(pixels).astype(np.float64)).permute(2, 0, 1)  # [C, H, W]
    levels = interpolate(planes[None], size, mode="bicubic")[0].permute(1, 2, 0).numpy()
    return np.clip(np.floor(levels + 0.5), 0, 255).astype(np.uint8).reshape(*size, *pixels.shape[2:])


# ---------------------------------------------------------------------- the table


def explaining(means: dict[Way, float], claimed: str) -> list[Way]:
    """The ways that give the claimed number to its digits, those with the fewest departures first."""
    protocol, digits = next(iter(means)), len(claimed.partition(".")[2])
    found = [way for way, value in means.items() if f"{value:.{digits}f}" == f"{float(claimed):.{digits}f}"]
    return sorted(found, key=lambda way: way.departures(protocol))


def print_ways(means: dict[Way, float], claimed: str, metric: str, title: str) -> None:
    """Print the protocol, each single departure from it, and the ways that give the claimed number or come near."""
    protocol, digits = next(iter(means)), max(METRICS[metric].digits, len(claimed.partition(".")[2]))
    means = {way: value for way, value in means.items() if _says_more(way, means, digits)}
    found = explaining(means, claimed)
    nearest = sorted(means, key=lambda way: (abs(means[way] - float(claimed)), way.departures(protocol)))
    further = [] if protocol in found else found[:SHOWN] or nearest[:3]
    shown = [way for way in means if way.departures(protocol) <= 1]
    shown += [way for way in further if way not in shown]
    names = {"resized": RESIZED, "plane": PLANES, "values": VALUES, "grey": GREY}
    columns = [key for key in HEADS if len({getattr(way, key) for way in means}) > 1]
    table = Table(title=Text(title), caption=f"first row: the protocol; ✓: gives {claimed}")
    for column in (*(HEADS[key] for key in columns), metric.upper(), ""):
        table.add_column(column, justify="right" if column in ("crop", metric.upper()) else "left")
    for way in shown:
        cells = [str(names.get(key, {}).get(getattr(way, key), getattr(way, key))) for key in columns]
        table.add_row(*cells, f"{means[way]:.{digits}f}", "✓" * (way in found))
    Console().print(table)
    if protocol in found:
        print(f"{claimed}: the protocol gives it")
    elif found:
        print(f"{claimed}: {len(found)} of {len(means)} ways give it, those nearest to the protocol first")
    else:
        print(f"{claimed}: none of {len(means)} ways gives it; the nearest come last")


def _says_more(way: Way, means: dict[Way, float], digits: int) -> bool:
    """Whether a way gives another value than simpler ways: clipping and grey images often change nothing."""
    simpler = [way._replace(grey="one channel")] + [way._replace(values="clipped")] * (way.values == "float")
    return all(round(means[way], digits) != round(means[other], digits) for other in simpler if other != way)
