"""What `report.py` writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from drrn.disk import check_output
from drrn.errors import UserError
from drrn.schema import key, paths, typed

if TYPE_CHECKING:
    from drrn.report.groups import RunGroup
    from drrn.report.measurements import Measurement
    from drrn.report.page import Part, Picture, Section


NETWORKS = {  # what is about networks, not about runs
    "fig2": "Fig. 2: structures, drawn from the networks themselves",
    "table1": "Table 1: strategies of ResNet, VDSR, DRCN and DRRN",
    "networks": "Every network: weights, operations, time, memory, scores",
}


@dataclass
class ReportConfig:
    """What conf/report.yaml documents."""

    runs: Any = key("a folder of runs, or a list of them; null: none (study: runs)")
    study: Any = key("fig1, fig2, fig6, fig8, fig9, table1, table4, networks, curves, runs, or a list")
    scores: list[str] = key("files of src/evaluate.py")
    output: str = key("tables (.md, .csv, .tex), pictures, a study's index.html")
    compare: str | None = key("img059, 253027, ppt3 (Fig. 7), or the path of an image")
    scale: int | None = key("of the comparison; null: the preset's, else 3", at_least=2)
    box: list[int] | None = key("[left, top, width, height] of the enlarged part", at_least=0)
    checkpoint: list[str] = key("networks of the comparison; else those of the runs")
    others: Any = key("images of other programs beside them: {SelfEx: FOLDER}")
    root: str = key("where the sets are, or are downloaded to")
    ledger: bool = key("every number of the paper, and ours: ledger.csv, .md, .html", default=False)


def check(cfg: DictConfig) -> ReportConfig:
    """The configuration, refused by key before anything heavy is imported.

    Raises:
        UserError: a wrong key, type or value, or an output that cannot be written.
    """
    config = typed(ReportConfig, cfg)
    config.study = paths("study", config.study)
    needed = bool(set(config.study) - set(NETWORKS)) or (bool(config.study) and Path("runs").is_dir())
    config.runs = paths("runs", config.runs) or ["runs"] * needed
    if config.box is not None and len(config.box) != 4:
        raise UserError(f"box = {config.box}: four whole numbers, left, top, width, height")
    if not (config.runs or config.study or config.scores or config.compare or config.ledger):
        raise UserError(
            "nothing to report: give runs=FOLDER, scores=[FILE], study=NAME, compare=IMAGE or ledger=true"
        )
    if config.scores and set(config.study) - set(NETWORKS):
        raise UserError("scores and study: studies are drawn from run records; report files of scores without study")
    for name in ("scores", "checkpoint"):
        for path in getattr(config, name):
            if not Path(path).is_file():
                raise UserError(f"{name}: {path} does not exist")
    config.others = {} if config.others is None else config.others
    if not isinstance(config.others, dict):
        raise UserError(f"others = {config.others}: must be {{NAME: FOLDER}}, such as others='{{SelfEx: images}}'")
    for name, folder in config.others.items():
        if not isinstance(folder, str) or not Path(folder).is_dir():
            raise UserError(f"others.{name} = {folder}: no such folder")
    check_output("output", Path(config.output), folder=True)
    return config


def report(config: ReportConfig, command: str) -> None:
    """Write everything that the given records and files allow, and gather it on one page.

    Args:
        config: of `check`.
        command: what the page says that it was made by.

    Raises:
        UserError: an unknown study, no run that belongs to any, or files that cannot be read.
    """
    from drrn.report.studies import STUDIES

    for study in config.study:
        if study not in STUDIES and study not in NETWORKS:
            raise UserError(f"study = {study!r}: allowed are {', '.join([*STUDIES, *NETWORKS])}, or a list of them")
    from drrn.report.measurements import from_scores
    from drrn.report.page import Part, Section, write_page  # with Matplotlib, which a refusal need not wait for
    from drrn.report.records import read_runs

    records = read_runs(config.runs) if config.runs else []
    if config.ledger:
        from drrn.report.ledger import write_ledger

        write_ledger([Path(path) for path in config.scores], records, Path(config.output), command)
        return
    sections, refused = [], None
    if config.study:
        of_runs = [study for study in config.study if study in STUDIES]
        sections = [networks_section(study, config, records) for study in config.study if study in NETWORKS]
        sections += study_sections(replace(config, study=of_runs), records) if of_runs else []
    else:
        measured = [m for path in config.scores for m in from_scores(Path(path))]
        if records or measured:
            sections.append(Section("tables", "Tables", tables_part(config, records, measured)))
        if records:
            try:
                sections += study_sections(replace(config, study=["runs"]), records)
            except UserError as error:  # runs that do not compare still have their tables
                sections.append(Section("runs", "What ran", [Part("Not drawn", [], [str(error)])]))
        if records or config.compare:
            try:
                pictures = comparison(config, records)
            except UserError as error:  # the rest is worth its page
                pictures, refused = [], error
            sections += [Section("pictures", "Pictures", [Part("Crops side by side", [], pictures)])] * bool(pictures)
    if sections:
        page = Path(config.output) / "index.html"
        write_page(page, "DRRN: runs beside the paper", sections, command)
        print(f"written: {page}")
    if refused:
        raise refused


def tables_part(config: ReportConfig, records: list[dict[str, Any]], measured: list[Measurement]) -> list[Part]:
    """Runs, Tables 2 and 3, other metrics and Table 4, as far as they were measured."""
    from drrn.metrics import METRICS
    from drrn.paper import paper_numbers
    from drrn.report.measurements import from_record
    from drrn.report.page import Part
    from drrn.report.tables import ablation_table, benchmark_table, runs_table, write_table

    measured = [m for record in records for m in from_record(record)] + measured
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
    return [Part("What was measured", [], list(tables.values()))]


def networks_section(study: str, config: ReportConfig, records: list[dict[str, Any]]) -> Section:
    """Fig. 2, Table 1 or the table of all networks: to files, and for the page."""
    from drrn.pictures import save
    from drrn.report.networks import tables_of
    from drrn.report.page import Part, Picture, Section, svg
    from drrn.report.structures import fig2
    from drrn.report.tables import write_table

    output, title = Path(config.output), NETWORKS[study]
    if study == "fig2":
        figure = fig2()
        files = [path.name for path in save(figure, output / study)]
        print(f"written: {output / study}.png, .pdf")
        said = "ResNet and VDSR with six convolutions of their own, DRCN and DRRN with some that are used again."
        block = Picture(title, f"{title}. {said}", svg(figure), svg(fig2(stacked=True)), files)
    else:
        block = tables_of(study, config.scores, records)
        write_table(block, output / study)
    return Section(study, title, [Part("", blocks=[block])])


def study_sections(config: ReportConfig, records: list[dict[str, Any]]) -> list[Section]:
    """Studies, drawn from the runs that belong to them, wherever they are.

    Raises:
        UserError: no run belongs to any, or runs do not compare.
    """
    from drrn.report.page import Section
    from drrn.report.studies import STUDIES, run_groups

    commands = {study: f"python src/train.py sweeps={STUDIES[study].sweep}" for study in config.study}
    found = {study: run_groups(study, records) for study in config.study}
    if not any(found.values()):
        raise UserError(
            f"none of the {len(records)} runs below {', '.join(map(str, config.runs))} belongs to "
            f"{', '.join(found)}; to run it: {', '.join(commands.values())}"
        )
    return [
        Section(study, STUDIES[study].title, [study_part(config, group, commands[study]) for group in groups],
                commands[study])
        for study, groups in found.items()
    ]  # fmt: skip


def study_part(config: ReportConfig, group: RunGroup, command: str) -> Part:
    """Figures, tables and pictures of one run group: to files, and for the page."""
    from drrn.report.differences import differences_table
    from drrn.report.measurements import from_record
    from drrn.report.page import Part
    from drrn.report.studies import STUDIES, points_table
    from drrn.report.tables import ablation_table, runs_table, write_table

    part, output = Part(f"{group.short()} (run group {group.digest})", group.origin()), Path(config.output)
    part.origin.append(group.summary())
    if group.missing:
        part.origin.append(
            f"Not there yet: {', '.join(group.missing)}. {command} with this recipe runs what is missing."
        )
    points = points_table(group)
    if group.study == "table4" and group.finished:
        table = ablation_table([m for run in group.finished for m in from_record(run)])
        table.notes[:1] = group.origin()  # which names the protocol too
        write_table(table, output / group.stem)
        part.blocks.append(table)
    else:
        write_table(points, output / group.stem)
    pictures = _figures(group, output)
    part.blocks = [*pictures[:1], replace(points, notes=["Each number links to the run's record."]), *pictures[1:],
                   *part.blocks]  # fmt: skip
    if not pictures:
        part.blocks.append(f"Nothing to draw yet: no finished run was scored on the whole of {group.where()}.")
    if (gains := differences_table(group)) is not None:
        write_table(gains, output / f"{group.stem}-differences")
        part.blocks.append(gains)
    if group.finished and STUDIES[group.study].sweep:
        part.blocks.append(runs_table(group.finished))
    if group.tries:
        tries = ", ".join(f"{max(other.steps):,} steps (run group {other.digest})" for other in group.tries)
        part.blocks.append(f"Tries of this recipe, too short to be drawn: {tries}.")
    if group.study != "runs":
        try:  # the deepest networks; a picture holds no more than five
            deepest = [run for run in group.finished if run["structure"]["depth"] == group.depth][:5]
            part.blocks += comparison(config, deepest, f"{group.stem}-")
        except UserError as error:
            part.blocks.append(f"No pictures: {error}")
    return part


def _figures(group: RunGroup, output: Path) -> list[Picture]:
    """The study's figure, and the learning curves of its runs."""
    from drrn.pictures import save
    from drrn.report.figures import draw
    from drrn.report.page import Picture, svg
    from drrn.report.studies import STUDIES

    title, pictures = STUDIES[group.study].title, []
    drawings = [(group.stem, title, group)]
    if STUDIES[group.study].curves:
        drawings.append((f"{group.stem}-curves", f"{title}: learning curves", replace(group, study="curves")))
    measured = [f"{point.name} {mean:.2f} dB" for point in group.points if (mean := point.mean()) is not None]
    said = f"{' '.join(group.origin())} Our means: {', '.join(measured)}."  # for those who do not see it
    for stem, name, shown in drawings:
        if (figure := draw(shown)) is not None:
            files = [path.name for path in save(figure, output / stem)]
            narrow = svg(draw(shown, stacked=True))
            pictures.append(Picture(name, f"{name}. {said}", svg(figure), narrow, files))
    return pictures


def comparison(config: ReportConfig, records: list[dict[str, Any]], prefix: str = "") -> list[Picture]:
    """Crops by the networks of runs, or by `config.checkpoint`; none if no run has got as far.

    Raises:
        UserError: as `drrn.report.comparison.compare`.
    """
    from drrn.report.comparison import compare
    from drrn.report.page import Picture, png

    written = compare(config, records, Path(config.output), prefix)
    if not written:
        return []
    name = f"{written[0].stem.removeprefix(prefix)}: crops, PSNR and SSIM under each"
    wide, _, narrow, *_ = written
    return [Picture(name, name, png(wide), png(narrow), [path.name for path in written])]
