"""Users' images: every kind is read, enlarged by the definition and written; bad ones are refused by name."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageCms, ImageOps
from stress_images import sound_files, stress

from drrn.config import ModelConfig
from drrn.errors import UserError
from drrn.fast import strips
from drrn.formats import FORMATS
from drrn.matlab import imresize, rgb2ycbcr, ycbcr2rgb
from drrn.photos import enlarge as photos_enlarge
from drrn.photos import plan, upscale
from drrn.photos import write as photos_write
from drrn.photos.enlarge import enlarge, result_size
from drrn.photos.read import Photo, read_photo
from drrn.photos.write import stored_dtype, write_photo
from drrn.sets import image_files
from drrn.weights.ours import save_weights
from started import Started, wait_for
from test_inference import lively

ROOT = Path(__file__).resolve().parents[2]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="session")
def rgb() -> np.ndarray:
    """Part of a photograph [70, 91, 3], uint8: odd sides, edges and fur."""
    with Image.open(image_files("demo_test", Path())[1]) as image:
        return np.asarray(image.convert("RGB"))[60:130, 100:191].copy()


@pytest.fixture(scope="session")
def alpha(rgb) -> np.ndarray:
    """A transparency with soft and hard parts [70, 91], uint8."""
    plane = np.broadcast_to(np.linspace(0, 255, rgb.shape[1]), rgb.shape[:2]).astype(np.uint8)
    plane = plane.copy()
    plane[20:40, 30:60] = 255
    return plane


@pytest.fixture(scope="session")
def deep(rgb) -> np.ndarray:
    """The photograph with 16 bits of which the lower ones matter [70, 91, 3]."""
    return rgb.astype(np.uint16) * 256 + np.random.default_rng(0).integers(0, 256, rgb.shape, np.uint16)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A small network that changes the picture visibly."""
    model = vars(ModelConfig(B=1, U=2, features=8, norm="batch", bias=True, weight_sharing=True, multi_path=True))
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_weights(path, lively(B=1, U=2), model, {"scales": [2, 3, 4]})
    return path


def options(**values: object) -> plan.Options:
    """The defaults of conf/upscale.yaml with some values changed, checked as the entry point does."""
    defaults = OmegaConf.load(ROOT / "conf" / "upscale.yaml")
    for key in ("defaults", "hydra"):
        del defaults[key]
    return plan.check(OmegaConf.merge(defaults, values))


