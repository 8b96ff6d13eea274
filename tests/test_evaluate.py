"""src/evaluate.py: each image is scored once, resumed, with its protocol; scores equal those computed by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import drrn.evaluation as evaluate
from conftest import TINY
from drrn.config import ModelConfig
from drrn.matlab import imresize
from drrn.model import DRRN
from drrn.weights.ours import save_weights

MODEL = vars(ModelConfig(1, 1, 4, "batch", True, True, True))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of a small network with nontrivial BatchNorm statistics."""
    torch.manual_seed(0)
    network = DRRN(1, 1, 4)
    network.train()
    network(torch.rand(4, 1, 12, 12))
    with torch.no_grad():
        network.conv_rec.weight.mul_(0.05)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(path, network, MODEL, {"scales": [2, 3, 4], "origin": "small s3", "seed": 3, "steps": 7})
    return path


def test_bicubic_by_hand(entry_point: Callable, tiny_images: Path, tmp_path: Path) -> None:
    """The grey crop's PSNR from imresize, NumPy's rounding and scikit-image alone."""
    output = tmp_path / "scores.json"
    code, out, err = entry_point(
        "evaluate", "method=bicubic", f"sets=[{tiny_images}]", "scales=[3]", f"output={output}"
    )
    assert code == 0, err
    assert "tiny" in out
    content = json.loads(output.read_text())
    rows = {row["image"]: row for row in content["scores"]}
    assert set(rows) == {"camera.png", "chelsea.png"}
    y = np.asarray(Image.open(tiny_images / "camera.png"))[:63, :54] / 255.0
    bicubic = np.floor(np.clip(imresize(imresize(y, 1 / 3), 3), 0, 1) * 255 + 0.5)
    truth = np.round(y * 255)
    expected = peak_signal_noise_ratio(truth[3:-3, 3:-3], bicubic[3:-3, 3:-3], data_range=255)
    assert rows["camera.png"]["psnr"] == pytest.approx(expected, abs=1e-9)
    assert content["protocol"] == {"name": "paper", "version": 1, "crop": None, "color": "y", "rounding": "uint8"}
    (mean,) = content["means"]
    assert mean["images"] == 2
    assert mean["psnr"] == pytest.approx(sum(row["psnr"] for row in rows.values()) / 2)


def test_network_and_resume(entry_point: Callable, tiny_images: Path, weights: Path, tmp_path: Path) -> None:
    """A network's score is that of its plain forward; a second call computes only new scores."""
    output = tmp_path / "scores.json"
    arguments = ("evaluate", f"checkpoint={weights}", f"sets=[{tiny_images}]", f"output={output}")
    code, out, err = entry_point(*arguments, "scales=[2]")
    assert code == 0, err
    assert "2 of 2 scores computed" in out
    content = json.loads(output.read_text())
    assert content["methods"][0]["structure"] == "DRRN_B1U1_4f"
    assert (content["methods"][0]["seed"], content["methods"][0]["steps"]) == (3, 7)

    from drrn.images import read_luminance
    from drrn.protocol import prepare, score
    from drrn.weights.ours import load_network

    network, _ = load_network(weights)
    for row in content["scores"]:
        x, truth = prepare(read_luminance(tiny_images / row["image"]), 2)
        with torch.inference_mode():
            prediction = network(torch.from_numpy(x).float()[None, None])[0, 0].numpy()
        assert row["psnr"] == pytest.approx(score(prediction, truth, 2)["psnr"], abs=2e-3)
        assert row["psnr"] != pytest.approx(score(x, truth, 2)["psnr"], abs=0.05)  # it did something

    # The first scores are marked: they must come back untouched, next to the new scale's.
    for row in content["scores"]:
        row["seconds"] = 12345
    output.write_text(json.dumps(content))
    code, out, err = entry_point(*arguments, "scales=[2,3]", "workers=2")
    assert code == 0, err
    assert "2 of 4 scores computed, 2 were there already" in out
    rows = json.loads(output.read_text())["scores"]
    assert sorted((r["image"], r["scale"], r["seconds"] == 12345) for r in rows) == [
        ("camera.png", 2, True),
        ("camera.png", 3, False),
        ("chelsea.png", 2, True),
        ("chelsea.png", 3, False),
    ]

    code, _, err = entry_point(*arguments, "scales=[2]", "precision=bf16")
    assert code == 2
    assert "do not compare" in err
    other = tmp_path / "bf16.json"
    code, out, err = entry_point(*arguments[:-1], f"output={other}", "scales=[2]", "precision=bf16")
    assert code == 0, err
    assert "precision=bf16" in out
    first = {row["image"]: row["psnr"] for row in content["scores"]}
    for row in json.loads(other.read_text())["scores"]:
        assert 0 < abs(row["psnr"] - first[row["image"]]) < 0.05

    # Another metric for existing scores is computed, and the old values stay equal.
    before = {(r["image"], r["scale"]): r["psnr"] for r in rows}
    code, out, _ = entry_point(*arguments, "scales=[2]", "metrics=[psnr]", "workers=1")
    assert code == 0
    assert "0 of 2 scores computed" in out
    assert {(r["image"], r["scale"]): r["psnr"] for r in json.loads(output.read_text())["scores"]} == before


