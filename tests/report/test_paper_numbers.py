"""`data/paper/`: the paper's numbers are complete, and consistent with each other and with the text's claims."""

from __future__ import annotations

import csv
import re
from itertools import product
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "data" / "paper"
FILES = ("table2", "table3", "table4", "fig1", "fig6", "fig8", "fig9")
SCALES = ("2", "3", "4")
OURS = ("DRRN_B1U9", "DRRN_B1U25")
TABLE2_METHODS = ("Bicubic", "SRCNN", "SelfEx", "RFL", "VDSR", "DRCN", *OURS)
TABLE3_METHODS = ("Bicubic", "SRCNN", "SelfEx", "RFL", "PSyCo", "VDSR", *OURS)


def rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def cells(name: str, column: str) -> dict[tuple[str, str, str], float]:
    """(dataset, scale, method) → the stated value; rows where it is empty are left out."""
    return {(r["dataset"], r["scale"], r["method"]): float(r[column]) for r in rows(name) if r[column]}


def test_the_folder_holds_these_files_and_no_other() -> None:
    assert {path.stem for path in FOLDER.glob("*.csv")} == {"table1", *FILES, "text"}


def test_the_text_s_numbers_stand_in_it_once() -> None:
    """The margins follow from the tables; every row names its place in the paper."""
    table = rows("text")
    assert len({row["key"] for row in table}) == len(table)
    for row in table:
        assert None not in row.values()
        assert re.fullmatch(r"Abstract|Fig\. 1 caption|Sec\. [124](\.\d)?", row["where"]), row
        assert float(row["value"]) > 0
    for row in (row for row in table if row["key"].startswith("margin")):
        _, dataset, scale, first, second = row["key"].split(" ")
        printed = cells("table2", "psnr") | cells("fig1", "psnr")
        gain = printed[dataset, scale, first] - printed[dataset, scale, second]
        assert float(row["value"]) == pytest.approx(gain, abs=1e-9)


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_whole_and_says_where_it_stands(name: str) -> None:
    table = rows(name)
    assert table
    for row in table:
        assert None not in row, f"more fields than columns: {row}"
        assert None not in row.values(), f"fewer fields than columns: {row}"
        assert re.match(r"(Table [234]|Sec\. [14](\.\d)?|Fig\. 1 caption)\b", row["where"]), row
        assert row["dataset"] in ("Set5", "Set14", "BSD100", "Urban100")
        assert row["scale"] in SCALES
        assert "nan" not in [value.lower() for value in row.values()]
        if "psnr" in row and not row["psnr"]:
            assert "picture" in row.get("note", ""), f"an empty PSNR needs a note: {row}"


@pytest.mark.parametrize(
    ("name", "column", "decimals", "low", "high"),
    [
        ("table2", "psnr", 2, 23, 38),
        ("table2", "ssim", 4, 0.65, 0.96),
        ("table3", "ifc", 3, 2.2, 9),
        ("table4", "psnr", 2, 33.8, 34.1),
        ("fig1", "psnr", 2, 32, 34.1),
        ("fig6", "psnr", 2, 33.7, 34.1),
        ("fig8", "psnr", 2, 33.7, 34.1),
        ("fig9", "psnr", 2, 29, 34.1),
    ],
)
def test_values_are_printed_as_in_the_paper(name: str, column: str, decimals: int, low: float, high: float) -> None:
    values = [row[column] for row in rows(name) if row[column]]
    assert values
    for value in values:
        assert re.fullmatch(rf"\d+\.\d{{{decimals}}}", value), value
        assert low <= float(value) <= high, value


# Tables 2 and 3


@pytest.mark.parametrize(
    ("name", "sets", "methods"),
    [
        ("table2", ("Set5", "Set14", "BSD100", "Urban100"), TABLE2_METHODS),
        ("table3", ("Set5", "Set14", "Urban100"), TABLE3_METHODS),
    ],
)
def test_tables_2_and_3_have_every_cell_once(name: str, sets: tuple[str, ...], methods: tuple[str, ...]) -> None:
    keys = [(row["dataset"], row["scale"], row["method"]) for row in rows(name)]
    assert len(keys) == len(set(keys))
    assert set(keys) == set(product(sets, SCALES, methods))


# What an independent implementation of the protocol measured for bicubic: PSNR, SSIM, IFC.
MEASURED_BICUBIC = {
    ("Set5", "2"): (33.6614, 0.92988, 6.08284),
    ("Set5", "3"): (30.3922, 0.86821, 3.57914),
    ("Set5", "4"): (28.4207, 0.81038, 2.32892),
    ("Set14", "2"): (30.2318, 0.86865, 6.10456),
    ("Set14", "3"): (27.5405, 0.77361, 3.47303),
    ("Set14", "4"): (26.0001, 0.70186, 2.23692),
    ("BSD100", "2"): (29.5579, 0.84310, None),
    ("BSD100", "3"): (27.2072, 0.73844, None),
    ("BSD100", "4"): (25.9606, 0.66738, None),
    ("Urban100", "2"): (26.8745, 0.8401, None),
    ("Urban100", "3"): (24.4580, 0.7344, None),
    ("Urban100", "4"): (23.1411, 0.6570, None),
}


