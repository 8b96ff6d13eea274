"""The memory that glibc gives back, kept."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


@contextmanager
def freed_memory_kept(on: bool = True) -> Iterator[None]:
    """Inside, glibc keeps the large blocks that are freed and hands them out again (Linux; elsewhere nothing).

    Otherwise the kernel maps every large array afresh and zeroes it page by page: a tenth of a training step. The
    price is a process that does not shrink and a heap with gaps: not `on` where memory is what counts.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if on and sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:  # what glibc's own rule comes to with large blocks; a first call of mallopt ends that rule
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)
