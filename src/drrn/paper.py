"""What the paper says in numbers: its depth, its tables and figures as they stand in data/paper, a CSV each."""

from __future__ import annotations

import csv

from drrn.home import DATA


def depth(B: int, U: int) -> int:
    """d, the convolutions on the longest path through B blocks of U units (Eq. 7); U = 0 is VDSR's B + 1."""
    return (1 + 2 * U) * B + 1


def paper_numbers(name: str) -> list[dict[str, str]]:
    """The rows of data/paper/<name>.csv: "table2", "table3", "table4", "fig1", "fig6", "fig8", "fig9"."""
    with (DATA / "paper" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def paper_methods() -> dict[str, str]:
    """A network of others by its name here → the PSNR of it that the paper prints on Set5 ×3: drcn → 33.82."""
    rows = {row["method"]: row["psnr"] for row in paper_numbers("fig1")}
    return {name.lower(): psnr for name, psnr in rows.items() if psnr and not name.startswith("DRRN")}


def paper_psnr() -> dict[tuple[str, int, int], str]:
    """(variant, B, U) → the PSNR that the paper prints on Set5 ×3, for every structure that it prints one of."""
    result = {}
    for name in ("fig6", "fig8", "table4"):
        for row in paper_numbers(name):
            if row["psnr"]:
                method = row.get("method", "DRRN")
                B, U = (int(row["depth"]) - 1, 0) if method == "VDSR" else (int(row["B"]), int(row["U"]))
                result[method, B, U] = row["psnr"]
    return result
