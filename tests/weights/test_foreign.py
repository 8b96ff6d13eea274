"""Weights of others: read as their own programs mean them, and no code in their files is run.

Caffe files are written here from caffe.proto's field numbers and run by a NumPy interpreter of the layer list;
the ports' networks are defined here again, in-place ReLUs and all; a file of torch 0.2 under Python 2 is written
byte by byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import random
import struct
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from torch import nn
from torch.nn import functional as F

from drrn import model
from drrn.errors import UserError
from drrn.protocol import prepare, score
from drrn.weights import files, foreign, pickles
from drrn.weights.foreign import read_foreign, recognise
from drrn.weights.ours import build
from drrn.weights.pickles import unpickle

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A piece of a photograph, interpolated [36, 42] in 0…1, with bicubic's overshoot below 0."""
    piece = skimage.data.camera()[216:252, 240:282].astype(float)
    piece = np.round((piece - piece.min()) / (piece.max() - piece.min()) * 255).astype(np.uint8)
    x, _ = prepare(piece, 3)
    assert x.min() < -0.01
    assert x.max() > 0.9
    return x


def output(found: foreign.Foreign, x: np.ndarray) -> np.ndarray:
    network = build(found.model, found.state)
    with torch.inference_mode():
        return network(torch.from_numpy(x.astype(np.float32))[None, None])[0, 0].numpy()


# ------------------------------------------------------------------ Caffe: a writer and an interpreter


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def sized(field: int, content: bytes | str) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(content)) + content


def fixed32(field: int, value: float) -> bytes:
    return varint(field << 3 | 5) + struct.pack("<f", value)


def blob(array: np.ndarray, style: str) -> bytes:
    """BlobProto: shape = 7, data = 5 packed; "legacy": num…width = 1…4, data not packed; "double": 8."""
    if style == "legacy":
        dims = (1,) * (4 - array.ndim) + array.shape
        values = b"".join(fixed32(5, v) for v in array.ravel())
        return b"".join(number(i, n) for i, n in enumerate(dims, 1)) + values
    shape = sized(7, sized(1, b"".join(varint(n) for n in array.shape)))
    if style == "double":
        return sized(8, array.astype("<f8").tobytes()) + shape
    return sized(5, array.astype("<f4").tobytes()) + shape


# Type → its number in V1LayerParameter; 0 for those that came after it.
V1 = {"Convolution": 4, "ReLU": 18, "Eltwise": 25, "HDF5Data": 9, "EuclideanLoss": 7, "Split": 22}
CONVOLUTION = number(1, 8) + number(3, 1) + number(4, 3) + number(6, 1)  # num_output, pad, kernel_size, stride


def layer(type_: str, name: str, bottoms: list[str], tops: list[str], *blobs: np.ndarray, settings: bytes = b""):
    return {"type": type_, "name": name, "bottoms": bottoms, "tops": tops, "blobs": blobs, "settings": settings}


def caffemodel(layers: list[dict], new: bool = True, style: str = "new", title: str = "DRRN_B1U2_5C8") -> bytes:
    """NetParameter: name = 1, layer = 100 or layers = 2."""
    net = sized(1, title)
    fields = {"Convolution": (106, 10), "BatchNorm": (139, 139), "ReLU": (123, 30), "Eltwise": (110, 24)}
    for one in layers:
        name, type_, bottom, top, blobs = (1, 2, 3, 4, 7) if new else (4, 5, 2, 3, 6)
        text = sized(name, one["name"])
        text += sized(type_, one["type"]) if new else number(type_, V1.get(one["type"], 0))
        text += b"".join(sized(bottom, b) for b in one["bottoms"]) + b"".join(sized(top, t) for t in one["tops"])
        text += b"".join(sized(blobs, blob(b, style)) for b in one["blobs"])
        settings = one["settings"] or (CONVOLUTION if one["type"] == "Convolution" else b"")
        if settings:
            text += sized(fields[one["type"]][0 if new else 1], settings)
        net += sized(100 if new else 2, text + number(10, 0) * new)
    return net


class Random:
    """Blobs of a network that neither explodes nor vanishes, and whose BatchNorms do something."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def conv(self, out: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
        weight = self.generator.normal(0, 0.5 / np.sqrt(inputs * 3), (out, inputs, 3, 3))
        return weight, self.generator.normal(0, 0.1, out)

    def norm(self, name: str, bottom: str, channels: int, factor: float) -> list[dict]:
        mean, variance = self.generator.normal(0, 0.3, channels), self.generator.uniform(0.2, 2, channels)
        sums = (mean * factor, variance * factor, np.array([factor]))
        affine = (self.generator.uniform(0.5, 1.5, channels), self.generator.normal(0, 0.2, channels))
        bn = f"bn_{name}"
        return [
            layer("BatchNorm", bn, [bottom], [bn], *sums),
            layer("Scale", f"scale_{name}", [bn], [bn], *affine),
            layer("ReLU", f"relu_{name}", [bn], [bn]),
        ]


def drrn_layers(B: int, U: int, features: int = 5, share: bool = True, factor: float = 999.98) -> list[dict]:
    """Like the release's prototxt: BatchNorm, Scale, in-place ReLU, Convolution; identity from `conv{b}`."""
    make = Random(B * 10 + U)
    layers = [layer("HDF5Data", "data", [], ["data", "label"])]
    below, channels = "data", 1
    for b in range(1, B + 1):
        first = f"conv{b}"
        layers += make.norm(first, below, channels, factor)
        layers.append(layer("Convolution", first, [f"bn_{first}"], [first], *make.conv(features, channels)))
        below, channels = first, features
        pair = {ab: make.conv(features, features) for ab in "ab"}
        for u in range(1, U + 1):
            for ab in "ab":
                name = f"conv{b}_{u}{ab}"
                if not share:
                    pair[ab] = make.conv(features, features)
                layers += make.norm(name, below, features, factor)
                layers.append(layer("Convolution", name, [f"bn_{name}"], [name], *pair[ab]))
                below = name
            layers.append(layer("Eltwise", f"eltwise{b}_{u}", [first, below], [f"eltwise{b}_{u}"]))
            below = f"eltwise{b}_{u}"
    layers += make.norm("conv_end", below, features, factor)
    layers.append(layer("Convolution", "conv_end", ["bn_conv_end"], ["conv_end"], *make.conv(1, features)))
    layers.append(layer("Eltwise", "HR_recovery", ["data", "conv_end"], ["HR"], settings=number(1, 1)))
    return [*layers, layer("EuclideanLoss", "loss", ["HR", "label"], ["loss"])]


