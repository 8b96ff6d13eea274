"""MATLAB's files, compared with SciPy's reader and writer; and the real VDSR of its authors."""

from __future__ import annotations

import io
import itertools
import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torch.nn import functional as F

from drrn.errors import UserError
from drrn.weights.foreign import read_foreign, recognise
from drrn.weights.matlab_file import read_variables
from drrn.weights.ours import build


def written(compressed: bool = False, **variables) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=compressed)
    return file.getvalue()


def cell(items: list) -> np.ndarray:
    result = np.empty((1, len(items)), dtype=object)
    for i, item in enumerate(items):
        result[0, i] = item
    return result


def vdsr(depth: int, features: int = 3) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(depth)
    widths = [1, *[features] * (depth - 1), 1]
    pairs = list(itertools.pairwise(widths))
    weight = [chance.normal(0, 0.3, (3, 3, a, b)).astype(np.float32) for a, b in pairs]
    weight[-1] = weight[-1][..., 0]  # as MATLAB drops it
    bias = [chance.normal(0, 0.1, (b, 1)).astype(np.float32) for _, b in pairs]
    return {"weight": cell(weight), "bias": cell(bias)}


def file_of(folder: Path, content: bytes) -> Path:
    path = folder / "x.mat"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_variables_are_those_that_scipy_wrote(compressed) -> None:
    arrays = {
        "a": np.arange(24, dtype=np.float64).reshape(2, 3, 4),
        "b": np.arange(6, dtype=np.int16).reshape(3, 2),
        "c": np.array([[1.5]], np.float32),
        "d": np.zeros((0, 3)),
        "e": np.array([[250, 3]], np.uint8),
    }
    found = read_variables(written(compressed, **arrays, s={"x": arrays["a"], "y": cell([arrays["b"], arrays["c"]])}))
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
    np.testing.assert_array_equal(found["s"]["x"], arrays["a"])
    np.testing.assert_array_equal(found["s"]["y"][0], arrays["b"])
    assert len(found["s"]["y"]) == 2


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("depth", [2, 7])
def test_a_vdsr_means_its_convolutions(depth, compressed, tmp_path) -> None:
    model = vdsr(depth)
    path = file_of(tmp_path, written(compressed, model=model))
    assert recognise(path) == "matlab"
    found = read_foreign(path, "matlab")
    assert (found.model["B"], found.model["U"], found.model["features"]) == (depth - 1, 0, 3)
    assert (found.model["norm"], found.model["bias"], found.model["input_relu"]) == ("none", True, False)
    x = torch.rand(1, 1, 11, 9, generator=torch.Generator().manual_seed(1)) - 0.2
    h = x
    for i in range(depth):
        weight = np.atleast_3d(model["weight"][0, i])
        weight = weight[..., None] if weight.ndim == 3 else weight
        filters = torch.tensor(np.einsum("yxio->oiyx", weight))
        h = F.conv2d(h.relu() if i else h, filters, torch.tensor(model["bias"][0, i][:, 0]), padding=1)
    with torch.no_grad():
        torch.testing.assert_close(build(found.model, found.state)(x), h + x, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="U = 0"):
        read_foreign(path, "matlab", 3)


@pytest.mark.parametrize(("variables", "words"), [
    ({"net": np.ones((3, 3))}, "'net', not a struct"),
    ({"model": np.ones((3, 3))}, "not a struct"),
    ({"model": {"weight": cell([np.ones((3, 3))])}}, "cells"),
    ({"model": {"weight": cell([np.ones((3, 3))]), "bias": cell([np.ones(1)])}}, "two layers"),
    ({"model": {"weight": cell([np.ones((3, 3, 1, 2))] * 3), "bias": cell([np.ones(2)] * 2)}}, "3 weights and 2"),
    ({"model": {"weight": cell([np.ones((9, 2))] * 2), "bias": cell([np.ones(2)] * 2)}}, r"1 has filters of \[9"),
    ({"model": {"weight": cell([np.ones((3, 3, 1, 2)) * 1j] * 2), "bias": cell([np.ones(2)] * 2)}}, "complex"),
    ({"model": {"weight": cell(["text"] * 2), "bias": cell([np.ones(2)] * 2)}}, "no array of numbers"),
])  # fmt: skip
def test_other_contents_are_refused_by_name(variables, words, tmp_path) -> None:
    with pytest.raises(UserError, match=words):
        read_foreign(file_of(tmp_path, written(**variables)), "matlab")


def test_what_matlab_7_3_writes_is_named(tmp_path) -> None:
    for head in (b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n"):
        with pytest.raises(UserError, match="save -v7"):
            recognise(file_of(tmp_path, head + bytes(100)))


def element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


HEAD = b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x100) + b"IM"


