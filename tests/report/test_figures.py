"""Studies: the runs that are drawn together, the content of figures, and the page that gathers them."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from drrn.disk import write_json
from drrn.errors import UserError
from drrn.paper import paper_numbers
from drrn.report.figures import curve, draw
from drrn.report.groups import PAPER_PATCHES, Point, RunGroup
from drrn.report.measurements import MISSING
from drrn.report.page import Part, Section, write_page
from drrn.report.studies import planned, points_table, run_groups


def names(one: RunGroup) -> dict[str, list[int]]:
    """Structure → seeds of its finished runs."""
    return {point.name: [run["seed"] for run in point.finished()] for point in one.points if point.runs}


# ---------------------------------------------------------------- which runs belong together


def test_plans_are_the_papers() -> None:
    """The points of the sweeps are those of Sec. 4.3 to 4.5, at the depths that the paper prints."""
    fig6 = [(model["B"], model["U"]) for model in planned("fig6")]
    listed = {(3, 1), (3, 2), (3, 3), (3, 4), (1, 3), (2, 3), (4, 3), (1, 25), (17, 1), (3, 8)}
    assert len(fig6) == 10
    assert set(fig6) == listed
    depth = {(int(row["B"]), int(row["U"])): int(row["depth"]) for row in paper_numbers("fig6")}
    assert all(depth[B, U] == (1 + 2 * U) * B + 1 for B, U in fig6)
    fig8 = planned("fig8")
    assert sorted(model["B"] + 1 for model in fig8 if model["U"] == 0) == [16, 22, 28]
    assert sum(model["weight_sharing"] and model["multi_path"] and model["U"] > 0 for model in fig8) == 3
    assert [(m["weight_sharing"], m["multi_path"]) for m in planned("table4") if m["U"]] == [
        (False, False), (False, True), (True, False), (True, True),
    ]  # fmt: skip


def test_one_run_serves_several_studies(make: Callable) -> None:
    """Fig. 8's DRRN_B3U4 is a point of Fig. 6 and Table 4 too; the folder's name does not matter."""
    run = make("model.B=3", "model.U=4", "study=fig8")
    for study in ("fig6", "fig8", "table4", "curves"):
        (one,) = run_groups(study, [run])
        assert names(one) == {"DRRN_B3U4_2f": [1]}
    assert run_groups("fig1", [run]) == []  # none of the networks that Fig. 1 is about


@pytest.mark.parametrize(
    "override",
    ["optim.lr=0.05", "data.batch_size=32", "trainer.max_steps=1501", "model.features=4", "model.norm=none",
     "data.scales=[3]", "model.bias=false", "trainer_extra={limit_test_batches: 1}"],
)  # fmt: skip
def test_recipes_never_mix(make: Callable, override: str) -> None:
    """A key that the study does not vary separates runs; seed, structure, folder and workers do not."""
    base = ("model.B=3", "model.U=4")
    same = [
        make(*base),
        make(*base, "seed=2", "study=elsewhere", "data.num_workers=1"),
        make("model.B=3", "model.U=2"),
    ]
    assert len(run_groups("fig8", same)) == 1
    found = run_groups("fig8", [*same, make(*base, override, "seed=3")])
    assert sorted(sum(map(len, names(one).values())) for one in found) == [1, 3]
    assert len({one.stem for one in found}) == 2  # files too


def test_figures_1_and_9_compare_structures(make: Callable) -> None:
    """VDSR has 64 features and DRRN 128: there the width is the structure's, the recipe is still the group's."""
    runs = [
        make("model.B=1", "model.U=9"),
        make("model.B=19", "model.U=0", "model.features=64"),
        make("model.B=2", "model.U=3"),
    ]
    (one,) = run_groups("fig9", runs)
    assert set(names(one)) == {"DRRN_B1U9_2f", "VDSR_d20_64f", "DRRN_B2U3_2f"}
    assert {point.short for point in one.points if point.runs} == {"B1U9", "VDSR d20", "B2U3"}
    other = Point("ResNet_16f", {"network": "resnet", "features": 16}, 20, 41_760, ("Set5", 3))
    assert other.short == "ResNet 16f"
    assert len(run_groups("fig9", [*runs, make("model.B=1", "model.U=25", "optim.lr=0.05")])) == 2


def test_only_finished_runs_count(make: Callable) -> None:
    """Running, failed and stopped runs and parts of a set have no number; finished goes before failed."""
    base = ("model.B=3",)
    failed = {"status": "failed", "error": "Diverged: at step 7"}
    runs = [
        make(*base, "model.U=1", **failed),
        make(*base, "model.U=2", status="running"),
        make(*base, "model.U=3", images=1),
        make(*base, "model.U=4", **failed),
        make(*base, "model.U=4", psnr=31.5, path="runs/other/record.json"),
        make(*base, "model.U=4", **failed, path="runs/third/record.json"),
        make(*base, "model.U=8", "seed=2", status="stopped"),
    ]
    (one,) = run_groups("fig6", runs)
    states = {(point.name, seed): point.status(seed) for point in one.points for seed in one.seeds}
    assert {name[:-3]: states[name, 1] for name, seed in states if seed == 1 and states[name, 1] != "missing"} == {
        "DRRN_B3U1": "failed", "DRRN_B3U2": "running", "DRRN_B3U3": "not scored", "DRRN_B3U4": "finished",
    }  # fmt: skip
    assert states["DRRN_B3U8_2f", 2] == "stopped"
    assert [point.values() for point in one.points if point.values()] == [{1: 31.5}]
    assert len(one.missing) == 19  # of ten points with two seeds
    assert "DRRN_B3U1_2f s1 (failed)" in one.missing
    k = 3 * 9 * 2 * 2 * 2 + 9 * 2 + 2 * 9 * 2 * 2 + 9 * 2  # Eq. 9
    row = next(row for row in points_table(one).rows if row[0] == "DRRN_B3U4_2f")
    assert row == ["DRRN_B3U4_2f", "28", str(k), "31.50", "missing", "31.50", "33.99"]


@pytest.mark.parametrize("key", ["patches", "protocol"])
def test_runs_that_do_not_compare_are_refused(make: Callable, key: str) -> None:
    """Other training images under the same configuration, another protocol: both files are named."""
    one, other = make("model.B=3", "model.U=4"), make("model.B=3", "model.U=2")
    one[key], other[key] = "a", "b"
    with pytest.raises(UserError, match=r"B3U2.*B3U4"):
        run_groups("fig6", [one, other])
    other["status"] = "failed"
    assert len(run_groups("fig6", [one, other])) == 1


def test_a_run_that_is_there_twice_is_not_chosen_by_its_path(make: Callable) -> None:
    """Copies with the same scores are one run; with different scores they are refused."""
    first, copied, other = make(), make(path="copy/record.json"), make(psnr=31.5, path="other/record.json")
    (one,) = run_groups("curves", [first, copied])
    assert len(one.finished) == 1
    with pytest.raises(UserError, match=r"other/record\.json are the same run"):
        run_groups("curves", [first, other])


def test_another_network_is_drawn_by_its_records_words(make: Callable) -> None:
    """A network unknown to the package gets its name, depth and weights from its record, in every study."""
    other = make(psnr=31.7, structure={"name": "TOY_width4", "depth": 3, "conv_weights": 8032})
    other["config"]["model"] = {"network": "toy", "width": 4, "features": [3, 5]}
    (group,) = run_groups("fig1", [make("model.B=1", "model.U=9"), other])
    assert names(group) == {"DRRN_B1U9_2f": [1], "TOY_width4": [1]}
    weights, depth = draw(group).axes
    for axis, x in ((weights, 8032), (depth, 3)):
        assert any(line.get_xdata()[0] == x and line.get_ydata()[0] == 31.7 for line in axis.lines)
    (group,) = run_groups("curves", [other])
    assert [axis.get_title() for axis in draw(group).axes] == ["TOY"]
    assert points_table(group).rows == [["TOY_width4", "3", "8,032", "31.70", MISSING]]
    assert run_groups("fig6", [other]) == []
    other["structure"]["name"] = 8 * "TOY"  # too long for its panel
    (axis,) = draw(*run_groups("curves", [other])).axes
    assert [text.get_position() for text in axis.texts if text.get_text() == 8 * "TOY"] == [(7, 0)]


def test_origin(make: Callable) -> None:
    """Features, steps × batch, share of the paper's patches, recipe, training sets, seeds, protocol, commit."""
    runs = [
        make("model.B=3", "model.U=4", *change) for change in (["seed=1"], ["seed=5"], ["model.multi_path=false"])
    ]
    for run in runs:
        run["config"]["data"]["train"] = ["T91", "photos/mine"]
    (one,) = run_groups("table4", runs)
    origin = " ".join(one.origin())
    assert PAPER_PATCHES == 464_056 * 128
    for said in (
        "2 features", "1,500 steps × 16", "0.04 % of the paper's 464,056 × 128", "SGD 0.1", "clipping by norm",
        "; T91 and mine, ×2, ×3 and ×4", "Means over seeds 1 and 5 (1 to 2 a point)", "protocol paper v1", "0123456",
        one.digest,
    ):  # fmt: skip
        assert said in origin
    short = make(
        "trainer.max_steps=1", "data.batch_size=1", budget={"steps": 1, "patches": 1, "epochs": 0.1, "seconds": 1}
    )
    (one,) = run_groups("runs", [short])
    assert "0.0000017 %" in one.share()


