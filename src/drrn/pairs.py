"""What becomes of training pairs on the device: turned, and shrunk for networks that take the low resolution."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from drrn.images import orientations
from drrn.matlab import resize_matrix


@lru_cache
def _moves(p: int, device: torch.device) -> Tensor:
    """Where each pixel of a turned patch comes from [8, p²]."""
    pixels = np.arange(p * p).reshape(p, p)
    return torch.from_numpy(np.stack(orientations(pixels))).flatten(1).to(device)


def turned(patches: Tensor, orientation: Tensor) -> Tensor:
    """Patches [N, p, p], each in its orientation [N], numbered as in `images.orientations`; pixels are moved."""
    moves = _moves(patches.shape[-1], patches.device)[orientation]  # [N, p²]
    return patches.flatten(1).gather(1, moves).view_as(patches)


@lru_cache
def _bicubic(p: int, scale: int, device: torch.device) -> Tensor:
    """The weights of MATLAB's bicubic that shrinks p pixels [p / s, p], float32."""
    return torch.from_numpy(resize_matrix(p, 1 / scale, p // scale).toarray()).float().to(device)


def low_pairs(truth: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """Patches x̃ [N, p, p] → the pairs of a network that takes the low-resolution image, [N, P / s, P / s], [N, P, P].

    A patch is cropped at the bottom and on the right to P pixels, a multiple of the scale (31 to 30, 30 and 28 at ×2,
    ×3 and ×4), and shrunk as an image is, so its own border is mirrored. The low resolution of the whole image is
    another there: by 0.9, 1.2 and 1.3 grey levels in the outermost pixels, 0.2 in the next (T91, root mean square).
    """
    p = truth.shape[-1] - truth.shape[-1] % scale
    truth, weights = truth[:, :p, :p], _bicubic(p, scale, truth.device)
    return weights @ truth @ weights.T, truth
