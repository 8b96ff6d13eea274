"""Tables and pictures: cells by hand, missing ones shown as missing, files in every format."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from drrn.errors import UserError, signed
from drrn.matlab import imresize
from drrn.paper import paper_numbers
from drrn.pictures import Box, draw, save, side_by_side
from drrn.protocol import PAPER
from drrn.report import contents
from drrn.report.comparison import FIG7, best
from drrn.report.measurements import MISSING, Measurement, over_seeds
from drrn.report.report import ReportConfig
from drrn.report.tables import ablation_table, benchmark_table, runs_table

PROTOCOL = PAPER.stamp()


def measurement(method: str, seed: int | None, psnr: float, ssim: float = 0.9, **changes: object) -> Measurement:
    """Set5 ×3 unless changed."""
    place = {"set_name": "Set5", "scale": 3, "images": 5, "steps": 100, "protocol": PROTOCOL, "source": "here"}
    return Measurement(method=method, seed=seed, values={"psnr": psnr, "ssim": ssim}, **(place | changes))


def test_table2_cells() -> None:
    """Paper, ours as mean ± sample deviation over seeds, the difference; missing cells are missing."""
    table = benchmark_table(
        [measurement("DRRN_B1U9", 1, 33.90, 0.9230), measurement("DRRN_B1U9", 2, 33.94, 0.9234)],
        ("psnr", "ssim"),
        "table2",
    )
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    assert len(rows) == 12  # every set and scale of the paper
    assert rows["Set5", "×3"] == ["33.93 / 0.9234", "33.92±0.03 / 0.9232±0.0003", "−0.01 / −0.0002"]
    assert rows["Set14", "×2"] == ["33.19 / 0.9133", MISSING, MISSING]
    assert "100 steps" in table.columns[3]
    assert any("2 seeds" in note for note in table.notes)


def test_a_part_of_a_set_is_no_set() -> None:
    """Four images of Urban100 are shown as such and not compared with the paper's hundred."""
    table = benchmark_table(
        [measurement("Bicubic", None, 21.0, set_name="Urban100", images=4)], ("psnr", "ssim"), "table2"
    )
    row = next(row for row in table.rows if row[:2] == ["Urban100", "×3"])
    assert "4 of 100 images" in row[3]
    assert row[4] == MISSING


def test_two_protocols_are_refused() -> None:
    """Also when only the crop differs."""
    other = measurement("DRRN_B1U25", 1, 34.0, protocol=PROTOCOL | {"crop": 6}, source="there")
    with pytest.raises(UserError, match=r"here was measured by protocol paper v1, there by .*crop=6"):
        benchmark_table([measurement("DRRN_B1U9", 1, 33.9), other], ("psnr", "ssim"), "table2")


def test_another_degradation_is_not_set_beside_the_paper() -> None:
    """Its images differ from the paper's; and a table never mixes two degradations."""
    noisy = measurement("DRRN_B1U9", 1, 26.0, protocol=PROTOCOL | {"degradation": "DN"}, source="there")
    table = benchmark_table([noisy], ("psnr", "ssim"), "table2")
    assert table.rows == [["Set5", "×3", "26.00 / 0.9000"]]
    assert "degradation=DN" in table.notes[0]
    with pytest.raises(UserError, match=r"here.*there"):
        benchmark_table([measurement("DRRN_B1U9", 1, 33.9), noisy], ("psnr", "ssim"), "table2")


def test_other_lengths_are_other_columns() -> None:
    """A mean never mixes two lengths of one structure."""
    table = benchmark_table(
        [measurement("DRRN_B1U9", 1, 33.0), measurement("DRRN_B1U9", 1, 34.0, steps=999)], ("psnr",), "table2"
    )
    row = next(row for row in table.rows if row[:2] == ["Set5", "×3"])
    assert (row[3], row[6]) == ("33.00", "34.00")


def test_table4() -> None:
    """The five variants with their ticks in the paper's order; narrow stand-ins go by their own names."""
    table = ablation_table(
        [
            measurement("DRRN_B3U4", 1, 33.95),
            measurement("VDSR_d28", 1, 33.90),
            measurement("DRRN_C_B3U4_16f", 1, 30),
        ]
    )
    assert [row[0].split(",")[0] for row in table.rows] == [
        "VDSR_d28",
        "DRRN_NS_C",
        "DRRN_NS",
        "DRRN_C_B3U4_16f",
        "DRRN_B3U4",
    ]
    assert table.rows[0][1:] == ["×", "×", "×", "33.86", "33.90", "+0.04"]
    assert table.rows[2][-2:] == [MISSING, MISSING]
    assert table.rows[4][1:] == ["✓", "✓", "✓", "33.99", "33.95", "−0.04"]


