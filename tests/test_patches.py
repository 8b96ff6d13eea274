"""`drrn.patches` against the paper's count, and pair by pair against a slow construction of the test's own."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import skimage.data
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

import drrn.matlab
import drrn.patch_build
import drrn.patches
from drrn.config import DataConfig
from drrn.errors import UserError
from drrn.images import image_size, orientations, read_pixels
from drrn.matlab import resize_matrix
from drrn.pairs import pair_loader, turned
from drrn.patch_build import pair_count, prepare_patches, quantise, versions
from drrn.patches import HIGH, LOW, STEP, Patches, Recipe, ShuffledBatches, attributes, check_patch_file
from drrn.protocol import modcrop, prepare
from started import wait_for

ANYWHERE = Path("no_data_root_is_needed")


# ---------------------------------------------------------------------- the paper's numbers


@pytest.mark.parametrize(("augment", "pairs"), [("offline", 1_722_720), ("online", 215_340)])
def test_the_papers_pairs_counted_from_the_image_sizes(augment: str, pairs: int, drrn_data: Path) -> None:
    sizes = []
    for name in ("T91", "BSD200"):
        files = sorted((drrn_data / name).iterdir())
        sizes += [Image.open(path).size for path in files]
    assert len(sizes) == 291
    recipe = Recipe(("T91", "BSD200"), augment=augment)
    assert sum(pair_count(height, width, recipe) for width, height in sizes) == pairs
    one_by_one = 0
    for width, height in sizes:
        for scale in (2, 3, 4):
            rows = range(0, height // scale * scale - 31 + 1, 21)
            columns = range(0, width // scale * scale - 31 + 1, 21)
            one_by_one += len(rows) * len(columns)
    assert one_by_one * (8 if augment == "offline" else 1) == pairs


def test_the_file_of_the_paper_is_within_its_budget() -> None:
    assert 1_722_720 * 31 * 31 * (2 + 1) <= 5.2e9
    assert STEP / 2 + 1e-7 < 2e-5


@pytest.mark.parametrize("scale", range(2, 9))
def test_no_image_can_overflow_the_stored_range(scale: int) -> None:
    """The extreme of Σ wᵢ yᵢ over y in 0…1 is (1 ± Σ|wᵢ|) / 2; both dimensions, down and up."""
    side = 24 * scale
    both = resize_matrix(side // scale, scale, side) @ resize_matrix(side, 1 / scale, side // scale)
    gain = np.abs(both.toarray()).sum(axis=1).max() ** 2
    assert (1 - gain) / 2 > LOW
    assert (1 + gain) / 2 < HIGH


def test_quantise_is_the_nearest_level_and_refuses_what_is_outside() -> None:
    x = np.random.default_rng(0).uniform(LOW, HIGH, 10_000)
    q = quantise(x)
    assert q.dtype == np.uint16
    assert np.abs(q * STEP + LOW - x).max() <= STEP / 2 + 1e-12
    assert quantise(np.array([LOW, HIGH])).tolist() == [0, 65535]
    for outside in (LOW - 1e-3, HIGH + 1e-3, math.nan):
        with pytest.raises(ValueError, match="outside"):
            quantise(np.array([0.5, outside]))


@pytest.mark.parametrize(("scale", "cropped"), [(2, 0), (2, 1), (3, 2), (4, 3)])
def test_a_turned_photograph_degrades_to_the_same_levels(scale: int, cropped: int) -> None:
    """Bit for bit, though flat areas are half-way between two levels; the build relies on this."""
    y = drrn.matlab.rgb2ycbcr(skimage.data.chelsea()[:180, :264])[..., 0]
    blocks = 5 * np.random.default_rng(0).integers(0, 52, (5, 10), dtype=np.uint8)
    y[:100, :200] = np.kron(blocks, np.ones((20, 20), np.uint8))  # flat areas
    y = y[: 180 - cropped, : 264 - cropped]
    ways = set()
    for o in range(8):
        turned = modcrop(orientations(y, [o])[0], scale)
        version = next(v for v in versions(*y.shape, Recipe((), scales=(scale,))) if v.orientation == o)
        _, top, left, h, w = version.rectangle
        part = y[top : top + h, left : left + w]
        np.testing.assert_array_equal(orientations(part, [o])[0], turned)
        ours = orientations(quantise(prepare(part, scale)[0]), [o])[0]
        np.testing.assert_array_equal(ours, quantise(prepare(turned, scale)[0]))
        ways.add((top, left))
    assert len(ways) == (4 if cropped else 1)


# ---------------------------------------------------------------------- a build, pair by pair


def keys_cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    if x <= 2:
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return 0.0


def weights(length: int, out: int, scale: float) -> NDArray[np.float64]:
    """MATLAB's bicubic along one dimension as a dense matrix, tap by tap."""
    matrix = np.zeros((out, length))
    wide = max(1.0, 1 / scale)
    for o in range(out):
        centre = (o + 0.5) / scale - 0.5
        taps = range(math.floor(centre - 2 * wide) - 1, math.ceil(centre + 2 * wide) + 2)
        values = np.array([keys_cubic((centre - t) / wide) for t in taps])
        for t, value in zip(taps, values / values.sum(), strict=True):
            mirrored = t % (2 * length)
            matrix[o, mirrored if mirrored < length else 2 * length - 1 - mirrored] += value
    return matrix


