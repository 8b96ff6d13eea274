"""Loading, rotating and shrinking training pairs for the network."""

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
    """Shield a worker from a terminal's Ctrl-C and a cluster's SIGTERM, which go to the run's process group: the run
    still finishes its step (`runs.stop.StopSignals`) and ends the workers itself. If the run is killed they end too;
    with PyTorch's own watchdog a worker would hang, because nobody reads the batches in its pipe."""
    os.setpgrp()
    end_with_parent()


class Pairs(tuple):
    """A batch as read: NumPy arrays (data, label) [n, p, p], and orientations [n] with online augmentation."""

    def pin_memory(self) -> tuple[Tensor, ...]:
        """Pinned tensors, which a GPU copies while it computes; the DataLoader's thread calls this."""
        return tuple(torch.from_numpy(part).pin_memory() for part in self)


def pair_loader(
    patches: Patches | Crops, batches: ShuffledBatches, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """A DataLoader for batches of stored integers: `Pairs`, or tensors with `pin_memory`.

    Workers send arrays through a pipe; tensors would each need a socket, which takes longer than reading the batch.
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
    """For each orientation, the source index of every pixel of a rotated patch [8, p²]."""
    pixels = np.arange(p * p).reshape(p, p)
    return torch.from_numpy(np.stack(orientations(pixels))).flatten(1).to(device)


def turned(patches: Tensor, orientation: Tensor) -> Tensor:
    """Rotate patches [N, p, p], each to its orientation [N], numbered as in `images.orientations`."""
    moves = _moves(patches.shape[-1], patches.device)[orientation]  # [N, p²]
    return patches.flatten(1).gather(1, moves).view_as(patches)


@lru_cache
def _bicubic(p: int, scale: int, device: torch.device) -> Tensor:
    """The weights [p / s, p] of MATLAB's bicubic that shrinks p pixels, float32."""
    return torch.from_numpy(resize_matrix(p, 1 / scale, p // scale).toarray()).float().to(device)


def low_pairs(truth: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """Patches x̃ [N, p, p] → pairs for a network with the input "low", [N, P / s, P / s], [N, P, P].

    A patch is cropped at the bottom and right to P pixels, a multiple of the scale (31 to 30, 30 and 28 at ×2, ×3 and
    ×4), and shrunk like an image, with mirrored borders. There it differs from the low resolution of the whole image:
    by 0.9, 1.2 and 1.3 grey levels in the outermost pixels, 0.2 in the next (T91, root mean square).
    """
    p = truth.shape[-1] - truth.shape[-1] % scale
    truth, weights = truth[:, :p, :p], _bicubic(p, scale, truth.device)
    return weights @ truth @ weights.T, truth
