"""The paper's figures drawn from a study's runs, the paper's own points beside them (Fig. 1, 6, 8, 9, Tab. 4).

Every figure says what it was drawn from (`RunGroup.origin`). Points of the paper that stand only in its
pictures have no number and are not drawn as one. Each function draws panels side by side, or one below the other
for a narrow screen.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import defaultdict

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from drrn.paper import paper_numbers, paper_psnr
from drrn.report.canvas import canvas, limits, name_points
from drrn.report.groups import PLACE, Point, RunGroup
from drrn.report.studies import STUDIES
from drrn.report.tables import VARIANTS

# Okabe and Ito's palette, told apart by colour-blind eyes; the paper's blue, green, cyan and red where it has them.
COLOURS = {
    "VDSR": "#0072B2",
    "DRRN_NS": "#009E73",
    "DRRN_C": "#56B4E9",
    "DRRN_NS_C": "#CC79A7",
    "DRRN": "#D55E00",
}
MARKERS = {"VDSR": "s", "DRRN_NS": "^", "DRRN_C": "D", "DRRN_NS_C": "v", "DRRN": "o"}
OURS = "#0072B2"
GREY = "#6b6b6b"
WHERE = f"{PLACE[0]} ×{PLACE[1]}"


def draw(group: RunGroup, stacked: bool = False) -> Figure | None:
    """A study's figure of one run group; None where no finished run has what it shows.

    Args:
        group: the runs (`drrn.report.studies.run_groups`).
        stacked: panels one below the other, for a narrow screen.
    """
    if group.study != "curves" and not any(point.values() for point in group.points):
        return None
    drawings = {"fig6": fig6, "fig8": fig8, "table4": table4, "fig1": fig1, "fig9": fig9, "curves": curves}
    figure = drawings[group.study](group, stacked)
    if figure is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # settled: each of its files need not settle it again
    return figure


# ---------------------------------------------------------------- Fig. 6


def fig6(group: RunGroup, stacked: bool) -> Figure:
    """The B–U plane, points coloured by PSNR, contours of the depth d = (1 + 2U)·B + 1 at 10, 20, 30 and 50."""
    figure, (paper, ours) = canvas(f"{STUDIES['fig6'].title} ({WHERE})", group, 2, stacked)
    printed = [(int(r["B"]), int(r["U"]), float(r["psnr"]) if r["psnr"] else None) for r in paper_numbers("fig6")]
    _plane(paper, printed, "only in its picture")
    paper.set_title("the paper: 128 features", size=9)
    _plane(ours, [(p.model["B"], p.model["U"], p.mean()) for p in group.points], "not measured")
    ours.set_title(f"ours: {group.short()}", size=9)
    return figure


def _plane(axis: Axes, points: list[tuple[int, int, float | None]], without: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlim(0.85, 23)
    axis.set_ylim(0.8, 36)
    for scale, ticks in ((axis.xaxis, (1, 2, 3, 4, 8, 17)), (axis.yaxis, (1, 2, 3, 4, 9, 25))):
        scale.set_major_locator(FixedLocator(ticks))
        scale.set_minor_locator(NullLocator())
        scale.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axis.set_xlabel("B, recursive blocks")
    axis.set_ylabel("U, residual units in a block")
    B = np.geomspace(0.85, 23, 200)
    for depth in (10, 20, 30, 50):
        U = ((depth - 1) / B - 1) / 2
        axis.plot(B[U > 0.8], U[U > 0.8], color="#a0a0a0", linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        at = 2.2 if depth == 10 else 5.6  # where no point is
        axis.text(at, ((depth - 1) / at - 1) / 2, f"d = {depth}", size=6.8, color=GREY, ha="center", va="center",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6}, zorder=1.5)  # fmt: skip
    known = [point for point in points if point[2] is not None]
    unknown = [point for point in points if point[2] is None]
    if unknown:
        axis.scatter(
            *zip(*[point[:2] for point in unknown], strict=True), s=42, facecolors="white", edgecolors=GREY,
            linewidths=0.9, linestyles=(0, (2, 1.5)), zorder=2, label=without,
        )  # fmt: skip
        axis.legend(loc="upper right", fontsize=7, frameon=False, handletextpad=0.2)
    if known:
        B_known, U_known, psnr = zip(*known, strict=True)
        low, high = min(psnr), max(psnr)
        room = max(0.005, (0.1 - (high - low)) / 2)  # a bar of less than 0.1 dB would print one number many times
        drawn = axis.scatter(
            B_known, U_known, c=psnr, s=58, cmap="viridis", vmin=low - room, vmax=high + room,
            edgecolors="#222222", linewidths=0.7, zorder=3,
        )  # fmt: skip
        bar = axis.get_figure().colorbar(drawn, ax=axis, pad=0.02, aspect=28)
        bar.set_label("PSNR (dB)", size=7.5)
        bar.ax.tick_params(labelsize=7)
        bar.ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:.2f}"))
        bar.outline.set_linewidth(0.5)
    for b, u, value in known:
        left, right, above, below = (
            ((-6, 0), "right", "center"), ((6, 0), "left", "center"), ((0, 6), "center", "bottom"),
            ((0, -6), "center", "top"),
        )  # fmt: skip
        # The dense rows and columns of B = 3 and U = 3 leave these places free.
        offset, ha, va = {2: below, 3: below if u == 3 else left, 4: right}.get(b, above)
        axis.annotate(f"{value:.2f}", (b, u), xytext=offset, textcoords="offset points", ha=ha, va=va, size=7,
                      zorder=2.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3})  # fmt: skip


# ---------------------------------------------------------------- Fig. 8 and Table 4


def fig8(group: RunGroup, stacked: bool) -> Figure:
    """PSNR by depth, a line a variant through the means over seeds, each seed a small point."""
    figure, (paper, ours) = canvas(f"{STUDIES['fig8'].title} ({WHERE})", group, 2, stacked)
    printed = {}
    for (name, B, U), psnr in paper_psnr().items():
        depth = (1 + 2 * U) * B + 1
        if depth in (16, 22, 28) and (B == 3 or name == "VDSR"):
            printed[name, depth] = float(psnr)
    for index, name in enumerate(VARIANTS):
        style = {"color": COLOURS[name], "marker": MARKERS[name]}
        offset = 0.32 * (index - 2)  # so that equal values do not hide each other
        line = sorted((depth, psnr) for (other, depth), psnr in printed.items() if other == name)
        if line:
            depths, values = zip(*line, strict=True)
            paper.plot([d + offset for d in depths], values, markersize=6.5, linewidth=1, linestyle=":", label=name,
                       **style)  # fmt: skip
        points = sorted((p for p in group.points if p.variant == name and p.values()), key=lambda p: p.depth)
        if points:
            ours.plot(
                [p.depth + offset for p in points],
                [p.mean() for p in points],
                markersize=6.5,
                linewidth=1.4,
                **style,
            )
        for point in points:
            values = list(point.values().values())
            if len(values) > 1:
                ours.scatter(
                    [point.depth + offset] * len(values), values, s=9, color=COLOURS[name], alpha=0.75, linewidths=0
                )
    paper.set_title("the paper: 128 features (what it prints)", size=9)
    ours.set_title(f"ours: {group.short()}", size=9)
    for axis in (paper, ours):
        axis.set_xticks([16, 22, 28], ["16\nB3U2", "22\nB3U3", "28\nB3U4"])
        axis.set_xlim(14.2, 29.8)
        axis.set_xlabel("depth d")
        axis.set_ylabel("PSNR (dB)")
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:.2f}"))
        axis.margins(y=0.15)
    paper.legend(fontsize=7.5, frameon=False, loc="upper left")  # it prints every variant at d = 28, at the right
    return figure


def table4(group: RunGroup, stacked: bool) -> Figure:
    """The five variants at B3U4 from the plainest to DRRN, paper and ours each on its own scale."""
    figure, (paper, ours) = canvas(f"{STUDIES['table4'].title} ({WHERE})", group, 2, stacked, height=2.7)
    rows = {row["method"]: row for row in paper_numbers("table4")}
    mark = {"true": "✓", "false": "–"}
    keys = ("local_residual", "recursive", "multi_path")
    labels = [f"{name}\n" + " ".join(mark[rows[name][key]] for key in keys) for name in VARIANTS]
    points = {point.variant: point for point in group.points}
    for place, name in enumerate(VARIANTS):
        style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 7, "linestyle": "none"}
        values = [(paper, float(rows[name]["psnr"]))]
        seeds = list(points[name].values().values()) if name in points else []
        if seeds:
            values.append((ours, statistics.fmean(seeds)))
            ours.scatter(seeds, [place] * len(seeds), s=10, color=COLOURS[name], alpha=0.75, linewidths=0)
        else:
            ours.text(0.5, place, "not measured", transform=ours.get_yaxis_transform(), size=7.5, color=GREY,
                      ha="center", va="center")  # fmt: skip
        for axis, value in values:
            axis.plot([value], [place], **style)
            axis.annotate(f"{value:.2f}", (value, place), xytext=(0, 7), textcoords="offset points", ha="center",
                          size=7.5)  # fmt: skip
    paper.set_title("the paper: 128 features", size=9)
    ours.set_title(textwrap.fill(f"ours: {group.short()}", 34), size=9)
    for axis in (paper, ours):
        axis.set_yticks(range(len(VARIANTS)), labels if stacked or axis is paper else [""] * len(VARIANTS), size=7.5)
        axis.set_ylim(len(VARIANTS) - 0.5, -0.7)
        axis.set_xlabel("PSNR (dB)")
        axis.margins(x=0.15)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.2f}"))
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    paper.text(0, 1.02, "local residual · recursive · multi-path", transform=paper.transAxes, ha="right", size=6.5,
               color=GREY)  # fmt: skip
    return figure


# ---------------------------------------------------------------- Fig. 1 and Fig. 9


def count(printed: str) -> int:
    """297K → 297,000."""
    return round(float(printed.removesuffix("K")) * 1000)


def depth_marker(depth: float) -> str:
    """Fig. 1's: a triangle below 5 layers, a star at about 20, a circle from 30."""
    return "^" if depth < 5 else "*" if depth < 30 else "o"


