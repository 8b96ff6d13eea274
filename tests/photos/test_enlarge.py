"""Colours of transparent pixels never show."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_upscale import run, save

from drrn.photos.enlarge import enlarge, fill_hidden
from drrn.photos.read import read_photo
from test_inference import lively


def laid_on(pixels: np.ndarray, background: int) -> np.ndarray:
    """An image [H, W, C], alpha last, composited on a grey background; 8 bits."""
    alpha = pixels[..., -1:] / 255
    return np.rint(pixels[..., :-1] * alpha + background * (1 - alpha))


def disc(colour: int, hidden: int, channels: int = 4) -> np.ndarray:
    """A disc of one colour with a soft edge; outside, alpha is 0 and hides another colour."""
    y, x = np.mgrid[:24, :24] - 11.5
    alpha = np.rint(255 * np.clip(8.5 - np.hypot(y, x), 0, 1)).astype(np.uint8)
    plane = np.where(alpha > 0, colour, hidden).astype(np.uint8)
    return np.dstack([*[plane] * (channels - 1), alpha])


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("scale", [1.5, 2, 4])
def test_bicubic_weighs_colours_by_alpha(channels, suffix, scale, tmp_path):
    for colour, hidden in ((255, 0), (0, 255)):
        pixels = disc(colour, hidden, channels)
        source, target = tmp_path / f"{colour}{suffix}", tmp_path / f"{colour}_big{suffix}"
        if suffix == ".tif":
            tifffile.imwrite(source, pixels, photometric="rgb" if channels == 4 else "minisblack",
                             extrasamples=["unassalpha"], planarconfig="contig")  # fmt: skip
        else:
            save(source, pixels)
        assert run(input=source, output=target, scale=scale, method="bicubic") == 0
        result = read_photo(target).pixels
        assert (result[..., -1] > 0).any()
        assert (laid_on(result, colour) == colour).all()


def test_palettes_with_transparency(tmp_path):
    image = Image.fromarray(disc(255, 0)[..., 3])
    palette = Image.fromarray(np.where(np.asarray(image) > 127, 1, 0).astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.save(tmp_path / "a.png", transparency=0)
    assert run(input=tmp_path / "a.png", output=tmp_path / "b.png", scale=4, method="bicubic") == 0
    assert (laid_on(read_photo(tmp_path / "b.png").pixels, 255) == 255).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("network", [True, False])
def test_a_hidden_colour_changes_no_visible_pixel(dtype, network):
    rng = np.random.default_rng(0)
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    alpha = np.where(rng.random((21, 30)) < 0.4, 0, rng.random((21, 30)))
    alpha[:9, :13] = 0  # a large part that nobody sees
    results = []
    for _ in range(2):
        colours = rng.random((21, 30, 3))
        colours[alpha > 0] = np.random.default_rng(1).random((21, 30, 3))[alpha > 0]
        pixels = (np.dstack([colours, alpha]) * top).astype(dtype)
        results.append(np.concatenate(list(enlarge(pixels, (42, 60), lively(B=1, U=2) if network else None))))
    seen = results[0][..., 3] > 0
    assert 0.2 < seen.mean() < 1
    np.testing.assert_array_equal(results[0][..., 3], results[1][..., 3])
    np.testing.assert_allclose(results[0][seen], results[1][seen], rtol=0, atol=0 if top > 1 else 1e-6)


def test_hidden_pixels_take_the_colour_of_what_is_visible_around_them():
    pixels = np.zeros((40, 50, 4), np.uint8)
    pixels[:, :10], pixels[:, 40:] = (200, 100, 50, 255), (10, 20, 30, 255)
    filled = fill_hidden(pixels)
    np.testing.assert_array_equal(filled[..., 3], pixels[..., 3])
    np.testing.assert_array_equal(filled[:, :10], pixels[:, :10])
    assert (filled[:, 10:12, :3] == (200, 100, 50)).all()
    assert (filled[:, 38:40, :3] == (10, 20, 30)).all()
    between = filled[:, 10:40, 0]
    assert between.min() >= 10
    assert between.max() <= 200
    for opaque in (pixels[:, :10], np.zeros((3, 4, 2), np.uint8)):  # nothing hidden, everything hidden
        assert fill_hidden(opaque) is opaque


def test_a_network_sees_no_edge_where_a_colour_is_hidden():
    flat = np.full((24, 24, 4), 180, np.uint8)
    flat[..., 3] = disc(0, 0)[..., 3]
    hidden = np.where(flat[..., 3:] > 0, flat, np.array([0, 255, 0, 0], np.uint8)).astype(np.uint8)
    network = lively(B=1, U=2)
    np.testing.assert_array_equal(*(np.concatenate(list(enlarge(p, (48, 48), network))) for p in (flat, hidden)))