def test_protocols_do_not_mix(entry_point: Callable, tiny_images: Path, tmp_path: Path) -> None:
    """Another protocol is recorded; it neither resumes into a file of the first nor shares a table with it."""
    paper, other = tmp_path / "paper.json", tmp_path / "float.json"
    common = ("evaluate", "method=bicubic", f"sets=[{tiny_images}]", "scales=[2]", "metrics=[psnr]")
    assert entry_point(*common, f"output={paper}")[0] == 0
    code, out, err = entry_point(*common, f"output={other}", "rounding=float", "color=y", "crop=5")
    assert code == 0, err
    assert "rounding=float" in out
    assert "crop=5" in out
    code, _, err = entry_point(*common, f"output={paper}", "rounding=float")
    assert code == 2
    assert "do not compare" in err
    a, b = (json.loads(p.read_text())["scores"] for p in (paper, other))
    assert all(x["psnr"] != y["psnr"] for x, y in zip(a, b, strict=True))
    code, _, err = entry_point("report", f"scores=[{paper},{other}]", f"output={tmp_path / 'report'}")
    assert code == 2
    assert str(paper) in err
    assert str(other) in err


def test_rgb_psnr(entry_point: Callable, tmp_path: Path) -> None:
    """color=rgb of a grey picture stored as RGB is the error of Y, scaled by ycbcr2rgb's factor."""
    folder = tmp_path / "colour"
    folder.mkdir()
    import skimage.data

    rgb = skimage.data.coffee()[100:160, 200:260]
    Image.fromarray(rgb).save(folder / "coffee.png")
    output = tmp_path / "rgb.json"
    code, _, err = entry_point(
        "evaluate", "method=bicubic", f"sets=[{folder}]", "scales=[2]", "color=rgb", f"output={output}"
    )
    assert code == 0, err
    (row,) = json.loads(output.read_text())["scores"]
    # Bicubic of each channel by itself is nearly the same picture: linear transforms commute with resizing.
    z = rgb / 255.0
    direct = np.floor(np.clip(imresize(imresize(z, 0.5), 2), 0, 1) * 255 + 0.5)
    expected = peak_signal_noise_ratio(rgb[2:-2, 2:-2].astype(float), direct[2:-2, 2:-2], data_range=255)
    assert row["psnr"] == pytest.approx(expected, abs=0.1)


