"""Several processes of one run train, measure and write the same as one process.

Real processes on the CPU (gloo). Two of them are started here as Slurm starts them on two machines, each with its
own folders: they share only the network. `python src/train.py trainer.devices=2` and torchrun start others.
The oracle is always the same configuration in this one process.
"""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from drrn.config import Config
from drrn.datamodule import SuperResolutionData
from drrn.disk import write_json
from drrn.errors import UserError
from drrn.fast.training import InTraining
from drrn.identity import run_dir
from drrn.module import SuperResolution
from drrn.patches import Patches, ShuffledBatches
from drrn.runs import start as train
from drrn.runs.lightning import trainer_arguments
from drrn.runs.processes import Processes, broadcast, failure, note_failure
from drrn.runs.record import FILE, read_record
from started import Started

ROOT = Path(__file__).resolve().parents[2]
slow = pytest.mark.skipif("DRRN_SLOW" not in os.environ, reason="starts many processes: set DRRN_SLOW=1")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("Checkpoint directory", "The dirpath has changed", ".*your dataloader is not resumable")
]

# Four steps of twelve pairs over more than half an epoch, starting near bicubic so that only a part is clipped.
STEPS = (
    "model.features=4", "model.U=2", "model.norm=none", "optim=release", "optim.residual_scale=0.1",
    "optim.lr=0.001", "optim.theta=0.04", "optim.halve_every_steps=2", "data.batch_size=12", "data.num_workers=0",
    "data.scales=[2]", "data.val_scales=[2]", "trainer.accelerator=cpu", "trainer.max_steps=4",
    "trainer.val_check_interval=2", "trainer.checkpoint_every=1", "trainer.log_every_n_steps=1", "logger=csv",
)  # fmt: skip

# Each point is trained by two processes; the values are its overrides of STEPS.
POINTS: dict[str, dict[str, Any]] = {
    "value": {"optim.clip": "value", "optim.theta": 0.002},
    "norm": {"optim.clip": "norm"},
    "accumulated": {"optim.clip": "norm", "trainer.accumulate_grad_batches": 2, "seed": 2},
    "batch": {"model.norm": "batch", "seed": 3},
    "one image": {"data.val": ["ONE"], "seed": 4},
    "interrupted": {"seed": 5},
}


