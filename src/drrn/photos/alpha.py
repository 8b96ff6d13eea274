"""Colours under transparency: nobody sees them, so they may not show in the result."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt


def opacity(alpha: NDArray[Any]) -> NDArray[np.float64]:
    """Alpha as stored → 0…1."""
    return np.maximum(alpha, 0) / np.float64(1 if alpha.dtype.kind == "f" else np.iinfo(alpha.dtype).max)


def fill_hidden(pixels: NDArray[Any]) -> NDArray[Any]:
    """Give pixels of alpha 0 the colour of the nearest visible one, since networks look at neighbours.

    (A network is not linear, so its result cannot be divided by an enlarged alpha.)

    Args:
        pixels: [H, W, C], alpha last; left as they are.

    Returns:
        The same where nothing or everything is hidden; otherwise a copy.
    """
    hidden = pixels[..., -1] <= 0
    if not hidden.any() or hidden.all():
        return pixels
    nearest = distance_transform_edt(hidden, return_distances=False, return_indices=True)  # [2, H, W]
    filled = pixels.copy()
    filled[hidden, :-1] = pixels[(*nearest[:, hidden], slice(-1))]
    return filled