def slow_pairs(
    path: Path, scales: tuple[int, ...], orientations: int, p: int = 31, stride: int = 21
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.uint8]]]:
    """(x, x̃) of one image as release.md says, one window after the other."""
    pixels = np.asarray(Image.open(path)).astype(int)
    if pixels.ndim == 3:  # thousandths of a level, in whole numbers, rounded half up
        n = 16 * 255_000 + 65_481 * pixels[..., 0] + 128_553 * pixels[..., 1] + 24_966 * pixels[..., 2]
        pixels = (2 * n + 255_000) // (2 * 255_000)
    for o in range(orientations):
        y = pixels
        for _ in range(o % 4):
            y = y.T[::-1]  # a quarter turn anticlockwise
        if o >= 4:
            y = y[:, ::-1]
        for s in scales:
            height, width = y.shape[0] // s * s, y.shape[1] // s * s
            truth = y[:height, :width]
            down = weights(height, height // s, 1 / s) @ (truth / 255) @ weights(width, width // s, 1 / s).T
            up = weights(height // s, height, s) @ down @ weights(width // s, width, s).T
            top = 0
            while top + p <= height:
                left = 0
                while left + p <= width:
                    window = slice(top, top + p), slice(left, left + p)
                    yield up[window], truth[window].astype(np.uint8)
                    left += stride
                top += stride


def stored(path: Path) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Both datasets through h5py, not through the reader under test."""
    with h5py.File(path) as file:
        return file["data"][:], file["label"][:]


def assert_same_pairs(path: Path, expected: list[tuple[NDArray, NDArray]]) -> list[int]:
    """The file has every expected pair exactly once and no other; return its rows in the expected order."""
    data, label = stored(path)
    assert len(data) == len(label) == len(expected)
    rows_of: dict[bytes, list[int]] = {}
    for row, y in enumerate(label):
        rows_of.setdefault(y.tobytes(), []).append(row)
    found = []
    for x, y in expected:
        candidates = rows_of.get(y.tobytes(), [])
        errors = {row: np.abs(data[row] * STEP + LOW - x).max() for row in candidates}
        good = [row for row, error in errors.items() if error <= 2e-5]
        assert good, f"no stored pair is within 2e-5: {errors}"
        candidates.remove(good[0])  # no row stands for two
        found.append(good[0])
    assert sorted(found) == list(range(len(expected)))
    return found


@pytest.mark.parametrize("augment", ["offline", "online"])
def test_a_build_holds_every_pair_once(augment: str, tiny_images: Path, tmp_path: Path, inline_pool: None) -> None:
    recipe = Recipe((str(tiny_images),), augment=augment)
    path = prepare_patches("tiny", recipe, ANYWHERE, tmp_path)
    turns = 8 if augment == "offline" else 1
    files = sorted(tiny_images.iterdir())
    expected = list(itertools.chain(*(slow_pairs(file, (2, 3, 4), turns) for file in files)))
    assert len(expected) == turns * ((9 + 9 + 6) + (4 + 4 + 4))
    rows = assert_same_pairs(path, expected)
    moved = np.abs(np.diff(rows)) != 1
    assert moved.mean() > 0.9  # stored in random order
    with h5py.File(path) as file:
        assert (file["data"].dtype, file["label"].dtype) == (np.uint16, np.uint8)


def test_a_file_that_is_there_needs_no_lock(
    tiny_images: Path, tmp_path: Path, inline_pool: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A team's folder of patches may be read-only."""
    recipe = Recipe((str(tiny_images),), augment="online")
    path = prepare_patches("tiny", recipe, ANYWHERE, tmp_path)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refused)
    assert prepare_patches("tiny", recipe, ANYWHERE, tmp_path) == path
    with pytest.raises(UserError, match="Permission denied"):
        prepare_patches("other", recipe, ANYWHERE, tmp_path)


def test_a_build_of_the_papers_images(drrn_data: Path, tmp_path: Path, inline_pool: None) -> None:
    """One image of T91 and one of BSD200, in a folder of their own."""
    folder = tmp_path / "two"
    folder.mkdir()
    for set_name in ("T91", "BSD200"):
        shutil.copy(min((drrn_data / set_name).iterdir()), folder)
    path = prepare_patches("two", Recipe((str(folder),), scales=(3,)), ANYWHERE, tmp_path)
    expected = list(itertools.chain(*(slow_pairs(file, (3,), 8) for file in sorted(folder.iterdir()))))
    assert_same_pairs(path, expected)


def test_other_window_sizes_and_images_that_are_too_small(tmp_path: Path, inline_pool: None) -> None:
    """Images smaller than a patch or the scale give no pairs; the others are cut by the recipe."""
    folder = tmp_path / "images"
    folder.mkdir()
    photograph = skimage.data.coffee()
    for name, (height, width) in {"a": (40, 33), "b": (16, 90), "c": (3, 3), "d": (17, 17)}.items():
        Image.fromarray(photograph[100 : 100 + height, 200 : 200 + width]).save(folder / f"{name}.png")
    recipe = Recipe((str(folder),), scales=(4, 5), patch_size=17, stride=6)
    path = prepare_patches("small", recipe, ANYWHERE, tmp_path)
    expected = list(
        itertools.chain(*(slow_pairs(file, (4, 5), 8, 17, 6) for file in (folder / "a.png", folder / "b.png")))
    )
    assert len(expected) > 50
    assert_same_pairs(path, expected)


def test_a_build_of_many_images_opens_few_files(tmp_path: Path, inline_pool: None) -> None:
    """A process may often open no more than 1024."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files are counted in Linux's /proc")
    (tmp_path / "images").mkdir()
    for k in range(40):
        Image.fromarray(skimage.data.camera()[k : k + 21, :23]).save(tmp_path / f"images/{k}.png")
    drrn.patch_build._cutter.cache_clear()  # it keeps the last build's pixels open
    before = len(list(Path("/proc/self/fd").iterdir()))
    recipe = Recipe((str(tmp_path / "images"),), scales=(2,), patch_size=20, augment="online")
    prepare_patches("many", recipe, ANYWHERE, tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 20


def test_builds_are_equal_whatever_the_number_of_processes(
    tiny_images: Path, tiny_patches: Path, tmp_path: Path, inline_pool: None
) -> None:
    """`tiny_patches` was built by two real processes."""
    again = prepare_patches("tiny", Recipe((str(tiny_images),), scales=(2, 3)), ANYWHERE, tmp_path, workers=1)
    assert again.name == tiny_patches.name
    assert again.read_bytes() == tiny_patches.read_bytes()


# ---------------------------------------------------------------------- which file belongs to which run


def test_a_file_that_is_there_is_used(tiny_images: Path, tmp_path: Path, inline_pool: None) -> None:
    recipe = Recipe((str(tiny_images),), scales=(2,))
    path = prepare_patches("tiny", recipe, ANYWHERE, tmp_path)
    before = path.stat()
    assert prepare_patches("tiny", recipe, ANYWHERE, tmp_path) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_processes_that_ask_at_once_build_once(
    tiny_images: Path, tmp_path: Path, inline_pool: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[Path] = []
    build = drrn.patch_build._build
    monkeypatch.setattr(drrn.patch_build, "_build", lambda path, *rest: (builds.append(path), build(path, *rest)))
    recipe = Recipe((str(tiny_images),), scales=(2,))
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: prepare_patches("tiny", recipe, ANYWHERE, tmp_path), range(3)))
    assert len(builds) == 1
    assert len(set(paths)) == 1
    check_patch_file(paths[0], attributes(recipe, sorted(tiny_images.iterdir())))


def test_recipes_live_side_by_side(tiny_images: Path, tmp_path: Path, inline_pool: None) -> None:
    sets = (str(tiny_images),)
    recipes = [
        Recipe(sets, scales=(2,)),
        Recipe(sets, scales=(3,)),
        Recipe(sets, scales=(2,), patch_size=30),
        Recipe(sets, scales=(2,), stride=20),
        Recipe(sets, scales=(2,), augment="online"),
    ]
    paths = [prepare_patches("tiny", recipe, ANYWHERE, tmp_path) for recipe in recipes]
    assert len(set(paths)) == len(recipes)
    for path, recipe in zip(paths, recipes, strict=True):
        pairs = check_patch_file(path, attributes(recipe, sorted(tiny_images.iterdir())))
        sizes = [Image.open(file).size for file in tiny_images.iterdir()]
        assert pairs == sum(pair_count(h, w, recipe) for w, h in sizes) == Patches(path).stored
        with h5py.File(path) as file:
            assert file["data"].shape[1:] == (recipe.patch_size,) * 2
            assert json.loads(file.attrs["recipe"])["stride"] == recipe.stride


@pytest.mark.parametrize("change", ["pixel", "name", "more", "fewer"])
def test_changed_sources_are_another_file(change: str, tiny_images: Path, tmp_path: Path, inline_pool: None) -> None:
    folder = tmp_path / "images"
    shutil.copytree(tiny_images, folder)
    recipe = Recipe((str(folder),), scales=(2,))
    first = prepare_patches("tiny", recipe, ANYWHERE, tmp_path)
    kept = first.read_bytes()
    camera = folder / "camera.png"
    if change == "pixel":
        pixels = np.array(Image.open(camera))
        pixels[5, 5] ^= 1
        Image.fromarray(pixels).save(camera)
    elif change == "name":
        camera.rename(folder / "cb.png")  # in the same place of the order
    elif change == "more":
        shutil.copy(camera, folder / "again.png")
    else:
        camera.unlink()
    second = prepare_patches("tiny", recipe, ANYWHERE, tmp_path)
    assert second != first
    assert first.read_bytes() == kept


# ---------------------------------------------------------------------- files that must not be trusted


def damaged(path: Path, how: str) -> None:
    """Make a patch file wrong in one way."""
    whole = path.read_bytes()
    with h5py.File(path) as file:
        data, label = file["data"][:], file["label"][:]
        attrs = {key: v.decode() if isinstance(v, bytes) else v for key, v in file.attrs.items()}
    if how.startswith("cut"):
        path.write_bytes(whole[: int(len(whole) * float(how.split()[1]))])
        return
    if how == "last byte gone":
        path.write_bytes(whole[:-1])
        return
    if how in ("empty", "text"):
        path.write_bytes(b"" if how == "empty" else b"not HDF5, " * 1000)
        return
    attrs |= {
        "format": {"format": 1},
        "recipe": {"recipe": attrs["recipe"].replace('"stride": 21', '"stride": 22')},
        "sources": {"sources": "0" * 64},
        "garbled recipe": {"recipe": "\x01{"},
    }.get(how, {})
    if how == "no format":
        del attrs["format"]
    data = {"wrong dtype of data": data.astype(np.float32), "a pair short": data[:-1]}.get(how, data)
    label = {"wrong dtype of label": label.astype(np.uint16), "other patches": label[:, 1:, 1:]}.get(how, label)
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs.update(attrs)
        if how == "data is a group":
            file.create_group("data")
        elif how != "no data":
            file.create_dataset("data", data=data, chunks=(4, 31, 31) if how == "in chunks" else None)
        file.create_dataset("label", data=label)


@pytest.mark.parametrize(
    "how",
    ["format", "no format", "recipe", "garbled recipe", "sources", "no data", "data is a group", "in chunks",
     "wrong dtype of data", "wrong dtype of label", "a pair short", "other patches", "empty", "text",
     "last byte gone", "cut 0.001", "cut 0.01", "cut 0.3", "cut 0.66", "cut 0.99"],
)  # fmt: skip
def test_a_wrong_file_is_refused_and_named(how: str, tiny_images: Path, tiny_patches: Path, tmp_path: Path) -> None:
    """Its name is right, so only its content can reveal the fault."""
    path = tmp_path / tiny_patches.name
    shutil.copy(tiny_patches, path)
    recipe = Recipe((str(tiny_images),), scales=(2, 3))
    assert prepare_patches("tiny", recipe, ANYWHERE, tmp_path) == path  # undamaged, it is accepted
    damaged(path, how)
    with pytest.raises(UserError, match="Delete") as refusal:
        prepare_patches("tiny", recipe, ANYWHERE, tmp_path)
    assert f"Delete {path}" in str(refusal.value)


def test_a_file_cut_short_in_use_is_an_error_not_a_wrong_batch(tiny_patches: Path, tmp_path: Path) -> None:
    path = tmp_path / "patches.h5"
    shutil.copy(tiny_patches, path)
    patches = Patches(path)
    patches[np.arange(4)]
    with path.open("r+b") as file:
        file.truncate(patches.data_at + 1000)
    with pytest.raises(OSError, match=r"patches\.h5"):
        patches[np.arange(4)]


@pytest.fixture
def copied(tiny_images: Path, tiny_patches: Path, tmp_path: Path) -> tuple[Path, Callable[[], Path]]:
    """A patch file to damage, and the call by which a run opens it."""
    path = tmp_path / tiny_patches.name
    shutil.copy(tiny_patches, path)
    return path, lambda: prepare_patches("tiny", Recipe((str(tiny_images),), (2, 3)), ANYWHERE, tmp_path)


def test_truncated_anywhere_it_is_refused(copied: tuple[Path, Callable], tiny_patches: Path) -> None:
    path, ask = copied
    whole = tiny_patches.read_bytes()
    for length in np.random.default_rng(6).integers(0, len(whole), 50).tolist():
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="Delete"):
            ask()


def test_a_bit_flipped_in_what_the_file_says_of_itself_never_gives_a_wrong_batch(
    copied: tuple[Path, Callable], tiny_images: Path, tiny_patches: Path
) -> None:
    """In all but the pairs: attributes, types, shapes, offsets. HDF5's checksums or the comparison with the recipe
    detect it."""
    path, _ = copied
    attrs = attributes(Recipe((str(tiny_images),), (2, 3)), sorted(tiny_images.iterdir()))
    whole, good = tiny_patches.read_bytes(), Patches(tiny_patches)
    everything = np.arange(len(good))
    x, y = good[everything]
    outside = np.ones(len(whole), bool)
    outside[good.data_at : good.data_at + x.nbytes] = False
    outside[good.label_at : good.label_at + y.nbytes] = False
    written = outside & (np.frombuffer(whole, np.uint8) != 0)  # the gaps that align the datasets are not
    assert written.sum() > 300
    rng, refused = np.random.default_rng(7), 0
    places = [place for which in (outside, written) for place in rng.permutation(np.flatnonzero(which))[:80].tolist()]
    for place, bit in zip(places, rng.integers(0, 8, len(places)).tolist(), strict=True):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            check_patch_file(path, attrs)
            batch = Patches(path)[everything]
        except UserError:
            refused += 1
        else:  # a byte that nothing depends on
            np.testing.assert_array_equal(batch[0], x)
            np.testing.assert_array_equal(batch[1], y)
    assert refused > 40  # every bit: make stress


# A build in a process of its own. Its workers import this file too, so they read images by `read`.
BUILD = """
import logging, os, sys, time
from pathlib import Path
import drrn.matlab
import drrn.patch_build, drrn.patches
from drrn.errors import UserError

real, images, folder, how = drrn.patch_build.read_pixels, *sys.argv[1:]

def read(path):
    if how == "hang" and path.name == "chelsea.png":
        time.sleep(600)
    if how == "die" and path.name == "chelsea.png":
        os.kill(os.getpid(), 9)
    return real(path)

drrn.patch_build.read_pixels = read
if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(drrn.patch_build.prepare_patches("tiny", drrn.patches.Recipe((images,), (2,)), Path(), Path(folder), 1))
    except UserError as refusal:
        sys.exit(f"refused: {refusal}")
"""


@pytest.fixture
def builder(tiny_images: Path, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen]]:
    """`builder(how)` starts `BUILD` on the tiny images, into tmp_path/patches."""
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    started = []

    def start(how: str = "") -> subprocess.Popen:
        command = [sys.executable, script, tiny_images, tmp_path / "patches", how]
        environment = {**os.environ, "PYTHONPATH": str(Path(drrn.patch_build.__file__).parents[1])}
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_real_processes_that_ask_at_once_build_once(builder: Callable, tiny_images: Path, tmp_path: Path) -> None:
    processes = [builder() for _ in range(2)]
    outcomes = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    paths = {Path(out.splitlines()[-1]) for out, _ in outcomes}
    assert len(paths) == 1
    assert sum("building" in err for _, err in outcomes) == 1
    check_patch_file(paths.pop(), attributes(Recipe((str(tiny_images),), (2,)), sorted(tiny_images.iterdir())))
    assert [path.suffix for path in (tmp_path / "patches").iterdir() if path.suffix != ".lock"] == [".h5"]


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc")
def test_a_killed_build_leaves_nothing_for_the_next_one(builder: Callable, tmp_path: Path) -> None:
    """Neither its file (5 GB), nor its lock, nor its workers remain; files of other builds are not touched."""
    folder = tmp_path / "patches"
    killed = builder("hang")
    wait_for(lambda: list(folder.glob("*.partial")) and children(killed.pid))
    wait_for(lambda: len(children(killed.pid)) >= 2)  # the worker, and Python's resource tracker
    workers = children(killed.pid)
    killed.kill()
    killed.communicate()
    (left,) = folder.glob("*.partial")
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    other, busy = folder / "other-0123456789.77.partial", folder / "busy-0123456789.77.partial"
    (other / "deep").mkdir(parents=True)
    (folder / "old-0123456789.78.partial").touch()  # a file: earlier versions'
    busy.mkdir()
    (folder / "film.partial").touch()  # another program's
    with FileLock(folder / "busy-0123456789.h5.lock"):
        process = builder()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"removing {left}" in err
    assert sorted(path.name for path in folder.glob("*.partial")) == [busy.name, "film.partial"]
    assert len(list(folder.glob("*.h5"))) == 1


def test_a_worker_that_is_killed_is_said(builder: Callable, tmp_path: Path) -> None:
    """Killed as by the kernel when memory is short; the build reports it."""
    process = builder("die")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "refused: a process that built" in err
    assert "was killed" in err
    assert "Traceback" not in err
    assert_nothing_left(tmp_path / "patches")


def test_a_file_that_another_process_writes_to_is_not_read(copied: tuple[Path, Callable]) -> None:
    path, ask = copied
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="open for writing in another process"):
            ask()
        writer.stdin.close()
    assert ask() == path


@pytest.mark.parametrize("change", ["pixels", "size", "gone"])
def test_images_that_change_during_a_build_are_noticed(
    change: str, tiny_images: Path, tmp_path: Path, inline_pool: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, folder = tmp_path / "images", tmp_path / "patches"
    shutil.copytree(tiny_images, images)
    camera = images / "camera.png"

    def read_after_a_change(path: Path) -> NDArray[np.uint8]:
        if path == camera:
            pixels = np.array(Image.open(camera))
            if change == "gone":
                camera.unlink()
            else:
                Image.fromarray(pixels[:, ::-1] if change == "pixels" else pixels[:33, :33]).save(camera)
        return read_pixels(path)

    monkeypatch.setattr(drrn.patch_build, "read_pixels", read_after_a_change)
    with pytest.raises(UserError, match="cannot be read" if change == "gone" else "changed while"):
        prepare_patches("tiny", Recipe((str(images),), scales=(2,)), ANYWHERE, folder, workers=1)
    assert_nothing_left(folder)


def test_a_build_in_many_pieces_is_the_same(
    tiny_images: Path, tiny_patches: Path, tmp_path: Path, inline_pool: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several pieces, the last one incomplete."""
    firsts, fill = [], drrn.patch_build._fill
    monkeypatch.setattr(drrn.patch_build, "ROWS", 24)
    monkeypatch.setattr(drrn.patch_build, "_fill", lambda first, *rest: (firsts.append(first), fill(first, *rest)))
    path = prepare_patches("tiny", Recipe((str(tiny_images),), (2, 3)), ANYWHERE, tmp_path, workers=1)
    assert path.read_bytes() == tiny_patches.read_bytes()
    total = len(Patches(path))
    assert total % 24
    assert firsts == list(range(0, total, 24))
    assert len(firsts) > 6


@pytest.mark.parametrize("piece", [1, -1], ids=["first", "last"])
def test_a_piece_that_cannot_be_written_ends_the_build(
    piece: int, tiny_images: Path, tmp_path: Path, inline_pool: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fill = [], drrn.patch_build._fill
    total = sum(pair_count(*image_size(file), Recipe((str(tiny_images),), (2, 3))) for file in tiny_images.iterdir())
    fatal = piece if piece > 0 else -(-total // 24)

    def written(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == fatal:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fill(*arguments)

    monkeypatch.setattr(drrn.patch_build, "ROWS", 24)
    monkeypatch.setattr(drrn.patch_build, "_fill", written)
    with pytest.raises(UserError, match="No space left"):
        prepare_patches("tiny", Recipe((str(tiny_images),), (2, 3)), ANYWHERE, tmp_path / "patches", workers=1)
    assert len(calls) >= fatal
    assert_nothing_left(tmp_path / "patches")


# ---------------------------------------------------------------------- builds that fail


def assert_nothing_left(folder: Path) -> None:
    left = [path.name for path in folder.iterdir() if path.suffix != ".lock"] if folder.exists() else []
    assert left == []


def test_too_little_room_is_refused_before_the_build(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)

    recipe = Recipe((str(tiny_images),))
    with_h5 = 3 * 31 * 31 * sum(pair_count(*image_size(file), recipe) for file in tiny_images.iterdir())

    class Full:  # room for the patches, not for the pixels that they are cut from
        f_bavail, f_frsize = with_h5 // real.f_frsize + 1, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    monkeypatch.setattr(drrn.patch_build, "_degrade_image", lambda *_: pytest.fail("nothing may be written"))
    folder = tmp_path / "patches"
    with pytest.raises(UserError, match="are free") as refusal:
        prepare_patches("tiny", Recipe((str(tiny_images),)), ANYWHERE, folder)
    assert "data.patches" in str(refusal.value)
    assert_nothing_left(folder)


@pytest.mark.parametrize("when", ["_degrade_image", "_fill"])
def test_a_disk_that_fills_up_while_building(
    when: str, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real file system of 32 or 512 kB if this process may mount one; else the build gets a fake full disk."""
    folder = tmp_path / "patches"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={32 if when == '_degrade_image' else 512}k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        if mounted:  # the build believes that there is room, and writes from processes of its own
            monkeypatch.setattr(os, "statvfs", lambda path: type("Room", (), {"f_bavail": 2**40, "f_frsize": 1}))
        else:

            def full(*_: object) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(drrn.patch_build, when, full)
            monkeypatch.setattr(drrn.patch_build, "ProcessPoolExecutor", lambda n, **_: ThreadPoolExecutor(n))
        with pytest.raises(UserError, match="No space left") as refusal:
            prepare_patches("tiny", Recipe((str(tiny_images),)), ANYWHERE, folder)
        assert str(folder) in str(refusal.value)
        assert_nothing_left(folder)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["truncated", "text", "bomb"])
def test_an_unreadable_source_is_refused(
    kind: str, tiny_images: Path, tmp_path: Path, inline_pool: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, folder = tmp_path / "images", tmp_path / "patches"
    shutil.copytree(tiny_images, images)
    bad = images / "middle.png"
    if kind == "text":
        bad.write_text("no image")
    else:
        whole = (images / "chelsea.png").read_bytes()
        bad.write_bytes(whole[: len(whole) // 2] if kind == "truncated" else whole)
    if kind == "bomb":
        (images / "camera.png").unlink()
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
        (images / "chelsea.png").unlink()
    with pytest.raises(UserError) as refusal:
        prepare_patches("tiny", Recipe((str(images),)), ANYWHERE, folder)
    assert str(bad) in str(refusal.value)
    assert_nothing_left(folder)


def test_a_source_of_another_digest_is_refused(drrn_data: Path, tmp_path: Path) -> None:
    root, folder = tmp_path / "data", tmp_path / "patches"
    (root / "T91").mkdir(parents=True)
    for path in (drrn_data / "T91").iterdir():
        (root / "T91" / path.name).symlink_to(path)
    changed = root / "T91/t40.bmp"
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.unlink()
    changed.write_bytes(content)
    with pytest.raises(UserError, match="Delete it") as refusal:
        prepare_patches("t91", Recipe(("T91",)), root, folder)
    assert str(changed) in str(refusal.value)
    assert_nothing_left(folder)


def test_a_patch_larger_than_the_images_is_refused(tiny_images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"patch of 92 pixels.*data\.patch_size"):
        prepare_patches("tiny", Recipe((str(tiny_images),), patch_size=92), ANYWHERE, tmp_path / "patches")
    assert_nothing_left(tmp_path / "patches")


def test_a_folder_that_cannot_be_made_is_refused(tiny_images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not be written"):
        prepare_patches("tiny", Recipe((str(tiny_images),)), ANYWHERE, tmp_path / "file" / "patches")


# ---------------------------------------------------------------------- reading


def test_a_batch_is_the_stored_pairs(tiny_patches: Path) -> None:
    data, label = stored(tiny_patches)
    patches = Patches(tiny_patches)
    assert len(patches) == len(data)
    rng = np.random.default_rng(0)
    for indices in (
        np.arange(len(data)),
        rng.integers(0, len(data), 50),
        np.array([3, 4, 5, 5, 6, 2, 1, 0, len(data) - 1]),
        np.array([7]),
        rng.integers(0, len(data), 9).astype(np.int32),
    ):
        x, y = patches[indices]
        np.testing.assert_array_equal(x, data[indices])
        np.testing.assert_array_equal(y, label[indices])


def test_online_orientations_are_those_of_the_stored_pair(tiny_patches: Path) -> None:
    """Index i is stored pair i mod N in orientation i div N, whatever stands next to it in the batch."""
    data, label = stored(tiny_patches)
    n = len(data)
    patches = Patches(tiny_patches, turns=8)
    assert len(patches) == 8 * n
    order = np.random.default_rng(1).permutation(8 * n)[:400]
    order = np.r_[order, np.arange(n - 3, n + 3), np.arange(8 * n - 2, 8 * n)]  # runs across two orientations
    x, y, o = (torch.from_numpy(part) for part in patches[order])
    x, y = turned(x.float(), o).numpy(), turned(y.float(), o).numpy()
    for k, index in enumerate(order):
        o, row = divmod(int(index), n)
        for got, kept in ((x[k], data[row]), (y[k], label[row])):
            expected = np.rot90(kept, o % 4)
            np.testing.assert_array_equal(got, np.fliplr(expected) if o >= 4 else expected)


def test_an_online_epoch_sees_every_orientation_of_every_pair_once(tiny_patches: Path) -> None:
    _, label = stored(tiny_patches)
    patches = Patches(tiny_patches, turns=8)
    order = ShuffledBatches(len(patches), 8, seed=3).epoch_order(0)
    _, y, o = (torch.from_numpy(part) for part in patches[order])
    seen = Counter(z.tobytes() for z in turned(y, o).numpy())
    expected = Counter(
        np.ascontiguousarray(z).tobytes()
        for y in label
        for k in range(4)
        for z in (np.rot90(y, k), np.rot90(y, k)[:, ::-1])
    )
    assert seen == expected


def test_reading_through_two_workers_equals_reading_directly(tiny_patches: Path) -> None:
    patches = Patches(tiny_patches, turns=8)
    patches[np.arange(3)]  # the parent's own handle is open before the workers start
    batches = ShuffledBatches(len(patches), 16, seed=5, steps=30, micro=2)
    loader = pair_loader(patches, batches, 2)
    count = 0
    for batch, indices in zip(loader, batches, strict=True):
        for part, expected in zip(batch, patches[indices], strict=True):
            np.testing.assert_array_equal(part, expected)
        count += 1
    assert count == 60


def test_patches_pickle_without_their_handle(tiny_patches: Path) -> None:
    patches = Patches(tiny_patches)
    first = patches[np.arange(5)]
    again = pickle.loads(pickle.dumps(patches))[np.arange(5)]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("how", ["in place", "replaced", "longer", "touched"])
def test_a_file_that_is_changed_in_use_is_noticed(how: str, tiny_patches: Path, tmp_path: Path) -> None:
    path = tmp_path / "patches.h5"
    shutil.copy(tiny_patches, path)
    patches = Patches(path)
    patches[np.arange(4)]
    patches.check_unchanged()
    if how == "replaced":
        shutil.copy2(path, tmp_path / "other")
        (tmp_path / "other").rename(path)
    elif how == "touched":
        os.utime(path, (1, 1))
    else:
        with path.open("r+b") as file:
            file.seek(0 if how == "longer" else -5, os.SEEK_END)
            file.write(b"other")
    with pytest.raises(UserError, match=r"patches\.h5 was changed while it was in use"):
        pickle.loads(pickle.dumps(patches)).check_unchanged()
    path.unlink()
    patches.check_unchanged()  # whoever has it open reads on


# ---------------------------------------------------------------------- order


@pytest.mark.parametrize(("length", "batch"), [(1000, 8), (997, 16), (16, 16), (5, 2), (1, 1)])
def test_an_epoch_holds_every_index_once(length: int, batch: int) -> None:
    batches = ShuffledBatches(length, batch, seed=1)
    for epoch in range(3):
        assert sorted(batches.epoch_order(epoch).tolist()) == list(range(length))
    used = np.concatenate(list(batches))
    assert len(used) == length // batch * batch
    assert len(set(used.tolist())) == len(used)


def test_the_order_is_fixed_by_seed_and_epoch_and_differs_between_them() -> None:
    orders = {
        (seed, epoch): ShuffledBatches(5000, 16, seed).epoch_order(epoch) for seed in (1, 2) for epoch in (0, 1)
    }
    for (seed, epoch), order in orders.items():
        np.testing.assert_array_equal(order, ShuffledBatches(5000, 16, seed).epoch_order(epoch))
        np.testing.assert_array_equal(order, ShuffledBatches(5000, 100, seed, steps=7).epoch_order(epoch))
        assert (order == np.arange(5000)).mean() < 0.05
    for a, b in itertools.combinations(orders.values(), 2):
        assert (a == b).mean() < 0.05


def test_a_batch_mixes_places_far_apart() -> None:
    for indices in itertools.islice(ShuffledBatches(100_000, 128, seed=1), 20):
        assert len(np.unique(indices // 16)) >= 8


def test_every_epoch_of_a_run_is_shuffled_afresh() -> None:
    """53 pairs in batches of 10: an epoch is five steps, and leaves out three pairs, other ones each time."""
    steps = list(ShuffledBatches(53, 10, seed=4, steps=20))
    assert len(steps) == 20
    epochs = [np.concatenate(steps[5 * e : 5 * e + 5]) for e in range(4)]
    left_out = []
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 50
        left_out.append(frozenset(range(53)) - set(epoch.tolist()))
    assert len({epoch.tobytes() for epoch in epochs}) == 4
    assert len(set(left_out)) > 1


@pytest.mark.parametrize("start", [0, 1, 4, 5, 7, 19, 20])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_run_is_resumed_exactly_where_it_was(start: int, micro: int) -> None:
    whole = list(ShuffledBatches(53, 10, seed=4, steps=20, micro=micro))
    rest = list(ShuffledBatches(53, 10, seed=4, steps=20, micro=micro, start=start))
    assert len(rest) == (20 - start) * micro
    for a, b in zip(rest, whole[start * micro :], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("micro", "world"), [(1, 2), (2, 1), (2, 3), (4, 2)])
def test_processes_and_micro_batches_partition_every_batch(micro: int, world: int) -> None:
    whole = list(ShuffledBatches(200, 24, seed=9, steps=12))
    shares = [
        list(ShuffledBatches(200, 24, seed=9, steps=12, micro=micro, rank=rank, world=world)) for rank in range(world)
    ]
    for share in shares:
        assert len(share) == len(ShuffledBatches(200, 24, seed=9, steps=12, micro=micro, world=world)) == 12 * micro
        assert {len(indices) for indices in share} == {24 // micro // world}
    for step, batch in enumerate(whole):
        parts = [share[step * micro + m] for share in shares for m in range(micro)]
        assert sorted(np.concatenate(parts).tolist()) == sorted(batch.tolist())


def test_batches_that_cannot_be_made_are_refused_by_key() -> None:
    with pytest.raises(UserError, match=r"data\.batch_size = 11.*10 pairs"):
        ShuffledBatches(10, 11, seed=0)
    data = DataConfig(batch_size=8)
    with pytest.raises(UserError, match=r"data\.batch_size = 8.*3 micro-batches × 1"):
        data.share(3)
    with pytest.raises(UserError, match=r"data\.batch_size = 8.*2 micro-batches × 3"):
        data.share(2, 3)
    assert data.share(2, 2) == 2
