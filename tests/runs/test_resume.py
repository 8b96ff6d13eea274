"""The promises of docs/reliability.md on a training that is stopped, killed or repeated."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hydra import compose, initialize_config_dir
from stress_kill import compare, kill, logged, run_folder
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from conftest import TINY
from drrn.disk import locked
from drrn.errors import UserError
from drrn.home import CONF
from drrn.identity import run_dir
from drrn.module import SuperResolution
from drrn.runs import start as train
from drrn.runs.checkpoints import NEEDED, Damaged, newest_checkpoint, read_checkpoint
from drrn.runs.journal import warn_of_differences
from drrn.runs.record import FILE, read_record
from drrn.runs.request import request
from drrn.runs.stop import Stopped, StopSignals
from drrn.weights.ours import load_network
from started import Started, wait_for

# Steps over several epochs of the data, with everything that has a state; validated at 2, 4 and 6.
SIX = (
    "model.U=2", "data.augment=online", "data.batch_size=12", "trainer.max_steps=6", "trainer.checkpoint_every=100",
    "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "optim.lr=0.01", "optim.theta=1e-4",
    "optim.halve_every_epochs=null", "optim.halve_every_steps=2", "logger=csv",
)  # fmt: skip


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """If the suite runs in the background of a script, the shell has set SIGINT to ignored; undo that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hangup)


