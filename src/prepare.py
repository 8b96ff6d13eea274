"""Download and verify the images of a run, and build its patch file; train.py does the same itself.

python src/prepare.py
python src/prepare.py data.augment=online
python src/prepare.py 'data.test=[Set5,Set14,BSD100,Urban100]'
"""

from __future__ import annotations

import logging

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from drrn.config import Config, DataConfig
from drrn.errors import counted
from drrn.home import CONF
from drrn.launch import launch, refusing
from drrn.runs.request import request

KEYS = Config


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def main(cfg: DictConfig) -> None:
    """Check the training configuration, then prepare its `data.*`."""
    with refusing():
        prepare(request(cfg, HydraConfig.get().overrides.task).data)


def prepare(data: DataConfig) -> None:
    """Download, verify, build, and print the files and sets."""
    from drrn.datamodule import prepare_pairs
    from drrn.sets import evaluation_sets

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sets = evaluation_sets(data, complete=True)
    pairs = prepare_pairs(data)
    what = f"{len(pairs):,} crops an epoch" if data.crops else counted(pairs.stored, "pair")
    print(f"{pairs.path}: {what}, {pairs.path.stat().st_size / 1e9:.2f} GB")
    for label, files in (sets["validate"] | sets["test"]).items():
        print(f"{label}: {counted(len(files), 'image')}")


if __name__ == "__main__":
    launch(main)