# ---------------------------------------------------------------- what figures show


def drawn(axis: Axes) -> dict[tuple[float, float], str]:
    """The annotated points of an axis: (x, y) → text."""
    return {tuple(float(v) for v in text.xy): text.get_text() for text in axis.texts if hasattr(text, "xy")}


@pytest.mark.parametrize("study", ["fig6", "fig8", "table4", "fig1", "fig9", "curves", "runs"])
def test_nothing_clipped_or_hidden(whole: Callable, make: Callable, study: str) -> None:
    """Wide and narrow: all text is inside the figure, values and names do not overlap, the run length is shown."""
    records = [*whole("fig6"), make("model.B=1", "model.U=9", psnr=31.02)]
    records += whole("fig8") + whole("table4", (1,))
    records = list({(run["name"], run["seed"]): run for run in reversed(records)}.values())[::-1]  # fig6's first
    (one,) = run_groups(study, records)
    for stacked in (False, True):
        figure = draw(one, stacked)
        said = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
        assert f"{one.share()} of the paper's 464,056 × 128" in said
        ink = figure.get_tightbbox()  # inches
        assert min(ink.x0, ink.y0) >= 0
        assert ink.x1 <= figure.get_figwidth()
        assert ink.y1 <= figure.get_figheight()
        for axis in figure.axes:
            named = [text for text in axis.texts if hasattr(text, "xy")]
            boxes = [Text.get_window_extent(text) for text in named]
            for (a, first), (b, second) in combinations(zip(named, boxes, strict=True), 2):
                assert not first.shrunk(0.95, 0.8).overlaps(second.shrunk(0.95, 0.8)), (study, stacked, a, b)


