"""Users' files through every entry point: odd and hostile images, pickles that would run code; and disks that fill up
while a file is written."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image

import drrn.weights.export
from conftest import TINY
from drrn.config import ModelConfig
from drrn.disk import write_whole
from drrn.errors import UserError
from drrn.model import DRRN
from drrn.patch_build import pair_count, prepare_patches
from drrn.patches import Recipe
from drrn.photos.read import Photo, read_photo
from drrn.photos.write import write_photo
from drrn.sets import check_size
from drrn.weights.ours import save_weights

# ---------------------------------------------------------------------- images


def images(folder: Path) -> None:
    """One file for each kind of odd image."""
    folder.mkdir()
    rgb = skimage.data.chelsea()[90:154, 120:190]
    deep = rgb.astype(np.uint16) * 257
    image = Image.fromarray(rgb)
    image.save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not an image\n" * 20)
    image.save(folder / "really_jpeg.png", "JPEG")
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = whole[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    (folder / "bomb.png").write_bytes(bomb)
    image.crop((0, 0, 1, 1)).save(folder / "pixel.png")
    image.resize((10_000, 1)).save(folder / "line.png")
    Image.fromarray(deep[..., 0]).save(folder / "deep_grey.png")
    write_photo(folder / "deep.png", iter([deep]), deep.shape, deep.dtype, Photo(deep))
    tifffile.imwrite(folder / "float.tif", rgb[..., 0].astype(np.float32) / 255)
    tifffile.imwrite(folder / "nan.tif", np.where(rgb[..., 0] < 90, np.nan, 0.5).astype(np.float32))
    image.quantize(32).save(folder / "palette.png", transparency=bytes(range(32)))
    image.convert("CMYK").save(folder / "cmyk.jpg")


SMALL = ("pixel.png", "line.png")  # sound, but no patch and no SSIM window fits
FINE = ("good.png", "really_jpeg.png")
# What an 8-bit benchmark cannot be, but a photograph can.
PHOTOS = ("deep_grey.png", "deep.png", "float.tif", "palette.png", "cmyk.jpg")
BAD = ("empty.png", "cut.png", "text.png", "bomb.png", "nan.tif")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "images"
    images(folder)
    assert {path.name for path in folder.iterdir()} == {*SMALL, *FINE, *PHOTOS, *BAD}
    return folder


@pytest.mark.parametrize("name", [*SMALL, *FINE, *PHOTOS, *BAD])
def test_an_odd_image_among_training_images(name: str, odd: Path, tmp_path: Path, inline_pool: None) -> None:
    """It gives its pairs, or none if it is smaller than a patch, or is refused by name before any are stored."""
    folder, recipe = tmp_path / "set", Recipe((str(tmp_path / "set"),), scales=(2,))
    folder.mkdir()
    shutil.copy(odd / "good.png", folder / "a.png")
    shutil.copy(odd / name, folder / name)
    built = tmp_path / "patches"
    if name in (*PHOTOS, *BAD):
        with pytest.raises(UserError) as refusal:
            prepare_patches("odd", recipe, Path(), built, workers=1)
        assert str(folder / name) in str(refusal.value)
        assert [path.suffix for path in built.iterdir()] in ([], [".lock"])
    else:
        import h5py

        with h5py.File(prepare_patches("odd", recipe, Path(), built, workers=1)) as file:
            assert len(file["data"]) == pair_count(64, 70, recipe) * (1 if name in SMALL else 2)


@pytest.mark.parametrize("name", [*SMALL, *PHOTOS, *BAD])
def test_an_odd_image_to_be_scored(name: str, odd: Path, tmp_path: Path, entry_point: Callable) -> None:
    """Refused by name by evaluate and report, and by train before it trains if the header shows the fault."""
    folder = tmp_path / "set"
    folder.mkdir()
    shutil.copy(odd / name, folder / name)
    for arguments in (
        ("evaluate", "method=bicubic", f"sets=[{folder}]", "scales=[2]", f"output={tmp_path / 'scores.json'}"),
        ("report", f"compare={folder / name}", "scale=2", f"output={tmp_path / 'report'}"),
    ):
        code, out, err = entry_point(*arguments)
        assert code == 2, (arguments, err)
        assert name in err
        assert "Traceback" not in out + err
    assert not (tmp_path / "report").exists()
    if name in (*SMALL, "empty.png", "text.png", "bomb.png"):
        with pytest.raises(UserError, match=name):
            check_size(folder / name, 2)


def test_odd_images_to_be_enlarged(odd: Path, tmp_path: Path, entry_point: Callable) -> None:
    """Pictures are enlarged, other files are named, and none stops the others."""
    code, out, err = entry_point("upscale", f"input={odd}", f"output={tmp_path}", "scale=2", "method=bicubic")
    assert code == 1
    assert "Traceback" not in out + err
    assert {path.name for path in tmp_path.iterdir()} == {*SMALL, *FINE, *PHOTOS}
    for name in BAD:
        assert str(odd / name) in err
    for name in (*SMALL, *FINE, *PHOTOS):
        before, after = (read_photo(folder / name).pixels for folder in (odd, tmp_path))
        assert after.shape == (2 * before.shape[0], 2 * before.shape[1], before.shape[2])
        assert after.dtype == before.dtype


# ---------------------------------------------------------------------- pickles that would run code


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.proof),))


@pytest.fixture(params=["zip", "legacy", "pickle", "deep inside"])
def evil(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """(file, the path that unpickling it would create)."""
    path, proof = tmp_path / "evil.ckpt", tmp_path / "executed"
    content: object = Evil(proof)
    if request.param == "deep inside":  # a checkpoint of ours otherwise
        model = vars(ModelConfig(B=1, U=1, features=2, norm="none", bias=True, weight_sharing=True, multi_path=True))
        state = {f"network.{name}": tensor for name, tensor in DRRN(1, 1, 2, "none").state_dict().items()}
        content = {
            "pytorch-lightning_version": "2.6.4", "epoch": 0, "global_step": 1, "state_dict": state,
            "hyper_parameters": {"model": model, "more": content},
        }  # fmt: skip
    if request.param == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=request.param != "legacy")
    return path, proof


def test_no_entry_point_runs_what_a_file_says(
    evil: tuple[Path, Path], tiny_images: Path, tmp_path: Path, entry_point: Callable
) -> None:
    path, proof = evil
    harmless = (*TINY, f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", f"output={tmp_path / 'runs'}")
    image = tiny_images / "camera.png"
    for arguments in (
        ("train", *harmless, f"init_from={path}"),
        ("train", *harmless, "model.U=1", f"init_from={path}"),
        ("train", *harmless, f"ckpt_path={path}"),
        ("evaluate", f"checkpoint={path}", f"sets=[{tiny_images}]", f"output={tmp_path / 'scores.json'}"),
        ("upscale", f"input={image}", f"output={tmp_path / 'big.png'}", "scale=2", f"checkpoint={path}"),
        ("convert", f"input={path}", "info=true"),
        ("convert", f"input={path}", f"output={tmp_path / 'ours.safetensors'}"),
        ("report", f"compare={image}", f"checkpoint=[{path}]", f"output={tmp_path / 'report'}"),
    ):
        code, _, err = entry_point(*arguments)
        assert code == 2, (arguments, err)
        assert path.name in err
        assert not proof.exists(), arguments
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists()  # the test's file does run code


# ---------------------------------------------------------------------- disks that fill up


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: its writes fail half-way, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    model = vars(ModelConfig(B=1, U=1, features=8, norm="none", bias=True, weight_sharing=True, multi_path=True))
    save_weights(path, DRRN(1, 1, 8, "none"), model, {"scales": [2]})
    return path


def writers(weights: Path, images: Path, out: Path) -> dict[str, tuple[tuple[str, ...], list[str]]]:
    """Name → (command, the files that it writes)."""
    scoring = ("evaluate", "method=bicubic", f"sets=[{images}]", "scales=[2]")
    found = {
        f"convert to {name}": (("convert", f"input={weights}", f"output={out / name}", "overwrite=true"), [name])
        for name in ("w.safetensors", "w.onnx", "w.pt2")
    }
    found["scores"] = ((*scoring, f"output={out / 'scores.json'}"), ["scores.json"])
    found["pictures of the evaluation"] = (
        (*scoring, f"output={out.parent / 'fresh.json'}", f"images={out}"),
        [f"{images.name}/{name}_x2_bicubic.png" for name in ("camera", "chelsea")],
    )
    found["tables"] = (
        ("report", f"scores=[{out.parent / 'sound.json'}]", f"output={out}"),
        ["index.html", "table2.md", "table2.csv", "table2.tex"],
    )
    found["figures"] = (
        ("report", f"compare={images / 'camera.png'}", "scale=2", f"output={out}"),
        ["camera_x2.png", "camera_x2.pdf", "camera_x2_narrow.png", "index.html"],
    )
    return found


@pytest.mark.parametrize(
    "what",
    ["convert to w.safetensors", "convert to w.onnx", "convert to w.pt2", "scores",
     "pictures of the evaluation", "tables", "figures"],
)  # fmt: skip
def test_a_full_disk_leaves_the_old_files_and_nothing_else(
    what: str,
    weights: Path,
    tiny_images: Path,
    tmp_path: Path,
    entry_point: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A first time with space, to check the command; then twice without."""
    if what.endswith((".onnx", ".pt2")):
        if not os.environ.get("DRRN_SLOW"):
            pytest.skip("exports three times: DRRN_SLOW=1")
        pytest.importorskip("onnxscript")
    out = tmp_path / "out"
    if what == "tables":
        entry_point(
            "evaluate", "method=bicubic", f"sets=[{tiny_images}]", "scales=[2]", f"output={tmp_path / 'sound.json'}"
        )
    (name, *arguments), files = writers(weights, tiny_images, out)[what]
    code, _, err = entry_point(name, *arguments)
    assert code == 0, err
    before = {path: path.read_bytes() for path in out.rglob("*") if path.suffix not in ("", ".lock")}
    assert {path.relative_to(out).as_posix() for path in before} == set(files)
    if what == "pictures of the evaluation":  # a picture that is there is not drawn again
        shutil.rmtree(out)
        before = {}
    if what == "scores":  # another image's scores come to those that are there
        arguments[1] = f"sets=[{tiny_images},demo_test]"
    largest = max(map(len, before.values()), default=1000)
    for room in (0, min(largest // 2, 20_000)):
        if what.endswith((".onnx", ".pt2")):  # exporting needs space itself, so only writing lacks it
            monkeypatch.setattr(
                drrn.weights.export,
                "write_whole",
                lambda path, write, room=room: files_of_at_most(room)(write_whole)(path, write),
            )
            code, stdout, err = entry_point(name, *arguments)
        else:
            with files_of_at_most(room):
                code, stdout, err = entry_point(name, *arguments)
        assert code == 2, err
        assert "could not be written" in err
        assert any(file in err for file in (*files, "fresh.json"))  # the scores beside the pictures
        assert "Traceback" not in stdout + err
        after = {path: path.read_bytes() for path in out.rglob("*") if path.suffix not in ("", ".lock")}
        assert set(after) == set(before)  # no temporary file
        smaller = {path for path in before if len(before[path]) <= room}  # these had room
        assert all(after[path] == content for path, content in before.items() if path not in smaller)


def test_a_full_disk_while_training(tiny_images: Path, tmp_path: Path, entry_point: Callable) -> None:
    """The record has the error, the earlier checkpoint stays, and once there is space the run is resumed."""
    arguments = (*TINY, f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", f"output={tmp_path / 'runs'}",
                 "model.features=64", "model.U=2")  # fmt: skip
    entry_point("prepare", *arguments)  # the patch file has room
    with files_of_at_most(100_000):  # for the record and the log, not for a checkpoint
        code, _, err = entry_point("train", *arguments)
    assert code == 2, err
    assert "could not be written" in err
    left = [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not [name for name in left if name.endswith((".ckpt", ".partial", ".safetensors"))]
    code, _, err = entry_point("train", *arguments)
    assert code == 0, err
