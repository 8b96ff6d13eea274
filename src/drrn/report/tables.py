"""The paper's tables beside ours. A table is a title, columns and rows of text: printed, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drrn.degradations import BI
from drrn.disk import write_whole
from drrn.errors import UserError, signed
from drrn.metrics import METRICS
from drrn.paper import paper_numbers
from drrn.protocol import departures, describe
from drrn.report.measurements import MISSING, Measurement, by_method, one_protocol, over_seeds, set_size

# Structures with another name in the paper; the second is Kim's own VDSR, whose numbers Table 2 cites.
IN_PAPER = {"VDSR_d20_64f": "VDSR", "VDSR_d20_64f_noBN_noinputReLU": "VDSR"}
VARIANTS = ("VDSR", "DRRN_NS_C", "DRRN_NS", "DRRN_C", "DRRN")  # Table 4's, from the plainest to the paper's
SWITCHES = ("local_residual", "recursive", "multi_path")  # Table 4's columns
IN_LATEX = {"×": r"$\times$", "±": r"$\pm$", "−": "$-$", "–": "--", "✓": r"\checkmark"}


class Cell(str):
    """A cell that the page links to a file or marks as bad."""

    path: Path | None = None
    bad: bool = False
    error: str | None = None


@dataclass
class Table:
    """A table of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    keys: int = 1  # number of leading columns that identify a row
    blocks: list[int] | None = None  # sizes of the blocks of other columns that stay together; None: 1 each

    def pieces(self, width: int) -> list[tuple[list[str], list[list[str]]]]:
        """Columns and rows, split to fit a terminal of `width` characters; each part has the key columns."""
        cells = [[*head.split(), *column] for head, *column in zip(self.columns, *self.rows, strict=True)]
        sizes = [3 + max(map(len, column)) for column in cells]  # a heading may be broken between its words
        parts: list[list[int]] = [[]]
        left = self.keys
        for count in self.blocks or [1] * (len(sizes) - left):
            block, left = range(left, left + count), left + count
            if parts[-1] and 1 + sum(sizes[k] for k in (*range(self.keys), *parts[-1], *block)) > width:
                parts.append([])
            parts[-1] += block
        lines = [self.columns, *self.rows]
        cut = [[[*line[: self.keys], *(line[k] for k in part)] for line in lines] for part in parts]
        return [(columns, rows) for columns, *rows in cut]

    def markdown(self) -> str:
        """GitHub's Markdown."""
        lines = [f"**{self.title}**", "", f"| {' | '.join(self.columns)} |"]
        lines.append("|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(self.columns))) + "|")
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes), ""])

    def csv(self) -> str:
        """Comma-separated values, a header and the rows."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def latex(self) -> str:
        """A `tabular` in a `table`, for the booktabs package."""

        def tidy(text: str) -> str:
            text = re.sub(r"([&%$#_{}])", r"\\\1", text)
            return "".join(IN_LATEX.get(sign, sign) for sign in text)

        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{tidy(' '.join([self.title, *self.notes]))}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
            r"\toprule",
            " & ".join(map(tidy, self.columns)) + r" \\",
            r"\midrule",
            *(" & ".join(map(tidy, row)) + r" \\" for row in self.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join([*lines, ""])


def write_table(table: Table, stem: Path) -> None:
    """Print a table and write it as Markdown, CSV and LaTeX."""
    from rich.console import Console
    from rich.table import Table as Printed

    console = Console(markup=False)
    for number, (columns, rows) in enumerate(table.pieces(console.width)):
        printed = Printed(title=None if number else table.title)
        for index, column in enumerate(columns):
            printed.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in rows:
            printed.add_row(*row)
        console.print(printed)
    console.print("\n".join(table.notes))
    for suffix, text in ((".md", table.markdown()), (".csv", table.csv()), (".tex", table.latex())):
        write_whole(stem.with_name(stem.name + suffix), text)
    print(f"written: {stem}.md, .csv, .tex\n")


def benchmark_table(measurements: list[Measurement], metrics: Sequence[str], name: str | None = None) -> Table:
    """Means of every method by set and scale; for Table 2 and Table 3 with the paper's numbers and the differences.

    A measured method has all the sets and scales of the paper; a number that we have not measured, or that the
    paper does not print, is shown as missing. `name` is "table2", "table3", or None for metrics of no table.
    """
    protocol = one_protocol(measurements)
    groups, rows = by_method(measurements), paper_numbers(name) if name and _as_the_paper(protocol) else []
    paper = {(r["method"], r["dataset"], int(r["scale"])): r for r in rows}  # all with bicubic degradation
    methods = {IN_PAPER.get(method, method) for method, _ in groups}
    known = bool((methods - {"Bicubic"} or methods) & {method for method, *_ in paper})
    places = list(dict.fromkeys((d, s) for _, d, s in paper)) if known else []
    places = list(dict.fromkeys([*places, *(p for cells in groups.values() for p in cells)]))
    columns, blocks = ["set", "scale"], []
    rows = [[set_name, f"×{scale}"] for set_name, scale in places]
    for (method, heading), cells in groups.items():
        method = IN_PAPER.get(method, method)
        quoted = any(method == cited for cited, _, _ in paper)
        columns += [f"{method} paper", f"{heading} ours", "difference"] if quoted else [heading]
        blocks.append(3 if quoted else 1)
        for row, place in zip(rows, places, strict=True):
            cell = _cell(cells.get(place, []), place[0], metrics, paper.get((method, *place)))
            row += cell if quoted else cell[1:2]
    title = f"Table {name[-1]}: " * known + " / ".join(k.upper() for k in metrics) if name else _titles(metrics)
    return Table(title, columns, rows, _notes(protocol, groups), 2, blocks)


def _as_the_paper(protocol: dict[str, Any]) -> bool:
    """Whether the low resolution is made as in the paper; otherwise the paper's numbers do not apply."""
    return protocol.get("degradation", BI) == BI


