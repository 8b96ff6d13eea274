"""`drrn.metrics` against published and MATLAB-exact values, scikit-image, pyrtools and slow loops.

The benchmark images come from the folder that the environment variable DRRN_DATA names.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import skimage.metrics
import torch
from numpy.typing import NDArray
from PIL import Image

from drrn.matlab import imresize, rgb2ycbcr, to_uint8
from drrn.metrics import METRICS, Metric, ifc, in_training, msssim, psnr, ssim, vif
from drrn.protocol import Protocol, means, over_colour, score, score_pixels


def benchmark(name: str) -> list[Path]:
    root = os.environ.get("DRRN_DATA")
    if not root:
        pytest.skip("set DRRN_DATA to the folder that holds Set5/, Set14/ and BSD100/")
    files = sorted(path for path in (Path(root) / name).glob("*") if path.suffix in (".bmp", ".jpg", ".png"))
    if not files:
        pytest.skip(f"{name} is not in DRRN_DATA")
    return files


def bicubic_pair(pixels: NDArray[np.uint8], scale: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Bicubic's result and the ground truth as the protocol measures them: 8-bit Y, cropped."""
    y = pixels if pixels.ndim == 2 else rgb2ycbcr(pixels)[..., 0]
    truth = y[: y.shape[0] // scale * scale, : y.shape[1] // scale * scale] / 255.0
    result = imresize(imresize(truth, 1 / scale), scale)
    inside = (slice(scale, -scale),) * 2
    return to_uint8(result)[inside], to_uint8(truth)[inside]


@cache
def benchmark_pairs(name: str, scale: int) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    return {path.stem: bicubic_pair(np.asarray(Image.open(path)), scale) for path in benchmark(name)}


@cache
def photograph_pair(height: int = 96, width: int = 120, scale: int = 3) -> tuple[NDArray, NDArray]:
    """(degraded, original) crop of a photograph in scikit-image's wheel: no benchmark needed."""
    result, truth = bicubic_pair(skimage.data.camera()[80:320, 150:400], scale)
    return result[:height, :width], truth[:height, :width]


# The benchmarks: bicubic, measured once by an independent double-precision implementation of the protocol
# (PSNR, SSIM) and by the original IFC under GNU Octave.

SET5 = {
    # (image, scale): PSNR in dB, SSIM, IFC
    ("baby", 2): (37.0660, 0.95196, 6.435880),
    ("bird", 2): (36.8058, 0.97213, 6.398343),
    ("butterfly", 2): (27.4332, 0.91536, 5.966910),
    ("head", 2): (34.8580, 0.86233, 5.665360),
    ("woman", 2): (32.1440, 0.94763, 5.947705),
    ("baby", 3): (33.9101, 0.90392, 3.799202),
    ("bird", 3): (32.5723, 0.92564, 3.875713),
    ("butterfly", 3): (24.0365, 0.82163, 3.527084),
    ("head", 3): (32.8793, 0.80026, 3.213576),
    ("woman", 3): (28.5628, 0.88959, 3.480145),
    ("baby", 4): (31.7764, 0.85668, 2.508529),
    ("bird", 4): (30.1773, 0.87294, 2.510689),
    ("butterfly", 4): (22.0975, 0.73689, 2.331542),
    ("head", 4): (31.5899, 0.75357, 2.022762),
    ("woman", 4): (26.4623, 0.83180, 2.271057),
}
SET14 = {2: (30.2318, 0.86865, 6.10456), 3: (27.5405, 0.77361, 3.47303), 4: (26.0001, 0.70186, 2.23692)}
BSD100 = {2: (29.5579, 0.84310), 3: (27.2072, 0.73844), 4: (25.9606, 0.66738)}


@pytest.mark.parametrize(("image", "scale"), list(SET5))
def test_bicubic_on_set5_image_by_image(image: str, scale: int) -> None:
    result, truth = benchmark_pairs("Set5", scale)[image]
    expected_psnr, expected_ssim, expected_ifc = SET5[image, scale]
    assert psnr(result, truth) == pytest.approx(expected_psnr, abs=5e-4)
    assert ssim(result, truth) == pytest.approx(expected_ssim, abs=5e-5)
    assert ifc(truth, result) == pytest.approx(expected_ifc, abs=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_mean_on_set14(scale: int) -> None:
    pairs = benchmark_pairs("Set14", scale)
    assert len(pairs) == 14
    scores = [(psnr(a, b), ssim(a, b), ifc(b, a)) for a, b in pairs.values()]
    expected_psnr, expected_ssim, expected_ifc = SET14[scale]
    mean_psnr, mean_ssim, mean_ifc = np.mean(scores, axis=0)
    assert mean_psnr == pytest.approx(expected_psnr, abs=1e-3)
    assert mean_ssim == pytest.approx(expected_ssim, abs=1e-4)
    assert mean_ifc == pytest.approx(expected_ifc, abs=1e-4)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_mean_on_bsd100(scale: int) -> None:
    pairs = benchmark_pairs("BSD100", scale)
    assert len(pairs) == 100
    scores = [(psnr(a, b), ssim(a, b)) for a, b in pairs.values()]
    mean_psnr, mean_ssim = np.mean(scores, axis=0)
    assert mean_psnr == pytest.approx(BSD100[scale][0], abs=1e-3)
    assert mean_ssim == pytest.approx(BSD100[scale][1], abs=1e-4)


# PSNR


def test_psnr_of_known_errors() -> None:
    black = np.zeros((5, 7), np.uint8)
    assert psnr(black, black + 255) == 0.0  # in uint8 arithmetic the difference would wrap around
    assert psnr(black, black + 1) == pytest.approx(20 * math.log10(255))
    one_of_35 = black.copy()
    one_of_35[2, 3] = 10
    assert psnr(black, one_of_35) == pytest.approx(10 * math.log10(255**2 * 35 / 100))
    assert psnr(black, black) == math.inf


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_psnr_equals_scikit_image(scale: int) -> None:
    result, truth = photograph_pair(scale=scale)
    expected = skimage.metrics.peak_signal_noise_ratio(truth, result, data_range=255)
    assert psnr(result, truth) == pytest.approx(expected, abs=1e-12)
    assert psnr(truth, result) == psnr(result, truth)


def test_psnr_of_colour_and_of_floating_images() -> None:
    truth = skimage.data.astronaut()[100:180, 150:260]
    noisy = truth + np.random.default_rng(0).normal(0, 5, truth.shape)
    expected = skimage.metrics.peak_signal_noise_ratio(truth.astype(float), noisy, data_range=255)
    assert psnr(noisy, truth) == pytest.approx(expected, abs=1e-12)
    assert psnr(noisy.astype(np.float32), truth) == pytest.approx(expected, abs=1e-5)


# SSIM


def skimage_ssim(a: NDArray, b: NDArray) -> float:
    _, index = skimage.metrics.structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, full=True
    )
    return index[5:-5, 5:-5].mean()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_ssim_equals_scikit_image_on_valid_windows(scale: int) -> None:
    result, truth = photograph_pair(scale=scale)
    expected = skimage_ssim(result.astype(float), truth.astype(float))
    assert expected < 0.99
    assert ssim(result, truth) == pytest.approx(expected, abs=1e-10)
    assert ssim(truth, result) == pytest.approx(expected, abs=1e-10)
    shifted = result + 0.25
    assert ssim(shifted, truth) == pytest.approx(skimage_ssim(shifted, truth.astype(float)), abs=1e-10)


def slow_ssim(a: NDArray, b: NDArray) -> float:
    """Wang et al. 2004, Eq. 13 to 16, window by window."""
    grid = np.arange(11) - 5
    window = np.exp(-(grid[:, None] ** 2 + grid[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for r in range(a.shape[0] - 10):
        for c in range(a.shape[1] - 10):
            x, y = a[r : r + 11, c : c + 11].astype(float), b[r : r + 11, c : c + 11].astype(float)
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize(("height", "width"), [(11, 11), (11, 30), (25, 18)])
def test_ssim_equals_the_window_by_window_version(height: int, width: int) -> None:
    result, truth = photograph_pair(height, width)
    assert ssim(result, truth) == pytest.approx(slow_ssim(result, truth), abs=1e-10)


def test_ssim_of_equal_images_is_one() -> None:
    _, truth = photograph_pair()
    assert ssim(truth, truth) == pytest.approx(1.0, abs=1e-12)
    flat = np.full((20, 20), 200, np.uint8)
    assert ssim(flat, flat) == pytest.approx(1.0, abs=1e-12)


def test_ssim_needs_a_whole_window() -> None:
    with pytest.raises(ValueError, match="at least 11 pixels, got 40×10"):
        ssim(np.zeros((40, 10), np.uint8), np.zeros((40, 10), np.uint8))


# IFC


def slow_ifc(reference: NDArray, distorted: NDArray) -> float:
    """The IFC with pyrtools' own pyramid and one block at a time."""
    from pyrtools.pyramids import SteerablePyramidSpace

    pyramids = [
        SteerablePyramidSpace(image.astype(float), height=4, order=5, edge_type="reflect1").pyr_coeffs
        for image in (reference, distorted)
    ]
    total = 0.0
    for level in range(4):
        w = 2 ** (4 - level) + 1
        skip = math.ceil((w - 1) / 2 / 3)
        for orientation in (0, 3):
            x, y = (coefficients[level, orientation] for coefficients in pyramids)
            rows, columns = x.shape[0] // 3, x.shape[1] // 3
            x, y = x[: 3 * rows, : 3 * columns], y[: 3 * rows, : 3 * columns]
            vectors = np.array(
                [x[i : i + 3, j : j + 3].ravel() for i in range(3 * rows - 2) for j in range(3 * columns - 2)]
            )
            centred = vectors - vectors.mean(axis=0)
            c = centred.T @ centred / len(vectors)
            c_inverse, eigenvalues = np.linalg.inv(c), np.linalg.eigvalsh(c)
            for i in range(skip, rows - skip):
                for j in range(skip, columns - skip):
                    u = x[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].ravel()
                    s2 = u @ c_inverse @ u / 9
                    box = (
                        slice(3 * i + 1 - w // 2, 3 * i + 2 + w // 2),
                        slice(3 * j + 1 - w // 2, 3 * j + 2 + w // 2),
                    )
                    bx, by = x[box], y[box]
                    assert bx.shape == (w, w)
                    s_xy = ((bx - bx.mean()) * (by - by.mean())).sum()
                    s_xx, s_yy = ((bx - bx.mean()) ** 2).sum(), ((by - by.mean()) ** 2).sum()
                    g = s_xy / (s_xx + 1e-15)
                    v = max((s_yy - g * s_xy) / w**2, 1e-15)
                    if g < 0 or s_xx < 1e-15 or s_yy < 1e-15:
                        g = 0.0
                    total += sum(math.log2(1 + g**2 * s2 * value / (v + 1e-10)) for value in eigenvalues)
    return total / reference.size


@pytest.mark.parametrize(("height", "width"), [(96, 120), (73, 91), (72, 72)])
def test_ifc_equals_the_block_by_block_version_on_pyrtools_pyramid(height: int, width: int) -> None:
    result, truth = photograph_pair(height, width)
    assert ifc(truth, result) == pytest.approx(slow_ifc(truth, result), abs=1e-9)
    # Noise makes some gains negative, which a blurred image hardly ever does.
    noise = np.random.default_rng(1).integers(0, 256, truth.shape).astype(np.uint8)
    assert ifc(truth, noise) == pytest.approx(slow_ifc(truth, noise), abs=1e-9)


def test_ifc_falls_with_the_scale_and_depends_on_the_order() -> None:
    values = []
    for scale in (2, 3, 4):
        result, truth = photograph_pair(scale=scale)
        values.append(ifc(truth, result))
        assert abs(ifc(result, truth) - ifc(truth, result)) > 0.02
    assert values[0] > values[1] > values[2] > 0
    assert ifc(truth, truth) > 5 * values[0]


def test_ifc_of_an_inverted_image_is_zero() -> None:
    _, truth = photograph_pair()
    assert ifc(truth, 255 - truth) == 0.0  # every gain is negative


def test_ifc_of_a_flat_image_is_zero_either_way() -> None:
    _, truth = photograph_pair()
    for level in (0, 77, 255):
        flat = np.full_like(truth, level)
        assert ifc(flat, truth) == 0.0
        assert ifc(truth, flat) == 0.0
        assert ifc(flat, flat) == 0.0


def test_ifc_of_a_flat_reference_is_the_limit_of_weak_contrast() -> None:
    result, truth = photograph_pair()
    values = [ifc(100 + contrast * (truth - 100.0), result) for contrast in (1, 1e-4, 1e-8, 1e-12)]
    assert values[0] > 0.1
    assert values[-1] == 0.0


def test_ifc_of_a_singular_covariance_does_not_amplify_rounding() -> None:
    # Stripes vary along one direction only, so the covariance of their blocks has rank 3 of 9.
    stripes = np.tile(skimage.data.camera()[200, :120], (96, 1))
    dimmed = np.round(0.8 * stripes).astype(np.uint8)
    value = ifc(stripes, dimmed)
    assert 0 < value < 20
    jitter = np.random.default_rng(2).normal(0, 1e-13, stripes.shape)
    assert ifc(stripes + jitter, dimmed) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("shape", [(71, 200), (200, 71)])
def test_ifc_needs_72_pixels_a_side(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"at least 72 pixels, got {shape[0]}×{shape[1]}"):
        ifc(np.zeros(shape, np.uint8), np.zeros(shape, np.uint8))


# MS-SSIM and VIF


def valid(image: NDArray[np.float64], taps: NDArray[np.float64]) -> NDArray[np.float64]:
    """The window's weighted sum at every place inside the image."""
    windows = np.lib.stride_tricks.sliding_window_view(image, taps.shape)
    return np.einsum("hwij,ij->hw", windows, taps)


def gaussian(side: int, sigma: float) -> NDArray[np.float64]:
    line = np.exp(-((np.arange(side) - (side - 1) / 2) ** 2) / (2 * sigma**2))
    return np.outer(line, line) / line.sum() ** 2


def slow_msssim(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Wang, Simoncelli, Bovik 2003, Eq. 7, five scales, each half of the one before by means of 2×2."""
    result, taps = 1.0, gaussian(11, 1.5)
    for level, beta in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mx, my = valid(x, taps), valid(y, taps)
        vx, vy, xy = valid(x * x, taps) - mx**2, valid(y * y, taps) - my**2, valid(x * y, taps) - mx * my
        contrast = (2 * xy + 58.5225) / (vx + vy + 58.5225)  # c₂ = (0.03 · 255)²
        luminance = (2 * mx * my + 6.5025) / (mx**2 + my**2 + 6.5025)
        result *= (contrast * luminance if level == 4 else contrast).mean() ** beta
        h, w = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
        x, y = (z[:h, :w].reshape(h // 2, 2, w // 2, 2).mean(axis=(1, 3)) for z in (x, y))
    return float(result)


def slow_vif(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Sheikh and Bovik's `vifp_mscale.m`: x is the reference."""
    kept, whole = 0.0, 0.0
    for side in (17, 9, 5, 3):
        taps = gaussian(side, side / 5)
        if side < 17:
            x, y = valid(x, taps)[::2, ::2], valid(y, taps)[::2, ::2]
        mx, my = valid(x, taps), valid(y, taps)
        vx, vy = np.maximum(valid(x * x, taps) - mx**2, 0), np.maximum(valid(y * y, taps) - my**2, 0)
        xy = valid(x * y, taps) - mx * my
        g = xy / (vx + 1e-10)
        noise = vy - g * xy
        noise[g < 0] = vy[g < 0]
        g = np.maximum(g, 0)
        kept += np.log10(1 + g**2 * vx / (np.maximum(noise, 1e-10) + 2)).sum()
        whole += np.log10(1 + vx / 2).sum()
    return float(kept / whole)


@pytest.mark.parametrize(("measure", "slow"), [(msssim, slow_msssim), (vif, slow_vif)])
def test_they_equal_the_plain_version(measure, slow) -> None:
    result, truth = photograph_pair(178, 190)
    value = measure(truth, result)
    assert 0.2 < value < 0.99
    assert value == pytest.approx(slow(truth.astype(float), result.astype(float)), abs=1e-5)
    assert measure(truth, truth) == pytest.approx(1)


def test_what_is_too_small_or_flat_for_them() -> None:
    photograph = skimage.data.camera()
    for height, width in ((175, 300), (300, 175)):
        small = photograph[:height, :width]
        with pytest.raises(ValueError, match=f"MS-SSIM needs sides of at least 176 pixels, got {height}×{width}"):
            msssim(small, small)
    msssim(photograph[:176, :176], photograph[:176, :176])
    with pytest.raises(ValueError, match="VIF needs sides of at least 41 pixels, got 40×50"):
        vif(photograph[:40, :50], photograph[:40, :50])
    vif(photograph[:41, :41], photograph[:41, :41])
    assert vif(np.full((50, 50), 7, np.uint8), photograph[:50, :50]) == 1


def test_psnr_rgb_is_over_three_channels_of_a_colour_image() -> None:
    """Y is the method's, Cb and Cr are bicubic; a grey image has one channel."""
    pixels = skimage.data.chelsea()[:90, :120]
    ycbcr = imresize(imresize(rgb2ycbcr(pixels) / 255.0, 1 / 3), 3)
    scores = score_pixels(ycbcr[..., 0], pixels, 3, ("psnr", "psnr_rgb"))
    inverse = np.linalg.inv([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]])
    rgb = (255 * ycbcr - [16, 128, 128]) @ inverse.T
    error = np.round(np.clip(rgb, 0, 1) * 255) - pixels
    assert scores["psnr_rgb"] == pytest.approx(10 * np.log10(255**2 / np.mean(error[3:-3, 3:-3] ** 2)), abs=0.001)
    assert scores["psnr"] == pytest.approx(psnr(*bicubic_pair(pixels, 3)))
    grey = score_pixels(ycbcr[..., 0], rgb2ycbcr(pixels)[..., 0], 3, ("psnr", "psnr_rgb"))
    assert grey["psnr_rgb"] == grey["psnr"] == scores["psnr"]


# All of them


@pytest.mark.parametrize("measure", [psnr, ssim, ifc, msssim, vif])
def test_metrics_say_what_is_wrong(measure) -> None:
    image = np.zeros((80, 90), np.uint8)
    with pytest.raises(ValueError, match=r"different shapes: \(80, 90\) and \(80, 89\)"):
        measure(image, image[:, :-1])
    with pytest.raises(ValueError, match=r"\[H, W\].*, got \(80, 90, 4\)"):
        measure(np.zeros((80, 90, 4), np.uint8), np.zeros((80, 90, 4), np.uint8))
    with pytest.raises(ValueError, match=r"got \(0, 90\)"):
        measure(image[:0], image[:0])
    with pytest.raises(TypeError, match="not int16"):
        measure(image, image.astype(np.int16))
    broken = image.astype(np.float64)
    broken[3, 4] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        measure(image, broken)


def test_only_psnr_takes_colour() -> None:
    colour = skimage.data.astronaut()[:80, :90]
    assert psnr(colour, colour) == math.inf
    for measure in (ssim, ifc, msssim, vif):
        with pytest.raises(ValueError, match=r"must be \[H, W\] with pixels, got \(80, 90, 3\)"):
            measure(colour, colour)


@pytest.mark.parametrize("measure", [psnr, ssim, ifc])
def test_metrics_leave_their_arguments_alone(measure) -> None:
    result, truth = (image.astype(np.float64) for image in photograph_pair())
    before = result.copy(), truth.copy()
    assert isinstance(measure(truth, result), float)
    np.testing.assert_array_equal(result, before[0])
    np.testing.assert_array_equal(truth, before[1])


def test_metrics_import_without_torch_and_pyrtools() -> None:
    code = "import sys, drrn.matlab, drrn.metrics; sys.exit({'torch', 'pyrtools'} & set(sys.modules) != set())"
    source = Path(__file__).resolve().parents[1] / "src"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(source)}).returncode == 0


# ---------------------------------------------------------------------- METRICS


def test_what_runs_measure_and_how_tables_print_it() -> None:
    assert in_training() == ("psnr", "ssim")
    digits = {"psnr": 2, "ssim": 4, "ifc": 3, "msssim": 4, "vif": 4, "psnr_rgb": 2}
    assert {name: metric.digits for name, metric in METRICS.items()} == digits
    assert over_colour(METRICS) == ("psnr_rgb",)
    assert over_colour(METRICS, Protocol(color="rgb")) == ("psnr", "psnr_rgb")


def test_a_metric_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is scored with the others, after the ground truth, and has a mean over the images of a set."""
    brightness = Metric(lambda truth, estimate: float(truth.mean() - estimate.mean()), digits=1, training=True)
    monkeypatch.setitem(METRICS, "brightness", brightness)
    rows = [{"set": "a", "scale": 2, **score(np.full((20, 20), level), np.ones((20, 20)), 2)} for level in (0.2, 0.6)]
    assert [row["brightness"] for row in rows] == [204, 102]
    (mean,) = means([{**row, "bicubic_brightness": 1.0} for row in rows])
    assert mean["brightness"] == 153
    assert mean["bicubic_brightness"] == 1


def test_ssim_against_kornia() -> None:
    """kornia's windowed SSIM, restricted to windows inside the image."""
    from kornia.metrics import ssim as kornia_ssim

    a = skimage.data.camera()[100:180, 150:260]
    b = np.clip(a.astype(float) + 12 * np.random.default_rng(0).standard_normal(a.shape), 0, 255).astype(np.uint8)
    x, y = (torch.from_numpy(image.astype(np.float64))[None, None] for image in (a, b))
    expected = kornia_ssim(x, y, window_size=11, max_val=255.0, padding="valid").mean().item()
    assert 0.3 < expected < 0.95
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)
