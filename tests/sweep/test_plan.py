"""The output of a sweep before and after it: counts against torch's own, estimates, states, outcomes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import drrn.sweep.cost
import drrn.sweep.plan
import train
from drrn.disk import write_json
from drrn.errors import InUse, UserError
from drrn.identity import run_dir
from drrn.model import DRRN
from drrn.networks import count
from drrn.runs.record import FILE, run_record
from drrn.sweep.cost import Speed, count_bytes, measure
from drrn.sweep.machine import Ended, NotBegun
from drrn.sweep.outcome import outcome
from drrn.sweep.plan import Job, job_of, make_plan, operations, print_plan

ROOT = Path(__file__).resolve().parents[2]
STRUCTURES = [
    ("model.B=1", "model.U=9"),
    ("model.B=3", "model.U=2", "model.features=5"),
    ("model=drrn_ns", "model.B=2", "model.U=3"),
    ("model=drrn_c", "model.B=2", "model.U=1"),
    ("model=vdsr", "model.B=7"),
]


@pytest.mark.parametrize("overrides", STRUCTURES, ids=" ".join)
def test_operations_are_those_of_the_papers_formula(configure: Callable, overrides: tuple[str, ...]) -> None:
    """Eq. 9 written out: multiply-adds of every convolution for one pixel, a shared one counted each time."""
    config = configure(*overrides, "data.batch_size=3", tiny=False)
    model, pixels = config.model, 3 * 31**2
    C = model["features"]
    of_a_block = 9 * C * C + model["U"] * 2 * 9 * C * C  # f_b, then U residual units of two convolutions
    adds = 9 * C + (of_a_block - 9 * C * C) + (model["B"] - 1) * of_a_block + 9 * C  # the first f_b sees one channel
    counts = count(model)
    assert counts.output == 2 * adds
    assert counts.depth == (1 + 2 * model["U"]) * model["B"] + 1
    # Backward is twice forward; a first convolution that sees the image itself needs no gradient of it.
    of_the_image = 2 * 9 * C if model["norm"] == "none" else 0
    assert operations(config) == (3 * 2 * adds - of_the_image) * pixels


MEASURE = """
import json, re, sys
import torch
from drrn.model import DRRN
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
def step(model, n, p, half):
    network, x = DRRN(**model).to(memory_format=torch.channels_last), torch.rand(n, 1, p, p)
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-9, momentum=0.9)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            prediction = network(x)
        (prediction.float() - x).square().sum().backward()
        optimiser.step(), optimiser.zero_grad()
        del prediction
