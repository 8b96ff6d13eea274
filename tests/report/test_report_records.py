"""Records and files of scores that are damaged, foreign or hostile: named, left out, or refused."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from drrn.disk import write_json
from drrn.errors import UserError
from drrn.report.measurements import from_record
from drrn.report.records import read_runs, read_scores, recipe
from drrn.report.studies import run_groups
from drrn.report.tables import benchmark_table


def changed(record: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy with another value; `...` takes the key away."""
    record = copy.deepcopy(record)
    *way, last = [int(step) if step.isdigit() else step for step in place.split(".")]
    node = record
    for step in way:
        node = node[step]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return record


def test_a_recipe_names_what_departs_in_words(configure: Callable) -> None:
    assert recipe(asdict(configure("experiment=espcn"))).split(", ") == [
        "SGD 0.01", "a tenth every 100000 steps", "no clipping", "last layer ×0.1", "loss MSELoss",
    ]  # fmt: skip
    assert "last" not in recipe(asdict(configure("optim=release")))


DAMAGE = [
    ("name", ["DRRN"]), ("name", None), ("seed", "1"), ("seed", True), ("status", 3), ("structure", []),
    ("structure.depth", "20"), ("structure.conv_weights", 1.5), ("means", {}), ("means", ...), ("means.0", None),
    ("means.0.psnr", "33.9"), ("means.0.psnr", None), ("means.0.ssim", [0.9]), ("means.0.psnr", float("-inf")),
    ("means.0.images", float("nan")), ("means.0.set", 5), ("means.0.bicubic_psnr", ...), ("budget", ...),
    ("budget.steps", None), ("validation.0.psnr", {}), ("scores", "none"), ("scores.0.image", 1), ("protocol", None),
    ("protocol.crop", "3"), ("config", []), ("config.model", None), ("config.model.B", ...),
    ("config.model.attention", True), ("config.model.norm", "${oc.env:HOME}"), ("config.model.norm", "${x"),
    ("config.model.network", 5),
    ("config.data.scales", "2"), ("config.data.batch_size", "16"), ("config.data.train", ...),
    ("config.optim", "paper"), ("config.optim.schedule", ...), ("config.optim.clip", ...), ("config.trainer", {}),
    ("config.trainer.devices", ...), ("config.init_from", 5), ("format", 99),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), DAMAGE, ids=lambda v: str(v)[:30])
def test_a_damaged_record_is_named_and_left_out(place, value, make, tmp_path, capsys) -> None:
    good, bad = tmp_path / "runs" / "good" / "record.json", tmp_path / "runs" / "bad" / "record.json"
    write_json(good, make())
    write_json(bad, changed(make("seed=2"), place, value))
    assert [record["path"] for record in read_runs([str(tmp_path / "runs")])] == [str(good)]
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert str(bad) in said
    with pytest.raises(UserError, match=r"bad/record\.json"):
        read_runs([str(bad)])
    good.unlink()
    with pytest.raises(UserError, match="none of the 1"):
        read_runs([str(tmp_path / "runs")])


def test_runs_that_were_refused_are_counted_and_left_out(make, tmp_path, capsys) -> None:
    """Runs that diverged or met a full disk in training are shown as failed."""
    failed = {"status": "failed", "ended_by": "user error", "error": "UserError: no such loss"}
    for seed, record in enumerate((make(), make(**failed), make(**failed), make(**failed))):
        if 0 < seed < 3:
            record = {key: value for key, value in record.items() if key not in ("budget", "means", "scores")}
        write_json(tmp_path / "runs" / str(seed) / "record.json", record)
    assert [Path(record["path"]).parent.name for record in read_runs([str(tmp_path / "runs")])] == ["0", "3"]
    said = "left out: refused before the first step, 2 of the runs: UserError: no such loss\n"
    assert capsys.readouterr().err == said
    with pytest.raises(UserError, match="none of the 1"):
        read_runs([str(tmp_path / "runs" / "1")])


def test_an_image_without_an_error_is_a_measurement_like_any_other(make, tmp_path) -> None:
    """Its PSNR is infinite: the record is read, tables print it, and figures leave it out."""
    model = ("model.B=3", "model.U=4")
    for record in (make(*model, "seed=2", psnr=float("inf")), make(*model, "seed=1")):
        write_json(tmp_path / f"runs/s{record['seed']}/record.json", record)
    measured = [one for record in read_runs([str(tmp_path / "runs")]) for one in from_record(record)]
    rows = {(row[0], row[1]): row for row in benchmark_table(measured, ("psnr", "ssim"), None).rows}
    assert any("inf / 0.9" in cell for cell in rows["Set5", "×3"])
    (group,) = run_groups("table4", read_runs([str(tmp_path / "runs")]))
    (point,) = (point for point in group.points if point.runs)
    assert point.values() == {1: 31.0}


