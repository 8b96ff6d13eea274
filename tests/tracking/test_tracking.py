"""W&B: the content of an offline run, read back from its file; and W&B's failures never end a run."""

from __future__ import annotations

import csv
import http.server
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import numpy as np
import pytest
import wandb
from PIL import Image

from drrn.config import Config
from drrn.identity import run_dir
from drrn.module import SuperResolution
from drrn.runs import start as train
from drrn.runs.record import FILE, read_record
from drrn.tracking import wandb_run
from drrn.tracking.loggers import Tracking
from drrn.tracking.wandb_files import ended, history, records, runs

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("Checkpoint directory", "The dirpath has changed", ".*your dataloader is not resumable")
]

# Four steps, each logged, the second and the fourth validated and kept.
FOUR = (
    "model.U=1", "data.augment=online", "trainer.max_steps=4", "trainer.checkpoint_every=2", "logger=wandb",
    "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "optim=quick", "study=fig6", "data.batch_size=8",
)  # fmt: skip
TRAINING = {"train/loss", "train/gamma", "train/gradient_norm", "train/clipped"}


class Interruption(Exception):
    pass


def trained(config: Config) -> tuple[Path, dict[str, Any]]:
    """Train; the run's folder and record."""
    train.start(config)
    return run_dir(config), read_record(run_dir(config) / FILE)


def stored(path: Path, kind: str) -> list[Any]:
    """The messages of one kind in a W&B file."""
    return [getattr(record, kind) for record in records(path) if record.WhichOneof("record_type") == kind]


def summary(path: Path) -> dict[str, Any]:
    updates = [item for message in stored(path, "summary") for item in message.update]
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in updates}


def service() -> int:
    """The process id of W&B's service: a child of ours, the dead ones left out."""
    lists = [task / "children" for task in Path("/proc/self/task").iterdir()]
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for at in lists for pid in at.read_text().split()}
    (core,) = (pid for pid, command in commands.items() if "wandb-core" in command)
    return core


@contextmanager
def before_step(step: int, act: Callable[[], Any]) -> Iterator[None]:
    """Call `act` when `step` steps have been done and the next begins."""
    real = SuperResolution.training_step

    def training_step(self: SuperResolution, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == step:
            act()
        return real(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SuperResolution, "training_step", training_step)
        yield


def fail(*_: Any, **__: Any) -> None:
    raise Interruption("it broke")


@pytest.fixture(scope="module")
def straight(configure: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Path]:
    """An uninterrupted run: its folder, its record, its W&B file."""
    folder, record = trained(
        configure(*FOUR, "logger.artifacts=weights", f"output={tmp_path_factory.mktemp('runs')}")
    )
    (path,) = runs(folder, record["wandb_id"])
    return folder, record, path


# ---------------------------------------------------------------------- what the file holds


def test_the_run_says_what_it_is(straight: tuple) -> None:
    _, record, path = straight
    run = stored(path, "run")[0]
    assert (run.project, run.run_group, run.display_name) == ("drrn", "fig6", "DRRN_B1U1_2f s1")
    assert (run.run_id, run.resume) == (record["wandb_id"], True)
    assert set(run.tags) == {"DRRN_B1U1_2f", "B1", "U1", "d4"}
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    for key, value in record["config"].items():  # the resolved configuration, every key
        assert config[key] == value, key
    for key in ("structure", "experiment", "patches", "protocol", "versions", "machine", "git"):
        assert config[key] == record[key], key
    assert config["d"] == 4  # B = 1, U = 1: H0, two of the unit, reconstruction
    assert config["k"] == 9 * (2 + 2 * 2 * 2 + 2)
    assert config["budget"] == {"steps": 4, "patches": 32}
    assert record["tracking"] == {
        "kind": "wandb", "mode": "offline", "folder": f"wandb/{path.parent.name}", "problem": None,
    }  # fmt: skip
    assert ended(path)


def test_the_curves_are_by_patches_seen(straight: tuple) -> None:
    _, record, path = straight
    rows = list(history(path))
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5]
    assert [row["patches_seen"] for _, row in rows] == [8, 16, 24, 32, 32]
    for _, row in rows[:4]:
        assert row.keys() >= TRAINING
    means = {}
    for step in (2, 4):
        psnrs = [row["psnr"] for row in record["validation"] if row["step"] == step]
        means[step] = sum(psnrs) / len(psnrs)
    curve = {step: row["validate/tiny_x2/psnr"] for step, row in rows if "validate/tiny_x2/psnr" in row}
    assert curve == pytest.approx(means, abs=1e-4)
    (everything,) = (metric for metric in stored(path, "metric") if metric.glob_name == "*")
    assert everything.step_metric == "patches_seen"
    assert not any("trainer/global_step" in row for _, row in rows)


