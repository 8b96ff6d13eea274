"""The GPU part of the bench: `python tests/bench.py gpu`, at most five minutes on one card.

It needs PyTorch, Lightning and the project's own dependencies, no W&B and no network; images are those of DRRN_DATA,
or noise. Rows come in the order of their importance; a row without time left says so. Without a GPU it runs with tiny
sizes, and its numbers mean nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from drrn.fast.training import InTraining, Latch
from drrn.inference import super_resolve
from drrn.losses import euclidean
from drrn.model import DRRN

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SIZES: dict[str, Any] = (
    {"U": 9, "features": 128, "batch": 128, "rounds": 5, "steps": 30, "side": 288, "fit": 1600, "every": 400}
    if GPU
    else {"U": 1, "features": 2, "batch": 2, "rounds": 2, "steps": 1, "side": 24, "fit": 8, "every": 2}
)
BUDGET = 290.0  # seconds in all
CARDS = {"H200": (0.60, 0.72), "H100": (0.53, 0.65)}  # share of the convolutions' rate, with BatchNorm and without
VARIANTS: dict[str, tuple] = {  # arguments of `raw_step`
    "no BatchNorm, biases apart": ("none", True, None, "BiasApart"),
    "BatchNorm image by image, biases apart": ("batch", True, None, "ByImage", "BiasApart"),
    "BatchNorm and biases image by image": ("batch", True, None, "ByImage", "BiasByImage"),
    "BatchNorm image by image": ("batch", True, None, "ByImage"),
    "BatchNorm written out": ("batch", True, None, "WrittenOut"),
    "BatchNorm by the library": ("batch", True, None, "Library"),
    "reduce-overhead": ("batch", True, "reduce-overhead"),
    "no BatchNorm, reduce-overhead": ("none", True, "reduce-overhead"),
}
Row = tuple[str, float, str, str, str]  # what, value, unit, target, detail


# ---------------------------------------------------------------------- timing


def seconds(run: Callable[[], Any], sizes: dict[str, Any]) -> list[float]:
    """Seconds of a call in each round, many calls a round, after one that warms up; the GPU's work included."""
    times = []
    for number in range(sizes["rounds"] + 1):
        count = sizes["steps"] if number else max(3, sizes["steps"] // 4)
        synchronise()
        start = time.perf_counter()
        for _ in range(count):
            run()
        synchronise()
        if number:
            times.append((time.perf_counter() - start) / count)
    return times


def synchronise() -> None:
    if GPU:
        torch.cuda.synchronize()


def autocast(on: bool = True) -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=on)


# ---------------------------------------------------------------------- what is timed


def convolutions(sizes: dict[str, Any]) -> Callable[[], Any]:
    """The convolutions features → features of the units alone, forward and both gradients, as one CUDA graph."""
    C, n = sizes["features"], 2 * sizes["U"]
    layout = torch.channels_last
    H = torch.randn(sizes["batch"], C, 31, 31, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=layout)
    W = torch.randn(C, C, 3, 3, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=layout)

    def run() -> None:
        for _ in range(n):
            y = F.conv2d(H, W, padding=1)
            torch.ops.aten.convolution_backward(
                y, H, W, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
            )

    if not GPU:
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    synchronise()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class WrittenOut(nn.BatchNorm2d):
    """A batch's BatchNorm written out: one pass for the statistics, one for the rest."""

    def average(self, values: Tensor) -> Tensor:
        """The average of each channel, [N, C, H, W] → [C]."""
        return values.mean((0, 2, 3))

    def spread(self, values: Tensor, n: int) -> Tensor:
        """[C] → factors for the maps of n images; the gradient is a sum like that of `average`."""
        return values[:, None, None]

    def forward(self, H: Tensor) -> Tensor:
        wide = H.float()
        mean, square = self.average(wide), self.average(wide.square())
        variance = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            count = H.numel() // H.shape[1]
            self.running_mean.copy_(mean)
            self.running_var.copy_(variance * (count / (count - 1)))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (wide * self.spread(scale, len(H)) + self.spread(shift, len(H))).to(H.dtype)


class ByImage(WrittenOut):
    """The same, each sum in two stages: over an image, which is N · C independent sums, then over the batch."""

    def average(self, values: Tensor) -> Tensor:
        return values.mean((2, 3)).mean(0)

    def spread(self, values: Tensor, n: int) -> Tensor:
        return values.expand(n, -1)[:, :, None, None]


