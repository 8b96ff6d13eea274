"""What the figures share: panels with a title and an origin, axes' limits, names beside points."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from drrn.report.groups import RunGroup


def canvas(
    title: str, group: RunGroup, panels: int, stacked: bool, height: float = 3.6, handles: list[Line2D] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with a title above its panels, and a legend and the run group's origin below them."""
    columns = 1 if stacked or panels == 1 else 2
    rows = math.ceil(panels / columns)
    width = 4.3 if stacked else 8.6
    origin = "\n".join(line for text in group.origin() for line in textwrap.wrap(text, int(width * 15.5)))
    head = "\n".join(textwrap.wrap(title, int(width * 11)))
    top, bottom = 0.18 * (head.count("\n") + 1) + 0.12, 0.145 * (origin.count("\n") + 1) + 0.14  # inches
    room = 0.15 * math.ceil(len(handles or ()) / columns) + 0.1 * bool(handles)  # of the legend
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


def spread(values: list[float], gap: float) -> list[float]:
    """Positions as near to `values` as they can be at least `gap` apart, in their order."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[float]] = []  # [the middle that they would like, how many]
    for i in order:
        groups.append([values[i], 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (b, n), (a, m) = groups.pop(), groups.pop()
            groups.append([(a * m + b * n) / (m + n), m + n])
    places = [middle + gap * (k - (count - 1) / 2) for middle, count in groups for k in range(int(count))]
    result = [0.0] * len(values)
    for i, place in zip(order, places, strict=True):
        result[i] = place
    return result


def name_points(figure: Figure, named: dict[Axes, list[tuple[float, float, str, str]]]) -> None:
    """Names beside points (x, y, text, colour) in data coordinates, moved apart where they would overlap.

    Points close to each other in x share a column of names, to their right or to their left, whichever hides less.
    An empty text names nothing but keeps others' names off its point. Call it once the axes have their limits.
    """
    figure.draw_without_rendering()  # so that the layout is settled
    for axis, points in named.items():
        _name_points(axis, points)


def _name_points(axis: Axes, points: list[tuple[float, float, str, str]], size: float = 6.8) -> None:
    figure = axis.get_figure()
    box, unit = axis.get_window_extent(), figure.dpi / 72
    height, away = size * 1.25 * unit, 9 * unit
    places = [axis.transData.transform(point[:2]) for point in points]
    columns: list[list[int]] = []
    for i in sorted((i for i in range(len(points)) if points[i][2]), key=lambda i: places[i][0]):
        if columns and places[i][0] - places[columns[-1][0]][0] < 22 * unit:
            columns[-1].append(i)
        else:
            columns.append([i])
    taken = [(x - 4 * unit, x + 4 * unit, y - 4 * unit, y + 4 * unit) for x, y in places]  # left, right, low, high
    for column in columns:
        heights = spread([places[i][1] for i in column], height)
        shift = max(0, box.y0 + height - min(heights)) - max(0, max(heights) - box.y1 + height)
        choices = []
        for side in (1, -1):
            anchor = (max if side > 0 else min)(places[i][0] for i in column) + side * away
            names = []
            for i, y in zip(column, heights, strict=True):
                ends = sorted((anchor, anchor + side * len(points[i][2]) * size * 0.6 * unit))
                names.append((*ends, y + shift - height / 2, y + shift + height / 2))
            hidden = sum(a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3] for a in names for b in taken)
            outside = sum(left < box.x0 or right > box.x1 + 4 * unit for left, right, *_ in names)
            choices.append((hidden + 3 * outside, -side, anchor, names))
        _, side, anchor, names = min(choices)
        taken += names
        for i, (*_, low, high) in zip(column, names, strict=True):
            x, y = places[i]
            axis.annotate(
                points[i][2],
                points[i][:2],
                xytext=((anchor - x) / unit, ((low + high) / 2 - y) / unit),
                textcoords="offset points",
                ha="right" if side > 0 else "left",
                va="center",
                size=size,
                color=points[i][3],
                arrowprops={"arrowstyle": "-", "color": "#b0b0b0", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
                annotation_clip=False,
            )


def limits(values: Iterable[float], share: float = 0.18) -> tuple[float, float]:
    """An axis that holds values with room around them."""
    low, high = min(values := list(values)), max(values)
    room = max((high - low) * share, 0.02)
    return low - room, high + room