def fig1(group: RunGroup, stacked: bool) -> Figure:
    """PSNR against weights (log) and against depth: the paper's methods and ours on the same axes."""
    shapes = [("^", "fewer than 5 layers"), ("*", "8 to 29 layers"), ("o", "30 layers and more")]
    others = [("s", GREY, "other methods, as the paper cites them"), *((m, "#444444", text) for m, text in shapes)]
    figure, (by_weights, by_depth) = canvas(
        f"{STUDIES['fig1'].title} ({WHERE})", group, 2, stacked, 4.0, whose(group, others)
    )
    unit = next(count(r["weights_printed"]) for r in paper_numbers("fig1") if r["weights_printed"])
    named: dict[Axes, list] = {by_weights: [], by_depth: []}
    absent: dict[Axes, list[str]] = {by_weights: [], by_depth: []}
    for row in paper_numbers("fig1"):
        weights = count(row["weights_printed"]) if row["weights_printed"] else None
        if weights is None and row["times_drrn_weights"]:
            weights = unit * int(row["times_drrn_weights"])
        depth = int(row["depth"]) if row["depth"] else None
        for axis, x in ((by_weights, weights), (by_depth, depth)):
            if x is None or not row["psnr"]:
                absent[axis].append(row["method"])
                continue
            colour = COLOURS["DRRN"] if row["method"].startswith("DRRN") else GREY
            _mark(axis, x, float(row["psnr"]), depth, colour)
            named[axis].append((x, float(row["psnr"]), row["method"], "#a34700" if colour != GREY else "#444444"))
    for point in group.points:
        if (psnr := point.mean()) is not None:
            for axis, x in ((by_weights, point.weights), (by_depth, point.depth)):
                _mark(axis, x, psnr, point.depth, OURS, ours=point)
                named[axis].append((x, psnr, point.short if point.planned else "", OURS))
    by_weights.set_xscale("log")
    by_weights.set_xlabel("k, convolution weights")
    by_depth.set_xlabel("depth d")
    for axis, without in absent.items():
        axis.set_ylim(*limits([y for _, y, *_ in named[axis]], 0.2))
        axis.set_ylabel("PSNR (dB)")
        axis.set_title("PSNR by weights" if axis is by_weights else "PSNR by depth", size=9)
        axis.text(0.01, 0.012, textwrap.fill(f"only in the paper's picture: {', '.join(without)}", 48), size=6.2,
                  color=GREY, transform=axis.transAxes)  # fmt: skip
    by_weights.set_xlim(*_log_limits([x for x, *_ in named[by_weights]]))
    by_depth.set_xlim(0, max(x for x, *_ in named[by_depth]) * 1.12)
    name_points(figure, named)
    return figure