def test_fig6(whole: Callable) -> None:
    """Means over seeds at their B and U, the paper's printed values at theirs, contours of constant depth."""
    (one,) = run_groups("fig6", [run for run in whole("fig6") if run["structure"]["name"] != "DRRN_B17U1_2f"])
    paper, ours, *_ = draw(one).axes
    expected = {(B, U): f"{31 + 0.01 * k + 0.0045:.2f}" for k, (B, U) in enumerate(
        [(3, 1), (3, 2), (3, 3), (3, 4), (1, 3), (2, 3), (4, 3), (1, 25), (17, 1), (3, 8)])}  # fmt: skip
    missing = expected.pop((17, 1))
    assert drawn(ours) == expected
    assert missing not in drawn(ours).values()
    assert drawn(paper) == {
        (2, 3): "33.76", (3, 2): "33.77", (3, 4): "33.99", (1, 9): "33.93", (1, 25): "34.03", (3, 8): "34.04",
        (17, 1): "34.03",
    }  # fmt: skip
    hollow, filled = ours.collections[:2]
    np.testing.assert_array_equal(hollow.get_offsets(), [[17, 1]])
    np.testing.assert_allclose(sorted(filled.get_array()), sorted(p.mean() for p in one.points if p.values()))
    depths = [(1 + 2 * line.get_ydata()) * line.get_xdata() + 1 for line in ours.lines]
    np.testing.assert_allclose([depth.mean() for depth in depths], [10, 20, 30, 50])
    assert all(np.ptp(depth) < 1e-9 for depth in depths)


def test_fig8(whole: Callable) -> None:
    """One line per variant through the means at d = 16, 22, 28; a small point for every seed."""
    (one,) = run_groups("fig8", whole("fig8"))
    paper, ours = draw(one).axes
    assert [len(line.get_xdata()) for line in ours.lines] == [3] * 4
    vdsr = ours.lines[0]
    assert np.abs(vdsr.get_xdata() - [16, 22, 28]).max() < 1
    np.testing.assert_allclose(vdsr.get_ydata(), [31.0045, 31.0145, 31.0245])
    np.testing.assert_allclose(sorted(ours.collections[0].get_offsets()[:, 1]), [31.003, 31.006])
    printed = sorted(float(y) for line in paper.lines for y in line.get_ydata())
    assert printed == [33.77, 33.86, 33.92, 33.95, 33.97, 33.99]


