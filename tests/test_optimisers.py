"""`drrn.optimisers` and `drrn.losses`: by name, by `_target_`, with a warm-up; each against its formula."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drrn.config import OptimConfig
from drrn.errors import UserError
from drrn.losses import LOSSES
from drrn.optimisers import OPTIMISERS, configured, learning_rate_factor, takes_found_inf
from test_module import batches, fit, module, optim

__all__ = ["batches"]  # a fixture
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}") for text in ("You defined a `validation_step`", ".*LeafSpec")
]
Pair = tuple[Tensor, Tensor]

BY_HAND = {
    "euclidean": lambda d: (d**2).sum() / 2,
    "l1": lambda d: d.abs().sum(),
    "charbonnier": lambda d: (d**2 + 1e-6).sqrt().sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_sum_over_pixels_and_a_mean_over_the_batch(name: str) -> None:
    x, truth = torch.rand(2, 4, 1, 5, 5)
    each = [BY_HAND[name]((p - t).double()).item() for p, t in zip(x, truth, strict=True)]
    assert LOSSES[name](x, truth).item() == pytest.approx(sum(each) / 4, rel=1e-5)
    assert LOSSES[name](x.bfloat16(), truth).dtype == torch.float32


def test_the_loss_that_was_asked_for_is_minimised(batches: list[Pair]) -> None:
    x, truth = batches[0]
    for name in LOSSES:
        trained = module(lr=1e-12, loss=name)
        expected = LOSSES[name](trained.network(x), truth).item()
        (logged,) = fit(trained, batches[:1])
        assert logged["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert module().loss is LOSSES["euclidean"]


def test_a_warm_up_rises_along_a_line_to_what_the_schedule_says(batches: list[Pair]) -> None:
    settings = OptimConfig(**optim(warmup_steps=4, schedule="cosine", halve_every_epochs=None))
    plain = OptimConfig(**optim(schedule="cosine", halve_every_epochs=None))
    factors, usual = ([learning_rate_factor(s, step, 1, 100) for step in range(10)] for s in (settings, plain))
    assert factors == pytest.approx([min(1, (k + 1) / 4) * usual[k] for k in range(10)])
    trained = module(algorithm="adamw", lr=1e-4, warmup_steps=4, halve_every_epochs=1000)
    assert [row["train/gamma"] for row in fit(trained, batches[:6])] == pytest.approx(
        [2.5e-5, 5e-5, 7.5e-5, 1e-4, 1e-4, 1e-4]
    )


def test_a_step_schedule_takes_a_tenth() -> None:
    settings = OptimConfig(**optim(schedule="step", halve_every_epochs=2))
    assert [learning_rate_factor(settings, step, 3, 100) for step in (0, 5, 6, 11, 12)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


def test_adamw_decays_the_weights_themselves(batches: list[Pair]) -> None:
    """First step: (1 − γ·decay) · w − γ · sign(g), for gradients that are not tiny."""
    trained = module(algorithm="adamw", lr=1e-3, clip="none", weight_decay=0.5, halve_every_epochs=1000)
    before = copy.deepcopy(trained.network)
    x, truth = batches[0]
    LOSSES["euclidean"](before(x), truth).backward()
    fit(trained, batches[:1])
    for old, new in zip(before.parameters(), trained.network.parameters(), strict=True):
        large = old.grad.abs() > 1e-3
        expected = (1 - 5e-4) * old - 1e-3 * old.grad.sign()
        torch.testing.assert_close(new[large], expected[large], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("algorithm", OPTIMISERS)
@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_fused_solvers_leave_everything_as_it_is_where_found_inf_is_1(algorithm: str, bad: float) -> None:
    """The check for NaN relies on this property of PyTorch's kernels."""
    network = nn.Conv2d(1, 2, 3)
    settings = OptimConfig(**optim(algorithm=algorithm, lr=0.1, bias_lr_mult=1.0))
    optimizer, _ = configured(network, settings, 1, 10, fused=True)
    assert takes_found_inf(optimizer)
    for found_inf in (0.0, bad):
        before = copy.deepcopy([network.state_dict(), optimizer.state_dict()["state"]])
        for p in network.parameters():
            p.grad = torch.full_like(p, math.nan if found_inf else 1.0)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
    after = [network.state_dict(), optimizer.state_dict()["state"]]
    same = all(
        torch.equal(a, b)
        for old, new in zip(before, after, strict=True)
        for a, b in zip(torch.utils._pytree.tree_leaves(old), torch.utils._pytree.tree_leaves(new), strict=True)
        if isinstance(a, Tensor)
    )
    assert same is bool(bad)


def test_a_solver_and_a_schedule_of_others_train(batches: list[Pair]) -> None:
    trained = module(
        clip="none",
        lr=1e-4,
        optimiser={"_target_": "torch.optim.NAdam", "betas": [0.8, 0.9]},
        scheduler={"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 2, "gamma": 0.1},
    )
    logged = fit(trained, batches[:4])
    assert type(trained.trainer.optimizers[0]) is torch.optim.NAdam
    assert list(trained.trainer.optimizers[0].defaults["betas"]) == [0.8, 0.9]
    assert [row["train/gamma"] for row in logged] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"_target_": "os.system"}, r"optim\.optimiser.*'os\.system'"),
        ({"_target_": "torch.optim.Lion"}, r"optim\.optimiser.*torch\.optim\.Lion"),
        ({"_target_": "torch.optim.RMSprop", "speed": 3}, r"optim\.optimiser: torch\.optim\.RMSprop does not take"),
    ],
)
def test_what_is_no_solver_is_refused(node: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        configured(nn.Conv2d(1, 2, 3), OptimConfig(**optim(optimiser=node)), 1, 10, fused=True)


def test_a_schedule_that_follows_a_measure_is_refused() -> None:
    node = {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau"}
    with pytest.raises(UserError, match=r"optim\.scheduler: ReduceLROnPlateau"):
        configured(nn.Conv2d(1, 2, 3), OptimConfig(**optim(scheduler=node)), 1, 10, fused=True)
