"""Convert weights of other programs to ours, or ours for other programs; or print the contents of a weights file.

    python src/convert.py input=vdsr_291_adam.caffemodel output=vdsr.safetensors
    python src/convert.py input=model_epoch_28.pth U=25 output=drrn.safetensors
    python src/convert.py input=drrn.safetensors output=drrn.onnx
    python src/convert.py input=drrn.safetensors output=drrn_x2.onnx scale=2
    python src/convert.py input=FILE info=true

Code in a foreign file is never run.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from drrn.home import CONF
from drrn.launch import launch, refusing
from drrn.weights.convert import ConvertConfig, check, convert

KEYS = ConvertConfig


@hydra.main(version_base="1.3", config_path=CONF, config_name="convert")
def main(cfg: DictConfig) -> None:
    """Check, then convert."""
    with refusing():
        convert(check(cfg))


if __name__ == "__main__":
    launch(main)
