"""Differences between networks, paired over images: the mean, its bootstrap interval, the spread over seeds."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from drrn.errors import signed
from drrn.paper import printed
from drrn.report.groups import PLACE, Place, Point, RunGroup, in_paper
from drrn.report.measurements import MISSING, set_size
from drrn.report.tables import Table

# The comparisons of Sec. 4.5, at equal depth: (better in the paper, worse) → the component that differs.
CLAIMS = {
    ("DRRN_NS", "VDSR"): "local residuals",
    ("DRRN", "DRRN_NS"): "recursive",
    ("DRRN", "DRRN_C"): "multi-path",
    ("DRRN_NS", "DRRN_NS_C"): "multi-path",
}
RESAMPLES = 10_000


def interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval of the mean of paired differences [images].

    Images are resampled, each with its pair. The random generator has a fixed seed.
    """
    drawn = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(differences[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def image_psnr(point: Point, place: Place) -> dict[int, dict[str, float]]:
    """Seed → image (sorted by name) → PSNR in dB, of the finished runs that were scored on the whole set."""
    result = {}
    for run in point.finished():
        rows = {row["image"]: row["psnr"] for row in run.get("scores", ()) if (row["set"], row["scale"]) == place}
        whole = len(rows) == set_size(place[0], len(rows))
        if rows and whole and all(map(math.isfinite, rows.values())):
            result[run["seed"]] = dict(sorted(rows.items()))
    return result


def most_images(group: RunGroup) -> Place | None:
    """The largest set, with a scale, on which every finished point was scored; ×3 before other scales."""
    points = [point for point in group.points if point.finished()]
    scored = [{(r["set"], r["scale"]) for run in p.finished() for r in run.get("scores", ())} for p in points]
    common = set.intersection(*scored) if scored else set()

    def images(place: Place) -> tuple:
        return len(next(iter(image_psnr(points[0], place).values()))), place[1] == PLACE[1], place

    return max((place for place in common if all(image_psnr(p, place) for p in points)), key=images, default=None)


def pairs(group: RunGroup) -> list[tuple[Point, Point, str]]:
    """Pairs of points to compare, each with what it shows; the first point is expected to be better."""
    points = [point for point in group.points if point.finished()]
    if group.study in ("fig8", "table4"):
        return [
            (a, b, what)
            for (first, second), what in CLAIMS.items()
            for a in points
            for b in points
            if (a.variant, b.variant) == (first, second) and a.depth == b.depth
        ]
    if group.study == "fig6":  # deeper at B = 3 and at U = 3
        rows = [sorted((p for p in points if p.model[key] == 3), key=lambda p: p.depth) for key in "BU"]
        return [(b, a, what) for row, what in zip(rows, "UB", strict=True) for a, b in pairwise(row)]
    ranked = sorted((p for p in points if p.values()), key=lambda p: -(p.mean() or 0))
    return [(ranked[0], other, "the best") for other in ranked[1:]]


def differences_table(group: RunGroup) -> Table | None:
    """Each pair's difference with its 95 % interval over images, its spread over seeds, and the paper's difference.

    None if the runs have no common set of at least three images.
    """
    place = most_images(group)
    paper, rows = printed(*PLACE), []
    for a, b, what in pairs(group) if place else ():
        first, second = image_psnr(a, place), image_psnr(b, place)
        images = {tuple(run) for run in (*first.values(), *second.values())}  # their names
        if len(images) > 1 or len(min(images)) < 3:
            continue
        x, y = ({seed: np.array([*run.values()]) for seed, run in runs.items()} for runs in (first, second))
        gains = np.mean([*x.values()], 0) - np.mean([*y.values()], 0)
        low, high = interval(gains)
        seeds = [(x[seed] - y[seed]).mean() for seed in x if seed in y]
        spread = f"±{np.std(seeds, ddof=1):.3f} ({len(seeds)})" if len(seeds) > 1 else MISSING
        theirs = [float(paper[name]["psnr"]) for p in (a, b) if (name := in_paper(p.model)) in paper]
        claimed = signed(theirs[0] - theirs[1], 2) if len(theirs) == 2 else MISSING
        least, most = min([low, *seeds]), max([high, *seeds])  # the images and every seed have to show it
        order = "first better" if least > 0 else "second better" if most < 0 else "not distinguished"
        between = f"{signed(low, 3)} to {signed(high, 3)}"
        rows.append([f"{a.name} − {b.name}", what, signed(gains.mean(), 3), between, spread, claimed, order])
    if not rows:
        return None
    columns = ["difference", "shows", "dB", "95 % over images", "over seeds", "paper", "order"]
    note = (
        f"Paired bootstrap over the {len(gains)} images of {place[0]} ×{place[1]}, {RESAMPLES:,} samples, means over "
        "seeds. Over seeds: the sample standard deviation of their differences, and how many. Better: the interval "
        "and each seed's difference are on one side of 0. The paper's: Set5 ×3."
    )
    return Table("Differences of PSNR between networks", columns, rows, [note])
