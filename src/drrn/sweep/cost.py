"""What a point costs: operations and bytes counted, seconds measured."""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from drrn.config import Config, ModelConfig
from drrn.errors import UserError

MORE = 0.2  # seconds: a timed step is made longer (a larger batch, a larger image) until it takes so many
PATIENCE = 4.0  # seconds: no further step is timed then
TIMED = 5  # steps timed at a point; the fastest counts, the others were disturbed


# ---------------------------------------------------------------------- counted


COUNTED: dict[str, Counts] = {}


@dataclass(frozen=True)
class Counts:
    """A network's depth and convolution weights; floating-point operations for one pixel, a multiply-add is two:
    of its output, and of an optimiser step."""

    depth: int
    conv_weights: int
    output: float
    step: float


def count(model: ModelConfig) -> Counts:
    """The counts of a network, of which only the shapes are made; once for each structure."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from drrn.layers import conv_weights
    from drrn.networks import on_paper

    if repr(model) not in COUNTED:
        network, x = on_paper(model), torch.rand(1, 1, 32, 32, device="meta")
        with FlopCounterMode(display=False) as forward:
            pixels = network.eval()(x).numel()
        with FlopCounterMode(display=False) as step:
            network.train()(x).sum().backward()
        counted = (forward.get_total_flops() / pixels, step.get_total_flops() / pixels)
        COUNTED[repr(model)] = Counts(network.depth, conv_weights(network), *counted)
    return COUNTED[repr(model)]


def operations(config: Config) -> float:
    """Floating-point operations of an optimiser step: forward, and backward for weights and inputs."""
    from drrn.networks import pair_sides

    _, side = pair_sides(config.model, config.data.patch_size)
    return count(config.model).step * side**2 * config.data.batch_size


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

    from drrn.fast.training import InTraining
    from drrn.module import SuperResolution
    from drrn.networks import pair_sides, structure

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

    sides = pair_sides(config.model, config.data.patch_size)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.trainer.precision)
    with FakeTensorMode(), Alive() as alive:
        module = SuperResolution(structure(config.model), asdict(config.optim))
        trained = InTraining(module.network, checkpointing=config.speed.checkpointing)
        x, truth = (torch.rand(micro_batch(config), 1, side, side) for side in sides)
        with torch.autocast("cpu", half, enabled=half is not None):
            prediction = trained(x)
        module.loss(prediction, truth).backward()
    weights = sum(p.numel() for p in module.network.parameters()) * 4
    return alive.peak + weights * (1 if config.optim.algorithm == "sgd" else 2)  # momentum, Adam's second moment


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
        UserError: this machine does not have what `trainer.*` asks for, or not the memory.
    """
    import torch
    from lightning.pytorch import Callback, LightningDataModule, Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from torch.utils.data import DataLoader, Dataset

    from drrn.module import SuperResolution
    from drrn.networks import pair_sides, structure

    trainer, sides = config.trainer, pair_sides(config.model, config.data.patch_size)
    micro = micro_batch(config)

    class RandomPairs(Dataset):
        size = micro if config.speed.compile is True else min(4, micro)  # every size would be compiled

        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            x, truth = (torch.rand(self.size, 1, side, side) for side in sides)
            return x, truth

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
        module = SuperResolution(structure(config.model), asdict(optim), 10_000, 10_000)
        module.compiled, module.checkpointing = config.speed.compile, config.speed.checkpointing
        if trainer.channels_last:
            module.network.to(memory_format=torch.channels_last)
        try:
            _trainer(config, clock).fit(module, datamodule=Data())
            step = min(clock.timed) * micro / pairs.size * trainer.accumulate_grad_batches
            return Speed(step, evaluation_speed(module, config))
        except (MisconfigurationException, RuntimeError, ValueError, TypeError, ImportError) as error:
            raise UserError(str(error).split("\n")[0]) from error


def _trainer(config: Config, clock: Any) -> Any:
    """Lightning's, for as long as `clock` says, on one device; nothing is written or shown."""
    from lightning.pytorch import Trainer

    return Trainer(
        accelerator=config.trainer.accelerator,
        devices=1,
        precision=config.trainer.precision,
        deterministic=config.trainer.deterministic,
        max_epochs=-1,
        max_steps=10_000,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


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
                y = module.network(x)
                times.append(now(device) - start)
            best = min(times)
    return count(config.model).output * y.numel() / best


def now(device: Any) -> float:
    """The time when a device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def threads_of(threads: int | None) -> Iterator[None]:
    """Compute with so many threads; None leaves it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
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

    from drrn.sets import image_files, is_absent

    data, trainer = config.data, config.trainer

    def pixels(sets: list[str]) -> int:
        total = 0
        for name in sets:
            if is_absent(name, Path(data.root)):
                continue
            for file in image_files(name, Path(data.root), complete=False):
                with Image.open(file) as image:
                    total += image.width * image.height
        return total

    validations = trainer.max_steps // trainer.val_check_interval - first // trainer.val_check_interval
    return pixels(data.val) * validations * len(data.val_scales) + pixels(data.test_sets) * len(data.scales)
