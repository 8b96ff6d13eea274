"""Inference on whole images: the folded network is the network, tiles change nothing, memory stays bounded."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drrn import inference
from drrn.errors import UserError
from drrn.fast import folded, precision
from drrn.fast import prepared as prepared_module
from drrn.fast import strips as sizes
from drrn.fast.folded import Folded
from drrn.fast.prepared import forget, prepared
from drrn.fast.stream import Stream
from drrn.fast.strips import most_rows, tile_shape
from drrn.images import read_luminance
from drrn.inference import super_resolve, super_resolve_strips
from drrn.matlab import to_uint8
from drrn.model import DRRN
from drrn.protocol import prepare, score
from drrn.red30 import RED30
from drrn.sets import image_files
from drrn.srcnn import SRCNN
from drrn.weights.foreign import read_foreign
from drrn.weights.ours import build, load_network
from drrn.weights.shipped import weights_file

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
            for conv in block.conv_b:  # at He's size an untrained recursion amplifies rounding chaotically
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


def at_once(network: DRRN, x: torch.Tensor) -> torch.Tensor:
    """The folded network on the whole image."""
    return Stream(Folded(network), x.shape[2])(x)


def whole(network: nn.Module, x: np.ndarray) -> np.ndarray:
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
        assert Folded(network).rec.fused == (onednn and torch.backends.mkldnn.is_available())
        for shape in ((37, 50), (1, 1), (1, 40), (40, 1)):
            x = photograph(*shape) - 0.2  # negative values, as of bicubic overshoot, make a ReLU of x visible
            expected = whole(network, x)
            assert np.abs(expected - x).max() > 1e-3  # it does something
            np.testing.assert_allclose(at_once(network, tensor(x))[0, 0].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("features", [1, 5, 16, 33])
def test_any_number_of_features(features):
    network = lively(B=2, U=2, features=features)
    x = photograph(33, 20)
    np.testing.assert_allclose(super_resolve(network, x), whole(network, x), rtol=0, atol=1e-5)


def test_batches_go_through_the_folded_network():
    network = lively(B=1, U=2)
    x = torch.cat([tensor(photograph(20, 30)), tensor(photograph(40, 30)[20:])])
    with torch.no_grad():
        torch.testing.assert_close(at_once(network, x), network(x), rtol=0, atol=1e-5)


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


# ---------------------------------------------------------------------- strips


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("structure", FAMILY.values(), ids=FAMILY)
def test_rows_may_come_in_any_portions(structure, norm):
    """Fewer rows than the layers' delay, one row, or all: the result is complete, in order, and the same."""
    network = lively(norm=norm, **structure)
    folded = Folded(network)
    for shape in ((37, 20), (5, 30), (1, 30)):
        x = photograph(*shape) - 0.2
        expected = whole(network, x)
        for portions in ([shape[0]], [1], [2], [5, 3], [13, 1]):
            stream, parts, top = Stream(folded, shape[0]), [], 0
            while top < shape[0]:
                h = portions[len(parts) % len(portions)]
                rows = tensor(x[top : top + h]).repeat(2, 1, 1, 1)  # two images at once
                parts.append(stream(rows))
                rows.zero_()  # the caller may reuse its memory
                top += h
            for y in torch.cat(parts, dim=2):
                np.testing.assert_allclose(y[0].numpy(), expected, rtol=0, atol=1e-5, err_msg=str(portions))
            with pytest.raises(ValueError, match=f"{shape[0] + 1} rows came of an image of {shape[0]}"):
                stream(tensor(x[:1]))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("structure", FAMILY.values(), ids=FAMILY)
