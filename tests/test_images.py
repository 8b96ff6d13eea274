"""`drrn.images`: the registry and its downloads (from the test's own server), sets, and reading."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray
from PIL import Image

import drrn.sets
from drrn.config import check_sets
from drrn.errors import UserError
from drrn.images import check_whole, image_size, orientations, read_luminance, read_pixels
from drrn.sets import DEMO_SETS, fetch, find_images, image_files, is_absent, registered_sets, set_label

# ---------------------------------------------------------------------- a server, and a registry that points at it


class Server:
    """Serves files by path on 127.0.0.1 and lists the requests. A body of None drops the connection half-way."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | None] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if self.path not in outer.files:
                    self.send_error(404)
                    return
                body = outer.files[self.path]
                self.send_response(200)
                self.send_header("Content-Length", "1000" if body is None else str(len(body)))
                self.end_headers()
                self.wfile.write(b"only the start" if body is None else body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)  # its pauses between retries
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def png(image: NDArray[np.uint8], path: Path) -> bytes:
    Image.fromarray(image).save(path)
    return path.read_bytes()


@pytest.fixture
def registry(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set5 of two photographs, T91 of one; all on the server."""
    lines = ["# a comment", ""]
    crops = {"Set5/a.png": (0, 0), "Set5/b.png": (40, 60), "T91/c.png": (80, 20)}
    for name, (row, column) in crops.items():
        content = png(skimage.data.coffee()[row : row + 32, column : column + 40], tmp_path / "crop.png")
        server.files[f"/{name}"] = content
        lines.append(f"{name} {digest(content)} {server.url}/{name}")
    path = tmp_path / "registry.txt"
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(drrn.sets, "REGISTRY", path)
    return path


def everything_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


# ---------------------------------------------------------------------- fetching


def test_absent_files_are_downloaded_and_verified(registry: Path, server: Server, tmp_path: Path) -> None:
    root = tmp_path / "data"
    files = fetch("Set5", root)
    assert files == [root / "Set5/a.png", root / "Set5/b.png"]
    assert [path.read_bytes() for path in files] == [server.files["/Set5/a.png"], server.files["/Set5/b.png"]]
    assert sorted(server.asked) == ["/Set5/a.png", "/Set5/b.png"]
    assert sorted(everything_under(root)) == sorted(files)  # nothing of T91, nothing temporary


def test_what_is_present_is_not_downloaded(registry: Path, server: Server, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "Set5").mkdir(parents=True)
    (root / "Set5/a.png").write_bytes(server.files["/Set5/a.png"])
    fetch("Set5", root)
    assert server.asked == ["/Set5/b.png"]
    server.asked.clear()
    fetch("Set5", root)
    assert server.asked == []


def test_a_present_file_of_another_digest_is_refused_and_kept(registry: Path, server: Server, tmp_path: Path) -> None:
    path = tmp_path / "data/Set5/a.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"another image")
    with pytest.raises(UserError, match="Delete it") as refusal:
        fetch("Set5", tmp_path / "data")
    assert str(path) in str(refusal.value)
    assert hashlib.sha256(b"another image").hexdigest() in str(refusal.value)
    assert path.read_bytes() == b"another image"
    assert server.asked == []


@pytest.mark.parametrize(
    "served",
    [pytest.param(b"not what the registry lists", id="digest"), pytest.param(None, id="connection"), "absent"],
)
def test_a_failed_download_names_file_and_url_and_leaves_nothing(
    served: bytes | str | None, registry: Path, server: Server, tmp_path: Path
) -> None:
    if served == "absent":
        del server.files["/Set5/b.png"]
    else:
        server.files["/Set5/b.png"] = served
    root = tmp_path / "data"
    with pytest.raises(UserError) as refusal:
        fetch("Set5", root)
    text = str(refusal.value)
    assert "Set5/b.png" in text
    assert f"{server.url}/Set5/b.png" in text
    assert str(root / "Set5/b.png") in text  # where to put it by hand
    assert everything_under(root) == [root / "Set5/a.png"]
    if served != "absent":
        assert server.asked.count("/Set5/b.png") > 1  # tried again


@pytest.mark.parametrize("line", ["Set5/a.png", "Set5/a.png md5:00 http://x/a", "Set5/a.png sha256:00 http://x/a b"])
def test_a_registry_line_of_another_form_is_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "registry.txt"
    path.write_text(f"# first\n{line}\n")
    monkeypatch.setattr(drrn.sets, "REGISTRY", path)
    with pytest.raises(UserError, match=r"registry\.txt.*line"):
        fetch("Set5", tmp_path)


def test_a_missing_registry_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drrn.sets, "REGISTRY", tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match=r"nowhere\.txt is missing"):
        fetch("Set5", tmp_path)


def test_the_registry_of_the_project() -> None:
    """291 training images and the four benchmarks, each with a digest and an address of its own."""
    counts = {"T91": 91, "BSD200": 200, "Set5": 5, "Set14": 14, "BSD100": 100, "Urban100": 100}
    assert registered_sets() == counts
    lines = [line.split() for line in drrn.sets.REGISTRY.read_text().splitlines()]
    files = {s: {name: (sha, url) for name, sha, url in lines if name.startswith(f"{s}/")} for s in counts}
    entries = [entry for listed in files.values() for entry in listed.values()]
    assert all(len(sha) == len("sha256:") + 64 and url.startswith("https://") for sha, url in entries)
    assert len({url for _, url in entries}) == len(entries) == 510
    training, held_out = (
        {sha for name in names for sha, _ in files[name].values()}
        for names in (("T91", "BSD200"), ("Set5", "Set14", "BSD100", "Urban100"))
    )
    assert not training & held_out  # no test image is a training image


@pytest.mark.parametrize("name", ["T91", "BSD200", "Set5", "Set14", "BSD100"])
def test_the_images_in_drrn_data_are_the_registered_ones(
    name: str, drrn_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drrn.sets, "_download", lambda *_: pytest.fail("nothing has to be downloaded"))
    if not (drrn_data / name).is_dir():
        pytest.skip(f"{name} is not in DRRN_DATA")
    assert len(image_files(name, drrn_data)) == registered_sets()[name]


def test_of_a_set_that_is_partly_there_the_present_images_are_taken(
    registry: Path, server: Server, tmp_path: Path
) -> None:
    """Urban100 is often incomplete: measuring uses the images that exist, and downloads only if there is none."""
    root = tmp_path / "data"
    assert len(image_files("Set5", root, complete=False)) == 2
    (root / "Set5/b.png").unlink()
    server.asked.clear()
    assert image_files("Set5", root, complete=False) == [root / "Set5/a.png"]
    assert server.asked == []
    assert len(image_files("Set5", root)) == 2  # training needs the whole set
    assert server.asked == ["/Set5/b.png"]


# ---------------------------------------------------------------------- sets


def test_the_demo_sets_are_photographs_of_scikit_image(tmp_path: Path) -> None:
    train, test = (image_files(name, tmp_path) for name in ("demo_train", "demo_test"))
    assert not {path.name for path in train} & {path.name for path in test}
    assert not {"page.png", "text.png", "logo.png", "color.png", "horse.png", "phantom.png"} & {
        path.name for path in (*train, *test)
    }
    for path in (*train, *test):
        y = read_luminance(path)
        assert min(y.shape) >= 300
        assert y.std() > 10
    assert everything_under(tmp_path) == []  # the wheel ships them


def test_a_demo_set_that_is_not_shipped_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(DEMO_SETS, "demo_test", ("camera.png", "holiday.png"))
    with pytest.raises(UserError, match=r"does not ship holiday\.png"):
        image_files("demo_test", tmp_path)


def test_a_folder_is_a_set(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.bmp", "notes.txt", ".hidden", "._a.png", ".b.jpg"):  # macOS leaves such
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.png").symlink_to("a.jpg")
    assert [path.name for path in image_files(str(tmp_path), Path("unused"))] == [
        "a.jpg",
        "b.PNG",
        "c.bmp",
        "link.png",
    ]


def test_a_set_that_may_not_be_entered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png(skimage.data.camera()[:20, :20], tmp_path / "a.png")
    stat = os.stat

    def refused(path: object, *more: object, **how: object) -> os.stat_result:
        if str(path).startswith(f"{tmp_path}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *more, **how)

    monkeypatch.setattr(os, "stat", refused)
    with pytest.raises(UserError, match=rf"{tmp_path} cannot be listed: .*Permission denied"):
        image_files(str(tmp_path), tmp_path / "data")


@pytest.mark.parametrize("what", ["folder", "link to nothing", "loop", "pipe", "bytes", "escape"])
def test_what_looks_like_a_member_and_is_none_is_named(what: str, tmp_path: Path) -> None:
    """A mean over the other images would not be the set's."""
    png(skimage.data.camera()[:20, :20], tmp_path / "a.png")
    bad = tmp_path / {"bytes": "caf\udce9.png", "escape": "\x1b[2J.png"}.get(what, "b.png")
    if what == "folder":
        bad.mkdir()
    elif what == "pipe":
        os.mkfifo(bad)
    elif what in ("bytes", "escape"):
        png(skimage.data.camera()[:20, :20], bad)
    else:
        bad.symlink_to("nowhere.png" if what == "link to nothing" else "b.png")
    with pytest.raises(UserError) as refusal:
        image_files(str(tmp_path), Path("unused"))
    shown = {"bytes": r"caf\xe9.png", "escape": r"\x1b[2J.png"}.get(what, "b.png")
    assert f"{tmp_path}/{shown}" in str(refusal.value)
    str(refusal.value).encode()
    if what not in ("bytes", "escape"):
        assert dict(find_images(tmp_path))[bad].startswith("is ")


def test_images_of_other_formats_are_named_and_no_members(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.gif", "c.HEIC"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in image_files(str(tmp_path), Path("unused"))] == ["a.png"]
    for name in ("b.gif", "c.HEIC"):
        assert f"{tmp_path / name} is not read" in caplog.text


def test_images_of_a_folder_with_its_folders(tmp_path: Path) -> None:
    for name in ("a.png", "sub.png/b.png", ".trash/c.png", "sub.png/.d.png", "sub/e.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "again").symlink_to(".")
    (tmp_path / "loop.png").symlink_to("loop.png")
    found = {str(path.relative_to(tmp_path)): wrong for path, wrong in find_images(tmp_path, deep=True)}
    assert {name for name, wrong in found.items() if wrong is None} == {"a.png", "sub.png/b.png"}
    assert {name for name, wrong in found.items() if wrong} == {"loop.png", "sub/e.gif"}


def test_a_set_is_called_by_what_it_holds(
    registry: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fetch("Set5", tmp_path / "data")
    assert set_label("Set5", files) == "Set5"
    assert set_label(str(tmp_path / "data/Set5"), files) == "Set5"
    png(skimage.data.camera()[:20, :20], tmp_path / "data/Set5/mine.png")
    assert set_label(str(tmp_path / "data/Set5"), [*files, tmp_path / "data/Set5/mine.png"]) == "data/Set5"
    monkeypatch.chdir(tmp_path / "data")
    (tmp_path / "imgs[hr]").mkdir()
    assert set_label(".", files) == "data"
    assert set_label("../imgs[hr]", files) == "imgs[hr]"


def test_a_part_of_a_set_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Set5@2-3`: the second and third image by name; no other one is fetched."""
    (tmp_path / "data/mine").mkdir(parents=True)
    for name in ("c.png", "a.png", "d.png", "b.png"):
        png(skimage.data.camera()[:20, :20], tmp_path / "data/mine" / name)
    mine = str(tmp_path / "data/mine")
    names = [path.name for path in image_files(f"{mine}@2-3", tmp_path)]
    assert names == ["b.png", "c.png"]
    assert [path.name for path in image_files(f"{mine}@1-1", tmp_path)] == ["a.png"]
    assert image_files("demo_test@2-3", tmp_path) == image_files("demo_test", tmp_path)[1:]
    assert set_label(f"{mine}@2-3", []) == "mine@2-3"
    for wrong in ("3-5", "3-2"):
        with pytest.raises(UserError, match="has the images 1-4"):
            image_files(f"{mine}@{wrong}", tmp_path)
    for name in (f"{mine}@2-3", "Set5@1-2", "demo_test@1-2"):
        check_sets("data.val", [name])
    for name in ("Set5@4-6", "demo_test@3-2"):
        with pytest.raises(UserError, match=r"has the images 1-[35]"):
            check_sets("data.val", [name])
    for name in (f"{mine}@0-3", f"{mine}@a-b", "Set6@1-2", f"{mine}/no@1-2"):
        with pytest.raises(UserError, match=r"does not exist|no set and no folder"):
            check_sets("data.val", [name])
    monkeypatch.setattr(drrn.sets, "REGISTRY", tmp_path / "registry.txt")
    line = f"Some/{{}}.png {digest((tmp_path / 'data/mine/a.png').read_bytes())} http://127.0.0.1:9/none\n"
    drrn.sets.REGISTRY.write_text("".join(line.format(name) for name in "cab"))
    (tmp_path / "data/Some").mkdir()
    assert is_absent("Some@2-3", tmp_path / "data")
    for name in "bc":
        shutil.copy(tmp_path / "data/mine/a.png", tmp_path / f"data/Some/{name}.png")
    assert [path.name for path in image_files("Some@2-3", tmp_path / "data")] == ["b.png", "c.png"]
    assert is_absent("Some@1-1", tmp_path / "data")
    assert not is_absent("Some", tmp_path / "data")


def test_a_new_set_is_lines_in_the_registry(registry: Path, server: Server, tmp_path: Path) -> None:
    server.files["/m.png"] = content = png(skimage.data.camera()[:20, :20], tmp_path / "m.png")
    registry.write_text(registry.read_text() + f"Manga109/m.png {digest(content)} {server.url}/m.png\n")
    check_sets("sets", ["Manga109", "Set5"])
    assert registered_sets() == {"Set5": 2, "T91": 1, "Manga109": 1}
    assert image_files("Manga109", tmp_path) == [tmp_path / "Manga109/m.png"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="holds no image") as refusal:
        image_files(str(tmp_path), Path("unused"))
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("name", ["Set6", "no/such/folder"])
def test_an_unknown_set_is_refused_with_those_that_there_are(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"'{name}'.*Set5.*Urban100.*demo_test"):
        image_files(name, tmp_path)


# ---------------------------------------------------------------------- reading


def luma(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Y of MATLAB's rgb2ycbcr in exact fractions, pixel by pixel."""
    result = np.empty(pixels.shape[:2], np.uint8)
    for i, j in np.ndindex(result.shape):
        r, g, b = (int(v) for v in pixels[i, j])
        exact = 16 + Fraction(65_481 * r + 128_553 * g + 24_966 * b, 255_000)
        result[i, j] = int(exact + Fraction(1, 2))
    return result


def test_colour_becomes_matlabs_luminance_and_grey_stays(tmp_path: Path) -> None:
    colour, grey = skimage.data.chelsea()[100:124, 150:181], skimage.data.camera()[60:90, 200:219]
    png(colour, tmp_path / "colour.png")
    png(grey, tmp_path / "grey.png")
    np.testing.assert_array_equal(read_luminance(tmp_path / "colour.png"), luma(colour))
    np.testing.assert_array_equal(read_luminance(tmp_path / "grey.png"), grey)


def test_a_palette_is_read_as_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(skimage.data.coffee()[:40, :50]).quantize(16)
    image.save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    np.testing.assert_array_equal(read_pixels(tmp_path / "palette.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "I;16", "LA", "F"])
def test_an_image_of_another_kind_is_refused(mode: str, tmp_path: Path) -> None:
    grey = Image.fromarray(skimage.data.camera()[:20, :20])
    path = tmp_path / "image.tif"
    if mode == "I;16":
        Image.fromarray(np.asarray(grey, np.uint16) * 257).save(path)
    else:
        grey.convert("RGB" if mode == "CMYK" else mode).convert(mode).save(path)
    with pytest.raises(UserError, match=f"this one is {mode}") as refusal:
        read_pixels(path)
    assert str(path) in str(refusal.value)


def broken(kind: str, folder: Path) -> Path:
    whole = png(skimage.data.camera()[:64, :64], folder / "whole.png")
    path = folder / "broken.png"
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "damaged":
        path.write_bytes(whole[:100] + b"\0" * 200 + whole[300:])
    elif kind == "text":
        path.write_text("no image at all")
    elif kind == "empty":
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize("kind", ["truncated", "damaged", "text", "empty", "missing"])
def test_an_unreadable_image_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = broken(kind, tmp_path)
    with pytest.raises(UserError) as refusal:
        read_luminance(path)
    assert str(path) in str(refusal.value)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    png(skimage.data.camera()[:64, :64], path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"bomb\.png"):
        read_luminance(path)


@pytest.mark.parametrize("kind", ["png", "deflate", "tiles"])
def test_no_bit_flipped_in_the_pixels_gives_others(kind: str, tmp_path: Path) -> None:
    """PNG and deflate TIFF have checksums; Pillow skips the one, libtiff stops before the other."""
    pixels, path = skimage.data.chelsea()[90:154, 120:190], tmp_path / "image.tif"
    if kind == "png":
        whole, where = png(pixels, path.with_suffix(".png")), [(41, 7000)]
        path = path.with_suffix(".png")
    else:
        import tifffile

        tifffile.imwrite(
            path, pixels, compression="zlib", photometric="rgb", tile=(32, 32) if kind == "tiles" else None
        )
        whole = path.read_bytes()
        with Image.open(path) as image:
            tags = image.tag_v2
        places = zip(*(tags.get(a) or tags[b] for a, b in ((273, 324), (279, 325))), strict=True)
        where = [(at, at + length) for at, length in places]
    np.testing.assert_array_equal(read_pixels(path), pixels)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(*where[rng.integers(len(where))])] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        for read in (read_pixels, image_size):
            with pytest.raises(UserError, match=rf"{path.name} (is damaged|cannot be read)"):
                read(path)


def test_a_fax_that_libtiff_cannot_decode_is_refused(tmp_path: Path) -> None:
    """libtiff prints "bad code word" to stderr and returns wrong pixels."""
    image = Image.fromarray(skimage.data.camera()[:64, :64]).convert("1")
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", compression="group4")
    path, damaged = tmp_path / "fax.tif", bytearray(buffer.getvalue())
    path.write_bytes(damaged)
    with Image.open(path) as opened:
        check_whole(path, opened)
        place = opened.tag_v2[273][0] + opened.tag_v2[279][0] // 2
    damaged[place] ^= 0x55
    path.write_bytes(damaged)
    with Image.open(path) as opened, pytest.raises(UserError, match="fax"):
        check_whole(path, opened)


# ---------------------------------------------------------------------- orientations


def turned(image: NDArray, o: int) -> NDArray:
    """Orientation o by moving one pixel after the other."""
    for _ in range(o % 4):  # a quarter turn anticlockwise: what was right goes to the top
        height, width = image.shape
        result = np.empty((width, height), image.dtype)
        for i, j in np.ndindex(width, height):
            result[i, j] = image[j, width - 1 - i]
        image = result
    if o >= 4:  # left–right
        result = np.empty_like(image)
        for i, j in np.ndindex(image.shape):
            result[i, j] = image[i, image.shape[1] - 1 - j]
        image = result
    return image


def test_orientations_are_the_four_rotations_and_their_mirror_images() -> None:
    photograph = skimage.data.camera()[90:103, 220:229]
    versions = orientations(photograph)
    assert len(versions) == 8
    assert len({version.tobytes() + bytes(version.shape) for version in versions}) == 8
    for o, version in enumerate(versions):
        np.testing.assert_array_equal(version, turned(photograph, o))
    np.testing.assert_array_equal(orientations(photograph, [5])[0], turned(photograph, 5))