@pytest.fixture(scope="module")
def straight(configure: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`straight("data.num_workers=2", …)` → the folder of a run that nothing interrupted."""
    done: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in done:
            config = configure(*SIX, *overrides, f"output={tmp_path_factory.mktemp('straight')}")
            train.start(config)
            done[overrides] = run_dir(config)
        return done[overrides]

    return run


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`send(SIGTERM, "validation_step", at=4)`: this process gets the signal as that method begins at that step."""

    def arm(number: signal.Signals, method: str, at: int, micro: int | None = None) -> None:
        real, sent = getattr(SuperResolution, method), []

        def spied(self: SuperResolution, batch: Any, batch_idx: int, *rest: int) -> Any:
            here = self.trainer.global_step == at and (micro is None or batch_idx % 2 == micro)
            if here and not sent:
                sent.append(True)
                os.kill(os.getpid(), number)
            return real(self, batch, batch_idx, *rest)

        monkeypatch.setattr(SuperResolution, method, spied)

    return arm


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(newest_checkpoint(folder / "checkpoints"), weights_only=True)


def end_workers() -> None:
    """End the workers of a stopped run; when its loader is found as garbage, it waits 5 s for each of them."""
    for found in gc.get_objects():
        if type(found) is _MultiProcessingDataLoaderIter:
            found._shutdown_workers()


# ---------------------------------------------------------------------- stopped by a signal


@pytest.mark.parametrize(
    ("number", "method", "at", "kept", "overrides"),
    [
        (signal.SIGTERM, "training_step", 2, 3, ()),  # the step is finished
        (signal.SIGINT, "training_step", 1, 2, ("data.num_workers=2",)),  # its validation is repeated
        (signal.SIGUSR1, "training_step", 5, 6, ()),  # the last one
        (signal.SIGHUP, "training_step", 2, 3, ()),  # the terminal was closed
        (signal.SIGINT, "training_step", 2, 3, ("trainer.accumulate_grad_batches=2",)),
        (signal.SIGTERM, "validation_step", 4, 4, ()),  # aborted, and repeated
        (signal.SIGTERM, "validation_step", 6, 6, ()),  # the last one
        (signal.SIGINT, "test_step", 6, 6, ()),
    ],
)
def test_a_signal_keeps_the_step_and_the_same_command_resumes(
    number: signal.Signals,
    method: str,
    at: int,
    kept: int,
    overrides: tuple[str, ...],
    straight: Callable,
    configure: Callable,
    send: Callable,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    config = configure(*SIX, *overrides, f"output={tmp_path}")
    folder = run_dir(config)
    before = [signal.getsignal(s) for s in StopSignals.SIGNALS]
    with pytest.MonkeyPatch.context():
        send(number, method, at)
        with pytest.raises(SystemExit) as stopped:
            train.start(config)
    end_workers()
    assert stopped.value.code == 128 + number
    assert [signal.getsignal(s) for s in StopSignals.SIGNALS] == before
    record = read_record(folder / FILE)
    assert (record["status"], record["ended_by"]) == ("stopped", f"signal {number.name}")
    assert record["budget"]["steps"] == kept
    assert checkpoint(folder)["global_step"] == kept
    assert f"stopped by {number.name} at step {kept}; the same command resumes from there: python" in caplog.text

    train.start(config)  # `send` sends once
    compare(straight(*overrides), folder)
    assert read_record(folder / FILE)["ended_by"] is None
    assert "error" not in read_record(folder / FILE)


SCRIPT = """
import time
from drrn.module import SuperResolution

def training_step(self, batch, batch_idx):
    if self.trainer.global_step == 1:
        print("reached", flush=True)
        until = time.monotonic() + 300
        {block}
    return real(self, batch, batch_idx)

real, SuperResolution.training_step = SuperResolution.training_step, training_step
import drrn.runs.stop
drrn.runs.stop.GRACE = {grace}
import train
from drrn.launch import launch
launch(train.main)
"""
# Waiting for a lock happens in C, where no signal ends the wait and no handler of Python runs, as in collectives.
IN_C = "import ctypes; c, lock = ctypes.CDLL(None), ctypes.create_string_buffer(128); "
IN_C += "c.pthread_mutex_init(lock, None); c.pthread_mutex_lock(lock); c.pthread_mutex_lock(lock)"


@pytest.mark.parametrize(
    ("block", "grace", "numbers"),
    [
        ("while time.monotonic() < until: pass", 20.0, (signal.SIGINT, signal.SIGINT)),
        ("while time.monotonic() < until: pass", 20.0, (signal.SIGTERM, signal.SIGTERM)),
        (IN_C, 20.0, (signal.SIGTERM, signal.SIGINT)),
        (IN_C, 0.5, (signal.SIGTERM,)),  # one signal: there is no safe point
    ],
)
def test_a_second_signal_ends_at_once_and_so_does_what_reaches_no_safe_point(
    block: str, grace: float, numbers: tuple[signal.Signals, ...], tiny_images: Path, tmp_path: Path
) -> None:
    """In a step that never ends, whether in Python or in C; the record is closed."""
    with Started(SCRIPT.format(block=block, grace=grace), *command(tiny_images), cwd=tmp_path) as process:
        wait_for(lambda: process.poll() is not None or "reached" in process.out.read_text())
        for number in numbers:
            process.send_signal(number)
            wait_for(lambda: process.poll() is not None or "stopping" in process.err.read_text())
            time.sleep(0.4)  # further apart than one request
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + numbers[0], err
    record = read_record(run_folder(tmp_path) / FILE)
    assert (record["status"], record["ended_by"]) == ("stopped", f"signal {numbers[0].name}")
    assert "ended at once" in err
    assert "Traceback" not in err


def test_a_signal_while_workers_are_forked_is_not_swallowed(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Python drops exceptions raised in a callback of fork: the run went on, and later signals had no effect."""
    forks = []

    def in_the_callback() -> None:
        if StopSignals.current is not None and not forks:
            forks.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    os.register_at_fork(before=in_the_callback)
    config = configure(*SIX, f"output={tmp_path}", "data.num_workers=2")
    with pytest.raises(SystemExit) as stopped:
        train.start(config)
    end_workers()
    assert forks
    assert stopped.value.code == 143
    assert read_record(run_dir(config) / FILE)["ended_by"] == "signal SIGTERM"


def test_a_signal_after_the_last_safe_point_is_passed_on() -> None:
    """The run is finished; its sweep, whose earlier handler gets the signal, begins no other run."""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        for acted in (False, True):
            with StopSignals() as stop:
                os.kill(os.getpid(), signal.SIGTERM)
                while stop.asked is None:
                    time.sleep(0.001)
                stop.acted = acted
            assert told == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_long_work_without_safe_points_is_given_up() -> None:
    with StopSignals() as stop:
        assert stop.wait(lambda: 5) == 5
        with pytest.raises(KeyError):
            stop.wait(lambda: {}["x"])
        os.kill(os.getpid(), signal.SIGTERM)
        began = time.monotonic()
        with pytest.raises(Stopped):
            stop.wait(lambda: time.sleep(20))
        assert time.monotonic() - began < 15  # seconds: it did not wait for the work


def test_a_signal_while_the_patches_are_built_ends_the_run_at_once(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("drrn.datamodule.prepare_patches", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    config = configure(*SIX, f"output={tmp_path}")
    with pytest.raises(SystemExit) as stopped:
        train.start(config)
    assert stopped.value.code == 143
    assert read_record(run_dir(config) / FILE)["status"] == "stopped"


def test_ctrl_c_before_there_is_anything_to_keep_is_no_traceback(
    entry_point: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("train.request", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    code, out, err = entry_point("train", f"output={tmp_path}")
    assert code == 130
    assert "train.py: interrupted" in err
    assert "Traceback" not in out + err


def test_what_fails_because_of_a_signal_is_a_stop(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cluster may end a worker just before the run; the record's status is "stopped", not "failed"."""

    def training_step(self: SuperResolution, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker is killed by signal: Terminated")
        return real(self, batch, batch_idx)

    real = SuperResolution.training_step
    monkeypatch.setattr(SuperResolution, "training_step", training_step)
    config = configure(*SIX, f"output={tmp_path}")
    with pytest.raises(SystemExit) as stopped:
        train.start(config)
    assert stopped.value.code == 143
    assert read_record(run_dir(config) / FILE)["status"] == "stopped"


def test_a_multirun_ends_with_the_job_that_was_stopped(
    entry_point: Callable, send: Callable, tiny_images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    send(signal.SIGINT, "training_step", 1)
    code, _, err = entry_point(
        "train", "-m", "seed=1,2", "model.U=0", "model.features=2", "data.scales=[2]", "data.val_scales=[2]",
        f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", "data.batch_size=2", "data.num_workers=0",
        "trainer.max_steps=3", "logger=none", "trainer.accelerator=cpu",
    )  # fmt: skip
    assert code == 130
    assert "Traceback" not in err
    (record,) = tmp_path.rglob(FILE)  # the second job has not begun
    assert read_record(record)["status"] == "stopped"


def test_slow_steps_are_kept_one_by_one_and_not_waited_for(
    straight: Callable, configure: Callable, send: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cluster kills 30 s after its signal, so a step that takes longer is aborted."""
    monkeypatch.setattr("drrn.runs.checkpoints.SLOW", 0.0)
    config = configure(*SIX, f"output={tmp_path}")
    send(signal.SIGTERM, "training_step", 3)
    with pytest.raises(SystemExit):
        train.start(config)
    assert checkpoint(run_dir(config))["global_step"] == 3  # the fourth was given up
    train.start(config)
    compare(straight(), run_dir(config))


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup, or in background jobs of a script, for which Ctrl-C is not meant."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked is None
            stop.check()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Stopped):
                stop.check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------- killed


def command(tiny_images: Path, *overrides: str) -> list[str]:
    """The command with `configure(*SIX, *overrides)`'s configuration; it writes to runs/ in its directory."""
    sets = (f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]")
    return [*TINY, *sets, *SIX, *overrides, "output=runs"]


HELD = """
import time
import train
from drrn.launch import launch
from drrn.module import SuperResolution
from drrn.runs.stop import StopSignals

def training_step(self, batch, batch_idx):
    if self.trainer.global_step == {at}:
        print("reached", flush=True)
        while StopSignals.current.asked is None:
            time.sleep(0.01)
    return real(self, batch, batch_idx)

real, SuperResolution.training_step = SuperResolution.training_step, training_step
launch(train.main)
"""


def test_a_run_killed_and_terminated_for_real_is_resumed_bit_for_bit(
    tiny_images: Path, straight: Callable, configure: Callable, tmp_path: Path
) -> None:
    """Two real processes with workers; the third start is in this one. tests/stress/stress_kill.py has many kills."""
    overrides = (
        "data.num_workers=2",
        "trainer.max_steps=12",
        "trainer.checkpoint_every=3",
        "trainer.val_check_interval=4",
    )
    for name, at, code in (("SIGKILL", 5, -9), ("SIGTERM", 7, 143)):
        with Started(HELD.format(at=at), *command(tiny_images, *overrides), cwd=tmp_path) as process:
            wait_for(lambda: process.poll() is not None or "reached" in process.out.read_text())
            workers = psutil.Process(process.pid).children()
            assert workers
            kill(process, name, group=True)
        assert process.returncode == code, process.err.read_text()
        psutil.wait_procs(workers, timeout=60)  # nobody reads their batches
        assert not any(worker.is_running() for worker in workers)
    folder = run_folder(tmp_path)
    assert read_record(folder / FILE)["status"] == "stopped"
    config = configure(*SIX, *overrides, f"output={tmp_path / 'runs'}")
    assert run_dir(config) == folder
    train.start(config)
    compare(straight(*overrides), folder)


class Dead(Exception):
    """In place of SIGKILL: no code of ours runs after it, only Python's own clean-up."""


def die(patch: pytest.MonkeyPatch, method: str, at: int) -> None:
    """Make a method raise `Dead` at a step."""
    real = getattr(SuperResolution, method)

    def dies(self: SuperResolution, *arguments: Any) -> Any:
        if self.trainer.global_step == at:
            raise Dead
        return real(self, *arguments)

    patch.setattr(SuperResolution, method, dies)


def test_a_death_in_a_validation_does_not_lose_it(straight: Callable, configure: Callable, tmp_path: Path) -> None:
    config = configure(*SIX, f"output={tmp_path}")
    for method, at in (("validation_step", 2), ("on_validation_epoch_end", 4), ("validation_step", 6)):
        with pytest.MonkeyPatch.context() as patch:
            die(patch, method, at)
            with pytest.raises(Dead):
                train.start(config)
        assert checkpoint(run_dir(config))["global_step"] == at
    train.start(config)
    compare(straight(), run_dir(config))


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    straight: Callable, configure: Callable, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Truncated, or of full length with a hole, as after a power failure."""
    config = configure(*SIX, f"output={tmp_path}", "trainer.checkpoint_every=1")
    folder = run_dir(config) / "checkpoints"
    for at, harm in ((3, "cut"), (5, "hole")):
        with pytest.MonkeyPatch.context() as patch:
            die(patch, "training_step", at)
            with pytest.raises(Dead):
                train.start(config)
        newest = folder / f"step{at:08d}.ckpt"
        content = bytearray(newest.read_bytes())
        middle = content.index(b"PK", len(content) // 3)
        content[middle + 100 : middle + 300] = bytes(200)
        newest.write_bytes(content if harm == "hole" else content[:-500])
        with pytest.raises(Damaged):
            read_checkpoint(newest)
        (folder / f".{newest.name}.123.partial").write_bytes(b"half")  # of a killed process
    train.start(config)
    assert caplog.text.count("using the one before it") == 2
    assert sorted(path.name for path in folder.iterdir()) == [
        "step00000003.damaged", "step00000005.ckpt", "step00000005.damaged", "step00000006.ckpt",
    ]  # fmt: skip
    (folder / "step00000003.damaged").unlink()
    (folder / "step00000005.damaged").unlink()
    compare(straight(), run_dir(config))


def test_a_checkpoint_that_cannot_be_looked_at_is_not_called_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Out of memory, or a missing disk: renaming good files then would lose the run."""
    paths = [tmp_path / f"step{step:08d}.ckpt" for step in (1, 2)]
    for path in paths:
        torch.save(dict.fromkeys(NEEDED, 0), path)
    for error in (PermissionError(errno.EACCES, "not yours"), OSError(errno.ESTALE, "gone"), MemoryError()):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", lambda *_, e=error, **__: (_ for _ in ()).throw(e))
            with pytest.raises(UserError, match="could not be read"):
                newest_checkpoint(tmp_path)
        assert sorted(tmp_path.iterdir()) == paths
    assert newest_checkpoint(tmp_path) == paths[1]


def test_it_is_said_when_no_checkpoint_is_left(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"step{step:08d}.ckpt").write_bytes(b"PK\3\4 half")
    assert newest_checkpoint(tmp_path) is None
    assert "starting at step 0" in caplog.text
    assert newest_checkpoint(tmp_path / "none") is None
    assert caplog.text.count("starting") == 1


def test_what_is_no_checkpoint_of_a_training_is_not_gone_on_from(
    straight: Callable, configure: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "weights.ckpt"
    whole = checkpoint(straight())
    torch.save({key: whole[key] for key in ("state_dict", "hyper_parameters", "global_step")}, path)
    with pytest.raises(Damaged, match="optimizer_states"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="cannot be resumed from: it has no optimizer_states"):
        train.start(configure(*SIX, f"output={tmp_path}", f"ckpt_path={path}"))


def test_a_full_disk_keeps_the_checkpoints_there_are(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = configure(*SIX, f"output={tmp_path}", "trainer.checkpoint_every=1")
    real = torch.save

    def save(content: Any, path: Path) -> None:
        if content["global_step"] == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(UserError, match=r"step00000003\.ckpt could not be written.*No space left"):
            train.start(config)
    folder = run_dir(config) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step00000001.ckpt", "step00000002.ckpt"]
    assert read_checkpoint(folder / "step00000002.ckpt")["global_step"] == 2


def test_the_time_of_earlier_starts_is_counted(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = [0.0]
    monkeypatch.setattr("drrn.module.time.monotonic", lambda: clock[0])
    real = SuperResolution.training_step

    def training_step(self: SuperResolution, batch: Any, batch_idx: int) -> Any:
        clock[0] += 10  # seconds a step
        return real(self, batch, batch_idx)

    monkeypatch.setattr(SuperResolution, "training_step", training_step)
    config = configure(*SIX, f"output={tmp_path}", "trainer.checkpoint_every=1")
    with monkeypatch.context() as patch:
        die(patch, "on_validation_epoch_end", 4)
        with pytest.raises(Dead):
            train.start(config)
    clock[0] = 1000.0
    train.start(config)
    assert read_record(run_dir(config) / FILE)["budget"]["seconds"] == 60


def test_a_checkpoint_says_what_it_is_of(straight: Callable) -> None:
    folder = straight()
    _, about = load_network(newest_checkpoint(folder / "checkpoints"))
    _, weights = load_network(folder / "weights.safetensors")
    assert about["origin"] == "DRRN_B1U2_2f s1"
    for key in ("origin", "seed", "scales", "experiment", "steps", "model"):
        assert about[key] == weights[key], key


def test_checkpoints_are_resumed_with_other_accumulation(
    straight: Callable, configure: Callable, tmp_path: Path
) -> None:
    """From another run's checkpoint, at an odd step: the micro-batches of a step stay together."""
    config = configure(*SIX, f"output={tmp_path}", "trainer.max_steps=3")
    train.start(config)
    path = run_dir(config) / "checkpoints/step00000003.ckpt"
    other = configure(*SIX, f"output={tmp_path}", "trainer.accumulate_grad_batches=2", f"ckpt_path={path}")
    train.start(other)
    assert read_record(run_dir(other) / FILE)["budget"]["steps"] == 6
    rows = logged(run_dir(other))
    assert [int(step) for step, kind in sorted(rows) if kind == "train/clipped"] == [4, 5, 6]
    assert sorted({row["step"] for row in read_record(run_dir(other) / FILE)["validation"]}) == [2, 4, 6]


def test_accumulated_steps_are_validated_and_logged_as_whole_ones(straight: Callable) -> None:
    """Every two steps of the optimiser, and the loss of the whole batch; the first is the large batch's."""
    one, two = (straight(*more) for more in ((), ("trainer.accumulate_grad_batches=2",)))
    for folder in (one, two):
        assert sorted({row["step"] for row in read_record(folder / FILE)["validation"]}) == [2, 4, 6]
    plain, accumulated = (straight("model.norm=none", *more) for more in ((), ("trainer.accumulate_grad_batches=2",)))
    losses = [
        [float(row["train/loss"]) for (_, kind), row in sorted(logged(folder).items()) if kind == "train/clipped"]
        for folder in (plain, accumulated)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---------------------------------------------------------------------- one process a run


HOLD = "import sys, filelock; l = filelock.FileLock(sys.argv[1]); l.acquire(); print(1, flush=True); sys.stdin.read()"


def test_a_run_is_trained_by_one_process_at_a_time(configure: Callable, tmp_path: Path) -> None:
    config = configure(*SIX, f"output={tmp_path}")
    folder = run_dir(config)
    folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        with pytest.raises(UserError, match="DRRN_B1U2_2f s1 is being trained by another process"):
            train.start(config)
        assert [path.name for path in folder.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.communicate()
    with locked(folder / ".lock", "it is free"):  # the kernel let go of it
        pass


def test_an_evaluation_is_written_by_one_process_at_a_time(
    entry_point: Callable, tiny_images: Path, tmp_path: Path
) -> None:
    arguments = (
        "evaluate",
        "method=bicubic",
        f"sets=[{tiny_images}]",
        "scales=[2]",
        f"output={tmp_path / 's.json'}",
    )
    lock = tmp_path / ".s.json.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        code, _, err = entry_point(*arguments)
        assert code == 2
        assert "s.json is being written by another process" in err
        assert not (tmp_path / "s.json").exists()
    finally:
        holder.kill()
        holder.communicate()
    assert entry_point(*arguments)[0] == 0


# ---------------------------------------------------------------------- done again


def test_a_record_is_trained_again(
    straight: Callable, entry_point: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = straight()
    monkeypatch.chdir(tmp_path)
    code, _, err = entry_point("train", f"from_record={folder}", "output=again")
    assert code == 0, err
    again = run_folder(tmp_path / "again")
    assert again.name == folder.name
    compare(folder, again)
    record = read_record(again / FILE)
    assert record["config"]["data"]["patches"] == os.environ["DRRN_PATCHES"]  # this machine's, as by default

    code, _, err = entry_point("train", f"from_record={folder / FILE}", "output=other", "seed=3", "logger=none")
    assert code == 0, err
    other = read_record(run_folder(tmp_path / "other") / FILE)
    assert (other["seed"], other["config"]["logger"]["wandb"]) == (3, False)
    assert other["config"]["optim"] == record["config"]["optim"]


def test_a_record_of_a_run_begun_afresh_is_resumed_where_it_was(straight: Callable, tmp_path: Path) -> None:
    """If `from_record` is started twice because it was stopped, it does not rename its own checkpoints."""
    record = read_record(straight() / FILE)
    for held, meant in ((None, "last"), ("last", "last"), (str(tmp_path / FILE), str(tmp_path / FILE))):
        record["config"]["ckpt_path"] = held
        (tmp_path / FILE).write_text(json.dumps(record))
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("config", [f"from_record={tmp_path / FILE}"])
        assert request(cfg, [f"from_record={tmp_path / FILE}"]).ckpt_path == meant


def test_what_is_not_as_it_was_is_said(straight: Callable, configure: Callable, capsys: Any, tmp_path: Path) -> None:
    record = read_record(straight() / FILE)
    old = json.loads(json.dumps(record))
    old["versions"]["torch"], old["git"] = "1.0", {"commit": "0" * 40, "changed": False}
    (tmp_path / FILE).write_text(json.dumps(old))
    warn_of_differences(tmp_path / FILE, record)
    said = capsys.readouterr().err
    assert f"torch 1.0 is now {version('torch')}" in said
    assert f"commit {'0' * 40} is now" in said
    assert "numpy" not in said


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        ("{}", (), "not a run record of format 1"),
        ('{"format": 1}', (), "has no configuration"),
        (None, (), "is not a readable run record"),
        ('{"format": 1, "config": {"trainer": {}, "model": {"W": 1}}}', (), "model.W"),
        ('{"format": 1, "config": {"trainer": {}}}', ("experiment=small",), "from_record and experiment"),
    ],
)
def test_a_record_that_cannot_be_trained_is_refused(
    content: str | None, more: tuple[str, ...], said: str, entry_point: Callable, tmp_path: Path
) -> None:
    path = tmp_path / FILE
    if content is not None:
        path.write_text(content)
    code, out, err = entry_point("train", f"from_record={path}", *more, f"output={tmp_path}")
    assert code == 2
    assert said in err
    assert "Traceback" not in out + err


def test_the_same_command_twice_gives_the_same_record(tiny_images: Path, straight: Callable, tmp_path: Path) -> None:
    """In this process and another one: to the last digit, except time, host, folders and the W&B run's name."""
    with Started("train.py", *command(tiny_images), cwd=tmp_path) as process:
        assert process.wait() == 0, process.err.read_text()
    other = run_folder(tmp_path)
    compare(straight(), other)
    records = [read_record(folder / FILE) for folder in (straight(), other)]
    for record in records:
        record["budget"].pop("seconds")
        record["machine"].pop("host")
        record.pop("wandb_id")
        record["config"].pop("output")
        record["config"]["data"].pop("patches")
    assert records[0]["scores"]
    assert records[0] == records[1]
