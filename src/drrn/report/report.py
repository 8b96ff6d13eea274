"""The configuration of report.py, its checks, and the call that makes the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from drrn.disk import check_output
from drrn.errors import UserError
from drrn.report import OF_NETWORKS, STUDIES
from drrn.schema import key, paths, typed
from drrn.weights.shipped import weights_file


@dataclass
class ReportConfig:
    """The keys of conf/report.yaml."""

    runs: Any = key("a folder of runs, or a list of them; null: none (study: runs)")
    study: Any = key("fig1, fig2, fig6, fig8, fig9, table1, table4, networks, curves, runs, or a list")
    scores: list[str] = key("scores files of src/evaluate.py")
    output: str = key("folder of tables (.md, .csv, .tex), pictures and the page index.html")
    compare: str | None = key("image for crops side by side: img059, 253027, ppt3 (Fig. 7), or a path")
    scale: int | None = key("scale of the comparison; null: the preset's, else 3", at_least=2)
    box: list[int] | None = key("[left, top, width, height] of the crop", at_least=0)
    checkpoint: list[str] = key("weights in the comparison, files or names of shipped ones; empty: those of the runs")
    others: dict[str, Any] | None = key("other programs' results in the comparison: {SelfEx: FOLDER}")
    root: str = key("folder of the image sets")
    ledger: bool = key("every number of the paper, and ours: ledger.csv, .md, .html", default=False)


def check(cfg: DictConfig) -> ReportConfig:
    """The checked configuration; a UserError names a wrong key before anything heavy is imported."""
    config = typed(ReportConfig, cfg)
    config.study = paths("study", config.study)
    for study in config.study:
        if study not in STUDIES and study not in OF_NETWORKS:
            raise UserError(
                f"study = {study!r}: allowed are {', '.join([*STUDIES, *OF_NETWORKS])}, or a list of them"
            )
    of_runs = bool(set(config.study) - set(OF_NETWORKS))
    config.runs = paths("runs", config.runs) or ["runs"] * (of_runs or bool(config.study and Path("runs").is_dir()))
    if config.box is not None and len(config.box) != 4:
        raise UserError(f"box = {config.box}: four whole numbers, left, top, width, height")
    if not (config.runs or config.study or config.scores or config.compare or config.ledger):
        raise UserError(
            "nothing to report: give runs=FOLDER, scores=[FILE], study=NAME, compare=IMAGE or ledger=true"
        )
    for name in ("study", "compare"):
        if config.ledger and getattr(config, name):
            raise UserError(f"ledger and {name}: the ledger is a report of its own; give {name} without it")
    if config.scores and of_runs:
        raise UserError("scores and study: studies are drawn from run records; report files of scores without study")
    for path in config.scores:
        if not Path(path).is_file():
            raise UserError(f"scores: {path} does not exist")
    config.checkpoint = [str(weights_file(path)) for path in config.checkpoint]
    config.others = config.others or {}
    for name, folder in config.others.items():
        if not isinstance(folder, str) or not Path(folder).is_dir():
            raise UserError(f"others.{name} = {folder}: no such folder")
    check_output("output", Path(config.output), folder=True)
    return config


def report(config: ReportConfig, command: str) -> None:
    """Write everything that the given records and files allow; pages show `command`.

    Raises:
        UserError: no run belongs to a requested study, or a file cannot be read.
    """
    from drrn.report.contents import write_report  # imports Matplotlib: only after the checks
    from drrn.report.ledger import write_ledger
    from drrn.report.records import read_runs

    records = read_runs(config.runs) if config.runs else []
    if config.ledger:
        write_ledger([Path(path) for path in config.scores], records, Path(config.output), command)
    else:
        write_report(config, records, command)