def vdsr_layers(depth: int, features: int = 4, pre_bn: bool = False) -> list[dict]:
    """huangzehao's: convolutions with a ReLU in place after each but the last; or the release's PreBN."""
    make = Random(depth)
    layers, below = [layer("HDF5Data", "data", [], ["data", "label"])], "data"
    for i in range(1, depth + 1):
        inputs, out = 1 if i == 1 else features, 1 if i == depth else features
        name = f"conv{i}"
        if pre_bn:
            layers += make.norm(name, below, inputs, 3.0)
            below = f"bn_{name}"
        layers.append(layer("Convolution", name, [below], [name], *make.conv(out, inputs)))
        if not pre_bn and i < depth:
            layers.append(layer("ReLU", f"relu{i}", [name], [name]))
        below = name
    return [*layers, layer("Eltwise", "sum", ["data", below], ["HR"], settings=number(1, 1))]


def correlate(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    height, width = x.shape[1:]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(weight), height, width)) + bias[:, None, None]
    for i in range(3):
        for j in range(3):
            out += np.einsum("oc,chw->ohw", weight[:, :, i, j], padded[:, i : i + height, j : j + width])
    return out


def run_caffe(layers: list[dict], image: np.ndarray) -> np.ndarray:
    """Caffe in NumPy, float64: layers in order over named blobs, in place where top is bottom."""
    held = {"data": image[None]}
    for one in layers:
        blobs, bottoms = one["blobs"], [held[b] for b in one["bottoms"] if b in held]
        match one["type"]:
            case "Convolution":
                result = correlate(bottoms[0], *blobs)
            case "BatchNorm":
                factor = 0 if blobs[2][0] == 0 else 1 / blobs[2][0]
                mean, variance = (b[:, None, None] * factor for b in blobs[:2])
                result = (bottoms[0] - mean) / np.sqrt(variance + 1e-5)
            case "Scale":
                result = bottoms[0] * blobs[0][:, None, None] + blobs[1][:, None, None]
            case "ReLU":
                result = np.maximum(bottoms[0], 0)
            case "Eltwise":
                result = bottoms[0] + bottoms[1]
            case _:
                continue
        held[one["tops"][0]] = result
    return held["HR"][0]


@pytest.mark.parametrize(("B", "U", "new", "style"), [
    (1, 3, True, "new"), (2, 1, True, "double"), (2, 2, True, "legacy"), (1, 2, False, "legacy"),
    (1, 9, False, "new"),
])  # fmt: skip
def test_caffe_drrn_means_what_caffe_computes(B, U, new, style, photo, tmp_path) -> None:
    layers = drrn_layers(B, U)
    path = tmp_path / "x.caffemodel"
    path.write_bytes(caffemodel(layers, new, style))
    assert recognise(path) == "caffe"
    found = read_foreign(path, "caffe")
    assert (found.model["B"], found.model["U"], found.model["features"]) == (B, U, 5)
    assert found.model["weight_sharing"]
    assert found.model["multi_path"]
    assert found.model["norm"] == "batch"
    assert not found.model["rectified_identity"]
    assert found.model["input_relu"]
    assert found.notes == []
    assert sum(name.endswith(("conv_a.0.weight", "conv_b.0.weight")) for name in found.state) == 2 * B
    assert not any("conv_a.1" in name for name in found.state)
    truth = run_caffe(layers, photo)
    assert np.abs(truth - photo).max() > 0.05  # the network does something
    np.testing.assert_allclose(output(found, photo), truth, atol=TOLERANCE)


def test_copies_that_differ_are_said_and_kept(photo, tmp_path) -> None:
    layers = drrn_layers(1, 3, share=False)
    path = tmp_path / "x.caffemodel"
    path.write_bytes(caffemodel(layers))
    found = read_foreign(path, "caffe")
    assert not found.model["weight_sharing"]
    assert "copies" in found.notes[0]
    assert "conv1_2a" in found.notes[0]
    np.testing.assert_allclose(output(found, photo), run_caffe(layers, photo), atol=TOLERANCE)


def test_a_copy_whose_bias_alone_differs_is_noticed(tmp_path) -> None:
    layers = drrn_layers(1, 2)
    last = next(one for one in layers if one["name"] == "conv1_2b")
    last["blobs"] = (last["blobs"][0], last["blobs"][1] + 1e-3)
    path = tmp_path / "x.caffemodel"
    path.write_bytes(caffemodel(layers))
    assert "bias of conv1_2b" in read_foreign(path, "caffe").notes[0]


def test_caffe_chain_is_drrn_c(photo, tmp_path) -> None:
    layers = drrn_layers(1, 3)
    for one in layers:
        if one["name"] in ("eltwise1_2", "eltwise1_3"):
            one["bottoms"][0] = f"eltwise1_{int(one['name'][-1]) - 1}"
    path = tmp_path / "x.caffemodel"
    path.write_bytes(caffemodel(layers))
    found = read_foreign(path, "caffe")
    assert not found.model["multi_path"]
    np.testing.assert_allclose(output(found, photo), run_caffe(layers, photo), atol=TOLERANCE)


def test_batchnorm_before_its_first_step_has_no_statistics(tmp_path) -> None:
    layers = drrn_layers(1, 1, factor=0.0)
    path = tmp_path / "x.caffemodel"
    path.write_bytes(caffemodel(layers))
    state = read_foreign(path, "caffe").state
    assert not state["norm_rec.running_var"].any()
    assert not state["norm_rec.running_mean"].any()


@pytest.mark.parametrize("pre_bn", [False, True])
@pytest.mark.parametrize("new", [False, True])
def test_caffe_vdsr_keeps_or_cuts_overshoot_as_its_layers_say(new, pre_bn, photo, tmp_path) -> None:
    layers = vdsr_layers(6, pre_bn=pre_bn)
    path = tmp_path / "x.caffemodel"
    path.write_bytes(caffemodel(layers, new, "new" if new else "legacy"))
    found = read_foreign(path, "caffe")
    assert (found.model["B"], found.model["U"]) == (5, 0)
    assert found.model["input_relu"] == pre_bn
    assert any("negative overshoot" in note for note in found.notes) == (not pre_bn)
    truth = run_caffe(layers, photo)
    np.testing.assert_allclose(output(found, photo), truth, atol=TOLERANCE)
    if not pre_bn:  # the ReLU would matter: this test can tell
        cut = output(found._replace(model={**found.model, "input_relu": True}), photo)
        assert np.abs(cut - truth).max() > 10 * TOLERANCE


