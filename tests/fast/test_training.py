"""`drrn.fast.training`: the network in training against the network itself, compiled and eager; steps that never wait
for the GPU, and steps whose loss is not finite."""

from __future__ import annotations

import copy
import functools
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from drrn.errors import Diverged, UserError
from drrn.fast import training
from drrn.fast.precision import tf32
from drrn.fast.training import InTraining, Latch, norms_of
from drrn.model import DRRN
from drrn.optimisers import takes_found_inf
from drrn.runs.checkpoints import Checkpoints, newest_checkpoint
from drrn.runs.lightning import AverageOnDevice, TerminalProgress
from test_model import FAMILY, PORTS, ids, lively
from test_module import batches, fit, module

__all__ = ["batches"]  # a fixture
Pair = tuple[Tensor, Tensor]
GOOD = torch.tensor(True)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("You defined a `validation_step`", "Checkpoint directory", ".*LeafSpec")
]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)


def gradients(network: DRRN, run: Callable[[Tensor], Tensor], x: Tensor, coarse: bool = False) -> dict[str, Tensor]:
    network.zero_grad()
    with tf32(False):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=coarse):
            y = run(x)
        y.to(x.dtype).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def momentum_of(network: DRRN, momentum: float) -> None:
    for norm in norms_of(network):
        norm.momentum = momentum


# ---------------------------------------------------------------------- against the network itself


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("arguments", [*FAMILY[::3], *PORTS], ids=ids)
def test_gradients_and_statistics_are_the_networks(arguments: dict, checkpointing: bool) -> None:
    """The momentum differs at each step; if statistics counted twice, the second step would show it."""
    plain, ours = (lively(DRRN(**arguments, features=3)).train() for _ in range(2))
    trained = InTraining(ours, checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(1)
    for momentum in (1.0, 0.3):
        momentum_of(plain, momentum)
        x = torch.rand(2, 1, 7, 9, generator=generator, dtype=torch.float64) * 2 - 1
        expected, found = gradients(plain, plain, x), gradients(ours, trained, x)
        trained.follow(trained.statistics, [momentum] * len(trained.statistics), GOOD)
        assert max(g.abs().max() for g in expected.values()) > 1e-3
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-12, atol=1e-14, msg=name)


def test_micro_batches_are_averaged_one_after_another_and_a_bad_step_not_at_all() -> None:
    plain, ours = (lively(DRRN(1, 1, features=3)).train() for _ in range(2))
    trained, momenta = InTraining(ours), [0.5, 0.25]
    for momentum in momenta:
        x = torch.rand(2, 1, 5, 5, dtype=torch.float64)
        momentum_of(plain, momentum)
        plain(x), trained(x)
    trained.follow(trained.statistics, momenta, GOOD)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-12, atol=1e-14, msg=name)
    trained(x * math.nan)
    trained.follow(trained.statistics, [0.5], ~GOOD)
    for name, tensor in plain.named_buffers():
        if "running" in name:
            torch.testing.assert_close(ours.get_buffer(name), tensor, rtol=1e-12, atol=1e-14, msg=name)