class BiasApart(nn.Conv2d):
    """A convolution whose bias is the compiler's to add, and its gradient the compiler's to sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = self._conv_forward(x, self.weight, None)
        return y + self.of_each(self.bias, len(y)).to(y.dtype)

    def of_each(self, bias: Tensor, n: int) -> Tensor:
        """[C] → what is added to the maps of n images."""
        return bias[:, None, None]


class BiasByImage(BiasApart):
    """The same, the gradient summed in two stages, as in `ByImage`."""

    def of_each(self, bias: Tensor, n: int) -> Tensor:
        return bias.expand(n, -1)[:, :, None, None]


@torch.library.custom_op("drrn_bench::batch_norm", mutates_args=())
def library_norm(H: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """cuDNN's BatchNorm (PyTorch's own on a CPU) as one operation that the compiler leaves alone."""
    y, mean, inverse = torch.native_batch_norm(H, gain, shift, None, None, True, 0.0, eps)
    return y, mean, inverse


@library_norm.register_fake
def _(H: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(H), torch.empty_like(gain), torch.empty_like(gain)


@torch.library.custom_op("drrn_bench::batch_norm_backward", mutates_args=())
def library_norm_backward(
    g: Tensor, H: Tensor, gain: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.native_batch_norm_backward(
        g.contiguous(memory_format=torch.channels_last), H, gain, None, None, mean, inverse, True, eps,
        [True, True, True],
    )  # fmt: skip


@library_norm_backward.register_fake
def _(g: Tensor, H: Tensor, gain: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(H), torch.empty_like(gain), torch.empty_like(gain)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    H, gain, _, ctx.eps = inputs
    ctx.save_for_backward(H, gain, output[1], output[2])


def _gradient(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    return (*library_norm_backward(g, *ctx.saved_tensors, ctx.eps), None)


library_norm.register_autograd(_gradient, setup_context=_keep)


class Library(nn.BatchNorm2d):
    """BatchNorm of a batch through `library_norm`."""

    def forward(self, H: Tensor) -> Tensor:
        y, mean, inverse = library_norm(H, self.weight, self.bias, self.eps)
        count = H.numel() // H.shape[1]
        with torch.no_grad():
            self.running_mean.copy_(mean)
            self.running_var.copy_((inverse.pow(-2) - self.eps) * (count / (count - 1)))
        return y


def raw_step(
    sizes: dict[str, Any], norm: str, compiled: bool = True, mode: str | None = None, *layers: str
) -> Callable[[], Any]:
    """Forward, loss, backward, clipping and solver on tensors on the GPU, like a step of training.

    Args:
        norm: of the network.
        compiled: through `torch.compile`.
        mode: its mode, if another than training's.
        layers: names of layers of this file to compile in place of PyTorch's.
    """
    torch.manual_seed(0)
    network = DRRN(1, sizes["U"], sizes["features"], norm).to(DEVICE, memory_format=torch.channels_last)
    trained = InTraining(network, compiled=False)
    for module in trained.run.modules():
        for layer in map(globals().get, layers):
            if issubclass(layer, type(module)):
                module.__class__ = layer
    if compiled and GPU:
        trained.run = torch.compile(trained.run, mode=mode, dynamic=False, fullgraph=True)
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
    latch = Latch(torch.device(DEVICE))
    x, truth = torch.rand(2, sizes["batch"], 1, 31, 31, device=DEVICE)

    def step() -> None:
        with autocast():
            prediction = trained(x)
        loss = euclidean(prediction, truth)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        good = latch.check(0, 1e-3, loss.detach(), norm)
        trained.follow(trained.statistics, [0.1] * len(trained.statistics), good)
        optimizer.found_inf = (~good).float()
        optimizer.step()

    return step


class Clock(Callback):
    """Writes the times of a run's events to a file; at a logged step it waits for the GPU."""

    def __init__(self, path: str, every: int) -> None:
        self.path, self.every = Path(path), every
        self.times: dict[str, list[float]] = {"start": [], "first": [], "logged": [], "validation": []}

    def note(self, what: str) -> None:
        synchronise()
        self.times[what].append(time.perf_counter())
        self.path.write_text(json.dumps(self.times))

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.note("start")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not self.times["first"]:
            self.note("first")
        elif trainer.global_step % self.every == 0:
            self.note("logged")

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.note("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.note("validation")


def through_train(folder: Path, name: str, norm: str, steps: int, sizes: dict[str, Any]) -> dict[str, list[float]]:
    """Times of a run of src/train.py with `Clock`."""
    images, validation = data_sets(folder, sizes)
    path, every = folder / f"{name}.json", sizes["every"]
    arguments = [
        "trainer=gpu" if GPU else "trainer=default", f"model.U={sizes['U']}", f"model.features={sizes['features']}",
        f"model.norm={norm}", "optim=quick", "optim.lr=1e-4", f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={2 * every}", "trainer.checkpoint_every=1000000",
        f"trainer.log_every_n_steps={every}", f"data.batch_size={sizes['batch']}", "logger=none", "data.scales=[3]",
        f"data.train={images}", f"data.val={validation}", f"data.num_workers={4 if GPU else 0}",
        f"output={folder / name}", f"+callbacks.clock={{_target_: bench_gpu.Clock, path: {path}, every: {every}}}",
        f"data.root={os.environ.get('DRRN_DATA', folder)}",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "DRRN_PATCHES": str(folder / "patches"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    done = subprocess.run(
        [sys.executable, "src/train.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"train.py ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(path.read_text())


def data_sets(folder: Path, sizes: dict[str, Any]) -> tuple[str, str]:
    """Training and validation sets, as Hydra's overrides: the paper's, or folders of noise."""
    root = Path(os.environ.get("DRRN_DATA", "no/such"))
    if GPU and all((root / name).is_dir() for name in ("T91", "BSD200", "Set5")):
        return "[T91,BSD200]", "[Set5]"
    from PIL import Image

    for name, count, side in (
        ("noise", 40 if GPU else 2, 480 if GPU else 64),
        ("few", 5 if GPU else 1, sizes["side"]),
    ):
        (folder / name).mkdir(exist_ok=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (side, side), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return f"[{folder / 'noise'}]", f"[{folder / 'few'}]"


# ---------------------------------------------------------------------- the rows


def rate_row(what: str, times: list[float], best: float, target: float | None, batch: int) -> Row:
    """A step's rate as a share of the convolutions'."""
    middle = statistics.median(times)
    spread = 100 * (max(times) - min(times)) / middle
    detail = f"{1000 * middle:.3g} ms, {batch / middle:,.0f} pairs/s, spread {spread:.0f} %"
    return what, best / middle, "of the convolutions", "" if target is None else f"≥ {target}", detail


class Gpu:
    """The GPU part, in steps by importance; later steps use the measurements of earlier ones."""

    def __init__(self, sizes: dict[str, Any], folder: Path) -> None:
        self.sizes, self.folder, self.batch = sizes, folder, sizes["batch"]
        self.best = float("nan")  # seconds of the convolutions alone
        self.raw: dict[str, float] = {}  # seconds of a raw step, by norm

    def alone(self) -> Iterator[Row]:
        """The convolutions alone."""
        card = torch.cuda.get_device_name() if GPU else "no GPU: tiny, and worth nothing"
        self.best = statistics.median(seconds(convolutions(self.sizes), self.sizes))
        detail = f"{1000 * self.best:.3g} ms a step; {card}, PyTorch {torch.__version__}"
        yield "the convolutions alone", self.batch / self.best, "pairs/s", "", detail

    def step(self, norm: str) -> Iterator[Row]:
        """The raw step as in training."""
        card = torch.cuda.get_device_name() if GPU else ""
        targets = next((shares for name, shares in CARDS.items() if name in card), CARDS["H100"])
        times = seconds(raw_step(self.sizes, norm), self.sizes)
        self.raw[norm] = statistics.median(times)
        target = targets[0] if norm == "batch" else targets[1]
        yield rate_row(f"raw step, {name_of(norm)}", times, self.best, target, self.batch)

    def train(self, norm: str) -> Iterator[Row]:
        """A run of train.py."""
        run, every = through_train(self.folder, norm, norm, self.sizes["fit"], self.sizes), self.sizes["every"]
        validations = list(zip(run["validation"][::2], run["validation"][1::2], strict=True))
        between = [
            (end - start) / every
            for start, end in itertools.pairwise(run["logged"])
            if not any(start < at < end for at, _ in validations)
        ]
        a_step = statistics.median(between) if between else float("nan")
        detail = f"{1000 * a_step:.3g} ms, {self.batch / a_step:,.0f} pairs/s"
        share = self.raw.get(norm, float("nan")) / a_step
        yield f"through train.py, {name_of(norm)}", share, "of the raw step", "≥ 0.9", detail
        empty = run["first"][0] - run["start"][0]
        yield f"first step, an empty compiler cache, {name_of(norm)}", empty, "s", "≤ 60", "after the imports"
        took = [end - start for start, end in validations]
        detail = f"{data_sets(self.folder, self.sizes)[1]}; the first {took[0]:.3g} s"
        yield f"a validation, {name_of(norm)}", min(took), "s", "≤ 1", detail

    def again(self) -> Iterator[Row]:
        """The start of another run of the same network."""
        run = through_train(self.folder, "again", "batch", self.sizes["every"] // 2, self.sizes)
        yield "first step, a full compiler cache", run["first"][0] - run["start"][0], "s", "≤ 15", ""

    def variant(self, what: str, *arguments: Any) -> Iterator[Row]:
        """A variant of the raw step."""
        times = seconds(raw_step(self.sizes, *arguments), self.sizes)
        yield rate_row(f"raw step, {what}", times, self.best, None, self.batch)


def gpu(sizes: dict[str, Any] = SIZES) -> Iterator[Row]:
    """The rows (see the module's docstring); a step that fails, or has no time left, has a row that says so."""
    begun = time.monotonic()
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, True
    with tempfile.TemporaryDirectory() as name:
        part = Gpu(sizes, Path(name))
        steps: list[tuple[str, float, Callable[[], Iterator[Row]]]] = [  # name, seconds that it may take, rows
            ("the convolutions alone", 10, part.alone),
            ("raw step, BatchNorm", 60, lambda: part.step("batch")),
            ("through train.py, BatchNorm", 90, lambda: part.train("batch")),
            ("first step, a full compiler cache", 30, part.again),
            ("inference", 15, lambda: inference(sizes)),
            ("raw step, no BatchNorm", 40, lambda: part.step("none")),
            ("through train.py, no BatchNorm", 70, lambda: part.train("none")),
            ("raw step, eager", 10, lambda: part.variant("eager", "batch", False)),
            *[
                (f"raw step, {what}", 50, lambda what=what, arguments=arguments: part.variant(what, *arguments))
                for what, arguments in VARIANTS.items()
            ],
        ]
        for what, needed, rows in steps:
            if time.monotonic() + needed > begun + BUDGET:
                yield f"{what}: no time was left", float("nan"), "", "", ""
                continue
            try:
                yield from rows()
            except Exception as error:
                yield f"{what}: failed", float("nan"), "", "", f"{type(error).__name__}: {error}"[:1500]


def name_of(norm: str) -> str:
    return "BatchNorm" if norm == "batch" else "no BatchNorm"


def inference(sizes: dict[str, Any]) -> Iterator[Row]:
    """An image through `super_resolve` against the plain module, by the clock, in each precision."""
    side = sizes["side"]
    image = torch.rand(side, side, device=DEVICE)
    few = {**sizes, "steps": max(1, sizes["steps"] // 3)}
    torch.backends.cudnn.benchmark = False  # PyTorch's default; an image of a new size would be timed first
    for norm in ("batch", "none"):
        network = DRRN(1, sizes["U"], sizes["features"], norm).to(DEVICE).eval()
        for precision in ("float32", "tf32", "bf16") if GPU else ("float32", "bf16"):
            torch.backends.cudnn.allow_tf32 = precision == "tf32"

            @torch.inference_mode()
            def plain(network: nn.Module = network, coarse: bool = precision == "bf16") -> None:
                with autocast(coarse):
                    network(image[None, None])

            def ours(network: nn.Module = network, precision: str = precision) -> None:
                super_resolve(network, image, precision=precision)

            theirs, mine = (statistics.median(seconds(run, few)) for run in (plain, ours))
            what = f"{side}² in {precision}, {name_of(norm)}"
            detail = f"{1000 * mine:.3g} ms; plain module {1000 * theirs:.3g} ms"
            yield f"{what}: faster than plain", theirs / mine, "×", "≥ 1" if precision == "float32" else "", detail
            if precision == "bf16" and norm == "batch":
                yield what, 1000 * mine, "ms", "≤ 3", "the paper: 250 ms on a Titan X"
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, True