def _mark(axis: Axes, x: float, y: float, depth: float, colour: str, ours: Point | None = None) -> None:
    marker = depth_marker(depth)
    size = (9 if marker == "*" else 6) * (0.7 if ours and not ours.planned else 1)
    axis.plot([x], [y], marker=marker, markersize=size, color=colour, linestyle="none",
              markerfacecolor="white" if ours else colour, markeredgewidth=1.1 if ours else 0.6)  # fmt: skip


def _log_limits(values: list[float]) -> tuple[float, float]:
    low, high = limits([math.log10(value) for value in values], 0.14)
    return 10**low, 10**high


def whose(group: RunGroup, others: list[tuple[str, str, str]]) -> list[Line2D]:
    """A legend: whose points, and other (marker, colour, text)."""
    entry = {"linestyle": "none", "markersize": 6}
    ours = entry | {"color": OURS, "markerfacecolor": "white"}
    handles = [
        Line2D([], [], marker="s", color=COLOURS["DRRN"], label="the paper's DRRN", **entry),
        Line2D([], [], marker="s", label=f"ours: {group.short()}", **ours),
    ]
    if any(point.values() and not point.planned for point in group.points):
        handles.append(
            Line2D([], [], marker="s", label="ours, structures beside B1U9 and B1U25", **ours | {"markersize": 4})
        )
    return handles + [
        Line2D([], [], marker=marker, color=colour, label=text, **entry) for marker, colour, text in others
    ]


