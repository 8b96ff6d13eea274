"""Fig. 6, Fig. 8 and Table 4 from a study's runs, beside the paper's points; figures of any runs; learning curves.

Every figure states its origin (`RunGroup.origin`). The paper shows some points in a picture only, without a number:
they are marked without a value. Panels are side by side, or one below the other for a narrow screen (`stacked`).
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
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from drrn.paper import paper_numbers
from drrn.report.canvas import AT_THE_RIGHT, COLOURS, GREY, MARKERS, canvas, in_psnr, limits, name_points
from drrn.report.groups import PLACE, Point, RunGroup
from drrn.report.methods import fig1, fig9
from drrn.report.tables import SWITCHES, VARIANTS


def draw(group: RunGroup, stacked: bool = False) -> Figure | None:
    """A study's figure of one run group; None if no finished run has the scores that it shows."""
    if group.study != "curves" and not any(point.values() for point in group.points):
        return None
    figure = DRAWINGS[group.study](group, stacked)
    if figure is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # final: saving each file would compute it again
    return figure


def _beside_the_paper(group: RunGroup, stacked: bool, height: float = 3.6) -> tuple[Figure, Axes, Axes]:
    """A figure with the paper's panel and ours."""
    figure, (paper, ours) = canvas(group, 2, stacked, height)
    paper.set_title("the paper: 128 features", size=9)
    ours.set_title(textwrap.fill(f"ours: {group.short()}", 34), size=9)
    return figure, paper, ours


def fig6(group: RunGroup, stacked: bool) -> Figure:
    """The B–U plane, points coloured by PSNR, contours of the depth d = (1 + 2U)·B + 1 at 10, 20, 30 and 50."""
    figure, paper, ours = _beside_the_paper(group, stacked)
    printed = [(int(r["B"]), int(r["U"]), float(r["psnr"]) if r["psnr"] else None) for r in paper_numbers("fig6")]
    _plane(paper, printed, "only in its picture")
    _plane(ours, [(p.model["B"], p.model["U"], p.mean()) for p in group.points], "not measured")
    return figure


def _plane(axis: Axes, points: list[tuple[int, int, float | None]], without: str) -> None:
    ranges = []
    axis.set(xscale="log", yscale="log", xlabel="B, recursive blocks", ylabel="U, residual units in a block")
    for scale, values, usual in (
        (axis.xaxis, {b for b, _, _ in points}, (1, 2, 3, 4, 8, 17)),
        (axis.yaxis, {u for _, u, _ in points}, (1, 2, 3, 4, 9, 25)),
    ):
        ticks = sorted(values if values - set(usual) else usual)
        scale.set_ticks(ticks, list(map(str, ticks)))
        scale.set_ticks([], minor=True)
        ranges.append((0.8 * ticks[0], 1.4 * ticks[-1]))
    (left, right), (bottom, top) = ranges
    axis.set(xlim=(left, right), ylim=(bottom, top))
    B = np.geomspace(left, right, 200)
    for depth in (10, 20, 30, 50):
        U = ((depth - 1) / B - 1) / 2  # Eq. 7
        axis.plot(B[bottom < U], U[bottom < U], color="#a0a0a0", linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        at = min(2.2 if depth == 10 else 5.6, 0.6 * right)  # where the paper has no point
        if bottom < (there := ((depth - 1) / at - 1) / 2) < top:
            axis.text(at, there, f"d = {depth}", size=6.8, color=GREY, ha="center", va="center", zorder=1.5,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
    if unknown := [(b, u) for b, u, psnr in points if psnr is None]:
        axis.scatter(
            *zip(*unknown, strict=True), s=42, facecolors="white", edgecolors=GREY, linewidths=0.9,
            linestyles=(0, (2, 1.5)), zorder=2, label=without,
        )  # fmt: skip
        axis.legend(loc="upper right", fontsize=7, frameon=False, handletextpad=0.2)
    if known := [point for point in points if point[2] is not None]:
        _coloured(axis, known)


def _coloured(axis: Axes, points: list[tuple[int, int, float]]) -> None:
    """Points of the plane coloured by PSNR, a colour bar, and the value beside each point."""
    B, U, psnr = zip(*points, strict=True)
    room = max(0.005, (0.1 - (max(psnr) - min(psnr))) / 2)  # in a range below 0.1 dB, noise would look large
    drawn = axis.scatter(B, U, c=psnr, s=58, cmap="viridis", zorder=3, vmin=min(psnr) - room, vmax=max(psnr) + room,
                         edgecolors="#222222", linewidths=0.7)  # fmt: skip
    bar = axis.get_figure().colorbar(drawn, ax=axis, pad=0.02, aspect=28)
    in_psnr(bar.ax)
    bar.ax.yaxis.label.set_size(7.5)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_linewidth(0.5)
    left, right, above, below = (-6, 0), (6, 0), (0, 6), (0, -6)
    for b, u, value in points:  # the dense rows and columns of B = 3 and U = 3 leave these places free
        x, y = {2: below, 3: below if u == 3 or (2, u) in zip(B, U, strict=True) else left, 4: right}.get(b, above)
        ha, va = {-6: "right", 0: "center", 6: "left"}[x], {-6: "top", 0: "center", 6: "bottom"}[y]
        axis.annotate(f"{value:.2f}", (b, u), xytext=(x, y), textcoords="offset points", ha=ha, va=va, size=7,
                      zorder=2.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3})  # fmt: skip


def fig8(group: RunGroup, stacked: bool) -> Figure:
    """PSNR by depth: one line per variant through the means over seeds, one small point per seed."""
    figure, paper, ours = _beside_the_paper(group, stacked)
    printed = [row for row in paper_numbers("fig8") if row["psnr"]]
    for index, name in enumerate(VARIANTS):
        offset = 0.32 * (index - 2)  # so that equal values do not hide each other
        style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 6.5, "label": name}
        line = sorted((int(row["depth"]) + offset, float(row["psnr"])) for row in printed if row["method"] == name)
        if line:
            paper.plot(*zip(*line, strict=True), linewidth=1, linestyle=":", **style)
        _by_depth(ours, [point for point in group.points if point.variant == name], offset, style)
    for axis in (paper, ours):
        axis.set_xticks([16, 22, 28], ["16\nB3U2", "22\nB3U3", "28\nB3U4"])
        axis.set(xlim=(14.2, 29.8), xlabel="depth d", ymargin=0.15)
        in_psnr(axis)
    paper.legend(fontsize=7.5, frameon=False, loc="upper left")  # the right is taken: every variant is at d = 28
    return figure


