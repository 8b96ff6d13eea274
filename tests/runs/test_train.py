"""`src/train.py` and `src/prepare.py` end to end: runs, records, multiruns, interruptions."""

from __future__ import annotations

import csv
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from conftest import TINY
from drrn.config import Config
from drrn.errors import Diverged, UserError
from drrn.identity import run_dir
from drrn.images import read_luminance
from drrn.module import SuperResolution
from drrn.patches import Patches
from drrn.protocol import prepare, score
from drrn.runs import start as train
from drrn.runs.record import FILE, read_record
from drrn.weights.ours import load_network
from started import Started

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("Checkpoint directory", "The dirpath has changed", ".*your dataloader is not resumable")
]

# Four steps over more than one epoch of the data, with everything that has a state: BatchNorm, momentum, a rate
# that changes, validation in between.
FOUR = (
    "model.U=2", "data.augment=online", "data.batch_size=100", "trainer.max_steps=4", "trainer.checkpoint_every=1",
    "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "optim.lr=0.01", "optim.theta=1e-4",
    "optim.halve_every_epochs=null", "optim.halve_every_steps=1",
)  # fmt: skip


def trained(config: Config) -> Path:
    """Train; the run's folder."""
    train.start(config)
    return run_dir(config)


def last_checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(max((folder / "checkpoints").glob("*.ckpt")), weights_only=True)


def assert_equal(a: Any, b: Any, where: str) -> None:
    """Nested values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{k}]")
    else:
        assert a == b, where


def assert_same_state(a: Path, b: Path) -> None:
    """Weights, BatchNorm's statistics, momentum, rate and step of two runs."""
    one, other = last_checkpoint(a), last_checkpoint(b)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(one[key], other[key], key)
    assert any("momentum_buffer" in state for state in one["optimizer_states"][0]["state"].values())
    assert any("running_mean" in name for name in one["state_dict"])


@pytest.fixture(scope="module")
def straight(configure: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """One run of four steps, measured at two scales."""
    folder = tmp_path_factory.mktemp("straight")
    config = configure(*FOUR, "data.scales=[2,3]", f"output={folder}", "logger=csv")
    return config, trained(config)


# ---------------------------------------------------------------------- one run


def test_what_a_run_leaves(straight: tuple[Config, Path]) -> None:
    config, folder = straight
    assert {path.name for path in folder.iterdir()} == {
        "record.json", "weights.safetensors", "train.log", "checkpoints", "csv", "rows.jsonl", ".lock",
    }  # fmt: skip
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step00000003.ckpt", "step00000004.ckpt",
    ]  # fmt: skip
    assert [path for path in Path(config.output).iterdir()] == [folder.parent]  # nothing beside it
    assert [path for path in folder.parent.iterdir()] == [folder]
    log = (folder / "train.log").read_text()
    for said in ("depth 6", "step 4/4", "loss", "clipped", "validate/tiny_x2", "×3: PSNR", "finished"):
        assert said.removeprefix("validate/") in log


