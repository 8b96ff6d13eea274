"""DRRN: training, ablations, evaluation and use of the Deep Recursive Residual Network (CVPR 2017)."""

__version__ = "0.1.0"
