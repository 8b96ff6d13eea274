"""`drrn.matlab` against exact arithmetic, a pixel-by-pixel version, Pillow and scikit-image."""

from __future__ import annotations

import math
import tracemalloc
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import numpy as np
import pytest
import skimage.color
import skimage.data
from numpy.typing import NDArray
from PIL import Image

from drrn.matlab import imresize, resize_matrix, rgb2y, rgb2ycbcr, to_uint8, ycbcr2rgb


def grey() -> NDArray[np.float64]:
    return skimage.data.camera() / 255.0  # 512×512


def colour() -> NDArray[np.uint8]:
    return skimage.data.astronaut()  # 512×512×3


# imresize


def slow_imresize(image: NDArray, scale: tuple[float, float], size: tuple[int, int]) -> NDArray:
    """MATLAB's imresize for one channel, one output pixel at a time, on explicitly mirrored borders."""

    def keys(x: float) -> float:
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    def weights(out_index: int, s: float) -> dict[int, float]:
        centre = (out_index + 0.5) / s - 0.5
        reach = 2 / min(s, 1)
        taps = range(math.floor(centre - reach) - 1, math.ceil(centre + reach) + 2)
        values = {tap: keys(min(s, 1) * (centre - tap)) for tap in taps}
        return {tap: value / sum(values.values()) for tap, value in values.items()}

    pad = math.ceil(2 / min(*scale, 1)) + 3
    padded = np.pad(image, pad, mode="symmetric")
    out = np.empty(size)
    for row in range(size[0]):
        for column in range(size[1]):
            out[row, column] = sum(
                wr * wc * padded[r + pad, c + pad]
                for r, wr in weights(row, scale[0]).items()
                for c, wc in weights(column, scale[1]).items()
            )
    return out


def test_imresize_gives_matlabs_values() -> None:
    result = imresize(np.arange(16.0).reshape(4, 4), 0.75)
    assert result.shape == (3, 3)
    np.testing.assert_allclose(result[0], [0.7506, 2.1004, 3.4503], atol=5e-5)
    # The ramp is point-symmetric about its middle, 7.5, and so must the result be.
    np.testing.assert_allclose(result + result[::-1, ::-1], 15.0, atol=1e-13)


@pytest.mark.parametrize("scale", [1 / 4, 1 / 3, 1 / 2, 0.75, 1, 1.3, 2, 3, 4])
@pytest.mark.parametrize("shape", [(11, 14), (1, 9), (7, 1), (1, 1), (3, 2)])
def test_imresize_equals_the_pixel_by_pixel_version(scale: float, shape: tuple[int, int]) -> None:
    image = grey()[100 : 100 + shape[0], 230 : 230 + shape[1]]
    size = (math.ceil(scale * shape[0]), math.ceil(scale * shape[1]))
    result = imresize(image, scale)
    assert result.shape == size
    np.testing.assert_allclose(result, slow_imresize(image, (scale, scale), size), atol=1e-13)


@pytest.mark.parametrize("size", [(5, 31), (25, 6), (11, 14), (4, 5), (1, 1)])
def test_imresize_to_a_size_uses_each_dimensions_own_scale(size: tuple[int, int]) -> None:
    image = grey()[200:211, 120:134]
    expected = slow_imresize(image, (size[0] / 11, size[1] / 14), size)
    np.testing.assert_allclose(imresize(image, size=size), expected, atol=1e-13)


def test_a_rounded_up_size_is_not_the_same_as_the_scale() -> None:
    image = grey()[100:111, 230:241]
    by_scale, by_size = imresize(image, 1 / 3), imresize(image, size=(4, 4))
    assert by_scale.shape == by_size.shape
    assert np.abs(by_scale - by_size).max() > 1e-3


@pytest.mark.parametrize("scale", [1 / 4, 1 / 3, 1 / 2, 2, 3])
def test_imresize_equals_pillow_inside_the_border(scale: float) -> None:
    # Pillow's bicubic has the same kernel and antialiasing and only cuts the kernel off at the border.
    image = grey()[:504, :480].astype(np.float32)
    width, height = round(480 * scale), round(504 * scale)
    pillow = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    border = math.ceil(2 * max(scale, 1)) + 1
    inside = (slice(border, -border),) * 2
    np.testing.assert_allclose(imresize(image, scale)[inside], pillow[inside], atol=2e-6)


def test_imresize_treats_channels_apart_and_computes_in_float64() -> None:
    image = (colour()[:40, :33] / 255.0).astype(np.float32)
    result = imresize(image, 1 / 3)
    assert result.dtype == np.float64
    assert result.shape == (14, 11, 3)
    for channel in range(3):
        single = imresize(image[..., channel].astype(np.float64), 1 / 3)
        np.testing.assert_array_equal(result[..., channel], single)


def test_imresize_leaves_its_input_and_overshoot_alone() -> None:
    step = np.zeros((8, 8))
    step[:, 4:] = 1.0
    before = step.copy()
    result = imresize(step, 3)
    np.testing.assert_array_equal(step, before)
    assert result.min() < -0.01
    assert result.max() > 1.01


