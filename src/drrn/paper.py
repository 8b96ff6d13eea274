"""The paper's numbers: the depth formula, and the tables and figures printed in it, from data/paper."""

from __future__ import annotations

import csv

from drrn.home import DATA


def depth(B: int, U: int) -> int:
    """d, the convolutions on the longest path through B blocks of U units (Eq. 7); U = 0 is VDSR's B + 1."""
    return (1 + 2 * U) * B + 1


def paper_numbers(name: str) -> list[dict[str, str]]:
    """The rows of data/paper/<name>.csv: "table1", …, "table4", "fig1", "fig6", "fig8", "fig9"."""
    with (DATA / "paper" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def network_of(row: dict[str, str]) -> str:
    """Name of the network in a row: DRRN_NS_B3U4, VDSR_d28, DRCN."""
    if row.get("B"):
        return f"{row.get('method', 'DRRN')}_B{row['B']}U{row['U']}"
    return f"VDSR_d{row['depth']}" if "B" in row else row["method"]


def printed(set_name: str, scale: int) -> dict[str, dict[str, str]]:
    """Network (`network_of`) → the row of its PSNR in the paper for a set and scale; rows of Table 2 have SSIM too.

    VDSR of Table 2, with 20 layers, is listed as VDSR and as VDSR_d20.
    """
    rows: dict[str, dict[str, str]] = {}
    for name in ("table2", "fig1", "fig6", "fig8", "table4"):
        for row in paper_numbers(name):
            if row["psnr"] and (row["dataset"], row["scale"]) == (set_name, str(scale)):
                rows.setdefault(network_of(row), row)
    return rows | ({"VDSR_d20": rows["VDSR"]} if "VDSR" in rows else {})