def test_refusals(entry_point: Callable, tiny_images: Path, weights: Path, tmp_path: Path) -> None:
    """Wrong values are named, exit code 2."""
    for arguments, named in (
        (("method=magic",), "method"),
        (("method=network", "checkpoint=NO_SUCH"), "checkpoint"),
        (("checkpoint=nowhere.ckpt",), "nowhere.ckpt"),
        (("method=bicubic", "scales=[1]"), "scales"),
        (("method=bicubic", "metrics=[lpips]"), "lpips"),
        (("method=bicubic", "workers=0"), "workers"),
        (("method=bicubic", "nonsense=1"), "nonsense"),
        (("method=bicubic", "sets=[Nowhere]", f"output={tmp_path / 'x.json'}"), "Nowhere"),
    ):
        code, _, err = entry_point("evaluate", *arguments)
        assert code == 2, arguments
        assert named in err
        assert "Traceback" not in err
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    code, _, err = entry_point("evaluate", "method=bicubic", f"sets=[{tiny_images}]", f"output={broken}")
    assert code == 2
    assert str(broken) in err
    assert broken.read_text() == "{"


def test_check_protocol(entry_point: Callable, drrn_data: Path, tiny_images: Path, tmp_path: Path) -> None:
    """The self-check passes on the real Set5, and fails on other images."""
    arguments = ("evaluate", "method=bicubic", f"sets=[{tiny_images}]", "scales=[2]", "check_protocol=true")
    code, _, err = entry_point(*arguments, f"output={tmp_path / 'a.json'}", f"root={drrn_data}")
    assert code == 0, err
    assert "agrees with Table 2" in err
    import drrn.protocol

    def other_bicubic(image: np.ndarray, scale: float) -> np.ndarray:
        """Pillow's bicubic, which the common ports use: another kernel width and rounding of sizes."""
        size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
        return np.asarray(Image.fromarray(np.float32(image * 255).round().astype(np.uint8)).resize(size, 3)) / 255

    patch = pytest.MonkeyPatch()
    patch.setattr(drrn.protocol, "imresize", other_bicubic)
    try:
        code, _, err = entry_point(*arguments, f"output={tmp_path / 'b.json'}", f"root={drrn_data}")
    finally:
        patch.undo()
    assert code == 2
    assert "the protocol is broken here" in err
    assert not (tmp_path / "b.json").exists()


def test_pictures_of_images_scored_before(entry_point: Callable, tiny_images: Path, tmp_path: Path) -> None:
    """`images=` on a second call writes the missing pictures, and they are those that were scored."""
    arguments = (
        "evaluate",
        "method=bicubic",
        f"sets=[{tiny_images}]",
        "scales=[3]",
        f"output={tmp_path / 's.json'}",
    )
    assert entry_point(*arguments)[0] == 0
    code, _, err = entry_point(*arguments, f"images={tmp_path / 'pictures'}")
    assert code == 0, err
    written = sorted((tmp_path / "pictures" / "tiny").iterdir())
    assert [path.name for path in written] == ["camera_x3_bicubic.png", "chelsea_x3_bicubic.png"]
    truth = np.asarray(Image.open(tiny_images / "camera.png"))[:63, :54]
    shown = np.asarray(Image.open(written[0]))
    expected = peak_signal_noise_ratio(truth[3:-3, 3:-3], shown[3:-3, 3:-3], data_range=255)
    rows = {row["image"]: row for row in json.loads((tmp_path / "s.json").read_text())["scores"]}
    assert rows["camera.png"]["psnr"] == pytest.approx(expected, abs=1e-9)


def scored(entry_point: Callable, output: Path, *arguments: str) -> tuple[dict, str]:
    """The file of scores after a call, and the call's output."""
    code, out, err = entry_point("evaluate", f"output={output}", "metrics=[psnr]", *arguments)
    assert code == 0, err
    return json.loads(output.read_text()), out + err