def test_the_scores_are_those_of_the_record(straight: tuple) -> None:
    _, record, path = straight
    (mean,) = record["means"]
    last = summary(path)
    for metric in ("psnr", "ssim", "bicubic_psnr", "bicubic_ssim"):
        assert last[f"test/tiny_x2/{metric}"] == mean[metric]
    assert last["status"] == "finished"
    assert (last["budget/steps"], last["budget/patches"]) == (4, 32)
    table = json.loads((path.parent / "files" / last["scores/path"]).read_text())
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == record["scores"]
    assert {row["image"] for row in record["scores"]} == {"camera.png", "chelsea.png"}


def test_the_pictures_show_the_network_beside_bicubic(straight: tuple, tiny_images: Path) -> None:
    """Two test images were there; each picture is what `pictures.draw` gives with the weights that were kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from drrn.inference import super_resolve
    from drrn.pictures import draw, side_by_side
    from drrn.weights.ours import load_network

    folder, _, path = straight
    last = summary(path)
    network, _ = load_network(folder / "weights.safetensors")
    for image in ("camera", "chelsea"):
        assert last[f"pictures/tiny_x2/{image}/_type"] == "image-file"
        with Image.open(path.parent / "files" / last[f"pictures/tiny_x2/{image}/path"]) as picture:
            held = np.asarray(picture.convert("RGB"))
        run = {"DRRN_B1U1_2f": lambda x: super_resolve(network, x)}
        figure = draw(side_by_side(tiny_images / f"{image}.png", 2, run))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        expected = np.asarray(canvas.buffer_rgba())[..., :3]
        assert held.shape == expected.shape
        assert np.mean(held != expected) < 0.01


def test_the_weights_are_an_artifact_if_asked_for(straight: tuple) -> None:
    folder, record, path = straight
    (artifact,) = (a for a in stored(path, "artifact") if a.type == "model")
    assert artifact.name == f"{folder.name}-weights"
    assert set(artifact.aliases) == {"latest", "finished", "step4"}
    assert json.loads(artifact.metadata)["means"] == record["means"]
    (content,) = artifact.manifest.contents
    assert Path(content.local_path) == folder / "weights.safetensors"
    assert content.size == (folder / "weights.safetensors").stat().st_size
    for other in stored(path, "artifact"):  # what `wandb sync` will need is all in the run's folder, or asked for
        for content in other.manifest.contents:
            assert Path(content.local_path).is_file()


# ---------------------------------------------------------------------- legs


def union(folder: Path, wandb_id: str) -> dict[tuple[int, str], Any]:
    """(step, metric) → value over all legs, none of them twice."""
    held: dict[tuple[int, str], Any] = {}
    for path in runs(folder, wandb_id):
        for step, row in history(path):
            for key, value in row.items():
                if key not in ("patches_seen", "epoch"):
                    assert (step, key) not in held, "logged twice"
                    held[step, key] = value
    return held


@pytest.fixture(scope="module")
def first_leg(configure: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that failed in its fourth step; its last checkpoint is that of the second."""
    output = tmp_path_factory.mktemp("leg")
    config = configure(*FOUR, f"output={output}")
    with before_step(3, fail), pytest.raises(Interruption):
        train.start(config)
    (path,) = runs(run_dir(config), read_record(run_dir(config) / FILE)["wandb_id"])
    assert [step for step, _ in history(path)] == [1, 2, 3]
    assert stored(path, "exit")[0].exit_code == 1
    return output


def resumed(first_leg: Path, configure: Callable, output: Path, kept: float) -> tuple[Path, dict, list[int]]:
    """A copy of the first leg, resumed: folder, record, and the steps that the first leg's file still held.

    A killed process leaves a file without its end, cut anywhere: that share of it is `kept`.
    """
    shutil.copytree(first_leg, output)
    config = configure(*FOUR, f"output={output}")
    (first,) = runs(run_dir(config), read_record(run_dir(config) / FILE)["wandb_id"])
    first.write_bytes(first.read_bytes()[: int(kept * first.stat().st_size)])
    held = [step for step, _ in history(first)]
    earlier = re.sub(r"-run-\d{8}_\d{6}-", "-run-20200101_000000-", first.parent.name)
    first.parent.rename(first.parent.with_name(earlier))
    return *trained(config), held


