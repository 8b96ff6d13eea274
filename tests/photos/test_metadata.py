"""A file's metadata are kept if the result's format can store them, and otherwise named in a note."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_upscale import png, run, save

from drrn.photos.read import read_photo

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"><dc:title>t</dc:title></x:xmpmeta>'
GAMMA = (b"gAMA", struct.pack(">I", 100_000))
CHUNKS = [
    GAMMA,
    (b"cHRM", struct.pack(">8I", *range(1, 9))),
    (b"cICP", bytes([9, 16, 0, 1])),
    (b"sRGB", b"\0"),
    (b"tEXt", b"Author\0somebody"),
    (b"zTXt", b"Comment\0\0" + zlib.compress(b"long")),
    (b"iTXt", b"Title\0\0\0\0\0" + "Bär".encode()),
]


def packed(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def chunks_of(path: Path) -> list[tuple[bytes, bytes]]:
    data, place, found = path.read_bytes(), 8, []
    while place < len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        assert zlib.crc32(name + body) == struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0]
        found.append((name, body))
        place += 12 + length
    return found


def enlarged(source: Path, suffix: str) -> Path:
    target = source.with_name(f"big{suffix}")
    assert run(input=source, output=target, scale=2, method="bicubic", overwrite=True) == 0
    return target


def test_a_png_keeps_its_chunks(tmp_path):
    (tmp_path / "a.png").write_bytes(png(PIXELS, 2, packed(CHUNKS)))
    kept = chunks_of(enlarged(tmp_path / "a.png", ".png"))
    assert [chunk for chunk in kept if chunk[0] not in (b"IHDR", b"IDAT", b"IEND")] == CHUNKS
    assert kept[0][0] == b"IHDR"
    assert [name for name, _ in kept].index(b"IDAT") > len(CHUNKS)


@pytest.mark.parametrize(("suffix", "kind"), [(".jpg", "JPEG"), (".webp", "WEBP"), (".tif", "TIFF"), (".bmp", "BMP")])
def test_chunks_that_another_format_has_no_place_for_are_named(suffix, kind, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png(PIXELS, 2, packed(CHUNKS)))
    enlarged(tmp_path / "a.png", suffix)
    named = "gAMA, cHRM, cICP, tEXt, zTXt, iTXt"  # sRGB is the default
    assert f"{kind} has no place for {named} of PNG: left out" in capsys.readouterr().out


def test_a_damaged_text_is_left_out_and_said(tmp_path, capsys):
    end, text = packed([(b"IEND", b"")]), packed([(b"tEXt", b"Author\0somebody")]).replace(b"body", b"bodi")
    data = png(PIXELS, 2, packed([GAMMA])).replace(end, text + end)  # before the pixels Pillow refuses it
    (tmp_path / "a.png").write_bytes(data)
    kept = {name for name, _ in chunks_of(enlarged(tmp_path / "a.png", ".png"))}
    assert kept == {b"IHDR", b"gAMA", b"IDAT", b"IEND"}
    assert "its tEXt part is damaged and left out" in capsys.readouterr().out


@pytest.mark.parametrize("source", [".png", ".jpg", ".tif", ".bmp"])
@pytest.mark.parametrize("target", [".png", ".jpg", ".tif", ".bmp", ".webp"])
def test_the_resolution_is_kept(source, target, tmp_path):
    path = tmp_path / f"a{source}"
    Image.fromarray(PIXELS).save(path, dpi=(300, 150))
    with Image.open(enlarged(path, target)) as image:
        if target == ".webp":
            exif = image.getexif()
            dpi = exif[0x011A], exif[0x011B]
            assert exif[0x0128] == 2
        else:
            dpi = image.info["dpi"]
    assert [float(value) for value in dpi] == pytest.approx([300, 150], abs=0.02)


@pytest.mark.parametrize("target", [".png", ".jpg", ".tif"])
def test_no_resolution_is_made_up(target, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.tif")
    with Image.open(enlarged(tmp_path / "a.tif", target)) as image:
        assert "dpi" not in image.info


def test_a_turned_picture_turns_its_resolution(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    Image.fromarray(PIXELS).save(path, dpi=(300, 150), exif=exif)
    assert read_photo(path).dpi == (150, 300)


@pytest.mark.parametrize("source", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("target", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_xmp_is_kept_upright(source, target, tmp_path, capsys):
    path, how = tmp_path / f"a{source}", {"xmp": XMP}
    if source == ".png":
        path.write_bytes(png(PIXELS, 2, packed([(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)])))
    elif source == ".tif":
        Image.fromarray(PIXELS).save(path, tiffinfo={700: XMP})
    else:
        Image.fromarray(PIXELS).save(path, **how)
    turned = read_photo(path).pixels.shape
    assert turned == (9, 8, 3)  # without EXIF, Pillow reads XMP's orientation
    with Image.open(enlarged(path, target)) as image:
        image.load()
        kept = image.info.get("xmp")
    if target == ".bmp":
        assert "BMP: its XMP data do not fit: left out" in capsys.readouterr().out
    else:
        turned = rb'\s*tiff:Orientation="1"'  # Pillow leaves it out of a TIFF that it turned
        assert re.sub(turned + rb"|\s", b"", kept) == re.sub(rb'tiff:Orientation="6"|\s', b"", XMP)
    assert read_photo(path.with_name(f"big{target}")).pixels.shape == (18, 16, 3)


@pytest.mark.parametrize("suffix", [".tif", ".bmp"])
def test_exif_data_that_are_left_out_are_said(suffix, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x010F] = "maker"
    enlarged(save(tmp_path / "a.jpg", PIXELS, exif=exif), suffix)
    assert "its EXIF data are left out" in capsys.readouterr().out
