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
from urllib.parse import quote

import matplotlib as mpl
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from drrn.disk import write_whole
from drrn.paper import paper_psnr
from drrn.report.groups import RunGroup
from drrn.report.measurements import MISSING, over_seeds
from drrn.report.studies import STUDIES
from drrn.report.tables import Table

COMMANDS = {study: f"python src/train.py sweeps={content.sweep}" for study, content in STUDIES.items()}


@dataclass
class Picture:
    """A figure on the page: a wide and, where there is one, a narrow form, as data addresses."""

    title: str
    alt: str
    wide: str
    narrow: str | None
    files: list[str]  # the same figure as files, beside the page


@dataclass
class Part:
    """What the page says of one run group."""

    group: RunGroup
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


def link(path: Path, page: Path) -> str:
    """The address of a file from a page: relative, and quoted, so that no name is taken for a scheme or a query."""
    return quote(os.fsencode(Path(os.path.relpath(path, page.parent)).as_posix()))


def rows(group: RunGroup, page: Path) -> list[dict[str, Any]]:
    """The plan's table: each point with its runs, each run with what became of it and a link to its record."""
    paper, result = paper_psnr(), []
    for point in group.points:
        cells, values = [], point.values()
        for seed in group.seeds:
            run, status = point.runs.get(seed), point.status(seed)
            cells.append(
                {
                    "text": over_seeds([values[seed]], "psnr") if seed in values else status,
                    "status": status,
                    "link": link(Path(run["path"]), page) if run else None,
                    "error": run.get("error") if run and status == "failed" else None,
                }
            )
        mean = over_seeds([values[seed] for seed in sorted(values)], "psnr")
        printed = paper.get((point.variant, point.model.get("B"), point.model.get("U")), MISSING)
        result.append({"point": point, "cells": cells, "mean": mean, "paper": printed})
    return result


def summary(group: RunGroup) -> str:
    """How much of the plan is there: "18 of 20 runs finished, 1 failed, 1 missing"."""
    states = Counter(point.status(seed) for point in group.points if point.planned for seed in group.seeds)
    if not states:
        return f"{len(group.finished)} finished runs."
    others = [f"{count} {status}" for status, count in sorted(states.items()) if status != "finished"]
    return ", ".join([f"{states['finished']} of {sum(states.values())} runs finished", *others]) + "."


def alt(group: RunGroup) -> str:
    """What a figure shows, for those who do not see it."""
    measured = [f"{point.name} {mean:.2f} dB" for point in group.points if (mean := point.mean()) is not None]
    return f"{STUDIES[group.study].title}. {' '.join(group.origin())} Our means: {', '.join(measured)}."


def write_page(page: Path, parts: list[Part], absent: list[str], command: str) -> None:
    """Write the page.

    Args:
        page: its file.
        parts: the studies in order, each with each of its run groups.
        absent: the studies that no run belongs to.
        command: what made it.
    """
    templates = Environment(
        loader=PackageLoader("drrn.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    studies = {part.group.study: [p for p in parts if p.group.study == part.group.study] for part in parts}
    text = templates.get_template("page.html").render(
        studies=studies, titles={study: content.title for study, content in STUDIES.items()}, absent=absent,
        commands=COMMANDS, command=command, rows=lambda group: rows(group, page), summary=summary,
        link=lambda name: link(page.with_name(name), page),
    )  # fmt: skip
    write_whole(page, lambda partial: partial.write_text(text, encoding="utf-8"))
