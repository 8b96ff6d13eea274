"""The network's part of a training step as a CUDA graph: some hundred kernels, launched by two calls.

A graph repeats what it saw once: the same kernels, at the same addresses, with the same numbers. That is what a
step is here, since every batch has one shape, save for what `Graphed` looks after. PyTorch captures; the loss, the
clipping and the solver stay outside, where a loss that is not finite can stop them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from drrn import Refusal
from drrn.model import DRRN

TOLERANCE = 0.25  # of a tensor's norm; what goes wrong in a graph is wrong by more, bfloat16's rounding by less
SMALL = 1e-4  # of the norm of all: a bias in front of a BatchNorm has no gradient but rounding


class Graphed:
    """`network` in training, forward and backward, as a CUDA graph; the same result, gradients and statistics.

    - BatchNorm's momentum is a number, which a graph would repeat, and it changes at every step
      (`SuperResolution.on_train_batch_start`). The graph writes each batch's statistics beside the network, and the
      running ones follow them outside it.
    - Under autocast the graph casts the weights itself, each time they are used: copies kept from outside it would
      stay what they were (pytorch/pytorch#71631). Its backward pass is outside autocast (#120930).
    - Gradients lie where the next step's will (#181723), so micro-batches cannot be summed up.

    The first result is compared with the network's own before it is used (`_compare`).

    Args:
        network: in training, on a CUDA device; its parameters stay where they are in memory.
        x: a batch [N, 1, p, p], of the shape that all have; one of another shape goes through the network itself.

    Raises:
        Refusal: what the graph gives is not what the network gives.
    """

    def __init__(self, network: DRRN, x: Tensor) -> None:
        self.network, self.shape = network, x.shape
        self.norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
        self.batch = [{name: torch.zeros_like(b) for name, b in norm.named_buffers()} for norm in self.norms]
        self.replay, eager = _Autocast(network), _Autocast(network)
        with self._statistics_in_batch(), torch.autocast(x.device.type, enabled=False):
            torch.cuda.make_graphed_callables(self.replay, (torch.zeros_like(x),))
            self._compare(eager, x)

    def __call__(self, x: Tensor) -> Tensor:
        """What `network(x)` gives in training, [N, 1, p, p]; overwritten by the next call."""
        if x.shape != self.shape:
            return self.network(x)
        y = self.replay(x)
        if self.norms:
            momentum = self.norms[0].momentum  # of all
            for name in ("running_mean", "running_var"):
                running = [norm.get_buffer(name) for norm in self.norms]
                torch._foreach_lerp_(running, [batch[name] for batch in self.batch], momentum)
            torch._foreach_add_([norm.num_batches_tracked for norm in self.norms], 1)
        return y

    @contextmanager
    def _statistics_in_batch(self) -> Iterator[None]:
        """Inside, the network's BatchNorms write what they measure to `batch` instead of averaging it."""
        before = [(norm.momentum, dict(norm.named_buffers())) for norm in self.norms]
        for norm, batch in zip(self.norms, self.batch, strict=True):
            norm.momentum = 1.0
            norm._buffers.update(batch)
        try:
            yield
        finally:
            for norm, (momentum, buffers) in zip(self.norms, before, strict=True):
                norm.momentum = momentum
                norm._buffers.update(buffers)

    def _compare(self, eager: nn.Module, x: Tensor) -> None:
        """Hold the graph against the network, on other images and other weights than those it was captured with.

        On weights, too, that let rounding fade: most ReLUs are open. A deep network's own first weights amplify it
        until no two gradients agree, in bfloat16 those of B1U25 not even in their direction. No random number is
        drawn.

        Raises:
            Refusal: they differ.
        """
        weights = [(p, p.detach().clone()) for p in self.network.parameters()]
        with torch.no_grad():
            for p, value in weights:
                p.copy_(0.5 * value.flip(tuple(range(value.dim()))) if value.dim() > 1 else value + 0.05)
            for norm in self.norms:
                norm.weight.fill_(0.5)
                norm.bias.fill_(1.0)
        try:
            found, expected = (self._outcome(run, x) for run in (self.replay, eager))
        finally:
            with torch.no_grad():
                for p, value in weights:
                    p.copy_(value)
        for group in expected:
            least = SMALL * torch.stack([value.norm() for value in expected[group].values()]).norm()
            for name, value in expected[group].items():
                difference = (found[group][name] - value).norm()
                if not difference <= TOLERANCE * torch.maximum(value.norm(), least):
                    raise Refusal(
                        f"trainer.cuda_graph = True: {group} {name} of the captured step differs from the "
                        f"network's by {difference.item():.3g}, its norm is {value.norm().item():.3g}. Leave "
                        "cuda_graph off, and report this with your versions of PyTorch and CUDA"
                    )

    def _outcome(self, run: nn.Module, x: Tensor) -> dict[str, dict[str, Tensor]]:
        """A step's result, gradients and statistics, by name, in float32 and to keep."""
        y = run(x)
        names, parameters = zip(*self.network.named_parameters(), strict=True)
        gradients = torch.autograd.grad(y.float().square().sum(), parameters)
        statistics = {
            f"{n} {name}": value.float()
            for n, batch in enumerate(self.batch)
            for name, value in batch.items()
            if name != "num_batches_tracked"  # counts warm-up too
        }
        groups = {"the result": {"": y}, "the gradient of": dict(zip(names, gradients, strict=True))}
        groups |= {"BatchNorm": statistics} if statistics else {}
        return {
            group: {name: value.detach().float().clone() for name, value in values.items()}
            for group, values in groups.items()
        }


class _Autocast(nn.Module):
    """The network under the autocast that is on where it is made, without its memory of cast weights."""

    def __init__(self, network: DRRN) -> None:
        super().__init__()
        device = next(network.parameters()).device.type
        self.network = network
        self.arguments = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": False,
        }

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, p, p] → the same shape."""
        with torch.autocast(**self.arguments):
            return self.network(x)