def test_records_are_found_below_a_folder_in_the_order_of_their_paths(make, tmp_path: Path) -> None:
    for name in ("b/run", "a/run", "a/other/deep"):
        write_json(tmp_path / name / "record.json", make(name=name))
    (tmp_path / "a/notes.json").write_text("{}")
    found = read_runs([str(tmp_path)])
    assert [record["name"] for record in found] == ["a/other/deep", "a/run", "b/run"]
    assert all(Path(record["path"]).is_file() for record in found)


def test_links_to_folders_are_followed_once(make, tmp_path: Path) -> None:
    """Runs on another disk; a link in a circle, and a second one to the same folder, add nothing."""
    write_json(tmp_path / "disk/main/run/record.json", make())
    (tmp_path / "runs").mkdir()
    for name, target in (("main", "disk/main"), ("again", "disk"), ("round", "runs")):
        (tmp_path / "runs" / name).symlink_to(tmp_path / target)
    assert len(read_runs([str(tmp_path / "runs")])) == 1


@pytest.mark.parametrize("exists", [True, False])
def test_no_record_at_all_is_refused(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(UserError, match="no run record") as refusal:
        read_runs([str(folder)])
    assert str(folder) in str(refusal.value)


def hostile(folder: Path, whole: str) -> dict[str, Path]:
    files = {
        "deep": "[" * 200_000,
        "cut": whole[: len(whole) // 2],
        "huge number": whole.replace('"steps": 1500', '"steps": 1e999'),
        "list": "[]",
        "empty": "",
        "bytes": "\x00\x01",
    }
    paths = {}
    for name, text in files.items():
        paths[name] = folder / name.replace(" ", "_") / "record.json"
        paths[name].parent.mkdir(parents=True)
        paths[name].write_text(text)
    (folder / "not_utf8").mkdir()
    (folder / "not_utf8" / "record.json").write_bytes(whole.encode().replace(b"DRRN", b"DRR\xff"))
    for name, target in (("zero", "/dev/zero"), ("loop", "record.json")):
        (folder / name).mkdir()
        (folder / name / "record.json").symlink_to(target)
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "record.json")
    (folder / "folder" / "record.json").mkdir(parents=True)
    return paths


def test_hostile_files_neither_hang_nor_stop_the_others(entry_point, make, tmp_path) -> None:
    """Through the command: each is named in a line; the sound ones are reported; names are made printable."""
    runs, output = tmp_path / "runs", tmp_path / "out"
    record = make("model.B=3", "model.U=4", name="evil \x1b]0;title\x07\ud800 [red]name", path="elsewhere")
    write_json(runs / "good" / "record.json", record)
    paths = hostile(runs, json.dumps(record))
    code, out, err = entry_point("report", f"runs={runs}", "study=fig6", f"output={output}")
    assert code == 0, err
    assert "Traceback" not in err
    left_out = [line for line in err.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == len(paths) + 5  # not UTF-8, a device, a loop, a pipe, a folder
    assert all(any(str(path) in line for line in left_out) for path in paths.values())
    page = (output / "index.html").read_text()
    for text in (out, err, page):
        assert "\x1b" not in text
        assert "\x07" not in text
    assert "[red]name" in page
    for path in (paths["deep"], paths["cut"], runs / "pipe" / "record.json", runs / "zero" / "record.json"):
        code, _, err = entry_point("report", f"runs={path}", f"output={output}")
        assert code == 2
        assert len(err.splitlines()) == 1
        assert str(path) in err


def test_links_are_quoted(make: Callable, entry_point: Callable, tmp_path: Path, monkeypatch) -> None:
    """Whatever a run's folder is called, a link to it is parsed as a path, not as a scheme or a query."""
    monkeypatch.chdir(tmp_path)
    folder = Path("javascript:alert(1)") / 'a#b?c%20d&"e\n'
    write_json(folder / "record.json", make("model.B=3", "model.U=4"))
    code, _, err = entry_point("report", "runs=.", "study=fig6", "output=.")
    assert code == 0, err
    page = Path("index.html").read_text()
    assert 'href="javascript%3Aalert%281%29/a%23b%3Fc%2520d%26%22e%0A/record.json"' in page
    assert 'href="javascript:' not in page


SCORES = {
    "format": 1,
    "protocol": {"name": "paper", "version": 1, "crop": None, "color": "y", "rounding": "uint8"},
    "methods": [{"weights": None, "structure": "Bicubic", "seed": None, "steps": None, "experiment": None}],
    "scores": [{"weights": None, "set": "Set5", "scale": 3, "image": "baby.bmp", "psnr": 33.9, "ssim": 0.9}],
}


@pytest.mark.parametrize(("place", "value"), [
    ("protocol", []), ("methods", {}), ("methods.0.structure", None), ("methods", []), ("scores", None),
    ("scores.0", 1), ("scores.0.psnr", "high"), ("scores.0.psnr", float("nan")), ("scores.0.scale", "3"),
    ("scores.0.weights", {}),
])  # fmt: skip
def test_a_damaged_file_of_scores_is_refused(place, value, entry_point, tmp_path) -> None:
    path = tmp_path / "scores.json"
    write_json(path, SCORES)
    assert read_scores(path) == SCORES
    write_json(path, changed(SCORES, place, value))
    code, _, err = entry_point("report", f"scores=[{path}]", f"output={tmp_path / 'out'}")
    assert code == 2
    assert str(path) in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_metric_of_ones_own_is_in_the_tables(make, tmp_path, entry_point, monkeypatch) -> None:
    """An entry in METRICS, and nothing else: records, files of scores and tables have it."""
    from drrn.metrics import METRICS, Metric

    monkeypatch.setitem(METRICS, "contrast", Metric(lambda a, b: 0.0, 1))
    record = make()
    for row in record["means"]:
        row |= {"contrast": 12.34, "bicubic_contrast": 5.0}
    write_json(tmp_path / "runs" / "record.json", record)
    scores = copy.deepcopy(SCORES)
    scores["scores"][0]["contrast"] = 7.77
    write_json(tmp_path / "scores.json", scores)
    arguments = [f"runs={tmp_path / 'runs'}", f"scores=[{tmp_path / 'scores.json'}]", f"checkpoint=[{tmp_path}/none]"]
    code, out, err = entry_point("report", *arguments[:2], f"output={tmp_path / 'out'}", "compare=null")
    assert "5.00" not in out
    assert "/ 12.3" in (tmp_path / "out" / "runs.md").read_text(), (code, out, err)
    assert "12.3" in (tmp_path / "out" / "metrics.md").read_text()


@pytest.mark.parametrize("output", ["file", "file/below", "x" * 300, "/proc/nowhere"])
def test_places_that_cannot_be_written_are_refused_before_the_work(output, entry_point, make, tmp_path) -> None:
    write_json(tmp_path / "runs" / "record.json", make())
    (tmp_path / "file").write_text("precious")
    code, out, err = entry_point("report", f"runs={tmp_path / 'runs'}", f"output={tmp_path / output}")
    assert code == 2
    assert "output" in err
    assert len(err.splitlines()) == 1
    assert out == ""
    assert (tmp_path / "file").read_text() == "precious"


def test_runs_of_two_degradations_share_a_page(make, tmp_path, entry_point) -> None:
    """Table 2 is of the paper's protocol; the table of runs has all."""
    write_json(tmp_path / "runs/plain/record.json", make())
    write_json(tmp_path / "runs/noisy/record.json", changed(make("seed=2"), "protocol.degradation", "DN"))
    code, _, err = entry_point("report", f"runs={tmp_path / 'runs'}", f"output={tmp_path / 'out'}")
    assert code == 0
    assert "weights.safetensors cannot be read" in err  # the pictures alone are missing
    assert "degradation=DN" in (tmp_path / "out/runs.md").read_text()
    assert "degradation=DN" not in (tmp_path / "out/table2.md").read_text()


def test_names_of_before_and_after_are_one_network(make, tmp_path) -> None:
    """Old records name a network by all its arguments: both names are one point of a study and one row of a table."""
    for seed, name in ((1, "FSRCNN_features56_s12_m4_scale3"), (2, "FSRCNN_x3")):
        run = make(f"seed={seed}")
        run["config"]["model"] = {"network": "fsrcnn", "features": 56, "s": 12, "m": 4, "scale": 3}
        run["structure"]["name"] = name
        write_json(tmp_path / str(seed) / "record.json", run)
    runs = read_runs([str(tmp_path)])
    assert {m.method for run in runs for m in from_record(run)} == {"FSRCNN_x3", "Bicubic"}
    (group,) = run_groups("runs", runs)
    assert [(point.name, sorted(point.runs)) for point in group.points] == [("FSRCNN_x3", [1, 2])]


def test_a_network_of_another_clone_keeps_its_name(make, tmp_path) -> None:
    run = make(structure={"name": "Toy_width4", "depth": 3, "conv_weights": 72})
    run["config"]["model"] = {"network": "toy", "width": 4, "slope": 0.0}
    write_json(tmp_path / "record.json", run)
    assert [read["structure"]["name"] for read in read_runs([str(tmp_path)])] == ["Toy_width4"]