def _by_depth(axis: Axes, points: list[Point], offset: float, style: dict[str, object]) -> None:
    """A line through the means, and a small point for each seed if there are several."""
    points = sorted((point for point in points if point.values()), key=lambda point: point.depth)
    if points:
        axis.plot([p.depth + offset for p in points], [p.mean() for p in points], linewidth=1.4, **style)
    for point in points:
        values = list(point.values().values())
        if len(values) > 1:
            axis.scatter([point.depth + offset] * len(values), values, s=9, color=style["color"], alpha=0.75,
                         linewidths=0)  # fmt: skip


def table4(group: RunGroup, stacked: bool) -> Figure:
    """The five variants at B3U4 from the plainest to DRRN, paper and ours each on its own scale."""
    figure, paper, ours = _beside_the_paper(group, stacked, height=2.7)
    rows = {row["method"]: row for row in paper_numbers("table4")}
    labels = [f"{name}\n" + " ".join("✓" if rows[name][key] == "true" else "–" for key in SWITCHES)
              for name in VARIANTS]  # fmt: skip
    measured = {point.variant: list(point.values().values()) for point in group.points}
    for place, name in enumerate(VARIANTS):
        seeds = measured.get(name)
        if seeds:
            ours.scatter(seeds, [place] * len(seeds), s=10, color=COLOURS[name], alpha=0.75, linewidths=0)
        else:
            ours.text(0.5, place, "not measured", transform=ours.get_yaxis_transform(), size=7.5, color=GREY,
                      ha="center", va="center")  # fmt: skip
        means = [(paper, float(rows[name]["psnr"])), *([(ours, statistics.fmean(seeds))] if seeds else [])]
        for axis, mean in means:
            axis.plot([mean], [place], color=COLOURS[name], marker=MARKERS[name], markersize=7, linestyle="none")
            axis.annotate(f"{mean:.2f}", (mean, place), xytext=(0, 7), textcoords="offset points", ha="center",
                          size=7.5)  # fmt: skip
    for axis in (paper, ours):
        axis.set_yticks(range(len(VARIANTS)), labels if stacked or axis is paper else [""] * len(VARIANTS), size=7.5)
        axis.set(ylim=(len(VARIANTS) - 0.5, -0.7), xmargin=0.15)
        in_psnr(axis, "x")
    paper.text(0, 1.02, "local residual · recursive · multi-path", transform=paper.transAxes, ha="right", size=6.5,
               color=GREY)  # fmt: skip
    return figure


