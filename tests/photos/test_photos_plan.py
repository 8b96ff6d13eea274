"""The jobs: members of folders, existing results, outputs that cannot be written, names of files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_upscale import SCRIPT, images_in, run, save

from drrn.errors import UserError
from drrn.photos.read import read_photo

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
BICUBIC = {"scale": 2, "method": "bicubic"}


def test_hidden_files_are_no_members_and_what_cannot_be_read_is_named(tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    save(folder / "a.png", PIXELS)
    save(folder / "deeper" / "b.png", PIXELS)
    (folder / "._a.png").write_bytes(b"macOS")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "new.jxl").write_bytes(b"?")
    (folder / "notes.txt").write_text("no picture")
    os.mkfifo(folder / "pipe.png")
    assert run(input=folder, output=tmp_path / "out", **BICUBIC) == 1
    assert images_in(tmp_path / "out") == ["a.png", "deeper/b.png"]
    said = capsys.readouterr()
    for name, word in {"loop.png": "link to nothing", "gone.jpg": "link to nothing", "pipe.png": "not a file",
                       "new.jxl": "not read: save it as"}.items():  # fmt: skip
        assert any(name in line and word in line for line in said.err.splitlines()), name
    assert "4 of 6 files failed" in said.err
    assert "._a" not in said.err


def test_a_file_that_is_not_there_and_a_format_that_is_none_are_refused_before_the_work(tmp_path):
    """Among files that exist, a missing one is reported and the others are done."""
    source, gone = save(tmp_path / "a.png", PIXELS), tmp_path / "gone.jpg"
    with pytest.raises(UserError, match=r"gone\.jpg: no such file"):
        run(input=gone, scale=2)
    with pytest.raises(UserError, match=r"big\.xyz: a file's name ends in \.png, .*, a folder's in /"):
        run(input=source, output=f"{tmp_path}/big.xyz", **BICUBIC)
    assert images_in(tmp_path) == ["a.png"]
    assert run(input=[str(gone), str(source)], output=f"{tmp_path}/big.xyz/", **BICUBIC) == 1
    assert images_in(tmp_path / "big.xyz") == ["a.png"]


def test_formats_that_are_only_read_become_png(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    image = Image.fromarray(PIXELS)
    image.quantize(200).save(folder / "a.gif")
    image.save(folder / "b.ppm")
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(folder / "c.pgm")
    image.save(folder / "d.jp2", irreversible=False)
    image.save(folder / "e.avif", quality=100, subsampling="4:4:4")
    for name in ("b.ppm", "d.jp2"):
        np.testing.assert_array_equal(read_photo(folder / name).pixels, PIXELS)
    np.testing.assert_array_equal(read_photo(folder / "c.pgm").pixels[..., 0], PIXELS[..., 0].astype(int) * 257)
    assert np.abs(read_photo(folder / "e.avif").pixels.astype(int) - PIXELS).mean() < 5
    assert run(input=folder, output=tmp_path / "out", **BICUBIC) == 0
    assert images_in(tmp_path / "out") == ["a.png", "b.png", "c.png", "d.png", "e.png"]


def test_heic_is_read_where_the_plugin_is(tmp_path, monkeypatch):
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pillow_heif", None)
        without.delitem(Image.OPEN, "HEIF", raising=False)
        with pytest.raises(UserError, match=r"a\.heic is HEIC: pip install pillow-heif"):
            read_photo(path)
    heif = pytest.importorskip("pillow_heif", reason="the plugin is not installed")
    heif.register_heif_opener()
    exif = Image.Exif()
    exif[274], exif[271] = 6, "maker"
    Image.fromarray(np.rot90(PIXELS).copy()).save(path, quality=100, chroma=444, exif=exif.tobytes())
    photo = read_photo(path)
    assert np.abs(photo.pixels.astype(int) - PIXELS).mean() < 5
    assert photo.exif[271] == "maker"
    heif.from_bytes("RGB;16", (18, 16), np.full((16, 18, 3), 30_000, "<u2").tobytes()).save(path)
    assert read_photo(path).notes == ["it has more than 8 bits a channel; 8 are read"]


def test_a_depth_that_pillow_shortens_is_said(tmp_path):
    (tmp_path / "deep.ppm").write_bytes(b"P6 9 8 65535\n" + (PIXELS.astype(">u2") * 257).tobytes())
    assert read_photo(tmp_path / "deep.ppm").notes == ["it has more than 8 bits a channel; 8 are read"]


def test_the_folder_above_the_input_may_be_the_output(tmp_path, monkeypatch):
    """`output=.` of `input=photos`: files of the input are not taken for earlier results."""
    monkeypatch.chdir(tmp_path)
    Path("photos/deeper").mkdir(parents=True)
    save(Path("photos/deeper/a.png"), PIXELS)
    assert run(input="photos", output=".", **BICUBIC) == 0
    assert images_in(tmp_path) == ["deeper/a.png", "photos/deeper/a.png"]


def test_a_folder_enlarged_again_skips_what_is_there(tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in "abcde":
        save(folder / f"{name}.png", PIXELS)
    assert run(input=folder, output=out, **BICUBIC) == 0
    (out / "c.png").unlink()
    (out / "d.png").write_bytes(b"mine")
    capsys.readouterr()
    assert run(input=folder, output=out, **BICUBIC) == 0
    said = capsys.readouterr().out
    assert said.count("skipped") == 4
    assert "4 of 5 were there already: overwrite=true replaces them" in said
    assert (out / "d.png").read_bytes() == b"mine"
    assert (out / "c.png").is_file()
    assert run(input=folder, output=out, overwrite=True, **BICUBIC) == 0
    assert read_photo(out / "d.png").pixels.shape == (16, 18, 3)


@pytest.mark.parametrize(
    ("output", "word"),
    [
        ("readme/big.png", "output = readme"),  # a file where a folder should be
        ("readme", "neither a folder nor a name"),
        ("folder.png", "output: folder.png/a.png is a folder"),
        ("n" * 300 + ".png", "at most 255"),
        ("sealed/big.png", "cannot be written there"),
        ("/proc/big.png", "cannot be written there"),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_the_work(output, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "sealed" in output and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    save(Path("a.png"), PIXELS)
    Path("readme").write_text("a file")
    Path("folder.png", "a.png").mkdir(parents=True)
    Path("sealed").mkdir(mode=0o500)
    before = images_in(tmp_path)
    with pytest.raises(UserError, match=word):
        run(input="a.png", output=output, **BICUBIC)
    assert images_in(tmp_path) == before


def test_names_of_all_kinds_on_a_terminal_of_latin_1(tmp_path):
    """Bytes that are not UTF-8, escape codes, and arrows that the terminal lacks do not end the work."""
    folder = tmp_path / "photos"
    folder.mkdir()
    names = [b"caf\xe9.png", b"\x1b[31mred.png", "日本.png".encode(), b"[bold].png"]
    for name in names:
        save(tmp_path / "a.png", PIXELS).rename(folder / os.fsdecode(name))
    (folder / "\x1b[2Jbad.png").write_bytes(b"no picture")
    arguments = [SCRIPT, "input=photos", "output=out", "scale=2", "method=bicubic"]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert sorted(os.fsencode(path.name) for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr
    assert rb"\x1b[2Jbad.png" in done.stderr


def test_without_an_output_results_lie_beside_their_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("holidays/sea").mkdir(parents=True)
    for name in ("photo.jpg", "scan.tif", "holidays/sea/a.jpg", "holidays/b.png"):
        save(Path(name), PIXELS)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    job = {"scale": 1.5, "method": "bicubic"}
    assert run(input=["photo.jpg", "scan.tif", "holidays"], **job) == 0
    made = {"photo_x1.5.png", "scan_x1.5.tif", "holidays_x1.5/sea/a.jpg", "holidays_x1.5/b.png"}
    assert made == set(images_in(tmp_path)) - {str(path.relative_to(tmp_path)) for path in before}
    Path("photo_x1.5.png").write_bytes(b"mine")
    assert run(input="photo.jpg", **job) == 0
    assert Path("photo_x1.5.png").read_bytes() == b"mine"  # nothing is overwritten unasked
    monkeypatch.chdir("holidays")
    assert run(input=".", suffix=".bmp", **job) == 0
    assert (tmp_path / "holidays_x1.5/b.bmp").is_file()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_same_names_again_are_skipped_with_their_results_among_them(tmp_path, capsys):
    """`upscale *.png` again; with overwrite=true the result's path is an input, which is never overwritten."""
    first, both = save(tmp_path / "a.png", PIXELS), [str(tmp_path / "a.png"), str(tmp_path / "a_x2.png")]
    assert run(input=first, **BICUBIC) == 0
    assert run(input=both, **BICUBIC) == 0
    assert images_in(tmp_path) == ["a.png", "a_x2.png"]
    assert "a_x2.png exists: skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="inputs are never overwritten"):
        run(input=both, overwrite=True, **BICUBIC)
