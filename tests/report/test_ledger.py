"""The ledger: complete, and a sample of it computed again from files."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.metrics
from PIL import Image

from drrn.disk import write_json
from drrn.layers import conv_weights
from drrn.paper import paper_numbers
from drrn.report.ledger import COUNTED, QUOTED, REMEASURED, SCORES, STATES, TRAINED, built_here, ledger, measured
from drrn.report.measurements import MISSING
from drrn.report.networks import table1

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def entries() -> list:
    """The ledger of what the repository holds."""
    return list(ledger(measured(sorted(SCORES.glob("*.json")), [])))


def test_every_number_of_the_paper_has_its_line(entries: list) -> None:
    """As many lines as data/paper has numbers; each with a state, and with a command if there is a number of ours."""
    printed = [entry for entry in entries if entry.paper != MISSING]
    expected = sum(len(paper_numbers("table2")) * 2 if name == "table2" else len(paper_numbers(name))
                   for name in ("table2", "table3", "table4", "text"))  # fmt: skip
    expected += sum(bool(row["psnr"]) for name in ("fig1", "fig6", "fig8", "fig9") for row in paper_numbers(name))
    counts = [entry for entry in entries if entry.what.endswith((", layers", ", weights", ", weights in DRRN's"))]
    assert len(printed) == expected + len(counts)
    assert len({(entry.place, entry.what) for entry in entries}) > 0.9 * len(entries)  # Fig. 9 prints depths twice
    for entry in entries:
        assert entry.source.state in STATES
        assert (entry.source.state == QUOTED) == (entry.ours == MISSING)
        assert (entry.source.state == QUOTED) == (entry.source.command == "")
        assert (entry.source.state == REMEASURED) <= (len(entry.source.record) == 64)


def test_the_committed_pages_are_the_ledgers(entries: list) -> None:
    """docs/ledger.csv equals the command's output; the page has the same numbers."""
    with (ROOT / "docs" / "ledger.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = [[row["place"], row["what"], row["paper"], row["ours"], row["state"]] for row in rows]
    now = [[e.place, e.what, e.paper, e.ours, e.source.state] for e in entries]
    trained = {tuple(row[:3]) for row in shown if row[4] == TRAINED}  # from weights that may be shipped later
    assert [row for row in shown if tuple(row[:3]) not in trained] == [r for r in now if tuple(r[:3]) not in trained]
    page = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    assert all(f"| {row['what']} | {row['paper']} | {row['ours']} |" in page for row in rows)


def test_bicubic_is_measured_again_by_other_means(entries: list, drrn_data: Path) -> None:
    """Set5 ×3 with scikit-image's metrics on this package's bicubic: PSNR to its printed digits."""
    from drrn.images import read_luminance
    from drrn.protocol import modcrop, prepare

    values = []
    for path in sorted((drrn_data / "Set5").iterdir()):
        truth = modcrop(read_luminance(path), 3)
        made = np.clip(np.round(prepare(truth, 3)[0] * 255), 0, 255).astype(np.uint8)
        values.append(skimage.metrics.peak_signal_noise_ratio(truth[3:-3, 3:-3], made[3:-3, 3:-3], data_range=255))
    (entry,) = (e for e in entries if (e.place, e.what) == ("Table 2", "Set5 ×3, Bicubic, PSNR"))
    assert (entry.paper, entry.ours, entry.difference) == ("30.39", f"{np.mean(values):.2f}", "0.00")


def test_published_weights_are_measured_again(entries: list, drrn_data: Path, tmp_path: Path, entry_point) -> None:
    """VDSR's own weights, converted, on the smallest image of Set5: the score in the committed file, to the digit."""
    weights = Path(os.environ.get("DRRN_WEIGHTS", "nowhere")) / "VDSR_Official.mat"
    if not weights.is_file():
        pytest.skip("set DRRN_WEIGHTS to the folder with VDSR_Official.mat")
    (tmp_path / "one").mkdir()
    name = min((drrn_data / "Set5").iterdir(), key=lambda path: Image.open(path).size).name
    (tmp_path / "one" / name).symlink_to(drrn_data / "Set5" / name)
    assert entry_point("convert", f"input={weights}", f"output={tmp_path / 'w.safetensors'}")[0] == 0
    arguments = [f"sets=[{tmp_path / 'one'}]", "scales=[3]", f"output={tmp_path / 's.json'}", "threads=1"]
    assert entry_point("evaluate", f"checkpoint={tmp_path / 'w.safetensors'}", *arguments)[0] == 0
    (again,) = json.loads((tmp_path / "s.json").read_text())["scores"]
    rows = json.loads((SCORES / "vdsr.json").read_text())["scores"]
    (kept,) = (row for row in rows if (row["set"], row["scale"], row["image"]) == ("Set5", 3, name))
    assert again["psnr"] == pytest.approx(kept["psnr"], abs=0.001)
    assert again["ssim"] == pytest.approx(kept["ssim"], abs=0.0001)
    (entry,) = (e for e in entries if (e.place, e.what) == ("Table 2", "Set5 ×3, VDSR, PSNR"))
    assert (entry.paper, entry.ours, entry.source.state) == ("33.66", "33.66", REMEASURED)


def test_counts_are_those_of_the_built_networks(entries: list) -> None:
    """Weights and layers against sums over the layers' shapes by hand; the erratum; methods not built here."""
    for name, depth, weights, radius in (
        ("DRRN_B1U25", 52, 9 * 128 + 2 * 9 * 128 * 128 + 9 * 128, 52),
        ("DRRN_NS_B3U4", 28, 9 * 128 + (3 * 8 + 2) * 9 * 128 * 128 + 9 * 128, 28),
        ("SRCNN", 3, 81 * 64 + 64 * 32 + 25 * 32, 6),
        ("VDSR", 20, 2 * 9 * 64 + 18 * 9 * 64 * 64, 20),
    ):
        built = built_here(name)
        assert (built.depth, conv_weights(built), built.receptive_radius) == (depth, weights, radius)
    assert built_here("CSCN") is None
    counts = {entry.what: entry for entry in entries if entry.source.state == COUNTED}
    assert counts["DRRN_B2U3, weights"][2:5] == ("784K", "740K", "−44")
    assert "erratum" in counts["DRRN_B2U3, weights"].note
    assert [counts[f"{name}, weights in DRRN's"].ours for name in ("VDSR", "DRCN", "RED30")] == [
        "2.24",
        "5.97",
        "13.90",
    ]


def test_a_training_enters_with_its_record(make: Callable, tmp_path: Path, entry_point) -> None:
    """A finished run of the paper's size: its scores and its record's digest; narrow or unfinished ones not."""
    runs = [
        make("model.B=1", "model.U=9", "model.features=128", psnr=33.9),
        make("model.B=1", "model.U=9", "model.features=128", "seed=2", psnr=33.94),
        make("model.B=1", "model.U=25", "model.features=128", "model.norm=none", psnr=34.2),
        make("model.B=3", "model.U=8", psnr=35.0),
        make("model.B=17", "model.U=1", "model.features=128", status="failed"),
    ]
    for number, run in enumerate(runs):
        write_json(tmp_path / "runs" / str(number) / "record.json", run)
    code, out, err = entry_point("report", "ledger=true", f"runs={tmp_path / 'runs'}", f"output={tmp_path / 'out'}")
    assert code == 0, err
    assert "written" in out
    with (tmp_path / "out" / "ledger.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["place"], row["what"]): row for row in csv.DictReader(file)}
    ours = rows["Table 2", "Set5 ×3, DRRN_B1U9, PSNR"]
    assert (ours["ours"], ours["difference"], ours["state"]) == ("33.92", "−0.01", TRAINED)
    digests = {hashlib.sha256((tmp_path / "runs" / str(k) / "record.json").read_bytes()).hexdigest() for k in (0, 1)}
    assert set(ours["record"].split()) == digests
    assert "seeds: 2" in ours["note"]
    again = "python src/train.py from_record={}/record.json output=again"
    assert ours["command"] == f"{again.format(0)} && {again.format(1)}"  # both enter the mean
    assert rows["Fig. 6", "Set5 ×3, DRRN_B1U25, PSNR"]["difference"] == "+0.17"
    assert "noBN" in rows["Fig. 6", "Set5 ×3, DRRN_B1U25, PSNR"]["note"]
    for name in ("DRRN_B3U8", "DRRN_B17U1"):
        assert rows["Fig. 6", f"Set5 ×3, {name}, PSNR"]["state"] == QUOTED
    page = (tmp_path / "out" / "ledger.html").read_text()
    assert "33.92" in page
    assert "<script" not in page


def test_what_lies_beside_shipped_weights_is_taken(make: Callable, tmp_path: Path, monkeypatch) -> None:
    """A run record or a file of scores beside the weights is read; any other JSON is ignored."""
    import drrn.weights.shipped
    from drrn.report.ledger import everything

    monkeypatch.setattr(drrn.weights.shipped, "FOLDER", tmp_path)
    write_json(tmp_path / "a.json", make("model.B=1", "model.U=9", "model.features=128", psnr=33.9))
    digest, text = hashlib.sha256(b"b").hexdigest(), (SCORES / "vdsr.json").read_text()
    scores = json.loads(text.replace(json.loads(text)["methods"][0]["weights"], digest))
    rows = [row for row in scores["scores"] if row["set"] == "Set5"]
    scores["methods"][0] |= {"structure": "DRRN_B1U25_noBN", "steps": 9, "seed": 1}
    write_json(tmp_path / "b.json", scores | {"scores": rows, "means": []})
    write_json(tmp_path / "c.json", {"means": []})
    for name in "abc":
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    found = everything([], [])
    values, source, note = found["DRRN_B1U9", "Set5", 3]
    assert values["psnr"] == 33.9
    assert source.weights == hashlib.sha256(b"a").hexdigest()
    values, source, note = found["DRRN_B1U25", "Set5", 3]
    assert (source.state, source.weights) == (TRAINED, digest)
    folder = tmp_path.name
    assert source.command == (
        f"python src/evaluate.py checkpoint={folder}/b.safetensors 'sets=[{','.join(scores['sets'])}]' "
        f"'metrics=[{','.join(values)}]' 'scales=[2,3,4]'"
    )
    assert f"{values['psnr']:.2f}" == "33.66"  # VDSR's, under another name
    assert "noBN" in note
    vdsr = found["VDSR", "Set5", 3][1]
    assert vdsr.state == REMEASURED
    (margin,) = (e for e in ledger(found) if e.what.endswith("DRRN_B1U25 above VDSR, Set5 ×3"))
    assert (margin.ours, margin.source.state) == ("0.00", TRAINED)
    assert margin.source.command == f"{source.command} && {vdsr.command}"  # two measurements enter
    assert margin.source.record == f"{source.record} {vdsr.record}"
    found["DRRN_B1U25", "Set5", 3] = found["DRRN_B1U25", "Set5", 3]._replace(values={"ifc": 3.0})
    found["DRCN", "Set5", 3] = found["DRRN_B1U25", "Set5", 3]
    (margin,) = (e for e in ledger(found) if e.what.endswith("DRRN_B1U25 above VDSR, Set5 ×3"))
    assert margin.ours == MISSING
    assert [row[-1] for row in table1(found, []).rows if row[0] == "DRCN"] == [MISSING]


def test_scores_of_fewer_metrics_take_no_number_away(tmp_path: Path) -> None:
    scores = json.loads((SCORES / "bicubic.json").read_text())
    scores["scores"] = [{k: v for k, v in row.items() if k != "ifc"} for row in scores["scores"]]
    write_json(tmp_path / "mine.json", scores)
    kept, found = (
        measured([SCORES / "bicubic.json"], []),
        measured([SCORES / "bicubic.json", tmp_path / "mine.json"], []),
    )
    assert kept["Bicubic", "Set5", 3][0]["ifc"] == found["Bicubic", "Set5", 3][0]["ifc"]