def own(group: RunGroup, stacked: bool) -> Figure:
    """All runs: PSNR by depth as in Fig. 8, and a B–U plane as in Fig. 6 for each family that varies both."""
    families: dict[str, list[Point]] = defaultdict(list)
    for point in group.points:
        if point.values():
            families[point.family].append(point)
    planes = {name: points for name, points in families.items()
              if all(len({point.model.get(key) for point in points}) > 1 for key in "BU")}  # fmt: skip
    figure, (first, *rest) = canvas(group, 1 + len(planes), stacked)
    colours = mpl.colormaps["tab10"].colors
    for index, (name, points) in enumerate(sorted(families.items())):
        style = {"color": COLOURS.get(name, colours[index % 10]), "marker": MARKERS.get(name, "o"), "markersize": 6}
        lines = defaultdict(list)
        for point in points:  # one line per B, as in Fig. 8
            lines[point.model.get("B") if point.model.get("U") else None].append(point)
        for number, line in enumerate(lines.values()):
            _by_depth(first, line, 0, {**style, "label": None if number else name})
    values = [psnr for point in group.points for psnr in point.values().values()]
    first.set(xlabel="depth d", xmargin=0.12, ylim=limits(values))
    first.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    in_psnr(first)
    first.legend(fontsize=7, frameon=False)
    for axis, (name, points) in zip(rest, planes.items(), strict=True):
        _plane(axis, [(p.model["B"], p.model["U"], p.mean()) for p in points], "not measured")
        axis.set_title(name, size=9)
    return figure


def curve(run: dict, place: tuple[str, int] = PLACE) -> tuple[list[int], list[float]]:
    """A run's learning curve on a set and scale: patches seen and mean PSNR in dB, one item per validation."""
    rows = defaultdict(list)
    for row in run.get("validation", ()):
        if (row["set"], row["scale"]) == place and math.isfinite(row["psnr"]):
            rows[row["step"]].append(row["psnr"])
    whole = max(map(len, rows.values()), default=0)
    steps = [step for step in sorted(rows) if len(rows[step]) == whole]
    batch = run["config"]["data"]["batch_size"]
    return [step * batch for step in steps], [statistics.fmean(rows[step]) for step in steps]


def curves(group: RunGroup, stacked: bool) -> Figure | None:
    """PSNR by patches seen: one panel per variant, one line per run, coloured by depth."""
    lines = [(point, *curve(run, group.place)) for point in group.points for run in point.finished()]
    lines = [line for line in lines if len(line[1]) > 1]
    if not lines:
        return None
    shown = list(dict.fromkeys(point.variant for point, *_ in lines))
    shown.sort(key=[*VARIANTS, *shown].index)
    title = f"Learning curves ({group.where()}), ours: {group.short()}"
    figure, axes = canvas(group, len(shown), stacked, 3.4, title=title)
    depths = [point.depth for point, *_ in lines]
    norm = mpl.colors.Normalize(min(depths), max(max(depths), min(depths) + 1))
    colour_of = mpl.colormaps["viridis"]
    bicubic = {row["bicubic_psnr"] for run in group.finished for row in run["means"]
               if (row["set"], row["scale"]) == group.place}  # fmt: skip
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
            level = min(bicubic)
            axis.axhline(level, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
            axis.annotate("bicubic", (0, level), xytext=(2, 2), textcoords="offset points", size=6.5, color=GREY)
        axis.set(xlim=(0, longest * 1.22), ylim=(lowest, highest), xlabel="patches seen")
        axis.set_title(name, size=9)
        in_psnr(axis)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.locator_params(axis="x", nbins=5)
        named[axis] = [(x, statistics.fmean(y), point.short, "#333333") for x, y, point in ends.values()]
    name_points(figure, named, AT_THE_RIGHT)
    return figure


DRAWINGS = {"fig6": fig6, "fig8": fig8, "table4": table4, "fig1": fig1, "fig9": fig9, "curves": curves, "runs": own}
