"""A user's own network: its class, a line in NETWORKS and a yaml; it trains, resumes, and is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from drrn.errors import UserError
from drrn.home import CONF
from drrn.identity import run_dir
from drrn.networks import NETWORKS
from drrn.runs import start as train
from drrn.runs.record import FILE, read_record
from drrn.runs.request import request
from drrn.weights.ours import load_network


class Toy(nn.Module):
    """Two convolutions on the interpolated image."""

    input, loss = "interpolated", "euclidean"
    depth, receptive_radius = 2, 2

    def __init__(
        self,
        width: int,
        sides: list[int],
        slope: float = 0.0,
        heads: list[int] = [],  # noqa: B006
        scaled: float | None = None,
    ) -> None:
        super().__init__()
        first, last = sides
        self.first = nn.Conv2d(1, width, first, padding=first // 2)
        self.last = nn.Conv2d(width, 1, last, padding=last // 2)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(nn.functional.leaky_relu(self.first(x), self.slope))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Add the toy's line and yaml; return the override by which Hydra finds the yaml."""
    monkeypatch.setitem(NETWORKS, "toy", Toy)
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/toy.yaml").write_text("network: toy\nwidth: 4\nsides: [3, 3]\n")
    return f"hydra.searchpath=[file://{tmp_path / 'conf'}]"


def test_a_network_of_ones_own_trains_resumes_and_is_evaluated(
    toy: str, entry_point: Callable, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = (
        toy, "model=toy", f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", "data.batch_size=4",
        "data.num_workers=0", "data.scales=[2]", "data.val_scales=[2]", "trainer.accelerator=cpu", "logger=none",
        "optim.lr=0.001",
    )  # fmt: skip
    code, _, err = entry_point("train", *command, "trainer.max_steps=2")
    assert code == 0, err
    (short,) = (tmp_path / "runs/main").iterdir()
    assert short.name.startswith("Toy_width4_sides3-3_s1-")
    record = read_record(short / FILE)
    held = {"network": "toy", "width": 4, "sides": [3, 3], "slope": 0.0, "heads": [], "scaled": None}
    assert record["config"]["model"] == held
    assert (record["structure"]["depth"], record["structure"]["conv_weights"]) == (2, 72)
    network, about = load_network(short / "weights.safetensors")
    assert isinstance(network, Toy)
    assert about["model"] == held

    checkpoint = short / "checkpoints/step00000002.ckpt"
    code, _, err = entry_point("train", *command, "trainer.max_steps=4", f"ckpt_path={checkpoint}", "study=longer")
    assert code == 0, err
    assert f"resuming from {checkpoint}" in err
    code, _, err = entry_point("train", toy, f"from_record={short / FILE}", "output=again")
    assert code == 0, err
    code, _, err = entry_point("train", toy, f"from_record={short / FILE}", "output=again", "model.width=5")
    assert (code, "give +model.width=VALUE" in err) == (2, True)
    (again,) = (tmp_path / "again/main").iterdir()
    assert again.name == short.name
    for name, tensor in load_network(again / "weights.safetensors")[0].state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])
    code, _, err = entry_point(
        "train", *command[2:], "trainer.max_steps=1", f"init_from={short / 'weights.safetensors'}"
    )
    assert code == 0, err
    code, out, err = entry_point(
        "evaluate", f"checkpoint={short / 'weights.safetensors'}", f"sets=[{tiny_images}]", "scales=[2]",
        "output=s.json", "workers=1",
    )  # fmt: skip
    assert code == 0, err
    assert "Toy_width4" in out


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


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (int | float, "model.slope = many: must be a whole number or a number"),
        (float | None, "model.slope = many: must be a number"),
        (Callable[[int], int], "model.slope: Unexpected type annotation: Callable[int, int]"),
        (Sequence[int], "model.slope: Unexpected type annotation: Sequence[int]"),
    ],
)
def test_an_annotation_of_any_kind_is_refused_in_a_line(kind: Any, said: str, toy: str, monkeypatch) -> None:
    monkeypatch.setitem(Toy.__init__.__annotations__, "slope", kind)
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", [toy, "model=toy", "data=demo", "+model.slope=many"])
    with pytest.raises(UserError) as refusal:
        request(cfg)
    assert str(refusal.value) == said


class Normalised(Toy):
    """BatchNorm without an argument `norm`."""

    def __init__(self, width: int, sides: list[int]) -> None:
        super().__init__(width, sides)
        self.norm = nn.BatchNorm2d(width)


def test_processes_that_share_a_batchnorm_of_ones_own_are_another_run(toy: str, monkeypatch) -> None:
    def folder(*overrides: str) -> Path:
        with initialize_config_dir(CONF, version_base="1.3"):
            return run_dir(request(compose("config", [toy, "model=toy", "data=demo", *overrides])))

    assert folder("trainer.devices=2") == folder()
    assert folder("name='+1 (b) [c,d]'").name.startswith("+1_(b)_[c,d]-")  # a given name is kept as it is
    monkeypatch.setitem(NETWORKS, "toy", Normalised)
    assert folder("trainer.devices=2") != folder()


def test_drrn_needs_no_name(configure: Callable) -> None:
    assert run_dir(configure("model.network=drrn")) == run_dir(configure())
    with pytest.raises(UserError, match="model"):
        train.start(configure("model.network=nope"))
