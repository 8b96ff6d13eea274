"""Memory: of tensors, counted; what glibc gives back, kept."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
_kept = False  # by an outer `freed_memory_kept`


@contextmanager
def freed_memory_kept(on: bool = True) -> Iterator[None]:
    """Inside, glibc keeps the large blocks that are freed and hands them out again (Linux; elsewhere nothing).

    Otherwise the kernel maps every large array afresh and zeroes it page by page: a tenth of a training step. The
    price is a process that does not shrink and a heap with gaps: not `on` where memory is what counts.
    """
    global _kept
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if on and sys.platform == "linux" else None
    if mallopt is None or _kept:
        yield
        return
    _kept = True
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:  # what glibc's own rule comes to with large blocks; a first call of mallopt ends that rule
        _kept = False
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


class TensorBytes(TorchDispatchMode):
    """A context that counts the bytes of the tensors made in it and alive at once; `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                weakref.finalize(storage, self.freed, storage.nbytes()).atexit = False
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def freed(self, size: int) -> None:
        self.now -= size
