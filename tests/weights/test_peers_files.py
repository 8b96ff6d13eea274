"""SRCNN and FSRCNN files of other sizes, and files that only look like them, are read or refused by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drrn.errors import UserError
from drrn.fsrcnn import FSRCNN
from drrn.srcnn import SRCNN
from drrn.weights.foreign import read_foreign, recognise
from drrn.weights.ours import load_network

Tensors = dict[str, Tensor]


def ports_fsrcnn(network: FSRCNN) -> Tensors:
    """The network's state dict under the names of PyTorch ports."""
    names = {"extract": "extraction", "map": "nonlinear_map"}
    parts = {name: name.partition(".") for name in network.state_dict()}
    return {
        f"{names.get(first, first)}.{rest}": network.state_dict()[name] for name, (first, _, rest) in parts.items()
    }


def saved(tensors: Tensors, path: Path, legacy: bool) -> Path:
    torch.save({"model": OrderedDict(tensors)}, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize(("legacy", "d", "s", "m", "scale"), [(True, 5, 3, 1, 2), (False, 7, 2, 6, 3)])
def test_an_fsrcnn_of_another_size_is_itself(
    legacy: bool, d: int, s: int, m: int, scale: int, entry_point: Callable, tmp_path: Path
) -> None:
    theirs = FSRCNN(scale, d, s, m)
    path = saved(ports_fsrcnn(theirs), tmp_path / f"small_scale{scale}.pth", legacy)
    code, out, err = entry_point("convert", f"input={path}", f"output={tmp_path}/ours.safetensors")
    assert (code, "from fsrcnn" in out) == (0, True), err
    ours, _ = load_network(tmp_path / "ours.safetensors")
    assert (ours.scale, ours.features, ours.depth) == (scale, d, m + 4)
    x = torch.rand(1, 1, 6, 7)
    assert torch.equal(ours(x), theirs.eval()(x))


@pytest.mark.parametrize(("middle", "features"), [(3, 4), (5, 6)])
def test_an_srcnn_of_another_size_is_itself(middle: int, features: int, tmp_path: Path) -> None:
    theirs = SRCNN(middle, features)
    path = saved(theirs.state_dict(), tmp_path / "srcnn.pth", legacy=True)
    assert recognise(path) == "srcnn"
    foreign = read_foreign(path, "srcnn")
    assert foreign.model == {"network": "srcnn", "middle": middle, "features": features}
    assert all(torch.equal(foreign.state[name], tensor) for name, tensor in theirs.state_dict().items())


def without(name: str, tensors: Tensors) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != name}


FOUR = SRCNN().state_dict() | {"conv4.weight": torch.zeros(1, 1, 5, 5), "conv4.bias": torch.zeros(1)}
FSR = ports_fsrcnn(FSRCNN(3, 4, 2, 2))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (FOUR, "conv4"),  # a fourth layer
        ({f"net.{name}": tensor for name, tensor in FOUR.items()}, "net.conv1"),
        (without("conv2.bias", dict(SRCNN().state_dict())), "conv2.bias"),
        (SRCNN().state_dict() | {"conv2.weight": torch.zeros(32, 64, 7, 7)}, "middle = 7"),
        (SRCNN().state_dict() | {"conv3.weight": torch.zeros(3, 32, 5, 5)}, "conv3.weight"),  # of RGB
        (without("nonlinear_map.2.weight", FSR), "map.2.weight"),
        (FSR | {"deconv.weight": torch.zeros(4, 1, 7, 7)}, "deconv.weight"),
        (FSR | {"tail.weight": torch.zeros(1)}, "tail.weight"),
    ],
)
def test_what_is_not_quite_one_is_refused_by_name(
    tensors: Tensors, words: str, entry_point: Callable, tmp_path: Path
) -> None:
    path = saved(tensors, tmp_path / "other_scale3.pth", legacy=False)
    code, _, err = entry_point("convert", f"input={path}", f"output={tmp_path}/ours.safetensors")
    assert code == 2
    assert words in err, err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "ours.safetensors").exists()


def test_the_scale_of_an_fsrcnn_is_asked_for(tmp_path: Path) -> None:
    path = saved(FSR, tmp_path / "fsrcnn.pth", legacy=True)
    with pytest.raises(UserError, match=r"give scales=\[3\]"):
        read_foreign(path, "fsrcnn")
    assert read_foreign(path, "fsrcnn", scales=[4]).model["scale"] == 4
