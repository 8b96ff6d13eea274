"""What a sweep will cost before it starts, and what became of its points when it ends.

Operations and memory are counted, seconds are measured: a few real optimiser steps of the cheapest and of the
costliest point, on this machine, and a straight line in the operations for the points between. What a point is
(new, finished, to be resumed, failed before) is read from the records, which every launcher leaves behind.
"""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from drrn import Refusal
from drrn.config import Config, ModelConfig, run_dir, structure_name
from drrn.records import FILE, finished_record, read_record

MORE = 0.2  # seconds: a timed step is made longer (a larger batch, a larger image) until it takes so many
PATIENCE = 4.0  # seconds: no further step is timed then
SHARE = 100  # a sweep of fewer steps than this many times the timed ones is not worth timing
TIMED = 5  # steps timed at a point; the fastest counts, the others were disturbed


@dataclass
class Point:
    """One run of a sweep, and its cost.

    `before` is "new", "finished", "resume" or "failed"; `first` the step from which it goes on. `seconds` and
    `bytes` are None where they could not be estimated. `apart` is what tells it from points of the same structure
    and seed.
    """

    config: Config
    before: str
    first: int
    depth: int
    conv_weights: int
    operations: float
    seconds: float | None = None
    bytes: int | None = None
    apart: str = ""

    @property
    def name(self) -> str:
        """`DRRN_B1U9 s1`, and the structure too where the run has a name of its own."""
        name = f"{structure_name(self.config.model)} s{self.config.seed} {self.apart}".rstrip()
        return name if self.config.name is None else f"{self.config.name} ({name})"

    @property
    def steps(self) -> int:
        """Optimiser steps that are left; of a run measured in epochs none are known before its data is."""
        if self.before == "finished" or self.config.trainer.max_epochs is not None:
            return 0
        return max(0, self.config.trainer.max_steps - self.first)


def look(config: Config) -> Point:
    """A point as its records and checkpoints say it is now; nothing is estimated yet."""
    import torch

    from drrn.model import DRRN

    folder = run_dir(config)
    before, first = "new", 0
    if finished_record(folder) is not None:
        before = "finished"
    elif (record := record_of(folder)) is not None:
        if config.ckpt_path is not None:  # null starts afresh
            checkpoints = sorted(folder.glob("checkpoints/step*.ckpt"))
            first = int(checkpoints[-1].stem.removeprefix("step")) if checkpoints else 0
        before = "failed" if record.get("status") == "failed" else "resume"
    with torch.device("meta"):
        network = DRRN(**asdict(config.model))
    return Point(config, before, first, network.depth, network.conv_weight_count, operations(config))


def record_of(folder: Path) -> dict[str, Any] | None:
    """A run's record; None if there is none that can be read."""
    try:
        return read_record(folder / FILE)
    except Refusal:
        return None


# ---------------------------------------------------------------------- counted


def multiplications(model: ModelConfig) -> int:
    """Multiply-adds of the convolutions of Eq. 9 for one pixel; a shared convolution counts each time."""
    C, first = model.features, 9 * model.features  # f_b of the first block sees one channel
    of_a_block = 9 * C * C + model.U * 2 * 9 * C * C  # f_b, then U residual units of two convolutions
    return first + (of_a_block - 9 * C * C) + (model.B - 1) * of_a_block + 9 * C


def operations(config: Config) -> float:
    """Floating-point operations of an optimiser step: a multiply-add is two, backward is twice forward."""
    data = config.data
    return 2.0 * 3 * multiplications(config.model) * data.patch_size**2 * data.batch_size


