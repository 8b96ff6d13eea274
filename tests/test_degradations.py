"""`drrn.degradations` against plain NumPy, and the published numbers of bicubic enlargement after BD and DN."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray
from PIL import Image

from drrn.degradations import DEGRADATIONS, low_resolution
from drrn.errors import UserError
from drrn.images import orientations, read_luminance
from drrn.matlab import imresize, rgb2ycbcr
from drrn.patch_build import prepare_patches
from drrn.patches import LOW, STEP, Recipe
from drrn.protocol import PAPER, Protocol, describe, prepare, score


@pytest.fixture(scope="module")
def photograph() -> NDArray[np.uint8]:
    return skimage.data.chelsea()[90:165, 120:213]  # 75×93, RGB


def slow_blur(plane: NDArray[np.floating]) -> NDArray[np.float64]:
    """BD of one plane, pixel by pixel: every third pixel, its 7×7 neighbours, those outside by the nearest inside."""
    taps = np.exp([-(i**2) / (2 * 1.6**2) for i in range(-3, 4)])
    height, width = plane.shape
    small = np.zeros((height // 3, width // 3))
    for row, column in np.ndindex(small.shape):
        total = 0.0
        for i, a in enumerate(taps):
            for j, b in enumerate(taps):
                r, c = min(max(3 * row + 1 + i - 3, 0), height - 1), min(max(3 * column + 1 + j - 3, 0), width - 1)
                total += a * b * plane[r, c]
        small[row, column] = total / taps.sum() ** 2
    return small


def test_bi_is_matlabs_bicubic_of_y(photograph: NDArray[np.uint8]) -> None:
    ycbcr = rgb2ycbcr(photograph) / 255.0
    np.testing.assert_array_equal(low_resolution(photograph, 3), imresize(ycbcr[..., 0], 1 / 3))
    np.testing.assert_array_equal(low_resolution(photograph, 3, colour=True), imresize(ycbcr, 1 / 3))


def test_bd_is_a_blur_and_every_third_pixel(photograph: NDArray[np.uint8]) -> None:
    ycbcr = rgb2ycbcr(photograph) / 255.0
    colour = low_resolution(photograph, 3, "BD", colour=True)
    for channel in range(3):
        np.testing.assert_allclose(colour[..., channel], slow_blur(ycbcr[..., channel]), atol=1e-12)
    y = rgb2ycbcr(photograph)[..., 0]
    np.testing.assert_allclose(low_resolution(photograph, 3, "BD"), colour[..., 0], atol=1e-14)
    np.testing.assert_allclose(low_resolution(y, 3, "BD"), colour[..., 0], atol=1e-14)


def test_dn_is_bicubic_and_noise_on_r_g_and_b() -> None:
    """σ is 30 and independent on each channel, so on Y it is 30 · √(0.257² + 0.504² + 0.098²) = 17.2."""
    photograph = skimage.data.chelsea()[:300, :450] // 4 + 96  # 3σ away from 0 and 255, where noise is cut off
    small = imresize(photograph / 255.0, 1 / 3)
    noisy = DEGRADATIONS["DN"].function(photograph, 3)
    assert noisy.dtype == np.uint8
    noise = (noisy - 255 * small).reshape(-1, 3)
    np.testing.assert_allclose(noise.std(axis=0), 30, rtol=0.05)
    assert abs(noise.mean()) < 1
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.1
    y = 255 * (low_resolution(photograph, 3, "DN") - low_resolution(photograph, 3))
    weights = np.array([65.481, 128.553, 24.966]) / 255
    assert y.std() == pytest.approx(30 * math.sqrt((weights**2).sum()), rel=0.05)
    np.testing.assert_array_equal(low_resolution(photograph, 3, "DN"), rgb2ycbcr(noisy)[..., 0] / 255)
    grey = photograph[..., 1]
    assert (255 * (low_resolution(grey, 3, "DN") - low_resolution(grey, 3))).std() == pytest.approx(30, rel=0.05)


def test_an_image_has_its_own_noise_each_time(photograph: NDArray[np.uint8]) -> None:
    again, other = photograph.copy(), photograph.copy()
    other[0, 0, 0] ^= 1
    noise = [low_resolution(z, 3, "DN") - low_resolution(z, 3) for z in (photograph, again, other)]
    np.testing.assert_array_equal(noise[0], noise[1])
    assert abs(np.corrcoef(noise[0].ravel(), noise[2].ravel())[0, 1]) < 0.2


@pytest.mark.parametrize("name", ["BD", "DN"])
def test_training_pairs_and_test_images_are_degraded_alike(
    name: str, tiny_images: Path, tmp_path: Path, inline_pool: None
) -> None:
    """Stored pairs are windows of the degraded images, turned; an evaluation gets those images whole."""
    path = prepare_patches("tiny", Recipe((str(tiny_images),), (3,), degradation=name), Path(), tmp_path)
    with h5py.File(path) as file:
        assert json.loads(file.attrs["recipe"])["degradation"] == name
        data, label = file["data"][:] * STEP + LOW, file["label"][:]
    known: dict[bytes, list[NDArray]] = {}
    for y, x in zip(label, data, strict=True):
        known.setdefault(y.tobytes(), []).append(x)
    for file in sorted(tiny_images.iterdir()):
        pixels = np.asarray(Image.open(file))
        x, truth = prepare(pixels, 3, degradation=name)
        cropped = pixels[: truth.shape[0], : truth.shape[1]]
        np.testing.assert_array_equal(x, imresize(low_resolution(cropped, 3, name), 3))
        for turned in orientations(pixels, range(8 if name == "BD" else 1)):  # what is turned has other noise
            x, truth = (z[:31, :31] for z in prepare(turned, 3, degradation=name))
            found = known[np.round(truth * 255).astype(np.uint8).tobytes()]
            assert min(np.abs(one - x).max() for one in found) < 2e-5


def test_bicubic_keeps_its_names() -> None:
    """Files and scores that are older than degradations keep their names and contents."""
    old = '{"augment": "offline", "patch_size": 31, "scales": [2, 3, 4], "sets": ["T91", "BSD200"], "stride": 21}'
    assert Recipe(("T91", "BSD200")).text() == old
    assert PAPER.stamp() == {"name": "paper", "version": 1, "crop": None, "color": "y", "rounding": "uint8"}
    assert Protocol(degradation="DN").stamp() == PAPER.stamp() | {"degradation": "DN"}
    assert describe(Protocol(degradation="DN").stamp()) == "protocol paper v1, but degradation=DN"


def test_a_run_is_another_one_and_says_so(configure: Callable) -> None:
    from drrn.identity import identity
    from drrn.model import DRRN
    from drrn.runs.record import run_record

    plain, noisy = configure(), configure("data.degradation=DN")
    assert "degradation" not in identity(plain)["data"]
    assert identity(noisy)["data"]["degradation"] == "DN"
    assert run_record(noisy, DRRN(1, 1, 2))["protocol"]["degradation"] == "DN"
    with pytest.raises(UserError, match=r"data\.scales = \[2\]: the degradation BD is defined for ×3 only"):
        configure("data.degradation=BD")


def test_scores_of_two_degradations_are_two_files(entry_point: Callable, tiny_images: Path, tmp_path: Path) -> None:
    arguments = ("method=bicubic", f"sets=[{tiny_images}]", "scales=[2]", f"output={tmp_path}/s.json", "color=rgb")
    code, out, _ = entry_point("evaluate", *arguments, "degradation=DN")
    assert code == 0
    assert "degradation=DN" in out
    first = json.loads((tmp_path / "s.json").read_bytes())
    assert first["protocol"]["degradation"] == "DN"
    assert first["means"][0]["psnr"] < 26  # of the noise alone 30 would leave 18.6 on one channel
    code, _, err = entry_point("evaluate", *arguments)
    assert code == 2
    assert "do not compare" in err


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A folder of ready pairs ×2 in colour and grey: low resolutions by a box filter, unlike any of ours."""
    cat = skimage.data.chelsea()[90:154, 120:212]
    for place in ("HR", "LR/x2"):
        (tmp_path / "pairs" / place).mkdir(parents=True)
    for name, pixels in {"cat": cat, "grey": cat[..., 0]}.items():
        low = pixels.reshape(32, 2, 46, 2, -1).mean(axis=(1, 3)).round().astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pairs/HR/{name}.png")
        Image.fromarray(low[..., 0] if pixels.ndim == 2 else low).save(tmp_path / f"pairs/LR/x2/{name}.png")
    return tmp_path / "pairs"