def fig9(group: RunGroup, stacked: bool) -> Figure:
    """Shallow methods (no network), deep and very deep ones by depth, on Set5 and Set14 ×3."""
    colours = {"shallow": "#7b5ea7", "deep": "#009E73", "very deep": GREY}
    others = [
        ("*", GREY, "other very deep networks"),
        ("^", colours["deep"], "deep networks"),
        ("P", colours["shallow"], "shallow methods"),
    ]
    figure, axes = canvas(STUDIES["fig9"].title, group, 2, stacked, 4.0, whose(group, others))
    named: dict[Axes, list] = {axis: [] for axis in axes}
    for axis, set_name in zip(axes, ("Set5", "Set14"), strict=True):
        absent = []
        for row in (r for r in paper_numbers("fig9") if r["dataset"] == set_name):
            shallow = row["group"] == "shallow"
            if not row["psnr"] or not (row["depth"] or shallow):
                absent.append(row["method"])
                continue
            x, psnr = (-5 if shallow else int(row["depth"])), float(row["psnr"])
            colour = COLOURS["DRRN"] if row["method"].startswith("DRRN") else colours[row["group"]]
            axis.plot([x], [psnr], marker="P" if shallow else depth_marker(x), markersize=8, color=colour)
            named[axis].append((x, psnr, row["method"], "#a34700" if colour == COLOURS["DRRN"] else "#444444"))
        place = (set_name, int(row["scale"]))
        measured = [(point, psnr) for point in group.points if (psnr := point.mean(place)) is not None]
        for point, psnr in measured:
            _mark(axis, point.depth, psnr, point.depth, OURS, ours=point)
            named[axis].append((point.depth, psnr, point.short if point.planned else "", OURS))
        axis.axvspan(-10, -1, color="#f2f2f2", zorder=0)
        axis.set_xlim(-10, 60)
        axis.set_xticks([-5, 3, 10, 20, 30, 40, 52], ["none", "3", "10", "20", "30", "40", "52"])
        axis.set_ylim(*limits([y for _, y, *_ in named[axis]]))
        axis.set_xlabel("layers (none: no network)")
        axis.set_ylabel("PSNR (dB)")
        axis.set_title(f"{set_name} ×{place[1]}", size=9)
        notes = [f"only in the paper's picture: {', '.join(absent)}"]
        notes += [] if measured else ["ours: not measured on this set"]
        text = "\n".join(textwrap.fill(note, 50) for note in notes)
        axis.text(0.99, 0.012, text, size=6.2, color=GREY, ha="right", transform=axis.transAxes)
    name_points(figure, named)
    return figure