@pytest.mark.parametrize("key", list(MEASURED_BICUBIC))
def test_the_bicubic_column_is_what_the_protocol_measures(key: tuple[str, str]) -> None:
    psnr, ssim, ifc = MEASURED_BICUBIC[key]
    assert cells("table2", "psnr")[*key, "Bicubic"] == pytest.approx(psnr, abs=0.01)
    assert cells("table2", "ssim")[*key, "Bicubic"] == pytest.approx(ssim, abs=0.001)
    if ifc is not None:
        assert cells("table3", "ifc")[*key, "Bicubic"] == pytest.approx(ifc, abs=0.001)


@pytest.mark.parametrize(
    ("name", "column", "methods"),
    [
        ("table2", "psnr", TABLE2_METHODS),
        ("table2", "ssim", TABLE2_METHODS),
        ("table3", "ifc", TABLE3_METHODS),
    ],
)
def test_scores_fall_with_the_scale_and_bicubic_is_last(name: str, column: str, methods: tuple[str, ...]) -> None:
    score = cells(name, column)
    for dataset in {key[0] for key in score}:
        for method in methods:
            assert score[dataset, "2", method] > score[dataset, "3", method] > score[dataset, "4", method]
            for scale in SCALES:
                assert score[dataset, scale, method] >= score[dataset, scale, "Bicubic"]


@pytest.mark.parametrize("column", ["psnr", "ssim"])
def test_table_2_both_drrn_outperform_everything(column: str) -> None:  # Sec. 4.4
    score = cells("table2", column)
    for dataset, scale in MEASURED_BICUBIC:
        best_prior = max(score[dataset, scale, method] for method in TABLE2_METHODS if method not in OURS)
        assert score[dataset, scale, "DRRN_B1U25"] > score[dataset, scale, "DRRN_B1U9"] > best_prior


def test_table_3_drrn_b1u25_outperforms_everything() -> None:  # Sec. 4.4
    score = cells("table3", "ifc")
    for dataset, scale in product(("Set5", "Set14", "Urban100"), SCALES):
        others = [score[dataset, scale, method] for method in TABLE3_METHODS if method != "DRRN_B1U25"]
        assert score[dataset, scale, "DRRN_B1U25"] > max(others)


def test_the_margins_that_the_text_states() -> None:
    score = cells("table2", "psnr")
    for scale, margin in zip(SCALES, (0.47, 0.38, 0.26), strict=True):  # Sec. 4.4, Urban100
        prior = max(score["Urban100", scale, method] for method in TABLE2_METHODS if method not in OURS)
        assert score["Urban100", scale, "DRRN_B1U25"] - prior == pytest.approx(margin, abs=1e-9)
    figure = cells("fig1", "psnr")
    for method, margin in (("VDSR", 0.37), ("DRCN", 0.21), ("RED30", 0.21)):  # caption of Fig. 1
        gain = figure["Set5", "3", "DRRN_B1U25"] - figure["Set5", "3", method]
        assert gain == pytest.approx(margin, abs=1e-9)


# Structure: depth and weights


def conv_weights(B: int, U: int, features: int = 128) -> int:
    """The paper's k: 3×3 weights layer by layer, those of a block's residual units shared; no bias, no BN."""
    channels = [1]
    count = 0
    for _ in range(B):
        count += 9 * channels[-1] * features  # the block's first convolution
        count += 2 * 9 * features * features if U else 0  # one pair, whatever U
        channels.append(features)
    return count + 9 * features * 1


def depth(B: int, U: int) -> int:
    return (1 + 2 * U) * B + 1  # Eq. 7


def test_fig6_has_the_points_of_the_text() -> None:
    points = {(int(row["B"]), int(row["U"])): row for row in rows("fig6")}
    assert len(points) == len(rows("fig6"))
    fixed_to_3 = {(3, n) for n in range(1, 5)} | {(n, 3) for n in range(1, 5)}
    assert set(points) == fixed_to_3 | {(1, 9), (1, 25), (17, 1), (3, 8)}
    stated = {(2, 3): 33.76, (3, 2): 33.77, (17, 1): 34.03, (3, 8): 34.04, (1, 25): 34.03}
    for point, psnr in stated.items():
        assert float(points[point]["psnr"]) == psnr
    depths = [int(row["depth"]) for row in rows("fig6")]
    assert (min(depths), max(depths)) == (8, 52)  # Sec. 4.3: "from 8 to 52 layers"


