"""`drrn.explain`: other libraries' formulas against those libraries, every protocol against an independent one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio

import drrn.explain
from drrn.errors import UserError
from drrn.evaluation import ImageJob, Method, score_image
from drrn.explain import Way, as_typed, explaining, opencv_resize, plane_of, print_ways, ways_of
from drrn.images import read_pixels
from drrn.matlab import imresize
from drrn.protocol import Protocol
from drrn.weights.ours import load_network

CAT = skimage.data.chelsea()[100:108, 120:126]  # 8×6, RGB
# cv2 5.0.0: resize(CAT, (3, 4), INTER_CUBIC); resize(CAT[..., 0], (9, 12), INTER_CUBIC); cvtColor(RGB2YCrCb)[..., 0]
SHRUNK = [
    [[195, 153, 117], [195, 148, 109], [192, 149, 107]], [[199, 156, 122], [195, 150, 116], [193, 148, 110]],
    [[190, 145, 111], [198, 153, 118], [192, 147, 107]], [[189, 146, 114], [195, 150, 120], [199, 155, 118]],
]  # fmt: skip
ENLARGED = [
    [191, 192, 194, 196, 194, 192, 193, 194, 196], [192, 195, 198, 199, 195, 191, 190, 192, 194],
    [194, 197, 201, 201, 197, 192, 190, 189, 189], [196, 197, 199, 199, 197, 196, 196, 189, 183],
    [200, 199, 198, 196, 195, 196, 199, 193, 187], [200, 199, 197, 195, 193, 193, 197, 196, 194],
    [195, 195, 196, 200, 195, 189, 192, 195, 197], [187, 190, 195, 199, 198, 194, 193, 192, 191],
    [183, 188, 195, 195, 199, 200, 197, 191, 187], [185, 191, 197, 193, 196, 200, 200, 196, 193],
    [186, 189, 192, 193, 195, 198, 200, 199, 197], [187, 186, 187, 194, 195, 195, 199, 200, 198],
]  # fmt: skip
LUMINANCE = [
    [157, 159, 158, 154, 158, 160], [162, 166, 164, 157, 154, 156], [163, 164, 163, 160, 161, 149],
    [166, 164, 160, 158, 162, 157], [158, 160, 165, 155, 156, 160], [149, 158, 162, 164, 160, 152],
    [152, 162, 157, 164, 165, 160], [153, 153, 161, 161, 165, 163],
]  # fmt: skip


def test_opencvs_bicubic_and_luminance_are_opencvs() -> None:
    for found, stored in ((opencv_resize(CAT, (4, 3)), SHRUNK), (opencv_resize(CAT[..., 0], (12, 9)), ENLARGED)):
        off = np.abs(found.astype(int) - stored)
        assert off.max() <= 1
        assert np.count_nonzero(off) <= 1  # OpenCV computes in fixed point
    assert np.array_equal(plane_of(CAT, "opencv") * 255, LUMINANCE)


def test_planes_are_those_of_pillow_and_scikit_image() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert np.array_equal(plane_of(colours, "pillow") * 255, np.asarray(Image.fromarray(colours).convert("L")))
    np.testing.assert_allclose(plane_of(colours, "y float") * 255, rgb2ycbcr(colours)[..., 0], atol=1e-9)
    assert np.array_equal(plane_of(colours[..., 1], "y float") * 255, colours[..., 1])


def job(path: Path, scale: int = 2, checkpoint: Path | None = None, made: Path | None = None) -> ImageJob:
    method = Method("network" if checkpoint else "bicubic", "Bicubic", checkpoint=checkpoint)
    return ImageJob(method, "tiny", scale, path, "", None, made)


@pytest.mark.parametrize("image", ["chelsea.png", "camera.png"])
@pytest.mark.parametrize("metric", ["psnr", "ssim"])
def test_the_protocol_and_its_own_departures_are_what_evaluate_measures(
    metric: str, image: str, tiny_images: Path
) -> None:
    one = job(tiny_images / image)
    ways = ways_of(one, metric)
    first = next(iter(ways))
    assert first == Way("matlab", "y", 2, "uint8", "one channel")
    for way, protocol in (
        (first, Protocol()),
        (first._replace(crop=0), Protocol(crop=0)),
        (first._replace(crop=8, values="clipped"), Protocol(crop=8, rounding="float")),
        (first._replace(plane="rgb"), Protocol(color="rgb")),
    ):
        if metric == "ssim" and way.plane == "rgb":
            continue  # evaluate's is of Y
        assert ways[way] == pytest.approx(score_image(one, (metric,), protocol)[metric], abs=1e-9), way


def test_a_grey_image_read_as_rgb_gains_the_range_of_its_y(tiny_images: Path) -> None:
    ways = ways_of(job(tiny_images / "camera.png"), "psnr")
    as_it_is = Way("matlab", "y float", 2, "float", "one channel")
    gain = ways[as_it_is._replace(grey="three channels")] - ways[as_it_is]
    assert gain == pytest.approx(20 * np.log10(255 / 219), abs=1e-6)  # 16…235 instead of 0…255


def test_pillows_bicubic_by_pillow(tiny_images: Path) -> None:
    with Image.open(tiny_images / "chelsea.png") as image:
        truth = image.crop((0, 0, 90, 75))  # 75×91 cropped to a multiple of 3
    small = truth.resize((30, 25), Image.Resampling.BICUBIC)
    back = np.asarray(small.resize((90, 75), Image.Resampling.BICUBIC))
    expected = peak_signal_noise_ratio(np.asarray(truth)[3:-3, 3:-3], back[3:-3, 3:-3], data_range=255)
    ways = ways_of(job(tiny_images / "chelsea.png", 3), "psnr")
    assert ways[Way("pillow", "rgb", 3, "uint8", "one channel")] == pytest.approx(expected, abs=1e-9)


def test_a_ports_number_of_unrounded_luminance_is_explained(
    drrn_data: Path, entry_point: Callable, tmp_path: Path
) -> None:
    """Published SRCNN weights, measured as ports do: scikit-image's Y, without rounding. That adds 0.06 dB."""
    folder = os.environ.get("DRRN_WEIGHTS")
    if not folder or not (Path(folder) / "srcnn_Y_scale2.pth").is_file():
        pytest.skip("set DRRN_WEIGHTS to the folder that holds srcnn_Y_scale2.pth")
    weights, image = tmp_path / "srcnn.safetensors", tmp_path / "baby.png"
    pixels = read_pixels(drrn_data / "Set5" / "baby.bmp")[200:300, 200:300]
    Image.fromarray(pixels).save(image)
    assert entry_point("convert", f"input={folder}/srcnn_Y_scale2.pth", f"output={weights}")[0] == 0
    truth = rgb2ycbcr(pixels)[..., 0] / 255
    x = torch.from_numpy(imresize(imresize(truth, 0.5), 2)).float()
    with torch.inference_mode():
        y = load_network(weights)[0](x[None, None])[0, 0].numpy()
    claimed = peak_signal_noise_ratio(truth[2:-2, 2:-2], y[2:-2, 2:-2].astype(float), data_range=1)
    ways = ways_of(job(image, checkpoint=weights), "psnr")
    protocol = next(iter(ways))
    found = explaining(ways, f"{claimed:.2f}")
    assert protocol not in found
    assert protocol._replace(plane="y float", values="float") in found
    assert claimed - ways[protocol] > 0.04


