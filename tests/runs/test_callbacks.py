"""Callbacks by `_target_`: with each, given only its yaml, a run trains, stops, resumes and is evaluated."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from drrn.errors import UserError
from drrn.identity import run_dir
from drrn.module import SuperResolution
from drrn.runs import start as train
from drrn.runs.callbacks import make_callbacks
from drrn.runs.checkpoints import newest_checkpoint
from drrn.runs.record import FILE, read_record
from drrn.runs.request import request
from drrn.weights.ours import load_network

SIX = (
    "model.U=1", "data.batch_size=12", "trainer.max_steps=6", "trainer.checkpoint_every=1", "seed=3",
    "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "optim.lr=0.01", "optim.theta=1e-4", "logger=csv",
)  # fmt: skip


def stopped_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM at the beginning of the step after `steps` steps."""
    real, sent = SuperResolution.training_step, []

    def training_step(self: SuperResolution, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == steps - 1 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(self, batch, batch_idx)

    patch.setattr(SuperResolution, "training_step", training_step)


def last(folder: Path) -> dict[str, Any]:
    return torch.load(newest_checkpoint(folder / "checkpoints"), weights_only=True)


@pytest.fixture(scope="module")
def plain(configure: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a callback."""
    config = configure(*SIX, f"output={tmp_path_factory.mktemp('plain')}")
    train.start(config)
    return run_dir(config)


def test_an_average_of_the_weights_is_validated_scored_saved_and_resumed(
    plain: Path, configure: Callable, entry_point: Callable, tiny_images: Path, tmp_path: Path
) -> None:
    ema = ("callbacks=ema", "callbacks.ema.decay=0.5")
    straight = configure(*SIX, *ema, f"output={tmp_path / 'straight'}", "logger.pictures_every=2")
    drawn: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        weights = lambda module, stage: drawn.append(module.network.conv_rec.weight.detach().clone()) or {}  # noqa: E731
        patch.setattr("drrn.tracking.results.pictures", weights)
        train.start(straight)
    again = configure(*SIX, *ema, f"output={tmp_path / 'stopped'}")
    for steps in (3, 6):  # in the middle, and when only the evaluation is left
        with pytest.MonkeyPatch.context() as patch:
            stopped_after(steps, patch)
            with pytest.raises(SystemExit):
                train.start(again)
        assert last(run_dir(again))["global_step"] == steps
    train.start(again)
    one, two = last(run_dir(straight)), last(run_dir(again))
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(one[key][name], tensor) for name, tensor in two[key].items())
    assert read_record(run_dir(straight) / FILE)["scores"] == read_record(run_dir(again) / FILE)["scores"]
    assert read_record(run_dir(straight) / FILE)["validation"] == read_record(run_dir(again) / FILE)["validation"]

    # The average of six steps, made again from the checkpoints of the run without it: the same solver's steps.
    averaged, raw = one["state_dict"], one["current_model_state"]
    name = "network.conv_rec.weight"
    assert torch.equal(raw[name], last(plain)["state_dict"][name])
    assert not torch.equal(raw[name], averaged[name])
    assert torch.equal(drawn[-1], averaged[name])  # pictures of a validation show the average too
    network, _ = load_network(run_dir(straight) / "weights.safetensors")
    assert all(torch.equal(averaged[f"network.{key}"], tensor) for key, tensor in network.state_dict().items())
    assert read_record(run_dir(straight) / FILE)["scores"] != read_record(plain / FILE)["scores"]

    code, _, err = entry_point(
        "evaluate", f"checkpoint={run_dir(straight) / 'weights.safetensors'}", f"sets=[{tiny_images}]", "scales=[2]",
        f"output={tmp_path / 's.json'}", "workers=1",
    )  # fmt: skip
    assert code == 0, err
    scored = {row["image"]: row["psnr"] for row in json.loads((tmp_path / "s.json").read_text())["scores"]}
    recorded = {row["image"]: row["psnr"] for row in read_record(run_dir(straight) / FILE)["scores"]}
    assert scored == pytest.approx(recorded, abs=1e-3)


def test_early_stopping_finishes_a_run_and_its_patience_is_resumed(configure: Callable, tmp_path: Path) -> None:
    """The required gain is 99 dB, so the third validation is the second without a gain."""
    asked = (
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=2",
        "callbacks.early_stopping.min_delta=99",
    )
    config = configure(*SIX, *asked, "trainer.max_steps=20", f"output={tmp_path}")
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(5, patch)
        with pytest.raises(SystemExit):
            train.start(config)
    train.start(config)
    record = read_record(run_dir(config) / FILE)
    assert (record["status"], record["ended_by"], record["budget"]["steps"]) == ("finished", "callback", 6)
    before = (run_dir(config) / FILE).stat().st_mtime_ns
    train.start(config)  # it is finished
    assert (run_dir(config) / FILE).stat().st_mtime_ns == before


def test_a_monitor_logs_what_it_watches_in_the_same_run(plain: Path, configure: Callable, tmp_path: Path) -> None:
    config = configure(*SIX, "callbacks=lr_monitor", f"output={tmp_path}")
    assert run_dir(config).name == plain.name
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(3, patch)
        with pytest.raises(SystemExit):
            train.start(config)
    train.start(config)
    rates = {}
    for path in (run_dir(config) / "csv").rglob("metrics.csv"):
        with path.open() as file:
            rates |= {
                (row["step"], name): float(row[name])
                for row in csv.DictReader(file)
                for name in row
                if name.startswith("lr-") and row[name]
            }
    assert sorted(rates.values()) == [0.001] * 6 + [0.01] * 6  # of biases and of weights, at each step
    rows = [json.loads(line) for line in (run_dir(config) / "rows.jsonl").read_text().splitlines()]
    steps = {row["step"] for row in rows if any(key.startswith("lr-") for key in row)}
    assert steps == {0, 1, 2, 3, 4, 5}  # each before its step


def test_a_checkpoint_of_ones_own_and_a_timer_leave_the_run_as_it_is(
    plain: Path, configure: Callable, tmp_path: Path
) -> None:
    config = configure(
        *SIX, "callbacks=[best_checkpoint,timer]", "+callbacks.best_checkpoint.save_last=true", f"output={tmp_path}"
    )
    assert run_dir(config).name == plain.name
    train.start(config)
    folder = run_dir(config)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step00000005.ckpt",
        "step00000006.ckpt",
    ]
    best = max(read_record(folder / FILE)["validation"], key=lambda row: row["psnr"])
    assert len(list((folder / "best_checkpoint").glob("step*.ckpt"))) == 1, best
    assert (folder / "best_checkpoint" / "last.ckpt").is_file()
    assert all(
        torch.equal(last(plain)["state_dict"][name], tensor) for name, tensor in last(folder)["state_dict"].items()
    )


class Odd(Callback):
    """A callback with a state that only pickle could keep."""

    def state_dict(self) -> dict[str, Any]:
        return {"path": Path("here")}


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ("{_target_:os.system,command:touch executed}", "is no lightning"),
        ("{_target_:lightning.pytorch.callbacks.StochasticWeightAveraging,swa_lrs:0.1}", "cannot be used here"),
        ("{_target_:lightning.pytorch.callbacks.GradientAccumulationScheduler,scheduling:{0:2}}", "cannot be used"),
        ("{_target_:lightning.pytorch.callbacks.LearningRateFinder}", "part of a run.s identity"),
        ("{_target_:lightning.pytorch.callbacks.TQDMProgressBar}", "a run has its own"),
        ("{_target_:lightning.pytorch.callbacks.EarlyStopping}", "does not take these arguments"),
        ("{_target_:lightning.pytorch.callbacks.ModelCheckpoint,dirpath:CHECKPOINTS,save_last:true}", "its own"),
        ("{_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:{_target_:os.system}}", "among the arguments"),
    ],
)
def test_a_callback_that_would_break_a_promise_is_refused(
    node: str, said: str, configure: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = configure(f"+callbacks.mine={node}".replace("CHECKPOINTS", str(folder / "checkpoints")))
    with pytest.raises(UserError, match=said) as refusal:
        make_callbacks(config, folder)
    assert "callbacks.mine" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_callback_that_watches_what_no_run_logs_is_refused_before_the_first_step(
    configure: Callable, tmp_path: Path
) -> None:
    stop = "+callbacks.stop={_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:SET_x3/psnr,mode:max}"
    with pytest.raises(UserError, match=r"callbacks.stop.monitor = 'SET_x3/psnr'.*there are validate/psnr"):
        train.start(configure(*SIX, stop, f"output={tmp_path}"))
    assert not [*tmp_path.rglob("*.ckpt")]


def test_a_state_that_cannot_be_read_again_is_refused_when_it_is_written(configure: Callable, tmp_path: Path) -> None:
    config = configure(*SIX, f"+callbacks.odd={{_target_:{__name__}.Odd}}", f"output={tmp_path}")
    with pytest.raises(UserError, match="callbacks: Odd keeps a PosixPath in its state"):
        train.start(config)


def test_what_changes_weights_or_length_is_part_of_what_a_run_is(configure: Callable) -> None:
    run = run_dir(configure()).name
    assert all(
        run_dir(configure(f"callbacks={name}")).name == run for name in ("lr_monitor", "timer", "best_checkpoint")
    )
    watching = "+callbacks.mine={_target_:lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor}"
    assert run_dir(configure(watching)).name == run  # the class counts, whichever of its names is given
    different = [run_dir(configure(*more)).name for more in (
        ("callbacks=ema",), ("callbacks=ema", "callbacks.ema.decay=0.9"), ("callbacks=early_stopping",),
        ("+callbacks.mine={_target_:rich.Callback}",), ("callbacks=[ema,early_stopping]",),
    )]  # fmt: skip
    assert len({run, *different}) == 6
    assert run_dir(configure("callbacks=[early_stopping,ema]")).name == different[-1]


@pytest.mark.parametrize(
    ("callback", "model", "folder"),
    [
        ("early_stopping.EarlyStopping,monitor:val/psnr,patience:3", "drrn", "DRRN_B1U9_s1-de8508b5"),
        ("timer.Timer,duration:00:12:00:00", "drrn", "DRRN_B1U9_s1-f3d2bff1"),
        ("timer.Timer,duration:00:12:00:00", "srcnn", "SRCNN_middle1_features64_s1-4256ae59"),
    ],
)
def test_a_run_is_found_where_it_was_when_a_callback_had_two_names(
    callback: str, model: str, folder: str, configure: Callable, tmp_path: Path
) -> None:
    """The folders are those of commit a645686, in which a class by its other name was another experiment."""
    mine = f"+callbacks.mine={{_target_:lightning.pytorch.callbacks.{callback}}}"
    config = configure(f"model={model}", mine, f"output={tmp_path}", tiny=False)
    assert run_dir(config).name.rpartition("-")[2] != folder.rpartition("-")[2]
    (tmp_path / "main" / folder).mkdir(parents=True)
    assert run_dir(config) == tmp_path / "main" / folder


def test_from_a_record_only_lightnings_callbacks_are_taken(plain: Path, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    from drrn.home import CONF

    record = read_record(plain / FILE)
    path = tmp_path / FILE
    for target, good in (("lightning.pytorch.callbacks.Timer", True), ("os.system", False)):
        record["config"]["callbacks"] = {"mine": {"_target_": target}}
        path.write_text(json.dumps(record))
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("config", [f"from_record={path}"])
        if good:
            assert request(cfg, [f"from_record={path}"]).callbacks["mine"]["_target_"] == target
        else:
            with pytest.raises(UserError, match="the record names"):
                request(cfg, [f"from_record={path}"])