model = json.loads(sys.argv[1])
step({**model, "U": 1, "features": 4}, 1, 8, True)  # what libraries need by themselves
before = peak()
for half in (True, False):  # the larger peak comes last
    step(model, int(sys.argv[2]), int(sys.argv[3]), half)
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is told how to behave as glibc's is")
def test_the_counted_memory_is_the_memory_that_a_step_takes(configure: Callable) -> None:
    """In a process of its own, whose allocator frees memory at once (glibc by default keeps up to twice as much)."""
    import json

    size = ("model.U=4", "model.features=32", "data.batch_size=24")
    half, single = (configure(*size, f"trainer.precision={p}", tiny=False) for p in ("bf16-mixed", "32-true"))
    words = [json.dumps(single.model), "24", str(single.data.patch_size)]
    path = {"PYTHONPATH": str(ROOT / "src"), "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *words],
        env={**os.environ, **path},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    for config, taken in zip((half, single), run.stdout.split(), strict=True):
        assert count_bytes(config) == pytest.approx(int(taken), rel=0.15), config.trainer.precision


def test_memory_is_a_devices_share(configure: Callable) -> None:
    whole = configure("data.batch_size=64", "model.features=8", tiny=False)
    parts = configure(
        "data.batch_size=64",
        "model.features=8",
        "trainer.accumulate_grad_batches=4",
        "trainer.devices=2",
        tiny=False,
    )
    assert count_bytes(parts) == pytest.approx(count_bytes(whole) / 8, rel=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_sweep_for_a_machine_with_gpus_is_planned_without_one(configure: Callable) -> None:
    plan = make_plan([job_of(configure("trainer.accelerator=gpu"))], always=True)
    assert plan.note.startswith("not timed on this machine: ")
    assert (plan.seconds, plan.jobs[0].bytes > 0) == (None, True)


def test_memory_has_two_moments_for_adam_and_adamw(configure: Callable) -> None:
    sgd, adam, adamw = (
        count_bytes(configure("optim=quick", f"optim.algorithm={name}")) for name in ("sgd", "adam", "adamw")
    )
    assert sgd < adam == adamw


def test_real_steps_and_images_are_timed(configure: Callable) -> None:
    """Through Lightning, with the configured precision; the test does not look at the values."""
    before = torch.get_num_threads()
    speed = measure(configure("data.batch_size=6", "trainer.precision=bf16-mixed"), threads=1)
    assert speed.step > 0
    assert speed.evaluation > 0
    assert torch.get_num_threads() == before
    with pytest.raises(UserError):
        measure(configure("trainer.accelerator=tpu"))


def test_an_estimate_is_a_line_through_the_ends(configure: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the cheapest and the costliest are timed; images cost what their pixels cost."""
    timed = []

    def known(config: object, threads: int | None) -> Speed:
        timed.append(config.model["U"])
        return Speed(0.25 + 1e-9 * operations(config), 1e6)

    monkeypatch.setattr(drrn.sweep.cost, "measure", known)
    long = ("trainer.max_steps=1000", "trainer.val_check_interval=300", "data.scales=[2,3]", "data.val_scales=[3]")
    configs = [configure(f"model.U={U}", *long) for U in (2, 5, 1)]
    plan = make_plan([job_of(config) for config in configs])
    assert sorted(timed) == [1, 5]
    pixels = (75 * 91 + 64 * 55) * (3 * 1 + 2)  # three validations at one scale, the end at two
    for config, job in zip(configs, plan.jobs, strict=True):
        steps = 1000 * (0.25 + 1e-9 * operations(config))
        assert job.seconds == pytest.approx(steps + count(config.model).output * pixels / 1e6)
        assert job.bytes == count_bytes(config)
    seconds = [job.seconds for job in plan.jobs]
    assert plan.seconds == pytest.approx(sum(seconds))
    assert make_plan(plan.jobs, workers=3).seconds == pytest.approx(max(seconds))


def test_a_short_sweep_is_not_delayed_by_its_estimate(configure: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drrn.sweep.cost, "measure", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(drrn.sweep.cost, "count_bytes", lambda *_: pytest.fail("counted"))
    plan = make_plan(
        [job_of(configure("trainer.max_steps=100")), job_of(configure("trainer.max_steps=50", "model.U=1"))]
    )
    assert "too short" in plan.note
    assert plan.seconds is None


def write(config: object, status: str, step: int | None = None, **more: object) -> None:
    """A record, and a checkpoint's name."""
    with torch.device("meta"):
        record = run_record(config, DRRN(**config.model))
    write_json(run_dir(config) / FILE, {**record, "status": status, **more})
    if step is not None:
        folder = run_dir(config) / "checkpoints"
        folder.mkdir()
        (folder / f"step{step:08d}.ckpt").touch()


def test_a_jobs_state_is_what_its_record_says(configure: Callable, tmp_path: Path) -> None:
    def config(seed: int, *more: str) -> object:
        return configure(f"seed={seed}", "trainer.max_steps=90", f"output={tmp_path}", *more)

    write(config(2), "finished")
    write(config(3), "running", step=40)
    write(config(4), "failed", error="ValueError: x")
    write(config(5, "study=other"), "finished")
    states = [(p.before, p.first, p.steps) for p in map(job_of, map(config, range(1, 6)))]
    assert states == [("new", 0, 90), ("finished", 0, 0), ("resume", 40, 50), ("failed", 0, 90), ("finished", 0, 0)]
    assert job_of(config(3, "ckpt_path=null")).first == 0


KILLED = type("TerminatedWorkerError", (Exception,), {})("anything")
SIGNAL = {"ended_by": "signal SIGTERM", "error": "anything"}


@pytest.mark.parametrize("text", ["", "SIGTERM is being trained by another process, before this point began"])
@pytest.mark.parametrize(
    ("before", "status", "more", "raised", "touched", "word"),
    [
        ("new", "finished", {}, None, True, "done"),
        ("resume", "finished", {}, None, True, "resumed"),
        ("failed", "finished", {}, None, True, "retried"),
        ("finished", "finished", {}, None, False, "skipped"),
        ("new", "failed", {"ended_by": "error", "error": ""}, None, True, "failed"),
        ("new", "failed", {"error": ""}, None, True, "failed"),  # a record of before `ended_by`
        ("new", None, {}, UserError, False, "failed"),
        ("new", "stopped", {}, None, True, "stopped"),
        ("new", "stopped", {"ended_by": "error"}, None, True, "stopped"),
        ("new", "stopped", SIGNAL, None, True, "interrupted"),
        ("new", "stopped", {"error": ""}, None, True, "interrupted"),
        ("new", "stopped", SIGNAL, Ended, True, "interrupted"),
        ("new", "running", {}, None, True, "interrupted"),
        ("new", "running", {}, Ended, True, "interrupted"),
        ("new", None, {}, Ended, False, "interrupted"),
        ("new", "running", {}, KILLED, True, "failed"),
        ("failed", "failed", {"error": ""}, None, False, "not started"),
        ("resume", "running", {}, None, False, "not started"),
        ("new", None, {}, NotBegun, False, "not started"),
        ("resume", "running", {}, InUse, False, "elsewhere"),
    ],
)
def test_what_became_of_a_job_is_told_from_statuses_and_types(
    configure: Callable, tmp_path: Path, before: str, status: str | None, more: dict, raised: type | Exception | None,
    touched: bool, word: str, text: str,
) -> None:  # fmt: skip
    """The text of messages does not matter: each case is tried with the texts of others."""
    job = Job(configure(f"output={tmp_path}"), before=before)
    if status is not None:
        write(job.config, status, **{**more, **({"error": text} if "error" in more else {})})
    job.stamp = 0 if touched else job.written()
    job.raised = raised(text) if isinstance(raised, type) else raised
    assert outcome(job)[0] == word


@pytest.mark.parametrize("width", [80, 130])
def test_a_plan_is_whole_at_80_columns(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, width: int
) -> None:
    """Long names and states are wrapped; nothing is cut to an ellipsis."""
    from rich.console import Console

    jobs = [job_of(configure("model=drrn_ns", "model.B=17", "model.U=3", "seed=12", "name=a_name_of_our_own"))]
    jobs += [Job(configure("model.features=16"), before="resume", first=123_456, seconds=1e6, bytes=10**11)]
    monkeypatch.setattr(drrn.sweep.plan, "console", lambda: Console(width=width))
    print_plan(make_plan(jobs, workers=2))
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(len(line) for line in out.splitlines() if " at a time, on machines" not in line) <= width
    for said in ("DRRN_B1U9_16f", "123,456", "11.6 days", "100.00"):
        assert said in out


def test_plan_only_prints_and_starts_nothing(entry_point: Callable, tiny_images: Path, tmp_path: Path) -> None:
    small = (f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", "model.features=2", "data.batch_size=2")
    for overrides in (("model.U=1",), ("-m", "model.U=1,2", "model.B=2")):
        code, out, err = entry_point("train", *overrides, *small, "plan=only", f"output={tmp_path}/runs")
        assert code == 0, err
        for said in ("d", "k", "operations", "/step", "memory", "464,056", "GB"):
            assert said in out
    assert "In all" in out
    assert "DRRN_B2U2_2f s1" in out
    assert not (tmp_path / "runs").exists()
    code, out, err = entry_point("train", *small, "plan=maybe")
    assert code == 2
    assert "plan" in err


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_a_signal_ends_the_sweep_with_its_table(
    entry_point: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    """The first point is done, the second is stopped, the third never begins."""

    def fake(config: object) -> None:
        if config.model["U"] == 2:
            write(config, "stopped", ended_by="signal SIGTERM", error="SIGTERM: a signal ended it")
            raise stop
        write(config, "finished")

    monkeypatch.setattr(train, "start", fake)
    words = ("train", "-m", "model.U=1,2,3", "model.features=2", f"output={tmp_path}")
    code, out, _ = entry_point(*words, "trainer.max_steps=1")
    assert code == (stop.code if isinstance(stop, SystemExit) else 130)
    rows = {line.split()[0]: line for line in out.split("Outcome")[1].splitlines() if "DRRN" in line}
    for name, word in (("B1U1", "done"), ("B1U2", "interrupted"), ("B1U3", "not started")):
        assert word in rows[f"DRRN_{name}_2f"]
    assert "1 of 3 runs done" in out
    code, out, _ = entry_point("train", "-m", "model.U=1", "model.features=2", "trainer.max_steps=1",
                               f"output={tmp_path}")  # fmt: skip
    assert code == 0
    assert "skipped" in out


def test_failed_runs_are_named_with_their_reasons(
    entry_point: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(config: object) -> None:
        if config.model["U"] == 1:
            raise UserError("no image is as large as a patch")
        write(config, "finished")

    monkeypatch.setattr(train, "start", fake)
    code, out, err = entry_point("train", "-m", "model.U=1,2", "plan=none", f"output={tmp_path}")
    assert code == 2
    assert "no image is as large as a patch" in out
    assert "1 of 2 runs done" in out
    assert "1 of 2 runs failed; the same command tries them again" in err
