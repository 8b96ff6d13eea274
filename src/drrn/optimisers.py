"""Optimisers and schedules by name (`optim.algorithm`, `optim.schedule`), or of another library by `_target_`.

To add one, write a line in its table. `optim.optimiser={_target_: torch.optim.RMSprop, alpha: 0.9}` and
`optim.scheduler={_target_: torch.optim.lr_scheduler.OneCycleLR, …}` name any Optimizer or LRScheduler instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from drrn.errors import UserError
from drrn.targets import make

if TYPE_CHECKING:  # a name is checked before torch is imported
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from drrn.config import OptimConfig

SECOND = 0.999  # Adam's second β; the first is optim.momentum

# Name → the class in torch.optim, and its arguments besides γ and the weight decay of all parameters (Sec. 4.2).
# PyTorch's SGD is v ← μv + g with the step γv; Caffe has γ in v: they differ only in the steps after a change of γ.
# Adam (Kingma and Ba 2015) adds the decay to the gradient; with AdamW (Loshchilov and Hutter 2019) the weights
# themselves decay, by γ · weight_decay a step.
OPTIMISERS: dict[str, tuple[str, Callable[[OptimConfig], dict[str, Any]]]] = {
    "sgd": ("SGD", lambda optim: {"momentum": optim.momentum}),
    "adam": ("Adam", lambda optim: {"betas": (optim.momentum, SECOND)}),
    "adamw": ("AdamW", lambda optim: {"betas": (optim.momentum, SECOND)}),
}

# Name → γ / optim.lr, a function of `optim`, the completed periods of `halve_every_…`, and the run's progress (0…1).
SCHEDULES: dict[str, Callable[[OptimConfig, int, float], float]] = {
    "halve": lambda optim, times, part: 0.5**times,  # Sec. 4.2
    "cosine": lambda optim, times, part: 0.5 * (1 + math.cos(math.pi * part)),  # Loshchilov and Hutter 2017
    "step": lambda optim, times, part: 0.1**times,  # as VDSR is trained (Sec. 4.1 of Kim et al. 2016)
}


def learning_rate_factor(optim: OptimConfig, step: int, steps_per_epoch: int, max_steps: int) -> float:
    """γ / optim.lr after `step` optimiser steps, with a linear warm-up over the first `optim.warmup_steps`."""
    every = optim.halve_every_steps or max(1, round((optim.halve_every_epochs or 1) * steps_per_epoch))
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    return warm * SCHEDULES[optim.schedule](optim, step // every, min(step / max_steps, 1))


def configured(
    network: nn.Module, optim: OptimConfig, steps_per_epoch: int, max_steps: int, fused: bool
) -> tuple[Optimizer, LRScheduler]:
    """The optimiser of a network and its schedule, which is updated at every step.

    Args:
        network: biases of its convolutions have `optim.bias_lr_mult` times the learning rate, its last convolution
            with its bias `optim.last_lr_mult` times.
        fused: whether PyTorch's fused kernels may be used.

    Raises:
        UserError: `optim.optimiser` or `optim.scheduler` names no such class, the class does not take its arguments,
            or the scheduler follows a metric.
    """
    import torch
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    rates = dict.fromkeys(network.parameters(), 1.0)  # relative to `optim.lr`
    rates |= {m.bias: optim.bias_lr_mult for m in convolutions if m.bias is not None}
    if optim.last_lr_mult != 1:
        rates |= dict.fromkeys(convolutions[-1].parameters(), optim.last_lr_mult)
    groups: list[dict[str, Any]] = [{"params": [p for p, rate in rates.items() if rate == 1]}]
    for mult in sorted(set(rates.values()) - {1.0}):
        groups.append({"params": [p for p, rate in rates.items() if rate == mult], "lr": optim.lr * mult})
    if optim.optimiser is not None:
        optimizer = make("optim.optimiser", optim.optimiser, Optimizer, groups, lr=optim.lr)
    else:
        name, own = OPTIMISERS[optim.algorithm]
        decay = optim.weight_decay
        optimizer = getattr(torch.optim, name)(groups, optim.lr, weight_decay=decay, fused=fused, **own(optim))
    if optim.scheduler is not None:
        schedule = make("optim.scheduler", optim.scheduler, LRScheduler, optimizer)
        if isinstance(schedule, ReduceLROnPlateau):
            name = type(schedule).__name__
            raise UserError(f"optim.scheduler: {name} follows a metric, and here schedules follow the step")
        return optimizer, schedule
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate_factor(optim, step, steps_per_epoch, max_steps))


def takes_found_inf(optimizer: Optimizer) -> bool:
    """Whether the optimiser skips the step if its `found_inf` is 1, as PyTorch's fused solvers do."""
    from torch.optim import SGD, Adam, AdamW

    return isinstance(optimizer, SGD | Adam | AdamW) and bool(optimizer.defaults.get("fused"))
