"""Several points at once: joblib, submitit (a local job, the script for Slurm), Ray where it is installed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from drrn.runs.record import FILE, read_record
from drrn.sweep.machine import Ended, NotBegun, OwnPart, allowed_cores
from started import wait_for

ROOT = Path(__file__).resolve().parents[2]

SMALL = (
    "model.features=2", "data.scales=[2]", "data.val_scales=[2]", "data.batch_size=2", "data.num_workers=0",
    "trainer.max_steps=1", "trainer.accelerator=cpu", "logger=none", "plan=none",
)  # fmt: skip


@pytest.fixture
def sweep(entry_point: Callable, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`sweep("hydra/launcher=machine", "model.B=1,2")` → exit code, output, errors, states by name."""
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # restored afterwards

    def run(*overrides: str) -> tuple[int, str, str, dict[str, str]]:
        data = (f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", f"output={tmp_path}")
        code, out, err = entry_point("train", "-m", *overrides, *SMALL, *data)
        records = [read_record(path) for path in tmp_path.rglob(FILE)]
        return code, out, err, {record["structure"]["name"]: record["status"] for record in records}

    return run


def test_a_joblib_process_keeps_its_own_cores_and_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("OMP_NUM_THREADS")

    def where(number: int) -> tuple:
        import multiprocessing
        import time

        (tmp_path / str(os.getpid())).touch()
        until = time.monotonic() + 120
        while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < until:  # each process has to take a job
            time.sleep(0.01)
        affinity = tuple(sorted(os.sched_getaffinity(0)))
        return os.getpid(), affinity, os.environ["CUDA_VISIBLE_DEVICES"], multiprocessing.get_start_method()

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    task = OwnPart(where, 2)
    assert task.folder.is_dir()  # before it is handed out
    jobs = Parallel(n_jobs=2, backend="loky", pre_dispatch="n_jobs", batch_size=1, initializer=task.take)(
        delayed(task)(number) for number in range(5)
    )
    get_reusable_executor().shutdown(wait=True, kill_workers=True)
    parts = {job[0]: job[1:] for job in jobs}
    assert set(jobs) == {(pid, *part) for pid, part in parts.items()}  # a process never changes its part
    assert {gpu for _, gpu, _ in parts.values()} == {"4", "7"}
    assert {method for *_, method in parts.values()} != {"loky"}
    if len(allowed_cores()) > 1:
        first, second = (set(affinity) for affinity, *_ in parts.values())
        assert not first & second
        assert first | second == set(allowed_cores())


def test_a_stopped_process_begins_no_further_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It returns an Exception, which Hydra reports; for a KeyboardInterrupt joblib would kill the other processes."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def interrupted(cfg: object) -> None:
        raise KeyboardInterrupt

    part = OwnPart(interrupted, 1)
    with pytest.raises(Ended) as ended:
        part(None)
    assert not isinstance(ended.value, NotBegun)
    part.task = lambda cfg: pytest.fail("begun")
    with pytest.raises(NotBegun):
        part(None)


KILLED = """
import sys, time
from pathlib import Path
from joblib import Parallel, delayed
from drrn.sweep.machine import OwnPart

def work(path):
    Path(path).touch()
    try:
        time.sleep(600)
    except SystemExit:
        Path(path + " is kept").touch()
        raise

task = OwnPart(work, 2)
Parallel(n_jobs=2, backend="loky", pre_dispatch="n_jobs", batch_size=1, initializer=task.take)(
    delayed(task)(path) for path in sys.argv[1:]
)
"""


def test_a_sweep_that_is_killed_leaves_no_process_and_its_runs_keep_their_steps(tmp_path: Path) -> None:
    """Two of three have begun; after SIGTERM a run saves its step (tests/runs/test_resume.py)."""
    jobs, scratch = [tmp_path / name for name in "abc"], tmp_path / "scratch"
    scratch.mkdir()
    path = os.pathsep.join((str(ROOT / "src"), os.environ.get("PYTHONPATH", "")))
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *jobs], env={**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": path}
    ) as sweep:
        try:
            wait_for(lambda: sum(job.exists() for job in jobs) == 2 or sweep.poll() is not None)
            processes = psutil.Process(sweep.pid).children(recursive=True)
        finally:
            sweep.kill()
    wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in processes))
    wait_for(lambda: not list(scratch.glob("drrn-sweep-*")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a is kept", "b", "b is kept", "scratch"]


def test_joblib_runs_two_at_a_time_and_ctrl_c_ends_them(tiny_images: Path, tmp_path: Path) -> None:
    """A short run is done; two long ones save their step; the last has not begun."""
    data = (f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", f"output={tmp_path}")
    long = "trainer.max_steps:1000000,trainer.val_check_interval:1000000,trainer.checkpoint_every:1000000"
    points = "[{model.B:1}," + ",".join(f"{{model.B:{B},{long}}}" for B in (2, 3, 4)) + "]"
    small = [word for word in SMALL if not word.startswith("trainer.max_steps")]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    sweep = subprocess.Popen(
        [sys.executable, str(ROOT / "src/train.py"), "-m", "hydra/launcher=machine", "model.U=0", *small, *data,
         f"hydra.sweeper.points={points.replace('B:1', 'B:1,trainer.max_steps:1')}"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )  # fmt: skip

    def said(words: str) -> int:
        return sum(words in path.read_text() for path in tmp_path.rglob("train.log"))

    try:
        wait_for(lambda: said("finished:") == 1 and said("steps/s") == 2)
        processes = psutil.Process(sweep.pid).children(recursive=True)
        os.kill(sweep.pid, signal.SIGINT)
        out, _ = sweep.communicate()
        wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in processes))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(sweep.pid, signal.SIGKILL)
    wait_for(lambda: not list(scratch.glob("drrn-sweep-*")))
    records = {path.parent: read_record(path) for path in tmp_path.rglob(FILE)}
    assert sorted(record["status"] for record in records.values()) == ["finished", "stopped", "stopped"]
    for folder in records:
        assert list(folder.glob("checkpoints/step*.ckpt"))
    assert sweep.returncode == 130
    assert "1 of 4 runs done" in out
    assert out.count("interrupted") == 2
    assert out.count("not started") == 1


def test_submitit_trains_in_a_job_of_its_own(sweep: Callable) -> None:
    code, out, err, states = sweep("hydra/launcher=submitit_local", "model.U=0", "model.B=1")
    assert code == 0, out + err
    assert states == {"VDSR_d2_2f": "finished"}


def test_the_script_for_slurm(sweep: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake `sbatch` stores the script and fails: a job array, a GPU for each job, a signal in time, requeueing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "srun"):
        (programs / name).write_text(
            f'#!/bin/sh\ncp "$1" {tmp_path}/script.sh\necho "no such partition" >&2\nexit 1\n'
        )
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    code, out, _, states = sweep(
        "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "study=fig6", "model.U=0", "model.B=1,2,3"
    )
    assert code == 2
    assert states == {}
    assert out.count("no such partition") == 3
    script = (tmp_path / "script.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    wanted = {
        "array": "0-2%3", "partition": "gpu", "gpus-per-node": "1", "cpus-per-task": "4", "ntasks-per-node": "1",
        "time": "1440", "signal": "USR2@180", "job-name": "drrn_fig6",
    }  # fmt: skip
    assert wanted.items() <= options.items()
    assert re.search(r"^srun .*python\S* -u -m submitit.core._submit", script, re.MULTILINE)


def test_a_launcher_that_is_not_installed_says_what_to_install(
    sweep: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "_ray_" in name else real(name, *a))
    code, _, err, _ = sweep("hydra/launcher=cluster", "model.U=0", "model.B=1,2")
    assert code == 2
    assert "pip install '.[sweep]'" in err


def test_ray_trains_on_a_local_cluster(sweep: Callable) -> None:
    ray = pytest.importorskip("ray", reason="Ray is in the extra `sweep`, not in requirements.lock")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="hydra-ray-launcher is not installed")
    try:
        code, out, err, states = sweep(
            "hydra/launcher=cluster", "+hydra.launcher.ray.init.include_dashboard=false", "model.U=0", "model.B=1,2"
        )
    finally:
        ray.shutdown()
    assert code == 0, out + err
    assert states == {"VDSR_d2_2f": "finished", "VDSR_d3_2f": "finished"}