@COMPILER
@pytest.mark.parametrize(("coarse", "checkpointing"), [(False, True), (True, False)], ids=["float32 twice", "bf16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU, id="gpu")])
def test_compiled_it_trains_the_same_from_one_graph(device: str, coarse: bool, checkpointing: bool) -> None:
    """One graph, whatever the momentum is. In bf16 it is as far from the exact gradient as the eager network is."""
    torch.manual_seed(0)
    exact = DRRN(1, 2, features=8).train().to(device, memory_format=torch.channels_last)
    eager, ours = copy.deepcopy(exact), copy.deepcopy(exact)
    trained = InTraining(ours, compiled=True, checkpointing=checkpointing)
    torch._dynamo.utils.counters.clear()
    close = 1e-5 if device == "cpu" else 1e-4  # cuDNN may choose another algorithm
    for step in range(3):
        x = torch.rand(4, 1, 12, 12, device=device)
        for network in (exact, eager):
            momentum_of(network, 1 / (step + 1))
        true, theirs, found = (
            gradients(exact, exact, x), gradients(eager, eager, x, coarse), gradients(ours, trained, x, coarse)
        )  # fmt: skip
        trained.follow(trained.statistics, [1 / (step + 1)], GOOD.to(device))
        total = torch.cat([g.flatten() for g in true.values()]).norm()  # a bias before a norm has no gradient
        for name, right in true.items():
            limit = 1.2 * (theirs[name] - right).norm() + 5e-3 * total if coarse else close * total
            assert (found[name] - right).norm() < limit, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name, tensor in eager.state_dict().items():
        wide = 2e-2 if coarse else close
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=wide, atol=wide, msg=name)


def test_a_sweep_compiles_more_networks_than_pytorch_compiles_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep's points are networks of one class in one process; the limit here is one recompilation, not eight."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1):
        for U in (0, 1):
            InTraining(DRRN(1, U, features=2, norm="none"), compiled=True)(torch.rand(1, 1, 5, 5))


def peak_maps(network: DRRN, checkpointing: bool) -> float:
    """Feature maps alive at the peak of a step, by torch's own count of what it allocates and frees."""
    x, trained = torch.rand(2, 1, 32, 32), InTraining(network, checkpointing=checkpointing)
    with torch.profiler.profile(profile_memory=True) as profile:
        trained(x).sum().backward()
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return torch.tensor(changes).cumsum(0).max().item() / (network.features * x.numel() * x.element_size())


@pytest.mark.parametrize(("norm", "kept"), [("batch", 4), ("none", 2)])
def test_a_unit_keeps_one_feature_map_with_checkpointing(norm: str, kept: int) -> None:
    for on, maps in ((False, kept), (True, 1)):
        shallow, deep = (peak_maps(DRRN(1, U, features=4, norm=norm), on) for U in (4, 12))
        assert (deep - shallow) / 8 == pytest.approx(maps, abs=0.2)


def test_a_network_without_units_cannot_compute_them_twice() -> None:
    with pytest.raises(UserError, match=r"speed\.checkpointing = True: Conv2d does not"):
        InTraining(nn.Conv2d(1, 1, 3), checkpointing=True)


# ---------------------------------------------------------------------- a step waits for nothing


class Waits(TorchDispatchMode):
    """Counts operations that would make Python wait for a GPU: reading a number or a bool, a copy to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = operator.__name__
        if name.startswith(("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")):
            self.found.append(name)
        if name.startswith("index") and any(getattr(i, "dtype", None) == torch.bool for i in args[1] or ()):
            self.found.append(f"{name} by a mask")
        return operator(*args, **(kwargs or {}))


class Counting:
    """Lightning's callback: `Waits` from the start of a step to its end, for each step."""

    def __new__(cls) -> Any:
        from lightning.pytorch import Callback

        class Counter(Callback):
            def __init__(self) -> None:
                self.steps: list[list[str]] = []

            def on_train_batch_start(self, *_: Any) -> None:
                self.mode = Waits()
                self.mode.__enter__()

            def on_train_batch_end(self, *_: Any) -> None:
                self.mode.__exit__(None, None, None)
                self.steps.append(self.mode.found)

        return Counter()


@pytest.mark.parametrize(
    "settings", [dict(clip="value"), dict(clip="norm", algorithm="adam"), dict(clip="none", lr=1e-8)], ids=ids
)
@pytest.mark.parametrize(("precision", "bar"), [("32-true", True), ("bf16-mixed", False)])
def test_between_two_rows_of_the_log_nothing_waits(
    settings: dict, precision: str, bar: bool, batches: list[Pair]
) -> None:
    """Also with the progress bar, which shows the loss, and with an average of the weights."""
    counting, average = Counting(), AverageOnDevice()
    logged = fit(
        module(norm="batch", bias_lr_mult=1.0, **{"lr": 1e-3, **settings}),
        batches[:8],
        log_every_n_steps=4,
        precision=precision,
        callbacks=[TerminalProgress()] * bar + [average, counting],
        enable_progress_bar=bar,
    )
    assert len(logged) == 2
    assert [bool(found) for found in counting.steps] == [False, False, False, True] * 2, counting.steps
    assert "_local_scalar_dense.default" in counting.steps[3]  # the stand-in sees it


@pytest.mark.parametrize(
    "settings", [dict(decay=0.7), dict(use_buffers=False), dict(update_every_n_steps=2)], ids=ids
)
def test_the_average_of_the_weights_is_lightnings(settings: dict, batches: list[Pair]) -> None:
    """All but the number of BatchNorm's batches, which is not averaged."""
    found, expected = (module(norm="batch", lr=0.05) for _ in range(2))
    fit(found, batches[:5], callbacks=[AverageOnDevice(**settings)])
    fit(expected, batches[:5], callbacks=[EMAWeightAveraging(**settings)])
    for name, tensor in expected.network.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(found.network.state_dict()[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


@GPU
@pytest.mark.parametrize(
    ("settings", "compiled"),
    [(dict(clip="value"), "auto"), (dict(clip="norm", algorithm="adam"), False), (dict(clip="none", lr=1e-8), False)],
    ids=["value, compiled", "norm, adam", "none"],
)
def test_on_a_gpu_nothing_waits_between_two_rows_of_the_log(
    settings: dict, compiled: bool | str, batches: list[Pair]
) -> None:
    """PyTorch's sync debug mode raises if Python would wait for the GPU."""
    from lightning.pytorch import Callback

    class Strict(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            strict = 2 < batch_idx % 8 < 7  # the first steps compile
            torch.cuda.set_sync_debug_mode("error" if strict else "default")

        def on_train_batch_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    trained = module(norm="batch", bias_lr_mult=1.0, **{"lr": 1e-3, **settings})
    trained.compiled = compiled
    given = [tuple(z.cuda() for z in pair) for pair in batches]
    gpu = dict(accelerator="gpu", devices=1, precision="bf16-mixed")
    assert len(fit(trained, given, log_every_n_steps=8, callbacks=[AverageOnDevice(), Strict()], **gpu)) == 2


@pytest.mark.parametrize(
    ("capability", "triton", "compiler", "said"),
    [
        ((9, 0), True, True, ""),
        ((6, 1), True, True, ""),
        ((9, 0), False, True, "Triton"),
        ((9, 0), True, False, "C comp"),
    ],
    ids=["H100", "Pascal", "no Triton", "no compiler"],
)
def test_a_gpu_compiles_where_it_can(
    capability: tuple, triton: bool, compiler: bool, said: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(training, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(training, "which", lambda name: compiler or None)
    x = SimpleNamespace(device=torch.device("cuda"))
    assert training.worth_compiling(nn.Conv2d(1, 1, 3), x) == (capability >= (7, 0) and not said)
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)
    assert not training.worth_compiling(nn.SyncBatchNorm(1), x)
    assert not training.worth_compiling(nn.Conv2d(1, 1, 3), torch.zeros(1))


# ---------------------------------------------------------------------- a step that is not finite


def test_the_first_bad_step_is_the_one_that_is_kept() -> None:
    latch = Latch(torch.device("cpu"))
    one, nan, inf = (torch.tensor(value) for value in (1.0, math.nan, math.inf))
    assert latch.check(0, 0.1, one, one)
    assert latch.check(1, 0.1, one, inf, both=False)  # with a loss scaler the gradient may overflow
    assert latch.read() is None
    assert not latch.check(16_777_217, 0.05, one, inf)  # more than float32 counts to
    assert not latch.check(16_777_218, 0.02, nan, one)
    assert not latch.check(16_777_219, 0.02, one, one)
    assert latch.read() == (16_777_217, 1.0, math.inf, pytest.approx(0.05))


@pytest.mark.parametrize("algorithm", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("clip", ["value", "norm", "none"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=GPU)])
def test_from_a_bad_step_on_nothing_moves(
    device: str, clip: str, algorithm: str, batches: list[Pair], tmp_path: Path
) -> None:
    """It is detected three steps later, when a step is logged; the checkpoint due in between is not kept."""
    trained = module(
        norm="batch", clip=clip, algorithm=algorithm, lr=1e-3, theta=1e-4, bias_lr_mult=1.0, weight_decay=0.1
    )
    x, truth = batches[2]
    given = [*batches[:2], (x, truth * math.nan), *batches[3:8]]
    checkpoints = dict(enable_checkpointing=True, callbacks=[Checkpoints(tmp_path, 2)])
    with pytest.raises(Diverged, match=r"diverged at step 2: loss nan, .*γ = 0\.001"):
        fit(trained, given, log_every_n_steps=6, accelerator=device, devices=1, **checkpoints)
    assert [path.name for path in tmp_path.iterdir()] == ["step00000002.ckpt"]
    last = torch.load(newest_checkpoint(tmp_path), weights_only=True)
    for name, tensor in trained.network.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(tensor.cpu(), last["state_dict"][f"network.{name}"].cpu()), name


def test_a_solver_that_would_take_the_bad_step_is_asked_before_it(batches: list[Pair]) -> None:
    trained = module(lr=1e-3, optimiser={"_target_": "torch.optim.RMSprop", "alpha": 0.9})
    start = nn.utils.parameters_to_vector(trained.network.parameters()).clone()
    x, truth = batches[0]
    with pytest.raises(Diverged, match="step 0"):
        fit(trained, [(x, truth * math.nan), batches[1]], log_every_n_steps=50)
    assert torch.equal(nn.utils.parameters_to_vector(trained.network.parameters()), start)
    assert not takes_found_inf(trained.trainer.optimizers[0])


def test_the_end_of_a_run_is_looked_at_too(batches: list[Pair]) -> None:
    x, truth = batches[0]
    with pytest.raises(Diverged, match="step 1"):
        fit(module(lr=1e-3), [batches[1], (x, truth * math.inf)], log_every_n_steps=50)
