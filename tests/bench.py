"""`make bench`: the project's claims about speed, each a ratio of two versions that are timed alternately in one run.

    python tests/bench.py            # 25 minutes on two idle cores; report/bench.json and bench.md
    python tests/bench.py training   # one part, at most five minutes
    python tests/bench.py gpu        # a GPU's part, five minutes

The two versions run in two processes that take turns, so that neither uses the other's memory. The plain versions are
defined first; tests/test_bench.py checks them against ours. Times are wall-clock, medians over rounds.
"""

# ruff: noqa: E402 — the environment is set before torch is imported
from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the entry points do

import h5py
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drrn.fast.folded import Convolution
from drrn.fast.memory import freed_memory_kept
from drrn.fast.precision import chosen
from drrn.fast.training import InTraining
from drrn.images import orientations, read_pixels
from drrn.inference import super_resolve, super_resolve_strips
from drrn.losses import euclidean
from drrn.matlab import rgb2ycbcr
from drrn.model import DRRN
from drrn.pairs import pair_loader
from drrn.patch_build import quantise
from drrn.patches import LOW, STEP, Patches, Recipe, ShuffledBatches
from drrn.protocol import modcrop, prepare
from drrn.sets import image_files

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARES = 16  # parts of work that takes too long for one turn
SIZES: dict[str, Any] = {
    "features": 128,
    "images": [(9, 288, 4), (25, 384, 1)],  # U, side, rounds
    "conv": (32, 64, 128),
    "batches": [(32, 7), (1, 9), (8, 5), (128, 1)],  # batch, rounds
    "memory": (25, 128),  # U, batch
    "plain_build": 4,  # every fourth image
    "pairs": 240_000,  # to read, ours
    "start": 5,  # rounds
    "engines": 5,  # rounds
    "threads": (16, 10, 288, 40, 3),  # features, steps, side, the demo's steps, rounds
    "growth": ((128, 512, 2048), (5, 10, 20, 40)),  # sides, with U = 1; U, at 128²
}


# ---------------------------------------------------------------------- plain versions


class Plain(nn.Module):
    """DRRN by the equations: eager, unfused, NCHW. Takes the parameters of a `DRRN`."""

    def __init__(self, network: DRRN) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for block in self.network.blocks:
            H0 = H = block.conv(F.relu(block.norm(z)))
            for u in range(block.U):
                w = 0 if block.weight_sharing else u
                q = block.conv_a[w](F.relu(block.norm_a[u](H)))
                H = block.conv_b[w](F.relu(block.norm_b[u](q))) + (H0 if block.multi_path else H)
            z = H
        return self.network.conv_rec(F.relu(self.network.norm_rec(z))) + x


def plain_build(path: Path, recipe: Recipe, files: list[Path]) -> None:
    """The patch file as scripts usually make it: a list of pairs, concatenated, shuffled, written."""
    data, label = [], []
    p = recipe.patch_size
    for file in files:
        pixels = read_pixels(file)
        luminance = rgb2ycbcr(pixels)[..., 0] if pixels.ndim == 3 else pixels
        for turned in orientations(luminance, range(recipe.orientations)):
            for scale in recipe.scales:
                y = modcrop(turned, scale)
                x, _ = prepare(y, scale)
                for top in range(0, y.shape[0] - p + 1, recipe.stride):
                    for left in range(0, y.shape[1] - p + 1, recipe.stride):
                        data.append(x[None, top : top + p, left : left + p])
                        label.append(y[None, top : top + p, left : left + p])
    order = np.random.default_rng(0).permutation(len(data))
    x, y = np.concatenate(data), np.concatenate(label)
    shuffled = np.empty_like(x), np.empty_like(y)
    shuffled[0][order], shuffled[1][order] = x, y
    with h5py.File(path, "w") as out:
        out["data"], out["label"] = quantise(shuffled[0]), shuffled[1]


