"""One self-contained HTML page of a study: plan, figures, tables, pictures, links to the records.

No network, no script: style and images stand in the file, so that it can be opened from disk or sent to somebody.
"""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from drrn.disk import write_whole
from drrn.report.studies import STUDIES, Budget, paper_psnr
from drrn.report.tables import MISSING, Table, over_seeds

COMMANDS = {study: f"python src/train.py sweeps={content.sweep}" for study, content in STUDIES.items()}


@dataclass
class Picture:
    """A figure on the page: a wide and, where there is one, a narrow form, as data addresses."""

    title: str
    alt: str
    wide: str
    narrow: str | None
    files: list[str]  # the same figure as files, relative to the page


@dataclass
class Part:
    """What the page says of one study under one budget."""

    one: Budget
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def svg(figure: Figure) -> str:
    """A figure as the address of an SVG; its letters are shapes, so that it looks the same everywhere."""
    content = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "drrn"}):  # the same records, the same file
        figure.savefig(content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


def png(path: Path) -> str:
    """A PNG file as an address."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def relative(path: Path, page: Path) -> str:
    """The link from a page to a file, with slashes."""
    return Path(os.path.relpath(path, page.parent)).as_posix()


def rows(one: Budget, page: Path) -> list[dict[str, Any]]:
    """The plan's table: each point with its runs, each run with what became of it and a link to its record."""
    paper, result = paper_psnr(), []
    for point in one.points:
        cells, values = [], point.values()
        for seed in one.seeds:
            run, status = point.runs.get(seed), one.status(point, seed)
            cells.append(
                {
                    "text": f"{values[seed]:.2f}" if seed in values else status,
                    "status": status,
                    "link": relative(Path(run["path"]), page) if run else None,
                    "error": run.get("error") if run and status == "failed" else None,
                }
            )
        result.append(
            {
                "point": point,
                "cells": cells,
                "mean": over_seeds([values[seed] for seed in sorted(values)], "psnr"),
                "paper": paper.get((point.variant, point.model["B"], point.model["U"]), MISSING),
            }
        )
    return result


def summary(one: Budget) -> str:
    """How much of the plan is there: "18 of 20 runs finished, 1 failed, 1 missing"."""
    states = Counter(one.status(point, seed) for point in one.points if point.planned for seed in one.seeds)
    if not states:
        return f"{len(one.finished)} finished runs."
    others = [f"{count} {status}" for status, count in sorted(states.items()) if status != "finished"]
    return ", ".join([f"{states['finished']} of {sum(states.values())} runs finished", *others]) + "."


def alt(one: Budget) -> str:
    """What a figure shows, for those who do not see it."""
    measured = [f"{point.name} {mean:.2f} dB" for point in one.points if (mean := point.mean()) is not None]
    return f"{STUDIES[one.study].title}. {' '.join(one.face())} Our means: {', '.join(measured)}."


def write_page(page: Path, parts: list[Part], absent: list[str], command: str) -> None:
    """Write the page.

    Args:
        page: its file.
        parts: the studies in order, each under each of its budgets.
        absent: the studies that no run belongs to.
        command: what made it.
    """
    templates = Environment(
        loader=PackageLoader("drrn.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    studies = {part.one.study: [p for p in parts if p.one.study == part.one.study] for part in parts}
    text = templates.get_template("page.html").render(
        studies=studies, titles={study: content.title for study, content in STUDIES.items()}, absent=absent,
        commands=COMMANDS, command=command, rows=lambda one: rows(one, page), summary=summary,
    )  # fmt: skip
    write_whole(page, lambda partial: partial.write_text(text, encoding="utf-8"))
