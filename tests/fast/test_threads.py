"""`drrn.fast.threads`: the cores that are free when a command starts, overrides, and torch's number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drrn.fast import threads
from drrn.fast.threads import Watch, free_threads, quota


@pytest.mark.parametrize(
    ("cores", "others", "limit", "expected"),
    [
        (2, 0.0, None, 2),
        (2, 0.3, None, 2),  # what a desktop does by itself
        (2, 0.5, None, 1),
        (2, 1.0, None, 1),
        (2, 2.0, None, 1),  # never none
        (8, 3.2, None, 5),
        (64, 0.4, None, 64),
        (64, 0.0, 4.0, 4),  # a container of a shared server
        (64, 0.0, 2.5, 2),
        (64, 0.0, 0.5, 1),
        (4, 3.0, 3.0, 1),
    ],
)
def test_as_many_as_are_free(cores: int, others: float, limit: float | None, expected: int) -> None:
    assert free_threads(cores, others, limit).number == expected


def test_what_is_asked_for_counts_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "WATCHED", 0.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    watch = Watch()
    assert watch.choose(asked=7, before=5).number == 7
    assert watch.choose(before=5) == (3, "OMP_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert watch.choose(before=5).number == 5
    monkeypatch.setattr(threads, "quota", lambda: None)
    assert 1 <= watch.choose().number <= len(threads.allowed_cores())


def test_own_work_is_not_taken_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In ten seconds two cores worked 9 and 1 seconds, 8 of them for this process: there is no other work."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "allowed_cores", lambda: [0, 1])
    monkeypatch.setattr(threads, "quota", lambda: None)
    now = {"clock": 0.0, "busy": 100.0, "own": 50.0}
    monkeypatch.setattr(threads.time, "monotonic", lambda: now["clock"])
    monkeypatch.setattr(threads, "busy_seconds", lambda cores: now["busy"])
    monkeypatch.setattr(threads, "own_seconds", lambda: now["own"])
    watch = Watch()
    now |= {"clock": 10.0, "busy": 110.0, "own": 58.0}
    assert watch.choose().number == 2
    now |= {"busy": 118.0}  # one more core is busy all the time, with somebody else's work
    assert watch.choose() == (1, "1 of 2 cores are busy")


def test_the_control_groups_quota(tmp_path: Path) -> None:
    assert quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert quota(tmp_path) is None
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("150000\n")
    assert quota(tmp_path) == 1.5


def test_the_cores_that_work_are_counted() -> None:
    """Another process that works for a while adds that much to the machine's busy time, and none to ours."""
    script = "import time; a = time.process_time()\nwhile time.process_time() < a + 0.4: pass"
    cores = list(range(os.cpu_count() or 1))
    busy, own = threads.busy_seconds(cores), os.times().user + os.times().system
    other = subprocess.Popen([sys.executable, "-c", script])
    other.wait()
    assert threads.busy_seconds(cores) - busy > 0.3
    assert os.times().user + os.times().system - own < 0.3