def test_formats() -> None:
    """Markdown, CSV and LaTeX hold the same cells."""
    table = benchmark_table([measurement("DRRN_B1U9", 1, 33.90)], ("psnr",), "table2")
    assert list(csv.reader(table.csv().splitlines()))[1:] == table.rows
    lines = [line for line in table.markdown().splitlines() if line.startswith("| Set5")]
    assert [cell.strip() for cell in lines[1].strip("|").split("|")] == table.rows[1]
    latex = table.latex()
    assert r"DRRN\_B1U9 paper" in latex
    assert latex.count(r"\\") == len(table.rows) + 1
    assert "×" not in latex


def test_a_terminal_of_80_columns_holds_every_cell() -> None:
    """A wide table is split; the paper's number, ours and the difference stay together; each part has the keys."""
    measured = [measurement(name, 1, 33.9) for name in ("DRRN_B1U9", "DRRN_B1U25", "OURS")]
    table = benchmark_table(measured, ("psnr", "ssim"), "table2")
    assert len(table.columns) == 2 + 3 + 3 + 1
    pieces = table.pieces(80)
    assert len(pieces) > 1
    assert [column for columns, _ in pieces for column in columns[2:]] == table.columns[2:]
    for columns, rows in pieces:
        assert columns[:2] == ["set", "scale"]
        assert [row[:2] for row in rows] == [row[:2] for row in table.rows]
        assert len(columns) in (3, 5, 6)
        cells = [[*head.split(), *column] for head, *column in zip(columns, *rows, strict=True)]
        assert sum(3 + max(map(len, column)) for column in cells) < 80
    assert table.pieces(400) == [(table.columns, table.rows)]


def test_numbers() -> None:
    """Signs, zeros, single values."""
    assert signed(-0.001, 2) == "0.00"
    assert signed(-0.25, 2) == "−0.25"
    assert over_seeds([], "psnr") == MISSING
    assert over_seeds([33.333], "psnr") == "33.33"
    assert len(paper_numbers("table2")) == 96


def test_crops_side_by_side(tiny_images: Path, tmp_path: Path) -> None:
    """Titles, the scores of the whole image, the right pixels in the panels; PNG and PDF."""
    box = Box(10, 20, 30, 24)
    figure = draw(side_by_side(tiny_images / "chelsea.png", 2, {"better": lambda x: x + 0.01}, box))
    whole, truth, bicubic, better = figure.axes
    original = np.asarray(Image.open(tiny_images / "chelsea.png"))
    np.testing.assert_array_equal(whole.images[0].get_array(), original[:74, :90])
    np.testing.assert_array_equal(truth.images[0].get_array(), original[20:44, 10:40])
    shown = bicubic.images[0].get_array().astype(float)
    assert shown.shape == (24, 30, 3)
    assert 1 < np.abs(shown - original[20:44, 10:40]).mean() < 30  # blurred, but the same place
    assert [axis.get_title() for axis in figure.axes[1:]] == ["ground truth", "bicubic", "better"]
    assert "dB" in bicubic.get_xlabel()
    assert bicubic.get_xlabel() != better.get_xlabel()
    paths = save(figure, tmp_path / "sub" / "chelsea_x2")
    assert [path.suffix for path in paths] == [".png", ".pdf"]
    with Image.open(paths[0]) as image:
        assert image.size[0] > 600
    assert paths[1].read_bytes().startswith(b"%PDF")
    assert len(list((tmp_path / "sub").iterdir())) == 2
    with pytest.raises(UserError, match="not inside"):
        side_by_side(tiny_images / "chelsea.png", 2, {}, Box(80, 0, 30, 10))
    assert side_by_side(tiny_images / "chelsea.png", 3, {}, box, degradation="BD").title == "chelsea ×3, BD"
    low = draw(side_by_side(tiny_images / "chelsea.png", 2, {"low": lambda x: imresize(x, 2)}, box, low=["low"]))
    np.testing.assert_array_equal(low.axes[-1].images[0].get_array(), bicubic.images[0].get_array())
    assert low.axes[-1].get_xlabel() == bicubic.get_xlabel()
    many = draw(side_by_side(tiny_images / "chelsea.png", 2, {f"n{k}": lambda x: x for k in range(10)}, box))
    assert many.get_size_inches()[0] < 25  # in two rows
    rows = [axis.get_subplotspec().rowspan.start for axis in many.axes]
    assert rows == [0] * 7 + [1] * 6
    long = {"a name of its own, far too long for one line": lambda x: x}
    title = draw(side_by_side(tiny_images / "chelsea.png", 2, long, box)).axes[-1].title
    assert title.get_text() == "a name of its own, far too\nlong for one line"
    assert title.get_size() > 6


