"""The bench: its plain versions compute the same as ours, and its table has every measurement. No times."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import bench
import bench_engines
import bench_gpu
import bench_threads
from drrn.model import DRRN
from drrn.patch_build import prepare_patches
from drrn.patches import Patches, Recipe
from drrn.sets import image_files
from started import forking
from started import run as run_forked

TINY = {
    "features": 2,
    "images": [(1, 20, 1)],
    "conv": (8,),
    "batches": [(2, 1), (1, 1)],
    "memory": (2, 2),
    "engines": 1,
    "threads": (1, 1, 18, 1, 1),
    "growth": ((32, 64), (1, 2, 3)),
}


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("structure", [{}, {"multi_path": False}, {"weight_sharing": False}], ids=["", "C", "NS"])
def test_the_plain_network_gives_our_output_and_gradients(structure: dict, norm: str) -> None:
    torch.manual_seed(0)
    network = DRRN(2, 3, features=4, norm=norm, **structure).double()
    x, results = torch.rand(3, 1, 9, 11, dtype=torch.float64), []
    for model in (bench.Plain(network), network):
        network.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in network.parameters())])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-9)


def test_a_step_in_float32_has_the_gradients_of_the_plain_one() -> None:
    """Bit for bit in the plain layout, to 1e-5 in the layout of training, with weights that keep rounding small."""
    torch.manual_seed(0)
    network = DRRN(1, 9, features=16)
    with torch.no_grad():
        network.blocks[0].conv_b[0].weight.mul_(0.2)  # at He's size rounding grows to 1e-2 over nine units
    x, truth = torch.rand(2, 4, 1, 31, 31)

    def gradient(model: torch.nn.Module) -> torch.Tensor:
        network.zero_grad()
        bench.euclidean(model(x), truth).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    plain, ours = gradient(bench.Plain(network)), gradient(network)
    assert torch.equal(ours, plain)
    channels_last = gradient(network.to(memory_format=torch.channels_last))
    assert (channels_last - plain).norm() < 1e-5 * plain.norm()


def test_the_plain_build_and_the_plain_reads_give_our_pairs(tiny_images: Path, tmp_path: Path) -> None:
    recipe = Recipe((str(tiny_images),), scales=(2, 3))
    ours = prepare_patches("bench", recipe, tmp_path, tmp_path, 1)
    bench.plain_build(tmp_path / "plain.h5", recipe, image_files(str(tiny_images), tmp_path))
    with h5py.File(tmp_path / "plain.h5") as plain, h5py.File(ours) as file:
        for name in ("data", "label"):
            np.testing.assert_array_equal(plain[name][:], file[name][:])
        count = len(file["data"])
    x, y = bench.PlainPatches(ours, count)[3]
    data, label = Patches(ours)[np.array([3])]
    np.testing.assert_allclose(x, data[0] * bench.STEP + bench.LOW, atol=1e-6)
    np.testing.assert_allclose(y, label[0] / 255, atol=1e-7)


def nap(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def test_things_take_turns_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    context = forking()
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: context)
    times = bench.in_turn({"short": (nap, 0.01), "long": (nap, 0.2)}, 2)
    assert [len(t) for t in times.values()] == [2, 2]
    assert all(t >= 0.01 for t in times["short"])
    assert all(t >= 0.2 for t in times["long"])


def test_seconds_of_shares_add_up_to_rounds_of_which_the_first_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(things: dict[str, tuple], rounds: int, warm: bool) -> dict[str, list[float]]:
        assert not warm  # it would be one share, and the rounds no whole images
        return {name: [10.0**round_ for round_ in range(rounds // 4) for _ in range(4)] for name in things}

    monkeypatch.setattr(bench, "SHARES", 4)
    monkeypatch.setattr(bench, "in_turn", stand_in)
    assert bench.in_shares({"a": (), "b": ()}, 3) == {name: [40.0, 400.0, 4000.0] for name in "ab"}
    assert bench.uneven([9.0, 10.0, 10.5]) == pytest.approx(10)


def test_the_shares_of_a_round_are_as_many_whole_images_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, super_resolve_strips = [], bench.super_resolve_strips

    def counted(*arguments: Any) -> Iterator:
        for strip in super_resolve_strips(*arguments):
            rows.append(len(strip))
            yield strip

    monkeypatch.setattr(bench, "super_resolve_strips", counted)
    monkeypatch.setattr("drrn.inference.strips", lambda *_: [(0, 10), (10, 20), (20, 30)])  # the last is higher
    share = bench.shares(1, 30, 2, 4)
    for calls in range(1, 3 * bench.SHARES + 1):
        share()
        due = calls * 4 * 30 / bench.SHARES
        assert sum(rows[:-1]) < due <= sum(rows)
    assert sum(rows) == 3 * 4 * 30


def test_the_table_holds_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything timed is run once, in this process."""

    def here(things: dict[str, tuple], rounds: int, warm: bool = True, environment: Any = None) -> dict:
        runs = {
            name: build(*arguments) for name, (build, *arguments) in things.items() if build is not bench.first_image
        }
        for run in runs.values():
            run()
        return {name: [2.0 if name == "plain" else 1.0] * rounds for name in things}

    monkeypatch.setattr(bench, "in_turn", here)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)  # tests/fast/test_training.py does it

    def once(build: Callable, *arguments: Any) -> tuple[float, float]:
        build(*arguments)()
        return 1.0, 1.0

    monkeypatch.setattr(bench, "peak", once)
    monkeypatch.setattr(bench, "SIZES", TINY)
    rows = bench.main(["training", "inference", "memory", "growth"], TINY, tmp_path)
    assert not [row for row in rows if "not measured" in row.what]
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert [row["what"] for row in stored["rows"]] == [row.what for row in rows]
    assert stored["rows"][0]["value"] == 2.0
    assert stored["rows"][0]["verdict"] == "pass"
    text = (tmp_path / "bench.md").read_text()
    assert all(row.what in text for row in rows)