def images_in(folder: Path) -> list[str]:
    """Files below a folder, by their place in it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def run(**values: object) -> int:
    """Run `python src/upscale.py …` without Hydra; return the exit code."""
    made = options(**{k: str(v) if isinstance(v, Path) else v for k, v in values.items()})
    return upscale.upscale(made, plan.plan(made))


def save(path: Path, array: np.ndarray, **how: object) -> Path:
    Image.fromarray(array).save(path, **how)
    return path


def png(rows: np.ndarray, colour_type: int, chunks: bytes = b"") -> bytes:
    """An independent, minimal PNG encoder for big-endian samples [H, W, C], filter 0."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = rows.shape[:2]
    raw = b"".join(b"\0" + row.tobytes() for row in rows.astype(rows.dtype.newbyteorder(">")))
    head = struct.pack(">IIBBBBB", width, height, 8 * rows.itemsize, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunks
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def png_samples(data: bytes) -> np.ndarray:
    """An independent, slow PNG decoder as PNG's specification words it: [H, W, C]."""
    place, stream = 8, b""
    while place < len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        assert zlib.crc32(name + body) == struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0]
        if name == b"IHDR":
            width, height, bits, colour_type = struct.unpack(">IIBB", body[:10])
        stream += body if name == b"IDAT" else b""
        place += 12 + length
    channels = {0: 1, 4: 2, 2: 3, 6: 4}[colour_type]
    step = channels * bits // 8
    raw, above, rows = zlib.decompress(stream), bytearray(width * step), []
    assert len(raw) == height * (1 + width * step)
    for y in range(height):
        kind, *row = raw[y * (1 + width * step) : (y + 1) * (1 + width * step)]
        for i in range(len(row)):
            a = row[i - step] if i >= step else 0
            b = above[i]
            c = above[i - step] if i >= step else 0
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            row[i] = (row[i] + (0, a, b, (a + b) // 2, paeth)[kind]) % 256
        above = bytearray(row)
        rows.append(above)
    samples = np.frombuffer(b"".join(rows), ">u2" if bits == 16 else ">u1")
    return samples.reshape(height, width, channels)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_eight_bit_kinds_are_read_as_pillow_shows_them(suffix, mode, rgb, tmp_path):
    image = Image.fromarray(rgb).convert(mode) if mode != "P" else Image.fromarray(rgb).quantize(50)
    image.save(tmp_path / f"a{suffix}")
    photo = read_photo(tmp_path / f"a{suffix}")
    shown = np.asarray(image.convert({"P": "RGB", "1": "L"}.get(mode, mode)))
    assert photo.pixels.dtype == np.uint8
    np.testing.assert_array_equal(photo.pixels, shown.reshape(*shown.shape[:2], -1))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_transparency_is_read(suffix, rgb, alpha, tmp_path):
    for pixels in (np.dstack([rgb, alpha]), np.dstack([rgb[..., 1], alpha])):
        save(tmp_path / f"a{suffix}", pixels)
        np.testing.assert_array_equal(read_photo(tmp_path / f"a{suffix}").pixels, pixels)


def test_lossy_formats_are_read_as_pillow_shows_them(rgb, tmp_path):
    for name in ("a.jpg", "a.webp"):
        path = save(tmp_path / name, rgb, quality=90)
        with Image.open(path) as image:
            np.testing.assert_array_equal(read_photo(path).pixels, np.asarray(image.convert("RGB")))


def test_palettes_with_transparency_become_rgba(rgb, tmp_path):
    image = Image.fromarray(rgb).quantize(50)
    image.save(tmp_path / "a.png", transparency=bytes(range(0, 250, 5)))
    index, palette = np.asarray(image), np.array(image.getpalette()).reshape(-1, 3)
    pixels = read_photo(tmp_path / "a.png").pixels
    np.testing.assert_array_equal(pixels[..., :3], palette[index])
    np.testing.assert_array_equal(pixels[..., 3], index * 5)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("grey", [False, True])
def test_a_colour_declared_transparent_becomes_an_alpha_channel(bits, grey, rgb, deep, tmp_path):
    pixels = (rgb if bits == 8 else deep)[..., :1] if grey else (rgb if bits == 8 else deep)
    key = pixels[7, 9].astype(">u2")
    body = b"tRNS" + key.tobytes()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(png(pixels, 0 if grey else 2, chunk))
    read = read_photo(tmp_path / "a.png").pixels
    np.testing.assert_array_equal(read[..., :-1], pixels)
    clear = (pixels == pixels[7, 9]).all(axis=2)
    assert 1 <= clear.sum() < clear.size
    np.testing.assert_array_equal(read[..., -1], np.where(clear, 0, 2**bits - 1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_are_read_to_the_last(channels, deep, tmp_path):
    pixels = np.dstack([deep, deep[::-1, :, 0]])[..., [[0], [0, 3], [0, 1, 2], [0, 1, 2, 3]][channels - 1]]
    files = {"a.png": png(pixels, (0, 4, 2, 6)[channels - 1])}
    for name, how in {
        "little.tif": {},
        "big.tif": {"byteorder": ">"},
        "deflate.tif": {"compression": "zlib", "predictor": True},
        "big deflate.tif": {"compression": "zlib", "byteorder": ">"},
        "tiles.tif": {"tile": (32, 48)},
        "planes.tif": {"planarconfig": "separate"},
    }.items():
        buffer = io.BytesIO()
        array = pixels if channels > 1 else pixels[..., 0]
        if name == "planes.tif":
            if channels == 1:
                continue
            array = np.moveaxis(pixels, 2, 0)
        elif channels > 1:
            how = {"planarconfig": "contig", **how}
        extra = ["unassalpha"] if channels in (2, 4) else None
        tifffile.imwrite(
            buffer, array, photometric="rgb" if channels > 2 else "minisblack", extrasamples=extra, **how
        )
        files[name] = buffer.getvalue()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        read = read_photo(tmp_path / name).pixels
        assert read.dtype == np.uint16, name
        np.testing.assert_array_equal(read, pixels, err_msg=name)


def test_other_pictures_and_channels_of_a_tiff(rgb, tmp_path):
    """The thumbnail of a camera's raw file does not pass for the photograph; extra channels are named."""
    with tifffile.TiffWriter(tmp_path / "raw.dng") as file:
        file.write(rgb[::8, ::8], photometric="rgb", subfiletype=1, subifds=1)
        file.write(rgb[..., 0], photometric="minisblack")
    with pytest.raises(UserError, match=r"raw\.dng: its first picture is a preview"):
        read_photo(tmp_path / "raw.dng")
    tifffile.imwrite(tmp_path / "a.tif", np.dstack([rgb, rgb[..., :2]]), photometric="rgb", planarconfig="contig")
    read = read_photo(tmp_path / "a.tif")
    np.testing.assert_array_equal(read.pixels, rgb)
    assert read.notes == ["its extra channels are left out"]


def test_white_is_zero_is_turned_round(deep, rgb, tmp_path):
    for grey in (deep[..., 0], rgb[..., 0]):
        tifffile.imwrite(tmp_path / "a.tif", np.iinfo(grey.dtype).max - grey, photometric="miniswhite")
        np.testing.assert_array_equal(read_photo(tmp_path / "a.tif").pixels[..., 0], grey)


def test_cmyk_becomes_rgb(rgb, tmp_path):
    image = Image.fromarray(rgb).convert("CMYK")
    image.save(tmp_path / "a.tif")
    photo = read_photo(tmp_path / "a.tif")
    np.testing.assert_array_equal(photo.pixels, np.asarray(image.convert("RGB")))
    assert photo.notes == ["CMYK becomes RGB"]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_floating_tiff_keeps_its_values(kind, rgb, tmp_path):
    for pixels in ((rgb / 255).astype(kind), (rgb[..., 0] / 255).astype(kind)):
        tifffile.imwrite(tmp_path / "a.tif", pixels)
        read = read_photo(tmp_path / "a.tif").pixels
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, pixels.reshape(read.shape).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("colour", [True, False])
def test_floats_that_are_no_numbers_are_refused_by_name(bad, colour, rgb, tmp_path):
    pixels = (rgb / 255).astype(np.float32)
    pixels[3, 4, 0] = bad
    tifffile.imwrite(tmp_path / "bad.tif", pixels if colour else pixels[..., 0])
    with pytest.raises(UserError, match=r"bad\.tif: 1 of [\d,]+ values are NaN or infinite"):
        read_photo(tmp_path / "bad.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_the_orientation_is_applied(orientation, suffix, rgb, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    how = {} if suffix in (".tif", ".png") else {"quality": 95}
    path = save(tmp_path / f"a{suffix}", rgb, exif=exif, **how)
    with Image.open(path) as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    photo = read_photo(path)
    assert photo.pixels.shape[:2] == (rgb.shape[:2] if orientation < 5 else rgb.shape[1::-1])
    np.testing.assert_array_equal(photo.pixels, shown)
    if suffix != ".tif":
        assert photo.exif[0x010F] == "maker"
        assert 0x0112 not in photo.exif


def test_sixteen_bit_tiff_is_turned_too(deep, tmp_path):
    for array in (deep, deep[..., 0]):
        tifffile.imwrite(tmp_path / "a.tif", array, extratags=[(274, 3, 1, 6, True)], compression="zlib")
        turned = np.rot90(array, -1)
        np.testing.assert_array_equal(read_photo(tmp_path / "a.tif").pixels.squeeze(), turned)


def test_content_counts_and_not_the_suffix(rgb, tmp_path):
    save(tmp_path / "really.png", rgb).rename(tmp_path / "called.jpg")
    np.testing.assert_array_equal(read_photo(tmp_path / "called.jpg").pixels, rgb)


def bad_files(rgb: np.ndarray, folder: Path) -> dict[str, str]:
    """Files that must be refused → a word that the refusal must hold."""
    good = save(folder / "good.png", rgb).read_bytes()
    jpeg = save(folder / "good.jpg", rgb).read_bytes()
    bomb = png(np.zeros((1, 1, 1), np.uint8), 0).replace(struct.pack(">II", 1, 1), struct.pack(">II", 60_000, 60_000))
    head = bomb[12:29]
    bomb = bomb.replace(bomb[29:33], struct.pack(">I", zlib.crc32(head)))
    lab = io.BytesIO()
    ImageCms.profileToProfile(
        Image.fromarray(rgb), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    ).save(lab, "TIFF")
    whole = io.BytesIO()
    tifffile.imwrite(whole, np.zeros((9, 9), np.int32))
    eps = io.BytesIO()
    Image.fromarray(rgb).save(eps, "EPS")
    files = {
        "empty.png": (b"", "empty"),
        "text.jpg": (b"This is not a picture.\n" * 9, "is not a PNG, JPEG, WebP, TIFF, BMP, GIF"),
        "cut.png": (good[: len(good) // 2], "cannot be read"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "header.jpg": (jpeg[:9], "cannot be read"),
        "bomb.png": (bomb, "60000×60000"),
        "lab.tif": (lab.getvalue(), "LAB"),
        "int.tif": (whole.getvalue(), "mode I "),
        "script.png": (eps.getvalue(), "is not a PNG"),  # Pillow would start Ghostscript
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder.png").mkdir()
    return {name: word for name, (_, word) in files.items()} | {"folder.png": "not a file", "none.png": "exist"}


def test_bad_files_are_refused_by_name(rgb, tmp_path):
    for name, word in bad_files(rgb, tmp_path).items():
        with pytest.raises(UserError) as refusal:
            read_photo(tmp_path / name)
        assert name in str(refusal.value)
        assert word in str(refusal.value), refusal.value


def test_the_limit_of_pixels_can_be_raised_and_leaves_pillow_as_it_was(rgb, tmp_path):
    path, limit = save(tmp_path / "a.png", rgb), Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match="raise max_pixels"):
        read_photo(path, max_pixels=rgb.shape[0] * rgb.shape[1] - 1)
    assert read_photo(path, max_pixels=rgb.shape[0] * rgb.shape[1]).pixels.shape == rgb.shape
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_picture_with_missing_strips_is_refused(rgb, tmp_path):
    """Pillow would silently fill them with black."""
    tifffile.imwrite(tmp_path / "a.tif", rgb, rowsperstrip=10)
    assert read_photo(tmp_path / "a.tif").pixels.shape == rgb.shape
    data = bytearray((tmp_path / "a.tif").read_bytes())
    at = data.index(struct.pack("<HHII", 257, 4, 1, 70)) + 8  # ImageLength
    data[at : at + 4] = struct.pack("<I", 7000)
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(UserError, match="holds 1% of its picture"):
        read_photo(tmp_path / "a.tif")


def test_damaged_files_never_crash_hang_or_swell(tmp_path):
    """The whole of it, 2,000 files, is `python tests/stress/stress_images.py`."""
    outcomes, failures = stress(len(sound_files()) * 6, seed=11, keep=tmp_path)
    assert failures == []
    assert outcomes["read_photo:read"] > 10
    assert outcomes["read_photo:refused"] > 10


# ---------------------------------------------------------------------- enlarging


@pytest.mark.parametrize(
    ("side", "scale", "result"),
    [(1, 2, 2), (333, 1.5, 500), (10, 1.1, 11), (3, 1.1, 3), (7, 2.5, 18), (100, 3, 300)],
)
def test_sides_are_rounded(side, scale, result):
    assert result_size(side, 2 * side, scale)[0] == result


@pytest.mark.parametrize("scale", [2, 3, 2.37])
@pytest.mark.parametrize("tile", [None, 37])
def test_colour_is_y_by_the_network_and_the_rest_by_bicubic(scale, tile, rgb, alpha, monkeypatch):
    """Against the definition, computed on whole planes with the plain network."""
    monkeypatch.setattr(photos_enlarge, "CHUNK", 1000)  # strips of few rows, as large images have
    monkeypatch.setattr(photos_write, "CHUNK", 1000)
    network = lively(B=1, U=2)
    alpha = np.maximum(alpha, 1)  # nothing is hidden
    size = result_size(*rgb.shape[:2], scale)
    ycbcr = imresize(rgb2ycbcr(rgb / 255), size=size)
    with torch.no_grad():
        y = network(torch.from_numpy(ycbcr[..., 0].astype(np.float32))[None, None])[0, 0].numpy()
    assert np.abs(y - ycbcr[..., 0]).max() > 0.1
    expected = ycbcr2rgb(np.dstack([y, ycbcr[..., 1:]]))
    expected = np.dstack([expected, np.clip(imresize(alpha / 255, size=size), 0, 1)])
    result = np.concatenate(list(enlarge(np.dstack([rgb, alpha]), size, network, tile=tile)))
    assert result.dtype == np.uint8
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected * 255, rtol=0, atol=0.5 + 0.005)


def test_grey_is_its_own_luminance(rgb, deep):
    network = lively(B=1, U=2)
    for grey in (rgb[..., 1], deep[..., 1]):
        top = np.iinfo(grey.dtype).max
        with torch.no_grad():
            x = imresize(grey / top, 2)
            y = network(torch.from_numpy(x.astype(np.float32))[None, None])[0, 0].numpy()
        result = np.concatenate(list(enlarge(grey[..., None], (140, 182), network)))[..., 0]
        assert result.dtype == grey.dtype
        np.testing.assert_allclose(result, np.clip(y, 0, 1) * top, rtol=0, atol=0.5 + 1e-5 * top)


def test_sixteen_bits_are_finer_than_eight(deep):
    result = np.concatenate(list(enlarge(deep, (140, 182), lively(B=1, U=2))))
    assert len(np.unique(result % 256)) == 256


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_without_a_network_everything_is_bicubic(dtype, deep):
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    pixels = (deep / 65535 * top).astype(dtype)
    result = np.concatenate(list(enlarge(pixels, (200, 301), None)))
    expected = np.clip(imresize(pixels / np.float64(top), size=(200, 301)), 0, 1) * top
    # out of gamut colours are clipped in RGB, the rest is linear
    np.testing.assert_allclose(result, expected, rtol=0, atol=0.51 if top > 1 else 1e-6)


def test_opaque_stays_opaque(rgb):
    result = np.concatenate(list(enlarge(np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]), (99, 130), None)))
    assert (result[..., 3] == 255).all()


def test_floating_values_outside_0_to_1_come_back_in_their_own_range(rgb):
    network, unit = lively(B=1, U=2), (rgb[..., :1] / 255).astype(np.float32)
    unit[0, 0], unit[0, 1] = 0, 1
    plain = np.concatenate(list(enlarge(unit, (140, 182), network)))
    stretched = np.concatenate(list(enlarge(unit * 500 - 100, (140, 182), network)))
    np.testing.assert_allclose(stretched, plain * 500 - 100, rtol=0, atol=0.02)
    assert stretched.min() >= -100
    assert stretched.max() <= 400


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 50, 3), (50, 1, 1), (2, 1, 4), (1, 3, 2)])
def test_single_pixels_and_lines(shape):
    pixels = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    result = np.concatenate(list(enlarge(pixels, (3 * shape[0], 3 * shape[1]), lively(B=1, U=2), tile=7)))
    assert result.shape == (3 * shape[0], 3 * shape[1], shape[2])


# ---------------------------------------------------------------------- writing


@pytest.mark.parametrize("shape", [(70, 91), (1, 1), (1, 50), (50, 1), (2, 3)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_holds_what_was_written(shape, channels, dtype, deep, tmp_path):
    pixels = np.dstack([deep, deep[::-1, :, :1]])[: shape[0], : shape[1], :channels]
    pixels = pixels if dtype == np.uint16 else (pixels >> 8).astype(np.uint8)
    strips = (pixels[a : a + 9] for a in range(0, shape[0], 9))
    write_photo(tmp_path / "a.png", strips, pixels.shape, pixels.dtype, Photo(pixels))
    data = (tmp_path / "a.png").read_bytes()
    samples = png_samples(data)
    np.testing.assert_array_equal(samples, pixels)
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        shown = np.asarray(image).reshape(*shape, -1)
    if dtype == np.uint8:
        np.testing.assert_array_equal(shown, pixels)
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(tmp_path / "theirs.png")
        assert len(data) < 1.05 * (tmp_path / "theirs.png").stat().st_size + 30


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(70, 91), (1, 1), (1, 3), (3, 1)])
def test_tiff_holds_what_was_written(channels, dtype, shape, deep, tmp_path, monkeypatch):
    monkeypatch.setattr(photos_enlarge, "CHUNK", 8000)  # several strips
    monkeypatch.setattr(photos_write, "CHUNK", 8000)
    pixels = np.dstack([deep, deep[::-1, :, :1]])[: shape[0], : shape[1], :channels]
    pixels = (pixels / 65535 * {1: 255, 2: 65535, 4: 1}[np.dtype(dtype).itemsize]).astype(dtype)
    strips = (pixels[a : a + 9] for a in range(0, shape[0], 9))
    write_photo(tmp_path / "a.tif", strips, pixels.shape, pixels.dtype, Photo(pixels, icc=SRGB))
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(file.pages) == 1
        page = file.pages[0]
        np.testing.assert_array_equal(page.asarray().reshape(pixels.shape), pixels)
        assert page.iccprofile == SRGB
        assert page.photometric == (2 if channels > 2 else 1)
        assert list(page.extrasamples) == ([2] if channels in (2, 4) else [])
    np.testing.assert_array_equal(read_photo(tmp_path / "a.tif").pixels, pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_other_formats_hold_it_nearly(suffix, channels, rgb, alpha, tmp_path):
    pixels = np.dstack([rgb, alpha])[..., :channels]
    if channels == 4 and suffix != ".webp":
        with pytest.raises(UserError, match=f"a{suffix}.*holds no transparency"):
            stored_dtype(tmp_path / f"a{suffix}", pixels.dtype, channels, pixels.shape[:2])
        return
    strips = iter(np.array_split(pixels, 3))
    write_photo(tmp_path / f"a{suffix}", strips, pixels.shape, pixels.dtype, Photo(pixels), quality=100)
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.format == FORMATS[suffix]
        shown = np.asarray(image.convert(("L", "", "RGB", "RGBA")[channels - 1])).reshape(pixels.shape)
    seen = shown[..., :3].astype(int) - pixels[..., :3]
    clear = alpha > 0 if channels == 4 else np.ones(alpha.shape, bool)  # WebP drops what nobody sees
    assert np.abs(seen[clear]).mean() < (3 if suffix == ".jpg" else 0.01)


def test_what_a_format_cannot_hold_is_said_before_the_work(tmp_path):
    for suffix, dtype, channels, size, word in (
        (".jpg", np.float32, 3, (9, 9), "only TIFF"),
        (".png", np.float32, 1, (9, 9), "only TIFF"),
        (".bmp", np.uint8, 2, (9, 9), "no transparency"),
        (".jpg", np.uint8, 3, (9, 70_000), "at most 65,500"),
        (".webp", np.uint8, 3, (17_000, 9), "at most 16,383"),
        (".gif", np.uint8, 3, (9, 9), "ends in"),
    ):
        with pytest.raises(UserError, match=word):
            stored_dtype(tmp_path / f"a{suffix}", np.dtype(dtype), channels, size)
    for suffix, dtype, stored in (
        (".png", np.uint16, np.uint16),
        (".tiff", np.uint16, np.uint16),
        (".TIF", np.float32, np.float32),
        (".jpg", np.uint16, np.uint8),
        (".webp", np.uint16, np.uint8),
        (".bmp", np.uint16, np.uint8),
    ):
        assert stored_dtype(tmp_path / f"a{suffix}", np.dtype(dtype), 3, (9, 9)) == stored


def test_sixteen_bits_are_rounded_where_the_format_has_eight(deep, tmp_path):
    notes = write_photo(tmp_path / "a.bmp", iter([deep]), deep.shape, np.dtype(np.uint8), Photo(deep))
    with Image.open(tmp_path / "a.bmp") as image:
        np.testing.assert_array_equal(np.asarray(image), np.floor(deep / 257 + 0.5))
    assert notes == ["BMP holds 8 bits a channel: rounded from 16"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_profile_and_exif_are_kept(suffix, rgb, tmp_path, weights):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    if suffix != ".tif":
        exif[0x8769] = {0xA002: rgb.shape[1], 0xA003: rgb.shape[0], 0x9003: "2020:01:02 03:04:05"}
    how = {"compression": "tiff_lzw"} if suffix == ".tif" else {}
    source = save(tmp_path / f"a{suffix}", rgb, icc_profile=SRGB, exif=exif, **how)
    target = tmp_path / f"b{suffix}"
    assert run(input=source, output=target, scale=2, checkpoint=weights) == 0
    with Image.open(target) as image:
        assert image.size == (140, 182)  # upright: the sides have changed places
        assert image.info["icc_profile"] == SRGB
        if suffix != ".tif":
            kept = image.getexif()
            assert kept.get(0x0112, 1) == 1
            assert kept[0x010F] == "maker"
            inner = kept.get_ifd(0x8769)
            assert (inner[0xA002], inner[0xA003]) == (140, 182)
            assert inner[0x9003] == "2020:01:02 03:04:05"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(rgb, tmp_path):
    def strips():
        yield rgb[:10]
        raise UserError("in the middle")

    for name in ("a.png", "a.tif", "a.jpg"):
        (tmp_path / name).write_bytes(b"old")
        with pytest.raises(UserError, match="in the middle"):
            write_photo(tmp_path / name, strips(), rgb.shape, rgb.dtype, Photo(rgb))
        assert (tmp_path / name).read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.png", "a.tif"]


# ---------------------------------------------------------------------- the entry point


def test_a_folder_keeps_its_structure(rgb, deep, tmp_path, weights, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    (source / "deeper" / "still").mkdir(parents=True)
    save(source / "a.png", rgb)
    save(source / "deeper" / "b.JPG", rgb)
    tifffile.imwrite(source / "deeper" / "still" / "c.tif", deep)
    (source / "notes.txt").write_text("not an image")
    assert run(input=source, output=target, scale=2, checkpoint=weights) == 0
    made = {str(p.relative_to(target)): read_photo(p).pixels for p in target.rglob("*") if p.is_file()}
    assert {name: (pixels.shape, str(pixels.dtype)) for name, pixels in made.items()} == {
        "a.png": ((140, 182, 3), "uint8"),
        "deeper/b.JPG": ((140, 182, 3), "uint8"),
        "deeper/still/c.tif": ((140, 182, 3), "uint16"),
    }
    said = capsys.readouterr()
    assert "[2/3]" in said.out
    assert "91×70 →" in said.out
    assert said.err == ""


def test_an_output_inside_the_input_is_not_enlarged_again(rgb, tmp_path):
    save(tmp_path / "a.png", rgb)
    for overwrite in (False, True):
        out = tmp_path / "out"
        assert run(input=tmp_path, output=out, scale=2, method="bicubic", overwrite=overwrite) == 0
        assert [p.name for p in tmp_path.rglob("*.png")] == ["a.png", "a.png"]


def test_what_fails_does_not_stop_the_others(rgb, tmp_path, weights, capsys):
    bad = bad_files(rgb, tmp_path)
    bad.pop("folder.png")
    names = sorted([*bad, "good.png", "good.jpg"])
    inputs, out = [str(tmp_path / name) for name in names], tmp_path / "out"
    assert run(input=inputs, output=out, scale=2, checkpoint=weights) == 1
    assert sorted(p.name for p in out.iterdir()) == ["good.jpg", "good.png"]
    errors = capsys.readouterr().err
    assert f"{len(bad)} of {len(names)} files failed" in errors
    for name, word in bad.items():
        line = next(line for line in errors.splitlines() if name in line)
        assert word in line


def test_existing_outputs_are_kept_unless_told(rgb, tmp_path, capsys):
    source, target = save(tmp_path / "a.png", rgb), tmp_path / "b.png"
    target.write_bytes(b"precious")
    job = {"input": source, "output": target, "scale": 2, "method": "bicubic"}
    assert run(**job) == 0
    assert target.read_bytes() == b"precious"
    assert f"{target} exists: skipped; overwrite=true replaces it" in capsys.readouterr().out
    assert run(**job, overwrite=True) == 0
    assert read_photo(target).pixels.shape == (140, 182, 3)


def test_inputs_are_never_overwritten(rgb, tmp_path):
    source = save(tmp_path / "a.png", rgb)
    os.link(source, tmp_path / "same.png")
    (tmp_path / "link.png").symlink_to(source)
    before = source.read_bytes()
    for output in (source, tmp_path, tmp_path / "same.png", tmp_path / "link.png"):
        with pytest.raises(UserError, match="inputs are never overwritten"):
            run(input=source, output=output, scale=2, method="bicubic", overwrite=True)
    assert source.read_bytes() == before


def test_two_inputs_never_become_one_output(rgb, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "a.png", rgb)
    save(tmp_path / "x" / "a.tif", rgb)
    job = {"output": tmp_path / "out", "scale": 2, "method": "bicubic"}
    with pytest.raises(UserError, match="would both become"):
        run(input=[str(tmp_path / "x" / "a.png"), str(tmp_path / "y" / "a.png")], **job)
    with pytest.raises(UserError, match="would both become"):
        run(input=tmp_path / "x", suffix=".png", **job)
    assert not (tmp_path / "out").exists()
    twice = str(tmp_path / "x" / "a.png")
    assert run(input=[twice, twice], **job) == 0  # the same file named twice is one file


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"input": None}, "input is missing"),
        ({"input": []}, "input is missing"),
        ({"input": {"a": 1}}, "input ="),
        ({"compare": True}, "compare: method=bicubic"),
        ({"scale": None}, "scale is missing"),
        ({"scale": 1}, "scale = 1"),
        ({"scale": float("nan")}, "scale = nan"),
        ({"scale": float("inf")}, "scale = inf"),
        ({"scale": "two"}, "scale"),
        ({"method": "lanczos"}, "method = 'lanczos'"),
        ({"checkpoint": "w.safetensors"}, "checkpoint: method=bicubic"),
        ({"method": "network", "checkpoint": "NO_SUCH"}, "checkpoint = 'NO_SUCH': no such file"),
        ({"tile": 0}, "tile = 0"),
        ({"tile": 1.5}, "tile"),
        ({"quality": 101}, "quality = 101"),
        ({"quality": "high"}, "quality"),
        ({"suffix": ".gif"}, "suffix = '.gif'"),
        ({"suffix": ".png"}, "suffix = '.png'"),
        ({"max_pixels": 0}, "max_pixels = 0"),
        ({"overwrite": "perhaps"}, "overwrite"),
        ({"self_ensemble": 3.5}, "self_ensemble"),
        ({"tiles": 3}, "tiles"),
        ({"input": ["a.png", "b.png"]}, "need a folder"),
    ],
)
def test_wrong_options_are_refused_by_name(values, word):
    with pytest.raises(UserError) as refusal:
        run(**{"input": "a.png", "output": "b.png", "scale": 2, "method": "bicubic", **values})
    assert word in str(refusal.value)


