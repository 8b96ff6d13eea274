"""Comparison pictures: crops side by side, as in Fig. 7."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from drrn.degradations import BI
from drrn.disk import write_whole
from drrn.errors import UserError, printable
from drrn.images import read_pixels
from drrn.matlab import imresize, to_uint8
from drrn.protocol import modcrop, prepare, score, with_chroma

mpl.rcParams.update({"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "pdf.fonttype": 42})

IN_A_ROW = 8  # crops of a comparison


class Box(NamedTuple):
    """A region of an image in pixels: left, top, width, height."""

    left: int
    top: int
    width: int
    height: int

    def of(self, image: NDArray) -> NDArray:
        """The region [height, width, …] of [H, W, …]."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


class SideBySide(NamedTuple):
    """The contents of a comparison."""

    title: str
    whole: NDArray  # the ground truth [H, W, …], 8 bits
    box: Box
    panels: list[tuple[str, NDArray, str]]  # name, whole image, caption


def side_by_side(
    path: Path,
    scale: int,
    networks: dict[str, Callable[[NDArray], NDArray]],
    box: Box | None = None,
    low: Collection[str] = (),
    degradation: str = BI,
) -> SideBySide:
    """A crop from the ground truth, bicubic and each network, PSNR and SSIM under each (Fig. 7's way).

    Colour is shown as in the paper: Y from the method, Cb and Cr by bicubic. The scores are those of the whole
    image's Y by the protocol.

    Args:
        path, scale: an image of a benchmark set, and the factor by which to degrade and super-resolve it.
        networks: name → function of the network's input [H, W] that returns its output.
        box: the region to enlarge; None: the middle quarter of both sides.
        low: names of the networks whose input is the low-resolution image instead of the interpolated one.
        degradation: of DEGRADATIONS.

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
    x_low, y_truth = prepare(pixels, scale, "low", degradation, path)
    x = imresize(x_low, scale)

    panels = [("ground truth", truth, "PSNR / SSIM")]
    for name, run in {"bicubic": lambda image: image, **networks}.items():
        prediction = run(x_low if name in low else x)
        scores = score(prediction, y_truth, scale)
        shown = np.clip(prediction, 0, 1)
        shown = to_uint8(with_chroma(shown, pixels, scale, degradation, path) if truth.ndim == 3 else shown)
        panels.append((name, shown, f"{scores['psnr']:.2f} dB / {scores['ssim']:.4f}"))

    title = f"{path.stem} ×{scale}" + f", {degradation}" * (degradation != BI)
    return SideBySide(title, truth, box, panels)


def draw(comparison: SideBySide, stacked: bool = False) -> Figure:
    """Draw the whole image with its box, and the crops: beside it, or in two columns below it for a narrow screen."""
    title, whole, box, panels = comparison
    side = 2.2  # inches: a crop's height
    crop_width, whole_width = side * box.width / box.height, side * whole.shape[1] / whole.shape[0]
    if stacked:
        rows = 1 + (len(panels) + 1) // 2
        figure = Figure(figsize=(2 * crop_width + 0.3, rows * (side + 0.55)), dpi=150, layout="constrained")
        grid = figure.add_gridspec(rows, 2)
        places = [grid[0, :], *(grid[1 + k // 2, k % 2] for k in range(len(panels)))]
    else:
        rows = -(-len(panels) // IN_A_ROW)
        columns = -(-len(panels) // rows)
        width = whole_width + (crop_width + 0.1) * columns + 0.2
        figure = Figure(figsize=(width, rows * (side + 0.75)), dpi=150, layout="constrained")
        grid = figure.add_gridspec(rows, 1 + columns, width_ratios=[whole_width, *[crop_width] * columns])
        places = [grid[0, 0], *(grid[k // columns, 1 + k % columns] for k in range(len(panels)))]
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01)
    points = 72 * crop_width / 0.62  # of a letter that fills a crop's width
    shown = [(title, whole, ""), *((name, box.of(image), below) for name, image, below in panels)]
    for place, (name, image, below) in zip(places, shown, strict=True):
        axis = figure.add_subplot(place)
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        lines = wrap(printable(name), 28, max_lines=3, placeholder=" …") or [" "]
        axis.set_title("\n".join(lines), size=min(10.8, points / max(map(len, lines))), parse_math=False)
        axis.set_xlabel(below, size=min(9, points / max(1, len(below))))
    figure.axes[0].add_patch(Rectangle(box[:2], box.width, box.height, fill=False, color="red", linewidth=1.2))
    return figure


def save(figure: Figure, stem: Path, suffixes: Sequence[str] = (".png", ".pdf")) -> list[Path]:
    """Write a figure to stem.png and stem.pdf with `write_whole`; return the paths."""
    written = []
    for suffix in suffixes:
        path = stem.with_name(stem.name + suffix)
        write_whole(path, lambda partial, form=suffix[1:]: figure.savefig(partial, format=form))
        written.append(path)
    return written
