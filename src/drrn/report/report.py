"""What `report.py` writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig

from drrn.config import key, paths, typed
from drrn.errors import UserError


@dataclass
class ReportConfig:
    """What conf/report.yaml documents."""

    runs: Any = MISSING
    study: Any = MISSING
    scores: list[str] = MISSING
    output: str = MISSING
    compare: str | None = MISSING
    scale: int | None = key("of the comparison", at_least=2)
    box: list[int] | None = MISSING
    checkpoint: list[str] = MISSING
    root: str = MISSING


def check(cfg: DictConfig) -> ReportConfig:
    """The configuration, refused by key before anything heavy is imported.

    Raises:
        UserError: a wrong key, type or value.
    """
    config = typed(ReportConfig, cfg)
    config.study = paths("study", config.study)
    config.runs = paths("runs", config.runs) or ["runs"] * bool(config.study)
    if config.box is not None and (len(config.box) != 4 or min(config.box) < 0):
        raise UserError(f"box = {config.box}: four whole numbers, left, top, width, height")
    if not (config.runs or config.scores or config.compare):
        raise UserError("nothing to report: give runs=FOLDER, scores=[FILE], study=NAME or compare=IMAGE")
    for name in ("scores", "checkpoint"):
        for path in getattr(config, name):
            if not Path(path).is_file():
                raise UserError(f"{name}: {path} does not exist")
    return config


def report(config: ReportConfig) -> None:
    """Write everything that the given records and files allow."""
    from drrn.report.tables import ablation_table, benchmark_table, from_record, from_scores, runs_table
    from drrn.runs.record import find_records
    from drrn.sets import registered_sets

    output = Path(config.output)
    records = [record for folder in config.runs for record in find_records(Path(folder))]
    measured = [m for record in records for m in from_record(record)]
    measured += [m for path in config.scores for m in from_scores(Path(path))]
    if records:
        write_table(runs_table(records), output / "runs")
    if any(m.set_name in registered_sets() for m in measured) or config.scores:
        write_table(benchmark_table(measured, "table2", ("psnr", "ssim")), output / "table2")
    with_ifc = [m for m in measured if "ifc" in m.values]
    if with_ifc:
        write_table(benchmark_table(with_ifc, "table3", ("ifc",)), output / "table3")
    if any("_B3U4" in m.method or m.method.startswith("VDSR_d28") for m in measured):
        write_table(ablation_table(measured), output / "table4")
    if records or config.compare:
        draw_comparison(config, records, output)


def report_studies(config: ReportConfig, command: str) -> None:
    """Draw studies from the runs that belong to them, wherever they are, and gather them on one page.

    Raises:
        UserError: an unknown study, no run that belongs to any, or runs that do not compare.
    """
    from drrn.report.page import write_page
    from drrn.report.studies import STUDIES, budgets
    from drrn.runs.record import find_records

    for study in config.study:
        if study not in STUDIES:
            raise UserError(f"study = {study!r}: allowed are {', '.join(STUDIES)}, or a list of them")
    if config.scores:
        raise UserError("scores and study: studies are drawn from run records; report the files of scores apart")
    records = [record for folder in config.runs for record in find_records(Path(folder))]
    found = {study: budgets(study, records) for study in config.study}
    if not any(found.values()):
        sweeps = ", ".join(f"python src/train.py sweeps={STUDIES[study].sweep}" for study in found)
        raise UserError(
            f"none of the {len(records)} runs below {', '.join(map(str, config.runs))} belongs to "
            f"{', '.join(found)}; to run it: {sweeps}"
        )
    parts = [study_part(config, one) for study in found.values() for one in study]
    page = Path(config.output) / "index.html"
    write_page(page, parts, [study for study, those in found.items() if not those], command)
    print(f"written: {page}")


def study_part(config: ReportConfig, one: Any) -> Any:
    """Figures, tables and pictures of one study under one budget: to files, and for the page."""
    from drrn.report.figures import draw
    from drrn.report.page import Part, Picture, alt, png, svg
    from drrn.report.pictures import save
    from drrn.report.studies import ABLATION, STUDIES, points_table
    from drrn.report.tables import ablation_table, from_record, runs_table

    part, output = Part(one), Path(config.output)
    title = STUDIES[one.study].title
    if one.study == "table4" and one.finished:
        table = ablation_table([m for run in one.finished for m in from_record(run)])
        table.notes[:1] = one.face()  # which names the protocol too
        part.tables.append(table)
    else:
        table = points_table(one)
    write_table(table, output / one.stem)
    drawings = [(one.stem, title, one)]
    if STUDIES[one.study].varied == ABLATION and one.study != "curves":
        drawings.append((f"{one.stem}-curves", f"{title}: learning curves", replace(one, study="curves")))
    for stem, name, shown in drawings:
        if (figure := draw(shown)) is None:
            continue
        written = save(figure, output / stem)
        print(f"written: {', '.join(map(str, written))}")
        files = [path.name for path in written]
        part.pictures.append(Picture(name, f"{name}. {alt(one)}", svg(figure), svg(draw(shown, stacked=True)), files))
    if not part.pictures:
        part.notes.append("Nothing to draw yet: no finished run was scored on the whole of Set5 ×3.")
    if one.finished:
        part.tables.append(runs_table(one.finished))
    there = [point for point in one.points if point.finished()]
    depth = max((point.depth for point in there), default=0)
    deepest = [point.finished()[0] for point in there if point.depth == depth][:5]  # a picture holds no more
    try:
        written = draw_comparison(config, deepest, output, f"{one.stem}-")
    except UserError as error:
        part.notes.append(f"No pictures: {error}")
    else:
        if written:
            name = f"Crops of the deepest networks of this study, {written[0].stem.removeprefix(one.stem + '-')}"
            part.pictures.append(Picture(name, f"{name}, PSNR and SSIM under each", png(written[0]), None,
                                         [path.name for path in written]))  # fmt: skip
    return part


def write_table(table: Any, stem: Path) -> None:
    """Print a table and write it as Markdown, CSV and LaTeX."""
    from rich.console import Console
    from rich.table import Table

    from drrn.disk import write_whole

    printed = Table(title=table.title, caption=" ".join(table.notes) or None)
    for index, column in enumerate(table.columns):
        printed.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        printed.add_row(*row)
    Console(markup=False).print(printed)
    for suffix, text in ((".md", table.markdown()), (".csv", table.csv()), (".tex", table.latex())):
        write_whole(stem.with_suffix(suffix), lambda partial, text=text: partial.write_text(text))
    print(f"written: {stem}.md, .csv, .tex\n")


def draw_comparison(
    config: ReportConfig, records: list[dict[str, Any]], output: Path, prefix: str = ""
) -> list[Path]:
    """Crops side by side: of the image asked for, or of the last one that the runs were tested on.

    Returns:
        The files written; none if no run has got as far as its pictures.

    Raises:
        UserError: an image or the weights of a run are not there, or the box is not inside the image.
    """
    from drrn.inference import super_resolve
    from drrn.report.pictures import FIG7, Box, save, side_by_side
    from drrn.sets import image_files
    from drrn.weights.ours import load_network

    tested = [record for record in records if record.get("scores")]
    files = [Path(path) for path in config.checkpoint]
    files = files or [Path(record["path"]).with_name("weights.safetensors") for record in tested]
    loaded = {file: load_network(file) for file in files}
    names = {file: about.get("origin") or file.stem for file, (_, about) in loaded.items()}
    if len(set(names.values())) < len(names):  # two networks of one name: call them by their folders
        names = {file: f"{file.parent.name}/{file.stem}" for file in files}
    networks = {names[file]: network for file, (network, _) in loaded.items()}
    box = Box(*config.box) if config.box else None
    if config.compare in FIG7:
        set_name, file, preset_scale, preset_box = FIG7[config.compare]
        found = [p for p in image_files(set_name, Path(config.root), complete=False) if p.name == file]
        if not found:
            raise UserError(
                f"{file} of {set_name} is not under {config.root}: python src/prepare.py 'data.val=[{set_name}]'"
            )
        path, scale, box = found[0], config.scale or preset_scale, box or preset_box
    elif config.compare:
        path, scale = Path(config.compare), config.scale or 3
    elif tested:
        last = tested[-1]["scores"][-1]
        files = image_files(tested[-1]["config"]["data"]["val"][-1], Path(config.root), complete=False)
        path = next((p for p in files if p.name == last["image"]), None)
        if path is None:
            raise UserError(f"{last['image']}, which the runs were tested on, is not under {config.root}")
        scales = sorted({row["scale"] for row in tested[-1]["scores"]})
        scale = config.scale or scales[len(scales) // 2]
    else:
        return []
    runs = {name: lambda x, network=network: super_resolve(network, x) for name, network in networks.items()}
    try:
        figure = side_by_side(path, scale, runs, box)
    except ValueError as error:  # an image smaller than the scale or the metrics' windows
        raise UserError(f"{path} at ×{scale}: {error}") from error
    written = save(figure, output / f"{prefix}{path.stem}_x{scale}")
    print(f"written: {', '.join(map(str, written))}")
    return written
