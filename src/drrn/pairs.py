"""Training pairs on their way to the network: loaded, turned, shrunk for networks that take the low resolution."""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from drrn.crops import Crops
from drrn.images import orientations
from drrn.matlab import resize_matrix
from drrn.patches import Patches, ShuffledBatches
from drrn.workers import end_with_parent


def _start_worker(worker: int) -> None:
    """Keep a terminal's Ctrl-C and a cluster's SIGTERM, sent to the run's group, from ending the workers of a step
    that the run will still finish (`runs.stop.StopSignals`); it ends them itself. When it is killed they end
    too: PyTorch's own watch over it then waits for batches to leave through a pipe that nobody reads."""
    os.setpgrp()
    end_with_parent()


class Pairs(tuple):
    """A batch as it is read: the NumPy arrays (data, label) [n, p, p]; orientations [n] if there are several."""

    def pin_memory(self) -> tuple[Tensor, ...]:
        """Tensors from which a GPU copies while it computes; the loader's thread calls it."""
        return tuple(torch.from_numpy(part).pin_memory() for part in self)


def pair_loader(
    patches: Patches | Crops, batches: ShuffledBatches, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """Batches of stored integers, each `Pairs`, or tensors where they are pinned.

    Workers send arrays through their pipe; tensors would each need a socket of their own, which takes longer than
    reading the batch does.
    """
    return DataLoader(
        patches,
        sampler=batches,
        batch_size=None,
        collate_fn=Pairs,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_start_worker,
    )


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