# ---------------------------------------------------------------- learning curves


def curve(run: dict) -> tuple[list[int], list[float]]:
    """Patches seen and mean PSNR of a run's validation on Set5 ×3, step by step."""
    rows = defaultdict(list)
    for row in run.get("validation", ()):
        if (row["set"], row["scale"]) == PLACE and math.isfinite(row["psnr"]):
            rows[row["step"]].append(row["psnr"])
    whole = max(map(len, rows.values()), default=0)
    steps = [step for step in sorted(rows) if len(rows[step]) == whole]
    batch = run["config"]["data"]["batch_size"]
    return [step * batch for step in steps], [statistics.fmean(rows[step]) for step in steps]


def curves(group: RunGroup, stacked: bool) -> Figure | None:
    """PSNR on Set5 ×3 by patches seen: a panel a variant, coloured by depth, a line a seed."""
    lines = [(point, *curve(run)) for point in group.points for run in point.finished()]
    lines = [line for line in lines if len(line[1]) > 1]
    if not lines:
        return None
    shown = list(dict.fromkeys(point.variant for point, *_ in lines))
    shown.sort(key=lambda name: VARIANTS.index(name) if name in VARIANTS else len(VARIANTS))
    figure, axes = canvas(f"Learning curves ({WHERE}), ours: {group.short()}", group, len(shown), stacked, height=3.4)
    depths = [point.depth for point, *_ in lines]
    norm = mpl.colors.Normalize(min(depths), max(max(depths), min(depths) + 1))
    colour_of = mpl.colormaps["viridis"]
    bicubic = {row["bicubic_psnr"] for run in group.finished for row in run["means"]
               if (row["set"], row["scale"]) == PLACE}  # fmt: skip
    named, longest = {}, max(x for _, patches, _ in lines for x in patches)
    lowest, highest = limits([y for *_, values in lines for y in values] + list(bicubic), 0.06)
    for axis, name in zip(axes, shown, strict=True):
        ends = {}
        for point, patches, psnr in lines:
            if point.variant == name:
                colour = colour_of(norm(point.depth) * 0.8)  # the lightest yellow does not show on white
                axis.plot(patches, psnr, color=colour, linewidth=1.2, marker=".", markersize=4, alpha=0.9)
                ends.setdefault(point.name, (patches[-1], [], point))[1].append(psnr[-1])
        if bicubic:
            axis.plot([0, longest], [min(bicubic)] * 2, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
            axis.annotate(
                "bicubic", (0, min(bicubic)), xytext=(2, 2), textcoords="offset points", size=6.5, color=GREY
            )
        axis.set_xlim(0, longest * 1.18)
        axis.set_ylim(lowest, highest)
        axis.set_title(name, size=9)
        axis.set_xlabel("patches seen")
        axis.set_ylabel("PSNR (dB)")
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.locator_params(axis="x", nbins=5)
        named[axis] = [(x, statistics.fmean(y), point.short, "#333333") for x, y, point in ends.values()]
    name_points(figure, named)
    return figure
