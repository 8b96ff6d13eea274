"""The parts of a report: tables, studies with their figures, pictures, and the page that gathers them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drrn.errors import UserError, counted
from drrn.help import script
from drrn.metrics import METRICS
from drrn.paper import paper_numbers
from drrn.pictures import save
from drrn.protocol import departures
from drrn.report import OF_NETWORKS, STUDIES
from drrn.report.comparison import compare
from drrn.report.differences import differences_table
from drrn.report.figures import draw
from drrn.report.groups import RunGroup
from drrn.report.ledger import everything
from drrn.report.measurements import Measurement, from_record, from_scores
from drrn.report.networks import networks_table, table1
from drrn.report.page import Part, Picture, Section, svg, write_page
from drrn.report.structures import fig2
from drrn.report.studies import points_table, run_groups
from drrn.report.tables import Table, ablation_table, benchmark_table, runs_table, write_table

if TYPE_CHECKING:
    from drrn.report.report import ReportConfig


def write_report(config: ReportConfig, records: list[dict[str, Any]], command: str) -> None:
    """Write the requested studies, or else all that the records and scores allow, to files and to one page.

    The page shows `command`. A UserError if no run belongs to the requested studies, or a file cannot be read.
    """
    sections, refused = [], None
    if config.study:
        sections = [networks_section(study, config, records) for study in config.study if study in OF_NETWORKS]
        sections += study_sections([study for study in config.study if study in STUDIES], config, records)
    else:
        measured = [m for path in config.scores for m in from_scores(Path(path))]
        if records or measured:
            sections.append(Section("tables", "Tables", [tables_part(config, records, measured)]))
        if records:
            try:
                sections += study_sections(["runs"], config, records)
            except UserError as error:  # runs that do not compare still have their tables
                sections.append(Section("runs", "Runs", [Part("Not drawn", [], [str(error)])]))
        if records or config.compare:
            one_seed: dict[str, dict[str, Any]] = {}
            for run in records:
                one_seed.setdefault(run.get("experiment", run["path"]), run)
            try:
                if pictures := compare(config, records if config.compare else [*one_seed.values()]):
                    sections.append(Section("pictures", "Pictures", [Part("Crops side by side", [], pictures)]))
            except UserError as error:
                if config.compare or config.checkpoint or config.box or config.others:
                    refused = error  # the page is written all the same
                else:
                    print(f"no pictures: {error}", file=sys.stderr)
    if sections:
        page = Path(config.output) / "index.html"
        write_page(page, "DRRN: runs beside the paper", sections, command)
        print(f"written: {page}")
    if refused:
        raise refused


def tables_part(config: ReportConfig, records: list[dict[str, Any]], measured: list[Measurement]) -> Part:
    """Runs, Tables 2 and 3, other metrics and Table 4, as far as they were measured."""
    measured = [m for record in records for m in from_record(record)] + measured
    if not config.scores and len({departures(m.protocol) for m in measured}) > 1:
        measured = [m for m in measured if not departures(m.protocol)]
        print("only runs of the paper's protocol are compared with its numbers; the table of runs has all")
    tables = {"runs": runs_table(records)} if records else {}
    if config.scores or {m.set_name for m in measured} & {row["dataset"] for row in paper_numbers("table2")}:
        tables["table2"] = benchmark_table(measured, ("psnr", "ssim"), "table2")
    for name, metrics in (("table3", ["ifc"]), (None, [k for k in METRICS if k not in ("psnr", "ssim", "ifc")])):
        metrics = [k for k in metrics if any(k in m.values for m in measured)]
        having = [m for m in measured if any(k in m.values for k in metrics)]
        if having:
            tables[name or "metrics"] = benchmark_table(having, metrics, name)
    if any("_B3U4" in m.method or m.method.startswith("VDSR_d28") for m in measured):
        tables["table4"] = ablation_table(measured)
    for name, table in tables.items():
        write_table(table, Path(config.output) / name)
    return Part("Measurements", [], list(tables.values()))


def networks_section(study: str, config: ReportConfig, records: list[dict[str, Any]]) -> Section:
    """Write Fig. 2, Table 1 or the table of all networks to files; return its section of the page."""
    title, stem = OF_NETWORKS[study], Path(config.output) / study
    if study == "fig2":
        figure = fig2()
        files = [path.name for path in save(figure, stem)]
        print(f"written: {stem}.png, .pdf")
        said = "ResNet and VDSR have six different convolutions; DRCN and DRRN use some of theirs repeatedly."
        block = Picture(title, f"{title}. {said}", svg(figure), svg(fig2(stacked=True)), files)
    else:
        found = everything([Path(path) for path in config.scores], records)
        block = networks_table(found) if study == "networks" else table1(found, run_groups("fig1", records))
        write_table(block, stem)
    return Section(study, title, [Part("", blocks=[block])])


def study_sections(studies: list[str], config: ReportConfig, records: list[dict[str, Any]]) -> list[Section]:
    """Sections of the studies, drawn from the runs that belong to them; a UserError if no run does."""
    commands = {study: f"{script('train')} sweeps={STUDIES[study].sweep}" for study in studies}
    found = {study: run_groups(study, records) for study in studies}
    if studies and not any(found.values()):
        raise UserError(
            f"none of the {counted(len(records), 'run')} below {', '.join(map(str, config.runs))} belongs to "
            f"{', '.join(found)}; to run it: {', '.join(commands.values())}"
        )
    return [
        Section(study, STUDIES[study].title, [study_part(config, group, commands[study]) for group in groups],
                commands[study])
        for study, groups in found.items()
    ]  # fmt: skip


def study_part(config: ReportConfig, group: RunGroup, command: str) -> Part:
    """Write the figures, tables and pictures of one run group to files; return its part of the page."""
    output, origin = Path(config.output), [*group.origin(), group.summary()]
    if group.missing:
        origin.append(f"Missing: {', '.join(group.missing)}. To run them, give {command} with this recipe.")
    points, components = points_table(group), []
    if group.study == "table4" and group.finished:
        components = [ablation_table([m for run in group.finished for m in from_record(run)])]
        components[0].notes[:1] = group.origin()  # it names the protocol too
    write_table(components[0] if components else points, output / group.stem)
    pictures = _figures(group, output)
    points.notes = ["Each number links to the run's record."]
    blocks: list[Picture | Table | str] = [*pictures[:1], points, *pictures[1:], *components]
    if not pictures:
        blocks.append(f"Nothing to draw yet: no finished run was scored on the whole of {group.where()}.")
    if (gains := differences_table(group)) is not None:
        write_table(gains, output / f"{group.stem}-differences")
        blocks.append(gains)
    if group.finished and STUDIES[group.study].sweep:
        blocks.append(runs_table(group.finished))
    if group.tries:
        tries = ", ".join(f"{counted(max(other.steps), 'step')} (run group {other.digest})" for other in group.tries)
        blocks.append(f"Tries of this recipe, too short to be drawn: {tries}.")
    if group.study != "runs":
        deepest = max((run["structure"]["depth"] for run in group.finished), default=0)
        shown = [run for run in group.finished if run["structure"]["depth"] == deepest]
        try:
            blocks += compare(config, shown, f"{group.stem}-")
        except UserError as error:
            blocks.append(f"No pictures: {error}")
    return Part(f"{group.short()} (run group {group.digest})", origin, blocks)


def _figures(group: RunGroup, output: Path) -> list[Picture]:
    """The study's figure, and the learning curves of its runs."""
    title, pictures = STUDIES[group.study].title, []
    drawings = [(group.stem, title, group)]
    if STUDIES[group.study].curves:
        drawings.append((f"{group.stem}-curves", f"{title}: learning curves", replace(group, study="curves")))
    measured = [f"{point.name} {mean:.2f} dB" for point in group.points if (mean := point.mean()) is not None]
    said = f"{' '.join(group.origin())} Our means: {', '.join(measured)}."  # the alternative text
    for stem, name, shown in drawings:
        if (figure := draw(shown)) is not None:
            files = [path.name for path in save(figure, output / stem)]
            narrow = svg(draw(shown, stacked=True))
            pictures.append(Picture(name, f"{name}. {said}", svg(figure), narrow, files))
    return pictures
