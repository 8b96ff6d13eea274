"""The package in Python: `from drrn import DRRN, load, upscale`, on real photographs; weights by name."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import drrn
from drrn.config import ModelConfig
from drrn.errors import UserError
from drrn.evaluation_config import check
from drrn.fsrcnn import FSRCNN
from drrn.home import CONF
from drrn.matlab import imresize, rgb2y, to_uint8
from drrn.weights import shipped
from drrn.weights.ours import save_weights

DATA = os.environ.get("DRRN_DATA")
MODEL = vars(ModelConfig(1, 1, 4, "none", True, True, True))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network of random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(path, drrn.DRRN(1, 1, 4, norm="none"), MODEL, {"scales": [2]})
    return path


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return skimage.data.chelsea()[60:110, 100:163]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import drrn, sys; print([m for m in ('torch', 'numpy', 'PIL', 'hydra') if m in sys.modules], dir(drrn))"
    environment = {**os.environ, "PYTHONPATH": str(Path(drrn.__file__).parents[1])}
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert said.startswith("[] ")
    assert all(name in said for name in ("DRRN", "load", "upscale"))
    with pytest.raises(AttributeError, match="upscael"):
        drrn.upscael  # noqa: B018


def test_bicubic_is_matlabs(photo: np.ndarray) -> None:
    """For a grey image it is `imresize` itself, which tests/test_matlab.py compares with MATLAB's values."""
    grey = photo[..., 1]
    expected = np.floor(np.clip(imresize(grey / 255.0, 3), 0, 1) * 255 + 0.5)
    np.testing.assert_array_equal(drrn.upscale(grey, 3, "bicubic"), expected)


@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_arrays_of_any_kind(channels: int, kind: type, photo: np.ndarray, weights: Path) -> None:
    network = drrn.load(weights)
    rgba = np.dstack([photo, np.full_like(photo[..., 0], 255)])
    pixels = rgba[..., 1] if channels == 0 else rgba[..., [[0], [0, 3], [0, 1, 2], [0, 1, 2, 3]][channels - 1]]
    pixels = pixels.astype(kind) * {np.uint8: 1, np.uint16: 257, np.float32: np.float32(1 / 255)}[kind]
    big = drrn.upscale(pixels.astype(kind), 2, network, precision="float32")
    assert big.dtype == kind
    assert big.shape == (100, 126, *pixels.shape[2:])
    plain = rgba[..., 1] if channels == 0 else rgba[..., : pixels.shape[2]]
    eight = drrn.upscale(plain, 2, network, precision="float32")
    if channels in (0, 3, 4):  # the same photograph in 8 bits gives the same to its rounding
        scaled = big.astype(float) / {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[kind]
        assert np.abs(scaled - eight).max() < 2


@pytest.mark.parametrize(
    ("mode", "result"),
    [
        ("L", "L"),
        ("LA", "LA"),
        ("RGB", "RGB"),
        ("RGBA", "RGBA"),
        ("P", "RGB"),
        ("1", "L"),
        ("CMYK", "RGB"),
        ("I;16", "I;16"),
        ("RGBX", "RGB"),
        ("RGBa", "RGBA"),
    ],
)
def test_pil_images(mode: str, result: str, photo: np.ndarray, weights: Path) -> None:
    image = Image.fromarray(photo)
    image = image.convert("RGBA") if mode == "RGBa" else image
    image = Image.fromarray(photo[..., 1].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    big = drrn.upscale(image, 1.5, weights)
    assert (big.mode, big.size) == (result, (95, 75))  # 63 × 1.5 = 94.5 goes up


def test_a_photograph_of_a_phone_is_upright_and_keeps_its_profile(photo: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = 6, "phone"  # Orientation, Model
    Image.fromarray(np.rot90(photo)).save(tmp_path / "a.png", exif=exif, icc_profile=b"profile", dpi=(300, 300))
    with Image.open(tmp_path / "a.png") as image:
        big = drrn.upscale(image, 2, "bicubic")
    np.testing.assert_array_equal(np.asarray(big), drrn.upscale(photo, 2, "bicubic"))
    assert big.info["icc_profile"] == b"profile"
    assert (big.getexif().get(0x0112, 1), big.getexif()[0x0110]) == (1, "phone")


def test_a_colour_declared_transparent_becomes_alpha(photo: np.ndarray) -> None:
    image = Image.fromarray(photo)
    image.info["transparency"] = tuple(photo[7, 9])
    alpha = np.asarray(drrn.upscale(image, 2, "bicubic"))[..., 3]
    assert alpha[15, 19] < 255
    assert (alpha == 255).mean() > 0.9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: image.astype(np.int32), "int32"),
        (lambda image: "photo.jpg", "open a file by PIL.Image.open"),
        (torch.from_numpy, "array, not Tensor"),
        (lambda image: image[None], "1, 50, 63"),
        (lambda image: image[:0], "0, 63"),
        (lambda image: np.full((9, 9), np.nan), "not finite"),
    ],
)
def test_what_is_no_image_is_refused(change, words: str, photo: np.ndarray) -> None:
    with pytest.raises(ValueError, match=words):
        drrn.upscale(change(photo), 2, "bicubic")
    for scale in (1, math.inf, math.nan, "2"):
        with pytest.raises(ValueError, match="above 1"):
            drrn.upscale(photo, scale, "bicubic")
    with pytest.raises(ValueError, match="precision = 'half'"):
        drrn.upscale(photo, 2, drrn.DRRN(1, 1, 4), precision="half")


