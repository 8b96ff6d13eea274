"""The network's part of a training step as CUDA graphs: one of its forward, one of its backward pass.

A graph repeats what it saw once: the same kernels, at the same addresses, with the same numbers. That is what a
step is here, since every batch has one shape, save for what `Graphed` looks after. PyTorch captures; the loss, the
clipping and the solver stay outside, where a loss that is not finite can stop them.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from drrn.errors import UserError
from drrn.model import DRRN

# Of a tensor's norm, and of the norm of all (a bias in front of a BatchNorm has no gradient but rounding).
FINE = 0.03, 1e-4  # float32 and TF32
COARSE = 0.2, 1e-3  # under autocast, where bfloat16 rounds

Outcome = dict[str, dict[str, Tensor]]  # result, gradients and statistics of a step, by name


class Graphed:
    """`network` in training, forward and backward, as a CUDA graph: result, gradients and statistics to rounding.

    - BatchNorm's momentum is a number, which a graph would repeat, and it changes at every step
      (`SuperResolution.on_train_batch_start`). The graph writes each batch's statistics beside the network, and the
      running ones follow them outside it.
    - Under autocast the graph casts the weights itself, each time they are used: copies kept from outside it would
      stay what they were (pytorch/pytorch#71631). Its backward pass is outside autocast (#120930).
    - Gradients lie where the next step's will (#181723), so micro-batches cannot be summed up.

    The graph is compared with the network before it is used. It keeps the memory of a step for as long as it lives.

    Args:
        network: in training, on a CUDA device; its parameters stay where they are in memory.
        x: a batch [N, 1, p, p], of the shape that all have; one of another shape goes through the network itself.

    Raises:
        UserError: PyTorch cannot capture the step, or what the graph gives is not what the network gives.
    """

    def __init__(self, network: DRRN, x: Tensor) -> None:
        self.network, self.shape = network, x.shape
        self.norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
        self.batch = [{name: torch.zeros_like(b) for name, b in norm.named_buffers()} for norm in self.norms]
        self.replay, eager = _Autocast(network), _Autocast(network)
        limits = COARSE if eager.arguments["enabled"] else FINE
        with self._statistics_in_batch(), torch.autocast(x.device.type, enabled=False):
            with self._other_weights():  # than those of the capture: old copies of them would show
                expected = self._outcome(eager, x)
            gc.collect()  # an old graph that is destroyed, or nodes left of a step, would spoil the capture
            with _capturing_this_thread():
                torch.cuda.make_graphed_callables(self.replay, (torch.zeros_like(x),))
            with self._other_weights():
                found = self._outcome(self.replay, x)
        _compare(found, expected, *limits)

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

    @contextmanager
    def _other_weights(self) -> Iterator[None]:
        """Inside, the network has random weights that let rounding fade, since most of its ReLUs are open.

        Fresh weights as in Sec. 4.2 amplify rounding from layer to layer, until in bfloat16 no two gradients of
        B1U25 have even their direction in common; and with `optim.residual_scale=0` most gradients are 0.
        """
        generator = torch.Generator().manual_seed(0)  # its own: training draws the numbers that it would have
        before = [(p, p.detach().clone()) for p in self.network.parameters()]
        with torch.no_grad():
            for p, value in before:
                spread, mean = (0.5 * (2 / value[0].numel()) ** 0.5, 0) if value.dim() > 1 else (0.05, 0.3)
                p.copy_(mean + spread * torch.randn(value.shape, generator=generator))
            for norm in self.norms:
                norm.weight.fill_(0.5)
                norm.bias.fill_(1.0)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in before:
                    p.copy_(value)

    def _outcome(self, run: nn.Module, x: Tensor) -> Outcome:
        """A step's result, gradients and statistics in float32; the loss is small enough for float16."""
        y = run(x)
        names, parameters = zip(*self.network.named_parameters(), strict=True)
        gradients = torch.autograd.grad(y.float().square().sum() / x[0].numel(), parameters)
        groups = {"the result": {"": y}, "the gradient of": dict(zip(names, gradients, strict=True))}
        if self.norms:
            groups["BatchNorm"] = {
                f"{number} {name}": batch[name]
                for number, batch in enumerate(self.batch)
                for name in ("running_mean", "running_var")
            }
        return {
            group: {name: value.detach().float().clone() for name, value in values.items()}
            for group, values in groups.items()
        }


def _compare(found: Outcome, expected: Outcome, tolerance: float, small: float) -> None:
    """Hold the graph's step against the network's.

    Raises:
        UserError: they differ.
    """
    for group, values in expected.items():
        whole = torch.stack([value.norm() for value in values.values()]).norm()
        for name, value in values.items():
            difference = (found[group][name] - value).norm()
            if not difference <= tolerance * torch.maximum(value.norm(), small * whole) or whole == 0:
                raise UserError(
                    f"trainer.cuda_graph = True: {group} {name} of the captured step differs from the network's by "
                    f"{difference.item():.3g}, its norm is {value.norm().item():.3g}. Leave cuda_graph off, and "
                    "report this with your versions of PyTorch and CUDA"
                )


@contextmanager
def _capturing_this_thread() -> Iterator[None]:
    """Inside, a capture minds calls of its own thread only: the loader's may pin memory meanwhile.

    `torch.cuda.graph` has an argument for it, which `make_graphed_callables` does not pass on.

    Raises:
        UserError: the capture failed.
    """
    graph = torch.cuda.graph
    torch.cuda.graph = functools.partial(graph, capture_error_mode="thread_local")
    try:
        yield
    except RuntimeError as error:
        torch.cuda.set_stream(torch.cuda.default_stream())  # a failed capture may leave its own
        raise UserError(f"trainer.cuda_graph = True: the step cannot be captured ({error}). Leave it off") from error
    finally:
        torch.cuda.graph = graph


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
