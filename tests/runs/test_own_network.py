"""A network of somebody's own: its class, a line in NETWORKS and a yaml; it trains, resumes, and is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from drrn.errors import UserError
from drrn.home import CONF
from drrn.identity import run_dir
from drrn.networks import NETWORKS
from drrn.runs import run as train
from drrn.runs.request import request


class Toy(nn.Module):
    """Two convolutions on the interpolated image."""

    input, loss = "interpolated", "euclidean"
    depth, receptive_radius = 2, 2

    def __init__(self, width: int, slope: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.slope = slope

    @property
    def conv_weight_count(self) -> int:
        return self.first.weight.numel() + self.last.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(nn.functional.leaky_relu(self.first(x), self.slope))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Its line and its yaml; the override that finds the yaml."""
    monkeypatch.setitem(NETWORKS, "toy", Toy)
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/toy.yaml").write_text("network: toy\nwidth: 4\n")
    return f"hydra.searchpath=[file://{tmp_path / 'conf'}]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["+model.height=3"], "model.height"),
        (["model.width=many"], "model."),
        (["~model.width"], "model.width"),
        (["model.network=tov"], "model.network = 'tov': allowed are"),
        (["model.network=[a]"], "model.network"),
    ],
)
def test_what_its_constructor_does_not_take_is_refused_by_key(arguments: list[str], said: str, toy: str) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", [toy, "model=toy", "data=demo", *arguments])
    with pytest.raises(UserError) as refusal:
        request(cfg)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_drrn_needs_no_name(configure: Callable) -> None:
    assert run_dir(configure("model.network=drrn")) == run_dir(configure())
    with pytest.raises(UserError, match="model"):
        train.train(configure("model.network=nope"))