@pytest.mark.parametrize(
    ("installed", "rows"), [((), 0), (("onnxruntime",), 2), (("openvino",), 4), (("onnxruntime", "openvino"), 6)]
)
def test_an_engine_has_rows_where_it_is_installed(
    installed: tuple[str, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`export_onnx` itself compares ONNX Runtime's output with ours."""
    times = {"ONNX Runtime": 3.0, "OpenVINO in float32": 2.0, "OpenVINO as it comes": 1.0}
    monkeypatch.setattr(bench_engines.importlib.util, "find_spec", lambda name: name in installed)
    monkeypatch.setattr(bench_engines, "export_onnx", lambda *_: 0.0)
    monkeypatch.setattr(bench_engines, "by_itself", lambda: "bf16")
    monkeypatch.setattr(bench, "in_turn", lambda things, rounds: {name: [times.get(name, 4.0)] for name in things})
    found = list(bench_engines.engines(TINY))
    assert len(found) == rows
    for row in found:
        assert row.value == (0.25 if "as it comes" in row.what else 0.75 if "ONNX" in row.what else 0.5)


def test_the_threads_that_are_free_stand_beside_fixed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of work is built and run once; the best fixed number is the fastest."""
    commands: list[tuple[str, ...]] = []

    def here(things: dict[str, tuple], rounds: int, warm: bool = True, environment: Any = None) -> dict:
        for build, *arguments in things.values():
            build(*arguments)()
        return {name: [{"1 thread": 3.0, "2 threads": 1.0}.get(name, 2.0)] for name in things}

    monkeypatch.setattr(bench, "in_turn", here)
    monkeypatch.setattr(bench, "command", lambda *arguments: lambda: commands.append(arguments))
    monkeypatch.setattr(bench_threads, "allowed_cores", lambda: [0, 1])
    monkeypatch.setattr("drrn.fast.threads.WATCHED", 0.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    try:
        rows = list(bench_threads.threads(TINY))
    finally:
        torch.set_num_threads(before)
    assert [row.value for row in rows] == [0.5] * 8  # four works, idle and beside another process
    assert len(commands) == 7  # one of them builds the patches


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the bench itself does it, at its own sizes")
def test_the_part_of_a_gpu_runs_through_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its trainings is a real one."""
    done: list[dict] = []
    through_train = bench_gpu.through_train

    def once(*arguments: Any) -> dict:
        done.append(done[0] if done else through_train(*arguments))
        return done[0]

    monkeypatch.setattr(bench_gpu, "through_train", once)
    monkeypatch.setattr("subprocess.run", run_forked)
    rows = bench.main(["gpu"], TINY, tmp_path)
    assert len(done) == 3
    assert [row.what for row in rows if not row.value > 0] == []
    said = " ".join(row.what for row in rows)
    for what in ("convolutions alone", "raw step, BatchNorm", "through train.py", "compiler cache", "a validation"):
        assert what in said
    assert {row.target for row in rows} == {""}


def test_what_fails_on_a_gpu_leaves_the_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(bench_gpu, "through_train", broken)
    monkeypatch.setattr(bench_gpu, "raw_step", lambda *_: lambda: None)
    monkeypatch.setattr(bench_gpu, "inference", lambda sizes: iter(()))
    rows = {what: (value, detail) for what, value, _, _, detail in bench_gpu.gpu()}
    assert rows["through train.py, BatchNorm: failed"][1] == "RuntimeError: no kernel image"
    assert rows["raw step, no BatchNorm"][0] > 0
    monkeypatch.setattr(bench_gpu, "BUDGET", 0.0)
    assert all("no time was left" in what for what, *_ in bench_gpu.gpu())


def test_each_batchnorm_of_the_bench_is_pytorchs() -> None:
    """Result, gradients and updated statistics are PyTorch's."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    results = []
    for kind in (torch.nn.BatchNorm2d, bench_gpu.WrittenOut, bench_gpu.ByImage, bench_gpu.Library):
        layer, H = torch.nn.BatchNorm2d(3, momentum=1.0), x.clone().requires_grad_()
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
            layer.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
        layer.__class__ = kind
        y = layer(H)
        y.pow(3).sum().backward()
        results.append([y, H.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_bias_apart_is_the_convolutions() -> None:
    torch.manual_seed(0)
    conv, x, results = torch.nn.Conv2d(2, 3, 3), torch.randn(2, 2, 5, 5), []
    for kind in (torch.nn.Conv2d, bench_gpu.BiasApart, bench_gpu.BiasByImage):
        conv.__class__ = kind
        conv.zero_grad()
        y = conv(x)
        y.pow(3).sum().backward()
        results.append([y, conv.weight.grad, conv.bias.grad])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("value", "target", "verdict"),
    [(1.5, "≥ 1.5", "pass"), (1.49, "≥ 1.5", "FAIL"), (2.0, "≤ 2", "pass"), (2.1, "≤ 2", "FAIL"), (1.0, "", "")],
)
def test_verdicts(value: float, target: str, verdict: str) -> None:
    assert bench.Row("", value, "", target, "").verdict() == verdict


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="'speed' is none of startup"):
        bench.main(["speed"], TINY, tmp_path)