def test_a_file_of_weights_alone_is_read_as_the_family_is(tmp_path) -> None:
    layers = [one for one in drrn_layers(1, 2) if one["blobs"]]
    path = tmp_path / "x.caffemodel"
    path.write_bytes(caffemodel(layers))
    found = read_foreign(path, "caffe")
    assert found.model["input_relu"]
    assert "no ReLU" in found.notes[0]


def changed(which: str, /, **change) -> list[dict]:
    layers = drrn_layers(1, 2)
    next(one for one in layers if one["name"] == which).update(change)
    return layers


@pytest.mark.parametrize(("layers", "words"), [
    (changed("conv1_1a", settings=CONVOLUTION + number(6, 2)), "conv1_1a"),  # a stride
    (changed("conv1_1a", settings=CONVOLUTION + number(18, 2)), "conv1_1a"),  # dilation
    (changed("conv1", settings=number(4, 3)), "padding"),
    (changed("bn_conv1", settings=fixed32(3, 1e-3)), "bn_conv1"),  # eps
    (changed("relu_conv1", settings=fixed32(1, 0.1)), "relu_conv1"),  # a leak
    (changed("eltwise1_1", settings=number(1, 0)), "eltwise1_1"),  # a product
    (changed("conv1_1b", name="conv1_3b"), "not all of"),
    (changed("conv1_1b", name="conv1_9999b"), "not all of"),
    (changed("conv1_2b", name="conv1_1b"), "same name"),
    (changed("bn_conv1_2a", type="InnerProduct"), "InnerProduct"),
    (changed("conv_end", type="Deconvolution"), "Deconvolution"),
    (changed("relu_conv1_2a", type="Split"), "no ReLU before conv1_2a"),
    (changed("bn_conv1_1a", blobs=(np.ones(5), np.ones(5))), "scale factor"),
    (changed("conv1_1a", blobs=(np.ones((5, 5, 3, 3)),)), "bias"),
    ([one for one in drrn_layers(1, 2) if one["name"] != "conv1_2a"], "not all of"),
    ([one for one in drrn_layers(1, 2) if "conv_end" not in one["name"]], "not all of"),
    ([one for one in drrn_layers(1, 2) if one["name"] not in ("bn_conv1_2a", "scale_conv1_2a")], "BatchNorm"),
    ([], "convolutions"),
])  # fmt: skip
def test_caffe_networks_of_other_families_are_refused_by_layer(layers, words, tmp_path) -> None:
    path = tmp_path / "x.caffemodel"
    path.write_bytes(caffemodel(layers))
    with pytest.raises(UserError, match=words):
        read_foreign(path, "caffe")


@pytest.mark.parametrize(("name", "blobs", "words"), [
    ("conv1_1a", (np.ones((5, 5, 5, 5)), np.ones(5)), r"\[5, 5, 5, 5\]"),
    ("bn_conv1", (np.ones(3), np.ones(3), np.ones(1)), "blocks.0.norm"),
    ("conv_end", (np.full((1, 5, 3, 3), np.nan), np.ones(1)), "not finite"),
    ("conv_end", (np.ones((2, 5, 3, 3)), np.ones(2)), "conv_rec"),
])  # fmt: skip
def test_shapes_and_values_are_held_against_the_structure(name, blobs, words, tmp_path) -> None:
    path = tmp_path / "x.caffemodel"
    path.write_bytes(caffemodel(changed(name, blobs=blobs)))
    found = read_foreign(path, "caffe")
    with pytest.raises(ValueError, match=words):
        build(found.model, found.state)


@pytest.mark.parametrize("new", [True, False])
def test_a_caffe_file_cut_at_any_length_is_refused(new, tmp_path) -> None:
    layers = drrn_layers(1, 1, features=1)
    whole, path = caffemodel(layers, new), tmp_path / "x.caffemodel"
    path.write_bytes(whole)
    state = read_foreign(path, "caffe").state
    weights_end = len(caffemodel(layers[:-2], new))  # after it come the sum and the loss, without weights
    accepted = []
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            found = read_foreign(path, "caffe")
        except UserError:
            continue
        accepted.append(length)
        assert all(torch.equal(state[name], found.state[name]) for name in state)
    assert accepted == [weights_end, len(caffemodel(layers[:-1], new))]


def test_a_blob_that_promises_more_than_it_has_takes_no_memory(tmp_path) -> None:
    huge = sized(5, b"\0" * 8) + sized(7, sized(1, varint(10**9) * 4))
    text = sized(1, "conv1") + sized(2, "Convolution") + sized(7, huge)
    path = tmp_path / "x.caffemodel"
    path.write_bytes(sized(100, text))
    with pytest.raises(UserError, match="holds 2 values"):
        read_foreign(path, "caffe")
    path.write_bytes(varint(100 << 3 | 2) + varint(2**62) + b"short")
    with pytest.raises(UserError, match="truncated"):
        read_foreign(path, "caffe")


# ------------------------------------------------------------------ the real Caffe VDSR


def caffe_vdsr() -> Path:
    folder = os.environ.get("DRRN_WEIGHTS")
    if folder is None and "DRRN_DATA" in os.environ:
        folder = Path(os.environ["DRRN_DATA"]).parent / "weights"
    path = Path(folder or "nowhere") / "vdsr_291_adam.caffemodel"
    if not path.is_file():
        pytest.skip("vdsr_291_adam.caffemodel of huangzehao/caffe-vdsr is not there: set DRRN_WEIGHTS to its folder")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "9199251105e65ccbe3c720192366383e12fca21afaa71a792595b13eb2d8ae9d"
    return path


def test_the_real_caffe_vdsr_on_a_photograph(photo) -> None:
    """Against a forward from the file's bytes: its blobs are found by their length fields alone."""
    path = caffe_vdsr()
    assert recognise(path) == "caffe"
    found = read_foreign(path, "caffe")
    assert (found.model["B"], found.model["U"], found.model["features"], found.model["norm"]) == (19, 0, 64, "none")
    assert found.model["bias"]
    assert not found.model["input_relu"]
    data, h, at = path.read_bytes(), torch.from_numpy(photo.astype(np.float32))[None, None], 0
    x = h
    for i in range(20):
        inputs, out = 1 if i == 0 else 64, 1 if i == 19 else 64
        count = inputs * out * 9
        marks = [varint(5 << 3 | 2) + varint(4 * n) for n in (count, out)]  # data = 5
        at = data.index(marks[0], data.index(b"Convolution", at)) + len(marks[0])
        weight = torch.tensor(np.frombuffer(data, "<f4", count, at)).reshape(out, inputs, 3, 3)
        at = data.index(marks[1], at + 4 * count) + len(marks[1])
        bias = torch.tensor(np.frombuffer(data, "<f4", out, at))
        at += 4 * out
        h = F.conv2d(h if i == 0 else h.relu(), weight, bias, padding=1)
    truth = (h + x)[0, 0].numpy()
    assert np.abs(truth - photo).max() > 0.02
    np.testing.assert_allclose(output(found, photo), truth, atol=TOLERANCE)


