"""The refusals of a training before its work, in one line with exit code 2; and its messages at the start."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import TINY
from drrn.errors import UserError
from drrn.identity import run_dir
from drrn.runs import start as train
from drrn.runs.checkpoints import Damaged, read_checkpoint
from drrn.runs.record import FILE, read_record

LONG = "x" * 300


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["output=file"], "output = file"),
        (["output=file/below"], "Not a directory"),
        (["output=/proc/new"], "cannot be written there"),
        ([f"output={LONG}"], "300 bytes"),
        ([f"name={LONG}"], "300 bytes"),
        ([f"init_from={LONG}"], "File name too long"),
        ([f"study={LONG}"], "300 bytes"),
        (["study=/"], "study = '/'"),
        (["study=../up"], "study = '../up'"),
        (["+trainer.callbacks=[a]"], "+callbacks.NAME={_target_: …}"),
        (["+trainer.nope=[1]"], "trainer.nope"),
        (["+trainer.nope={a:1}"], "trainer.nope"),
        (["+trainer.fast_dev_run=[1]"], "trainer.fast_dev_run = [1]"),
        (['name="${"'], "name"),
        (["study=${"], "study"),
        (["output=${nope}"], "output"),
        (['data.train=["${"]'], "data.train"),
        (["from_record=pipe"], "no regular file"),
        (["+optim.optimiser={_target_:torch.optim.RAdam}", "optim.momentum=0.1"], "optim.momentum and optim.opt"),
        (["from_record=/dev/zero"], "no regular file"),
        (["ckpt_path=pipe"], "ckpt_path = 'pipe'"),
        (["init_from=/dev/zero"], "init_from = '/dev/zero'"),
        (["optim.loss={_target_:HuberLoss}"], "must name a class"),
        (["optim.loss={_target_:nobodys.Loss}"], "no package 'nobodys' is installed"),
        (["optim.loss={_target_:torch.nn.NoSuchLoss}"], "there is no such class"),
        (["+optim.optimiser={_target_:torch.optim.RAdam,speed:3}"], "RAdam does not take these arguments"),
        (["+optim.optimiser={_target_:torch.optim.Adam,betas:3}"], "'int' object is not subscriptable"),
        (["ckpt_path=file"], "File is not a zip file; init_from takes weights"),
        (["+optim.scheduler={_target_:torch.optim.lr_scheduler.StepLR}"], "'step_size'"),
        (["+optim.scheduler={_target_:torch.optim.lr_scheduler.ReduceLROnPlateau}"], "follows a metric"),
        (["trainer.accelerator=tpu"], "trainer.*: Lightning's Trainer refuses this: Requirement 'torch_xla"),
    ],
)
def test_a_refusal_in_a_line_before_any_work(
    arguments: list[str], said: str, entry_point: Callable, tiny_images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    code, out, err = entry_point(
        "train", *TINY, f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", *arguments
    )
    assert code == 2, err
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("content", ['{"format": 1}', "pipe", "[" * 100_000, '{"format": 1, "status": 5}', "\ud800"])
def test_a_record_of_the_run_itself_that_is_none_is_named(content: str, configure: Callable, tmp_path: Path) -> None:
    config = configure(f"output={tmp_path}")
    path = run_dir(config) / FILE
    path.parent.mkdir(parents=True)
    if content == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as refusal:
        train.start(config)
    assert str(path) in str(refusal.value)
    assert [p.name for p in path.parent.iterdir()] == [FILE]


def bomb(path: Path) -> Path:
    """A zip of torch's kind whose pickle has a dict key that takes 2⁸⁰ steps to hash."""
    key = b")" + b"2\x86" * 80  # EMPTY_TUPLE, then (t, t) of the one before
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}" + key + b"K\x01s.")
        file.writestr("archive/version", "3\n")
    return path


def test_what_would_be_read_for_ever_is_no_checkpoint(configure: Callable, tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.ckpt")
    with pytest.raises(UserError, match=r"bomb\.ckpt' cannot be resumed from"):
        train.start(configure(f"output={tmp_path}", f"ckpt_path={path}"))
    with zipfile.ZipFile(tmp_path / "large.ckpt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for number in range(3):
            file.writestr(f"archive/{number}", bytes(400_000_000))
    with pytest.raises(Damaged, match="unpacks to 1,200,000,000 bytes"):
        read_checkpoint(tmp_path / "large.ckpt")
    for name, value in (("keys", {(1, 2): 3}), ("members", {(1, 2)})):  # which torch's unpickler hashes
        torch.save({"state_dict": value}, tmp_path / f"{name}.ckpt")
        with pytest.raises(Damaged, match="a dict key, or a member of a set, that is a tuple"):
            read_checkpoint(tmp_path / f"{name}.ckpt")
    (tmp_path / "text.ckpt").write_bytes(pickle.dumps("text"))
    with pytest.raises(Damaged):
        read_checkpoint(tmp_path / "text.ckpt")


def test_a_checkpoint_beyond_the_end_is_refused_with_both_numbers(configure: Callable, tmp_path: Path) -> None:
    config = configure("trainer.max_steps=2", f"output={tmp_path}")
    train.start(config)
    path = run_dir(config) / "checkpoints/step00000002.ckpt"
    with pytest.raises(UserError, match=r"is of step 2, beyond trainer\.max_steps = 1"):
        train.start(configure(f"ckpt_path={path}", f"output={tmp_path}"))
    with pytest.raises(UserError, match=r"was trained with model\.U=9, and resuming keeps that"):
        train.start(configure(f"ckpt_path={path}", "model.U=1", "trainer.max_steps=3", f"output={tmp_path}"))


def test_afresh_keeps_what_was_finished_under_another_name(
    configure: Callable, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    config = configure(f"output={tmp_path}")
    folder = run_dir(config)
    for afresh in (False, True, True):
        train.start(configure(f"output={tmp_path}", *["ckpt_path=null"] * afresh))
        assert read_record(folder / FILE)["status"] == "finished"
    assert {path.name for path in folder.iterdir() if path.name[0] not in "."} == {
        "checkpoints", "checkpoints.1", "checkpoints.2", "record.json", "record.1.json", "record.2.json", "train.log",
        "weights.safetensors", "weights.1.safetensors", "weights.2.safetensors",
    }  # fmt: skip
    assert len(list(tmp_path.rglob(FILE))) == 1  # a report counts the run once
    assert caplog.text.count("no validation: the run has 1 step, and trainer.val_check_interval = 2000") == 3
