"""Score bicubic, networks and other programs' images on benchmark sets.

    python src/evaluate.py method=bicubic sets=[Set5] scales=[3] output=scores.json
    python src/evaluate.py method=network checkpoint=weights.safetensors
    python src/evaluate.py method=images folder=their/results sets=[Set5]
    python src/evaluate.py checkpoint=port.safetensors scales=[2] explain=37.69

Prints a table and writes every image's values; another call with the same output computes only missing values.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from drrn.evaluation_config import EvaluateConfig, check
from drrn.home import CONF
from drrn.launch import launch, refusing

KEYS = EvaluateConfig


@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Check, score, print."""
    with refusing():
        overrides = HydraConfig.get().overrides.task
        config = check(cfg, overrides)
        if config.explain is not None:
            from drrn.explain import explain

            return explain(config, overrides)
        from drrn.disk import locked
        from drrn.evaluation import evaluate

        output = Path(config.output)
        with locked(output.with_name(f".{output.name}.lock"), f"{output} is being written"):
            evaluate(config)


if __name__ == "__main__":
    launch(main)