def test_two_folders_of_one_name_are_two_sets(entry_point: Callable, tiny_images: Path, tmp_path: Path) -> None:
    """A row belongs to the contents of a set: neither folder's means hold the other's images."""
    for name, image in (("A", "camera.png"), ("B", "chelsea.png")):
        (tmp_path / name / "val").mkdir(parents=True)
        shutil.copy(tiny_images / image, tmp_path / name / "val")
    common = ("method=bicubic", "scales=[2]")
    scored(entry_point, tmp_path / "s.json", *common, f"sets=[{tmp_path}/A/val]")
    content, said = scored(entry_point, tmp_path / "s.json", *common, f"sets=[{tmp_path}/B/val]")
    assert {(row["set"], row["image"]) for row in content["scores"]} == {
        ("val", "camera.png"),
        ("B/val", "chelsea.png"),
    }
    assert {(row["set"], row["images"]) for row in content["means"]} == {("val", 1), ("B/val", 1)}
    assert "B/val" in said
    again, said = scored(entry_point, tmp_path / "s.json", *common, f"sets=[{tmp_path}/A/val]")
    assert "0 of 1 scores computed" in said
    assert again["scores"] == content["scores"]
    shutil.copytree(tmp_path / "A", tmp_path / "elsewhere")  # the same set in another place
    _, said = scored(entry_point, tmp_path / "s.json", *common, f"sets=[{tmp_path}/elsewhere/val]")
    assert "0 of 1 scores computed" in said


@pytest.mark.parametrize("earlier", [False, True], ids=["", "file of an earlier version"])
def test_an_image_that_left_a_folder_leaves_its_means(
    earlier: bool, entry_point: Callable, tiny_images: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_images, tmp_path / "val")
    arguments = ("method=bicubic", "scales=[2]", f"sets=[{tmp_path}/val,demo_test]")
    output = tmp_path / "s.json"
    content, _ = scored(entry_point, output, *arguments)
    if earlier:
        del content["sets"]
        output.write_text(json.dumps(content))
    (tmp_path / "val/camera.png").unlink()
    shutil.copy(tiny_images / "chelsea.png", tmp_path / "val/again.png")
    content, said = scored(entry_point, output, *arguments)
    assert "1 scores removed" in said
    assert "1 of 5 scores computed" in said
    assert sorted(row["image"] for row in content["scores"] if row["set"] == "val") == ["again.png", "chelsea.png"]
    means = {row["set"]: row for row in content["means"]}
    assert (means["val"]["images"], means["demo_test"]["images"]) == (2, 3)
    assert f"{means['val']['psnr']:.2f}" in said


def test_images_of_one_stem_are_two_pictures(entry_point: Callable, tiny_images: Path, tmp_path: Path) -> None:
    (tmp_path / "imgs[hr]").mkdir()
    with Image.open(tiny_images / "camera.png") as image:
        image.save(tmp_path / "imgs[hr]/a.png")
        image.rotate(90, expand=True).save(tmp_path / "imgs[hr]/A.jpg")
    arguments = ("method=bicubic", "scales=[2]", f"sets=['{tmp_path}/imgs[hr]']", f"images={tmp_path}/pictures")
    _, said = scored(entry_point, tmp_path / "s.json", *arguments)
    assert [line for line in said.splitlines() if "│" in line and line.split("│")[1].strip() == "imgs[hr]"]
    pictures = {path.name: Image.open(path).size for path in (tmp_path / "pictures/imgs[hr]").iterdir()}
    assert pictures == {"a.png_x2_bicubic.png": (54, 64), "A.jpg_x2_bicubic.png": (64, 54)}


def test_the_present_folder_is_called_by_its_name(
    entry_point: Callable, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_images)
    content, said = scored(entry_point, tmp_path / "s.json", "method=bicubic", "scales=[2]", "sets=[.]")
    assert {row["set"] for row in content["scores"]} == {"tiny"}
    assert "tiny" in said