def test_shrinking_by_a_divisor_gives_exactly_that_fraction_of_the_side() -> None:
    for s in (2, 3, 4):
        for k in (*range(1, 130), 171, 341, 683, 1365, 2731):
            assert imresize(np.ones((s * k, 1)), 1 / s).shape == (k, 1)


@pytest.mark.parametrize(
    ("length", "scale", "out"), [(12, 1 / 3, 4), (4, 3.0, 12), (7, 0.5, 4), (1, 4.0, 4), (5, 0.2, 1)]
)
def test_resize_matrix_is_what_imresize_applies(length: int, scale: float, out: int) -> None:
    matrix = resize_matrix(length, scale, out)
    assert matrix.shape == (out, length)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-15)
    image = grey()[50 : 50 + length, 60 : 60 + length]
    np.testing.assert_allclose(matrix @ image @ matrix.T, imresize(image, scale), atol=1e-14)


def test_resize_matrix_is_computed_once_and_cannot_be_altered() -> None:
    matrix = resize_matrix(20, 0.5, 10)
    assert resize_matrix(20, 0.5, 10) is matrix
    with pytest.raises(ValueError, match="read-only"):
        matrix.data[0] = 1.0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.bool_])
def test_imresize_refuses_integers(dtype: type) -> None:
    with pytest.raises(TypeError, match=r"array / 255\.0"):
        imresize(np.ones((4, 4), dtype), 2)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((4,), {"scale": 2}, r"got shape \(4,\)"),
        ((4, 0), {"scale": 2}, r"got shape \(4, 0\)"),
        ((4, 4), {}, "either scale or size"),
        ((4, 4), {"scale": 2, "size": (8, 8)}, "either scale or size"),
        ((4, 4), {"scale": 0}, "positive number .* got 0"),
        ((4, 4), {"scale": -2.0}, "got -2.0"),
        ((4, 4), {"scale": float("nan")}, "got nan"),
        ((4, 4), {"size": (0, 3)}, r"got \(0, 3\)"),
    ],
)
def test_imresize_says_what_is_wrong(shape: tuple[int, ...], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imresize(np.ones(shape), **arguments)


# Colour

# MATLAB's coefficients in thousandths, written out again: the tests must not read the code's own.
BT601 = {"y": (65481, 128553, 24966), "cb": (-37797, -74203, 112000), "cr": (112000, -93786, -18214)}


def exact_ycbcr(r: int, g: int, b: int) -> list[int]:
    """One colour in rational arithmetic, half rounded away from zero (all values are positive)."""
    out = []
    for offset, (cr, cg, cb) in zip((16, 128, 128), BT601.values(), strict=True):
        value = offset + Fraction(cr * r + cg * g + cb * b, 255_000)
        out.append(math.floor(value + Fraction(1, 2)))
    return out


def test_rgb2ycbcr_of_the_corner_colours() -> None:
    corners = {
        (0, 0, 0): (16, 128, 128),
        (255, 0, 0): (81, 90, 240),
        (0, 255, 0): (145, 54, 34),
        (0, 0, 255): (41, 240, 110),
        (0, 255, 255): (170, 166, 16),
        (255, 0, 255): (106, 202, 222),
        (255, 255, 0): (210, 16, 146),
        (255, 255, 255): (235, 128, 128),
    }
    rgb = np.array([list(corners)], np.uint8)
    result = rgb2ycbcr(rgb)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result[0], list(corners.values()))
    np.testing.assert_allclose(ycbcr2rgb(result).astype(int), rgb, atol=1)


def test_rgb2ycbcr_equals_exact_arithmetic_pixel_by_pixel() -> None:
    rgb = colour()[60:120, 200:260]
    expected = [[exact_ycbcr(*map(int, pixel)) for pixel in row] for row in rgb]
    np.testing.assert_array_equal(rgb2ycbcr(rgb), expected)


def test_rgb2y_is_the_first_channel_of_every_colour_of_a_slice_and_a_photograph() -> None:
    green, blue = np.mgrid[:256, :256].astype(np.uint8)
    for red in (0, 1, 77, 128, 254, 255):
        rgb = np.stack([np.full_like(green, red), green, blue], axis=2)
        np.testing.assert_array_equal(rgb2y(rgb), rgb2ycbcr(rgb)[..., 0])
    photograph = skimage.data.astronaut()[:, ::-1]
    tracemalloc.start()
    y, (_, peak) = rgb2y(photograph), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * y.size  # bytes; it is cut into slices of rows
    np.testing.assert_array_equal(y, rgb2ycbcr(photograph)[..., 0])
    np.testing.assert_allclose(rgb2y(photograph / 255), rgb2ycbcr(photograph / 255)[..., 0], rtol=1e-12)
    with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
        rgb2y(photograph[..., 0])