TARGETS = {2: (37.52, 0.9587), 3: (33.65, 0.9212), 4: (31.25, 0.8813)}  # measured with the protocol, not by us


@pytest.mark.parametrize("scale", TARGETS)
@pytest.mark.skipif("DRRN_SLOW" not in os.environ, reason="takes a minute a scale: set DRRN_SLOW=1")
def test_the_real_caffe_vdsr_on_set5(scale) -> None:
    from drrn.images import read_luminance
    from drrn.sets import image_files

    found = read_foreign(caffe_vdsr(), "caffe")
    files = image_files("Set5", Path(os.environ["DRRN_DATA"]))
    assert len(files) == 5
    rows = []
    for path in files:
        x, truth = prepare(read_luminance(path), scale)
        rows.append(score(output(found, x), truth, scale))
    psnr, ssim = (sum(row[key] for row in rows) / 5 for key in ("psnr", "ssim"))
    assert (round(psnr, 2), round(ssim, 4)) == TARGETS[scale]


# ------------------------------------------------------------------ the ports' networks, defined here again


class DRRN(nn.Module):
    """jt827859032's, with fewer features and recursions: one ReLU module, in place."""

    def __init__(self, features: int, U: int) -> None:
        super().__init__()
        self.input = nn.Conv2d(1, features, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.output = nn.Conv2d(features, 1, 3, padding=1, bias=False)
        self.relu, self.U = nn.ReLU(inplace=True), U

    def forward(self, x):
        keep = x
        start = self.input(self.relu(x))
        h = start
        for _ in range(self.U):
            h = torch.add(self.conv2(self.relu(self.conv1(self.relu(h)))), start)
        return torch.add(self.output(self.relu(h)), keep)


class ConvLayer(nn.Module):
    """yjn870's, here and the three below."""

    def __init__(self, inputs: int, out: int) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(inputs, out, 3, padding=1, bias=False))

    def forward(self, x):
        return self.module(x)