def micro_batch(config: Config) -> int:
    """Pairs that one device holds at a time: the batch over devices and accumulation, as far as numbers say."""
    trainer = config.trainer
    devices = trainer.devices if isinstance(trainer.devices, int) and trainer.devices > 0 else 1
    return max(1, config.data.batch_size // (trainer.accumulate_grad_batches * devices * trainer.num_nodes))


def count_bytes(config: Config) -> int:
    """Bytes of all tensors that are alive at the peak of an optimiser step, on one device.

    The real network takes the step with tensors that have shapes and no contents, so this costs a second
    whatever the network's size, and sees what autocast and checkpointing change.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    from drrn.module import SuperResolution, euclidean_loss

    class Alive(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0
            self.known: weakref.WeakSet = weakref.WeakSet()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in tree_iter(result):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                    storage = tensor.untyped_storage()
                    self.known.add(storage)
                    weakref.finalize(storage, self.freed, storage.nbytes()).atexit = False
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
            return result

        def freed(self, size: int) -> None:
            self.now -= size

    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.trainer.precision)
    with FakeTensorMode(), Alive() as alive:
        network = SuperResolution(asdict(config.model), asdict(config.optim)).network
        network.checkpointing = config.checkpointing
        x = torch.rand(micro_batch(config), 1, config.data.patch_size, config.data.patch_size)
        with torch.autocast("cpu", half, enabled=half is not None):
            prediction = network(x)
        euclidean_loss(prediction, x).backward()
    weights = sum(p.numel() for p in network.parameters()) * 4
    return alive.peak + weights * (2 if config.optim.algorithm == "adam" else 1)  # momentum, Adam's second moment


# ---------------------------------------------------------------------- measured


@dataclass
class Speed:
    """Measured on this machine for one point: seconds an optimiser step, operations a second in evaluation."""

    step: float
    evaluation: float


def measure(config: Config, threads: int | None = None) -> Speed:
    """Time a few optimiser steps of a configuration on random pairs: the real module, optimiser, precision, device.

    Where a step of the whole batch takes longer than `MORE` seconds, smaller batches are timed and scaled up.

    Args:
        config: what to time. Of several devices one is timed, with its share of the batch.
        threads: CPU threads to compute with, as many as a job of the sweep will have.

    Raises:
        Refusal: this machine does not have what `trainer.*` asks for, or not the memory.
    """
    import torch
    from lightning.pytorch import Callback, LightningDataModule, Trainer
    from torch.utils.data import DataLoader, Dataset

    from drrn.module import SuperResolution

    trainer, p = config.trainer, config.data.patch_size
    micro = micro_batch(config)

    class RandomPairs(Dataset):
        size = micro if trainer.compile else min(4, micro)  # every size would be compiled

        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.rand(self.size, 1, p, p)
            return x, x

    class Data(LightningDataModule):
        def evaluation_tasks(self, stage: str) -> list:
            return []

        def train_dataloader(self) -> DataLoader:
            return DataLoader(pairs, batch_size=None)

    class Clock(Callback):
        """Doubles the batch until a step takes `MORE` seconds or is whole, then times `TIMED` more of that size."""

        def __init__(self) -> None:
            self.timed: list[float] = []  # of steps of the present size; the first prepares its kernels
            self.end = time.perf_counter() + PATIENCE

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            self.start = now(trainer.strategy.root_device)

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.timed.append(now(trainer.strategy.root_device) - self.start)
            if len(self.timed) == 2 and min(self.timed) < MORE and pairs.size < micro:
                pairs.size, self.timed = min(2 * pairs.size, micro), []
            late = time.perf_counter() > self.end and len(self.timed) > 1
            trainer.should_stop = late or len(self.timed) > TIMED

    pairs, clock = RandomPairs(), Clock()
    optim = replace(config.optim, lr=1e-12)  # random pairs teach nothing: the weights stay where they are
    with threads_of(threads), quiet():
        module = SuperResolution(asdict(config.model), asdict(optim), 10_000, 10_000)
        module.network.checkpointing = config.checkpointing
        if trainer.channels_last:
            module.network.to(memory_format=torch.channels_last)
        if trainer.compile:
            module.network.compile_units()
        try:
            Trainer(
                accelerator=trainer.accelerator,
                devices=1,
                precision=trainer.precision,
                deterministic=trainer.deterministic,
                max_epochs=-1,
                max_steps=10_000,
                logger=False,
                callbacks=[clock],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            ).fit(module, datamodule=Data())
            step = min(clock.timed) * micro / pairs.size * trainer.accumulate_grad_batches
            return Speed(step, evaluation_speed(module, config))
        except (RuntimeError, ValueError, TypeError, ImportError) as error:  # Lightning's and torch's own kinds
            raise Refusal(str(error).split("\n")[0]) from error


def evaluation_speed(module: Any, config: Config) -> float:
    """Operations a second of the network on whole images in float32: larger ones until one takes `MORE` seconds."""
    import torch

    side, best = 32, 0.0
    device = module.device
    module.eval()
    with torch.no_grad():
        while best < MORE and side < 512:
            side *= 2
            x = torch.rand(1, 1, side, side, device=device)
            times = []
            for _ in range(3):
                start = now(device)
                module.network(x)
                times.append(now(device) - start)
            best = min(times)
    return 2 * multiplications(config.model) * side**2 / best


def now(device: Any) -> float:
    """The time when a device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def threads_of(threads: int | None) -> Iterable[None]:
    """Compute with so many threads; None leaves it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterable[None]:
    """Lightning's notices belong to the runs."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def evaluation_pixels(config: Config, first: int) -> int:
    """Pixels that the network sees in the validations after step `first` and in the final evaluation.

    A set that is not here yet counts 0: nothing is downloaded for a plan.
    """
    from PIL import Image

    from drrn.images import FETCHED_SETS, image_files

    data, trainer, pixels = config.data, config.trainer, 0
    validations = trainer.max_steps // trainer.val_check_interval - first // trainer.val_check_interval
    for name in data.val:
        if name in FETCHED_SETS and not (Path(data.root) / name).is_dir():
            continue
        for file in image_files(name, Path(data.root), complete=False):
            with Image.open(file) as image:
                pixels += image.width * image.height
    return pixels * (validations * len(data.val_scales) + len(data.scales))


# ---------------------------------------------------------------------- the plan


@dataclass
class Plan:
    """The points of a sweep, how many are worked on at a time, and why there are no estimates."""

    points: list[Point]
    workers: int
    note: str

    @property
    def seconds(self) -> float | None:
        """Until the last point is done; None if it is not known."""
        seconds = [point.seconds for point in self.points]
        if None in seconds:
            return None
        return max(sum(seconds) / self.workers, *seconds, 0)


def make_plan(
    configs: Sequence[Config], workers: int = 1, threads: int | None = None, always: bool = False
) -> Plan:
    """The points of a sweep and their cost.

    Args:
        configs: the checked configurations of the points.
        workers: points at a time.
        threads: CPU threads that each of them has; None for all.
        always: estimate time and memory even if that takes longer than a small share of the sweep.
    """
    points = [look(config) for config in configs]
    work = [point for point in points if point.before != "finished"]
    for point in points:
        if point.before == "finished":
            point.seconds, point.bytes = 0.0, 0
    if any(point.config.trainer.max_epochs is not None for point in work):
        note = "trainer.max_epochs: the steps are known when the patches are there, so no time is estimated"
    elif not always and sum(point.steps for point in work) < SHARE * (TIMED + 3):
        return Plan(points, workers, "too short to be worth estimating; plan=only does it" if work else "")
    else:
        note = estimate(work, threads)
    counted: dict[str, int] = {}
    for point in work:
        c = point.config
        of_a_step = (c.checkpointing, micro_batch(c), c.data.patch_size, c.trainer.precision, c.optim.algorithm)
        key = repr((c.model, *of_a_step))
        if key not in counted:
            counted[key] = count_bytes(c)
        point.bytes = counted[key]
    return Plan(points, workers, note)


def estimate(work: list[Point], threads: int | None) -> str:
    """Fill in the seconds of points: the cheapest and the costliest are timed, a line joins them.

    Returns:
        Why there are none; "" where there are.
    """
    if not work:
        return ""
    ends = sorted(work, key=lambda point: point.operations)
    cheap, dear = ends[0], ends[-1]
    try:
        at_dear = measure(dear.config, threads)
        at_cheap = measure(cheap.config, threads) if cheap.operations < dear.operations else at_dear
    except Refusal as error:
        return f"not timed on this machine: {error}"
    span = dear.operations - cheap.operations
    slope = (at_dear.step - at_cheap.step) / span if span else 0.0
    for point in work:
        step = at_cheap.step + slope * (point.operations - cheap.operations)
        work_of_evaluation = 2 * multiplications(point.config.model) * evaluation_pixels(point.config, point.first)
        point.seconds = point.steps * step + work_of_evaluation / at_dear.evaluation
    return ""


STATES = {
    "new": "new",
    "finished": "finished: skipped",
    "resume": "to be resumed",
    "failed": "failed before: again",
}


def print_plan(plan: Plan) -> None:
    """The plan as a table on the standard output."""
    table = Table(title="Plan", title_justify="left")
    for heading in ("point", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("d", "k", "operations/step", "steps", "time", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in plan.points:
        state = STATES[point.before] + (f" at {point.first:,}" if point.before == "resume" else "")
        table.add_row(
            Text(point.name), state, str(point.depth), f"{point.conv_weights:,}", scaled(point.operations),
            "by epochs" if point.config.trainer.max_epochs is not None else f"{point.steps:,}",
            span_of_time(point.seconds), "–" if point.bytes is None else f"{point.bytes / 1e9:.2f} GB",
        )  # fmt: skip
    console().print(table)
    states = [point.before for point in plan.points]
    parts = [f"{states.count(state)} {text}" for state, text in STATES.items() if state in states]
    print(f"{len(plan.points)} points: {', '.join(parts)}. {plan.workers} at a time.")
    if plan.seconds is not None:
        most = sorted((point.bytes or 0 for point in plan.points), reverse=True)[: plan.workers]
        print(
            f"In all about {span_of_time(plan.seconds)}, and {sum(most) / 1e9:.2f} GB at a time, on machines like "
            "this one."
        )
    if plan.note:
        print(f"Time and memory: {plan.note}.")
    print(
        "k: convolution weights. Operations: multiply-adds × 2 × 3 (forward and backward). Time: from a few\n"
        "real steps and images here. Memory: the tensors of a step, counted; the process has about 0.5 GB\n"
        "besides, and on a CPU its allocator may hold up to twice the tensors.\n"
    )


def console() -> Console:
    """The terminal at its width; a file or pipe at 130 columns, where rich would assume 80."""
    out = Console()
    return out if out.is_terminal else Console(width=130)


def scaled(number: float) -> str:
    """1.5e12 → "1.50 T"."""
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.2f} {letter}"
    return f"{number:.0f}"


def span_of_time(seconds: float | None) -> str:
    """3700 → "1 h 02 min"; None → "–"."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 2880 else f"{minutes / 1440:.1f} days"


# ---------------------------------------------------------------------- what became of it

ELSEWHERE = "is being trained by another process"  # train.py's words when a run's folder is locked


def outcome(point: Point, touched: bool, error: str) -> tuple[str, str]:
    """What became of a point: a word for the table, and the reason where there is one.

    Args:
        point: as it was before the sweep.
        touched: its record was written during the sweep.
        error: what the launcher brought back from the job; "" for nothing.

    Returns:
        ("done" | "skipped" | "resumed" | "retried" | "stopped" | "interrupted" | "failed" | "elsewhere" |
        "not started", reason).
    """
    folder = run_dir(point.config)
    record = record_of(folder) or {}
    if point.before == "finished":
        return "skipped", "was finished"
    if ELSEWHERE in error:
        return "elsewhere", error
    if finished_record(folder) is not None:
        word = {"resume": "resumed", "failed": "retried"}.get(point.before, "done")
        return word, f"from step {point.first:,}" if point.first else ""
    if touched and record.get("status") == "stopped" and not stopped_by_hand(record.get("error", "")):
        return "stopped", f"after {record.get('budget', {}).get('steps', '?')} steps; the same command goes on"
    if touched and record.get("status") == "failed" and not stopped_by_hand(record.get("error", "")):
        return "failed", record.get("error", "")
    if error and not stopped_by_hand(error):
        return "failed", error
    if touched or (error and "before this point began" not in error):
        return "interrupted", "the same command goes on"
    return "not started", ""


def stopped_by_hand(error: str) -> bool:
    """Whether an error, as a record or a launcher has it, is Ctrl-C's or a signal's."""
    return error.startswith(("KeyboardInterrupt", "SystemExit", "SIG", "Ended"))


def print_outcomes(rows: list[tuple[Point, str, str]], folder: Path) -> None:
    """The closing table: every point, what became of it, and why."""
    table = Table(title="What became of it", title_justify="left")
    table.add_column("point", overflow="fold")
    table.add_column("outcome", no_wrap=True)
    table.add_column("", overflow="fold")
    for point, word, reason in rows:
        table.add_row(Text(point.name), word, Text(reason))  # Text: brackets in it are no markup
    console().print(table)
    words = [word for _, word, _ in rows]
    good = sum(words.count(word) for word in ("done", "skipped", "resumed", "retried"))
    print(f"{good} of {len(rows)} points done, under {folder}")
