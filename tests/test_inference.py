"""Inference on whole images: the folded network is the network, tiles change nothing, memory stays bounded."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drrn import inference
from drrn.images import image_files, read_luminance
from drrn.inference import Folded, super_resolve, super_resolve_strips, tile_pixels, tile_shape
from drrn.model import DRRN
from drrn.protocol import prepare

FAMILY = {
    "B1U9": {"B": 1, "U": 9},
    "B2U3": {"B": 2, "U": 3},
    "chain": {"B": 2, "U": 3, "multi_path": False},
    "chain of one": {"B": 1, "U": 1, "multi_path": False},
    "unshared": {"B": 1, "U": 3, "weight_sharing": False},
    "unshared chain": {"B": 2, "U": 2, "weight_sharing": False, "multi_path": False},
    "VDSR": {"B": 5, "U": 0},
    "no bias": {"B": 1, "U": 2, "bias": False},
    "rectified": {"B": 2, "U": 2, "rectified_identity": True},
    "rectified chain": {"B": 2, "U": 3, "rectified_identity": True, "multi_path": False},
    "no ReLU before the first": {"B": 3, "U": 0, "input_relu": False},
    "no ReLU before the first, recursive": {"B": 2, "U": 1, "input_relu": False},
}


def lively(seed: int = 0, **structure: object) -> DRRN:
    """A network whose layers all matter: BatchNorm as after training on a photograph, random affine and biases."""
    torch.manual_seed(seed)
    network = DRRN(**{"features": 8, **structure})
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, -0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.uniform_(module.bias, -0.1, 0.1)
    x = tensor(photograph(48, 48))
    with torch.no_grad():
        for block in network.blocks:
            for conv in block.conv_b:  # at He's size an untrained recursion is a chaos that amplifies any rounding
                conv.weight.mul_(0.2)
        network.train()(x)
        spread = float((network.eval()(x) - x).std())
        network.conv_rec.weight.mul_(0.1 / spread)  # a residual of the size of trained ones
    return network.eval()


def photograph(height: int, width: int) -> np.ndarray:
    """A network's input [height, width]: part of a photograph, interpolated as the protocol does."""
    return prepare(read_luminance(image_files("demo_test", Path())[1])[100:, 100:], 2)[0][:height, :width]


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32))[None, None]


def whole(network: DRRN, x: np.ndarray) -> np.ndarray:
    """The plain network on the whole image."""
    with torch.no_grad():
        return network(tensor(x))[0, 0].numpy()


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN", "plain"])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("structure", FAMILY.values(), ids=FAMILY)
def test_the_folded_network_is_the_network(structure, norm, onednn, monkeypatch):
    network = lively(norm=norm, **structure)
    with torch.backends.mkldnn.flags(enabled=onednn):
        folded = Folded(network)
        assert folded.rec.fused == (onednn and torch.backends.mkldnn.is_available())
        for shape in ((37, 50), (1, 1), (1, 40), (40, 1)):
            x = photograph(*shape) - 0.2  # where bicubic overshoots there are values below 0: ReLUs of x show
            expected = whole(network, x)
            assert np.abs(expected - x).max() > 1e-3  # it does something
            np.testing.assert_allclose(folded(tensor(x))[0, 0].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("features", [1, 5, 16, 33])
def test_any_number_of_features(features):
    network = lively(B=2, U=2, features=features)
    x = photograph(33, 20)
    np.testing.assert_allclose(super_resolve(network, x), whole(network, x), rtol=0, atol=1e-5)


def test_batches_go_through_the_folded_network():
    network = lively(B=1, U=2)
    x = torch.cat([tensor(photograph(20, 30)), tensor(photograph(40, 30)[20:])])
    with torch.no_grad():
        torch.testing.assert_close(Folded(network)(x), network(x), rtol=0, atol=1e-5)


def test_the_network_is_left_as_it_was_and_its_mode_does_not_matter():
    network = lively(B=1, U=2)
    x = photograph(20, 20)
    expected = whole(network, x)
    before = copy.deepcopy(network.state_dict())
    network.train()
    np.testing.assert_allclose(super_resolve(network, x), expected, rtol=0, atol=1e-5)
    assert network.training
    assert torch.is_grad_enabled()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---------------------------------------------------------------------- tiles


@pytest.mark.parametrize("U", [9, 25], ids=["B1U9", "B1U25"])
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((97, 131), 40),  # odd sizes, tiles at every border and inside
        ((131, 97), 64),
        ((75, 83), 13),  # smaller than the radius of both
        ((1, 140), 17),
        ((140, 1), 17),
        ((1, 1), 1),
        ((2, 3), 1),
        ((60, 60), 60),
        ((60, 60), 1000),
    ],
)
def test_tiled_equals_whole(U, shape, tile):
    network = lively(B=1, U=U)
    x = photograph(*shape)
    calls = []
    y = super_resolve(network, x, tile=tile, progress=lambda done, total: calls.append((done, total)))
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, whole(network, x), rtol=0, atol=1e-5)
    tiles = -(-shape[0] // tile) * -(-shape[1] // tile)
    assert calls == [(done, tiles) for done in range(tiles + 1)]


def test_a_smaller_overlap_would_show(monkeypatch):
    """The test above can fail: and with weights that reach to the very rim, one pixel less already shows."""
    network = DRRN(1, 3, features=4, norm="none")
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)
    x = photograph(60, 60)
    expected = whole(network, x)
    scale = np.abs(expected).max()
    assert np.abs(super_resolve(network, x, tile=11) - expected).max() < 1e-6 * scale
    enough = network.receptive_radius
    monkeypatch.setattr(DRRN, "receptive_radius", property(lambda self: enough - 1))
    assert np.abs(super_resolve(network, x, tile=11) - expected).max() > 1e-5 * scale