def test_other_programs_images_stand_beside_the_networks(
    tiny_images: Path, tmp_path: Path, entry_point: Callable
) -> None:
    """A panel each, scored by the protocol; a picture of another size is refused by name."""
    from drrn.images import read_luminance
    from drrn.protocol import prepare, score

    path = tiny_images / "chelsea.png"
    x, truth = prepare(read_luminance(path), 2)
    made = np.round(np.clip((x + truth) / 2, 0, 1) * 255).astype(np.uint8)
    folder = tmp_path / "theirs"
    folder.mkdir()
    Image.fromarray(made).save(folder / "chelsea_x2.png")
    arguments = [f"compare={path}", "scale=2", f"output={tmp_path / 'out'}"]
    code, _, err = entry_point("report", *arguments, f"others={{Half way: {folder}}}")
    assert code == 0, err
    assert (tmp_path / "out" / "chelsea_x2.png").is_file()
    _, _, words = side_by_side(path, 2, {"Half way": lambda _: made / 255.0}).panels[-1]
    assert words.startswith(f"{score(made / 255.0, truth, 2)['psnr']:.2f} dB")
    Image.fromarray(made[:-4]).save(folder / "chelsea_x2.png")
    wrong = ((f"{{A: {folder}}}", "chelsea_x2.png has"), ("{A: nowhere}", "others.A"), ("[a]", "others = "))
    for others, words in wrong:
        code, _, err = entry_point("report", *arguments, f"others={others}")
        assert code == 2
        assert words in err
        assert "Traceback" not in err