def test_wrong_checkpoints_and_devices_are_refused(rgb, tmp_path, weights):
    source = save(tmp_path / "a.png", rgb)
    with pytest.raises(UserError, match=r"a\.png is not weights"):
        run(input=source, output=tmp_path / "b.png", scale=2, checkpoint=source)
    with pytest.raises(UserError, match="device = 'abacus': allowed"):
        run(input=source, output=tmp_path / "b.png", scale=2, checkpoint=weights, device="abacus")


@pytest.mark.parametrize("scale", [2, 3])
def test_precisions_give_the_same_photograph_to_a_grey_level(scale, rgb, tmp_path, capsys):
    """In 99.9 % of its pixels; and the line that names the precision and the number of threads."""
    source, results, weights = save(tmp_path / "a.png", np.tile(rgb, (2, 2, 1))), {}, tmp_path / "w.safetensors"
    network = lively(B=1, U=2)
    with torch.no_grad():
        network.conv_rec.weight.mul_(0.25)  # a residual of 6 grey levels, as trained ones have
    save_weights(weights, network, vars(ModelConfig(1, 2, 8, "batch", True, True, True)), {"scales": [2, 3]})
    for precision in ("float32", "bf16", "auto"):
        target = tmp_path / f"{precision}.png"
        job = {"input": source, "output": target, "scale": scale, "checkpoint": weights, "precision": precision}
        assert run(**job, threads=1) == 0
        results[precision] = read_photo(target).pixels.astype(int)
        said = capsys.readouterr().out
        assert f"{precision} on 1 thread (threads)" in said or precision == "auto"
    for precision in ("bf16", "auto"):
        assert (np.abs(results[precision] - results["float32"]) <= 1).mean() >= 0.999, precision
    with pytest.raises(UserError, match="precision = tf32: only NVIDIA"):
        run(input=source, output=tmp_path / "b.png", scale=2, checkpoint=weights, precision="tf32", device="cpu")