# A port's file, what else convert.py is told, a scale, what the port's README prints for Set5, what the protocol
# gives, and how the explanation departs from the protocol.
KNOWN = {
    "srcnn_Y_scale3.pth": ((), 3, "32.54", "32.58", {"crop": 0, "values": "clipped"}),  # thangvubk/SRCNN_Pytorch
    "model_epoch_28.pth": (("U=25",), 2, "37.69", "37.62", {"values": "clipped"}),  # jt827859032/DRRN-pytorch
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_numbers_of_ports_on_all_of_set5(
    name: str, drrn_data: Path, entry_point: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = os.environ.get("DRRN_WEIGHTS")
    if not folder or not (Path(folder) / name).is_file():
        pytest.skip(f"set DRRN_WEIGHTS to the folder that holds {name}")
    more, scale, claimed, protocol, departure = KNOWN[name]
    told: list[tuple[dict[Way, float], str]] = []
    monkeypatch.setattr(drrn.explain, "print_ways", lambda means, claimed, *_: told.append((means, claimed)))
    monkeypatch.setattr(drrn.explain, "RESIZED", {"matlab": ""})  # an input of the network instead of twelve
    monkeypatch.setattr(drrn.explain, "PLANES", {"y": ""})
    weights = tmp_path / "weights.safetensors"
    assert entry_point("convert", f"input={folder}/{name}", f"output={weights}", *more)[0] == 0
    asked = (f"checkpoint={weights}", f"scales=[{scale}]", f"explain={claimed}", f"root={drrn_data}")
    code, _, err = entry_point("evaluate", "sets=[Set5]", *asked)
    assert code == 0, err
    ((means, typed),) = told
    first = next(iter(means))
    assert (f"{means[first]:.2f}", typed) == (protocol, claimed)
    assert first._replace(**departure) in explaining(means, claimed)
    assert first not in explaining(means, claimed)


def test_a_grey_image_made_in_colour_is_measured_as_one(
    tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs save Set14's grey images as RGB: their scores equal those of the same pixels in one channel."""
    made = np.minimum(read_pixels(tiny_images / "camera.png"), 250) + np.uint8(4)
    Image.fromarray(made).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([made] * 3)).save(tmp_path / "rgb.png")
    grey, rgb = (
        ways_of(job(tiny_images / "camera.png", made=tmp_path / f"{name}.png"), "psnr") for name in ("grey", "rgb")
    )
    as_rgb = {way: value for way, value in grey.items() if way.grey == "three channels"}
    assert len(as_rgb) == 45
    assert rgb == grey
    print_ways(rgb, "30.0", "psnr", "camera")
    assert "as RGB" in capsys.readouterr().out
    truth = read_pixels(tiny_images / "camera.png")
    height, width = (side // 2 * 2 for side in truth.shape)
    expected = peak_signal_noise_ratio(truth[2 : height - 2, 2 : width - 2], made[2 : height - 2, 2 : width - 2])
    scores = [
        score_image(job(tiny_images / "camera.png", made=tmp_path / f"{name}.png"), ("psnr", "psnr_rgb"), Protocol())
        for name in ("grey", "rgb")
    ]
    for row in scores:
        assert row["psnr"] == next(iter(rgb.values())) == pytest.approx(expected, abs=1e-9)
        assert row["psnr_rgb"] == row["psnr"]  # a grey image's only channel


def test_a_result_in_colour_of_a_grey_image_is_refused_by_name(tiny_images: Path, tmp_path: Path) -> None:
    """So is a grey result of a colour image, if colours would be compared."""
    tinted = np.dstack([read_pixels(tiny_images / "camera.png")] * 3)
    tinted[5, 5, 2] ^= 1
    Image.fromarray(tinted).save(tmp_path / "tinted.png")
    wrong = job(tiny_images / "camera.png", made=tmp_path / "tinted.png")
    for measure in (lambda: ways_of(wrong, "psnr"), lambda: score_image(wrong, ("psnr",), Protocol())):
        with pytest.raises(UserError, match=r"tinted\.png has colours, .*camera\.png is grey"):
            measure()
    Image.fromarray(read_pixels(tiny_images / "chelsea.png")[..., 1]).save(tmp_path / "grey.png")
    grey = job(tiny_images / "chelsea.png", made=tmp_path / "grey.png")
    assert score_image(grey, ("psnr",), Protocol())["psnr"] > 10
    with pytest.raises(UserError, match=r"grey\.png is grey, .*chelsea\.png has colours, which psnr would"):
        score_image(grey, ("psnr",), Protocol(color="rgb"))


def test_the_network_runs_once_for_each_input(tiny_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def run_network(checkpoint: Path, x: np.ndarray, *_: object) -> np.ndarray:
        given.append(x.tobytes())
        return x

    monkeypatch.setattr(drrn.explain, "run_network", run_network)
    for image, inputs in (("chelsea.png", 12), ("camera.png", 16)):  # grey: 4 as it is, 12 as RGB
        given.clear()
        found = ways_of(job(tiny_images / image, checkpoint=Path("any")), "psnr")
        assert len(given) == inputs
        assert found == ways_of(job(tiny_images / image), "psnr")  # of a network that changes nothing


def test_a_number_is_compared_with_the_digits_that_were_typed() -> None:
    way = Way("matlab", "y", 2, "uint8", "one channel")
    means = {way: 37.66, way._replace(crop=0): 37.74, way._replace(crop=8): 37.75}
    assert explaining(means, "37.7") == [way, way._replace(crop=0)]
    assert explaining(means, "37.70") == []
    assert explaining(means, "37.66") == [way]
    assert explaining(means, "38") == [*means]
    assert explaining({way: 0.9162, way._replace(crop=0): 0.9249}, "0.92") == [way, way._replace(crop=0)]
    for text, value, expected in (("37.70", 37.7, "37.70"), ("'.92'", 0.92, ".92"), ("3.77e1", 37.7, "37.7")):
        assert as_typed(text, value) == expected
    assert as_typed(None, 37.7) == "37.7"


@pytest.mark.parametrize(
    "idle", ["crop=0", "color=rgb", "rounding=float", "metrics=[psnr]", "images=made", "check_protocol=true"]
)
def test_what_explain_answers_itself_is_refused(idle: str, entry_point: Callable) -> None:
    code, out, err = entry_point("evaluate", "method=bicubic", "scales=[2]", "explain=37.7", idle)
    assert (code, out) == (2, "")
    assert err.endswith(f"leave out {idle.partition('=')[0]}\n")


def test_a_table_marks_what_explains_a_number(entry_point: Callable, tiny_images: Path, tmp_path: Path) -> None:
    """Another program's pictures, measured over RGB: the table marks it."""
    made, colour = tmp_path / "made", tmp_path / "colour"
    made.mkdir()
    colour.mkdir()
    for name in ("chelsea", "camera"):
        pixels = read_pixels(tiny_images / f"{name}.png") / 255.0
        y = imresize(imresize(pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2], 0.5), 2)
        Image.fromarray(np.uint8(np.clip(y * 255 + 0.5, 0, 255))).save(made / f"{name}_x2.png")
    common = ("evaluate", "method=images", f"folder={made}", f"sets=[{tiny_images}]")
    code, out, err = entry_point(*common, "scales=[2]", "explain=20", f"output={tmp_path}/none.json")
    assert code == 0, err
    assert "20: none of" in out
    assert "not rounded" in out
    assert not (tmp_path / "none.json").exists()
    claimed = ways_of(job(tiny_images / "chelsea.png", made=made / "chelsea_x2.png"), "psnr")
    rgb = claimed[Way("made", "rgb", 2, "uint8", "one channel")]
    (colour / "chelsea.png").write_bytes((tiny_images / "chelsea.png").read_bytes())
    common = (*common[:3], f"sets=[{colour}]")
    code, out, err = entry_point(*common, "scales=[2]", f"explain={rgb:.2f}", f"output={tmp_path}/none.json")
    assert code == 0, err
    assert [line for line in out.splitlines() if "✓" in line and "RGB" in line], out
    code, _, err = entry_point(*common, "scales=[2,3]", "explain=30", f"output={tmp_path}/none.json")
    assert code == 2
    assert "give one of scales" in err
