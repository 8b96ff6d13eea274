"""The memory that glibc gives back, kept."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


def keep_freed_memory() -> None:
    """From now on glibc keeps the large blocks that are freed and hands them out again (Linux; elsewhere nothing).

    Otherwise every large array is mapped afresh by the kernel and zeroed page by page: a tenth of a training step.
    The price is a process that does not shrink and a heap with gaps.
    """
    _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


@contextmanager
def freed_memory_kept(on: bool = True) -> Iterator[None]:
    """`keep_freed_memory` for a while, or not at all where memory is what counts (`on` = False)."""
    if on:
        keep_freed_memory()
    try:
        yield
    finally:
        if on:  # what glibc's own rule comes to with large blocks; a first call of mallopt ends that rule
            _mallopt({M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20})


def _mallopt(values: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for parameter, value in values.items():
        if mallopt:
            mallopt(parameter, value)