@pytest.mark.parametrize("kept", [1, 0.75])
def test_two_legs_are_one_history(
    kept: float,
    first_leg: Path,
    straight: tuple,
    configure: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The third step is done twice and logged once; what the first leg's file lost is logged again. The second leg
    begins when the second of the first leg's start, which names its folder, is over."""
    began = datetime(2020, 1, 1).timestamp()  # as `resumed` has it
    clock = SimpleNamespace(time=lambda: began + sum(slept), sleep=lambda seconds: slept.append(seconds))
    slept: list[float] = []
    monkeypatch.setattr(wandb_run, "time", clock)
    folder, record, held = resumed(first_leg, configure, tmp_path / "runs", kept)
    assert held == [1, 2, 3][: len(held)]
    assert (len(held) == 3) == (kept == 1)
    legs = runs(folder, record["wandb_id"])
    assert len(legs) == 2
    together = {key: value for key, value in union(folder, record["wandb_id"]).items() if "/" in key[1]}
    expected = union(straight[0], straight[1]["wandb_id"])
    for step, metric in expected:
        if metric.startswith(("train/", "validate/", "test/")):
            assert together.pop((step, metric)) == expected[step, metric], (step, metric)
    assert all(metric.startswith("pictures/") or metric.startswith("scores/") for _, metric in together)
    rows = [(step, row["patches_seen"]) for leg in legs for step, row in history(leg)]
    assert rows == sorted(set(rows))
    assert 1 <= sum(slept) < 1.1


def test_a_run_begun_afresh_is_another_wandb_run(first_leg: Path, configure: Callable, tmp_path: Path) -> None:
    shutil.copytree(first_leg, tmp_path / "runs")
    config = configure(*FOUR, f"output={tmp_path / 'runs'}", "ckpt_path=null", "logger=csv")
    before = read_record(run_dir(config) / FILE)["wandb_id"]
    folder, record = trained(config)
    assert record["wandb_id"] != before
    assert record["tracking"] == {"kind": "csv", "problem": None}
    with next((folder / "csv").rglob("metrics.csv")).open() as file:
        rows = [(row["step"], row["patches_seen"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert rows == [("1", "8"), ("2", "16"), ("3", "24"), ("4", "32")]


# ---------------------------------------------------------------------- what `wandb sync` makes of it


class Listener(http.server.BaseHTTPRequestHandler):
    """The part of W&B's server that `wandb sync` needs; it stores the requests."""

    run: ClassVar[dict[str, Any]] = {}
    rows: ClassVar[list[dict[str, Any]]] = []
    files: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_PUT(self) -> None:
        self.files[unquote(self.path).removeprefix("/put/")] = self.body()
        self.reply({})

    def do_POST(self) -> None:
        if self.path.startswith("/sdk/"):  # its own telemetry, sent in chunks
            self.close_connection = True
            return self.reply({})
        sent = json.loads(self.body())
        if self.path != "/graphql":
            if lines := (sent.get("files") or {}).get("wandb-history.jsonl"):
                at = lines["offset"]  # as the real one: what stood there is replaced
                self.rows[at : at + len(lines["content"])] = [json.loads(line) for line in lines["content"]]
            return self.reply({})
        name, given = re.search(r"(?:query|mutation)\s+(\w+)", sent["query"])[1], sent.get("variables") or {}
        place = {"id": "p", "name": "drrn", "entity": {"id": "e", "name": "team"}}
        if name == "RunResumeStatus":
            known = {
                "name": given["name"], "summaryMetrics": "{}", "displayName": "", "logLineCount": 0, "tags": [],
                "historyLineCount": len(self.rows), "eventsLineCount": 0, "eventsTail": "[]", "config": "{}",
                "historyTail": json.dumps([json.dumps(row) for row in self.rows[-1:]]),
                "wandbConfig": '{"t": {}}',  # that the run has really begun
            }  # fmt: skip
            return self.reply({"model": {**place, "bucket": known if self.run else None}})
        if name == "UpsertBucket":
            self.run.update({key: value for key, value in given.items() if value is not None})
            bucket = {"id": "b", "name": given["name"], "displayName": given["displayName"], "project": place}
            return self.reply({"upsertBucket": {"bucket": bucket, "inserted": True}})
        if name == "CreateRunFiles":
            host = "http://" + self.headers["Host"] + "/put/"
            links = [{"name": file, "uploadUrl": host + quote(file)} for file in given["files"]]
            return self.reply({"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": links}})
        if name == "Viewer":
            return self.reply({"viewer": {"id": "v", "entity": "team", "username": "me", "flags": "{}"}})
        if name == "ArtifactType":
            return self.reply({"project": None})
        if name == "CreateArtifact":
            made = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
            return self.reply({"createArtifact": {"artifact": made}})
        return self.reply({})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def reply(self, data: dict[str, Any]) -> None:
        content = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    """A server of W&B's kind, and an account there."""
    for name, empty in (("run", {}), ("rows", []), ("files", {})):
        monkeypatch.setattr(Listener, name, empty)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kept", [0.75, 0])
def test_syncing_both_legs_gives_one_history(
    kept: float, first_leg: Path, configure: Callable, tmp_path: Path, listening: Any
) -> None:
    """W&B's own reader, `wandb sync`, before a server that only listens."""
    folder, record, _ = resumed(first_leg, configure, tmp_path / "runs", kept)
    offline = sorted(map(str, (folder / "wandb").glob("offline-run-*")))
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *offline]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Listener.run["name"] == record["wandb_id"]
    assert Listener.run["displayName"] == "DRRN_B1U1_2f s1"
    assert Listener.run["groupName"] == "fig6"
    assert set(Listener.run["tags"]) == {"DRRN_B1U1_2f", "B1", "U1", "d4"}
    config = json.loads(Listener.run["config"])
    assert config["model"]["value"] == record["config"]["model"]
    assert (config["d"]["value"], config["git"]["value"]) == (4, record["git"])
    steps = [row["_step"] for row in Listener.rows]
    assert steps == [1, 2, 3, 4, 5]
    assert [row["patches_seen"] for row in Listener.rows] == [8 * min(step, 4) for step in steps]
    for leg in runs(folder, record["wandb_id"]):
        for step, row in history(leg):
            (uploaded,) = (row for row in Listener.rows if row["_step"] == step)
            for key, value in row.items():
                if not key.startswith(("pictures/", "scores/")):  # theirs are nested
                    assert uploaded[key] == value, key
    last = json.loads(Listener.files["wandb-summary.json"])
    assert last["test/tiny_x2/psnr"] == record["means"][0]["psnr"]
    pictures = [name for name in Listener.files if name.startswith("media/images/pictures/")]
    assert len(pictures) == 2
    for name in pictures:
        assert Listener.files[name] == (folder / record["tracking"]["folder"] / "files" / name).read_bytes()


# ---------------------------------------------------------------------- whatever W&B does, the run continues


def same_result(record: dict[str, Any], straight: tuple) -> None:
    assert record["status"] == "finished"
    assert "error" not in record
    for key in ("scores", "means", "validation"):
        assert record[key] == straight[1][key]


def warnings_of(folder: Path) -> list[str]:
    return [line for line in (folder / "train.log").read_text().splitlines() if "W&B failed" in line]


@pytest.mark.parametrize("place", ["init", "define_metric", "log", "log_artifact", "finish"])
def test_a_wandb_that_raises_is_said_once(
    place: str, configure: Callable, straight: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(wandb if place == "init" else wandb.Run, place, fail)
    folder, record = trained(configure(*FOUR, "logger.artifacts=checkpoints", f"output={tmp_path}"))
    same_result(record, straight)
    assert "Interruption: it broke" in record["tracking"]["problem"]
    assert len(warnings_of(folder)) == 1
    assert "Traceback" not in (folder / "train.log").read_text()


def test_a_folder_that_cannot_be_written(configure: Callable, straight: tuple, tmp_path: Path) -> None:
    """Not even by root: `wandb` is a file."""
    config = configure(*FOUR, f"output={tmp_path}")
    run_dir(config).mkdir(parents=True)
    (run_dir(config) / "wandb").write_text("in the way")
    folder, record = trained(config)
    same_result(record, straight)
    assert "NotADirectoryError" in record["tracking"]["problem"]
    assert len(warnings_of(folder)) == 1


def test_a_service_that_is_killed(configure: Callable, straight: tuple, tmp_path: Path) -> None:
    """W&B's process dies in the middle; the run continues, and so does the tracking of the next one."""
    with before_step(2, lambda: os.kill(service(), signal.SIGKILL)):
        folder, record = trained(configure(*FOUR, f"output={tmp_path}"))
    same_result(record, straight)
    assert "W&B failed at log" in record["tracking"]["problem"]
    assert len(warnings_of(folder)) == 1
    _, after = trained(configure(*FOUR, f"output={tmp_path}", "seed=2", "trainer.max_steps=1"))
    assert after["tracking"]["problem"] is None


def test_a_full_disk_is_noticed_though_wandb_says_nothing(
    configure: Callable, straight: tuple, tmp_path: Path
) -> None:
    """The service cannot write files beyond 2 KB, which it does not report; its file is then truncated."""

    def fill() -> None:
        resource.prlimit(service(), resource.RLIMIT_FSIZE, (2000, 2000))

    with before_step(2, fill):
        folder, record = trained(configure(*FOUR, f"output={tmp_path}"))
    same_result(record, straight)
    assert "is incomplete: is the disk full?" in record["tracking"]["problem"]
    assert "is incomplete" in (folder / "train.log").read_text()


def test_online_uploads_while_it_runs(configure: Callable, straight: tuple, tmp_path: Path, listening: Any) -> None:
    _, record = trained(configure(*FOUR, f"output={tmp_path}", "logger.mode=online"))
    same_result(record, straight)
    assert record["tracking"]["mode"] == "online"
    assert record["tracking"]["problem"] is None
    assert [(row["_step"], row["patches_seen"]) for row in Listener.rows] == [
        (1, 8), (2, 16), (3, 24), (4, 32), (5, 32),
    ]  # fmt: skip


@pytest.mark.skipif(not os.environ.get("DRRN_SLOW"), reason="W&B waits 10 s for the server; DRRN_SLOW=1 runs it")
def test_a_network_that_goes_away_does_not_hold_the_run_up(
    configure: Callable, straight: tuple, tmp_path: Path, listening: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data that could not be uploaded are on the disk."""
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 1)

    def unplug() -> None:
        listening.shutdown()
        listening.server_close()

    with before_step(2, unplug):
        folder, record = trained(configure(*FOUR, f"output={tmp_path}", "logger.mode=online"))
    same_result(record, straight)
    assert record["tracking"]["problem"] is not None
    said = (folder / "train.log").read_text()
    assert len(warnings_of(folder)) == 1
    assert f"wandb sync {folder / record['tracking']['folder']}" in said
    (path,) = runs(folder, record["wandb_id"])
    assert [step for step, _ in history(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("key", [None, "a" * 40])
def test_online_without_account_or_network_goes_offline(
    key: str | None, configure: Callable, straight: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No prompt and no error: the run is tracked offline, to be uploaded later."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    config = configure(*FOUR, f"output={tmp_path / 'runs'}", "logger.mode=online")
    folder, record = trained(config)
    same_result(record, straight)
    assert record["tracking"]["mode"] == "offline"
    assert record["tracking"]["problem"] is None
    said = (folder / "train.log").read_text()
    assert said.count("logger.mode=online does not work") == 1
    assert ("wandb login" in said) == (key is None)
    assert ended(folder / record["tracking"]["folder"] / f"run-{record['wandb_id']}.wandb")


def test_pictures_that_cannot_be_drawn_cost_nothing_else(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("drrn.pictures.draw", fail)
    folder, record = trained(configure(*FOUR, f"output={tmp_path}", "trainer.max_steps=1"))
    assert record["tracking"]["problem"] is None
    assert "no picture of tiny" in (folder / "train.log").read_text()
    (path,) = runs(folder, record["wandb_id"])
    assert summary(path)["scores/nrows"] == 2


def test_a_wandb_half_imported_does_not_hide_why_a_run_ended(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A signal may come during W&B's import; the exit code must still be the signal's."""
    tracking = Tracking(configure(*FOUR), tmp_path, {"status": "stopped"})
    half = object.__new__(wandb_run.WandB)
    half.state, half.run = {"folder": None, "problem": None}, None
    tracking.made = [half]
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    tracking.finish()
    assert half.state["problem"] is None


def test_only_the_first_process_has_a_run(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("a second W&B run"))
    record = {"wandb_id": "abc", "status": "finished"}
    tracking = Tracking(configure(*FOUR), tmp_path, record, first=False)
    for logger in tracking.start(None):
        logger.log_metrics({"train/loss": 1.0}, 0)
    tracking.results(None)
    tracking.finish()
    assert "tracking" not in record
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_read_up_to_the_damage(straight: tuple, tmp_path: Path) -> None:
    content = straight[2].read_bytes()
    whole = list(records(straight[2]))
    rng = np.random.default_rng(0)
    for _ in range(60):
        at = int(rng.integers(7, len(content)))
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(rng.integers(8))
        for damaged in (content[:at], bytes(flipped)):
            (tmp_path / "x.wandb").write_bytes(damaged)
            found = list(records(tmp_path / "x.wandb"))
            assert len(found) < len(whole)
            assert found == whole[: len(found)]