class PlainPatches(torch.utils.data.Dataset):
    """One h5py read per pair."""

    def __init__(self, path: Path, length: int) -> None:
        self.path, self.length, self.file = path, length, None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.file = self.file or h5py.File(self.path, "r")
        x, y = self.file["data"][index], self.file["label"][index]
        return torch.from_numpy(x * np.float32(STEP) + np.float32(LOW)), torch.from_numpy(y / np.float32(255))


# ---------------------------------------------------------------------- what is timed; each is built in its process


def network(U: int, norm: str, features: int) -> DRRN:
    torch.manual_seed(0)
    return DRRN(1, U, features=features, norm=norm).to(DEVICE)


def synchronised(work: Callable[[], Any]) -> Callable[[], Any]:
    """`work`, followed by a synchronisation of the GPU."""

    def run() -> None:
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def plain_inference(U: int, side: int, norm: str, features: int) -> Callable[[], Any]:
    x, plain = torch.rand(1, 1, side, side, device=DEVICE), Plain(network(U, norm, features)).eval()
    return synchronised(torch.inference_mode()(lambda: plain(x).cpu()))


def our_inference(U: int, side: int, norm: str, features: int, precision: str = "float32") -> Callable[[], Any]:
    x, ours = np.random.default_rng(0).random((side, side), np.float32), network(U, norm, features).eval()
    return synchronised(lambda: super_resolve(ours, x, precision=precision))


def convolutions(U: int, side: int, features: int, conv: int) -> Callable[[], Any]:
    """A quarter of the multiplications of the network's units, in bare convolutions of conv × conv pixels."""
    conv_a = Convolution(nn.Conv2d(features, features, 3, padding=1).to(DEVICE), None)
    x = torch.rand(1, features, conv, conv, device=DEVICE).contiguous(memory_format=torch.channels_last)
    count = max(1, round(2 * U * side**2 / conv**2 / 4))

    @torch.inference_mode()
    def run() -> None:
        for _ in range(count):
            conv_a(x)

    return synchronised(run)


