"""Train one network, or a grid of them.

    python src/train.py model.B=1 model.U=9
    python src/train.py -m model.B=1,3 model.U=9,25

Each run has its own folder, named by its identity, with its log, its checkpoints, its weights
(`weights.safetensors`) and its record (`record.json`). The same command again resumes an interrupted run;
`from_record=FILE` repeats the run of a record.
"""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from drrn.config import Config
from drrn.home import CONF
from drrn.launch import launch, refusing
from drrn.runs.request import request
from drrn.runs.start import start

KEYS = Config


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Check the configuration before anything heavy is imported, then train.

    Returns:
        The PSNR of a finished run, which a sweeper may maximise.
    """
    with refusing():
        config = request(cfg, HydraConfig.get().overrides.task)
        if config.plan == "only":
            from drrn.sweep.plan import job_of, make_plan, print_plan

            print_plan(make_plan([job_of(config)], always=True))
        else:
            start(config)
            from drrn.sweep.outcome import scores_of

            return scores_of(config).get("psnr")
    return None


if __name__ == "__main__":
    launch(main)
