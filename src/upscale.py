"""Enlarge photographs: one file, several, or a folder with its structure.

python src/upscale.py input=photo.jpg scale=2
python src/upscale.py input=holidays scale=3 checkpoint=weights.safetensors output=large compare=true
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from drrn.home import CONF
from drrn.launch import launch, refusing
from drrn.photos.plan import Options, check, plan

KEYS = Options


@hydra.main(version_base="1.3", config_path=CONF, config_name="upscale")
def main(cfg: DictConfig) -> None:
    """Check everything that can be checked at once, then enlarge file by file."""
    with refusing():
        options = check(cfg)
        jobs = plan(options)
        from drrn.photos.upscale import upscale  # imports Pillow and SciPy; a refusal need not wait for them

        status = upscale(options, jobs)
    sys.exit(status)


if __name__ == "__main__":
    launch(main)