def test_the_record_of_a_run(straight: tuple[Config, Path]) -> None:
    config, folder = straight
    record = read_record(folder / FILE)
    assert record["status"] == "finished"
    assert "error" not in record
    assert record["budget"]["steps"] == 4
    assert record["budget"]["patches"] == 400
    assert record["budget"]["epochs"] == pytest.approx(4 / (8 * (9 + 9 + 4 + 4) // 100))
    assert record["budget"]["seconds"] > 0
    assert record["structure"]["conv_weights"] == 9 * (2 + 2 * 4 + 2)
    assert record["config"]["optim"]["theta"] == config.optim.theta
    assert record["config"]["data"]["train"] == config.data.train
    assert {(row["scale"], row["image"]) for row in record["scores"]} == {
        (s, name) for s in (2, 3) for name in ("camera.png", "chelsea.png")
    }
    for mean in record["means"]:
        rows = [row for row in record["scores"] if row["scale"] == mean["scale"]]
        for metric in ("psnr", "ssim", "bicubic_psnr", "bicubic_ssim"):
            assert mean[metric] == pytest.approx(sum(row[metric] for row in rows) / len(rows))


def test_the_recorded_scores_can_be_made_again_from_the_weights(
    straight: tuple[Config, Path], tiny_images: Path
) -> None:
    _, folder = straight
    network, about = load_network(folder / "weights.safetensors")
    assert about["steps"] == 4
    for row in read_record(folder / FILE)["scores"]:
        x, truth = prepare(read_luminance(tiny_images / row["image"]), row["scale"])
        with torch.no_grad():
            y = network(torch.from_numpy(x).float()[None, None])[0, 0].numpy()
        assert score(y, truth, row["scale"]) == pytest.approx({k: row[k] for k in ("psnr", "ssim")}, rel=1e-4)
        bicubic = score(x, truth, row["scale"])
        assert bicubic == pytest.approx({k: row[f"bicubic_{k}"] for k in bicubic}, rel=1e-6)


def test_the_weights_are_those_of_the_last_checkpoint(straight: tuple[Config, Path]) -> None:
    _, folder = straight
    network, _ = load_network(folder / "weights.safetensors")
    state = last_checkpoint(folder)["state_dict"]
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[f"network.{name}"], tensor)


def test_what_is_logged(straight: tuple[Config, Path]) -> None:
    _, folder = straight
    (path,) = (folder / "csv").rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["train/gamma"]]
    assert [float(row["train/gamma"]) for row in steps] == pytest.approx([0.01, 0.005, 0.0025, 0.00125])
    for row in steps:
        assert float(row["train/loss"]) > 0
        assert float(row["train/gradient_norm"]) > 0
        assert 0 <= float(row["train/clipped"]) <= 1
    validations = [row for row in rows if row["validate/tiny_x2/psnr"]]
    assert len(validations) == 2  # after two steps and after four
    assert all(10 < float(row["validate/tiny_x2/psnr"]) < 60 for row in validations)
    assert len([row for row in rows if row["test/tiny_x3/ssim"]]) == 1


def test_a_finished_run_is_recognised(straight: tuple[Config, Path], capsys: pytest.CaptureFixture) -> None:
    config, folder = straight
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train.start(config)
    assert f"is finished: {folder / FILE}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_run_that_another_study_finished_is_recognised(
    straight: tuple[Config, Path], capsys: pytest.CaptureFixture
) -> None:
    config, folder = straight
    elsewhere = replace(config, study="another")
    train.start(elsewhere)
    assert f"is finished: {folder / FILE}" in capsys.readouterr().out
    assert not run_dir(elsewhere).exists()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    straight: tuple[Config, Path], configure: Callable, tmp_path: Path
) -> None:
    _, first = straight
    same = trained(configure(*FOUR, "data.scales=[2,3]", f"output={tmp_path}", "data.num_workers=2"))
    other = trained(configure(*FOUR, "data.scales=[2,3]", f"output={tmp_path}", "seed=2"))
    assert_same_state(first, same)
    assert read_record(first / FILE)["scores"] == read_record(same / FILE)["scores"]
    a, b = (last_checkpoint(folder)["state_dict"]["network.conv_rec.weight"] for folder in (first, other))
    assert not torch.allclose(a, b)


# ---------------------------------------------------------------------- interruptions