def test_strips_without_onednn(structure):
    network = lively(**structure)
    x = photograph(40, 20)
    with torch.backends.mkldnn.flags(enabled=False):
        stream = Stream(Folded(network), len(x))
        y = torch.cat([stream(tensor(x[a : a + 7])) for a in range(0, len(x), 7)], dim=2)
    np.testing.assert_allclose(y[0, 0].numpy(), whole(network, x), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_a_stream_leaves_cudnn_on_but_for_tf32(monkeypatch):
    """By the flags during a convolution; `torch.backends.cudnn.flags` would switch cuDNN off."""
    network, cudnn, seen, convolve = lively(B=1, U=1), torch.backends.cudnn, [], nn.functional.conv2d

    def looking(*args, **kwargs):
        seen.append((cudnn.enabled, cudnn.allow_tf32, cudnn.benchmark))
        return convolve(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "conv2d", looking)
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    monkeypatch.setattr(cudnn, "benchmark", True)
    with torch.backends.mkldnn.flags(enabled=False):
        at_once(network, tensor(photograph(9, 9)))
    assert set(seen) == {(True, False, False)}
    assert (cudnn.allow_tf32, cudnn.benchmark) == (True, True)


def computed(network: DRRN, run) -> int:
    """Pixels of a feature map that the convolutions within the units compute in `run`."""
    pixels, convolve = [], folded.Convolution.__call__

    def counting(self, x, *args, **kwargs):
        y = convolve(self, x, *args, **kwargs)
        if x.shape[1] == y.shape[1] == network.features:
            pixels.append(y.shape[2] * y.shape[3])
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folded.Convolution, "__call__", counting)
        run()
    return sum(pixels)