def _cell(
    measured: list[Measurement], set_name: str, metrics: Sequence[str], printed: dict[str, str] | None
) -> list[str]:
    """The paper's number, ours, and the difference."""
    paper = " / ".join(printed[k] for k in metrics) if printed else MISSING
    ours = {k: [m.values[k] for m in measured if k in m.values] for k in metrics}
    if not all(ours.values()):
        return [paper, MISSING, MISSING]
    shown = " / ".join(over_seeds(ours[k], k) for k in metrics)
    images = sorted({m.images for m in measured})
    whole = set_size(set_name, images[-1])
    if images != [whole]:  # a mean over a part of a set does not compare with one over the whole
        return [paper, f"{shown} ({', '.join(map(str, images))} of {whole} images)", MISSING]
    differences = [
        signed(statistics.fmean(ours[k]) - float(printed[k]), METRICS[k].digits) for k in metrics if printed
    ]
    return [paper, shown, " / ".join(differences) or MISSING]


def _titles(metrics: Sequence[str]) -> str:
    return " / ".join("PSNR (dB)" if k == "psnr" else k.upper() for k in metrics)


def _notes(protocol: dict[str, Any], groups: dict) -> list[str]:
    most = max(len(ms) for cells in groups.values() for ms in cells.values())
    spread = [f"± is the sample standard deviation over up to {most} seeds."] if most > 1 else []
    return [f"Measured by {describe(protocol)}.", *spread]


def ablation_table(measurements: list[Measurement]) -> Table:
    """Table 4: the components turned on and off at B3U4, Set5 ×3: paper, ours, difference.

    A network of another width than 128 features has a row under its own name, without a difference.
    """
    protocol = one_protocol(measurements)
    groups = by_method(measurements)
    paper = {r["method"]: r for r in paper_numbers("table4")}
    rows = []
    for variant in VARIANTS:
        row = paper[variant]
        prefix = "VDSR_d28" if variant == "VDSR" else f"{variant}_B3U4"
        switches = ["✓" if row[k] == "true" else "×" for k in SWITCHES]
        ours = [(m, h, c) for (m, h), c in groups.items() if m == prefix or m.startswith(f"{prefix}_")]
        for method, heading, cells in ours or [(prefix, variant, {})]:
            printed = row if method == prefix and _as_the_paper(protocol) else None
            cell = _cell(cells.get(("Set5", 3), []), "Set5", ("psnr",), printed)
            rows.append([heading, *switches, row["psnr"], *cell[1:]])
    columns = ["method", "local residual", "recursive", "multi-path", "paper", "ours", "difference"]
    return Table("Table 4: components at B3U4 (PSNR, Set5 ×3)", columns, rows, _notes(protocol, groups))


def runs_table(records: list[dict[str, Any]]) -> Table:
    """The runs: depth, weights, steps, and every metric for every set and scale.

    Bicubic has a row for each protocol, so that a run can be compared with bicubic on its own degradation.
    """
    finished = [r for r in records if r.get("means")]
    if not finished:
        raise UserError("none of the runs has finished: there are no scores to show")
    places = list(dict.fromkeys((row["set"], row["scale"]) for r in finished for row in r["means"]))
    metrics = [k for k in METRICS if any(k in row for r in finished for row in r["means"])]
    names = [record["name"] for record in finished]
    lines: list[list[Any]] = []  # name, depth, weights, steps, scores by place
    bicubic: dict[str, dict[tuple[str, int], str]] = {}  # by `departures` of the protocol

    def cell(row: dict[str, Any], prefix: str = "") -> str:
        return " / ".join(over_seeds([row[prefix + k]] if prefix + k in row else [], k) for k in metrics)

    for record in finished:
        name = record["name"] if names.count(record["name"]) == 1 else Path(record["path"]).parent.name
        structure, other = record["structure"], departures(record["protocol"])
        said = ", ".join(["stopped"] * (record.get("status") == "stopped") + [other] * bool(other))
        counts = [structure["depth"], f"{structure['conv_weights']:,}", f"{record['budget']['steps']:,}"]
        scores = {(row["set"], row["scale"]): row for row in record["means"]}
        lines.append([f"{name} ({said})" if said else name, *counts, {p: cell(row) for p, row in scores.items()}])
        bicubic.setdefault(other, {}).update({p: cell(row, "bicubic_") for p, row in scores.items()})
    above = [[f"bicubic ({other})" if other else "bicubic", "", "0", "", cells] for other, cells in bicubic.items()]
    rows = [[*map(str, words), *(cells.get(p, MISSING) for p in places)] for *words, cells in above + lines]
    return Table(_titles(metrics), ["run", "depth", "weights", "steps", *(f"{s} ×{k}" for s, k in places)], rows)
