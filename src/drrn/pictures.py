"""Comparison pictures: crops side by side, as in Fig. 7."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from drrn.disk import write_whole
from drrn.errors import UserError, printable
from drrn.images import read_pixels
from drrn.matlab import rgb2ycbcr, to_uint8, ycbcr2rgb
from drrn.protocol import degrade, modcrop, prepare, score

mpl.rcParams.update({"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "pdf.fonttype": 42})


class Box(NamedTuple):
    """A region of an image in pixels: left, top, width, height."""

    left: int
    top: int
    width: int
    height: int

    def of(self, image: NDArray) -> NDArray:
        """The region [height, width, …] of [H, W, …]."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


def side_by_side(
    path: Path,
    scale: int,
    networks: dict[str, Callable[[NDArray], NDArray]],
    box: Box | None = None,
    low: Collection[str] = (),
) -> Figure:
    """A crop from the ground truth, bicubic and each network, PSNR and SSIM under each (Fig. 7's way).

    Colour is shown as the paper does: Y from the method, Cb and Cr by bicubic. The scores are those of the whole
    image's Y by the protocol.

    Args:
        path: an image of a benchmark set.
        scale: the scale to degrade and super-resolve it by.
        networks: name → function of the network's input [H, W] that returns its output.
        box: the region to enlarge; None takes the middle quarter of the image's sides.
        low: names of those whose input is the low-resolution image; the others' is the interpolated one.

    Raises:
        UserError: the box is not inside the image.
    """
    pixels = read_pixels(path)
    truth = modcrop(pixels, scale)
    height, width = truth.shape[:2]
    if box is None:
        box = Box(width * 3 // 8, height * 3 // 8, max(1, width // 4), max(1, height // 4))
    if min(box) < 0 or box.left + box.width > width or box.top + box.height > height or not box.width * box.height:
        raise UserError(f"box = {list(box)} (left, top, width, height): not inside {path.name}, {width}×{height}")
    colour = truth.ndim == 3
    y = rgb2ycbcr(pixels)[..., 0] if colour else pixels
    (x, y_truth), (x_low, _) = prepare(y, scale), prepare(y, scale, "low")
    chroma = degrade(rgb2ycbcr(truth)[..., 1:] / 255.0, scale) if colour else None

    panels = [("ground truth", truth, "PSNR / SSIM")]
    for name, run in {"bicubic": lambda image: image, **networks}.items():
        prediction = run(x_low if name in low else x)
        scores = score(prediction, y_truth, scale)
        shown = to_uint8(np.asarray(prediction))
        if chroma is not None:
            shown = to_uint8(ycbcr2rgb(np.dstack([np.clip(prediction, 0, 1), chroma])))
        panels.append((name, shown, f"{scores['psnr']:.2f} dB / {scores['ssim']:.4f}"))

    return _panels(truth, box, f"{path.stem} ×{scale}", panels)


def _panels(truth: NDArray, box: Box, title: str, panels: list[tuple[str, NDArray, str]]) -> Figure:
    """The whole image with its box, then a crop for each (name, image, words below)."""
    height, width = truth.shape[:2]
    panel_height = 2.2  # inches
    crop_width = panel_height * box.width / box.height
    whole_width = panel_height * width / height
    figure = Figure(figsize=(whole_width + (crop_width + 0.1) * len(panels) + 0.2, panel_height + 0.75), dpi=150)
    FigureCanvasAgg(figure)
    ratios = [whole_width, *[crop_width] * len(panels)]
    axes = figure.subplots(1, 1 + len(panels), gridspec_kw={"width_ratios": ratios, "wspace": 0.04})
    figure.subplots_adjust(left=0.01, right=0.99, top=0.88, bottom=0.13)
    for axis, image in zip(axes, [truth, *(box.of(image) for _, image, _ in panels)], strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].add_patch(Rectangle((box.left, box.top), box.width, box.height, fill=False, color="red", linewidth=1.2))
    axes[0].set_title(printable(title), parse_math=False)
    for axis, (name, _, below) in zip(axes[1:], panels, strict=True):
        points = 72 * crop_width / (0.62 * len(name))  # in which the name fits above its panel
        axis.set_title(name, size=min(10.8, points), parse_math=False)
        axis.set_xlabel(below)
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and PDF under `stem`; temporary names first.

    Raises:
        UserError: the folder cannot be written.
    """
    written = []
    for suffix in (".png", ".pdf"):
        path = stem.with_name(stem.name + suffix)
        write_whole(path, lambda partial, form=suffix[1:]: figure.savefig(partial, format=form))
        written.append(path)
    return written
