"""DRRN: training, ablations, evaluation and use of the Deep Recursive Residual Network (CVPR 2017)."""

__version__ = "0.1.0"


class Refusal(Exception):
    """Something only the user can mend: a wrong value, a missing file, a full disk.

    Its text names the value or file and says what to do. Entry points print it without a traceback.
    """