@pytest.mark.parametrize("where", ["a folder", "under a file", "long", "pipe"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    where: str, entry_point: Callable, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    output = {"a folder": ".", "under a file": "file/s.json", "long": "x" * 300, "pipe": "pipe"}[where]
    monkeypatch.setattr(evaluate, "score_image", lambda *_: pytest.fail("too late"))
    for key, other in (("output", f"images={tmp_path}/p"), ("images", f"output={tmp_path}/s.json")):
        if (key, where) == ("images", "a folder"):
            continue
        code, out, err = entry_point(
            "evaluate", "method=bicubic", f"sets=[{tiny_images}]", f"{key}={tmp_path / output}", other
        )
        assert code == 2, err
        assert key in err
        assert "Traceback" not in out + err
    assert {path.name for path in tmp_path.iterdir()} == {"file", "pipe"}


def test_names_that_are_not_utf8_are_refused_before_the_work(
    entry_point: Callable, tiny_images: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_images, tmp_path / "val")
    (tmp_path / "val/camera.png").rename(tmp_path / "val/caf\udce9.png")
    data = (f"data.train=[{tmp_path}/val]", f"data.val=[{tmp_path}/val]", f"data.patches={tmp_path}/patches")
    for arguments in (
        ("evaluate", "method=bicubic", f"sets=[{tmp_path}/val]", f"output={tmp_path}/s.json"),
        ("prepare", *data),
        ("train", *TINY, *data, f"output={tmp_path}/runs"),
    ):
        code, out, err = entry_point(*arguments)
        assert code == 2, err
        assert r"caf\xe9.png: the name has control codes or bytes that are not UTF-8" in err
        assert "Traceback" not in out + err
    assert not (tmp_path / "s.json").exists()
    assert not (tmp_path / "patches").exists()


def test_what_another_program_made_is_scored_by_the_same_protocol(
    entry_point: Callable, tiny_images: Path, tmp_path: Path
) -> None:
    """Our own pictures, given back as another program's, have our scores; a changed one is scored again."""
    common = (f"sets=[{tiny_images}]", "scales=[2,3]")
    ours, _ = scored(entry_point, tmp_path / "a.json", *common, "method=bicubic", f"images={tmp_path}/made")
    other = ("method=images", f"folder={tmp_path}/made")
    theirs, said = scored(entry_point, tmp_path / "b.json", *common, *other)
    assert "made" in said

    def values(content: dict) -> dict:
        return {(row["image"], row["scale"]): row["psnr"] for row in content["scores"]}

    assert values(theirs) == values(ours)
    truth = np.asarray(Image.open(tiny_images / "camera.png"))
    Image.fromarray(truth).save(tmp_path / "made/tiny/camera_x3_bicubic.png")  # not cropped, and perfect
    theirs, _ = scored(entry_point, tmp_path / "b.json", *common, *other)
    assert values(theirs)["camera.png", 3] == np.inf
    assert len(theirs["scores"]) == 4
    Image.fromarray(truth[:-9]).save(tmp_path / "made/tiny/camera_x3_bicubic.png")
    for wrong in ("another size", "gone"):
        code, _, err = entry_point("evaluate", *common, *other, f"output={tmp_path}/b.json")
        assert code == 2
        assert ("camera_x3_bicubic.png is 55×55" if wrong == "another size" else "holds no camera_x3.png") in err
        (tmp_path / "made/tiny/camera_x3_bicubic.png").unlink(missing_ok=True)
    code, _, err = entry_point("evaluate", *common, "method=images")
    assert (code, "folder" in err) == (2, True)


SCORING = """
import time
from pathlib import Path
from types import SimpleNamespace
import drrn.evaluation as evaluate

evaluate.read_pixels = lambda path: time.sleep(600)
if __name__ == "__main__":
    jobs = [evaluate.ImageJob(evaluate.Method("bicubic", "Bicubic"), "set", 2, Path("image.png"), "", None, None)] * 2
    config = SimpleNamespace(checkpoint=[], metrics=["psnr"], workers=2)
    list(evaluate.score_all(jobs, config, None))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_a_killed_evaluation_leaves_no_workers(tmp_path: Path) -> None:
    """Else they would wait for work forever, each with a network in memory. Here they wait for an endless image."""
    (tmp_path / "scoring.py").write_text(SCORING)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "scoring.py"],
        env={**os.environ, "PYTHONPATH": str(Path(evaluate.__file__).parents[1])},
    )
    try:
        workers: list[str] = []
        deadline = time.monotonic() + 60
        while len(workers) < 3 and time.monotonic() < deadline:  # with Python's resource tracker
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert process.poll() is None
            time.sleep(0.05)
        assert len(workers) == 3
    finally:
        process.kill()
        process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
