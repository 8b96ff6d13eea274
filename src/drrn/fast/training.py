"""Fast training: the network compiled as a whole, BatchNorm's averages and the check for NaN outside of it.

On one H200 (B1U9, batch 128, bf16; docs/performance.md) a compiled step takes 0.62 to 0.65 of an eager one's time.
One compilation serves all steps, since no number in the graph changes: BatchNorm's momentum, different at every step,
is applied outside. And no step waits for the GPU to check that the loss is finite: the GPU would be idle while Python
launches the next step.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from shutil import which
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from drrn.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

log = logging.getLogger(__name__)


class InTraining:
    """`network` for training: same result and gradients, but BatchNorm's running averages are updated by `follow`.

    It is a copy that shares the network's parameters. Each of its BatchNorms writes the mean and the unbiased
    variance of a batch into buffers of its own; `follow` averages them into the network's running statistics. So no
    number in the compiled graph changes, a unit that is recomputed (`checkpointing`) is averaged once, and a bad
    batch can be left out.

    Args:
        network: on its device, in its memory layout.
        compiled: use `torch.compile`, once for each shape.
        checkpointing: the `residual(H, u)` of its blocks stores only H and is recomputed in the backward pass.

    Raises:
        UserError: `checkpointing` for a network without such blocks.
    """

    def __init__(self, network: nn.Module, compiled: bool = False, checkpointing: bool = False) -> None:
        known = {id(p): p for p in network.parameters()} | {id(b): b.clone() for b in network.buffers()}
        shadow = copy.deepcopy(network, known).train()
        self.running, self.counts, self.batch = [], [], []
        for kept, norm in zip(norms_of(network), norms_of(shadow), strict=True):
            norm.momentum, norm.num_batches_tracked = 1.0, None
            self.running += [kept.running_mean, kept.running_var]
            self.batch += [norm.running_mean, norm.running_var]
            self.counts.append(kept.num_batches_tracked)
        self.sizes = [buffer.numel() for buffer in self.running]
        self.statistics: list[Tensor] = []  # of the batches since the last `follow`, all BatchNorms' in one tensor
        if checkpointing:
            blocks = [module for module in shadow.modules() if hasattr(module, "residual")]
            if not blocks:
                raise UserError(f"speed.checkpointing = True: {type(network).__name__} does not support it")
            for block in blocks:
                block.residual = functools.partial(
                    checkpoint, block.residual, use_reentrant=False, preserve_rng_state=False
                )
        self.run: Callable[[Tensor], Tensor] = shadow
        if compiled:
            torch.compiler.reset()  # forget a sweep's earlier points: Dynamo compiles one `forward` eight times only
            torch._dynamo.config.optimize_ddp = False  # it would split the graph at DDP's buckets
            self.run = torch.compile(shadow, dynamic=False, fullgraph=True)

    def __call__(self, x: Tensor) -> Tensor:
        """`network(x)` in training mode."""
        y = self.run(x)
        if self.batch:
            with torch.no_grad():
                self.statistics.append(torch.cat(self.batch))
        return y

    def of_all_processes(self, loss: Tensor, trainer: Trainer) -> tuple[Tensor, list[Tensor]]:
        """A step's loss over the whole batch, and BatchNorm's statistics of its micro-batches.

        Both are averaged over the processes, each of which has its own share of the batch, in one all-reduce.
        """
        if trainer.world_size == 1:
            return loss, self.statistics
        message = torch.cat([loss.reshape(1), *(part.to(loss.dtype) for part in self.statistics)])
        sizes = [1, *(part.numel() for part in self.statistics)]
        first, *parts = trainer.strategy.reduce(message, reduce_op="mean").split(sizes)
        return first[0], [part.to(old.dtype) for part, old in zip(parts, self.statistics, strict=True)]

    @torch.no_grad()
    def follow(self, statistics: Sequence[Tensor], momenta: Sequence[float], good: Tensor) -> None:
        """Average the statistics of batches into the network's running statistics, on the device, without waiting.

        Args:
            statistics: of the batches, as in `self.statistics` (of several processes: their mean).
            momenta: BatchNorm's momentum for each batch.
            good: a boolean tensor on the device; False leaves everything unchanged.
        """
        self.statistics = []
        if not statistics:
            return
        before = after = torch.cat(self.running)
        for batch, momentum in zip(statistics, momenta, strict=True):
            after = after.lerp(batch, momentum)
        after = torch.where(good, after, before)
        torch._foreach_copy_(self.running, list(after.split(self.sizes)))
        torch._foreach_add_(self.counts, len(statistics))


def norms_of(network: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms of a network, SyncBatchNorm (`trainer.sync_batchnorm`) included."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


class Latch:
    """The first non-finite step, stored on the device: `read` waits for the device, `check` at each step does not.

    From that step on `check` returns False, and the fused solvers, which get its negation as `found_inf`, leave
    weights and momentum unchanged.
    """

    def __init__(self, device: torch.device) -> None:
        self.step = torch.full((), -1, dtype=torch.int64, device=device)
        self.facts = torch.zeros(3, device=device)

    def check(self, step: int, gamma: float, loss: Tensor, norm: Tensor, both: bool = True) -> Tensor:
        """Whether this step and all before it are finite: a boolean tensor on the device.

        Args:
            step, gamma: of the optimiser.
            loss, norm: scalars on the device; the norm of the gradient counts where `both` is True.
        """
        finite = torch.isfinite(loss + norm if both else loss)
        first = (self.step < 0) & ~finite
        self.step = torch.where(first, step, self.step)
        now = torch.stack([loss, norm, torch.full_like(loss, gamma)]).to(self.facts)
        self.facts = torch.where(first, now, self.facts)
        return self.step < 0

    def read(self) -> tuple[int, float, float, float] | None:
        """Step, loss, gradient norm and γ of the first non-finite step, or None. Waits for the device."""
        step = int(self.step.item())
        return None if step < 0 else (step, *self.facts.tolist())


def worth_compiling(network: nn.Module, x: Tensor) -> bool:
    """Whether `speed.compile=auto` compiles: on a GPU that Triton supports, without SyncBatchNorm.

    Triton needs a C compiler, which PyTorch's smaller Docker images lack; a warning says so.
    """
    if x.device.type != "cuda" or any(isinstance(m, nn.SyncBatchNorm) for m in network.modules()):
        return False
    if torch.cuda.get_device_capability(x.device) < (7, 0):
        return False
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    needed = {"Triton": find_spec("triton") is not None, "C compiler": any(map(which, compilers))}
    missing = " and no ".join(name for name, found in needed.items() if not found)
    if missing:
        log.warning("speed.compile=auto: there is no %s, so the network is not compiled and trains slower", missing)
    return not missing


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn the GPU's out-of-memory error into a UserError that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU has not enough memory for a step: lower data.batch_size, raise trainer.accumulate_grad_batches "
            "(the same batch in smaller parts), or set speed.checkpointing=true (a third of the memory)"
        ) from error
