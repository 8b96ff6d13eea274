"""Comparison pictures: crops side by side, as in Fig. 7."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from drrn.disk import write_whole
from drrn.errors import UserError, printable
from drrn.images import read_luminance, read_pixels
from drrn.matlab import rgb2ycbcr, to_uint8, ycbcr2rgb
from drrn.protocol import degrade, modcrop, prepare, score

if TYPE_CHECKING:
    from drrn.report.report import ReportConfig

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


# The images of the paper's Fig. 7: set, file, scale, and a box
# around what the paper says of each (lines, pattern, text).
FIG7 = {
    "img059": ("Urban100", "img059.png", 3, Box(340, 300, 120, 80)),
    "253027": ("BSD100", "253027.jpg", 3, Box(190, 150, 90, 60)),
    "ppt3": ("Set14", "ppt3.bmp", 4, Box(30, 225, 120, 80)),
}


def side_by_side(
    path: Path,
    scale: int,
    networks: dict[str, Callable[[NDArray], NDArray]],
    box: Box | None = None,
) -> Figure:
    """A crop from the ground truth, bicubic and each network, PSNR and SSIM under each (Fig. 7's way).

    Colour is shown as the paper does: Y from the method, Cb and Cr by bicubic. The scores are those of the whole
    image's Y by the protocol.

    Args:
        path: an image of a benchmark set.
        scale: the scale to degrade and super-resolve it by.
        networks: name → function of the network's input [H, W] that returns its output.
        box: the region to enlarge; None takes the middle quarter of the image's sides.

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
    x, y_truth = prepare(y, scale)
    chroma = degrade(rgb2ycbcr(truth)[..., 1:] / 255.0, scale) if colour else None

    panels = [("ground truth", truth, "PSNR / SSIM")]
    for name, run in {"bicubic": lambda image: image, **networks}.items():
        prediction = run(x)
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


def compare(config: ReportConfig, records: list[dict[str, Any]], output: Path, prefix: str = "") -> list[Path]:
    """Crops side by side: of the image asked for, or of the last one that the runs were tested on.

    Returns:
        The files written; none if no run has got as far as its pictures.

    Raises:
        UserError: an image or the weights of a run are not there, or the box is not inside the image.
    """
    from drrn.inference import super_resolve
    from drrn.weights.ours import load_network

    tested = [record for record in records if record.get("scores")]
    if not config.compare and not tested:
        return []
    files = [Path(path) for path in config.checkpoint]
    files = files or [Path(record["path"]).with_name("weights.safetensors") for record in tested]
    loaded = {file: load_network(file) for file in files}
    names = {file: about.get("origin") or printable(file.stem) for file, (_, about) in loaded.items()}
    if len(set(names.values())) < len(names):  # two networks of one name: call them by their folders
        names = {file: printable(f"{file.parent.name}/{file.stem}") for file in files}
    networks = {names[file]: network for file, (network, _) in loaded.items()}
    path, scale, box = _chosen(config, tested)
    runs = {name: lambda x, network=network: super_resolve(network, x) for name, network in networks.items()}
    try:
        runs = {n: lambda x, y=y: y for n, y in _others(config.others, path, scale).items()} | runs
        figure = side_by_side(path, scale, runs, box)
    except ValueError as error:  # an image smaller than the scale or the metrics' windows
        raise UserError(f"{path} at ×{scale}: {error}") from error
    alike = any(other.stem == path.stem and other != path for other in path.parent.iterdir())
    written = save(figure, output / f"{prefix}{path.name if alike else path.stem}_x{scale}")  # a.png is not a.jpg
    print(f"written: {printable(', '.join(map(str, written)))}")
    return written


def _others(folders: dict[str, str], path: Path, scale: int) -> dict[str, NDArray[np.float64]]:
    """Name → Y [H, W] in 0…1 of what another program made of an image."""
    from drrn.sets import counterpart

    height, width = modcrop(read_luminance(path), scale).shape
    result = {}
    for name, folder in folders.items():
        made = counterpart(Path(folder), path.parent.name, path, scale, only_scale=True)
        y = modcrop(read_luminance(made), scale) / 255.0
        if y.shape != (height, width):
            raise UserError(f"others: {made} has {y.shape[1]}×{y.shape[0]} pixels; {width}×{height} are needed")
        result[printable(name)] = y
    return result


def _chosen(config: ReportConfig, tested: list[dict[str, Any]]) -> tuple[Path, int, Box | None]:
    """The image of a comparison, its scale and its box."""
    from drrn.sets import image_files

    box = Box(*config.box) if config.box else None
    if config.compare in FIG7:
        set_name, file, scale, preset = FIG7[config.compare]
        found = [p for p in image_files(set_name, Path(config.root), complete=False) if p.name == file]
        if not found:
            raise UserError(
                f"{file} of {set_name} is not under {config.root}: python src/prepare.py 'data.val=[{set_name}]'"
            )
        return found[0], config.scale or scale, box or preset
    if config.compare:
        if not Path(config.compare).is_file():
            raise UserError(f"compare = {config.compare!r}: no such file, and none of {', '.join(FIG7)}")
        return Path(config.compare), config.scale or 3, box
    last = tested[-1]["scores"][-1]
    files = image_files(tested[-1]["config"]["data"]["val"][-1], Path(config.root), complete=False)
    path = next((p for p in files if p.name == last["image"]), None)
    if path is None:
        raise UserError(f"{printable(last['image'])}, which the runs were tested on, is not under {config.root}")
    scales = sorted({row["scale"] for row in tested[-1]["scores"]})
    return path, config.scale or scales[len(scales) // 2], box


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