class Interruption(Exception):
    """An unexpected error."""


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`interrupt(at)` makes the training step after `at` optimiser steps fail; `interrupt(None)` mends it."""
    real = SuperResolution.training_step

    def arm(at: int | None) -> None:
        def training_step(self: SuperResolution, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == at:
                raise Interruption("the machine is gone")
            return real(self, batch, batch_idx)

        monkeypatch.setattr(SuperResolution, "training_step", training_step)

    return arm


@pytest.mark.parametrize(("at", "workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
def test_an_interrupted_run_is_resumed_bit_for_bit(
    at: int, workers: int, straight: tuple[Config, Path], configure: Callable, interrupt: Callable, tmp_path: Path
) -> None:
    overrides = (*FOUR, "data.scales=[2,3]", f"output={tmp_path}", f"data.num_workers={workers}")
    interrupt(at)
    with pytest.raises(Interruption):
        train.start(configure(*overrides))
    folder = run_dir(configure(*overrides))
    record = read_record(folder / FILE)
    assert (record["status"], record["ended_by"]) == ("failed", "error")
    assert "Interruption: the machine is gone" in record["error"]
    assert "Traceback" in (folder / "train.log").read_text()
    assert last_checkpoint(folder)["global_step"] == at

    interrupt(None)
    assert trained(configure(*overrides)) == folder  # the same command
    assert_same_state(folder, straight[1])
    record = read_record(folder / FILE)
    assert record["status"] == "finished"
    assert "error" not in record
    assert record["budget"]["steps"] == 4
    assert record["scores"] == read_record(straight[1] / FILE)["scores"]


def test_accumulated_steps_are_resumed_bit_for_bit(configure: Callable, interrupt: Callable, tmp_path: Path) -> None:
    overrides = (*FOUR, "trainer.accumulate_grad_batches=2", "data.batch_size=20")
    straight = trained(configure(*overrides, f"output={tmp_path / 'straight'}"))
    interrupt(3)
    with pytest.raises(Interruption):
        train.start(configure(*overrides, f"output={tmp_path / 'interrupted'}"))
    interrupt(None)
    again = trained(configure(*overrides, f"output={tmp_path / 'interrupted'}"))
    assert_same_state(straight, again)


@pytest.mark.parametrize(("micro", "after"), [(1, 2), (2, 5)])
def test_a_run_that_was_stopped_is_resumed(
    micro: int, after: int, configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`trainer.max_time` ends during the given micro-batch, the second time in the middle of a step."""
    overrides = (*FOUR, f"trainer.accumulate_grad_batches={micro}", "trainer.checkpoint_every=100")
    straight = trained(configure(*overrides, f"output={tmp_path / 'straight'}"))
    batches: list[int] = []
    real = SuperResolution.training_step

    def training_step(self: SuperResolution, batch: Any, batch_idx: int) -> Any:
        batches.append(batch_idx)
        return real(self, batch, batch_idx)

    overrides = (*overrides, f"output={tmp_path / 'stopped'}", "trainer.max_time=00:01:00:00")
    with monkeypatch.context() as patch:
        patch.setattr(SuperResolution, "training_step", training_step)
        patch.setattr("lightning.pytorch.callbacks.Timer.time_elapsed", lambda *_: 7200 * (len(batches) >= after))
        folder = trained(configure(*overrides))
    record = read_record(folder / FILE)
    steps = math.ceil(after / micro)
    assert (record["status"], record["ended_by"]) == ("stopped", "timer")
    assert record["budget"]["steps"] == steps
    assert last_checkpoint(folder)["global_step"] == steps
    assert trained(configure(*overrides)) == folder  # the same command, which has its hour again
    assert read_record(folder / FILE)["status"] == "finished"
    assert_same_state(folder, straight)


def test_a_finished_run_can_be_made_longer(
    straight: tuple[Config, Path], configure: Callable, tmp_path: Path
) -> None:
    """Two steps and two more from the checkpoint equal four; the longer run has a folder of its own."""
    overrides = (*FOUR, "data.scales=[2,3]", f"output={tmp_path}")
    short = trained(configure(*overrides, "trainer.max_steps=2"))
    checkpoint = short / "checkpoints/step00000002.ckpt"
    long = trained(configure(*overrides, f"ckpt_path={checkpoint}"))
    assert long != short
    assert read_record(long / FILE)["status"] == "finished"
    assert read_record(long / FILE)["budget"]["steps"] == 4
    assert_same_state(long, straight[1])
    assert read_record(short / FILE)["budget"]["steps"] == 2


def test_a_run_can_be_started_afresh(
    straight: tuple[Config, Path], configure: Callable, interrupt: Callable, tmp_path: Path
) -> None:
    overrides = (*FOUR, "data.scales=[2,3]", f"output={tmp_path}")
    interrupt(3)
    with pytest.raises(Interruption):
        train.start(configure(*overrides))
    steps: list[int] = []
    interrupt(None)
    real = SuperResolution.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SuperResolution,
            "training_step",
            lambda self, *batch: steps.append(self.trainer.global_step) or real(self, *batch),
        )
        folder = trained(configure(*overrides, "ckpt_path=null"))
    assert steps == [0, 1, 2, 3]
    assert_same_state(folder, straight[1])
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_what_was_logged_before_an_interruption_is_kept(
    configure: Callable, interrupt: Callable, tmp_path: Path
) -> None:
    overrides = (*FOUR, f"output={tmp_path}", "logger=csv")
    interrupt(2)
    with pytest.raises(Interruption):
        train.start(configure(*overrides))
    interrupt(None)
    folder = trained(configure(*overrides))
    gammas = []
    for path in sorted((folder / "csv").rglob("metrics.csv")):
        with path.open() as file:
            gammas += [float(row["train/gamma"]) for row in csv.DictReader(file) if row["train/gamma"]]
    assert gammas == pytest.approx([0.01, 0.005, 0.0025, 0.00125])