def test_rgb2ycbcr_rounds_half_away_from_zero() -> None:
    # Colours whose Y is exactly half-way, found among a plane of the colour cube by exact arithmetic.
    ties = [
        (r, g, b)
        for r in range(0, 256, 5)
        for g in range(256)
        for b in range(256)
        if (65481 * r + 128553 * g + 24966 * b) % 255_000 == 127_500
    ]
    assert len(ties) >= 20
    y = rgb2ycbcr(np.array([ties], np.uint8))[0, :, 0]
    np.testing.assert_array_equal(rgb2y(np.array([ties], np.uint8))[0], y)
    np.testing.assert_array_equal(y, [exact_ycbcr(*tie)[0] for tie in ties])


def test_colour_conversions_agree_with_scikit_image() -> None:
    rgb = colour()
    oracle = skimage.color.rgb2ycbcr(rgb)  # 16…235, not rounded
    assert np.abs(rgb2ycbcr(rgb) - oracle).max() <= 0.5 + 1e-9
    np.testing.assert_allclose(rgb2ycbcr(rgb / 255.0) * 255, oracle, atol=1e-10)

    ycbcr = rgb2ycbcr(rgb)
    back = np.clip(skimage.color.ycbcr2rgb(ycbcr.astype(np.float64)), 0, 1)
    np.testing.assert_allclose(ycbcr2rgb(ycbcr / 255.0), back, atol=1e-10)
    assert np.abs(ycbcr2rgb(ycbcr) - back * 255).max() <= 0.5 + 1e-9


def test_colour_round_trip() -> None:
    rgb = colour()
    np.testing.assert_allclose(ycbcr2rgb(rgb2ycbcr(rgb / 255.0)), rgb / 255.0, atol=1e-12)
    loss = np.abs(ycbcr2rgb(rgb2ycbcr(rgb)).astype(int) - rgb)
    assert 0 < loss.max() <= 2


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_ycbcr2rgb_clips_colours_that_do_not_exist(dtype: type) -> None:
    top = 255 if dtype == np.uint8 else 1
    ycbcr = np.array([[[top, top, top], [0, 0, 0]]], dtype)
    result = ycbcr2rgb(ycbcr)
    assert result.dtype == dtype
    assert result.min() == 0
    assert result.max() == top


@pytest.mark.parametrize("convert", [rgb2ycbcr, ycbcr2rgb])
def test_colour_conversions_say_what_is_wrong(convert) -> None:
    with pytest.raises(ValueError, match=r"\[H, W, 3\], got shape \(4, 4\)"):
        convert(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"got shape \(4, 4, 4\)"):
        convert(np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(TypeError, match="not uint16"):
        convert(np.zeros((4, 4, 3), np.uint16))


# to_uint8


def exact_uint8(value: float) -> int:
    level = Decimal(float(np.float32(value) * np.float32(255)))
    return int(min(max(level, Decimal(0)), Decimal(255)).quantize(Decimal(1), ROUND_HALF_UP))


def test_to_uint8_equals_decimal_rounding_on_a_photograph() -> None:
    image = imresize(imresize(grey()[:96, :96], 1 / 3), 3)
    result = to_uint8(image)
    assert result.dtype == np.uint8
    assert result.shape == image.shape
    np.testing.assert_array_equal(result.ravel(), [exact_uint8(value) for value in image.ravel()])


def test_to_uint8_rounds_half_away_from_zero() -> None:
    halves = [(k + 0.5) / 255 for k in range(255)]
    exact = [x for x in halves if float(np.float32(x) * np.float32(255)) % 1 == 0.5]
    assert len(exact) > 100  # the others are not half-way once in single precision
    expected = [round(x * 255 + 0.5) for x in exact]
    np.testing.assert_array_equal(to_uint8(np.array(exact)), expected)
    assert any(level % 2 for level in expected)  # where rounding to the even level would differ


def test_to_uint8_multiplies_in_single_precision() -> None:
    # The largest single below half a level: adding 0.5 in single precision would round it up to 1.
    below = np.nextafter(np.float32(0.5), np.float32(0)) / np.float32(255)
    assert to_uint8(np.array([below]))[0] == exact_uint8(below)
    # 100.5 levels in double, less (or more) once x is single: the single decides.
    candidates = np.arange(255) / 255 + (0.5 - 1e-9) / 255
    in_double = np.floor(candidates * 255 + 0.5)
    in_single = np.array([exact_uint8(x) for x in candidates])
    assert (in_double != in_single).any()
    np.testing.assert_array_equal(to_uint8(candidates), in_single)


def test_to_uint8_keeps_every_level_and_clamps() -> None:
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(levels / 255.0), levels)
    np.testing.assert_array_equal(to_uint8(np.array([-np.inf, -0.2, 1.2, np.inf])), [0, 0, 255, 255])


def test_to_uint8_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="1 of 3 values are NaN"):
        to_uint8(np.array([0.1, np.nan, 0.3]))
    with pytest.raises(TypeError, match="not uint8"):
        to_uint8(np.zeros(3, np.uint8))