def test_table4(whole: Callable) -> None:
    """Each variant on its row in both panels; one without a run says so."""
    (one,) = run_groups("table4", [run for run in whole("table4") if "NS_C" not in run["structure"]["name"]])
    paper, ours = draw(one).axes
    assert [text for _, text in sorted(drawn(paper).items(), key=lambda item: item[0][1])] == [
        "33.86", "33.92", "33.97", "33.95", "33.99",
    ]  # fmt: skip
    assert {round(y): text for (_, y), text in drawn(ours).items()} == {
        0: "31.00",
        2: "31.02",
        3: "31.03",
        4: "31.04",
    }
    assert "not measured" in [text.get_text() for text in ours.texts]


def test_fig1(make: Callable) -> None:
    """Weights as the paper counts them (2, 6 and 14 times 297K); a method without a number is no point."""
    (one,) = run_groups("fig1", [make("model.B=1", "model.U=9", psnr=31.5)])
    weights, depth = draw(one).axes
    points = drawn(weights)
    assert points.pop((float(9 * 2 + 2 * 9 * 2 * 2 + 9 * 2), 31.5)) == "B1U9"
    assert points == {
        (594e3, 33.66): "VDSR", (1782e3, 33.82): "DRCN", (4158e3, 33.82): "RED30", (297e3, 33.93): "DRRN_B1U9",
        (297e3, 34.03): "DRRN_B1U25",
    }  # fmt: skip
    assert drawn(depth)[20.0, 31.5] == "B1U9"
    assert drawn(depth)[3.0, 32.75] == "SRCNN"
    assert not any("CSCN" in text for text in drawn(depth).values())


def test_curves(make: Callable) -> None:
    """Mean PSNR over images by patches seen; an incomplete validation is left out."""
    run = make("model.B=3", "model.U=4", psnr=31.0)
    assert curve(run)[0] == [8000, 16_000, 24_000]
    np.testing.assert_allclose(curve(run)[1], [30.8, 30.9, 31 - 100 / 1500])
    del run["validation"][2]  # one image of step 1000
    assert curve(run)[0] == [8000, 24_000]
    (one,) = run_groups("curves", [run])
    (axis,) = draw(one).axes
    np.testing.assert_array_equal(axis.lines[0].get_xdata(), [8000, 24_000])
    assert draw(*run_groups("curves", [run | {"validation": []}])) is None


def test_a_grid_of_ones_own(make: Callable) -> None:
    """Any B, U, set and scale: one line per B by depth, and the B–U plane; Set5 ×3 is not required."""
    runs = [make(f"model.B={b}", f"model.U={u}", psnr=30 + b + u / 10) for b in (1, 5) for u in (2, 6, 11)]
    for run in runs:
        for row in (*run["means"], *run["validation"]):
            row |= {"set": "own", "scale": 2}
    (group,) = run_groups("runs", runs)
    assert group.place == ("own", 2)
    depth, plane, *_ = draw(group).axes
    assert sorted(tuple(line.get_xdata()) for line in depth.lines) == [(6, 14, 24), (26, 66, 116)]
    np.testing.assert_allclose(sorted(depth.lines[0].get_ydata()), [31.2, 31.6, 32.1])
    assert drawn(plane)[5, 11] == "36.10"
    assert list(plane.get_xticks()) == [1, 5]
    assert points_table(group).columns == ["structure", "depth", "weights", "seed 1"]
    assert draw(*run_groups("curves", runs)) is not None
    (depth, *_) = draw(*run_groups("runs", runs[:1])).axes
    assert all(tick == int(tick) for tick in depth.get_xticks())  # also for one network: layers are whole numbers


def test_dense_grids_are_legible(make: Callable) -> None:
    """No marker of B = 2 hides a value of B = 3; of more names than a panel has room for, some are shown."""
    runs = [make(f"model.B={b}", f"model.U={u}", psnr=30 + b / 9 + u / 90) for b in (1, 2, 3) for u in range(1, 12)]
    plane = draw(*run_groups("runs", runs)).axes[1]
    values = {tuple(text.xy): Text.get_window_extent(text) for text in plane.texts if hasattr(text, "xy")}
    for u in range(1, 12):
        marker = Bbox([plane.transData.transform((2, u))] * 2).padded(4 * plane.figure.dpi / 72)
        assert not values[3, u].overlaps(marker), u
    (axis,) = draw(*run_groups("curves", runs)).axes
    named = [text for text in axis.texts if text.get_text().startswith("B")]
    assert 10 < len(named) < len(runs)
    assert min(Text.get_window_extent(text).y0 for text in named) >= axis.get_window_extent().y0