def test_too_large_a_result_is_refused(rgb, tmp_path, capsys):
    source = save(tmp_path / "a.png", rgb)
    assert run(input=source, output=tmp_path / "b.png", scale=1e6, method="bicubic") == 1
    assert "a.png: 91,000,000×70,000,000 pixels" in capsys.readouterr().err


def test_scales_outside_the_training_are_said(rgb, tmp_path, weights, capsys):
    source = save(tmp_path / "a.png", rgb)
    for scale, warns in ((2, False), (3, False), (2.5, True), (5, True)):
        assert run(input=source, output=tmp_path / f"{scale}.png", scale=scale, checkpoint=weights) == 0
        assert ("outside the scales" in capsys.readouterr().err) == warns


def test_a_large_canvas_leaves_less_room_to_feature_maps(monkeypatch):
    network = lively(B=1, U=2)
    monkeypatch.setattr(strips, "available_memory", lambda: 64 * 10**9)
    assert upscale.room_beside(4 * 10_000_000, network) == strips.ROOM
    canvas = 4 * 200_000_000
    assert upscale.room_beside(canvas, network) + canvas < upscale.MEMORY < strips.ROOM + canvas + upscale.WORKING
    assert upscale.room_beside(10**12, network) == strips.ROOM // 8  # it still enlarges


