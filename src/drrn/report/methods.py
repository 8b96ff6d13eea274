"""Fig. 1 and Fig. 9: the paper's methods and ours, by weights and by depth."""

from __future__ import annotations

import math
import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from drrn.paper import paper_numbers
from drrn.report import STUDIES
from drrn.report.canvas import COLOURS, GREY, canvas, in_psnr, limits, name_points
from drrn.report.groups import PLACE, Place, Point, RunGroup

BLUE = "#0072B2"
BELOW = 7.0  # dB below the paper's lowest point; our points below that are listed, not drawn
DRRN_WEIGHTS = 297_000  # as the paper prints them: "297K" in data/paper/fig1.csv
OTHERS = {"shallow": "#7b5ea7", "deep": "#009E73"}  # Fig. 9's groups; the very deep ones are grey
Named = list[tuple[float, float, str, str]]  # points of `name_points`


def depth_marker(depth: float) -> str:
    """Fig. 1's marker: a triangle below 5 layers, a star at about 20, a circle from 30."""
    if depth < 5:
        return "^"
    return "*" if depth < 30 else "o"


def fig1(group: RunGroup, stacked: bool) -> Figure:
    """PSNR against weights (log) and against depth: the paper's methods and ours on the same axes."""
    shapes = [("^", "fewer than 5 layers"), ("*", "8 to 29 layers"), ("o", "30 layers and more")]
    others = [("s", GREY, "other methods, as the paper cites them"), *((m, "#444444", text) for m, text in shapes)]
    figure, (by_weights, by_depth) = canvas(group, 2, stacked, 4.0, whose(group, others))
    rows = paper_numbers("fig1")
    named = {
        by_weights: _methods(by_weights, rows, "weights", group, PLACE),
        by_depth: _methods(by_depth, rows, "depth", group, PLACE),
    }
    low, high = limits([math.log10(x) for x, *_ in named[by_weights]], 0.14)
    by_weights.set(xscale="log", xlim=(10**low, 10**high), xlabel="k, convolution weights")
    by_weights.set_title("PSNR by weights", size=9)
    by_depth.set(xlim=(0, max(x for x, *_ in named[by_depth]) * 1.12), xlabel="depth d")
    by_depth.set_title("PSNR by depth", size=9)
    name_points(figure, named)
    return figure


def fig9(group: RunGroup, stacked: bool) -> Figure:
    """PSNR of shallow methods (no network), deep and very deep networks by depth, on Set5 and Set14 ×3."""
    others = [
        ("*", GREY, "other very deep networks"),
        ("^", OTHERS["deep"], "deep networks"),
        ("P", OTHERS["shallow"], "shallow methods"),
    ]
    figure, axes = canvas(group, 2, stacked, 4.0, whose(group, others), STUDIES["fig9"].title)
    named = {}
    for axis, set_name in zip(axes, ("Set5", "Set14"), strict=True):
        rows = [row for row in paper_numbers("fig9") if row["dataset"] == set_name]
        named[axis] = _methods(axis, rows, "depth", group, (set_name, 3))
        axis.axvspan(-10, -1, color="#f2f2f2", zorder=0)
        axis.set(xlim=(-10, 60), xlabel="layers (none: no network)")
        axis.set_xticks([-5, 3, 10, 20, 30, 40, 52], ["none", "3", "10", "20", "30", "40", "52"])
        axis.set_title(f"{set_name} ×3", size=9)
    name_points(figure, named)
    return figure


def _x(row: dict[str, str], what: str) -> int | None:
    """Depth (−5 without a network), or weights, which the paper prints as a multiple of `DRRN_WEIGHTS`."""
    if what == "weights":
        return DRRN_WEIGHTS * int(row["times_drrn_weights"]) if row["times_drrn_weights"] else None
    if row.get("group") == "shallow":
        return -5
    return int(row["depth"]) if row["depth"] else None


def _methods(axis: Axes, rows: list[dict[str, str]], what: str, group: RunGroup, place: Place) -> Named:
    """Draw the paper's methods and ours by "weights" or "depth"; return the points to label."""
    named, absent, elsewhere = [], [], set()
    for row in rows:
        x, printed = _x(row, what), row["psnr"] or row.get("psnr_elsewhere")
        if x is None or not printed:
            absent.append(row["method"])
            continue
        drrn, psnr = row["method"].startswith("DRRN"), float(printed)
        colour = COLOURS["DRRN"] if drrn else OTHERS.get(row.get("group"), GREY)
        _mark(axis, x, psnr, "P" if row.get("group") == "shallow" else depth_marker(int(row["depth"])), colour)
        if not row["psnr"]:
            elsewhere.add(row["source"])
        named.append((x, psnr, row["method"] + "†" * (not row["psnr"]), "#a34700" if drrn else "#444444"))
    measured = [(point, psnr) for point in group.points if (psnr := point.mean(place)) is not None]
    floor = min((y for _, y, *_ in named), default=0.0) - BELOW
    low = [f"{point.short} {psnr:.2f} dB" for point, psnr in measured if psnr < floor]
    for point, psnr in measured:
        if psnr >= floor:
            _mark(axis, getattr(point, what), psnr, depth_marker(point.depth), BLUE, ours=point)
            named.append((getattr(point, what), psnr, point.short if point.planned else "", BLUE))
    axis.set_ylim(*limits([y for _, y, *_ in named], 0.2))
    in_psnr(axis)
    notes = [f"only in the paper's picture: {', '.join(absent)}"] if absent else []
    notes += [f"† from the {source}" for source in sorted(elsewhere)]
    notes += [f"ours, below the axis: {', '.join(low)}"] if low else []
    notes += [] if measured else ["ours: not measured on this set"]
    text = "\n".join(textwrap.fill(note, 50) for note in notes)
    axis.text(0.99, 0.012, text, size=6.2, color=GREY, ha="right", transform=axis.transAxes)
    return named


def _mark(axis: Axes, x: float, y: float, marker: str, colour: str, ours: Point | None = None) -> None:
    size = (9 if marker in "*P" else 6) * (0.7 if ours and not ours.planned else 1)
    axis.plot([x], [y], marker=marker, markersize=size, color=colour, linestyle="none",
              markerfacecolor="white" if ours else colour, markeredgewidth=1.1 if ours else 0.6)  # fmt: skip


def whose(group: RunGroup, others: list[tuple[str, str, str]]) -> list[Line2D]:
    """Legend entries: the paper's DRRN, ours, and `others` (marker, colour, text)."""

    def entry(marker: str, colour: str, label: str, **more: object) -> Line2D:
        style = {"linestyle": "none", "markersize": 6, "marker": marker, "color": colour, "label": label}
        return Line2D([], [], **style | more)

    handles = [
        entry("s", COLOURS["DRRN"], "the paper's DRRN"),
        entry("s", BLUE, f"ours: {group.short()}", markerfacecolor="white"),
    ]
    if any(point.values() and not point.planned for point in group.points):
        beside = "ours, structures beside B1U9 and B1U25"
        handles.append(entry("s", BLUE, beside, markerfacecolor="white", markersize=4))
    return handles + [entry(*other) for other in others]
