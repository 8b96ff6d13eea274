"""Fig. 2 from the networks themselves, Table 1 and the table of all networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import drrn.report.networks as tables
from drrn.networks import build
from drrn.report.ledger import Ours, Source
from drrn.report.networks import cost, table1
from drrn.report.structures import PANELS, Node, graph
from drrn.report.studies import preset


def built(structure: dict[str, Any]) -> tuple[list[Node], list[Node], list[Node]]:
    """All nodes of a network's graph, its convolutions, its sums."""
    nodes = graph(build(structure))
    return nodes, [n for n in nodes if n.kind == "conv"], [n for n in nodes if n.kind == "sum"]


def test_a_graph_is_what_table_1_says_of_the_four_networks() -> None:
    for name, structure in PANELS.items():
        nodes, convs, _ = built(structure)
        path = {id(nodes[0]): 0}  # convolutions on the longest path to a node
        for node in nodes[1:]:
            path[id(node)] = (node.kind == "conv") + max(path[id(source)] for source in node.inputs)
        assert path[id(nodes[-1])] == build(structure).depth == 6, name
        assert nodes[-1].supervised
        places = [node.place for node in nodes]
        assert len(set(places)) == len(places), name  # nothing is drawn upon something else
    x, (first, *_), sums = built(PANELS["(a) ResNet"])
    assert [s.inputs[1] for s in sums] == [first, sums[0]]  # a chain, and no global residual
    x, convs, sums = built(PANELS["(b) VDSR"])
    assert (len({c.weight for c in convs}), [s.inputs for s in sums]) == (6, [[convs[-1], x[0]]])
    x, convs, sums = built(PANELS["(c) DRCN"])
    assert len({c.weight for c in convs}) == 5  # two of the embedding, the recursion's, two of the reconstruction
    assert [n.supervised for n in convs + sums] == [False] * len(convs) + [True] * 3  # y_1, y_2 and y
    assert [s.inputs[-1] for s in sums[:2]] == [x[0]] * 2  # Eq. 2


@pytest.mark.parametrize("multi_path", [True, False])
@pytest.mark.parametrize("weight_sharing", [True, False])
def test_a_graph_shows_what_drrn_shares_and_where_its_identities_come_from(
    weight_sharing: bool, multi_path: bool
) -> None:
    switches = {"weight_sharing": weight_sharing, "multi_path": multi_path}
    nodes, convs, sums = built({"B": 1, "U": 3, "features": 2, **switches})
    assert len({c.weight for c in convs}) == (4 if weight_sharing else 8)
    expected = [convs[0]] * 3 if multi_path else [convs[0], sums[0], sums[1]]  # Eq. 5, Eq. 3
    assert [s.inputs[1] for s in sums[:3]] == expected
    assert sums[3].inputs == [convs[-1], nodes[0]]


def test_networks_that_no_figure_has_are_drawn_too() -> None:
    for name, convs, sums in (("srcnn", 3, 0), ("fsrcnn", 8, 0), ("espcn", 3, 0), ("red30", 30, 8)):
        _, found, joined = built(preset(name, features=2))
        assert (len(found), len(joined)) == (convs, sums), name


def test_table_1_sets_what_was_trained_beside_the_paper(make: Callable) -> None:
    from drrn.report.studies import run_groups

    runs = [make("model.B=1", "model.U=9", psnr=31.5), make("model.B=19", "model.U=0", psnr=31.0)]
    (group,) = run_groups("fig1", runs)
    table = table1({("VDSR", "Set5", 3): Ours({"psnr": 33.664}, Source(), "")}, [group])
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert [rows[name]["weights"] for name in rows] == ["2,656,512", "664,704", "1,774,080", "297,216"]
    assert [rows[name]["depth"] for name in rows] == ["20"] * 4
    assert [rows[name]["paper"] for name in rows] == ["–", "33.66", "33.82", "33.93"]
    assert [rows[name]["ours"] for name in rows] == ["–", "33.66", "–", "–"]
    assert [row[-1] for row in table.rows] == ["–", "31.00", "–", "31.50"]
    assert "patches" in table.columns[-1]
    # DRCN: two layers of the embedding, then the recursion and two of the reconstruction, 16 times.
    assert rows["DRCN"]["multiply-adds a pixel"] == f"{9 * 256 + 9 * 256**2 + 16 * (2 * 9 * 256**2 + 9 * 256):,}"


def test_memory_holds_the_features_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SIDE", 96)
    milliseconds, size, _ = cost(preset("srcnn"))
    assert milliseconds > 0
    assert 64 * 96**2 * 4 <= size <= 3 * 64 * 96**2 * 4
    assert cost(preset("espcn"))[1] < size / 4  # of the low-resolution image


def test_a_page_of_networks_needs_no_runs(
    entry_point: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "SIDE", 24)
    monkeypatch.setattr(tables, "MEMBERS", {name: tables.MEMBERS[name] for name in ("SRCNN 9-1-5", "FSRCNN", "VDSR")})
    code, _, err = entry_point("report", "study=[fig2,table1,networks]", "output=out")
    assert code == 0, err
    for name in ("fig2.png", "fig2.pdf", "table1.md", "networks.csv", "index.html"):
        assert (tmp_path / "out" / name).stat().st_size > 100, name
    lines = (tmp_path / "out" / "networks.csv").read_text().splitlines()
    srcnn, fsrcnn, vdsr = (line.split(",", 1)[1] for line in lines[1:])
    assert srcnn.startswith('3,"8,032","8,032",')
    assert fsrcnn.startswith('8,"12,464","1,385",')
    assert "37.53 / 0.958" in vdsr  # the paper's, or that of its authors' weights
    shallow = json.loads((Path(__file__).parents[2] / "data/ledger/shallow.json").read_text())
    assert shallow["means"]
    assert "36.54 / 0.9529" in srcnn  # data/ledger
    assert "data:image/svg+xml" in (tmp_path / "out" / "index.html").read_text()