SCRIPT = str(ROOT / "src" / "upscale.py")


def command(*arguments: object, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False, **how
    )


def test_as_a_user_types_it(rgb, tmp_path, weights):
    save(tmp_path / "my photo.png", rgb)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    files = "input=[my photo.png,broken.png]"
    done = command(files, "scale=3", f"checkpoint={weights}", "output=big", cwd=tmp_path)
    assert done.returncode == 1
    assert "broken.png" in done.stderr
    assert "Traceback" not in done.stderr
    assert "1 of 2 files failed" in done.stderr
    assert read_photo(tmp_path / "big" / "my photo.png").pixels.shape == (210, 273, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "broken.png", "my photo.png"]


def test_refusals_and_help_load_nothing_heavy(tmp_path):
    """Start-up stays short because torch, Pillow and SciPy are not imported for it."""
    code = (
        "import sys; sys.argv = ['upscale.py', *sys.argv[1:]]\n"
        "import upscale\n"
        "try: upscale.launch(upscale.main)\n"
        "except SystemExit as end: print('code', end.code)\n"
        "print('heavy', [m for m in ('torch', 'PIL', 'scipy', 'lightning') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for argument, code_expected in (("scale=0", 2), ("--help", None)):
        done = subprocess.run(
            [sys.executable, "-c", code, "input=a.png", "output=b.png", "method=bicubic", argument],
            capture_output=True, text=True, check=True, env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert "heavy []" in done.stdout
        assert code_expected is None or f"code {code_expected}" in done.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of files")
def test_a_full_disk_is_said_and_leaves_nothing(rgb, tmp_path):
    """A limit on the size of files fails writes half-way, as a full disk does; for every format."""
    import resource

    noise = np.random.default_rng(0).integers(0, 256, (70, 91, 3), np.uint8)
    names = [f"a{suffix}" for suffix in (".png", ".tif", ".jpg", ".webp", ".bmp")]
    for name in names:
        save(tmp_path / name, noise, **({"quality": 95} if name in ("a.jpg", "a.webp") else {}))
    save(tmp_path / "small.png", noise[:4, :4])
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).write_bytes(b"precious")
    files = f"input=[{','.join([*names, 'small.png'])}]"
    done = command(
        files, "scale=2", "method=bicubic", "output=out", "overwrite=true", "quality=100", cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for name in names:
        assert f"out/{name} could not be written" in done.stderr
        assert (out / name).read_bytes() == b"precious"
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "small.png"])
    assert read_photo(out / "small.png").pixels.shape == (8, 8, 3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_nothing_half_written(number, code, rgb, tmp_path, weights):
    save(tmp_path / "a.png", np.tile(rgb, (12, 12, 1)))
    (tmp_path / "out").mkdir()
    arguments = ("input=a.png", "scale=4", f"checkpoint={weights}", "output=out", "self_ensemble=true", "tile=100")
    with Started("upscale.py", *arguments, cwd=tmp_path) as process:
        wait_for(lambda: process.poll() is not None or list((tmp_path / "out").iterdir()))
        assert [p.suffix for p in (tmp_path / "out").iterdir()] == [".partial"]  # it is being written
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == code
    assert "stopped" in errors
    assert "Traceback" not in errors
    assert list((tmp_path / "out").iterdir()) == []