class ResidualUnit(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.module = nn.Sequential(ConvLayer(features, features), ConvLayer(features, features))

    def forward(self, h0, x):
        return h0 + self.module(x)


class RecursiveBlock(nn.Module):
    def __init__(self, inputs: int, features: int, U: int) -> None:
        super().__init__()
        self.U, self.h0, self.ru = U, ConvLayer(inputs, features), ResidualUnit(features)

    def forward(self, x):
        h0 = self.h0(x)
        h = h0
        for _ in range(self.U):
            h = self.ru(h0, h)
        return h


class Yjn(nn.Module):
    def __init__(self, B: int, U: int, features: int) -> None:
        super().__init__()
        self.rbs = nn.Sequential(*(RecursiveBlock(features if b else 1, features, U) for b in range(B)))
        self.rec = ConvLayer(features, 1)

    def forward(self, x):
        keep = x
        h = self.rec(self.rbs(x))
        h += keep
        return h


class Conv_ReLU_Block(nn.Module):  # noqa: N801
    """twtygqyy's, and the one below."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.conv(x))


class Net(nn.Module):
    def __init__(self, depth: int, features: int) -> None:
        super().__init__()
        self.residual_layer = nn.Sequential(*(Conv_ReLU_Block(features) for _ in range(depth - 2)))
        self.input = nn.Conv2d(1, features, 3, padding=1, bias=False)
        self.output = nn.Conv2d(features, 1, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return torch.add(self.output(self.residual_layer(self.relu(self.input(x)))), x)


def seeded(network: nn.Module, seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.7 / (3 * parameter.shape[1] ** 0.5), generator=generator)
    return network.eval()


def run_port(network: nn.Module, image: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(image.astype(np.float32))[None, None]
    with torch.no_grad():
        return network(x.clone())[0, 0].numpy()  # a clone: the in-place ReLUs write into their input


def unlike_paper(found: foreign.Foreign, image: np.ndarray, truth: np.ndarray) -> float:
    """The difference that the paper's identities would make."""
    model = {**found.model, "rectified_identity": False}
    return np.abs(output(found._replace(model=model), image) - truth).max()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("U", [1, 3])
def test_jt827859032(U, new, photo, tmp_path) -> None:
    network = seeded(DRRN(6, U))
    path = tmp_path / "model_epoch_28.pth"
    torch.save({"epoch": 28, "model": network}, path, _use_new_zipfile_serialization=new)
    assert recognise(path) == "jt827859032"
    with pytest.raises(UserError, match="U=25"):
        read_foreign(path, "jt827859032")
    found = read_foreign(path, "jt827859032", U)
    assert (found.model["B"], found.model["U"], found.model["features"]) == (1, U, 6)
    truth = run_port(network, photo)
    np.testing.assert_allclose(output(found, photo), truth, atol=TOLERANCE)
    assert unlike_paper(found, photo, truth) > 1e-2


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("B", [1, 3])
def test_yjn870(B, new, photo, tmp_path) -> None:
    network = seeded(Yjn(B, 2, 6))
    path = tmp_path / f"drrn_B{B}U2_x3.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=new)
    assert recognise(path) == "yjn870"
    found = read_foreign(path, "yjn870")  # U from the name
    assert (found.model["B"], found.model["U"], found.model["features"]) == (B, 2, 6)
    truth = run_port(network, photo)
    np.testing.assert_allclose(output(found, photo), truth, atol=TOLERANCE)
    assert unlike_paper(found, photo, truth) > 1e-2
    assert read_foreign(path, "yjn870", 5).model["U"] == 5  # what is typed counts more than the name


@pytest.mark.parametrize("wrap", [
    lambda n: {"state_dict": n.state_dict()},
    lambda n: {"epoch": 3, "model": nn.DataParallel(n)},
    lambda n: nn.DataParallel(n).state_dict(),
    lambda n: n.double(),
    lambda n: {"model": n, "best": float("nan"), "history": [1, (2, {"a": "b"})], "seen": {1, 2}},
], ids=["state_dict", "DataParallel", "DataParallel state", "double", "more"])  # fmt: skip
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_ways_people_save(wrap, protocol, photo, tmp_path) -> None:
    network = seeded(DRRN(4, 2))
    truth = run_port(network, photo)
    path = tmp_path / "DRRN_B1U2.pth"
    torch.save(wrap(network), path, pickle_protocol=protocol)
    assert recognise(path) == "jt827859032"
    np.testing.assert_allclose(output(read_foreign(path, "jt827859032"), photo), truth, atol=TOLERANCE)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_twtygqyy(new, photo, tmp_path) -> None:
    network = seeded(Net(7, 6))
    path = tmp_path / "model_epoch_50.pth"
    torch.save({"epoch": 50, "model": network}, path, _use_new_zipfile_serialization=new)
    assert recognise(path) == "twtygqyy"
    found = read_foreign(path, "twtygqyy")
    assert (found.model["B"], found.model["U"], found.model["features"]) == (6, 0, 6)
    np.testing.assert_allclose(output(found, photo), run_port(network, photo), atol=TOLERANCE)
    with pytest.raises(UserError, match="U = 0"):
        read_foreign(path, "twtygqyy", 3)


def test_half_precision_and_strides_are_read(tmp_path) -> None:
    network = seeded(DRRN(4, 1))
    state = network.state_dict()
    state["conv1.weight"] = state["conv1.weight"].to(memory_format=torch.channels_last)
    state["conv2.weight"] = state["conv2.weight"].half()
    state["input.weight"] = torch.cat([state["input.weight"]] * 2)[4:]  # a view behind an offset
    path = tmp_path / "B1U1.pth"
    torch.save(state, path)
    found = read_foreign(path, "jt827859032")
    assert torch.equal(found.state["blocks.0.conv_a.0.weight"], network.conv1.weight)
    assert torch.equal(found.state["blocks.0.conv_b.0.weight"], network.conv2.weight.half().float())
    assert torch.equal(found.state["blocks.0.conv.weight"], network.input.weight)


@pytest.mark.parametrize(("name", "U", "words"), [
    ("B3U9.pth", None, "called B3U9 but holds B = 1"), ("net.pth", None, "give U="), ("net.pth", 0, "at least 1"),
    ("B1U250001.pth", None, "give U="),
])  # fmt: skip
def test_u_is_asked_for_where_it_is_ambiguous(name, U, words, tmp_path) -> None:
    path = tmp_path / name
    torch.save(DRRN(4, 1).state_dict(), path)
    with pytest.raises(UserError, match=words):
        read_foreign(path, "jt827859032", U)


def test_other_networks_and_wrong_forms_are_refused_by_tensor(tmp_path) -> None:
    path = tmp_path / "B1U1.pth"
    torch.save({"layers.0.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"layers\.0\.weight"):
        recognise(path)
    torch.save(DRRN(4, 1).state_dict(), path)
    for form in ("yjn870", "twtygqyy", "caffe"):
        with pytest.raises(UserError, match=form):
            read_foreign(path, form)
    state = DRRN(4, 1).state_dict()
    del state["conv2.weight"]
    torch.save(state, path)
    found = read_foreign(path, "jt827859032")
    with pytest.raises(ValueError, match="conv_b"):
        build(found.model, found.state)


# ------------------------------------------------------------------ torch 0.2 under Python 2, byte by byte


class Python2Writer:
    """Pickle protocol 2 as cPickle writes it: str as SHORT_BINSTRING (`U`), long as LONG1, a BINPUT after each."""

    def __init__(self) -> None:
        self.out, self.memo = b"\x80\x02", 0

    def put(self) -> None:
        self.out += b"q" + bytes([self.memo]) if self.memo < 256 else b"r" + struct.pack("<I", self.memo)
        self.memo += 1

    def text(self, value: bytes) -> None:
        self.out += (
            b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value
        )
        self.put()

    def long(self, value: int) -> None:
        raw = value.to_bytes((value.bit_length() + 8) // 8, "little")
        self.out += b"\x8a" + bytes([len(raw)]) + raw

    def int(self, value: int) -> None:
        self.out += b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)

    def name(self, module: str, name: str) -> None:
        self.out += f"c{module}\n{name}\n".encode()
        self.put()

    def tuple(self, *writers) -> None:
        self.out += b"("
        for write in writers:
            write()
        self.out += b"t"
        self.put()

    def dict(self, items: dict) -> None:
        self.out += b"}"
        self.put()
        self.out += b"("
        for key, write in items.items():
            self.text(key.encode())
            write()
        self.out += b"u"

    def ordered(self, items: dict) -> None:
        """OrderedDict.__reduce__ of Python 2: a call with a list of two-item lists."""
        self.name("collections", "OrderedDict")
        self.out += b"]"
        self.put()
        self.out += b"("
        for key, write in items.items():
            self.out += b"]"
            self.put()
            self.out += b"("
            self.text(key.encode())
            write()
            self.out += b"e"
        self.out += b"e\x85R"
        self.put()


SOURCE = "# \xe4\xbd\xa0\nclass DRRN(nn.Module):\n    pass\n" + "    # more\n" * 40


def legacy_tensor(w: Python2Writer, key: str, value: torch.Tensor, cuda: bool) -> None:
    w.name("torch._utils", "_rebuild_tensor")
    w.out += b"("

    def storage() -> None:
        w.tuple(
            lambda: w.text(b"storage"),
            lambda: w.name("torch.cuda" if cuda else "torch", "FloatStorage"),
            lambda: w.text(key.encode()),
            lambda: w.text(b"cuda:0" if cuda else b"cpu"),
            lambda: w.long(value.numel()),
            lambda: setattr(w, "out", w.out + b"N"),  # view_metadata
        )
        w.out += b"Q"

    storage()
    w.int(0)
    w.tuple(*(lambda n=n: w.long(n) for n in value.shape))
    w.tuple(*(lambda n=n: w.long(n) for n in value.stride()))
    w.out += b"tR"
    w.put()


def legacy_file(state: dict[str, torch.Tensor], module: bool, cuda: bool = False) -> bytes:
    """torch.save of 2017: four pickles, the list of keys, the raw storages.

    With `module` the object is {"epoch", "model": a DRRN of jt827859032}, else the state dict.
    """
    head = Python2Writer()
    head.long(0x1950A86A20F9469CFC6C)
    data = head.out + b"." + b"\x80\x02M\xe9\x03."
    system = Python2Writer()

    def sizes() -> None:
        system.dict({k: lambda n=n: system.int(n) for k, n in (("int", 4), ("short", 2), ("long", 4))})

    system.dict({
        "type_sizes": sizes,
        "protocol_version": lambda: system.int(1001 // 8),  # overwritten below: one byte is not enough
        "little_endian": lambda: setattr(system, "out", system.out + b"\x88"),
    })  # fmt: skip
    data += system.out.replace(b"K" + bytes([1001 // 8]), b"M\xe9\x03") + b"."

    w = Python2Writer()
    keys = {name: str(94000000000000 + 64 * i) for i, name in enumerate(state)}

    def parameter(name: str) -> None:  # Variable.__reduce_ex__: (type, (data,), (requires_grad, volatile, hooks))
        w.name("torch.nn.parameter", "Parameter")
        legacy_tensor(w, keys[name], state[name], cuda)
        w.out += b"\x85R"
        w.put()
        w.out += b"\x88\x89"
        w.ordered({})
        w.out += b"\x87"
        w.put()
        w.out += b"b"

    def klass(package: str, name: str, source: str) -> None:  # persistent id of a module's class
        w.tuple(
            lambda: w.text(b"module"),
            lambda: w.name(package, name),
            lambda: w.text(b"/home/someone/" + name.encode() + b".py"),
            lambda: w.text(source.encode("latin-1")),
        )
        w.out += b"Q"

    def backend() -> None:
        w.name("torch.nn.backends.thnn", "_get_thnn_function_backend")
        w.out += b")R"
        w.put()

    def make_module(package: str, name: str, source: str, modules: dict, parameters: dict, extra: dict) -> None:
        klass(package, name, source)
        w.out += b")\x81"
        w.put()
        w.dict({
            "_backward_hooks": lambda: w.ordered({}),
            "_forward_hooks": lambda: w.ordered({}),
            "_backend": backend,
            "_modules": lambda: w.ordered(modules),
            "_parameters": lambda: w.ordered(parameters),
            "_buffers": lambda: w.ordered({}),
            "training": lambda: setattr(w, "out", w.out + b"\x88"),
            **extra,
        })  # fmt: skip
        w.out += b"b"

    def convolution(name: str) -> None:
        pair = lambda n: lambda: w.tuple(lambda: w.int(n), lambda: w.int(n))  # noqa: E731
        extra = {"kernel_size": pair(3), "padding": pair(1), "stride": pair(1), "groups": lambda: w.int(1)}
        none = lambda: setattr(w, "out", w.out + b"N")  # noqa: E731
        parameters = {"weight": lambda: parameter(f"{name}.weight"), "bias": none}
        make_module("torch.nn.modules.conv", "Conv2d", "class Conv2d: pass", {}, parameters, extra)

    if module:
        children = {name.removesuffix(".weight"): None for name in state}
        modules = {child: lambda child=child: convolution(child) for child in children}
        true = {"inplace": lambda: setattr(w, "out", w.out + b"\x88")}
        modules["relu"] = lambda: make_module("torch.nn.modules.activation", "ReLU", "class ReLU: pass", {}, {}, true)
        w.dict({
            "epoch": lambda: w.int(28),
            "model": lambda: make_module("drrn", "DRRN", SOURCE, modules, {}, {}),
        })  # fmt: skip
    else:
        w.ordered({name: lambda name=name: legacy_tensor(w, keys[name], state[name], cuda) for name in state})
    data += w.out + b"."

    order = sorted(keys, key=keys.get, reverse=True)
    listed = Python2Writer()
    listed.out += b"](" + b"".join(b"U" + bytes([len(keys[n])]) + keys[n].encode() for n in order) + b"e."
    data += listed.out
    for name in order:
        values = state[name].contiguous().numpy().astype("<f4")
        data += struct.pack("<q", values.size) + values.tobytes()
    return data


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("module", [False, True], ids=["state dict", "module"])
def test_a_file_of_torch_0_2_under_python_2(module, cuda, photo, tmp_path) -> None:
    network = seeded(DRRN(6, 2))
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    data = legacy_file(state, module, cuda)
    path = tmp_path / "DRRN_B1U2.pth"
    path.write_bytes(data)
    if not module and not cuda:  # torch itself takes it for such a file
        theirs = torch.load(io.BytesIO(data), weights_only=False)
        assert all(torch.equal(theirs[name], state[name]) for name in state)
    assert recognise(path) == "jt827859032"
    found = read_foreign(path, "jt827859032")
    np.testing.assert_allclose(output(found, photo), run_port(network, photo), atol=TOLERANCE)


def test_a_legacy_file_cut_short_is_refused(tmp_path) -> None:
    state = {name: tensor.detach() for name, tensor in DRRN(1, 1).state_dict().items()}
    data, path = legacy_file(state, module=True), tmp_path / "B1U1.pth"
    path.write_bytes(data)
    read_foreign(path, "jt827859032")
    for length in [*range(0, len(data), 11), *range(len(data) - 80, len(data))]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError):
            read_foreign(path, "jt827859032")


def test_a_zip_file_cut_or_changed_is_refused_or_read_alike(tmp_path) -> None:
    path = tmp_path / "B1U1.pth"
    torch.save(DRRN(1, 1).state_dict(), path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(UserError):
            read_foreign(path, "jt827859032")


# ------------------------------------------------------------------ the pickle machine


PLAIN = [
    None, True, -5, 2**80, 1.5, "text", "ünï", b"bytes", b"b" * 300, "x" * 300, (), (1,), (1, 2), (1, 2, 3),
    (1, 2, 3, 4), [], [1], [1, [2, (3,)]], {}, {"a": 1}, {"a": {"b": [1, 2]}, 5: None}, OrderedDict(a=1, b=(2,)),
    list(range(3000)), {str(i): i for i in range(2000)},
]  # fmt: skip


# Below protocol 3 Python writes bytes as a call of _codecs.encode, which is refused; below 2 it writes no
# OrderedDict as torch does.
@pytest.mark.parametrize(
    ("value", "protocol"),
    [(v, p) for v in PLAIN for p in range({bytes: 3, OrderedDict: 2}.get(type(v), 0), 6)],
    ids=lambda v: repr(v)[:20],
)
def test_plain_objects_come_out_as_python_would_read_them(value, protocol) -> None:
    data = pickle.dumps(value, protocol)
    ours = unpickle(io.BytesIO(data + b"rest"))
    assert ours == pickle.loads(data)
    assert type(ours) is (dict if isinstance(value, OrderedDict) else type(value))


def test_shared_objects_stay_shared() -> None:
    inner = [1]
    value = unpickle(io.BytesIO(pickle.dumps([inner, inner])))
    assert value[0] is value[1]


class Evil:
    """Calls a function with arguments when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", [
    lambda evil, net: evil,
    lambda evil, net: {"epoch": evil, "model": net},
    lambda evil, net: {"model": net, "more": [({"deep": [evil]},)]},
    lambda evil, net: (setattr(net.conv1, "padding_mode", evil), {"model": net})[1],
    lambda evil, net: OrderedDict([*net.state_dict().items(), ("x", evil)]),
], ids=["alone", "beside", "nested", "in a module", "in a state dict"])  # fmt: skip
def test_a_call_hidden_in_a_pickle_is_refused_by_name_and_not_made(where, new, protocol, tmp_path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "B1U1.pth"
    evil = Evil(os.system, f"touch {marker}")
    torch.save(where(evil, DRRN(2, 1)), path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    assert b"touch" in path.read_bytes()
    for read in (recognise, lambda p: read_foreign(p, "jt827859032")):
        with pytest.raises(UserError, match=r"posix\.system|nt\.system"):
            read(path)
    assert not marker.exists()


@pytest.mark.parametrize(("code", "words"), [
    (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
    (b"(S'true'\nios\nsystem\n.", "INST"),
    (b"(cos\nsystem\nS'true'\no.", "os.system"),  # OBJ
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "os.system"),  # STACK_GLOBAL
    (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "builtins.eval"),
    (b"\x80\x02c__builtin__\neval\nU\x011\x85R.", "__builtin__.eval"),
    (b"\x80\x02csubprocess\nPopen\n)\x81.", "subprocess.Popen"),  # NEWOBJ
    (b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93)}\x92.", "subprocess.Popen"),  # NEWOBJ_EX
    (b"\x80\x02\x82\x01.", "EXT1"),
    (b"\x80\x02ctorch.hub\nload\n)R.", "torch.hub.load"),
    (b"\x80\x02ctorch.serialization\nload\n)R.", "torch.serialization.load"),
    (b"\x80\x02ctorch.nn.modules.conv\nos.system\n)R.", "os.system"),
    (b"\x80\x02ctorch._utils\n_rebuild_tensor\nU\x04true\x85R.", "damaged"),
    (b"\x80\x02ctorch\nFloatStorage\n)R.", "damaged"),
    (b"\x80\x02U\x04true)R.", "damaged"),
    (b"\x80\x02}(ctorch\nFloatStorage\nK\x01u.", "dict key"),
    (b"Pid\n.", "PERSID"),
])  # fmt: skip
def test_every_way_to_call_is_refused_by_name(code, words) -> None:
    with pytest.raises(ValueError, match=words):
        unpickle(io.BytesIO(code), lambda identity: identity)


def zipped(pickled: bytes, **records: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in records.items():
            archive.writestr(f"archive/data/{name[1:]}", content)
    return file.getvalue()


def tensor_pickle(size: list[int], stride: list[int], numel: int, offset: int = 0, key: str = "0") -> bytes:
    """A state dict with one tensor, `_rebuild_tensor_v2`, whatever its numbers."""
    code = [b"\x80\x02}U\x0binput.weightctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\n"]
    code[0] = code[0].replace(b"U\x0b", b"U\x0c")
    code.append(b"U" + bytes([len(key)]) + key.encode() + b"U\x03cpu" + f"L{numel}\n".encode() + b"tQ")
    code.append(f"L{offset}\n".encode())
    for numbers in (size, stride):
        code.append(b"(" + b"".join(f"L{n}\n".encode() for n in numbers) + b"t")
    code.append(b"\x89}tRs.")
    return b"".join(code)


@pytest.mark.parametrize(("size", "stride", "numel", "offset", "words"), [
    ([10**9, 10**9], [10**9, 1], 4, 0, "storage of 4"),
    ([10**12], [0], 4, 0, "storage of 4"),  # expanded from one number
    ([4], [10**9], 4, 0, "storage of 4"),
    ([4], [1], 4, 1, "storage of 4"),
    ([4], [1], 2**61, 0, "ask for more"),
    ([2**100], [1], 2**100, 0, "not a count"),
    ([4], [1], 5, 0, "has 16 bytes"),
    ([1], [1], 3, 0, "has 16 bytes"),
    ([-4], [1], 4, 0, "not a count"),
    ([4], [-1], 4, 3, "not a count"),
    ([4], [1], -4, 0, "not a count"),
    ([4], [1, 1], 4, 0, "impossible"),
    ([1] * 5000, [1] * 5000, 4, 0, "impossible"),
    ([0, 10**9], [1, 1], 4, 0, "storage of 4"),
])  # fmt: skip
def test_sizes_are_checked_before_memory_is_taken(size, stride, numel, offset, words, tmp_path) -> None:
    path = tmp_path / "B1U1.pth"
    path.write_bytes(zipped(tensor_pickle(size, stride, numel, offset), _0=bytes(16)))
    tracemalloc.start()
    with pytest.raises(UserError, match=words):
        read_foreign(path, "jt827859032")
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()


def test_a_sound_tensor_pickle_is_read(tmp_path) -> None:
    """The writer of the test above, with correct sizes."""
    root = pickles.read_torch(zipped(tensor_pickle([2, 2], [2, 1], 4), _0=struct.pack("<4f", 1, 2, 3, 4)))
    assert root["input.weight"].tensor().tolist() == [[1, 2], [3, 4]]


def test_many_views_of_one_storage_cannot_fill_memory(tmp_path) -> None:
    one = tensor_pickle([2**20], [1], 2**20)
    start, end = one.index(b"ctorch._utils"), one.rindex(b"s.")
    body = one[start:end]
    code = b"\x80\x02}" + b"".join(b"X\x06\x00\x00\x00%06d" % i + body + b"s" for i in range(400)) + b"."
    path = tmp_path / "x.pth"
    path.write_bytes(zipped(code, _0=bytes(4 << 20)))
    with pytest.raises(UserError, match="ask for more"):
        read_foreign(path, "jt827859032")


@pytest.mark.parametrize("code", [
    b"\x80\x02Nr\xff\xff\xff\xff.",  # memo index 2³²
    b"\x80\x02X\xff\xff\xff\x7fab.",  # a string of 2 GB
    b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fab.",  # bytes of 2⁶³
    b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.",  # a frame of 2⁶³
    b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",  # depth
    b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b".",  # (t, t) doubled 200 times
    b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 200 + b"Ns.",  # the same as a key, to be hashed
    b"\x80\x02ccollections\nOrderedDict\n](](" + b")" + b"q\x00h\x00\x86" * 200 + b"Neee\x85R.",
    b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b")R.",  # the same, called
    b"\x80\x04)" + b"q\x00h\x00\x86" * 200 + b"h\x00\x93.",  # the same as a name
    b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b"Q.",  # the same as a persistent id
    # the same as the name of a module's parameter, in a list that dict() would take
    b"\x80\x02ctorch.nn.modules.conv\nConv2d\n)\x81}U\x0b_parameters]()" + b"q\x00h\x00\x86" * 200 + b"N\x86esb.",
    b"L" + b"9" * 1_000_000 + b"L\n.",
    b".", b"", b"0.", b"t.", b"e.", b"u.", b"h\x05.", b"R.", b"b.", b"\x81.", b"a.", b"s.", b"1.", b"2.", b"\x93.",
    b"(.", b"K", b"N", b"\xff\xff\xff.",
])  # fmt: skip
def test_hostile_pickles_neither_hang_nor_fill_memory(code, tmp_path) -> None:
    path = tmp_path / "B1U1.pth"
    path.write_bytes(zipped(code))
    tracemalloc.start()
    with pytest.raises(UserError):
        read_foreign(path, "jt827859032")
    with pytest.raises(UserError):
        recognise(path)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize("code", [
    b"\x80\x02cbuiltins\nset\n](%be\x85R.", b"\x80\x04\x8f(%b\x90.", b"\x80\x02}%bNs.",
], ids=["set", "ADDITEMS", "dict"])  # fmt: skip
def test_what_torch_would_hash_for_ever_is_refused(code) -> None:
    """A run's checkpoint is read by our unpickler, and then by torch's."""
    with pytest.raises(ValueError, match="that is a tuple"):
        unpickle(io.BytesIO(code % (b")" + b"q\x00h\x00\x86" * 200)))
    assert unpickle(io.BytesIO(pickle.dumps({"a", 5}, 2))) in (["a", 5], [5, "a"])
    assert unpickle(io.BytesIO(pickle.dumps({"a", 5}, 4))) in (["a", 5], [5, "a"])


def test_modules_that_hold_each_other_are_refused(tmp_path) -> None:
    network = DRRN(2, 1)
    network._modules["conv1"]._modules["loop"] = network
    path = tmp_path / "B1U1.pth"
    torch.save({"model": network}, path)
    with pytest.raises(UserError, match="modules"):
        read_foreign(path, "jt827859032")
    chain = nn.Sequential()
    for _ in range(40):
        chain = nn.Sequential(chain, chain)  # 2⁴⁰ paths
    torch.save({"model": chain}, path)
    with pytest.raises(UserError, match="modules"):
        read_foreign(path, "jt827859032")


def test_zip_files_with_tricks_are_refused(tmp_path) -> None:
    path = tmp_path / "B1U1.pth"
    pickled = tensor_pickle([4], [1], 4)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(10**7))  # 1000 : 1
    for data, words in (
        (file.getvalue(), "compressed"),
        (zipped(pickled), "data/0"),
        (zipped(tensor_pickle([4], [1], 4, key="../../etc/passwd")), "passwd"),
        (b"PK\x03\x04" + b"\0" * 100, "zip"),
        (zipped(pickled, _0=bytes(16)).replace(b"data.pkl", b"data.pki"), "zip"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=words):
            read_foreign(path, "jt827859032")
    order = io.BytesIO(zipped(pickled, _0=bytes(16)))
    with zipfile.ZipFile(order, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    path.write_bytes(order.getvalue())
    with pytest.raises(UserError, match="byte order"):
        read_foreign(path, "jt827859032")


def test_what_is_too_large_or_not_there_is_not_read(tmp_path) -> None:
    path = tmp_path / "large.caffemodel"
    with path.open("wb") as file:
        file.truncate(files.LIMIT + 1)  # sparse
    for target, words in ((path, "bytes"), (tmp_path, "cannot be read"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(UserError, match=words):
            recognise(target)


def test_the_container_of_2016_is_named(tmp_path) -> None:
    import tarfile

    path = tmp_path / "old.pth"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    with pytest.raises(UserError, match="2016"):
        recognise(path)


def test_random_bytes_and_random_damage_are_refused_or_read(tmp_path) -> None:
    """Any bytes give a UserError or a network's description, never another error."""
    chance, path = random.Random(1), tmp_path / "B1U1.pth"
    torch.save({"epoch": 1, "model": DRRN(1, 1)}, path)
    whole = [path.read_bytes(), caffemodel(drrn_layers(1, 1, features=1))]
    torch.save(DRRN(1, 1).state_dict(), path, _use_new_zipfile_serialization=False)
    whole += [path.read_bytes(), legacy_file(dict(DRRN(1, 1).state_dict()), module=True)]
    heads = [b"", b"PK\x03\x04", b"\x80\x02", whole[2][:40], whole[1][:20], struct.pack("<Q", 60) + b"{"]
    outcomes = {"refused": 0, "read": 0}
    for trial in range(450):
        if trial % 3 == 0:
            data = chance.choice(heads) + chance.randbytes(chance.randrange(200))
        else:
            data = bytearray(chance.choice(whole))
            for _ in range(chance.choice((1, 1, 1, 5))):
                data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        for read in (recognise, *(lambda p, f=f: read_foreign(p, f, None) for f in foreign.FORMS)):
            try:
                found = read(path)
                outcomes["read"] += 1
            except UserError:
                outcomes["refused"] += 1
                continue
            if isinstance(found, foreign.Foreign):
                with contextlib.suppress(ValueError):
                    build(found.model, found.state)
    assert min(outcomes["refused"] - 900, outcomes["read"] - 40) > 0, outcomes


# ------------------------------------------------------------------ the two switches in our network


def test_the_switches_are_off_by_default_and_change_nothing_then(photo) -> None:
    torch.manual_seed(0)
    plain = model.DRRN(2, 2, 4)
    torch.manual_seed(0)
    said = model.DRRN(2, 2, 4, rectified_identity=False, input_relu=True)
    x = torch.from_numpy(photo.astype(np.float32))[None, None]
    assert torch.equal(plain(x), said(x))
    assert (
        plain.state_dict().keys()
        == model.DRRN(2, 2, 4, rectified_identity=True, input_relu=False).state_dict().keys()
    )


def test_the_rectified_chain_is_each_unit_on_what_a_relu_left(photo) -> None:
    network = model.DRRN(1, 2, 4, norm="none", multi_path=False, rectified_identity=True).eval()
    x = torch.from_numpy(photo.astype(np.float32))[None, None]
    with torch.no_grad():
        block = network.blocks[0]
        h = block.conv(x.clamp(min=0))
        for _ in range(2):
            h = h.clamp(min=0)
            h = h + block.conv_b[0](block.conv_a[0](h).clamp(min=0))
        expected = network.conv_rec(h.clamp(min=0)) + x.clamp(min=0)
        torch.testing.assert_close(network(x), expected)


assert sys.byteorder == "little"  # the writers above