def claimed(kind: int, rows: int, columns: int, *parts: bytes) -> bytes:
    flags, shape = element(6, struct.pack("<II", kind, 0)), element(5, struct.pack("<ii", rows, columns))
    return element(14, flags + shape + element(1, b"model") + b"".join(parts))


@pytest.mark.parametrize(("content", "words"), [
    (HEAD + claimed(1, 20_000, 15_000), "holds 0"),  # a cell, of 184 bytes in all
    (HEAD + claimed(6, 2**31 - 1, 2**31 - 1, element(9, bytes(8))), "holds 1 values"),
    (HEAD + claimed(6, -1, -1, element(9, bytes(8))), "shape"),
    (HEAD + claimed(17, 1, 1, element(6, bytes(24))), "no array of numbers"),  # an opaque object
    (HEAD + claimed(16, 1, 1, element(6, bytes(24))), "no array of numbers"),  # a function handle
    (HEAD + claimed(3, 1, 1, element(6, bytes(24))), "no array of numbers"),  # an object
    (HEAD + struct.pack("<II", 14, 2**31) + bytes(64), "truncated"),
    (HEAD + struct.pack("<II", 15, 1 << 16) + zlib.compress(bytes(10**8)).ljust(1 << 16), "64 times"),
])  # fmt: skip
def test_sizes_are_checked_before_memory_is_taken(content, words, tmp_path) -> None:
    path = file_of(tmp_path, content)
    tracemalloc.start()
    with pytest.raises(UserError, match=words):
        read_foreign(path, "matlab")
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_nested_cells_and_damage_end_in_a_refusal(tmp_path) -> None:
    deep = claimed(6, 1, 1, element(9, bytes(8)))
    for _ in range(2000):
        deep = claimed(1, 1, 1, deep)
    with pytest.raises(UserError, match="deep"):
        read_foreign(file_of(tmp_path, HEAD + deep), "matlab")
    chance = random.Random(1)
    whole = [written(model=vdsr(3)), written(True, model=vdsr(3))]
    read = 0
    for trial in range(300):
        data = bytearray(whole[trial % 2])
        for _ in range(chance.choice((1, 1, 4))):
            data[chance.randrange(128, len(data))] = chance.randrange(256)
        if trial % 5 == 0:
            data = data[: chance.randrange(len(data))]
        try:
            read_foreign(file_of(tmp_path, bytes(data)), "matlab")
            read += 1
        except UserError:
            pass
    assert 20 < read < 280


def official() -> Path:
    folder = os.environ.get("DRRN_WEIGHTS")
    if folder is None and "DRRN_DATA" in os.environ:
        folder = Path(os.environ["DRRN_DATA"]).parent / "weights"
    path = Path(folder or "nowhere") / "VDSR_Official.mat"
    if not path.is_file():
        pytest.skip("VDSR_Official.mat is not there: set DRRN_WEIGHTS to its folder")
    return path


def test_the_vdsr_of_its_authors_is_table_2s_row(tmp_path) -> None:
    """One image of Set5 at ×3 always; the whole of it at every scale with DRRN_SLOW."""
    from drrn.images import read_luminance
    from drrn.protocol import prepare, score
    from drrn.sets import image_files

    if "DRRN_DATA" not in os.environ:
        pytest.skip("set DRRN_DATA to the folder that holds Set5/")
    found = read_foreign(official(), "matlab")
    theirs = scipy.io.loadmat(official())["model"][0, 0]["weight"][0, 7]
    np.testing.assert_array_equal(found.state["blocks.7.conv.weight"].numpy(), theirs.transpose(3, 2, 0, 1))
    network = build(found.model, found.state)
    slow = "DRRN_SLOW" in os.environ
    targets = {
        2: (37.53, 0.9587),
        3: (33.66, 0.9213),
        4: (31.34, 0.8838),
    }  # Table 2, but for 0.01 dB at ×4
    for scale, target in targets.items() if slow else [(3, (32.35, 0.9404))]:
        rows = []
        for path in image_files("Set5", Path(os.environ["DRRN_DATA"])):
            if slow or path.stem == "woman":
                x, truth = prepare(read_luminance(path), scale)
                with torch.inference_mode():
                    y = network(torch.from_numpy(x.astype(np.float32))[None, None])[0, 0].numpy()
                rows.append(score(y, truth, scale))
        means = [sum(row[key] for row in rows) / len(rows) for key in ("psnr", "ssim")]
        assert (round(means[0], 2), round(means[1], 4)) == target