def test_runs_are_shown_by_their_own_degradation(
    make: Callable, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """By the last run's degradation; checkpoints, and runs of ready pairs with another image, by bicubic."""
    from drrn.networks import build
    from drrn.report import comparison
    from drrn.weights.ours import save_weights

    shown = []

    def looked(path: Path, scale: int, networks: dict, box: Box | None, low: list, degradation: str) -> object:
        shown.append((list(networks), degradation, side_by_side(path, scale, networks, box, low, degradation).title))

    monkeypatch.setattr(comparison, "side_by_side", looked)
    monkeypatch.setattr(comparison, "draw", lambda *_, **__: None)
    monkeypatch.setattr(comparison, "save", lambda *_: [tmp_path])
    monkeypatch.setattr(comparison, "png", str)
    runs = {}
    for name in ("BI", "BD", "ready"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "weights.safetensors"
        runs[name] = make("model.B=1", "model.U=1", "model.features=2", path=str(file.with_name("record.json")))
        model = runs[name]["config"]["model"]
        save_weights(file, build(model), model, {"origin": f"of {name}"})
        runs[name]["protocol"] = PROTOCOL | {"degradation": name} if name != "BI" else PROTOCOL
    photo = str(tiny_images / "chelsea.png")
    config = ReportConfig(None, [], [], str(tmp_path), photo, 3, None, [], {}, str(tmp_path))
    for order, checkpoint in (
        ("BI BD", []),
        ("BD BI", []),
        ("ready", []),
        ("BD", [tmp_path / "BI/weights.safetensors"]),
    ):
        config.checkpoint = list(map(str, checkpoint))
        comparison.compare(config, [runs[name] for name in order.split()])
    assert shown == [
        (["of BD"], "BD", "chelsea ×3, BD"),
        (["of BI"], "BI", "chelsea ×3"),
        (["of ready"], "BI", "chelsea ×3"),
        (["of BI"], "BI", "chelsea ×3"),
    ]
    assert capsys.readouterr().out.count("since trained for another degradation: DRRN_B1U1_2f s1") == 2


def test_a_picture_shows_the_best_of_many_runs(make: Callable) -> None:
    """In the order of the records, by the set and scale of the last one: a run without them is not shown."""
    psnr = [30.0, 35.0, 31.0, 34.0, 33.0, 36.0, 32.0, 30.5]
    runs = [make(f"seed={seed}", psnr=value) for seed, value in enumerate(psnr)]
    runs[1]["means"][0]["set"] = "another"
    assert [run["seed"] for run in best(runs)] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("asked", [{}, {"box": [0, 0, 9, 9]}, {"checkpoint": ["w"]}, {"others": {"a": "b"}}])
def test_a_picture_that_was_asked_for_is_not_left_out(
    asked: dict, make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise UserError("no weights")

    monkeypatch.setattr(contents, "compare", refuse)
    monkeypatch.setattr(contents, "study_sections", lambda *arguments: [])
    monkeypatch.setattr(contents, "tables_part", lambda *arguments: contents.Part("Tables", [], []))
    config = replace(ReportConfig(None, [], [], str(tmp_path), None, None, None, [], {}, "data"), **asked)
    with pytest.raises(UserError, match="no weights") if asked else nullcontext():
        contents.write_report(config, [make()], "report.py")
    assert (tmp_path / "index.html").is_file()
    assert asked or capsys.readouterr().err == "no pictures: no weights\n"


def test_images_of_one_stem_are_two_pictures(tmp_path: Path, entry_point: Callable) -> None:
    """a.png and a.jpg; and a name with a point in it is kept whole."""
    pixels = np.asarray(skimage.data.camera()[100:164, 200:264])
    for name in ("a.png", "a.bmp", "b.c.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    for name in ("a.png", "a.bmp", "b.c.png"):
        code, _, err = entry_point("report", f"compare={tmp_path / name}", f"output={tmp_path / 'out'}")
        assert code == 0, err
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {f"{name}_x3{form}.png" for name in ("a.png", "a.bmp", "b.c") for form in ("", "_narrow")}


def test_presets_are_inside_their_images(drrn_data: Path) -> None:
    """The three images of Fig. 7 exist and hold their boxes."""
    for set_name, file, scale, box in FIG7.values():
        if not (drrn_data / set_name / file).is_file():
            pytest.skip(f"{set_name}/{file} is not under DRRN_DATA")
        with Image.open(drrn_data / set_name / file) as image:
            assert box.left + box.width <= image.width - image.width % scale
            assert box.top + box.height <= image.height - image.height % scale


def test_report_refusals(entry_point: Callable, tmp_path: Path) -> None:
    """Nothing to report, absent files, no records."""
    for arguments, named in (
        ((), "nothing to report"),
        (("ledger=true", "study=fig6"), "ledger and study: the ledger is a report of its own"),
        (("scores=[nowhere.json]",), "nowhere.json"),
        ((f"runs={tmp_path}",), "record.json"),
        (("compare=nowhere.png",), "nowhere.png"),
        (("compare=ppt3", "box=[1,2,3]"), "box"),
    ):
        code, _, err = entry_point("report", *arguments, f"output={tmp_path / 'out'}")
        assert code == 2, arguments
        assert named in err
        assert "Traceback" not in err


def test_runs_table() -> None:
    """One row for bicubic per protocol, then one per run, with its protocol's departures."""
    means = [
        {"set": "s", "scale": 2, "images": 1, "psnr": 31.0, "ssim": 0.9, "bicubic_psnr": 30.0, "bicubic_ssim": 0.8}
    ]
    record = {
        "name": "DRRN_B1U2 s1",
        "structure": {"depth": 6, "conv_weights": 4896},
        "budget": {"steps": 1500},
        "means": means,
        "protocol": PROTOCOL,
    }
    table = runs_table([record, json.loads(json.dumps({**record, "name": "other s1", "means": []}))])
    assert table.rows == [
        ["bicubic", "", "0", "", "30.00 / 0.8000"],
        ["DRRN_B1U2 s1", "6", "4,896", "1,500", "31.00 / 0.9000"],
    ]
    blurred = {"name": "DRRN_B1U2 s2", "means": [means[0] | {"bicubic_psnr": 28.0}], "status": "stopped"}
    blurred["protocol"] = PROTOCOL | {"degradation": "BD"}
    noisy = {"name": "DRRN_B1U2 s3", "means": [means[0] | {"set": "t"}], "protocol": PROTOCOL | {"degradation": "DN"}}
    rows = runs_table([record, record | blurred, record | noisy]).rows
    assert [(row[0], *row[4:]) for row in rows] == [
        ("bicubic", "30.00 / 0.8000", MISSING),
        ("bicubic (degradation=BD)", "28.00 / 0.8000", MISSING),
        ("bicubic (degradation=DN)", MISSING, "30.00 / 0.8000"),
        ("DRRN_B1U2 s1", "31.00 / 0.9000", MISSING),
        ("DRRN_B1U2 s2 (stopped, degradation=BD)", "31.00 / 0.9000", MISSING),
        ("DRRN_B1U2 s3 (degradation=DN)", MISSING, "31.00 / 0.9000"),
    ]