def test_ready_pairs_are_trained_and_measured(
    ready: Path, entry_point: Callable, tmp_path: Path, inline_pool: None
) -> None:
    interpolated = {}
    for name in ("cat", "grey"):
        low = np.asarray(Image.open(ready / f"LR/x2/{name}.png"))
        interpolated[name] = imresize((low if low.ndim == 2 else rgb2ycbcr(low)[..., 0]) / 255.0, 2)
    truths = {name: read_luminance(ready / f"HR/{name}.png") for name in interpolated}
    recipe = Recipe((str(ready),), (2,), augment="online", degradation="ready")
    with h5py.File(prepare_patches("pairs", recipe, Path(), tmp_path / "patches")) as file:
        data, label = file["data"][:] * STEP + LOW, file["label"][:]
    places = [(n, i, j) for n in truths for i in (0, 21) for j in (0, 21, 42)]
    assert len(data) == len(places)
    for x, y in zip(data, label, strict=True):
        (n, i, j), *_ = (p for p in places if (truths[p[0]][p[1] : p[1] + 31, p[2] : p[2] + 31] == y).all())
        assert np.abs(interpolated[n][i : i + 31, j : j + 31] - x).max() < 2e-5
    keys = ("method=bicubic", f"sets=[{ready}]", "scales=[2]", f"output={tmp_path}/s.json", "degradation=ready")
    code, out, err = entry_point("evaluate", *keys, "metrics=[psnr,psnr_rgb]")
    assert code == 0, err
    assert "degradation=ready" in out
    rows = {row["image"]: row for row in json.loads((tmp_path / "s.json").read_bytes())["scores"]}
    assert {row["set"] for row in rows.values()} == {"pairs"}
    for name, x in interpolated.items():
        assert rows[f"{name}.png"]["psnr"] == pytest.approx(score(x, truths[name] / 255.0, 2)["psnr"])
    assert rows["cat.png"]["psnr_rgb"] != rows["cat.png"]["psnr"]