def test_a_network_of_another_scale_is_refused(photo: np.ndarray) -> None:
    network = FSRCNN(3, 4, 2, 1).eval()
    assert drrn.upscale(photo, 3, network).shape == (150, 189, 3)
    for image in (photo, photo[..., 1]):
        with pytest.raises(ValueError, match="enlarges by 3"):
            drrn.upscale(image, 2, network)


def test_weights_go_by_their_names(
    weights: Path, photo: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="ships none"):
        drrn.load()
    for name, psnr in (("DRRN_A", {3: 33.9, 4: 31.5}), ("DRRN_B", {3: 34.0, 4: 31.4}), ("OF_X2", {2: 37.0})):
        (tmp_path / f"{name}.safetensors").write_bytes(weights.read_bytes())
        means = [{"set": "Set5", "scale": scale, "psnr": value} for scale, value in psnr.items()]
        means += [{"set": "Set14", "scale": 3, "psnr": 50.0}, {**means[0], "method": "bicubic", "psnr": 60.0}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"means": means}))
    (tmp_path / "Z.safetensors").write_bytes(weights.read_bytes())
    (tmp_path / "Z.json").write_text("{}")  # it says nothing of Set5: the last one
    assert shipped.weights_file("DRRN_A") == tmp_path / "DRRN_A.safetensors"
    best = {3: "DRRN_B", 4: "DRRN_A", 2: "OF_X2", 2.5: "DRRN_B"}
    assert {scale: shipped.weights_file(None, scale).stem for scale in best} == best
    assert drrn.upscale(photo, 2).shape == (100, 126, 3)
    for given, meant in ((None, "DRRN_B"), ("[DRRN_A,OF_X2]", "DRRN_A")):
        overrides = [] if given is None else [f"checkpoint={given}"]
        with initialize_config_dir(CONF, version_base="1.3"):
            config = check(compose("evaluate", [*overrides, f"output={tmp_path / 'scores.json'}"]))
        assert Path(config.checkpoint[0]).stem == meant
    with pytest.raises(UserError, match="DRRN_B, DRRN_A, OF_X2, Z"):
        drrn.load("DRRN_C")
    with pytest.raises(UserError, match="a folder without weights"):
        drrn.load(tmp_path)


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Image.fromarray(skimage.data.coffee()[:60, :80]).save("photo.jpg")
    exec(code, {})  # with the shipped weights
    with Image.open("big.png") as big:
        assert big.size == (160, 120)


@pytest.mark.skipif(not DATA, reason="DRRN_DATA is not set")
def test_shipped_weights_reach_what_their_records_say() -> None:
    """One image of each set, scored again by scikit-image; the record has the scores."""
    from drrn.inference import super_resolve

    for name, path in shipped.shipped().items():
        record = json.loads(path.with_suffix(".json").read_text())
        assert record["status"] == "finished", name
        assert "/" not in record["config"]["output"], name  # no folder of the machine that trained it
        row = next(r for r in record["scores"] if (r["image"], r["scale"]) == ("butterfly.bmp", 3))
        pixels = rgb2y(np.asarray(Image.open(Path(DATA, "Set5", row["image"]))))[:255, :255] / 255.0
        y = super_resolve(drrn.load(name), imresize(imresize(pixels, 1 / 3), 3).astype(np.float32))
        ours, truth = (to_uint8(z)[3:-3, 3:-3] for z in (y, pixels))
        assert peak_signal_noise_ratio(truth, ours, data_range=255) == pytest.approx(row["psnr"], abs=0.002), name
        assert row["psnr"] > row["bicubic_psnr"] + 2, name
