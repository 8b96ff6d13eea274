"""Memory: counting that of tensors, and keeping glibc's freed blocks."""

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
    """Within this context glibc reuses large freed blocks instead of returning them (Linux; elsewhere no effect).

    Otherwise the kernel maps every large array afresh and zeroes it page by page: a tenth of a training step. The
    price is a process that does not shrink and a fragmented heap: turn it off where memory is scarce.
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
    finally:  # the values that glibc's dynamic threshold reaches; the first call of mallopt has disabled that
        _kept = False
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


class TensorBytes(TorchDispatchMode):
    """A context that counts the bytes of live tensors created in it; `peak` is their maximum."""

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
