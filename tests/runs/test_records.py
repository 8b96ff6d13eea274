"""`drrn.runs.record`: records are written whole, checked when read, and their means are the protocol's."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import drrn.environment
from drrn.disk import write_json
from drrn.environment import git_commit
from drrn.errors import UserError
from drrn.model import DRRN
from drrn.protocol import means
from drrn.runs.journal import log_to
from drrn.runs.record import FILE, FORMAT, read_record, run_record

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    record = {"format": FORMAT, "name": "DRRN_B1U9 ×3", "values": [1.5, None, True], "deep": {"a": {"b": []}}}
    path = tmp_path / "new" / "folder" / FILE
    write_json(path, record)
    assert read_record(path) == record
    assert "×3" in path.read_text()  # for people
    write_json(path, {**record, "name": "again"})
    assert read_record(path)["name"] == "again"
    assert [p.name for p in path.parent.iterdir()] == [FILE]


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / FILE
    write_json(path, {"format": FORMAT, "old": True})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def on_a_full_device(self: Path, mode: str, **_: object) -> object:
        return io.open("/dev/full", mode)  # noqa: UP020

    target = {"write": (Path, "open"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[stage]
    monkeypatch.setattr(*target, on_a_full_device if stage == "write" else full)
    with pytest.raises(UserError, match="No space left") as refusal:
        write_json(path, {"format": FORMAT, "old": False})
    assert str(path) in str(refusal.value)
    monkeypatch.undo()
    assert read_record(path)["old"] is True
    assert list(tmp_path.iterdir()) == [path]


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / FILE
    write_json(path, {"format": FORMAT})
    with pytest.raises(TypeError):
        write_json(path, {"a tensor": torch.zeros(1)})
    assert read_record(path) == {"format": FORMAT}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content", [None, "", "{", "[1, 2]", "3", '{"format": 99}', '{"name": "no format"}', "\x00\x01", b"\xff\xfe{"]
)
def test_what_is_no_record_is_refused_by_name(content: str | bytes | None, tmp_path: Path) -> None:
    path = tmp_path / FILE
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refusal:
        read_record(path)
    assert str(path) in str(refusal.value)


def test_means_are_plain_means_for_each_set_and_scale() -> None:
    scores = [
        {"set": "Set5", "scale": 3, "image": "a", "psnr": 30.0, "ssim": 0.8, "bicubic_psnr": 28.0},
        {"set": "Set5", "scale": 3, "image": "b", "psnr": 33.0, "ssim": 0.9, "bicubic_psnr": 29.0},
        {"set": "Set5", "scale": 2, "image": "a", "psnr": 36.0, "ssim": 0.95, "bicubic_psnr": 33.0},
        {"set": "Set14", "scale": 3, "image": "a", "psnr": 27.0, "ssim": 0.7, "bicubic_psnr": 26.0},
        {"set": "Set5", "scale": 3, "image": "c", "psnr": 30.0, "ssim": 0.7, "bicubic_psnr": 27.0},
    ]
    result = {(row["set"], row["scale"]): row for row in means(scores)}
    assert set(result) == {("Set5", 3), ("Set5", 2), ("Set14", 3)}
    row = result["Set5", 3]
    assert row["images"] == 3
    assert (row["psnr"], row["ssim"], row["bicubic_psnr"]) == pytest.approx((31.0, 0.8, 28.0))
    assert result["Set14", 3]["images"] == 1
    assert result["Set14", 3]["psnr"] == 27.0
    assert all("image" not in row for row in result.values())
    assert means([]) == []


def test_the_commit_is_the_clones_and_none_outside_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if (ROOT / ".git").exists():
        commit = git_commit()
        assert commit is not None
        assert len(commit["commit"]) == 40
        assert isinstance(commit["changed"], bool)
    monkeypatch.setattr(drrn.environment, "__file__", str(tmp_path / "records.py"))
    assert git_commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert git_commit() is None


def test_a_record_says_enough_to_make_the_run_again(configure: Callable, tmp_path: Path) -> None:
    """Configuration, seed, commit, versions, machine and structure; and it is JSON."""
    config = configure("model.B=2", "model.U=3", "model.features=128", "seed=7", "study=fig6")
    record = run_record(config, DRRN(2, 3))
    write_json(tmp_path / FILE, record)
    again = read_record(tmp_path / FILE)
    assert again == json.loads(json.dumps(record))
    assert again["structure"] == {
        "name": "DRRN_B2U3",
        "depth": 15,
        "conv_weights": 739_584,
        "parameters": 739_584 + (6 * 128 + 1) + 2 * (1 + 128 + 13 * 128),  # weights, biases, BatchNorm's affine
    }
    assert (again["name"], again["study"], again["seed"], again["status"]) == ("DRRN_B2U3 s7", "fig6", 7, "running")
    assert again["config"]["model"]["U"] == 3
    assert again["config"]["data"]["scales"] == [2]
    assert again["protocol"]["name"] == "paper"
    assert again["protocol"]["version"] == 1
    versions = again["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["python"] == platform.python_version()
    assert {"lightning", "hydra-core", "numpy", "h5py", "pillow"} <= set(versions)
    assert again["machine"]["cores"] == os.cpu_count()
    assert math.isfinite(again["machine"]["threads"])


def test_a_log_on_a_full_disk_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The console has the lines; the error is that of the record, which cannot be written either."""
    with log_to(Path("/dev/full")):
        logging.getLogger("drrn.train").info("step 1")
    err = capsys.readouterr().err
    assert err.endswith("  step 1\n")
    assert len(err.splitlines()) == 1
