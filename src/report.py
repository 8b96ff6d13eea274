"""Draw tables and pictures from run records and evaluation files.

    python src/report.py runs=runs/demo
    python src/report.py 'scores=[scores.json]'
    python src/report.py study=fig6
    python src/report.py 'study=[fig6,fig8,table4]' runs=runs

Prints tables and writes everything below `output`. Studies also give one page, `index.html`.
"""

from __future__ import annotations

import shlex

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from drrn.help import script
from drrn.home import CONF
from drrn.launch import launch, refusing
from drrn.report.report import ReportConfig, check, report

KEYS = ReportConfig


@hydra.main(version_base="1.3", config_path=CONF, config_name="report")
def main(cfg: DictConfig) -> None:
    """Read, tabulate, draw."""
    with refusing():
        report(check(cfg), f"{script('report')} {shlex.join(HydraConfig.get().overrides.task)}")


if __name__ == "__main__":
    launch(main)
