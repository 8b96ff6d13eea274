"""Shared parts of the figures: panels with a title and an origin, axis limits, labels of points."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from matplotlib.transforms import Bbox

from drrn.report import STUDIES
from drrn.report.groups import RunGroup

# Okabe and Ito's colour-blind-safe palette; the paper's blue, green, cyan and red where the palette has them.
COLOURS = {"VDSR": "#0072B2", "DRRN_NS": "#009E73", "DRRN_C": "#56B4E9", "DRRN_NS_C": "#CC79A7", "DRRN": "#D55E00"}
MARKERS = {"VDSR": "s", "DRRN_NS": "^", "DRRN_C": "D", "DRRN_NS_C": "v", "DRRN": "o"}
GREY = "#6b6b6b"


def canvas(
    group: RunGroup, panels: int, stacked: bool, height: float = 3.6, handles: Sequence[Line2D] = (), title: str = ""
) -> tuple[Figure, list[Axes]]:
    """A figure with a title (the study's) above its panels, and a legend and the run group's origin below them."""
    title = title or f"{STUDIES[group.study].title} ({group.where()})"
    columns = 1 if stacked or panels == 1 else 2
    rows = math.ceil(panels / columns)
    width = 4.3 if stacked else 8.6
    origin = "\n".join(line for text in group.origin() for line in textwrap.wrap(text, int(width * 15.5)))
    head = "\n".join(textwrap.wrap(title, int(width * 11)))
    top, bottom = 0.18 * (head.count("\n") + 1) + 0.12, 0.145 * (origin.count("\n") + 1) + 0.14  # inches
    room = 0.15 * math.ceil(len(handles) / columns) + 0.1 * bool(handles)  # of the legend
    total = height * rows + top + room + bottom
    figure = Figure(figsize=(width, total), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(
        rect=(0, (room + bottom) / total, 1, 1 - (top + room + bottom) / total), w_pad=0.08, h_pad=0.08
    )
    figure.text(0.1 / width, 1 - 0.08 / total, head, va="top", size=10.5, weight="bold")
    figure.text(0.1 / width, 0.07 / total, origin, va="bottom", size=7.5, color="#333333", linespacing=1.3)
    if handles:
        corner = (0.02 / width, (bottom - 0.05) / total)
        figure.legend(handles=handles, ncols=columns, loc="lower left", bbox_to_anchor=corner, fontsize=7,
                      frameon=False, labelspacing=0.35, handletextpad=0.2, borderaxespad=0)  # fmt: skip
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[panels:]:
        empty.remove()
    axes = axes[:panels]
    for axis in axes:
        axis.grid(True, color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


AROUND = [(side * x, 3 * y) for side in (1, -1) for x in (7, 16, 28) for y in range(-16, 17)]  # offsets of labels
AT_THE_RIGHT = [(7, -y) for y in range(150)]  # only downwards: labels keep the points' order


def name_points(
    figure: Figure,
    named: dict[Axes, list[tuple[float, float, str, str]]],
    places: Sequence[tuple[float, float]] = AROUND,
) -> None:
    """Label points (x, y, text, colour), x and y in data coordinates, each at the nearest offset that hides nothing,
    inside its panel if there is room.

    A point with an empty text gets no label, and labels do not cover it. More labels than `AT_THE_RIGHT` has room for
    are left out, the lowest first. Call this after the axes' limits are set.
    """
    figure.draw_without_rendering()  # so that the layout is settled
    unit = figure.dpi / 72  # pixels in a point
    steps = sorted(places, key=lambda step: (abs(step[0]) + abs(step[1]), step[0] < 0))
    for axis, points in named.items():
        whole = axis.get_window_extent()
        inside = Bbox.from_extents(whole.x0, whole.y0, whole.x1 + 4 * unit, whole.y1)
        centres = axis.transData.transform([point[:2] for point in points])
        taken = [Bbox.from_extents(*(centre - 3 * unit), *(centre + 3 * unit)) for centre in centres]
        crowded = places is AT_THE_RIGHT and len(points) * 9 * unit > whole.height
        for x, y, text, colour in sorted((point for point in points if point[2]), key=lambda point: -point[1]):
            name = axis.annotate(
                text, (x, y), xytext=steps[0], textcoords="offset points", va="center", size=6.8, color=colour,
                arrowprops={"arrowstyle": "-", "color": "#b0b0b0", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
                annotation_clip=False,
            )  # fmt: skip
            name.get_window_extent()  # sets its transform; below, only the text's own extent is used
            for bounded, step in itertools.product((True,) if crowded else (True, False), steps):
                name.set_position(step)
                name.set_horizontalalignment("left" if step[0] > 0 else "right")
                box = Text.get_window_extent(name)
                fits = not bounded or all(map(inside.contains, (box.x0, box.x1), (box.y0, box.y1)))
                if fits and not box.count_overlaps(taken):
                    break
            else:
                if crowded:
                    name.remove()
                    continue
            taken.append(box)


def limits(values: Iterable[float], share: float = 0.18) -> tuple[float, float]:
    """Limits of an axis: the values' range, widened by a share of it at both ends."""
    values = list(values)
    room = max((max(values) - min(values)) * share, 0.02)
    return min(values) - room, max(values) + room


def in_psnr(axis: Axes, which: str = "y") -> None:
    """Format an axis for PSNR in dB: tick labels are complete, without a common offset beside the axis."""
    scale = getattr(axis, f"{which}axis")
    scale.set_label_text("PSNR (dB)")
    scale.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    scale.set_major_formatter(ScalarFormatter(useOffset=False))
