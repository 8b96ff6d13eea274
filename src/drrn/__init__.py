"""DRRN: training, ablations, evaluation and use of the Deep Recursive Residual Network (CVPR 2017).

    from drrn import DRRN, load, upscale

    network = load("weights.safetensors")
    big = upscale(image, 2, network)

Names are imported on first use, so `import drrn` alone takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drrn.model import DRRN
    from drrn.photos.array import upscale
    from drrn.weights.shipped import load

__version__ = "0.1.0"
__all__ = ["DRRN", "load", "upscale"]

_PLACES = {"DRRN": "drrn.model", "load": "drrn.weights.shipped", "upscale": "drrn.photos.array"}


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _PLACES:
        raise AttributeError(f"module 'drrn' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
