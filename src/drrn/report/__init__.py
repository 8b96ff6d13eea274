"""Tables, figures, pictures and the page, from records and scores alone."""

from __future__ import annotations

from typing import NamedTuple

OF_NETWORKS = {  # studies of networks, not of runs
    "fig2": "Fig. 2: structures, drawn from the networks themselves",
    "table1": "Table 1: strategies of ResNet, VDSR, DRCN and DRRN",
    "networks": "Every network: weights, operations, time, memory, scores",
}


class Study(NamedTuple):
    """A figure or table of the paper."""

    title: str
    sweep: str | None  # the file of its points in sweeps/; None: it shows every run
    ablation: bool  # whether its points vary only B, U and the switches; else the whole network
    curves: bool  # whether its learning curves are drawn too


STUDIES = {
    "fig6": Study("Fig. 6: recursive blocks B and residual units U", "fig6", True, True),
    "fig8": Study("Fig. 8: local residuals, weight sharing and multi-path by depth", "fig8", True, True),
    "table4": Study("Table 4: the components turned on and off at B3U4", "table4", True, True),
    "fig1": Study("Fig. 1: PSNR against weights and depth", "fig1", False, False),
    "fig9": Study("Fig. 9: shallow, deep and very deep", "fig1", False, False),
    "curves": Study("Learning curves", None, True, False),
    "runs": Study("Runs: PSNR by depth, B and U", None, False, True),
}