def trained_convolutions(U: int, batch: int, features: int) -> Callable[[], Any]:
    """A sixth of a step's convolutions features → features, forward and both gradients, laid out as ours."""
    x = torch.rand(batch, features, 31, 31, device=DEVICE).contiguous(memory_format=torch.channels_last)
    conv = nn.Conv2d(features, features, 3, padding=1).to(DEVICE, memory_format=torch.channels_last)
    x.requires_grad_()

    def run() -> None:
        with freed_memory_kept():
            for _ in range(max(1, U // 3)):
                y = conv(x)
                y.backward(y)

    return synchronised(run)


def plain_step(U: int, batch: int, features: int) -> Callable[[], Any]:
    return _step(Plain(network(U, "batch", features)), batch)


def our_step(
    U: int, batch: int, features: int, checkpointing: bool = False, precision: Any = None, compiled: bool = False
) -> Callable[[], Any]:
    ours = network(U, "batch", features).to(memory_format=torch.channels_last)
    step = _step(ours, batch, precision, InTraining(ours, compiled, checkpointing))

    def run() -> None:
        with freed_memory_kept(not checkpointing):
            step()

    return run


def _step(
    model: nn.Module, batch: int, precision: torch.dtype | None = None, trained: InTraining | None = None
) -> Callable[[], Any]:
    """A step of `model`, through `trained` if it is ours."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=trained is not None)
    x, truth = torch.rand(2, batch, 1, 31, 31, device=DEVICE)
    good = torch.ones((), dtype=torch.bool, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE, precision or torch.bfloat16, enabled=precision is not None):
            prediction = (trained or model)(x)
        optimizer.zero_grad()
        euclidean(prediction, truth).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        if trained is not None:
            trained.follow(trained.statistics, [0.1], good)
        optimizer.step()

    return synchronised(step)


def reader(path: str, pairs: int, ours: bool) -> Callable[[], Any]:
    def read() -> None:
        if ours:
            data = Patches(Path(path))
            loader = pair_loader(data, ShuffledBatches(len(data), 128, 1, steps=max(1, pairs // 128)), 2)
        else:
            data = PlainPatches(Path(path), len(Patches(Path(path))))
            sampler = np.random.default_rng(1).permutation(len(data))[:pairs].tolist()
            loader = torch.utils.data.DataLoader(data, batch_size=128, sampler=sampler, num_workers=2)
        for batch in loader:
            if ours:  # to float arrays, like the plain one; torch's threads would wait for a core
                x, y = batch
                torch.from_numpy(x * np.float32(STEP) + np.float32(LOW)), torch.from_numpy(y / np.float32(255))

    return read


def command(*arguments: str) -> Callable[[], Any]:
    """A command of the project, from the start of Python to its end."""
    return lambda: subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)


def first_image(ours: bool, side: int, features: int) -> Callable[[], Any]:
    build = f"bench.{'our' if ours else 'plain'}_inference(9, {side}, 'batch', {features})()"
    return command("-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import bench; {build}")


# ---------------------------------------------------------------------- taking turns


def worker(pipe: Any, build: Callable, arguments: tuple) -> None:
    """Build once, then run and time at each request."""
    run = build(*arguments)
    pipe.send(0.0)
    with suppress(EOFError):
        while pipe.recv():
            start = time.perf_counter()
            run()
            pipe.send(time.perf_counter() - start)


def in_turn(
    things: dict[str, tuple], rounds: int, warm: bool = True, environment: dict[str, dict[str, str]] | None = None
) -> dict[str, list[float]]:
    """Name → seconds of each round; each of `things` (build, *arguments) runs in a process of its own."""
    context = multiprocessing.get_context("spawn")
    pipes, times = {}, {name: [] for name in things}
    for name, (build, *arguments) in things.items():
        pipes[name], other = context.Pipe()
        before = dict(os.environ)
        os.environ.update((environment or {}).get(name, {}))
        context.Process(target=worker, args=(other, build, tuple(arguments))).start()  # ends with its pipe
        os.environ.clear()
        os.environ.update(before)
        other.close()
        pipes[name].recv()
    for number in range(rounds + warm):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds = pipe.recv()
            if number >= warm:
                times[name].append(seconds)
    for pipe in pipes.values():
        pipe.close()
    return times


def in_shares(things: dict[str, tuple], rounds: int) -> dict[str, list[float]]:
    """`in_turn` for work of many seconds, done in shares: the sum of a round's shares, after a warm-up round.

    The machine's speed drifts in that time by more than the effect measured; turns of one share let it drift for all.
    """
    times = in_turn(things, SHARES * (1 + rounds), warm=False)
    return {name: [sum(t[i : i + SHARES]) for i in range(SHARES, len(t), SHARES)] for name, t in times.items()}


def peak(build: Callable, *arguments: Any) -> tuple[float, float]:
    """(peak bytes that one run adds to a process that has done small runs, its seconds)."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_peak, args=(other, build, arguments), daemon=True)
    process.start()
    other.close()
    result = pipe.recv()
    process.join()
    return result


def _peak(pipe: Any, build: Callable, arguments: tuple) -> None:
    run = build(*arguments)
    if DEVICE == "cuda":
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        run()
        after = torch.cuda.max_memory_allocated()
    else:
        before, start = _status("VmRSS"), time.perf_counter()
        run()
        after = _status("VmHWM")
    pipe.send((after - before, time.perf_counter() - start))


def _status(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


# ---------------------------------------------------------------------- the table


class Row(NamedTuple):
    """A claim and its measurement."""

    what: str
    value: float
    unit: str
    target: str  # "≥ 1.5", "≤ 2", or "" where there is none
    detail: str
    spread: float | None = None  # (largest − smallest) / median over the rounds of the ratio

    def verdict(self) -> str:
        """pass, FAIL or nothing."""
        if not self.target:
            return ""
        sign, limit = self.target.split()[:2]
        return "pass" if (self.value >= float(limit)) == (sign == "≥") or self.value == float(limit) else "FAIL"


def ratio(what: str, target: str, times: dict[str, list[float]], slow: str, fast: str) -> Row:
    """How many times faster `fast` is: the median over the rounds of slow / fast."""
    each = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    value = statistics.median(each)
    detail = ", ".join(f"{name} {statistics.median(t):.3g} s" for name, t in times.items())
    return Row(what, value, "×", target, detail, (max(each) - min(each)) / value)


def inference(sizes: dict[str, Any]) -> Iterator[Row]:
    """Whole images against the plain network and against bare convolutions."""
    features = sizes["features"]
    for U, side, rounds in sizes["images"]:
        for norm in ("none", "batch"):
            things = {
                "plain": (plain_inference, U, side, norm, features),
                "ours": (our_inference, U, side, norm, features),
                "bf16": (our_inference, U, side, norm, features, "bf16"),
                **{f"conv {c}²": (convolutions, U, side, features, c) for c in sizes["conv"]},
            }
            times = in_turn(things, rounds, warm=rounds > 1)
            bare = [name for name in times if name.startswith("conv")]
            times |= {name: [4 * seconds for seconds in times[name]] for name in bare}
            best = min(bare, key=lambda name: statistics.median(times[name]))
            rate = 2 * U * side**2 * 2 * 9 * features**2 / statistics.median(times[best]) / 1e9
            yield Row(f"bare {features}→{features} convolutions at the best size", rate, "GFLOP/s", "", best)
            what = f"B1U{U} {side}², {'BatchNorm' if norm == 'batch' else 'no BatchNorm'}"
            yield ratio(f"inference {what}: faster than plain", "≥ 1.5", times, "plain", "ours")
            in_hardware = chosen("auto", torch.device(DEVICE)) == "bf16"
            target = "≥ 1.5" if in_hardware else ""
            yield ratio(f"inference {what}: bf16 faster than float32", target, times, "ours", "bf16")
            yield ratio(f"inference {what}: rate of its own convolutions", "≥ 0.85", times, best, "ours")
    side = sizes["images"][0][1]
    times = in_turn({k: (first_image, k == "ours", side, features) for k in ("plain", "ours")}, 3, warm=True)
    later = statistics.median(b - a for a, b in zip(times["plain"], times["ours"], strict=True))
    yield Row("first image after start: seconds later than plain", later, "s", "≤ 2", f"B1U9 {side}²")


def evaluation(sizes: dict[str, Any]) -> Iterator[Row]:
    """Set5 ×3: the share of time outside the network, without Python's start-up."""
    import drrn.evaluation as evaluate
    from drrn.config import ModelConfig
    from drrn.disk import sha256
    from drrn.protocol import PAPER
    from drrn.sets import fetch
    from drrn.weights.ours import save_weights

    files = fetch("Set5", Path(os.environ.get("DRRN_DATA", ROOT / "data")))
    with tempfile.TemporaryDirectory() as folder:
        path, features = Path(folder) / "weights.safetensors", sizes["features"]
        model = vars(ModelConfig(1, 9, features, "batch", True, True, True))
        save_weights(path, network(9, "batch", features), model, {"scales": [3]})
        shares, totals, run_network = [], [], evaluate.run_network

        def timed(*arguments: Any) -> Any:
            nonlocal inside
            before = time.perf_counter()
            y = run_network(*arguments)
            inside += time.perf_counter() - before
            return y

        evaluate.run_network = timed
        for _ in range(3):
            start, inside = time.perf_counter(), 0.0
            method = evaluate.network_in(path)
            for file in files:
                job = evaluate.ImageJob(method, "Set5", 3, file, sha256(file), None, None)
                evaluate.score_image(job, ("psnr", "ssim"), PAPER, torch.get_num_threads())
            totals.append(time.perf_counter() - start)
            shares.append(100 * (1 - inside / totals[-1]))
        evaluate.run_network = run_network
        detail = f"{statistics.median(totals):.3g} s in all"
        yield Row("evaluation of Set5 ×3: what is not the network", statistics.median(shares), "%", "≤ 10", detail)
        whole = command("src/evaluate.py", f"checkpoint={path}", "sets=[Set5]", "scales=[3]",
                        f"root={files[0].parents[1]}", f"output={folder}/scores.json")  # fmt: skip
        seconds = in_turn_here(whole)
        yield Row("`evaluate.py` on Set5 ×3 by B1U9, end to end", seconds, "s", "", "start of Python included")


def in_turn_here(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def training(sizes: dict[str, Any]) -> Iterator[Row]:
    """A training step against the plain one, and against itself with other switches."""
    features = sizes["features"]
    for number, (batch, rounds) in enumerate(sizes["batches"]):
        things: dict[str, tuple] = {"plain": (plain_step, 9, batch, features), "ours": (our_step, 9, batch, features)}
        if number == 0:
            things["convolutions"] = (trained_convolutions, 9, batch, features)
        times = in_turn(things, rounds)
        yield ratio(
            f"training step B1U9, batch {batch}", "≥ 1.15" if number == 0 else "≥ 1.0", times, "plain", "ours"
        )
        if number == 0:
            times["convolutions"] = [6 * seconds for seconds in times["convolutions"]]
            what = f"training step B1U9, batch {batch}: rate of its own convolutions"
            yield ratio(what, "≥ 0.85", times, "convolutions", "ours")
            yield ratio(what.replace("training", "plain training"), "", times, "convolutions", "plain")
    batch, rounds = sizes["batches"][0]
    ours = (our_step, 9, batch, features)
    waiting = {"libgomp's own": {"GOMP_SPINCOUNT": "300000"}, "a little": {"GOMP_SPINCOUNT": "20000"}}
    times = {name: [] for name in waiting}
    for _ in range(2):  # one process at a time: threads that spin would take the other's core
        for name in waiting:
            times[name] += in_turn({name: ours}, 2, environment=waiting)[name]
    what = "training step, threads that spin a little, then sleep, instead of libgomp's own"
    yield ratio(what, "", times, *waiting)
    times = in_turn({"float32": ours, "bfloat16": (*ours, False, torch.bfloat16)}, min(rounds, 3))
    yield ratio("training step, bf16-mixed instead of float32", "", times, "float32", "bfloat16")
    times = in_turn({"eager": ours, "compiled": (*ours, False, None, True)}, min(rounds, 3))
    yield ratio("training step, speed.compile=true instead of eager", "", times, "eager", "compiled")


def memory(sizes: dict[str, Any]) -> Iterator[Row]:
    """speed.checkpointing: peak memory and time, with the same allocator settings."""
    U, batch = sizes["memory"]
    without, _ = peak(checkpointed_step, U, batch, sizes["features"], False)
    with_it, _ = peak(checkpointed_step, U, batch, sizes["features"], True)
    what, detail = f"speed.checkpointing, B1U{U}, batch {batch}", f"{with_it / 1e9:.3g} of {without / 1e9:.3g} GB"
    yield Row(f"{what}: peak memory", with_it / without, "×", "≤ 0.35", detail)
    both = ("with", "without")
    things = {name: (checkpointed_step, U, batch, sizes["features"], name == "with") for name in both}
    yield ratio(f"{what}: time of a step", "≤ 1.4", in_turn(things, 1, warm=False), "with", "without")


def checkpointed_step(U: int, batch: int, features: int, on: bool) -> Callable[[], Any]:
    """A step with the allocator's default settings, after a small one."""
    model = network(U, "batch", features).to(memory_format=torch.channels_last)
    trained = InTraining(model, checkpointing=on)
    _step(model, 1, trained=trained)()
    return _step(model, batch, trained=trained)


def timed_plain_build(path: Path, recipe: Recipe, files: list[Path]) -> float:
    return in_turn_here(lambda: plain_build(path, recipe, files))


def patches(sizes: dict[str, Any]) -> Iterator[Row]:
    """Building and reading the patch file."""
    root = Path(os.environ.get("DRRN_DATA", ROOT / "data"))
    sets = ("T91", "BSD200") if (root / "T91").is_dir() and (root / "BSD200").is_dir() else ("demo_train",)
    recipe, files = Recipe(sets), [file for name in sets for file in image_files(name, root)]
    few = files[:: sizes["plain_build"]]  # a plain build of all takes 64 GB
    with tempfile.TemporaryDirectory() as folder:
        rates: dict[str, list[float]] = {"plain": [], "ours": []}
        memory, seconds = [], []
        for number in range(3):
            plain, target = Path(folder) / "plain.h5", Path(folder) / f"{number}"
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # memory may be short
                taken = pool.submit(timed_plain_build, plain, recipe, few).result()
            with h5py.File(plain) as file:
                pairs = len(file["data"])
            rates["plain"].append(pairs / taken)
            plain.unlink()
            # As a command: a worker that was started from here would import all of this file first.
            build = f"prepare_patches('bench', Recipe({sets!r}), Path({str(root)!r}), Path({str(target)!r}), 2)"
            script = f"from pathlib import Path; from drrn.patch_build import *; {build}"
            start = time.perf_counter()
            memory.append(memory_of([sys.executable, "-c", f"import sys; sys.path.insert(0, 'src'); {script}"]))
            seconds.append(time.perf_counter() - start)
            (path,) = target.glob("*.h5")
            count = len(Patches(path))
            rates["ours"].append(count / seconds[-1])
            if number < 2:
                path.unlink()
        each = [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)]
        detail = (
            f"{statistics.median(rates['ours']):,.0f} pairs/s, {len(files)} images, two workers and their start "
            f"included, against {statistics.median(rates['plain']):,.0f}, {len(few)} of them"
        )
        value = statistics.median(each)
        yield Row(
            "patch build against list-and-concatenate", value, "×", "≥ 5", detail, (max(each) - min(each)) / value
        )
        yield Row(f"patch build, {count:,} pairs", statistics.median(seconds), "s", "", "start of Python included")
        if max(memory):
            yield Row(
                "patch build, memory of all its processes", max(memory) / 1e9, "GB", "≤ 1.5", "shared pages once"
            )

        one_by_one = min(count, sizes["pairs"] // 20)
        pairs = min(sizes["pairs"], count) // 128 * 128
        # In this process, whose loaders start and end their workers fast. Two lengths tell the rate from that.
        long = {
            "plain": (one_by_one, reader(str(path), one_by_one, False)),
            "ours": (pairs, reader(str(path), pairs, True)),
        }
        short = {"plain": reader(str(path), 128, False), "ours": reader(str(path), 128, True)}
        times: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(5):
            for name, (_, run) in long.items():
                times[name].append(in_turn_here(run) - in_turn_here(short[name]))
        rates = {k: (n - 128) / statistics.median(times[k]) for k, (n, _) in long.items()}
        detail = f"{rates['ours']:,.0f} and {rates['plain']:,.0f} pairs/s"
        yield Row(
            "patch reading, 2 workers: faster than a read a patch",
            rates["ours"] / rates["plain"],
            "×",
            "≥ 20",
            detail,
        )
        yield Row("patch reading, 2 workers", rates["ours"], "pairs/s", "≥ 50000", detail)
        rate = (pairs - 128) / times["ours"][0]
        yield Row("patch reading, 2 workers, the first time after a build", rate, "pairs/s", "", "from the disk")


def memory_of(arguments: list[str]) -> int:
    """Peak bytes of a command and its children, sampled 20 times a second (Linux)."""
    most = 0
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            total = 0
            for stat in Path("/proc").glob("[0-9]*/stat"):
                with suppress(OSError, IndexError):  # it has ended
                    if process.pid in (int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])):
                        rollup = stat.with_name("smaps_rollup").read_text()
                        total += 1024 * int(rollup.split("Pss:")[1].split()[0])
            most = max(most, total)
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{arguments[-1]!r} ended with {process.returncode}")
    return most


def startup(sizes: dict[str, Any]) -> Iterator[Row]:
    """Commands from the start of Python to their end: the help and a refused configuration."""
    things = {
        "python src/train.py --help": (command, "src/train.py", "--help"),
        "a refused configuration": (command, "src/train.py", "model.B=0"),
    }
    for name, seconds in in_turn(things, sizes["start"]).items():
        middle = statistics.median(seconds)
        spread = (max(seconds) - min(seconds)) / middle
        yield Row(f"start-up: {name}", middle, "s", "≤ 2.5", f"{len(seconds)} rounds", spread)


def growth(sizes: dict[str, Any]) -> Iterator[Row]:
    """Time against pixels and against U, the pixels computed twice, and the memory of large images."""
    (sides, units), features = sizes["growth"], sizes["features"]
    # As many small images as the large one has pixels.
    times = in_shares({f"{s}²": (shares, 1, s, features, (max(sides) // s) ** 2) for s in sides}, 2)
    seconds = [statistics.median(t) for t in times.values()]
    rounds = ", ".join(f"{uneven(t):.1f} %" for t in zip(*times.values(), strict=True))
    detail = ", ".join(f"{n} {s:.3g} s" for n, s in zip(times, seconds, strict=True)) + " for as many pixels"
    detail += f"; by round {rounds}"
    yield Row("time against pixels, B1U1: worst departure from linear", uneven(seconds), "%", "≤ 10", detail)
    for U in (9, 25):
        more = 100 * (computed_more(network(U, "batch", features), max(sides)) - 1)
        yield Row(f"pixels computed twice, B1U{U}, {max(sides)}²", more, "%", "≤ 10", "in the default strips")
    times = in_shares({f"U{U}": (shares, U, 128, features, 4 * max(units) // U) for U in units}, 1)
    seconds = [statistics.median(t) / (4 * max(units) // U) for U, t in zip(units, times.values(), strict=True)]
    slope, constant = np.polyfit(units, seconds, 1)
    worst = 100 * max(abs(s / (slope * U + constant) - 1) for U, s in zip(units, seconds, strict=True))
    detail = ", ".join(f"{n} {s:.3g} s" for n, s in zip(times, seconds, strict=True)) + " an image of 128²"
    yield Row("time against U: worst departure from a line", worst, "%", "≤ 10", detail)
    few, many = (
        statistics.median(peak(tiled, side, features)[0] for _ in range(3)) - 4 * side**2
        for side in (max(sides) // 2, max(sides))
    )
    detail = f"{few / 1e6:.3g} and {many / 1e6:.3g} MB beside the result, tiles of {max(sides) // 8}"
    yield Row("memory of tiles, 4 times the pixels", many / few, "×", "≤ 1.1", detail)


def computed_more(model: DRRN, side: int) -> float:
    """Pixels computed by the convolutions 128 → 128 for an image of side², counted, over the image's pixels."""
    pixels = 0

    def count(
        conv: Convolution, x: Tensor, add: Tensor | None = None, relu: bool = True, padded: bool = True
    ) -> Tensor:
        nonlocal pixels
        size = (x.shape[2] if padded else x.shape[2] - 2, x.shape[3])
        inner = x.shape[1] == len(conv.bias) == model.features
        pixels += inner * math.prod(size)
        return x.new_empty(1, len(conv.bias), *size) if add is None else add

    convolve, Convolution.__call__ = Convolution.__call__, count
    try:
        super_resolve(model, np.zeros((side, side), np.float32))
    finally:
        Convolution.__call__ = convolve
    return pixels / ((model.depth - 2) * side**2)


def uneven(seconds: Sequence[float]) -> float:
    """The worst departure from the median, in percent."""
    return 100 * max(abs(s / statistics.median(seconds) - 1) for s in seconds)


def shares(U: int, side: int, features: int, images: int) -> Callable[[], Any]:
    """A share of `images` images at each call, in the strips of evaluate.py and upscale.py."""
    x, ours = np.random.default_rng(0).random((side, side), np.float32), network(U, "batch", features).eval()
    endless = (super_resolve_strips(ours, lambda a, b: x[a:b], x.shape) for _ in itertools.count())
    strips, done, due = itertools.chain.from_iterable(endless), 0, 0.0

    def run() -> None:
        nonlocal done, due
        due += images * side / SHARES
        while done < due:
            done += len(next(strips))

    return synchronised(run)


def tiled(side: int, features: int) -> Callable[[], Any]:
    x, ours = np.zeros((side, side), np.float32), network(1, "batch", features).eval()
    x += 0.5  # allocates its pages before the count begins
    super_resolve(ours, x[:40, :40])
    tile = max(SIZES["growth"][0]) // 8
    return lambda: super_resolve(ours, x, tile=tile)


def engines(sizes: dict[str, Any]) -> Iterator[Row]:
    """Against OpenVINO and ONNX Runtime, if installed (tests/bench_engines.py)."""
    import bench_engines

    yield from bench_engines.engines(sizes)


def threads(sizes: dict[str, Any]) -> Iterator[Row]:
    """The number of threads that commands choose by default (tests/bench_threads.py)."""
    import bench_threads

    yield from bench_threads.threads(sizes)


def gpu(sizes: dict[str, Any]) -> Iterator[Row]:
    """Training and inference on a GPU (tests/bench_gpu.py); without one, tiny sizes and meaningless numbers."""
    import bench_gpu

    for what, value, unit, target, detail in bench_gpu.gpu():
        yield Row(what, value, unit, target if DEVICE == "cuda" else "", detail)


PARTS = (startup, patches, training, inference, engines, evaluation, threads, memory, growth)


def main(names: list[str], sizes: dict[str, Any], folder: Path) -> list[Row]:
    """Measure, print, write bench.json and bench.md.

    Raises:
        SystemExit: a name that is no part.
    """
    parts = {part.__name__: part for part in (*PARTS, gpu)}
    if unknown := set(names) - set(parts):
        sys.exit(f"bench: {unknown.pop()!r} is none of {', '.join(parts)}")
    started = time.monotonic()
    rows: list[Row] = []
    for name in names or [part.__name__ for part in PARTS] + ["gpu"] * (DEVICE == "cuda"):
        try:
            for row in parts[name](sizes):
                rows.append(row)
                said = f"{row.what}: {row.value:.3g} {row.unit}  ({row.target})  {row.detail}"
                print(f"{row.verdict():4}  {said}", flush=True)
        except Exception as error:  # no images, no network: the other parts still count
            print(f"{name} could not be measured: {type(error).__name__}: {error}", flush=True)
            rows.append(Row(f"{name}: not measured", float("nan"), "", "", f"{type(error).__name__}: {error}"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {DEVICE}"
    facts = {"torch": torch.__version__, "machine": machine, "load": os.getloadavg()}
    facts["seconds"] = round(time.monotonic() - started)
    lines = ["| what | measured | target | | in detail | spread |", "| --- | ---: | ---: | --- | --- | ---: |"]
    for r in rows:
        spread = "" if r.spread is None else f"{100 * r.spread:.0f} %"
        lines.append(f"| {r.what} | {r.value:.3g} {r.unit} | {r.target} | {r.verdict()} | {r.detail} | {spread} |")
    from drrn.disk import write_json, write_whole

    folder.mkdir(parents=True, exist_ok=True)
    content = "\n".join([f"`make bench`: {json.dumps(facts)}", "", *lines, ""])
    write_whole(folder / "bench.md", lambda partial: partial.write_text(content))
    write_json(folder / "bench.json", {**facts, "rows": [{**r._asdict(), "verdict": r.verdict()} for r in rows]})
    print(f"{folder / 'bench.md'}, {facts['seconds']} s")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:], SIZES, ROOT / "report")
