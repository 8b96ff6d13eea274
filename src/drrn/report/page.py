"""One self-contained HTML page: figures, tables, pictures, links to the records.

It needs no network and no script: style and images are embedded, so it can be opened from disk or sent to somebody.
"""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import matplotlib as mpl
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from drrn.disk import write_whole
from drrn.report.tables import Table


@dataclass
class Picture:
    """A figure on the page, in a wide and perhaps a narrow form, as data URLs."""

    title: str
    alt: str
    wide: str
    narrow: str | None
    files: list[str]  # the same figure as files, beside the page


@dataclass
class Part:
    """The page's part about one run group or one table."""

    title: str
    origin: list[str] = field(default_factory=list)  # lines of `RunGroup.origin`
    blocks: list[Picture | Table | str] = field(default_factory=list)  # one below the other


@dataclass
class Section:
    """A study with its parts, and the command that runs its missing points."""

    name: str
    title: str
    parts: list[Part]
    command: str = ""


def svg(figure: Figure) -> str:
    """A figure as the data URL of an SVG; its letters are paths, so it looks the same everywhere."""
    content = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "drrn"}):  # equal records give equal files
        figure.savefig(content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


def png(path: Path) -> str:
    """A PNG file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_page(page: Path, title: str, sections: list[Section], command: str) -> None:
    """Write a page of sections, which shows `command`; a section without parts is listed as not run yet."""

    def link(path: Path) -> str:
        """A file's URL relative to the page, quoted, so that no name is parsed as a scheme or a query."""
        return quote(os.fsencode(Path(os.path.relpath(path, page.parent)).as_posix()))

    loader = PackageLoader("drrn.report", ".")
    template = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "page.html"
    )
    text = template.render(title=title, sections=sections, command=command, link=link, here=page.parent)
    write_whole(page, text)
