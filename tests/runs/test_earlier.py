"""Files of earlier versions: a record, a checkpoint, weights and scores that commit 69cbe9c wrote, in tests/data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT
from drrn.runs.record import FILE, read_record
from drrn.weights.ours import load_network

EARLIER = ROOT / "tests/data/69cbe9c"
COMMAND = (
    "model.features=2", "model.U=2", "data.train=[images]", "data.val=[images]", "data.batch_size=12",
    "data.num_workers=0", "data.scales=[2]", "data.val_scales=[2]", "trainer.accelerator=cpu", "logger=none",
    "trainer.val_check_interval=2", "trainer.checkpoint_every=1", "output=runs", "optim.lr=0.01", "optim.theta=1e-4",
    "study=old",
)  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that version's files, as the current directory."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_finished_run_is_recognised_and_its_weights_are_read(home: Path, entry_point: Callable) -> None:
    code, out, err = entry_point("train", *COMMAND, "trainer.max_steps=3", "seed=1")
    assert code == 0, err
    assert "is finished: runs/old/DRRN_B1U2_2f_s1-66ee976d/record.json" in out  # the same digest
    assert len(list((home / "runs/old").iterdir())) == 2
    network, about = load_network(home / "runs/old/DRRN_B1U2_2f_s1-66ee976d/weights.safetensors")
    assert (network.depth, about["steps"], about["seed"]) == (6, 3, 1)


def test_a_stopped_run_is_resumed_in_its_folder(home: Path, entry_point: Callable, configure: Callable) -> None:
    code, _, err = entry_point("train", *COMMAND, "trainer.max_steps=4", "seed=2")
    assert code == 0, err
    folder = home / "runs/old/DRRN_B1U2_2f_s2-e79d80c4"
    assert "resuming from runs/old/DRRN_B1U2_2f_s2-e79d80c4/checkpoints/step00000003.ckpt" in err
    record = read_record(folder / FILE)
    assert (record["status"], record["budget"]["steps"]) == ("finished", 4)
    assert [row["step"] for row in record["validation"]] == [2, 2, 4, 4]
    assert len(list((home / "runs/old").iterdir())) == 2

    code, _, err = entry_point("train", *COMMAND, "trainer.max_steps=4", "seed=2", "output=afresh")
    assert code == 0, err
    (afresh,) = (home / "afresh/old").iterdir()
    for row, ours in zip(read_record(afresh / FILE)["scores"], record["scores"], strict=True):
        assert row["psnr"] == pytest.approx(ours["psnr"], rel=1e-4)


def test_a_record_is_trained_again(home: Path, entry_point: Callable) -> None:
    path = home / "runs/old/DRRN_B1U2_2f_s1-66ee976d" / FILE
    code, _, err = entry_point("train", f"from_record={path}", "output=again")
    assert code == 0, err
    (again,) = (home / "again/old").iterdir()
    assert again.name == path.parent.name
    before, now = (read_record(folder / FILE)["scores"] for folder in (path.parent, again))
    for row, ours in zip(before, now, strict=True):
        assert ours["psnr"] == pytest.approx(row["psnr"], rel=1e-4)


def test_scores_and_records_are_reported(home: Path, entry_point: Callable) -> None:
    code, _, err = entry_point(
        "evaluate", "checkpoint=runs/old/DRRN_B1U2_2f_s1-66ee976d/weights.safetensors", "sets=[images]", "scales=[2]",
        "output=scores.json", "workers=1",
    )  # fmt: skip
    assert code == 0, err
    kept = json.loads((EARLIER / "scores.json").read_text())["scores"]
    now = json.loads((home / "scores.json").read_text())["scores"]
    for row in kept:
        assert any(row["image"] == other["image"] and other["psnr"] == pytest.approx(row["psnr"]) for other in now)
    code, out, err = entry_point("report", "scores=[scores.json]", "runs=runs", "output=report")
    assert code == 0, err
    assert "12.42" in out
