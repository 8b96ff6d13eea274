"""The memory that glibc gives back, kept."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


def keep_freed_memory() -> None:
    """From now on glibc keeps the large blocks that are freed and hands them out again (Linux; elsewhere nothing).

    Otherwise every large array is mapped afresh by the kernel and zeroed page by page: a tenth of a training step.
    The price is a process that does not shrink and a heap with gaps.
    """
    _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def keep_heap() -> None:
    """From now on glibc keeps the end of its heap when that is free (Linux; elsewhere nothing).

    A stream of strips frees its feature maps after every layer. By glibc's own rule many of them go back to the
    kernel at once and come again, zeroed. Blocks of 32 MB or more are still mapped and given back.
    """
    _mallopt({M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 2**31 - 1})


def ask_for_huge_pages() -> None:
    """Let torch, from its first tensor on, ask Linux for pages of 2 MB, which take less time than many of 4 KB."""
    with suppress(OSError):  # not Linux, or without such pages
        if "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


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