@pytest.fixture(scope="module")
def sets(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of three images and of one, for two processes to share; and one whose second image is cut short."""
    folder = tmp_path_factory.mktemp("ddp_sets")
    for name, images in (("three", ("a", "b", "c")), ("one", ("a",)), ("bad", ("a", "b"))):
        (folder / name).mkdir()
        for image, source in zip(images, ("camera", "chelsea", "camera"), strict=False):
            shutil.copy(tiny_images / f"{source}.png", folder / name / f"{image}.png")
    cut = folder / "bad" / "b.png"
    cut.write_bytes(cut.read_bytes()[:-1500])
    return folder


def overrides(sets: Path, tiny_images: Path, point: dict[str, Any]) -> list[str]:
    """STEPS, the data, and a point, as the command line takes them."""
    changes = {"data.train": [str(tiny_images)], "data.val": [str(sets / "three")], **point}
    if changes["data.val"] == ["ONE"]:
        changes["data.val"] = [str(sets / "one")]
    text = {key: str(value).replace("'", "").replace(" ", "") for key, value in changes.items()}
    return [f"{key}={value}" for key, value in {**dict(step.split("=", 1) for step in STEPS), **text}.items()]


def alone(configure: Callable, output: Path, *arguments: str) -> Path:
    """Train in this one process; the run's folder."""
    config = configure(*arguments, f"output={output}", tiny=False)
    train.start(config)
    return run_dir(config)


def start(*command: str, **environment: str) -> subprocess.Popen:
    """Start a process of a run, with its output in a pipe."""
    env = {key: value for key, value in os.environ.items() if key not in ("PL_GLOBAL_SEED", "HYDRA_FULL_ERROR")}
    return subprocess.Popen(
        command, env={**env, **environment}, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen, seconds: float = 600) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a process that must end: the time limit of a hanging group is half an hour."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def state(folder: Path) -> dict[str, Any]:
    return torch.load(max((folder / "checkpoints").glob("*.ckpt")), weights_only=True)


def logged(folder: Path) -> list[dict[str, float]]:
    (path,) = (folder / "csv").rglob("metrics.csv")
    with path.open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def assert_same_run(several: Path, one: Path) -> None:
    """Weights, momentum, record and logged values are equal to float32's rounding.

    A gradient is the mean of two sums instead of one sum, so it differs by some 1e-7 of its largest terms (float32
    has 24 bits); after four steps the weights are at most 1e-7 apart. Half a batch at each step, BatchNorm's case
    below, puts them 1e-3 apart.
    """
    a, b = state(several), state(one)
    assert a["global_step"] == b["global_step"] == 4
    for name, tensor in b["state_dict"].items():
        torch.testing.assert_close(a["state_dict"][name], tensor, rtol=0, atol=1e-6, msg=name)
    for k, entry in b["optimizer_states"][0]["state"].items():
        ours = a["optimizer_states"][0]["state"][k]["momentum_buffer"]
        close = 1e-4 * entry["momentum_buffer"].abs().max().item()
        torch.testing.assert_close(ours, entry["momentum_buffer"], rtol=0, atol=close, msg=str(k))
    a, b = read_record(several / FILE), read_record(one / FILE)
    assert a["status"] == b["status"] == "finished"
    for rows in ("scores", "means", "validation"):
        assert len(a[rows]) == len(b[rows]) > 0
        for x, y in zip(a[rows], b[rows], strict=True):  # every image once, in the same order
            assert {k: v for k, v in x.items() if not isinstance(v, float)} == {
                k: v for k, v in y.items() if not isinstance(v, float)
            }
            assert [v for v in x.values() if isinstance(v, float)] == pytest.approx(
                [v for v in y.values() if isinstance(v, float)], rel=1e-4
            )


def assert_same_log(several: Path, one: Path) -> None:
    """The logged values of each step, validation and test are equal."""
    a, b = logged(several), logged(one)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------------- two processes, nothing shared


@pytest.fixture(scope="module")
def machines(
    sets: Path, tiny_images: Path, configure: Callable, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """All points trained by two processes in one multirun; `one(name)` trains a point in this process."""
    root = tmp_path_factory.mktemp("machines")
    folders = [root / "first", root / "second"]

    # A run of this process that was interrupted in its last step, for the two to resume. Only the first
    # machine has its files.
    argued = overrides(sets, tiny_images, POINTS["interrupted"])
    with pytest.MonkeyPatch.context() as patch:
        real = SuperResolution.training_step

        def training_step(self: SuperResolution, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 3:
                raise RuntimeError("the machine is gone")
            return real(self, batch, batch_idx)

        patch.setattr(SuperResolution, "training_step", training_step)
        with pytest.raises(RuntimeError):
            alone(configure, folders[0] / "runs", *argued)

    held = socket.socket()  # bound but not listening: the processes can take the port, and nobody is given it
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = str(held.getsockname()[1])
    points = [overrides(sets, tiny_images, point) for point in POINTS.values()]
    spelled = ",".join("{" + ",".join(item.replace("=", ":", 1) for item in point) + "}" for point in points)
    processes = [
        Started(
            "train.py", "-m", f"hydra.sweeper.points=[{spelled}]", "trainer=ddp", "trainer.devices=1",
            "trainer.num_nodes=2", f"output={folder / 'runs'}", cwd=ROOT,
            DRRN_PATCHES=str(folder / "patches"), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="1", SLURM_NNODES="2", SLURM_JOB_ID="1",
            SLURM_JOB_NAME="drrn", SLURM_PROCID=str(rank), SLURM_NODEID=str(rank), SLURM_LOCALID="0",
        )
        for rank, folder in enumerate(folders)
    ]  # fmt: skip
    try:
        results = [(process.wait(), *process.communicate()) for process in processes]
    finally:
        held.close()
        for process in processes:
            process.kill()
    assert [code for code, _, _ in results] == [0, 0], results

    def argue(name: str, *more: str) -> list[str]:
        return [*overrides(sets, tiny_images, POINTS[name]), *more]

    def several(name: str) -> Path:
        output = f"output={folders[0] / 'runs'}"
        return run_dir(configure(*argue(name), "trainer.num_nodes=2", output, tiny=False))

    def one(name: str, *more: str) -> Path:
        return alone(configure, root / "alone", *argue(name, *more))

    return SimpleNamespace(folders=folders, results=results, several=several, one=one, argue=argue)


@pytest.mark.parametrize("name", ["value", "norm", "accumulated"])
def test_two_processes_take_the_steps_of_one(name: str, machines: SimpleNamespace) -> None:
    """The loss, the clipping bound and the logged values are those of the whole batch; each image counts once."""
    several, one = machines.several(name), machines.one(name)
    assert_same_run(several, one)
    assert_same_log(several, one)
    clipped = [row["train/clipped"] for row in logged(one) if "train/clipped" in row]
    assert 0 < sum(clipped) < len(clipped), "a test of clipping in which some is clipped and some is not"
    assert read_record(several / FILE)["processes"] == 2
    assert [row["image"] for row in read_record(several / FILE)["scores"]] == ["a.png", "b.png", "c.png"]


def test_accumulation_in_two_processes_is_the_step_of_the_large_batch(machines: SimpleNamespace) -> None:
    large = machines.one("accumulated", "trainer.accumulate_grad_batches=1", "trainer.val_check_interval=2")
    ours = [row for row in logged(machines.several("accumulated")) if "train/loss" in row]
    whole = [row for row in logged(large) if "train/loss" in row]
    for x, y in zip(ours, whole, strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-6)
    weights = state(machines.several("accumulated"))["state_dict"]
    for name, tensor in state(large)["state_dict"].items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)


def test_a_run_of_one_process_is_resumed_by_two(machines: SimpleNamespace) -> None:
    """Only the first machine has the checkpoint."""
    several = machines.several("interrupted")
    assert "resuming from" in (several / "train.log").read_text()
    assert_same_run(several, machines.one("interrupted"))


def test_fewer_images_than_processes(machines: SimpleNamespace) -> None:
    """The second process has nothing to measure; it takes part, and the image counts once."""
    several = machines.several("one image")
    assert_same_run(several, machines.one("one image"))
    assert_same_log(several, machines.one("one image"))
    assert [row["image"] for row in read_record(several / FILE)["scores"]] == ["a.png"]


def test_each_process_normalises_by_its_share_as_each_micro_batch_does(machines: SimpleNamespace) -> None:
    """Two processes with BatchNorm equal two micro-batches: the same shares, so the same weights."""
    one = state(machines.one("batch", "trainer.accumulate_grad_batches=2"))["state_dict"]
    several = state(machines.several("batch"))["state_dict"]
    whole = state(machines.one("batch"))["state_dict"]
    weights = [name for name in one if "running" not in name and "tracked" not in name]
    for name in weights:
        torch.testing.assert_close(several[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    assert any((several[name] - whole[name]).abs().max() > 1e-4 for name in weights)  # of the whole: not the same


def test_batchnorms_averages_are_the_mean_over_the_processes(machines: SimpleNamespace, configure: Callable) -> None:
    """The first layer sees the pairs themselves, so its averages follow from them, step by step, as Caffe does."""
    config: Config = configure(*machines.argue("batch"), tiny=False)
    data = SuperResolutionData(config)
    data.prepare_data()
    patches = Patches(data.pairs.path)
    decay, mean, variance, weight = config.optim.bn_average, 0.0, 0.0, 0.0
    for indices in ShuffledBatches(len(patches), 12, config.seed, steps=4):
        x, _ = patches[indices]
        data.trainer = SimpleNamespace(training=True)
        shares = data.on_after_batch_transfer((torch.from_numpy(x), torch.zeros(12, 31, 31)), 0)[0].split(6)
        mean = decay * mean + np.mean([share.double().mean().item() for share in shares])
        variance = decay * variance + np.mean([share.double().var().item() for share in shares])
        weight = decay * weight + 1
    found = state(machines.several("batch"))["state_dict"]
    first = next(name for name in found if name.endswith("running_mean"))
    assert found[first].shape == (1,)
    assert found[first].item() == pytest.approx(mean / weight, rel=1e-4)
    assert found[first.replace("mean", "var")].item() == pytest.approx(variance / weight, rel=1e-4)


def test_the_second_process_writes_and_says_nothing(machines: SimpleNamespace) -> None:
    """It writes only its own patch file; rank 0 writes everything else, once."""
    (_, out, err), second = machines.results
    assert second == (0, "", "")
    assert "sync_dist" not in err
    assert out.count("of 6 runs done") == 1
    first, other = machines.folders
    assert len(list((first / "patches").glob("*.h5"))) == len(list((other / "patches").glob("*.h5"))) == 1
    assert not [
        path for path in other.rglob("*") if path.is_file() and path.suffix in (".json", ".ckpt", ".csv", ".log")
    ]
    assert len(list(first.rglob(FILE))) == 6
    log = (machines.several("norm") / "train.log").read_text()
    assert log.count("step 4/4") == log.count("finished:") == 1


# ---------------------------------------------------------------------- started by src/train.py


def test_train_starts_the_processes_that_trainer_devices_names(
    sets: Path, tiny_images: Path, configure: Callable, tmp_path: Path
) -> None:
    """One command, one record, though it sweeps."""
    arguments = overrides(sets, tiny_images, {"seed": 6, "study": "grid"})
    words = ("-m", *arguments, "trainer=ddp", "trainer.devices=2", f"output={tmp_path / 'two'}")
    with Started("train.py", *words, cwd=ROOT) as process:
        code, (out, err) = process.wait(), process.communicate()
    assert code == 0, err
    assert "1 of 1 run done" in out
    assert err.count("step 4/4") == err.count("finished:") == 1
    assert "Traceback" not in err
    assert "Initializing distributed" not in err
    (several,) = (tmp_path / "two" / "grid").glob("*/")
    assert_same_run(several, alone(configure, tmp_path / "one", *arguments))


@slow
def test_a_process_that_fails_ends_the_others_and_the_sweep_continues(
    sets: Path, tiny_images: Path, tmp_path: Path
) -> None:
    """The second process cannot read its image while the first waits for it."""
    arguments = overrides(sets, tiny_images, {"data.val": f"[{sets / 'bad'}],[{sets / 'three'}]"})
    code, out, err = ended(
        start(sys.executable, "src/train.py", "-m", *arguments, "trainer.devices=2", f"output={tmp_path}")
    )
    assert code == 2, out + err
    assert "1 of 2 runs done" in out
    assert "failed" in out  # why is folded into a column there
    assert "Traceback" not in err
    records = sorted((read_record(path) for path in tmp_path.rglob(FILE)), key=lambda record: record["status"])
    assert [record["status"] for record in records] == ["failed", "finished"]
    assert "b.png cannot be read as an image" in records[0]["error"]
    assert "in process 1" in records[0]["error"]


@slow
def test_a_process_that_is_killed_ends_the_others(sets: Path, tiny_images: Path, tmp_path: Path) -> None:
    """Killed as by the kernel without memory: the parent reports it; the other process only lost its connection."""
    arguments = overrides(sets, tiny_images, {"trainer.max_steps": 100000, "trainer.val_check_interval": 100000})
    run = start(sys.executable, "src/train.py", *arguments, "trainer.devices=2", f"output={tmp_path}")
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    try:
        while run.poll() is None and not list(tmp_path.rglob("step00000005.ckpt")):
            time.sleep(0.05)
        workers = [
            int(child)
            for child in children.read_text().split()
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
    except BaseException:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    code, _, _ = ended(run)
    assert code != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    (record,) = (read_record(path) for path in tmp_path.rglob(FILE))
    assert record["status"] == "failed"
    assert record["error"] == "process 1 was killed by SIGKILL"


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_all_processes_after_the_same_step(
    number: signal.Signals, sets: Path, tiny_images: Path, configure: Callable, tmp_path: Path
) -> None:
    """The command gets the signal, as from a cluster; the same command resumes."""
    arguments = overrides(sets, tiny_images, {"seed": 8, "trainer.max_steps": 20000, "logger": "none"})
    arguments += ["trainer.val_check_interval=20000", f"output={tmp_path}"]
    run = start(sys.executable, "src/train.py", *arguments, "trainer.devices=2")
    try:
        while run.poll() is None and not list(tmp_path.rglob("step00000005.ckpt")):
            time.sleep(0.05)
        run.send_signal(number)
    except BaseException:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    code, _, err = ended(run)
    assert code == 128 + number, err
    assert "the same command resumes" in err
    (path,) = tmp_path.rglob(FILE)
    record = read_record(path)
    assert record["status"] == "stopped"
    kept = state(path.parent)
    assert kept["global_step"] == record["budget"]["steps"] >= 5


@slow
def test_torchrun_with_three_processes_and_then_one(
    sets: Path, tiny_images: Path, configure: Callable, tmp_path: Path
) -> None:
    """Two steps by three processes and two by this one equal four by one."""
    arguments = overrides(sets, tiny_images, {"seed": 7})
    code, _, err = ended(
        start(
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "src/train.py",
            *arguments, "trainer=ddp", "trainer.devices=3",
            "trainer.max_steps=2", "logger=wandb", f"output={tmp_path}",
        )
    )  # fmt: skip
    assert code == 0, err
    assert len(list(tmp_path.rglob("offline-run-*"))) == 1
    (checkpoint,) = tmp_path.rglob("step00000002.ckpt")
    one = alone(configure, tmp_path / "one", *arguments)
    rest = alone(configure, tmp_path / "rest", *arguments, f"ckpt_path={checkpoint}")
    assert_same_run(rest, one)


# ---------------------------------------------------------------------- refused before anything starts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("trainer.devices=2", "data.batch_size=3"), r"data\.batch_size = 3 .* 1 micro-batches × 2 processes"),
        (("trainer.devices=2", "trainer.accumulate_grad_batches=2"), r"2 micro-batches × 2 processes"),
        (("trainer.devices=2", "trainer.sync_batchnorm=true"), r"trainer\.sync_batchnorm = True: .* GPUs only"),
        (("trainer.devices=2", "trainer.num_nodes=2", "data.batch_size=4"), r"2 × 2, but 1 process was started"),
        (
            ("trainer.devices=2", "trainer.strategy=ddp_spawn"),
            r"trainer\.strategy = 'ddp_spawn': allowed are auto, ddp",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments: tuple[str, ...], said: str, configure: Callable) -> None:
    def processes() -> Processes:
        config = configure(*arguments)
        return Processes(config, trainer_arguments(config))

    with pytest.raises(UserError, match=said):
        processes()


def test_other_processes_than_were_started_are_refused(configure: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun -n 3` with trainer.devices=1 would be three runs in one folder."""
    slurm = {"NTASKS": "3", "NTASKS_PER_NODE": "3", "PROCID": "1", "LOCALID": "1", "NODEID": "0", "NNODES": "1"}
    for key, value in {**slurm, "JOB_NAME": "drrn", "JOB_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    with pytest.raises(
        UserError, match=r"trainer\.devices × trainer\.num_nodes = 1 × 1, but 3 processes were started"
    ):
        Processes(configure(), trainer_arguments(configure()))


# ---------------------------------------------------------------------- parts that need no second process


def test_synchronised_batchnorms_are_averaged_as_caffe_does_too(configure: Callable) -> None:
    """`trainer.sync_batchnorm` replaces the network's layers after the module was built."""
    config = configure("model.norm=batch", "model.U=2")
    module = SuperResolution(config.model, vars(config.optim))
    module.network = nn.SyncBatchNorm.convert_sync_batchnorm(module.network)
    module._trainer = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=9)))
    (momentum,) = module._momenta(1)
    assert momentum == pytest.approx(0.001 / (1 - 0.999**10))
    trained = InTraining(module.network)
    assert len(trained.batch) == 2 * 6
    before = [buffer.clone() for buffer in trained.running]
    trained.follow([torch.ones(sum(trained.sizes))], [momentum], torch.tensor(True))
    for old, new in zip(before, trained.running, strict=True):
        torch.testing.assert_close(new, old + momentum * (1 - old))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (-9, "process 1 was killed by SIGKILL"),
        (-6, "full disk"),
        (1, "full disk"),
        (-50, "process 1 was killed by <N/A>"),
    ],
)
def test_the_reason_is_a_killed_process_but_not_one_that_nccl_aborts(
    code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed.launcher
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def launch(settings: object, task: object) -> Callable:
        def run(*arguments: object) -> None:
            raise ChildFailedError("run", {1: ProcessFailure(1, 1, code, "")})

        return run

    monkeypatch.setattr(torch.distributed.launcher, "elastic_launch", launch)
    path = tmp_path / FILE
    write_json(path, {"format": 1, "status": "failed", "error": "full disk"})
    with pytest.raises(RuntimeError, match=reason):
        Processes.start(SimpleNamespace(number=2), None, None, path)
    assert failure(path) == reason


def test_the_failure_that_came_first_is_the_records(tmp_path: Path) -> None:
    path = tmp_path / FILE
    assert note_failure(path, "no record here") == "no record here"
    assert not path.exists()
    write_json(path, {"format": 1, "status": "running", "name": "x"})
    assert note_failure(path, "RuntimeError: memory") == "RuntimeError: memory"
    assert note_failure(path, "RuntimeError: connection lost") == "RuntimeError: memory"
    assert failure(path) == "RuntimeError: memory"
    assert json.loads(path.read_text()) == {
        "format": 1, "status": "failed", "name": "x", "ended_by": "error", "error": "RuntimeError: memory",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [(UserError("ckpt_path: damaged"), "^ckpt_path: damaged$"), (OSError(5, "disk"), "OSError.*disk")],
)
def test_what_the_first_process_raises_ends_all(error: Exception, elsewhere: str, monkeypatch) -> None:
    """Only rank 0 reads a checkpoint; if that fails, the others do not wait for it."""
    message: list[bytes] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda held: message.append(pickle.dumps(held)))

    def fails() -> None:
        raise error

    with pytest.raises(type(error)):
        broadcast(fails)

    def receive(held: list[Any]) -> None:
        held[:] = pickle.loads(message[0])

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", receive)
    monkeypatch.setattr("drrn.runs.processes.rank_zero_only.rank", 1)
    with pytest.raises(UserError if isinstance(error, UserError) else RuntimeError, match=elsewhere):
        broadcast(lambda: pytest.fail("the first one chooses"))