def test_fig6_depths_and_weights_follow_the_papers_rules() -> None:
    printed = 0
    for row in rows("fig6"):
        B, U = int(row["B"]), int(row["U"])
        assert int(row["depth"]) == depth(B, U)
        assert int(row["weights"]) == conv_weights(B, U)
        if row["weights_printed"]:
            printed += 1
            agrees = row["weights_printed"] == f"{round(conv_weights(B, U) / 1000)}K"
            # The one erratum: 784K for B2U3, whose weights number 739,584.
            assert agrees == ((B, U) != (2, 3))
            assert ("erratum" in row["note"]) == (not agrees)
    assert printed == 6
    assert conv_weights(2, 3) == 739_584
    assert conv_weights(1, 25) == 297_216


def test_depths_of_the_text() -> None:
    assert [depth(2, 3), depth(3, 2), depth(1, 9), depth(1, 25), depth(17, 1), depth(3, 8)] == [
        15, 16, 20, 52, 52, 52
    ]  # fmt: skip
    for row in rows("fig8") + rows("table4"):
        if row["B"]:
            assert int(row["depth"]) == depth(int(row["B"]), int(row["U"]))
    for name, method in product(("fig1", "fig9"), OURS):
        B, U = map(int, re.fullmatch(r"DRRN_B(\d+)U(\d+)", method).groups())
        ours = [row for row in rows(name) if row["method"] == method]
        assert ours
        for row in ours:
            assert int(row["depth"]) == depth(B, U)
            assert row["weights_printed"] == f"{round(conv_weights(B, U) / 1000)}K"


# Table 4 and the figures against the tables


def test_table_4_switches() -> None:
    table = {row["method"]: row for row in rows("table4")}
    # (local residual learning, recursive learning, multi-path) and PSNR, as the five columns' marks
    assert {
        method: (*(row[s] == "true" for s in ("local_residual", "recursive", "multi_path")), row["psnr"])
        for method, row in table.items()
    } == {
        "VDSR": (False, False, False, "33.86"),
        "DRRN_NS_C": (True, False, False, "33.92"),
        "DRRN_NS": (True, False, True, "33.97"),
        "DRRN_C": (True, True, False, "33.95"),
        "DRRN": (True, True, True, "33.99"),
    }
    for method, row in table.items():
        assert {row["local_residual"], row["recursive"], row["multi_path"]} <= {"true", "false"}
        if method != "VDSR":  # NS: not shared; C: chain
            assert ("NS" in method) == (row["recursive"] == "false")
            assert method.endswith("_C") == (row["multi_path"] == "false")


def test_fig6_agrees_with_the_tables() -> None:
    points = {(row["B"], row["U"]): row["psnr"] for row in rows("fig6")}
    table2 = cells("table2", "psnr")
    assert float(points["1", "25"]) == table2["Set5", "3", "DRRN_B1U25"]
    assert float(points["1", "9"]) == table2["Set5", "3", "DRRN_B1U9"]
    assert points["3", "4"] == {row["method"]: row["psnr"] for row in rows("table4")}["DRRN"]


def test_fig8_is_complete_and_agrees_with_table_4_and_fig6() -> None:
    table = {(row["method"], row["depth"]): row["psnr"] for row in rows("fig8")}
    variants = [row["method"] for row in rows("table4")]
    assert len(table) == len(rows("fig8"))
    assert set(table) == set(product(variants, ("16", "22", "28")))
    for row in rows("table4"):
        assert table[row["method"], "28"] == row["psnr"]
    assert table["DRRN", "16"] == {(r["B"], r["U"]): r["psnr"] for r in rows("fig6")}["3", "2"]
    assert sum(bool(psnr) for psnr in table.values()) == 6


@pytest.mark.parametrize(
    ("name", "methods", "sets"),
    [
        ("fig1", "SRCNN CSCN ESPCN VDSR DRCN RED30 DRRN_B1U9 DRRN_B1U25", ("Set5",)),
        (
            "fig9",
            "A+ SelfEx RFL NBSRF PSyCo IA SRCNN DJSR CSCN ESPCN FSRCNN VDSR DRCN RED30 DRRN_B1U9 DRRN_B1U25",
            ("Set5", "Set14"),
        ),
    ],
)
def test_figs_1_and_9_are_complete_and_agree_with_table_2(name: str, methods: str, sets: tuple[str, ...]) -> None:
    keys = [(row["dataset"], row["method"]) for row in rows(name)]
    assert len(keys) == len(set(keys))
    assert set(keys) == set(product(sets, methods.split()))
    table2 = cells("table2", "psnr")
    for key, psnr in cells(name, "psnr").items():
        assert table2.get(key) == psnr or key == ("Set5", "3", "RED30")
    for row in rows(name):
        # Every number that Table 2 states is used, and nothing else but the caption's RED30.
        stated = (row["dataset"], "3", row["method"]) in table2
        assert bool(row["psnr"]) == (stated or (row["dataset"], row["method"]) == ("Set5", "RED30"))
        assert bool(row.get("psnr_elsewhere")) == bool(row.get("source"))
        assert not (row["psnr"] and row.get("psnr_elsewhere"))