@pytest.mark.parametrize("how", ["absent", "size", "no pairs", "odd"])
def test_what_is_no_ready_pair_is_refused(
    how: str, ready: Path, tiny_images: Path, tmp_path: Path, inline_pool: None
) -> None:
    low = ready / "LR/x2/cat.png"
    if how == "absent":
        low.unlink()
    elif how == "size":
        Image.open(low).crop((0, 0, 46, 31)).save(low)
    elif how == "odd":
        Image.open(ready / "HR/cat.png").resize((93, 64)).save(ready / "HR/cat.png")
    folder = tiny_images if how == "no pairs" else ready
    wrong = {"absent": "holds no cat_x2", "size": "1/2 of", "no pairs": "HR/ and LR/", "odd": "must be multiples"}
    with pytest.raises(UserError, match=wrong[how]):
        prepare_patches("pairs", Recipe((str(folder),), (2,), degradation="ready"), Path(), tmp_path / "patches")


@pytest.mark.parametrize(("name", "psnr", "ssim", "near"), [("BD", 28.78, 0.8308, 0.01), ("DN", 24.01, 0.5369, 0.1)])
def test_bicubic_has_its_published_numbers(name: str, psnr: float, ssim: float, near: float, drrn_data: Path) -> None:
    """Set5 ×3 in RDN's table of BD and DN, whose noise is another sample."""
    files = sorted((drrn_data / "Set5").iterdir())
    scores = [score(*prepare(np.asarray(Image.open(file)), 3, degradation=name), 3) for file in files]
    assert np.mean([s["psnr"] for s in scores]) == pytest.approx(psnr, abs=near)
    assert np.mean([s["ssim"] for s in scores]) == pytest.approx(ssim, abs=near / 20)