def test_strips_ask_for_no_more_rows_than_they_need():
    network = lively(B=1, U=1)
    x, radius, asked = photograph(50, 40), network.receptive_radius, []

    def rows(first: int, last: int) -> np.ndarray:
        asked.append((first, last))
        return x[first:last]

    strips = list(super_resolve_strips(network, rows, x.shape, tile=20))
    assert asked == [(0, 20 + radius), (20 - radius, 40 + radius), (40 - radius, 50)]
    assert [len(strip) for strip in strips] == [20, 20, 10]
    np.testing.assert_allclose(np.concatenate(strips), whole(network, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tile", [None, 15])
def test_self_ensemble_is_the_mean_over_the_eight_orientations(tile):
    network = lively(B=1, U=2)
    x = photograph(30, 41)
    turned = []
    with torch.no_grad():
        for flip in (False, True):
            for quarter in range(4):
                view = torch.rot90(tensor(x).flip(3) if flip else tensor(x), quarter, (2, 3))
                back = torch.rot90(network(view), -quarter, (2, 3))
                turned.append((back.flip(3) if flip else back)[0, 0].numpy())
    assert np.std(turned, axis=0).max() > 1e-3  # the orientations differ
    np.testing.assert_allclose(
        super_resolve(network, x, tile, self_ensemble=True), np.mean(turned, axis=0), rtol=0, atol=1e-5
    )


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    radius=st.integers(1, 60),
    pixels=st.integers(1, 700_000),
)
def test_tile_shapes_cover_the_image_and_fit(height, width, radius, pixels):
    h, w = tile_shape((height, width), radius, pixels)
    assert 1 <= h <= height
    assert 1 <= w <= width
    if height * width <= pixels:
        assert (h, w) == (height, width)
    computed = min(height, h + 2 * radius) * min(width, w + 2 * radius)
    if pixels >= (4 * radius) ** 2:  # what tile_pixels grants at least
        assert computed <= pixels


def test_large_images_waste_little_on_overlap():
    """B1U9 at 1 GB: a 2048² image computes at most a tenth more than it keeps, so time stays linear."""
    radius, pixels = 20, inference.TILE_BYTES // (3 * 128 * 4)
    h, w = tile_shape((2048, 2048), radius, pixels)
    rows, columns = -(-2048 // h), -(-2048 // w)
    work = (2048 + 2 * radius * (rows - 1)) * (2048 + 2 * radius * (columns - 1))
    assert rows * columns > 1
    assert work < 1.1 * 2048**2


def test_tiles_follow_the_memory_that_is_free(monkeypatch):
    network = DRRN(1, 25, features=128)
    per_pixel = inference.MAPS * 128 * 4
    monkeypatch.setattr(inference, "available_memory", lambda: 64 * 10**9)
    assert tile_pixels(network) * per_pixel == pytest.approx(inference.TILE_BYTES, rel=1e-3)
    monkeypatch.setattr(inference, "available_memory", lambda: 5 * 10**8)
    assert tile_pixels(network) * per_pixel == pytest.approx(2.5 * 10**8, rel=1e-3)
    monkeypatch.setattr(inference, "available_memory", lambda: 0)
    assert tile_pixels(network) == (4 * 52) ** 2  # the overlap must not eat everything


def test_available_memory_is_a_sane_number():
    assert 10**6 < inference.available_memory() < 10**15


def test_the_automatic_tile_is_used(monkeypatch):
    network = lively(B=1, U=2)
    monkeypatch.setattr(inference, "tile_pixels", lambda network: 900)
    x, calls = photograph(60, 70), []
    y = super_resolve(network, x, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 4
    np.testing.assert_allclose(y, whole(network, x), rtol=0, atol=1e-5)


def test_three_feature_maps_are_alive_at_the_peak():
    """In a process of its own, by the operating system's count."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("the peak is read from Linux's /proc")
    code = """
import torch
from drrn.inference import Folded, MAPS
from drrn.model import DRRN
status = lambda key: 1024 * int(open("/proc/self/status").read().split(key + ":")[1].split()[0])
folded = Folded(DRRN(1, 2, features=32).eval())
folded(torch.rand(1, 1, 64, 64))
before = status("VmRSS")
folded(torch.rand(1, 1, 1000, 1000))
print((status("VmHWM") - before) / (1000 * 1000 * 32 * 4), MAPS)
"""
    source = str(Path(inference.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": source, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    maps, said = map(float, run.stdout.split())
    assert 2 < maps < said + 0.3


@pytest.mark.parametrize("x", [np.zeros((3, 4, 1)), np.zeros(5), np.zeros((0, 4))], ids=["3-D", "1-D", "empty"])
def test_wrong_shapes_are_refused(x):
    with pytest.raises(ValueError, match=r"\[H, W\]"):
        super_resolve(DRRN(1, 1, features=2), x)


@pytest.mark.parametrize("tile", [0, -3])
def test_wrong_tiles_are_refused(tile):
    with pytest.raises(ValueError, match=f"tile = {tile}"):
        super_resolve(DRRN(1, 1, features=2), np.zeros((4, 4)), tile)
