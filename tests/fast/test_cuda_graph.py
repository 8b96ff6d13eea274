"""A training step as a CUDA graph: the real thing on a GPU, and PyTorch's code around our own graphs on a CPU."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drrn.errors import UserError
from drrn.fast.cuda_graph import Graphed
from drrn.model import DRRN, residual_unit
from drrn.patches import LOW, STEP, Patches
from test_model import FAMILY, ids, lively
from test_module import fit, module


class Recording(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: operations once more, at the same addresses and with the same numbers.

    `lost` is an operator that is not repeated, as if it had not been captured, and which of its calls (None: all).
    Streams, and memory that a capture uses twice, are a GPU's alone.
    """

    lost: tuple[str, int | None] = ("", None)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """All that was recorded."""
        count = 0
        for operator, args, kwargs, result in self.calls:
            named = operator.__name__ == self.lost[0]
            count += named
            if not (named and self.lost[1] in (None, count)):
                for old, new in zip(tree_leaves(result), tree_leaves(operator(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextmanager
def recording(graph: Recording, pool: None, capture_error_mode: str = "global") -> Iterator[None]:
    """`torch.cuda.graph`."""
    assert capture_error_mode == "thread_local"  # or what the loader's thread does spoils it
    with graph:
        yield


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where to try it; on a CPU, with what `torch.cuda.make_graphed_callables` stands on replaced."""
    if request.param == "cpu":
        for name, stand_in in {
            "CUDAGraph": Recording,
            "graph": recording,
            "synchronize": lambda: None,
            "Stream": lambda: None,
            "stream": lambda stream: nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    elif not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return request.param


def steps(network: DRRN, run: Any, device: str, precision: torch.dtype, count: int = 3) -> list[Tensor]:
    """Training, with another momentum of BatchNorm at each step; the losses."""
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(count):
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1 / (step + 1.5)
        x = torch.rand(4, 1, 9, 9, generator=generator).to(device)
        coarse = precision == torch.bfloat16  # with copies of the weights gradients would be summed up in bfloat16
        with torch.autocast(device, torch.bfloat16, enabled=coarse, cache_enabled=False):
            y = run(x)
        loss = (y.float() - 2 * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize(
    ("precision", "variant"),
    [(torch.float32, ""), (torch.bfloat16, ""), (torch.float32, "checkpointing"), (torch.bfloat16, "written out")],
    ids=str,
)
@pytest.mark.parametrize("arguments", FAMILY[::5], ids=ids)  # each choice several times
def test_a_graph_trains_as_the_network(arguments: dict, precision: torch.dtype, variant: str, device: str) -> None:
    torch.manual_seed(0)
    eager = lively(DRRN(**arguments, features=4)).float().to(device)
    eager.checkpointing = variant == "checkpointing"
    for block in eager.blocks:
        block.compiled = residual_unit if variant == "written out" else None
    graphed, first = copy.deepcopy(eager), copy.deepcopy(eager.state_dict())
    captured: list[Graphed] = []

    def run(x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == torch.bfloat16):
            captured or captured.append(Graphed(graphed, x))
            return captured[0](x)

    before = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    expected = steps(eager, eager, device, precision)
    torch.testing.assert_close(steps(graphed, run, device, precision), expected, rtol=1e-5, atol=1e-7)
    after = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    assert all(map(torch.equal, before, after))  # or augmentation and shuffling would be other ones
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(graphed.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.equal(tensor, first[name]), name


def test_a_batch_of_another_shape_goes_through_the_network(device: str) -> None:
    """One image would otherwise be copied over the whole batch."""
    network = lively(DRRN(1, 2, features=4)).float().to(device)
    graphed = Graphed(network, torch.rand(4, 1, 9, 9, device=device))
    for shape in ((1, 1, 9, 9), (4, 1, 5, 7)):
        x = torch.rand(shape, device=device)
        expected = copy.deepcopy(network)
        torch.testing.assert_close(graphed(x), expected(x))
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(network.state_dict()[name], tensor, msg=name)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*LeafSpec")
def test_lightning_trains_by_the_graph_as_without(
    device: str, tiny_patches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm's averages, the clipping, the rate and the loss that is logged are those of the same pairs."""
    if device == "cuda":
        pytest.skip("test_module's Trainer is a CPU's")
    x, y = Patches(tiny_patches)[np.arange(32)]
    x, y = (torch.from_numpy(z.astype(np.float32))[:, None] for z in (x * STEP + LOW, y / 255))
    batches = list(zip(x.split(8), y.split(8), strict=True))
    calls: list[int] = []
    kept: list[weakref.ref] = []
    call = Graphed.__call__

    def counted(self: Graphed, x: Tensor) -> Tensor:
        calls.append(len(x))
        kept.append(weakref.ref(self.replay))
        return call(self, x)

    monkeypatch.setattr(Graphed, "__call__", counted)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    eager, graphed = module(norm="batch"), module(norm="batch")
    graphed.cuda_graph = True
    expected, found = fit(eager, batches), fit(graphed, batches)
    assert calls == [8] * 4
    for a, b in zip(expected, found, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(graphed.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert all(replay() is None for replay in kept)  # and the memory of a step with it


@pytest.mark.parametrize(
    ("norm", "U", "precision", "residual_scale"),
    [
        ("batch", 9, torch.bfloat16, 1),
        ("batch", 9, torch.bfloat16, 0),  # optim.quick
        ("none", 9, torch.bfloat16, 1),
        ("batch", 9, torch.float32, 1),
        ("batch", 1, torch.float16, 1),  # slow on CPUs
    ],
    ids=str,
)
def test_a_graph_that_is_right_is_not_refused(
    norm: str, U: int, precision: torch.dtype, residual_scale: int, device: str
) -> None:
    """No gradient is 0, or infinite at the size of a real batch: sums over 123,008 pixels."""
    network = DRRN(1, U, features=4, norm=norm).to(device)
    with torch.no_grad():
        network.conv_rec.weight.mul_(residual_scale)
    with torch.autocast(device, precision, enabled=precision != torch.float32):
        Graphed(network.train(), torch.rand(128, 1, 31, 31, device=device))


@pytest.mark.parametrize("residual_scale", [0, 1])
@pytest.mark.parametrize(
    ("lost", "precision", "what"),
    [
        (("_to_copy.default", None), torch.bfloat16, "the result"),  # weights that autocast casts once
        (("convolution_backward.default", None), torch.bfloat16, "the gradient of"),
        (("convolution_backward.default", 20), torch.float32, "the gradient of"),  # one unit's
        (("convolution_backward.default", 20), torch.bfloat16, "the gradient of"),
        (("native_batch_norm.default", None), torch.float32, "the result"),
        (("native_batch_norm.default", 20), torch.float32, "the result"),
    ],
    ids=str,
)
def test_a_graph_that_is_wrong_is_refused(
    lost: tuple[str, int | None],
    precision: torch.dtype,
    what: str,
    residual_scale: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "cuda":
        pytest.skip("nothing is lost there on purpose")
    monkeypatch.setattr(Recording, "lost", lost)
    network = lively(DRRN(1, 25, features=8)).float().train()
    with torch.no_grad():
        network.conv_rec.weight.mul_(residual_scale)
    state = copy.deepcopy(network.state_dict())
    momenta = [m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    with (
        torch.autocast(device, torch.bfloat16, enabled=precision == torch.bfloat16),
        pytest.raises(UserError, match=rf"cuda_graph = True: {what}"),
    ):
        Graphed(network, torch.rand(4, 1, 9, 9))
    for name, tensor in state.items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert momenta == [m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_capture_that_fails_is_refused_and_leaves_no_stream(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        pytest.skip("nothing fails there on purpose")
    streams: list[str] = []
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "the default")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    network = lively(DRRN(1, 2, features=4)).float().train()
    eager, forward, calls = copy.deepcopy(network.state_dict()), DRRN.forward, []

    def once(self: DRRN, x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) > 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return forward(self, x)

    monkeypatch.setattr(DRRN, "forward", once)
    graph = torch.cuda.graph
    with pytest.raises(UserError, match="cannot be captured"):
        Graphed(network, torch.rand(4, 1, 9, 9))
    assert streams == ["the default"]
    assert torch.cuda.graph is graph
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, eager[name]), name
