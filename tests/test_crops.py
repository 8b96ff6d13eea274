"""`drrn.crops`: windows of the degraded images, the same for any number of workers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from drrn.crops import Crops, Draws, prepare_images
from drrn.datamodule import SuperResolutionData, prepare_pairs
from drrn.errors import UserError
from drrn.identity import run_dir
from drrn.images import orientations, read_pixels
from drrn.patches import LOW, STEP
from drrn.protocol import prepare

CROPS = ("data.crops=3", "data.augment=online", "data.patch_size=20")


def reading(config: object, step: int = 0, rank: int = 0, world: int = 1) -> SuperResolutionData:
    data = SuperResolutionData(config)
    data.prepare_data()
    data.trainer = SimpleNamespace(global_step=step, global_rank=rank, world_size=world, training=True)
    return data


@pytest.mark.parametrize("degradation", ["BI", "BD"])
@pytest.mark.parametrize("input", ["interpolated", "low"])
def test_a_crop_is_a_window_of_the_degraded_image(
    degradation: str, input: str, configure: Callable, tiny_images: Path
) -> None:
    """At every place where it can begin, borders included; truth exact, x within the step of its levels."""
    config = configure(*CROPS, "data.scales=[3]", "data.val_scales=[3]", f"data.degradation={degradation}")
    crops = Crops(prepare_images(config.data), config.data, input)
    for image, file in enumerate(sorted(tiny_images.iterdir())):
        x, truth = prepare(read_pixels(file), 3, input, degradation)
        height, width = truth.shape
        places = [(i, j) for i in range((height - 20) // 3 + 1) for j in range((width - 20) // 3 + 1)][::5]
        data, label, turn = crops[np.array([[image, 0, i, j, 8 + i] for i, j in places])]
        assert len(places) > 20
        for k, (i, j) in enumerate(places):
            p = 18 if input == "low" else 20
            top, left = 3 * i, 3 * j
            np.testing.assert_allclose(label[k] / 255.0, truth[top : top + p, left : left + p], atol=1e-15)
            window = x[i : i + 6, j : j + 6] if input == "low" else x[top : top + p, left : left + p]
            assert np.abs(data[k] * STEP + LOW - window).max() < STEP / 2 + 1e-6
            assert turn[k] == i % 8


def test_a_network_of_the_low_resolution_is_degraded_in_crops_only(configure: Callable) -> None:
    """With stored patches, its pairs are made from the truth by bicubic."""
    keys = ("model=espcn", "~model.features", "model.scale=3", "data.scales=[3]", "data.val_scales=[3]")
    with pytest.raises(UserError, match=r"data\.degradation = 'DN'.*data\.crops=16"):
        configure(*keys, "data.degradation=DN")
    assert configure(*keys, "data.degradation=DN", *CROPS).data.crops == 3


def test_noise_is_drawn_for_each_place(configure: Callable, tiny_images: Path) -> None:
    config = configure(*CROPS, "data.degradation=DN")
    crops = Crops(prepare_images(config.data), config.data, "low")
    (a, b, again), *_ = crops[np.array([[1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 0, 0]])]
    np.testing.assert_array_equal(a, again)
    assert np.abs(a[1:].astype(float) - b[:-1]).mean() * STEP * 255 > 5  # the same pixels of the image


def test_batches_do_not_depend_on_workers_or_processes_or_where_a_run_resumed(
    configure: Callable, tiny_images: Path
) -> None:
    def flat(batch: tuple) -> np.ndarray:
        return np.concatenate([np.asarray(part).ravel() for part in batch])

    overrides = (*CROPS, "data.batch_size=4", "trainer.max_steps=5", "data.scales=[2,3]")
    batches = list(reading(configure(*overrides)).train_dataloader())
    assert len(batches) == len({flat(batch).tobytes() for batch in batches}) == 5
    two = reading(configure(*overrides, "data.num_workers=2"), step=2).train_dataloader()
    for batch, expected in zip(two, batches[2:], strict=True):
        np.testing.assert_array_equal(flat(batch), flat(expected))
    config = configure(*overrides, "trainer.accumulate_grad_batches=2")
    halves = [list(reading(config, rank=rank, world=2).train_dataloader()) for rank in (0, 1)]
    labels = [y for step in range(5) for m in (0, 1) for rank in (0, 1) for y in halves[rank][2 * step + m][1]]
    np.testing.assert_array_equal(labels, [y for batch in batches for y in batch[1]])
    other = next(iter(Draws(100, 4, 1))), next(iter(Draws(100, 4, 2)))
    assert not (other[0] == other[1]).any()


def test_the_network_gets_turned_crops(configure: Callable, tiny_images: Path) -> None:
    data = reading(configure(*CROPS, "data.batch_size=6", "trainer.max_steps=1"))
    batch = next(iter(data.train_dataloader()))
    x, truth = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
    assert x.shape == truth.shape == (6, 1, 20, 20)
    for k, o in enumerate(batch[2]):
        np.testing.assert_allclose(truth[k, 0] * 255, orientations(batch[1][k], [o])[0], atol=1e-4)
        np.testing.assert_allclose(x[k, 0], orientations(batch[0][k] * STEP + LOW, [o])[0], atol=1e-6)


def test_an_epoch_is_so_many_crops_of_each_image(configure: Callable, tiny_images: Path) -> None:
    config = configure(*CROPS, "data.batch_size=2", "trainer.max_epochs=2")
    data = reading(config)
    assert (len(data.pairs), data.steps_per_epoch, data.max_steps) == (6, 3, 6)
    assert len(list(data.train_dataloader())) == 6


def test_the_stride_of_stored_patches_is_no_part_of_what_a_run_of_crops_is(configure: Callable) -> None:
    assert run_dir(configure(*CROPS, "data.stride=7")) == run_dir(configure(*CROPS))
    assert run_dir(configure("data.stride=7")) != run_dir(configure())


@pytest.mark.parametrize("how", ["cut", "changed", "small", "offline", "full"])
def test_what_cannot_be_cropped_is_refused(
    how: str, configure: Callable, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    shutil.copytree(tiny_images, images)
    keys = (*CROPS, f"data.train=[{images}]", f"data.patches={tmp_path}")
    if how == "offline":
        with pytest.raises(UserError, match=r"data\.crops and data\.augment"):
            configure(*keys, "data.augment=offline")
        return
    if how == "full":
        monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=9000))
        with pytest.raises(UserError, match=r"0\.00 GB are needed.*data\.patches") as refusal:
            prepare_images(configure(*keys).data)
        assert "291 images" not in str(refusal.value)  # whose patches are another build
        assert not list(tmp_path.glob("*.partial"))
        return
    path = prepare_images(configure(*keys).data)
    if how == "small":
        with pytest.raises(UserError, match=r"sides of 92 pixels \(data\.patch_size\)"):
            prepare_pairs(configure(*keys, "data.patch_size=90").data)
        assert len(prepare_pairs(configure(*keys, "data.patch_size=60").data)) == 3  # one of the two is large enough
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UserError, match="Delete"):
            prepare_images(configure(*keys).data)
    else:
        crops = prepare_pairs(configure(*keys).data)
        with path.open("r+b") as file:
            file.write(b"x")
        with pytest.raises(UserError, match="was changed while it was in use"):
            crops.check_unchanged()


def test_div2k_as_it_is_shipped(configure: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """conf/data/div2k.yaml: a batch of its 48×48 crops from the folder that it names, here of two photographs."""
    import skimage.data
    from PIL import Image

    (tmp_path / "DIV2K_train_HR").mkdir()
    for name, pixels in {"0001": skimage.data.chelsea(), "0002": skimage.data.coffee()}.items():
        Image.fromarray(pixels[:150, :200]).save(tmp_path / f"DIV2K_train_HR/{name}.png")
    monkeypatch.setenv("DRRN_DATA", str(tmp_path))
    keys = ("data.val=[demo_test]", "data.num_workers=0", f"data.patches={tmp_path}", "trainer.max_steps=1")
    data = reading(configure("data=div2k", *keys, tiny=False))
    assert len(data.pairs) == 2 * 128
    (batch,) = data.train_dataloader()
    x, truth = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
    assert x.shape == truth.shape == (128, 1, 48, 48)
    assert 0 < np.abs(x - truth).mean() < 0.05
