"""`drrn.fast.memory`: the settings of glibc, and that an inner context does not change the outer one's."""

import ctypes
import sys
from types import SimpleNamespace

import pytest

from drrn.fast import memory


def test_an_inner_context_leaves_the_outer_ones_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation inside a training enlarges images: the training's freed memory stays kept after it."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *rule: told.append(rule)))
    with memory.freed_memory_kept():
        kept = list(told)
        with memory.freed_memory_kept(), memory.freed_memory_kept(False):
            pass
        assert told == kept == [(memory.M_MMAP_MAX, 0), (memory.M_TRIM_THRESHOLD, 2**31 - 1)]
    assert told[2] == (memory.M_MMAP_MAX, 65536)  # glibc's own value
    with pytest.raises(KeyError), memory.freed_memory_kept():
        raise KeyError
    assert told[2:5] == told[7:]


def test_without_glibc_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    with memory.freed_memory_kept(), memory.freed_memory_kept():
        pass
    assert not memory._kept
