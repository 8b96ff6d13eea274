"""Generate W&B's sweep files from the studies in sweeps/*.yaml, which alone define the points.

`make queues` writes the files next to this one, for `wandb sweep`.
"""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from drrn.home import CONF

HERE = Path(__file__).resolve().parent
STUDIES = HERE.parent
QUEUE = """\
# {title} as a W&B queue: the points of sweeps/{study}.yaml, taken one by one by `wandb agent` on any machines.
#   wandb sweep --project drrn sweeps/wandb/{study}.yaml     (prints the queue's name)
#   wandb agent ENTITY/drrn/NAME                         (on every machine, in the clone, logged in)
# Cost and numbers to expect: sweeps/{study}.yaml. For another recipe, length or data put overrides at the end of
# `command`: `- +budget=cpu`. Resume a point that failed or was stopped with the same command as without W&B.
# Made by `make queues`: change the study, not this file.
program: src/train.py
method: grid
metric:
  name: test/{set}_x{scale}/psnr
  goal: maximize
parameters:
  sweeps:
    value: {study}
  hydra.sweeper.points:      # for each job a list with one point
    values:
{points}
  seed:
    values: [1]
  plan:
    value: none
  logger.mode:
    value: online            # an agent needs the server anyway
command:
  - ${{env}}
  - ${{interpreter}}
  - ${{program}}
  - ${{args_no_hyphens}}
"""


def queue(study: str) -> str:
    """A study as a sweep file of W&B; points are in Hydra's grammar."""
    text = (STUDIES / f"{study}.yaml").read_text()
    title = text.splitlines()[1].removeprefix("# ").split(" (")[0].split(":")[0]
    points = OmegaConf.to_container(OmegaConf.create(text))["hydra"]["sweeper"]["points"]
    texts = ({key: "null" if value is None else value for key, value in point.items()} for point in points)
    lines = ("{" + ", ".join(f"{key}: {text}" for key, text in point.items()) + "}" for point in texts)
    with initialize_config_dir(CONF, version_base="1.3"):
        data = compose("config", [f"sweeps={study}"]).data
    return QUEUE.format(
        title=title, study=study, set=Path((data.test or data.val)[0]).name, scale=data.val_scales[0],
        points="\n".join(f'      - "[{line}]"' for line in lines),
    )  # fmt: skip


if __name__ == "__main__":
    for path in sorted(STUDIES.glob("*.yaml")):
        (HERE / path.name).write_text(queue(path.stem))
