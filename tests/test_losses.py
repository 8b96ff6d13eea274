"""`drrn.losses`: losses by name and by `_target_`; `tests/test_module.py` tests the formulas."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from drrn.errors import UserError
from drrn.identity import run_dir
from drrn.losses import LOSSES, loss_of

HUBER = {"_target_": "torch.nn.HuberLoss", "reduction": "sum", "delta": 0.5}


def test_a_name_or_the_networks_own() -> None:
    network = SimpleNamespace(loss="l1")
    assert loss_of(network, None) is LOSSES["l1"]
    assert loss_of(network, "charbonnier") is LOSSES["charbonnier"]


def test_a_loss_of_a_library_is_taken_in_float32() -> None:
    """Huber: e²/2 up to δ, δ(|e| − δ/2) beyond; of a prediction in bfloat16 too."""
    prediction = torch.tensor([0.0, 0.25, 1.0, -2.0]).reshape(1, 1, 2, 2).bfloat16()
    loss = loss_of(SimpleNamespace(loss="euclidean"), HUBER)(prediction, torch.zeros(1, 1, 2, 2))
    e = np.abs([0.0, 0.25, 1.0, 2.0])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(np.where(e <= 0.5, e**2 / 2, 0.5 * (e - 0.25)).sum())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"_target_": "os.system"}, r"optim\.loss.*'os\.system'.*is no torch"),
        ({"_target_": "torch.nn.NoSuchLoss"}, r"optim\.loss.*there is no such class"),
        ({"_target_": "torch.nn.HuberLoss", "speed": 3}, r"optim\.loss: torch\.nn\.HuberLoss does not take"),
    ],
)
def test_what_is_no_loss_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        loss_of(SimpleNamespace(loss="euclidean"), asked)


def test_a_network_keeps_the_loss_that_belongs_to_what_it_returns() -> None:
    own = SimpleNamespace(loss=lambda prediction, truth: 0)
    assert loss_of(own, None) is own.loss
    for asked in ("l1", HUBER):
        with pytest.raises(UserError, match="has a loss of its own"):
            loss_of(own, asked)


def test_another_loss_is_another_run(configure: Callable) -> None:
    other = configure("optim.loss={_target_:torch.nn.HuberLoss,reduction:sum}")
    assert other.optim.loss == {"_target_": "torch.nn.HuberLoss", "reduction": "sum"}
    assert run_dir(other) != run_dir(configure())
    with pytest.raises(UserError, match=r"optim\.loss = 3: must name a class"):
        configure("optim.loss=3")