def test_a_try_of_a_few_steps_is_folded_away(make: Callable) -> None:
    """A run of 20 steps is a try beside one of 1,500 with the same recipe; with another recipe it is a group."""
    tried = {"budget": {"steps": 20}}
    runs = [
        make("model.B=3"),
        make("model.B=3", "trainer.max_steps=20", **tried),
        make("model.B=3", "trainer.max_steps=20", "optim.lr=0.5", **tried),
        make("model.B=3", "trainer.max_steps=900", budget={"steps": 900}),
    ]
    groups = run_groups("runs", runs)
    assert [(group.steps, [other.steps for other in group.tries]) for group in groups] == [
        ([1500], [[20]]), ([900], []), ([20], []),
    ]  # fmt: skip


@pytest.mark.parametrize("values", [[33.851, 33.858], [33.0, 36.0], [33.85]])
def test_ticks_can_be_told_apart(make: Callable, values: list[float]) -> None:
    """However close the values are, no two ticks of the axis of PSNR read the same."""
    runs = [make("model.B=3", f"model.U={u + 1}", psnr=psnr) for u, psnr in enumerate(values)]
    figure = draw(*run_groups("runs", runs))
    figure.draw_without_rendering()
    ticks = [tick.label1.get_text() for tick in figure.axes[0].yaxis.get_major_ticks()]
    assert len(ticks) == len(set(ticks)) > 2


# ---------------------------------------------------------------- the page


class Page(HTMLParser):
    """Parses a page's elements."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, key: str) -> list[str]:
        """An attribute of every element of a kind."""
        return [attributes.get(key) or "" for name, attributes in self.tags if name == tag]


def test_page(entry_point: Callable, make: Callable, tmp_path: Path) -> None:
    """Through the entry point: files, one page that needs no network, links to the records, missing runs."""
    runs = [
        make("model.B=3", "model.U=4", "study=fig8"),
        make("model.B=3", "model.U=2", "seed=2", "study=fig6"),
        make("model.B=3", "model.U=1", status="failed", error="Diverged: <script>alert(1)</script>"),
    ]
    for number, run in enumerate(runs):
        write_json(tmp_path / "runs" / run["study"] / str(number) / "record.json", run)
    output = tmp_path / "out" / "report"
    code, out, err = entry_point("report", "study=[fig6,fig1]", f"runs={tmp_path / 'runs'}", f"output={output}")
    assert code == 0, err
    digest = run_groups("fig6", runs)[0].digest
    for suffix in (".png", ".pdf", ".md", ".csv", ".tex", "-curves.png"):
        assert (output / f"fig6-{digest}{suffix}").stat().st_size > 100
    page = Page(output / "index.html")
    assert page.open == []
    assert page.all("html", "lang") == ["en"]
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    sources = page.all("img", "src") + page.all("source", "srcset")
    assert len(sources) == 4  # the figure and the curves, each wide and narrow
    assert all(source.startswith("data:image/") for source in sources)
    assert all("DRRN_B3U4_2f 31.00 dB" in alt for alt in page.all("img", "alt"))
    files = [link for link in page.all("a", "href") if not link.startswith("#")]
    assert "../../runs/fig8/0/record.json" in files
    assert all((output / link).is_file() for link in files)
    for said in (
        "2 of 20 runs finished, 1 failed, 17 missing", "DRRN_B1U25_2f s1", "python src/train.py sweeps=fig1",
        "0.04 % of the paper's", "weights.safetensors",
    ):  # fmt: skip
        assert said in page.text, said
    assert "written" in out


def test_the_same_records_make_the_same_page(make: Callable, tmp_path: Path) -> None:
    """The page has no time and no random names."""
    from drrn.report.page import Picture, svg

    (one,) = run_groups("table4", [make("model.B=3", "model.U=4")])
    for name in ("a.html", "b.html"):
        pictures = [Picture("t", "a", svg(draw(one)), None, [])]
        part = Part("one", one.origin(), [*pictures, points_table(one)])
        write_page(tmp_path / name, "title", [Section("table4", "Table 4", [part])], "python src/report.py")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_refusals(entry_point: Callable, make: Callable, tmp_path: Path) -> None:
    """An unknown study, a study without runs, a study with files of scores: one line that says what to do."""
    write_json(tmp_path / "runs" / "a" / "record.json", make("model.B=2", "model.U=2"))
    for arguments, named in (
        (("study=fig7",), "fig6, fig8"),
        (("study=fig6",), "sweeps=fig6"),
        (("study=fig6", "scores=[pyproject.toml]"), "scores"),
    ):
        code, _, err = entry_point("report", *arguments, f"runs={tmp_path / 'runs'}", f"output={tmp_path / 'out'}")
        assert code == 2, arguments
        assert named in err
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
