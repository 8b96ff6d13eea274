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
    from drrn.report.page import Part


@dataclass
class ReportConfig:
    """What conf/report.yaml documents."""

    runs: Any = key("a folder of runs, or a list of them; null: none (study: runs)")
    study: Any = key("fig6, fig8, table4, fig1, fig9, curves, or a list: from their runs")
    scores: list[str] = key("files of src/evaluate.py")
    output: str = key("tables (.md, .csv, .tex), pictures, a study's index.html")
    compare: str | None = key("img059, 253027, ppt3 (Fig. 7), or the path of an image")
    scale: int | None = key("of the comparison; null: the preset's, else 3", at_least=2)
    box: list[int] | None = key("[left, top, width, height] of the enlarged part", at_least=0)
    checkpoint: list[str] = key("networks of the comparison; else those of the runs")
    others: Any = key("images of other programs beside them: {SelfEx: FOLDER}")
    root: str = key("where the sets are, or are downloaded to")


def check(cfg: DictConfig) -> ReportConfig:
    """The configuration, refused by key before anything heavy is imported.

    Raises:
        UserError: a wrong key, type or value, or an output that cannot be written.
    """
    config = typed(ReportConfig, cfg)
    config.study = paths("study", config.study)
    config.runs = paths("runs", config.runs) or ["runs"] * bool(config.study)
    if config.box is not None and len(config.box) != 4:
        raise UserError(f"box = {config.box}: four whole numbers, left, top, width, height")
    if not (config.runs or config.scores or config.compare):
        raise UserError("nothing to report: give runs=FOLDER, scores=[FILE], study=NAME or compare=IMAGE")
    if config.study and config.scores:
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


def report(config: ReportConfig) -> None:
    """Write everything that the given records and files allow."""
    from drrn.metrics import METRICS
    from drrn.paper import paper_numbers
    from drrn.report.comparison import compare
    from drrn.report.measurements import from_record, from_scores
    from drrn.report.records import read_runs
    from drrn.report.tables import ablation_table, benchmark_table, runs_table, write_table

    output = Path(config.output)
    measured = [m for path in config.scores for m in from_scores(Path(path))]
    records = read_runs(config.runs) if config.runs else []
    measured = [m for record in records for m in from_record(record)] + measured
    if records:
        write_table(runs_table(records), output / "runs")
    if config.scores or {m.set_name for m in measured} & {row["dataset"] for row in paper_numbers("table2")}:
        write_table(benchmark_table(measured, ("psnr", "ssim"), "table2"), output / "table2")
    for name, metrics in (("table3", ["ifc"]), (None, [k for k in METRICS if k not in ("psnr", "ssim", "ifc")])):
        metrics = [k for k in metrics if any(k in m.values for m in measured)]
        having = [m for m in measured if any(k in m.values for k in metrics)]
        if having:
            write_table(benchmark_table(having, metrics, name), output / (name or "metrics"))
    if any("_B3U4" in m.method or m.method.startswith("VDSR_d28") for m in measured):
        write_table(ablation_table(measured), output / "table4")
    if records or config.compare:
        compare(config, records, output)


def report_studies(config: ReportConfig, command: str) -> None:
    """Draw studies from the runs that belong to them, wherever they are, and gather them on one page.

    Raises:
        UserError: an unknown study, no run that belongs to any, or runs that do not compare.
    """
    from drrn.report.studies import STUDIES, run_groups

    for study in config.study:
        if study not in STUDIES:
            raise UserError(f"study = {study!r}: allowed are {', '.join(STUDIES)}, or a list of them")
    from drrn.report.page import write_page  # with Matplotlib, which a refusal need not wait for
    from drrn.report.records import read_runs

    records = read_runs(config.runs)
    found = {study: run_groups(study, records) for study in config.study}
    if not any(found.values()):
        sweeps = ", ".join(f"python src/train.py sweeps={STUDIES[study].sweep}" for study in found)
        raise UserError(
            f"none of the {len(records)} runs below {', '.join(map(str, config.runs))} belongs to "
            f"{', '.join(found)}; to run it: {sweeps}"
        )
    parts = [study_part(config, group) for groups in found.values() for group in groups]
    page = Path(config.output) / "index.html"
    write_page(page, parts, [study for study, groups in found.items() if not groups], command)
    print(f"written: {page}")


def study_part(config: ReportConfig, group: RunGroup) -> Part:
    """Figures, tables and pictures of one run group: to files, and for the page."""
    from drrn.report.measurements import from_record
    from drrn.report.page import Part
    from drrn.report.studies import points_table
    from drrn.report.tables import ablation_table, runs_table, write_table

    part, output = Part(group), Path(config.output)
    if group.study == "table4" and group.finished:
        table = ablation_table([m for run in group.finished for m in from_record(run)])
        table.notes[:1] = group.origin()  # which names the protocol too
        part.tables.append(table)
    else:
        table = points_table(group)
    write_table(table, output / group.stem)
    _add_figures(part, output)
    if not part.pictures:
        part.notes.append("Nothing to draw yet: no finished run was scored on the whole of Set5 ×3.")
    if group.finished:
        part.tables.append(runs_table(group.finished))
    _add_comparison(part, config)
    return part


def _add_figures(part: Part, output: Path) -> None:
    """The study's figure, and the learning curves of its runs."""
    from drrn.pictures import save
    from drrn.report.figures import draw
    from drrn.report.page import Picture, alt, svg
    from drrn.report.studies import STUDIES

    group = part.group
    title = STUDIES[group.study].title
    drawings = [(group.stem, title, group)]
    if STUDIES[group.study].ablation and group.study != "curves":
        drawings.append((f"{group.stem}-curves", f"{title}: learning curves", replace(group, study="curves")))
    for stem, name, shown in drawings:
        if (figure := draw(shown)) is None:
            continue
        written = save(figure, output / stem)
        narrow = svg(draw(shown, stacked=True))
        files = [path.name for path in written]
        part.pictures.append(Picture(name, f"{name}. {alt(group)}", svg(figure), narrow, files))


def _add_comparison(part: Part, config: ReportConfig) -> None:
    """Crops of the deepest networks."""
    from drrn.report.comparison import compare
    from drrn.report.page import Picture, png

    there = [point for point in part.group.points if point.finished()]
    depth = max((point.depth for point in there), default=0)
    deepest = [point.finished()[0] for point in there if point.depth == depth][:5]  # a picture holds no more
    prefix = f"{part.group.stem}-"
    try:
        written = compare(config, deepest, Path(config.output), prefix)
    except UserError as error:
        part.notes.append(f"No pictures: {error}")
        return
    if written:
        name = f"Crops of the deepest networks of this study, {written[0].stem.removeprefix(prefix)}"
        files = [path.name for path in written]
        part.pictures.append(Picture(name, f"{name}, PSNR and SSIM under each", png(written[0]), None, files))
