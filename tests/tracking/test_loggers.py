"""Loggers as a list: each has the same curves, none ends a run, and no kill loses a row."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers.logger import Logger
from test_tracking import FOUR, TRAINING, Interruption, before_step, fail, stored, trained, union

from drrn.config import CSV
from drrn.errors import UserError
from drrn.identity import run_dir
from drrn.runs import start as train
from drrn.runs.record import FILE
from drrn.targets import resolve
from drrn.tracking.wandb_files import history, runs
from started import Started


def lines(folder: Path) -> dict[tuple[int, str], float]:
    """(step, metric) → value of a run's own file of rows, none of them twice."""
    held: dict[tuple[int, str], float] = {}
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for key, value in row.items():
            assert (step, key) not in held, "logged twice"
            held[step, key] = value
    return held


@pytest.fixture(scope="module")
def several(configure: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with three loggers that failed in its fourth step and was resumed from the second."""
    loggers = ("logger=[wandb,tensorboard,csv]", f"output={tmp_path_factory.mktemp('several')}")
    loggers = (*loggers, "logger.pictures_every=2")
    config = configure(*(word for word in FOUR if not word.startswith("logger")), *loggers)
    with before_step(3, fail), pytest.raises(Interruption):
        train.start(config)
    return trained(config)


def test_the_record_names_every_logger(several: tuple) -> None:
    _, record = several
    first, also = record["tracking"], record["tracking"]["also"]
    assert (first["kind"], first["mode"], first["problem"]) == ("wandb", "offline", None)
    assert also == [{"kind": "tensorboard", "problem": None}, {"kind": "csv", "problem": None}]
    assert record["config"]["logger_extra"].keys() == {"tensorboard", "csv"}


def test_every_logger_has_the_same_curves(several: tuple) -> None:
    """By patches seen; each value once, though a step was done twice; equal to the record's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, record = several
    expected = lines(folder)
    curves = {metric for _, metric in expected}
    assert curves >= TRAINING | {"validate/tiny_x2/psnr"}
    assert [step for step, metric in expected if metric == "train/loss"] == [1, 2, 3, 4]
    psnrs = [row["psnr"] for row in record["validation"] if row["step"] == 4]
    assert expected[4, "validate/tiny_x2/psnr"] == pytest.approx(sum(psnrs) / len(psnrs), abs=1e-4)

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    shown = {(e.step, key): e.value for key in board.Tags()["scalars"] if key in curves for e in board.Scalars(key)}
    assert shown == pytest.approx({(8 * step, key): value for (step, key), value in expected.items()})
    assert sum(len(board.Scalars(key)) for key in curves) == len(expected)

    found: dict[tuple[int, str], float] = {}
    for path in folder.glob("csv/*/metrics.csv"):
        with path.open() as file:
            for row in csv.DictReader(file):
                step = int(row["step"])
                assert float(row["patches_seen"]) == 8 * step
                found |= {(step, key): float(row[key]) for key in curves if row.get(key)}
    assert found == pytest.approx(expected)

    kept = union(folder, record["wandb_id"])
    assert {place: value for place, value in kept.items() if place[1] in curves} == expected


def test_tensorboard_shows_scores_table_and_pictures(several: tuple) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, record = several
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    board.Reload()
    (mean,) = record["means"]
    for metric in ("psnr", "ssim", "bicubic_psnr"):
        (event,) = board.Scalars(f"test/tiny_x2/{metric}")
        assert (event.step, event.value) == (32, pytest.approx(mean[metric]))
    for image in ("camera", "chelsea"):
        *during, picture = board.Images(f"pictures/tiny_x2/{image}")
        assert [event.step for event in (*during, picture)] == [16, 32, 32]  # two validations, and the end
        assert during[0].encoded_image_string != picture.encoded_image_string
        assert picture.encoded_image_string.startswith(b"\x89PNG")
        assert min(picture.width, picture.height) > 100
    (event,) = board.Tensors("scores/text_summary")
    table = event.tensor_proto.string_val[0].decode()
    assert "| camera.png |" in table
    assert "bicubic_psnr" in table
    assert "features: 2" in (folder / "tensorboard" / "hparams.yaml").read_text()


def test_wandb_shows_pictures_of_the_validations_that_were_asked_for(several: tuple) -> None:
    folder, record = several
    rows = [row for path in runs(folder, record["wandb_id"]) for row in history(path)]
    steps = [step for step, row in rows if any(key.startswith("pictures/tiny_x2/camera") for key in row)]
    assert steps == [2, 4, 5]  # the last one is the row of the scores


# ---------------------------------------------------------------------- lost rows are logged again

KILLED = """
import os, signal, sys
import train
from drrn.launch import launch
from drrn.module import SuperResolution
real = SuperResolution.training_step
def step(self, batch, batch_idx):
    if self.trainer.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batch, batch_idx)
SuperResolution.training_step = step
launch(train.main)
"""


def test_a_killed_run_loses_no_row(configure: Callable, tiny_images: Path, tmp_path: Path) -> None:
    """W&B's own file lacks the last 15 s of a killed process; the run's file of rows has them."""
    from conftest import TINY

    words = [*TINY, *FOUR, f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", f"output={tmp_path}"]
    with Started(KILLED, *words, cwd=tmp_path) as process:
        assert process.wait() == -signal.SIGKILL, process.err.read_text()
    config = configure(*FOUR, f"output={tmp_path}")
    before = lines(run_dir(config))
    assert [step for step, metric in before if metric == "train/loss"] == [1, 2, 3]
    with (run_dir(config) / "rows.jsonl").open("a") as file:
        file.write('{"step": 3, "train/l')  # as a full disk leaves it
    folder, record = trained(config)
    after = lines(folder)
    assert before.items() <= after.items()
    assert [step for step, metric in after if metric == "train/loss"] == [1, 2, 3, 4]
    kept = union(folder, record["wandb_id"])
    assert {place: value for place, value in kept.items() if place in after} == after
    rows = [row for path in runs(folder, record["wandb_id"]) for row in history(path)]
    assert {step: row["patches_seen"] for step, row in rows} == {1: 8, 2: 16, 3: 24, 4: 32, 5: 32}


def test_a_logger_that_comes_later_gets_what_was_logged_before(configure: Callable, tmp_path: Path) -> None:
    """W&B beside a run that was begun without it."""
    none = (*(word for word in FOUR if not word.startswith("logger")), f"output={tmp_path}")
    with before_step(3, fail), pytest.raises(Interruption):
        train.start(configure(*none, "logger=none"))
    folder, record = trained(configure(*none, "logger=wandb"))
    kept = union(folder, record["wandb_id"])
    assert {place: value for place, value in kept.items() if place in lines(folder)} == lines(folder)


# ---------------------------------------------------------------------- what is named by `_target_`


class Raising(Logger):
    """A logger that can do nothing."""

    name = version = None

    def __init__(self, told: str = "") -> None:
        super().__init__()

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        raise ConnectionError("nobody is there")

    log_hyperparams = save = finalize = log_graph = log_metrics


def test_a_logger_that_raises_is_said_once_and_the_run_continues(configure: Callable, tmp_path: Path) -> None:
    node = "+logger.mine={_target_: test_loggers.Raising, told: x}"
    words = [word for word in FOUR if not word.startswith("logger")]
    folder, record = trained(configure(*words, f"output={tmp_path}", "logger=csv", node))
    assert record["status"] == "finished"
    states = {state["kind"]: state["problem"] for state in (record["tracking"], *record["tracking"]["also"])}
    assert states == {"csv": None, "mine": "logger.mine failed at log_hyperparams: ConnectionError: nobody is there"}
    assert (folder / "train.log").read_text().count("ConnectionError: nobody is there") == 1
    assert list(folder.glob("csv/*/metrics.csv"))


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ("{_target_: builtins.print}", "is no lightning"),
        ("{_target_: lightning.pytorch.callbacks.Timer}", "is no lightning"),
        ("{_target_: nowhere.Logger}", "there is no such class"),
        ("{_target_: test_loggers.Raising, wrong: 1}", "does not take these arguments"),
        ("{save_dir: x}", "must name a class"),
        ("3", "must name a class"),
    ],
)
def test_what_is_no_logger_is_refused_before_the_run(
    node: str, said: str, entry_point: Callable, tiny_images: Path, tmp_path: Path
) -> None:
    from conftest import TINY

    data = (f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", f"output={tmp_path}")
    code, _, err = entry_point("train", *TINY, *data, f"+logger.mine={node}")
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert "logger.mine" in err
    assert said in err
    assert not list(tmp_path.rglob(FILE))


def test_loggers_of_records(configure: Callable, tmp_path: Path) -> None:
    """Records with one logger (older) and with several; only Lightning's classes are accepted from a record."""
    written = configure("logger=tensorboard", f"output={tmp_path}")
    record = {"format": 1, "config": json.loads(json.dumps(written, default=vars))}

    def again(logger: dict[str, Any], extra: dict[str, Any] | None = None) -> tuple[bool, dict[str, Any]]:
        record["config"] |= {"logger": dict(logger), "logger_extra": extra}
        (tmp_path / "record.json").write_text(json.dumps(record))
        config = configure(f"from_record={tmp_path / 'record.json'}", tiny=False)
        assert config.logger.project == logger["project"]
        return config.logger.wandb, config.logger_extra

    old = {"project": "theirs", "mode": "disabled", "artifacts": "weights"}
    assert again({"kind": "wandb", **old}) == (True, {})
    assert again({"kind": "none", **old}) == (False, {})
    assert again({"kind": "csv", **old}) == (False, {"csv": CSV})
    assert again(vars(written.logger), written.logger_extra) == (False, written.logger_extra)
    with pytest.raises(UserError, match=r"test_loggers\.Raising"):
        again(vars(written.logger), {"mine": {"_target_": "test_loggers.Raising"}})


def test_the_old_key_of_one_logger_is_still_taken(configure: Callable) -> None:
    for kind, wandb, others in (("wandb", True, {}), ("csv", False, {"csv": CSV}), ("none", False, {})):
        config = configure("logger=[wandb,tensorboard]", f"logger.kind={kind}")
        assert (config.logger.wandb, config.logger_extra) == (wandb, others)


def test_csvs_class_is_lightnings() -> None:
    assert resolve("logger.csv", CSV, Logger)[0].__name__ == "CSVLogger"


def test_without_wandb_the_others_work(configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    words = [word for word in FOUR if not word.startswith("logger")]
    for logger in ("none", "[csv,tensorboard]"):
        folder, record = trained(configure(*words, f"output={tmp_path / logger.strip('[]')[:3]}", f"logger={logger}"))
        assert record["status"] == "finished"
        assert "problem" not in record["tracking"] or record["tracking"]["problem"] is None
        assert "failed" not in (folder / "train.log").read_text()


# ---------------------------------------------------------------------- W&B's keys and environment


def test_wandbs_keys_and_environment_are_honoured(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key, value in {"PROJECT": "theirs", "TAGS": "night,long", "NOTES": "from the shell", "NAME": "mine"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    config = configure(
        *FOUR, f"output={tmp_path}", "trainer.max_steps=1", "logger.entity=team", "logger.job_type=ablation",
        "logger.tags=[paper]",
    )  # fmt: skip
    folder, record = trained(config)
    (path,) = runs(folder, record["wandb_id"])
    run = stored(path, "run")[0]
    assert (run.project, run.entity, run.job_type, run.notes, run.display_name) == (
        "theirs", "team", "ablation", "from the shell", "mine",
    )  # fmt: skip
    assert set(run.tags) == {"DRRN_B1U1_2f", "B1", "U1", "d4", "paper", "night", "long"}


def test_wandb_mode_is_honoured_and_gives_way_to_the_key(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert configure("logger.mode=online").logger.mode == "online"
    folder, record = trained(configure(*FOUR, f"output={tmp_path}", "trainer.max_steps=1"))
    assert record["tracking"] == {"kind": "wandb", "mode": "disabled", "folder": None, "problem": None}
    assert not runs(folder, record["wandb_id"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        *((f"'logger.project=a{letter}b'", "logger.project") for letter in "/#?%:"),
        (f"logger.project={'x' * 129}", "128"),
        (f"logger.tags=[{'x' * 65}]", "logger.tags"),
    ],
)
def test_what_wandb_would_refuse_is_refused_at_the_start(override: str, said: str, entry_point: Callable) -> None:
    key, _, value = override.strip("'").partition("=")
    code, _, err = entry_point("train", f"{key}={value}" if "[" in value or "x" in value else f"{key}='{value}'")
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("logger", ["none", "csv"])
def test_a_run_without_wandb_needs_no_wandb(
    logger: str, configure: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B as if not installed: it cannot be imported, and has no version."""
    version = importlib.metadata.version

    def without(package: str) -> str:
        if package == "wandb":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without)
    for name in [name for name in sys.modules if name == "wandb" or name.startswith("wandb.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = configure(f"logger={logger}", f"output={tmp_path}")
    train.start(config)
    record = json.loads((run_dir(config) / FILE).read_text())
    assert record["status"] == "finished"
    assert record["versions"]["wandb"] is None
