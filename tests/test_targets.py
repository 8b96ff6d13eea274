"""`drrn.targets`: classes by name, of the right kind, resolved before anything is called."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback

from drrn.errors import UserError
from drrn.targets import check_trusted, make, resolve


def test_a_class_is_resolved_and_called_with_its_arguments() -> None:
    node = {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor", "logging_interval": "step"}
    made = make("callbacks.lr", node, Callback)
    assert (type(made).__name__, made.logging_interval) == ("LearningRateMonitor", "step")
    weights = [torch.nn.Parameter(torch.zeros(1))]
    solver = make(
        "optim.optimiser", {"_target_": "torch.optim.RMSprop", "alpha": 0.9}, torch.optim.Optimizer, weights, lr=0.5
    )
    assert (solver.defaults["alpha"], solver.defaults["lr"]) == (0.9, 0.5)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (5, "must name a class"),
        ({}, "must name a class"),
        ({"_target_": 3}, "must name a class"),
        ({"_target_": "os"}, "must name a class"),
        ({"_target_": "no.such.Class"}, "there is no such class"),
        ({"_target_": "lightning.pytorch.callbacks.Nothing"}, "there is no such class"),
        ({"_target_": "..Class"}, "must name a class"),
        ({"_target_": "os.system", "command": "touch executed"}, "is no lightning"),
        ({"_target_": "torch.optim.SGD"}, "is no lightning"),
        (
            {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": {"_target_": "os.system"}},
            "among the arguments",
        ),
        ({"_target_": "lightning.pytorch.callbacks.EarlyStopping", "nope": 1}, "does not take these arguments"),
    ],
)
def test_what_is_no_class_of_that_kind_is_refused_and_not_called(node: object, said: str) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        make("callbacks.mine", node, Callback)
    assert "callbacks.mine" in str(refusal.value)


def test_from_a_record_only_lightnings_and_torchs_are_taken() -> None:
    check_trusted("from_record", {"a": [{"_target_": "torch.optim.AdamW"}], "b": {"_target_": "lightning.x.Y"}})
    for path in ("os.system", "torchevil.X", "lightning_evil.X", 3):
        with pytest.raises(UserError, match="from_record: the record names"):
            check_trusted("from_record", {"callbacks": {"a": {"b": [{"_target_": path}]}}})
    assert resolve("x", {"_target_": "torch.nn.Conv2d"}, torch.nn.Module) == (torch.nn.Conv2d, {})
