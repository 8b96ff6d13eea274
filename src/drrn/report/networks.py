"""Tables that compare networks: Table 1, and the table of every network of the package."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from drrn.fast.memory import TensorBytes
from drrn.inference import super_resolve
from drrn.networks import build, count
from drrn.paper import paper_numbers, printed
from drrn.report.groups import PLACE, RunGroup, in_paper
from drrn.report.ledger import Found
from drrn.report.measurements import MISSING
from drrn.report.studies import preset
from drrn.report.tables import Table

SIDE = 288  # pixels a side of the result, for time and memory
# Every network as its own paper defines it: name → file of conf/model, changes to it, its name in DRRN's paper.
MEMBERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "SRCNN 9-1-5": ("srcnn", {}, "SRCNN"),
    "FSRCNN": ("fsrcnn", {}, "FSRCNN"),
    "ESPCN": ("espcn", {}, "ESPCN"),
    "VDSR": ("vdsr_plain", {}, "VDSR"),
    "VDSR with BatchNorm": ("vdsr", {}, ""),
    "DRCN": ("drcn", {}, "DRCN"),
    "RED30": ("red30", {}, "RED30"),
    "ResNet, U = 9": ("resnet", {}, ""),
    "DRRN_B1U9": ("drrn", {}, "DRRN_B1U9"),
    "DRRN_B1U25": ("drrn", {"U": 25}, "DRRN_B1U25"),
}


def sizes(model: dict[str, Any]) -> tuple[str, str, str]:
    """Depth, weights and multiply-adds per pixel of the result, as cells."""
    its = count(model)
    return str(its.depth), f"{its.conv_weights:,}", f"{its.output / 2:,.0f}"


def quoted(method: str, place: tuple[str, int], metrics: tuple[str, ...] = ("psnr",)) -> str:
    """The paper's scores of a method."""
    row = printed(*place).get(method, {})
    return " / ".join(row[metric] for metric in metrics if metric in row) or MISSING


def table1(found: Found, groups: list[RunGroup]) -> Table:
    """Table 1: each network's strategies, its cost and its PSNR on Set5 ×3.

    Each run group of Fig. 1 (networks of any width under one recipe) has a column.
    """
    groups = [group for group in groups if group.finished]
    columns = ["method", "strategies", "formula", "depth", "weights", "multiply-adds a pixel", "paper", "ours"]
    columns += [f"ours: {group.short()}" for group in groups]
    rows = []
    for its in paper_numbers("table1"):
        model, measured = preset(its["model"]), found.get((its["method"], *PLACE))
        ours = f"{measured.values['psnr']:.2f}" if measured and "psnr" in measured.values else MISSING
        row = [its["network"], its["strategies"], its["formula"], *sizes(model), quoted(its["method"], PLACE), ours]
        rows.append([*row, *(_trained(group, model) for group in groups)])
    notes = ["PSNR in dB on Set5 ×3. A multiply-add is two operations; weights of convolutions, shared ones once."]
    notes += ["Ours: published weights measured here, or trained here at the paper's size."]
    notes += [line for group in groups for line in group.origin()]
    return Table("Table 1: strategies, cost and PSNR", columns, rows, notes)


def _trained(group: RunGroup, model: dict[str, Any]) -> str:
    """PSNR of a run group's network of this family and depth, whatever its width."""
    means = [point.mean() for point in group.points if in_paper(point.model) == in_paper(model)]
    return next((f"{mean:.2f}" for mean in means if mean is not None), MISSING)


def networks_table(found: Found) -> Table:
    """Every network: weights, operations, time and memory for 288² pixels, PSNR and SSIM on Set5 at each scale."""
    places = [("Set5", scale) for scale in (2, 3, 4)]
    columns = ["network", "depth", "weights", "multiply-adds a pixel", f"ms for {SIDE}²", f"MB for {SIDE}²"]
    columns += [f"Set5 ×{scale}" for _, scale in places]
    rows = []
    for name, (file, changes, method) in MEMBERS.items():
        model = preset(file, **changes)
        cells = []
        for place in places:
            values = found[method, *place].values if (method, *place) in found else {}
            ours = " / ".join(f"{values[k]:.{digits}f}" for k, digits in (("psnr", 2), ("ssim", 4)) if k in values)
            theirs = quoted(method, place, ("psnr", "ssim"))
            cells.append(ours or (theirs if theirs == MISSING else f"{theirs} *"))
        milliseconds, size, device = cost(model)
        rows.append([name, *sizes(model), f"{milliseconds:,.0f}", f"{size / 1e6:,.0f}", *cells])
        print(f"{name}: {milliseconds:,.0f} ms", flush=True)
    notes = [
        f"Time: {device}, float32, the better of two, networks of one scale at ×3. Memory: tensors alive at once.",
        "PSNR in dB / SSIM: published weights, or trained here at the paper's size; * as the paper prints it.",
    ]
    return Table(f"Every network: cost of {SIDE}×{SIDE} pixels, and scores", columns, rows, notes)


def cost(model: dict[str, Any]) -> tuple[float, int, str]:
    """The cost of enlarging to 288²: milliseconds, peak bytes of all tensors, and the device."""
    gpu = torch.cuda.is_available()
    network = build(model).eval().to("cuda" if gpu else "cpu")
    side = SIDE // getattr(network, "scale", 1)
    x = torch.from_numpy(np.random.default_rng(0).random((side, side), np.float32)).to("cuda" if gpu else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its CPU time does not depend on other load
    try:
        clock = time.perf_counter if gpu else time.process_time
        super_resolve(network, x[:48, :48])
        times = []
        for _ in range(2):
            began = clock()
            super_resolve(network, x).sum().item()  # item() waits for a GPU
            times.append(clock() - began)
        with TensorBytes() as alive:
            super_resolve(network, x)
    finally:
        torch.set_num_threads(threads)
    return 1000 * min(times), alive.peak, torch.cuda.get_device_name() if gpu else "one thread's time on a CPU"