@pytest.mark.parametrize("U", [9, 25])
def test_strips_compute_little_twice(U):
    """Against the 2U convolutions of every pixel: each unit's first one computes at most two more rows per strip."""
    network = DRRN(1, U, features=4)
    x = np.zeros((600, 30), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("WHOLE_BYTES", "STRIP_BYTES"):
            patch.setattr(sizes, limit, 0)
        assert len(sizes.strips(prepared(network), x.shape, sizes.ROOM)) == 600 // 24 + 1
        pixels = computed(network, lambda: super_resolve(network, x))
    assert 2 * U * x.size < pixels < 1.05 * 2 * U * x.size


def test_a_large_image_goes_through_in_strips_within_its_room():
    """A 24-megapixel photograph by the paper's largest network: no overlap, and 1 GB is enough."""
    network = DRRN(1, 25, features=128)
    assert most_rows(prepared(network), 6000, sizes.ROOM) >= sizes.STRIP_ROWS
    strips = sizes.strips(prepared(network), (4000, 6000), sizes.ROOM)
    assert max(end - first for first, end in strips) == 24
    assert sum(strips, ()) == (0, *(end for _, end in strips for _ in range(2)))[:-1]  # they follow each other
    heights = [end - first for first, end in sizes.strips(prepared(network), (512, 512), sizes.ROOM)]
    assert 24 < max(heights) <= sizes.STRIP_BYTES // (4 * 128 * 512)  # as high as is fast
    assert sizes.strips(prepared(network), (70, 100), sizes.ROOM) == [(0, 70)]  # a small one at once
    assert sizes.strips(prepared(network), (10, 20_000), sizes.ROOM) == [(0, 10)]  # a low one needs no rows kept
    assert len(sizes.strips(prepared(network), (90, 7000), sizes.ROOM)) == 1  # keeping rows would need more
    assert most_rows(prepared(network), 12000, sizes.ROOM) < sizes.STRIP_ROWS  # tiles


@pytest.mark.parametrize("shape", [(150, 70), (20, 90)])
def test_strips_and_tiles_by_the_memory_there_is(shape, monkeypatch):
    network = lively(B=1, U=2)
    x = photograph(*shape)
    for limit in ("WHOLE_BYTES", "STRIP_BYTES"):
        monkeypatch.setattr(sizes, limit, 0)
    asked = {}
    for room in (10**9, 30_000):
        asked[room] = []

        def rows(first: int, last: int, room: int = room) -> np.ndarray:
            asked[room].append((first, last))
            return x[first:last]

        y = np.concatenate(list(super_resolve_strips(network, rows, x.shape, room=room)))
        np.testing.assert_allclose(y, whole(network, x), rtol=0, atol=1e-5)
    assert asked[10**9][0][0] == 0
    assert asked[10**9][-1][1] == shape[0]
    assert all(end == first for (_, end), (first, _) in itertools.pairwise(asked[10**9]))  # they follow each other
    assert (len(asked[10**9]) > 1) == (shape[0] > 24)
    assert most_rows(prepared(network), shape[1], 30_000) < 0
    assert len(asked[30_000]) == -(-shape[0] // (2 * network.receptive_radius))  # tiles of the least size


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
    """The test above can fail: if weights reach to the rim of the receptive field, one pixel less already shows."""
    network = DRRN(1, 3, features=4, norm="none")
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)
    x = photograph(60, 60)
    expected = whole(network, x)
    scale = np.abs(expected).max()
    assert np.abs(super_resolve(network, x, tile=11) - expected).max() < 1e-6 * scale
    enough = network.receptive_radius
    monkeypatch.setattr(DRRN, "receptive_radius", property(lambda self: enough - 1))
    forget(network)
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


@pytest.mark.parametrize("tile", [None, 200])
def test_strips_are_as_high_as_is_fast(tile, monkeypatch):
    network, x, heights, strips = DRRN(1, 0, features=128), np.zeros((300, 200), np.float32), [], sizes.strips

    def noted(*arguments: Any) -> list[tuple[int, int]]:
        heights.extend(end - first for first, end in strips(*arguments))
        return strips(*arguments)

    monkeypatch.setattr(inference, "strips", noted)
    monkeypatch.setattr(sizes, "WHOLE_BYTES", 0)
    super_resolve(network, x, tile)
    assert len(heights) > 1
    assert 0.8 * 12e6 < max(heights) * 200 * 128 * 4 <= 12e6


@pytest.mark.parametrize("tile", [None, 15])
@pytest.mark.parametrize("strips", [False, True])
def test_self_ensemble_is_the_mean_over_the_eight_orientations(tile, strips, monkeypatch):
    if strips:
        for limit in ("WHOLE_BYTES", "STRIP_BYTES"):
            monkeypatch.setattr(sizes, limit, 0)
        monkeypatch.setattr(sizes, "STRIP_ROWS", 7)
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
    height=st.integers(1, 9000),
    width=st.integers(1, 30000),
    U=st.integers(0, 25),
    features=st.integers(1, 128),
    room=st.integers(0, 10**9),
)
def test_tile_shapes_cover_the_image_and_fit(height, width, U, features, room):
    network = Ready(1, U, features)
    h, w = tile_shape(network, (height, width), room)
    assert 1 <= h <= height
    assert 1 <= w <= width
    radius = network.receptive_radius
    for side, length in ((h, height), (w, width)):
        if side < length and side > 2 * radius:  # not the least, so it fits, whichever way it is turned
            assert most_rows(network, side + 2 * radius, room) >= sizes.STRIP_ROWS
    if h < height and h > 4 * radius:
        assert h * width <= sizes.TILE_PIXELS


class Ready:
    """The members of a prepared network that the division of an image uses; a real one is slow to make."""

    device, streams = torch.device("cpu"), True

    def __init__(self, B: int, U: int, features: int) -> None:
        self.pixel_bytes, self.receptive_radius = 4 * features, (1 + 2 * U) * B + 1


def test_the_room_follows_the_memory_that_is_free(monkeypatch):
    monkeypatch.setattr(sizes, "available_memory", lambda: 64 * 10**9)
    assert sizes.free_room(torch.device("cpu")) == sizes.ROOM
    monkeypatch.setattr(sizes, "available_memory", lambda: 5 * 10**8)
    assert sizes.free_room(torch.device("cpu")) == 2.5 * 10**8


