"""The paper's tables beside ours, from run records and evaluation files alone.

Both kinds of file are flattened into *measurements*: the mean of one method on one set at one scale. A table is
a title, columns and rows of text, rendered as Markdown, CSV or LaTeX.
"""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drrn.errors import UserError
from drrn.home import DATA
from drrn.protocol import means
from drrn.sets import registered_sets

PAPER = DATA / "paper"
MISSING = "–"  # a cell that nobody has measured
# Structures that the paper calls otherwise; the second is Kim's own VDSR, whose numbers Table 2 cites.
IN_PAPER = {"VDSR_d20_64f": "VDSR", "VDSR_d20_64f_noBN_noinputReLU": "VDSR"}
DIGITS = {"psnr": 2, "ssim": 4, "ifc": 3}


def paper_numbers(name: str) -> list[dict[str, str]]:
    """The rows of data/paper/<name>.csv: "table2", "table3", "table4", "fig1", "fig6", "fig8", "fig9"."""
    with (PAPER / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@dataclass
class Measurement:
    """The mean of one run's network (or of bicubic) over one set at one scale."""

    method: str  # the structure's name ("DRRN_B1U9") or "Bicubic"
    seed: int | None
    steps: int | None  # optimiser steps of its training; None where the file does not say
    set_name: str
    scale: int
    images: int
    values: dict[str, float]
    protocol: dict[str, Any]
    source: str
    experiment: str | None = None  # what seeds may be averaged over: equal for runs that differ by their seed alone


def from_record(record: dict[str, Any]) -> list[Measurement]:
    """Measurements of one finished run, bicubic's included."""
    result = []
    for row in record.get("means", ()):
        place = (row["set"], row["scale"], row["images"])
        steps = record["budget"]["steps"]
        ours = {k: row[k] for k in DIGITS if k in row}
        bicubic = {k: row[f"bicubic_{k}"] for k in DIGITS if f"bicubic_{k}" in row}
        common = (record["protocol"], record["path"])
        name, experiment = record["structure"]["name"], record.get("experiment", record["path"])
        result.append(Measurement(name, record["seed"], steps, *place, ours, *common, experiment))
        result.append(Measurement("Bicubic", None, None, *place, bicubic, *common))
    return result


def from_scores(path: Path) -> list[Measurement]:
    """Measurements of an evaluation file.

    Raises:
        UserError: the file is not one that src/evaluate.py wrote.
    """
    try:
        content = json.loads(path.read_text())
        about = {m["weights"]: m for m in content["methods"]}
        return [
            Measurement(
                about[row["weights"]]["structure"],
                about[row["weights"]]["seed"],
                about[row["weights"]]["steps"],
                row["set"],
                row["scale"],
                row["images"],
                {k: row[k] for k in DIGITS if k in row},
                content["protocol"],
                str(path),
                about[row["weights"]]["experiment"],
            )
            for row in means(content["scores"])
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of scores that src/evaluate.py wrote ({error!r})") from error


def one_protocol(measurements: list[Measurement]) -> dict[str, Any]:
    """The protocol that all measurements share.

    Raises:
        UserError: they do not share one; numbers of two protocols do not compare.
    """
    first = measurements[0]
    for other in measurements[1:]:
        if other.protocol != first.protocol:
            raise UserError(
                f"{first.source} was measured with the protocol {first.protocol} and {other.source} with "
                f"{other.protocol}: their numbers do not compare. Report them apart."
            )
    return first.protocol


@dataclass
class Table:
    """A table of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

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
            for sign, command in (
                ("×", r"$\times$"),
                ("±", r"$\pm$"),
                ("−", "$-$"),
                ("–", "--"),
                ("✓", r"\checkmark"),
            ):
                text = text.replace(sign, command)
            return text

        rows = [" & ".join(map(tidy, row)) + r" \\" for row in self.rows]
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{tidy(' '.join([self.title, *self.notes]))}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
                r"\toprule",
                " & ".join(map(tidy, self.columns)) + r" \\",
                r"\midrule",
                *rows,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


def over_seeds(values: list[float], metric: str) -> str:
    """One value, or mean ± sample standard deviation over several seeds; "–" for none."""
    if not values:
        return MISSING
    digits = DIGITS[metric]
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean}±{statistics.stdev(values):.{digits}f}"


def signed(difference: float, digits: int) -> str:
    """A difference with its sign, a true minus."""
    text = f"{difference:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def _group(measurements: list[Measurement]) -> dict[tuple[str, str], dict[tuple[str, int], list[Measurement]]]:
    """(method, heading) → (set, scale) → measurements, one for each seed.

    Only runs of one experiment are averaged. Where a method was trained in several ways, the headings end in
    the digest of the experiment, which its run's folder and record name too.
    """
    keys = dict.fromkeys((m.method, m.steps, m.experiment) for m in measurements)
    groups: dict = defaultdict(lambda: defaultdict(list))
    for m in measurements:
        heading = m.method if m.steps is None else f"{m.method}, {m.steps:,} steps"
        if sum(key[:2] == (m.method, m.steps) for key in keys) > 1:
            heading += f" [{m.experiment}]"
        cell = groups[m.method, heading][m.set_name, m.scale]
        if all(m.seed != other.seed for other in cell):
            cell.append(m)
    return groups


def _part(cell: list[Measurement], set_name: str) -> str:
    """What to say of means over a part of a set, which do not compare with means over the whole; else ""."""
    counted = sorted({m.images for m in cell})
    whole = registered_sets().get(set_name, counted[-1])
    return "" if counted == [whole] else f" ({', '.join(map(str, counted))} of {whole} images)"


def benchmark_table(measurements: list[Measurement], name: str, metrics: tuple[str, ...]) -> Table:
    """Table 2 (`name` "table2", PSNR and SSIM) or Table 3 ("table3", IFC): paper, ours, difference.

    Every cell of the paper for the methods that we have measured is there; one that we have not measured, or
    the paper does not have, is shown as missing.
    """
    protocol = one_protocol(measurements)
    groups = _group(measurements)
    paper = {(r["method"], r["dataset"], int(r["scale"])): r for r in paper_numbers(name)}
    known = any(m.set_name in registered_sets() for m in measurements)
    places = list(dict.fromkeys((d, s) for _, d, s in paper)) if known else []
    places = list(dict.fromkeys([*places, *(p for cells in groups.values() for p in cells)]))
    columns = ["set", "scale"]
    for method, heading in groups:
        columns += [f"{IN_PAPER.get(method, method)} paper", f"{heading} ours", "difference"]
    rows = []
    for set_name, scale in places:
        row = [set_name, f"×{scale}"]
        for (method, _), cells in groups.items():
            printed = paper.get((IN_PAPER.get(method, method), set_name, scale))
            ours = {k: [m.values[k] for m in cells.get((set_name, scale), []) if k in m.values] for k in metrics}
            row.append(" / ".join(printed[k] for k in metrics) if printed else MISSING)
            if not all(ours.values()):
                row += [MISSING, MISSING]
                continue
            shown = " / ".join(over_seeds(ours[k], k) for k in metrics)
            if part := _part(cells[set_name, scale], set_name):
                row += [shown + part, MISSING]
                continue
            row.append(shown)
            differences = (
                signed(statistics.fmean(ours[k]) - float(printed[k]), DIGITS[k]) for k in metrics if printed
            )
            row.append(" / ".join(differences) or MISSING)
        rows.append(row)
    title = f"Table {name[-1]}: " * known + " / ".join(k.upper() for k in metrics)
    notes = [f"Measured by {describe(protocol)}.", *_seed_note(groups)]
    return Table(title, columns, rows, notes)


def describe(protocol: dict[str, Any]) -> str:
    """A protocol in words, its departures from the paper named: "protocol paper v1, but rounding=float"."""
    usual = {"crop": None, "color": "y", "rounding": "uint8"}
    extra = [f"{key}={protocol[key]}" for key, value in usual.items() if protocol[key] != value]
    return f"protocol {protocol['name']} v{protocol['version']}" + (f", but {', '.join(extra)}" if extra else "")


def _seed_note(groups: dict) -> list[str]:
    most = max((len(ms) for cells in groups.values() for ms in cells.values()), default=1)
    return [f"± is the sample standard deviation over up to {most} seeds."] if most > 1 else []


def ablation_table(measurements: list[Measurement]) -> Table:
    """Table 4: the components turned on and off at B3U4, Set5 ×3: paper, ours, difference.

    Networks of other widths stand in for the 128-feature ones under their own names, and are not compared.
    """
    protocol = one_protocol(measurements)
    groups = _group(measurements)
    variants = ("VDSR", "DRRN_NS_C", "DRRN_NS", "DRRN_C", "DRRN")
    paper = {r["method"]: r for r in paper_numbers("table4")}
    tick = {"true": "✓", "false": "×"}
    rows = []
    for variant in variants:
        row = paper[variant]
        prefix = "VDSR_d28" if variant == "VDSR" else f"{variant}_B3U4"
        switches = [tick[row[k]] for k in ("local_residual", "recursive", "multi_path")]
        ours = [(m, h, c) for (m, h), c in groups.items() if m == prefix or m.startswith(f"{prefix}_")]
        if not ours:
            rows.append([variant, *switches, row["psnr"], MISSING, MISSING])
        for method, heading, cells in ours:
            cell = [m for m in cells.get(("Set5", 3), []) if "psnr" in m.values]
            values = [m.values["psnr"] for m in cell]
            part = _part(cell, "Set5") if cell else ""
            compares = values and not part and method == prefix
            difference = signed(statistics.fmean(values) - float(row["psnr"]), 2) if compares else MISSING
            rows.append([heading, *switches, row["psnr"], over_seeds(values, "psnr") + part, difference])
    columns = ["method", "local residual", "recursive", "multi-path", "paper", "ours", "difference"]
    notes = [f"Measured by {describe(protocol)}.", *_seed_note(groups)]
    return Table("Table 4: components at B3U4 (PSNR, Set5 ×3)", columns, rows, notes)


def runs_table(records: list[dict[str, Any]]) -> Table:
    """What was run: structure, depth, weights, budget, and PSNR/SSIM beside bicubic for every set and scale."""
    finished = [r for r in records if r.get("means")]
    if not finished:
        raise UserError("none of the runs has finished: there are no scores to show")
    places = list(dict.fromkeys((row["set"], row["scale"]) for r in finished for row in r["means"]))
    columns = ["run", "depth", "weights", "steps", *(f"{s} ×{k}" for s, k in places)]

    def cell(row: dict[str, Any], prefix: str) -> str:
        return f"{row[prefix + 'psnr']:.2f} / {row[prefix + 'ssim']:.4f}"

    names = [record["name"] for record in finished]
    rows, bicubic = [], {}
    for record in finished:
        name = record["name"] if names.count(record["name"]) == 1 else Path(record["path"]).parent.name
        scores = {(row["set"], row["scale"]): row for row in record["means"]}
        structure = record["structure"]
        rows.append(
            [
                name + (" (stopped)" if record.get("status") == "stopped" else ""),
                str(structure["depth"]),
                f"{structure['conv_weights']:,}",
                f"{record['budget']['steps']:,}",
                *(cell(scores[p], "") if p in scores else MISSING for p in places),
            ]
        )
        bicubic |= {p: cell(row, "bicubic_") for p, row in scores.items()}
    rows.insert(0, ["bicubic", "", "0", "", *(bicubic[p] for p in places)])
    return Table("PSNR (dB) / SSIM", columns, rows)
