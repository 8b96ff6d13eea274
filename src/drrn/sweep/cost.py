"""The cost of a run: bytes are counted, seconds are measured."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from drrn.config import Config
from drrn.errors import UserError
from drrn.fast.memory import TensorBytes
from drrn.fast.training import InTraining, worth_compiling
from drrn.images import image_size
from drrn.module import SuperResolution
from drrn.networks import count, pair_sides
from drrn.optimisers import configured
from drrn.runs.lightning import quiet_lightning
from drrn.sets import image_files, is_absent

MORE = 0.2  # seconds: the batch or image is enlarged until a step takes at least this
PATIENCE = 4.0  # seconds: after them no further step is timed
TIMED = 5  # steps timed for a run; the fastest counts, since the others were disturbed


def micro_batch(config: Config) -> int:
    """Pairs in one forward pass on one device: the batch divided by devices (1 if not a number) and accumulation."""
    trainer = config.trainer
    devices = trainer.devices if isinstance(trainer.devices, int) and trainer.devices > 0 else 1
    return max(1, config.data.batch_size // (trainer.accumulate_grad_batches * devices * trainer.num_nodes))


def count_bytes(config: Config) -> int:
    """Peak bytes of all tensors in an optimiser step, on one device.

    The real network runs the step on fake tensors (shapes without values), so this takes about a second for a network
    of any size, and includes the effects of autocast and checkpointing.
    """
    sides = pair_sides(config.model, config.data.patch_size)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.trainer.precision)
    with FakeTensorMode(), TensorBytes() as alive:
        module = SuperResolution(config.model, asdict(config.optim))
        trained = InTraining(module.network, checkpointing=config.speed.checkpointing)
        x, truth = (torch.rand(micro_batch(config), 1, side, side) for side in sides)
        with torch.autocast("cpu", half, enabled=half is not None):
            prediction = trained(x)
        module.loss(prediction, truth).backward()
    weights = sum(p.numel() for p in module.network.parameters()) * 4
    return alive.peak + weights * (1 if config.optim.algorithm == "sgd" else 2)  # momentum, Adam's second moment


@dataclass
class Speed:
    """Measured on this machine for one run: seconds per optimiser step, operations per second in evaluation."""

    step: float
    evaluation: float


def measure(config: Config, threads: int | None = None) -> Speed:
    """Time a few optimiser steps on random pairs: the real network, loss, solver, precision and device.

    The batch is doubled until a step takes `MORE` seconds or the batch is whole; a smaller batch's time is scaled up.

    Args:
        config: the run to time. Of several devices one is timed, with its share of the batch.
        threads: CPU threads of a job of the sweep; None: torch's.

    Raises:
        UserError: this machine lacks the device or precision of `trainer.*`, or the memory.
    """
    trainer, speed, whole = config.trainer, config.speed, micro_batch(config)
    sides = pair_sides(config.model, config.data.patch_size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with quiet_lightning():
            fabric = Fabric(accelerator=trainer.accelerator, devices=1, precision=trainer.precision)
        module = SuperResolution(config.model, asdict(config.optim))
        network, device = fabric.setup_module(module.network).module, fabric.device
        if trainer.channels_last:
            network.to(memory_format=torch.channels_last)
        optim = replace(config.optim, lr=1e-12)  # random pairs must not change the weights
        optimiser, _ = configured(network, optim, 1, 1, fused=device.type in ("cpu", "cuda"))
        kind = next(network.parameters()).dtype
        compiled = speed.compile
        if compiled == "auto":
            compiled = worth_compiling(network, torch.empty(0, device=device))
        trained = InTraining(network, compiled, speed.checkpointing)

        def step(size: int) -> float:
            x, truth = (torch.rand(size, 1, side, side, device=device, dtype=kind) for side in sides)
            start = now(device)
            with fabric.autocast():
                prediction = trained(x)
            module.loss(prediction, truth).backward()
            optimiser.step()
            optimiser.zero_grad()
            trained.statistics.clear()
            return now(device) - start

        end = time.perf_counter() + PATIENCE
        size = whole if compiled else min(4, whole)  # each size would be compiled anew
        step(size)  # warm-up
        while size < whole and step(size) < MORE:
            size = min(2 * size, whole)
            step(size)
        times = [step(size)]
        while len(times) < TIMED and time.perf_counter() < end:
            times.append(step(size))
        seconds = min(times) * whole / size * trainer.accumulate_grad_batches
        return Speed(seconds, evaluation_speed(network, config, device))
    except (MisconfigurationException, RuntimeError, ValueError, TypeError, ImportError) as error:
        raise UserError(str(error).split("\n")[0]) from error
    finally:
        torch.set_num_threads(before)


def evaluation_speed(network: nn.Module, config: Config, device: torch.device) -> float:
    """Operations per second of the network on whole images in float32, enlarged until one takes `MORE` seconds."""
    side, best = 32, 0.0
    network.float().eval()
    with torch.no_grad():
        while best < MORE and side < 512:
            side *= 2
            x = torch.rand(1, 1, side, side, device=device)
            marks = [now(device)]
            for _ in range(3):
                y = network(x)
                marks.append(now(device))
            best = min(end - start for start, end in pairwise(marks))
    return count(config.model).output * y.numel() / best


def now(device: torch.device) -> float:
    """The clock, in seconds, once a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def evaluation_pixels(config: Config, first: int) -> int:
    """Pixels that the network sees in the validations after step `first` and in the final evaluation.

    A missing set counts 0: a plan downloads nothing.
    """
    data, trainer, root = config.data, config.trainer, Path(config.data.root)

    def pixels(sets: list[str]) -> int:
        there = [name for name in sets if not is_absent(name, root)]
        return sum(prod(image_size(file)) for name in there for file in image_files(name, root, complete=False))

    validations = trainer.max_steps // trainer.val_check_interval - first // trainer.val_check_interval
    return pixels(data.val) * validations * len(data.val_scales) + pixels(data.test_sets) * len(data.scales)