@pytest.mark.parametrize(
    ("free", "kept", "room"), [(8e9, 2e9, 4e9), (3e9, 5e9, 4e9), (1e9, 5e8, 7.5e8), (1e9, 0, 5e8)]
)
def test_the_room_on_a_gpu_counts_what_pytorch_keeps_where_that_is_much(monkeypatch, free, kept, room):
    memory = {"free": int(free), "kept": int(kept)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory["free"], 10**10))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100 + memory["kept"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: memory.update(free=sum(memory.values()), kept=0))
    assert sizes.free_room(torch.device("cuda:1")) == room


def test_available_memory_is_a_sane_number():
    assert 10**6 < sizes.available_memory() < 10**15


def test_what_the_machine_has_decides(monkeypatch):
    network = lively(B=1, U=2)
    monkeypatch.setattr(sizes, "available_memory", lambda: 60_000)
    x, calls = photograph(60, 70), []
    y = super_resolve(network, x, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 4
    np.testing.assert_allclose(y, whole(network, x), rtol=0, atol=1e-5)


# Each measured by the operating system, in a process of its own, forked from one that has imported everything.
MEASURED = {
    "Stream float32": ("stream", "float32", 4),
    "Stream bf16": ("stream", "bf16", 2),
    "RED30": ("red30",),
    "DRRN": ("strips", {"B": 1, "U": 4}),
    "chain": ("strips", {"B": 2, "U": 2, "multi_path": False}),
    "VDSR": ("strips", {"B": 10, "U": 0}),
}
MEASURE = """
import json, os, sys
import numpy as np
import torch
from drrn import inference
from drrn.fast import strips as sizes
from drrn.fast.folded import Folded
from drrn.fast.prepared import prepared
from drrn.fast.stream import MAPS, Stream
from drrn.model import DRRN
from drrn.red30 import RED30

def status(key):
    return 1024 * int(open("/proc/self/status").read().split(key + ":")[1].split()[0])

def stream(precision, size):
    folded = Folded(DRRN(1, 2, features=32).eval(), precision)
    Stream(folded, 64)(torch.rand(1, 1, 64, 64))
    before = status("VmRSS")
    Stream(folded, 700)(torch.rand(1, 1, 700, 700))
    return (status("VmHWM") - before) / (700 * 700 * 32 * size), MAPS

def red30():
    ready = prepared(RED30(layers=7, features=16).train())
    ready.open(64)(torch.rand(1, 1, 64, 64))
    before = status("VmRSS")
    ready.open(400)(torch.rand(1, 1, 400, 400))
    return (status("VmHWM") - before) / (400 * 400 * 16 * 4), ready.maps

def strips(structure):
    network = DRRN(**structure, features=32).eval()
    sizes.WHOLE_BYTES = sizes.STRIP_BYTES = 0
    width = 6_000
    row, shape, rows = 32 * 4 * width, (64, width), sizes.STRIP_ROWS
    room = next(room for room in range(0, 10**9, row) if sizes.most_rows(prepared(network), width, room) == rows)
    assert len(sizes.strips(prepared(network), shape, room)) > 3
    inference.super_resolve(network, np.zeros((40, 40)))
    x = np.ones(shape, np.float32)
    before = status("VmRSS")
    list(inference.super_resolve_strips(network, lambda a, b: x[a:b], shape, room=room))
    return (status("VmHWM") - before) / room, 1

for name, (what, *arguments) in json.loads(sys.argv[1]).items():
    if (child := os.fork()) == 0:
        print(json.dumps([name, *globals()[what](*arguments)]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[float, float]]:
    """Each of MEASURED → the number of maps in memory at the peak, measured and counted."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("the peak is read from Linux's /proc")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(MEASURED)],
        env={
            "PYTHONPATH": str(Path(inference.__file__).parents[1]), "PATH": "", "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",  # memory is given back at once: glibc's heap has gaps
        },
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name: (found, said) for name, found, said in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_three_feature_maps_are_alive_at_the_peak(precision, measured):
    maps, said = measured[f"Stream {precision}"]
    assert 2 < maps < said + 0.3


def test_as_many_feature_maps_are_in_memory_as_a_network_keeps_for_its_skips(measured):
    """RED30's count against the operating system's measurement."""
    maps, said = measured["RED30"]
    assert said - 2 < maps < said + 0.3
    assert [prepared(network).maps for network in (RED30(features=16).double(), SRCNN())] == [11, 3]


@pytest.mark.parametrize("name", ["DRRN", "chain", "VDSR"])
def test_strips_take_the_room_that_they_were_given(name, measured):
    """They use no more than their room, and not much less."""
    assert 0.5 < measured[name][0] < 1.25


def test_a_network_that_looks_at_its_values_is_counted_too():
    class Brightened(SRCNN):
        def forward(self, x):
            return super().forward(x) + (0.0 if x.max().item() > 2 else 0.5)

    network, x = Brightened(), photograph(20, 30)
    np.testing.assert_allclose(super_resolve(network, x), whole(network, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("x", [np.zeros((3, 4, 1)), np.zeros(5), np.zeros((0, 4))], ids=["3-D", "1-D", "empty"])
def test_wrong_shapes_are_refused(x):
    with pytest.raises(ValueError, match=r"\[H, W\]"):
        super_resolve(DRRN(1, 1, features=2), x)


@pytest.mark.parametrize("tile", [0, -3])
def test_wrong_tiles_are_refused(tile):
    with pytest.raises(ValueError, match=f"tile = {tile}"):
        super_resolve(DRRN(1, 1, features=2), np.zeros((4, 4)), tile)


# ---------------------------------------------------------------------- what is prepared


def test_a_network_is_folded_once_and_again_when_it_changes(monkeypatch):
    folded_now, fold = [], prepared_module.FOLDINGS[DRRN]
    monkeypatch.setitem(prepared_module.FOLDINGS, DRRN, lambda *args: folded_now.append(args[1]) or fold(*args))
    network, x = lively(B=1, U=1), photograph(9, 9)
    before = super_resolve(network, x)
    np.testing.assert_array_equal(super_resolve(network, x), before)
    super_resolve(network, x, precision="bf16")
    super_resolve(network, x)
    assert folded_now == ["float32", "bf16"]
    other = lively(seed=1, B=1, U=1)
    changes = {
        "a solver's step": lambda: torch.optim.SGD([network.conv_rec.weight], 1.0).step(),
        "loaded": lambda: network.load_state_dict(other.state_dict()),
        "a running average": lambda: network.norm_rec.running_mean.add_(0.1),
        "a replaced tensor": lambda: setattr(network.conv_rec, "weight", nn.Parameter(network.conv_rec.weight * 2)),
        "moved": lambda: network.double(),
    }
    network.conv_rec.weight.grad = torch.ones_like(network.conv_rec.weight)
    for what, change in changes.items():
        change()
        network.float()
        y = super_resolve(network, x)
        np.testing.assert_allclose(y, whole(network, x), rtol=0, atol=1e-5, err_msg=what)
        assert np.abs(y - before).max() > 1e-4 or what == "moved"
        before = y
    with torch.no_grad():
        network.conv_rec.weight.data.mul_(2)  # PyTorch does not count it
    forget(network)
    np.testing.assert_allclose(super_resolve(network, x), whole(network, x), rtol=0, atol=1e-5)


def test_a_network_without_a_folding_computes_in_float32_whatever_its_weights_are_in() -> None:
    """So that it is scored as its saved weights are; bfloat16 would round the image to steps of 1/256."""
    network, x = SRCNN(features=4).bfloat16(), np.random.default_rng(0).random((20, 24), np.float32)
    rounded = super_resolve(network, x)
    assert next(network.parameters()).dtype == torch.bfloat16
    np.testing.assert_array_equal(rounded, super_resolve(network.float(), x))


def test_what_was_prepared_goes_with_the_network():
    network = lively(B=1, U=1)
    super_resolve(network, photograph(9, 9))
    held = len(prepared_module._kept)
    del network
    gc.collect()
    assert len(prepared_module._kept) < held


def test_a_tensor_gives_a_tensor():
    network, x = lively(B=1, U=1), photograph(20, 30)
    y = super_resolve(network, torch.from_numpy(x))
    assert (y.dtype, y.shape) == (torch.float32, x.shape)
    assert not y.is_inference()
    np.testing.assert_array_equal(y.numpy(), super_resolve(network, x))


def test_synchronised_batchnorms_are_folded_and_other_norms_refused():
    network, x = lively(B=1, U=2), photograph(20, 20)
    expected = whole(network, x)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network).eval()
    np.testing.assert_allclose(super_resolve(network, x), expected, rtol=0, atol=1e-5)
    network.norm_rec = nn.GroupNorm(1, 8)
    with pytest.raises(TypeError, match="GroupNorm"):
        super_resolve(network, x)


class Toy(nn.Module):
    """A network without a folding."""

    receptive_radius = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                                    nn.Conv2d(6, 1, 3, padding=1))  # fmt: skip
        self.layers[1].running_mean.fill_(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


@pytest.mark.parametrize("how", [{}, {"tile": 9}, {"room": 20_000}, {"self_ensemble": True}, {"precision": "auto"}])
def test_any_network_goes_through_as_it_is(how):
    torch.manual_seed(0)
    network, x = Toy().eval(), photograph(41, 33)
    expected = whole(network, x)
    if how.get("self_ensemble"):
        turned = [np.rot90(x[:, :: 1 - 2 * m], q) for m in (0, 1) for q in range(4)]
        back = [np.rot90(whole(network, t.copy()), -q)[:, :: 1 - 2 * m]
                for t, (m, q) in zip(turned, itertools.product((0, 1), range(4)), strict=True)]  # fmt: skip
        expected = np.mean(back, axis=0)
    network.train()
    network.layers[1].eval()
    parts = list(super_resolve_strips(network, lambda a, b: x[a:b], x.shape, **how))
    assert (len(parts) > 1) == ("tile" in how or "room" in how)
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=0, atol=1e-5)
    assert [m.training for m in network.modules()] == [True, True, True, False, True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("structure", FAMILY.values(), ids=FAMILY)
def test_on_a_gpu_it_is_the_network_on_the_cpu(structure, norm):
    network, x = lively(norm=norm, **structure), photograph(60, 50) - 0.2
    expected = whole(network, x)
    residual = np.abs(expected - x).max()
    network.to("cuda")
    for name, limit in (("float32", 1e-4), ("tf32", 0.05 * residual), ("bf16", 0.2 * residual)):
        y = super_resolve(network, x, precision=name)
        np.testing.assert_allclose(y, expected, rtol=0, atol=limit, err_msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_shipped_network_scores_the_same(drrn_data):
    """Set5 ×4, where rounding loses most: within 0.002 dB of the CPU's float32, TF32 within 0.01."""
    network, _ = load_network(weights_file("DRRN_B1U5_32f"))
    pairs = [prepare(read_luminance(path), 4) for path in image_files("Set5", drrn_data)]

    def psnr(precision: str) -> float:
        return np.mean([score(super_resolve(network, x, precision=precision), y, 4)["psnr"] for x, y in pairs])

    expected = psnr("float32")
    network.to("cuda")
    for name, limit in (("float32", 0.002), ("tf32", 0.01), ("bf16", 0.002)):
        assert psnr(name) == pytest.approx(expected, abs=limit), name


# ---------------------------------------------------------------------- bfloat16


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN", "plain"])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("structure", FAMILY.values(), ids=FAMILY)
def test_bfloat16_is_the_same_to_its_rounding(structure, norm, onednn):
    """To the rounding of feature maps; an image rounded to 8 bits of mantissa would be off by 1/512 at the start."""
    network = lively(norm=norm, **structure)
    x = photograph(37, 50) - 0.2
    with torch.backends.mkldnn.flags(enabled=onednn):
        forget(network)
        y, exact = super_resolve(network, x, precision="bf16"), whole(network, x)
    residual = np.abs(exact - x).max()
    assert 0 < np.abs(y - exact).max() < 0.2 * residual
    assert np.sqrt(np.mean((y - exact) ** 2)) < 0.03 * residual


def test_the_first_convolution_stays_in_float32():
    """A change of the image that bfloat16 would round away is visible behind an identity network."""
    network = DRRN(1, 0, features=2, norm="none")
    with torch.no_grad():
        for conv in (network.blocks[0].conv, network.conv_rec):
            conv.weight.zero_()
        network.blocks[0].conv.weight[:, 0, 1, 1] = torch.tensor([64.0, 64.0])
        network.blocks[0].conv.bias.fill_(-64 * 0.75)
        network.conv_rec.weight[0, :, 1, 1] = 1 / 64
    x = np.full((5, 5), 0.7513, np.float32)  # between 0.75 and 0.754, bfloat16's steps
    y = super_resolve(network, x, precision="bf16")
    np.testing.assert_allclose(y, x + 2 * 0.0013, rtol=0, atol=2e-5)


def test_strips_of_bfloat16_are_the_whole(monkeypatch):
    network, x = lively(B=1, U=3), photograph(90, 40)
    at_once = super_resolve(network, x, precision="bf16")
    for limit in ("WHOLE_BYTES", "STRIP_BYTES"):
        monkeypatch.setattr(sizes, limit, 0)
    assert len(sizes.strips(prepared(network, "bf16"), x.shape, sizes.ROOM)) > 2
    np.testing.assert_allclose(super_resolve(network, x, precision="bf16"), at_once, rtol=0, atol=1e-3)


def test_auto_is_the_fastest_that_is_in_hardware(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for amx, avx, expected in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(precision, "onednn", lambda dtype: True)
        assert precision.chosen("auto", cpu) == expected
    for hardware, expected in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, h=hardware: h)
        assert precision.chosen("auto", gpu) == expected
    assert precision.chosen("auto", torch.device("mps")) == "float32"
    assert precision.chosen("tf32", gpu) == "tf32"
    with pytest.raises(UserError, match="precision = tf32: only NVIDIA"):
        precision.chosen("tf32", cpu)
    assert precision.chosen("auto", gpu, folded=False) == "float32"  # reported as it is
    with pytest.raises(UserError, match="precision = bf16"):
        precision.chosen("bf16", gpu, folded=False)


@pytest.fixture(scope="module")
def published() -> DRRN:
    """The VDSR of huangzehao, as src/convert.py reads it."""
    folder = os.environ.get("DRRN_WEIGHTS")
    if not folder:
        pytest.skip("set DRRN_WEIGHTS to the folder that holds vdsr_291_adam.caffemodel")
    foreign = read_foreign(Path(folder) / "vdsr_291_adam.caffemodel", "caffe", None)
    return build(foreign.model, foreign.state)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bfloat16_scores_as_float32(scale, drrn_data, published):
    """Published weights on Set5: within 0.002 dB at each scale, and photographs the same to a grey level."""
    if scale < 4 and not os.environ.get("DRRN_SLOW"):
        pytest.skip("set DRRN_SLOW=1: ×4 is where most is lost")
    scores = {"float32": [], "bf16": []}
    for path in image_files("Set5", drrn_data):
        x, truth = prepare(read_luminance(path), scale)
        results = {name: super_resolve(published, x, precision=name) for name in scores}
        for name, y in results.items():
            scores[name].append(score(y, truth, scale)["psnr"])
        grey = [to_uint8(y).astype(int) for y in results.values()]
        assert (np.abs(grey[0] - grey[1]) <= 1).mean() >= 0.999, path.name
    exact, fast = (np.mean(values) for values in scores.values())
    assert exact == pytest.approx({2: 37.5205, 3: 33.6536, 4: 31.2482}[scale], abs=5e-4)  # the plain module's
    assert fast == pytest.approx(exact, abs=0.002)
