"""`drrn.networks`: a user's own network by its file, a yaml and a line; the members that every network needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, nn

from drrn.config import ModelConfig, in_full
from drrn.errors import UserError
from drrn.layers import conv_weights
from drrn.model import DRRN
from drrn.networks import NETWORKS, build, on_paper


class Toy(nn.Module):
    """Two convolutions and the image; a loss of its own."""

    input = "interpolated"

    def __init__(self, width: int, wide: bool = False) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, width, 5 if wide else 3, padding=2 if wide else 1)
        self.end = nn.Conv2d(width, 1, 3, padding=1)
        self.receptive_radius = 3 if wide else 2

    @staticmethod
    def loss(prediction: Tensor, truth: Tensor) -> Tensor:
        return 100 * (prediction.float() - truth).abs().mean()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(self.body(x).relu())

    @property
    def depth(self) -> int:
        return 2


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "toy", Toy)


PARAMETERS = {name: inspect.signature(network).parameters for name, network in NETWORKS.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_offers_what_it_must(name: str) -> None:
    needed = {"B": 1, "U": 2, "scale": 3}  # of those that need it
    network = on_paper({"network": name} | {key: needed[key] for key in needed if key in PARAMETERS[name]})
    assert network.input in ("interpolated", "low")
    assert network.depth >= 1
    assert network.receptive_radius >= 1
    assert conv_weights(network) >= 1


def test_a_structure_says_its_network_only_where_it_is_another() -> None:
    model = vars(ModelConfig(1, 2, 4, "none", True, True, True))
    assert in_full({"network": "drrn", **model}) == in_full(model) == model
    assert isinstance(build(model), DRRN)
    assert conv_weights(on_paper(model)) == conv_weights(build(model))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"network": "edsr"}, r"model\.network = 'edsr': allowed are drrn, .*, toy"),
        ({"network": "toy", "depth": 3}, r"model\.depth: the network 'toy' has no such argument; it has width, wide"),
        ({"network": "toy"}, r"model\.width: the network 'toy' needs it"),
        ({"network": "toy", "width": "many"}, r"the network 'toy' does not take this"),
        ({"B": 0, "U": 1}, "B = 0: must be at least 1"),
    ],
)
def test_what_a_network_does_not_take_is_refused(model: dict, said: str, toy: None) -> None:
    with pytest.raises(UserError, match=said):
        on_paper(model)


@pytest.fixture
def yaml_of_toy(toy: None, tmp_path: Path, tiny_images: Path) -> tuple[str, ...]:
    """A yaml in conf/model, in a folder of its own, and the overrides of a tiny run."""
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/toy.yaml").write_text("network: toy\nwidth: 3\n")
    return (
        f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "model=toy", "data.batch_size=2", "data.num_workers=0",
        "data.scales=[2]", "data.val_scales=[2]", "trainer.max_steps=2", "trainer.val_check_interval=1",
        "trainer.accelerator=cpu", "logger=none", f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]",
        f"output={tmp_path / 'runs'}",
    )  # fmt: skip


def test_a_wrong_key_of_it_is_refused(yaml_of_toy: tuple[str, ...], entry_point: Callable) -> None:
    code, _, err = entry_point("train", *yaml_of_toy, "+model.B=1")
    assert code == 2
    assert "model.B: the network 'toy' has no such argument; it has width, wide" in err


def test_drrn_by_its_name_is_the_run_that_it_was(configure: Callable) -> None:
    assert configure("model.network=drrn") == configure()
