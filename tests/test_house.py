"""The house's rules that no linter checks: sizes of files, functions, entry points and of the tour of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
FILES = sorted(SRC.rglob("*.py"))
ENTRIES = ("train", "evaluate", "upscale", "convert", "report", "prepare")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SRC)) for path in FILES])
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert lines <= 60, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_point_composes_checks_and_calls(name: str) -> None:
    assert len((SRC / f"{name}.py").read_text().splitlines()) <= 50


def test_the_tour_of_the_package_is_short() -> None:
    """Model → module → datamodule → the steps of a run."""
    tour = ("model.py", "module.py", "datamodule.py", "runs/run.py")
    lengths = {name: len((SRC / "drrn" / name).read_text().splitlines()) for name in tour}
    assert lengths["model.py"] <= 190
    assert sum(lengths.values()) < 900, lengths


def test_no_constructor_takes_a_row_of_flags() -> None:
    """Bools after the second argument are keyword-only."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__" and path.name != "model.py":
                flags = [
                    a.arg for a in node.args.args if isinstance(a.annotation, ast.Name) and a.annotation.id == "bool"
                ]
                assert len(flags) < 3, f"{path.name}: {flags}"


# Of the flat files of drrn/, those that import a folder, and which.
KNOWN = {
    "__init__": {"photos", "weights"},
    "evaluation": {"fast", "weights"},
    "evaluation_config": {"weights"},
    "explain": {"fast"},
    "inference": {"fast"},
    "module": {"fast"},
}


def test_few_of_the_flat_files_import_a_folder() -> None:
    folders = {path.parent.name for path in (SRC / "drrn").glob("*/__init__.py")}
    found: dict[str, set[str]] = {}
    for path in (SRC / "drrn").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [its.name for its in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                package, _, rest = name.partition(".")
                if package == "drrn" and rest.partition(".")[0] in folders:
                    found.setdefault(path.stem, set()).add(rest.partition(".")[0])
    assert found == KNOWN