def test_a_run_that_failed_in_its_evaluation_does_not_train_again(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = configure(*FOUR, f"output={tmp_path}")
    with monkeypatch.context() as patch:
        patch.setattr(SuperResolution, "test_step", lambda *_: (_ for _ in ()).throw(Interruption("no memory")))
        with pytest.raises(Interruption):
            train.start(config)
    folder = run_dir(config)
    assert read_record(folder / FILE)["status"] == "failed"
    assert (folder / "weights.safetensors").is_file()
    weights = (folder / "weights.safetensors").read_bytes()
    monkeypatch.setattr(SuperResolution, "training_step", lambda *_: pytest.fail("nothing is left to train"))
    trained(configure(*FOUR, f"output={tmp_path}"))
    record = read_record(folder / FILE)
    assert record["status"] == "finished"
    assert len(record["scores"]) == 2
    network, _ = load_network(folder / "weights.safetensors")
    assert len(weights) == (folder / "weights.safetensors").stat().st_size
    assert torch.equal(network.conv_rec.weight, last_checkpoint(folder)["state_dict"]["network.conv_rec.weight"])


def test_a_loss_that_diverges_is_recorded_with_what_to_try(configure: Callable, tmp_path: Path) -> None:
    config = configure(
        *FOUR, f"output={tmp_path}", "optim.lr=1e12", "optim.clip=none", "model.norm=none", "optim.weight_decay=0"
    )
    loggers = [
        logging.getLogger(name)
        for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.profilers.profiler", "drrn")
    ]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    with pytest.raises(Diverged):
        train.start(config)
    assert [
        (logger.level, logger.propagate, logger.handlers) for logger in loggers
    ] == before  # as a notebook had them
    folder = run_dir(config)
    record = read_record(folder / FILE)
    assert record["status"] == "failed"
    for said in ("Diverged", "step", "γ", "optim.clip=norm"):
        assert said in record["error"]
    kept = last_checkpoint(folder)
    assert kept["global_step"] < 4
    assert all(torch.isfinite(t).all() for t in kept["state_dict"].values())
    assert "Traceback" not in (folder / "train.log").read_text()  # the user can mend it


def test_too_little_memory_ends_in_one_line(entry_point, tiny_images: Path, tmp_path: Path, monkeypatch) -> None:
    def training_step(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(SuperResolution, "training_step", training_step)
    sets = (f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", f"output={tmp_path}")
    code, _, err = entry_point("train", *TINY, *sets)
    assert code == 2
    said = err.splitlines()[-1]
    assert said.startswith("train.py: the GPU has not enough memory")
    for key in ("data.batch_size", "trainer.accumulate_grad_batches", "speed.checkpointing=true"):
        assert key in said
    assert "Traceback" not in err
    (record,) = (read_record(path) for path in tmp_path.rglob(FILE))
    assert (record["status"], record["ended_by"]) == ("failed", "user error")


def test_a_run_whose_data_is_refused_has_a_record_that_says_so(configure: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = configure(f"output={tmp_path / 'runs'}", f"data.val=[{tmp_path / 'empty'}]")
    with pytest.raises(UserError, match="holds no image"):
        train.start(config)
    record = read_record(run_dir(config) / FILE)
    assert record["status"] == "failed"
    assert "holds no image" in record["error"]


# ---------------------------------------------------------------------- a multirun


@pytest.fixture(scope="module")
def multirun(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, Any]:
    """The real command with three jobs, the second of which diverges; W&B offline. Run outside the clone."""
    here = tmp_path_factory.mktemp("elsewhere")
    command = [
        "-m", "optim.lr=0.001,1e12,0.002", "model=drrn", "model.U=0", "model.B=2",
        "model.features=2", "model.norm=none", "optim.clip=none", "data.scales=[2]", "data.val_scales=[2]",
        f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", "data.batch_size=4", "data.num_workers=0",
        "trainer.max_steps=3", "trainer.checkpoint_every=1", "trainer.log_every_n_steps=1", "study=grid",
        "trainer.accelerator=cpu",
    ]  # fmt: skip
    with Started("train.py", *command, cwd=here) as process:
        out, err = process.communicate()
    return command, here, (process.returncode, out, err)


def records_by_rate(folder: Path) -> dict[float, tuple[Path, dict]]:
    found = {}
    for path in folder.rglob(FILE):
        record = read_record(path)
        found[record["config"]["optim"]["lr"]] = (path.parent, record)
    return found


def test_a_failing_job_neither_stops_nor_renames_the_others(multirun: tuple) -> None:
    _, here, (code, out, err) = multirun
    assert code == 2, err
    assert "2 of 3 runs done" in out
    assert "optim.lr=1000000000000.0" in out  # which one
    assert "Diverged" in out
    assert "1 of 3 runs failed" in err
    assert "Traceback" not in out + err
    runs = records_by_rate(here / "runs/grid")
    assert set(runs) == {0.001, 1e12, 0.002}
    assert {rate: record["status"] for rate, (_, record) in runs.items()} == {
        0.001: "finished", 1e12: "failed", 0.002: "finished",
    }  # fmt: skip
    assert "Diverged" in runs[1e12][1]["error"]
    assert len({folder for folder, _ in runs.values()}) == 3
    for rate in (0.001, 0.002):
        folder, record = runs[rate]
        assert (folder / "weights.safetensors").is_file()
        assert record["budget"]["steps"] == 3
        assert record["means"][0]["psnr"] > 5
    assert {path.name for path in here.iterdir()} == {"runs"}  # Hydra, Lightning and W&B leave nothing else


def test_every_job_has_a_wandb_run_of_its_own(multirun: tuple) -> None:
    _, here, _ = multirun
    offline = sorted(here.rglob("offline-run-*"))
    offline = [path for path in offline if path.is_dir()]
    assert len(offline) == 3
    assert {path.parents[1] for path in offline} == {folder for folder, _ in records_by_rate(here).values()}
    for path in offline:
        assert path.name.endswith(f"-{read_record(path.parents[1] / FILE)['wandb_id']}")
        (stored,) = path.glob("*.wandb")
        content = stored.read_bytes()
        for said in (b"VDSR_d3", b"grid", b"train/gamma", b"B2", b"U0"):
            assert said in content, said


def test_the_same_multirun_again_tries_only_what_failed(multirun: tuple, entry_point: Callable, monkeypatch) -> None:
    command, here, _ = multirun
    monkeypatch.chdir(here)
    before = {rate: folder for rate, (folder, _) in records_by_rate(here).items()}
    kept = (before[0.001] / "weights.safetensors").stat().st_mtime_ns
    code, out, err = entry_point("train", *command, "logger=none")
    assert code == 2
    assert out.count("is finished") == 2
    assert "1 of 3 runs failed" in err
    assert {rate: folder for rate, (folder, _) in records_by_rate(here).items()} == before
    assert (before[0.001] / "weights.safetensors").stat().st_mtime_ns == kept


def test_an_unexpected_error_in_a_job_does_not_stop_the_others(
    entry_point: Callable, tiny_images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not a user error but a bug: the sweep continues, reports it, and exits with an error."""
    real = SuperResolution.training_step

    def buggy(self: SuperResolution, batch: Any, batch_idx: int) -> Any:
        if self.network.B == 1:
            raise Interruption("a bug")
        return real(self, batch, batch_idx)

    monkeypatch.setattr(SuperResolution, "training_step", buggy)
    code, out, err = entry_point(
        "train", "-m", "model.B=1,2", "model.U=0", "model.features=2", "data.scales=[2]", "data.val_scales=[2]",
        f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", "data.batch_size=2", "data.num_workers=0",
        "trainer.max_steps=1", "logger=none", "trainer.accelerator=cpu", f"output={tmp_path}",
    )  # fmt: skip
    assert code != 0
    assert "1 of 2 runs done" in out
    assert "Interruption: a bug" in out
    statuses = {r["structure"]["name"]: r["status"] for r in map(read_record, tmp_path.rglob(FILE))}
    assert statuses == {"VDSR_d2_2f": "failed", "VDSR_d3_2f": "finished"}
    assert "Interruption" in err  # the traceback is in the run's log and on the console


# ---------------------------------------------------------------------- prepare


def test_prepare_builds_once_and_says_what_it_made(entry_point: Callable, tiny_images: Path, tmp_path: Path) -> None:
    arguments = (
        "prepare", f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", f"data.patches={tmp_path / 'p'}",
        "data.augment=online",
    )  # fmt: skip
    code, out, err = entry_point(*arguments)
    assert code == 0, err
    (path,) = (tmp_path / "p").glob("*.h5")
    assert str(path) in out
    assert "36 pairs" in out
    assert "tiny: 2 images" in out
    before = path.stat().st_mtime_ns
    assert entry_point(*arguments)[0] == 0
    assert path.stat().st_mtime_ns == before
    assert len(Patches(path)) == 36


def test_prepare_refuses_an_unreadable_image(entry_point: Callable, tiny_images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(tiny_images, folder)
    (folder / "bad.png").write_bytes((folder / "camera.png").read_bytes()[:500])
    code, out, err = entry_point(
        "prepare", f"data.train=[{folder}]", f"data.val=[{tiny_images}]", f"data.patches={tmp_path / 'p'}"
    )
    assert code == 2
    assert str(folder / "bad.png") in err
    assert "Traceback" not in out + err
    assert not list((tmp_path / "p").glob("*.h5"))
    assert not list((tmp_path / "p").glob("*.partial"))


# ---------------------------------------------------------------------- learning


def test_a_network_learns_the_photograph_it_sees(configure: Callable, tmp_path: Path) -> None:
    """The whole chain on real pixels: after 150 quick steps on one photograph, better than bicubic on it."""
    folder = tmp_path / "photograph"
    folder.mkdir()
    Image.fromarray(skimage.data.camera()[64:192, 160:288]).save(folder / "camera.png")
    config = configure(
        f"data.train=[{folder}]", f"data.val=[{folder}]", f"output={tmp_path / 'runs'}", "optim=quick",
        "model.features=8", "model.U=1", "data.batch_size=16", "trainer.max_steps=150", "optim.lr=0.004",
    )  # fmt: skip
    (mean,) = read_record(trained(config) / FILE)["means"]
    assert mean["psnr"] > mean["bicubic_psnr"] + 0.3
    assert math.isfinite(mean["ssim"])
    assert np.isfinite(mean["bicubic_ssim"])


def test_patches_that_are_changed_in_place_end_the_run(
    configure: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every checkpoint was trained only on the pairs that the record names."""
    config = configure(
        f"output={tmp_path / 'runs'}", f"data.patches={tmp_path}", "trainer.max_steps=9", "trainer.checkpoint_every=2"
    )
    read, reads = Patches.__getitem__, []

    def read_after_a_change(patches: Patches, indices: np.ndarray) -> tuple:
        reads.append(indices)
        if len(reads) == 7:
            with patches.path.open("r+b") as file:
                file.seek(-100, os.SEEK_END)
                file.write(b"other")
        return read(patches, indices)

    monkeypatch.setattr(Patches, "__getitem__", read_after_a_change)
    with pytest.raises(UserError, match="was changed while it was in use"):
        train.start(config)
    (path,) = (tmp_path / "runs").rglob(FILE)
    assert read_record(path)["status"] == "failed"
    assert sorted(path.parent.glob("checkpoints/*"))[-1].name in ("step00000004.ckpt", "step00000006.ckpt")


def test_an_interrupted_run_is_not_resumed_with_other_images(configure: Callable, tmp_path: Path) -> None:
    """If a folder's images change between two starts, the run's folder is the same, but its data is not."""
    from drrn.disk import write_json

    config = configure(f"output={tmp_path}")
    begun = {"format": 1, "status": "running", "patches": "tiny-0123456789.h5", "wandb_id": "abc"}
    write_json(run_dir(config) / FILE, begun)
    with pytest.raises(UserError, match=r"tiny-0123456789\.h5 and would be resumed with"):
        train.start(config)
