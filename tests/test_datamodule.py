"""`drrn.datamodule`: the batches of training, and evaluation, in which every image of a set counts once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from drrn.datamodule import SuperResolutionData, Task
from drrn.errors import UserError
from drrn.identity import run_dir
from drrn.images import orientations, read_luminance
from drrn.matlab import imresize
from drrn.patches import Patches, ShuffledBatches
from drrn.protocol import prepare, score
from drrn.sets import check_size


def prepared(config: object, step: int = 0, rank: int = 0, world: int = 1) -> SuperResolutionData:
    """A data module in one process of a run that is at `step`."""
    data = SuperResolutionData(config)
    data.prepare_data()
    data.trainer = SimpleNamespace(global_step=step, global_rank=rank, world_size=world, training=True)
    return data


def patch_file(data: SuperResolutionData) -> Path:
    return data.pairs.path


# ---------------------------------------------------------------------- training


def test_what_is_prepared_is_not_prepared_again(
    configure: Callable, inline_pool: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning calls it before each fit and test: an open file that was deleted meanwhile can still be read."""
    data = prepared(configure("trainer.max_steps=4"))
    monkeypatch.setattr("drrn.datamodule.prepare_patches", lambda *_: pytest.fail("built again"))
    data.prepare_data()
    next(iter(data.train_dataloader()))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_read_in_the_order_of_the_seed(workers: int, configure: Callable, inline_pool: None) -> None:
    config = configure("trainer.max_steps=40", "data.batch_size=12", f"data.num_workers={workers}", "seed=3")
    data = prepared(config)
    patches = Patches(patch_file(data))
    order = ShuffledBatches(len(patches), 12, seed=3, steps=40)
    loader = data.train_dataloader()
    assert len(loader) == 40
    count = 0
    for (x, y), indices in zip(loader, order, strict=True):
        expected_x, expected_y = patches[indices]
        np.testing.assert_array_equal(x, expected_x)
        np.testing.assert_array_equal(y, expected_y)
        count += 1
    assert count == 40


def test_a_resumed_run_reads_on_where_it_was(configure: Callable, inline_pool: None) -> None:
    overrides = ("trainer.max_steps=12", "data.batch_size=12", "trainer.accumulate_grad_batches=3")
    whole = [y for _, y in prepared(configure(*overrides)).train_dataloader()]
    rest = [y for _, y in prepared(configure(*overrides), step=5).train_dataloader()]
    assert (len(whole), len(rest)) == (36, 21)
    for a, b in zip(rest, whole[15:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_processes_share_a_batch_and_their_micro_batches_are_of_equal_size(
    configure: Callable, inline_pool: None
) -> None:
    config = configure("trainer.max_steps=6", "data.batch_size=12", "trainer.accumulate_grad_batches=2")
    whole = [y for _, y in prepared(configure("trainer.max_steps=6", "data.batch_size=12")).train_dataloader()]
    shares = [[y for _, y in prepared(config, rank=rank, world=3).train_dataloader()] for rank in range(3)]
    for step, batch in enumerate(whole):
        parts = [y for share in shares for y in share[2 * step : 2 * step + 2]]
        assert [len(part) for part in parts] == [2] * 6
        assert sorted(y.tobytes() for y in np.concatenate(parts)) == sorted(y.tobytes() for y in batch)


@pytest.mark.parametrize("augment", ["offline", "online"])
def test_what_the_network_gets_is_a_degraded_patch_and_its_truth(
    augment: str, configure: Callable, tiny_images: Path, inline_pool: None
) -> None:
    """x is within 2e-5 of the bicubic image at the position of x̃; x̃ is exact; both are in 0…1."""
    data = prepared(
        configure("trainer.max_steps=10", "data.batch_size=12", "data.scales=[3]", f"data.augment={augment}")
    )
    if augment == "offline":  # orientations are made before degradation; online turns the degraded patch
        images = [turn for path in tiny_images.iterdir() for turn in orientations(read_luminance(path))]
    else:
        images = [read_luminance(path) for path in tiny_images.iterdir()]
    known = {}
    for y in images:
        truth = y[: y.shape[0] // 3 * 3, : y.shape[1] // 3 * 3] / 255
        bicubic = imresize(imresize(truth, 1 / 3), 3)
        for top in range(0, truth.shape[0] - 30, 21):
            for left in range(0, truth.shape[1] - 30, 21):
                window = slice(top, top + 31), slice(left, left + 31)
                for o in range(8 if augment == "online" else 1):
                    label, x = (orientations(z[window], [o])[0] for z in (truth, bicubic))
                    known.setdefault(label.astype(np.float32).tobytes(), []).append(x)
    seen = 0
    for batch in data.train_dataloader():
        x, truth = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
        assert x.dtype == truth.dtype == torch.float32
        assert x.shape == truth.shape == (12, 1, 31, 31)
        for a, b in zip(x[:, 0].numpy(), truth[:, 0].numpy(), strict=True):
            candidates = known[(np.round(b * 255) / 255).astype(np.float32).tobytes()]
            assert np.abs(b * 255 - np.round(b * 255)).max() < 1e-4
            assert min(np.abs(a - candidate).max() for candidate in candidates) <= 2e-5
            seen += 1
    assert seen == 120


def test_evaluation_batches_are_left_as_they_are(configure: Callable, inline_pool: None) -> None:
    data = prepared(configure())
    data.trainer.training = False
    batch = (torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4), "name")
    assert data.on_before_batch_transfer(batch, 0) is batch
    assert data.on_after_batch_transfer(batch, 0) is batch


@pytest.mark.parametrize(("epochs", "steps"), [("1", 3), ("2.4", 7), ("0.01", 1), ("null", 5)])
def test_epochs_are_those_of_the_data(epochs: str, steps: int, configure: Callable, inline_pool: None) -> None:
    """288 pairs in batches of 96: an epoch is three steps."""
    config = configure(
        "data.scales=[2,3,4]", "data.batch_size=96", f"trainer.max_epochs={epochs}", "trainer.max_steps=5"
    )
    data = prepared(config)
    assert data.steps_per_epoch == 3
    assert data.max_steps == steps
    assert len(list(data.train_dataloader())) == steps


def test_online_has_as_many_steps_an_epoch_as_offline_and_an_eighth_of_the_file(
    configure: Callable, inline_pool: None
) -> None:
    offline, online = (prepared(configure("data.batch_size=4", f"data.augment={a}")) for a in ("offline", "online"))
    assert offline.steps_per_epoch == online.steps_per_epoch > 8
    assert Patches(patch_file(offline)).stored == 8 * Patches(patch_file(online)).stored


def test_a_batch_larger_than_the_data_is_refused(configure: Callable, inline_pool: None) -> None:
    with pytest.raises(UserError, match=r"data\.batch_size = 100000"):
        prepared(configure("data.batch_size=100000"))


# ---------------------------------------------------------------------- evaluation


def test_tasks_are_sets_times_scales(configure: Callable, tiny_images: Path, inline_pool: None) -> None:
    data = prepared(configure("data.scales=[2,3,4]", "data.val_scales=[3]", f"data.val=[{tiny_images},demo_test]"))
    sets = ("tiny", "demo_test")
    assert data.evaluation_tasks("validate") == [(name, 3) for name in sets]
    assert data.evaluation_tasks("test") == [(name, scale) for name in sets for scale in (2, 3, 4)]
    assert [str(task) for task in data.evaluation_tasks("test")[:2]] == ["tiny_x2", "tiny_x3"]
    assert str(Task("demo_test", 4)) == "demo_test_x4"


def test_the_sets_of_the_end_are_others_than_those_of_the_validations(
    configure: Callable, tiny_images: Path, inline_pool: None
) -> None:
    sets = (f"data.val=[{tiny_images}]", "data.test=[demo_test]", "data.test_metrics=[ifc,psnr]")
    config = configure(*sets, "data.scales=[2,3]", "data.val_scales=[3]")
    data = prepared(config)
    assert data.evaluation_tasks("validate") == [("tiny", 3)]
    assert data.evaluation_tasks("test") == [("demo_test", 2), ("demo_test", 3)]
    assert data.evaluation_metrics("validate") == ("psnr", "ssim")
    assert data.evaluation_metrics("test") == ("psnr", "ssim", "ifc")
    assert run_dir(config) == run_dir(configure("data.scales=[2,3]", "data.val_scales=[3]"))  # it trains the same


def test_images_that_a_metric_does_not_take_are_refused_before_the_training(
    configure: Callable, inline_pool: None
) -> None:
    with pytest.raises(UserError, match=r"too small to be scored at ×2 by ifc: take it out of data\.val"):
        prepared(configure("data.test_metrics=[ifc]"))


def test_a_folder_that_is_not_set5_is_not_called_so(
    configure: Callable, tiny_images: Path, tmp_path: Path, inline_pool: None
) -> None:
    shutil.copytree(tiny_images, tmp_path / "mine/Set5")
    data = prepared(configure(f"data.val=[{tmp_path}/mine/Set5]"))
    assert [str(task) for task in data.evaluation_tasks("test")] == ["mine/Set5_x2"]


@pytest.mark.parametrize("kind", ["RGBA", "checksum"])
def test_an_image_that_cannot_be_measured_is_refused_before_any_patch_is_cut(
    kind: str, configure: Callable, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_images, tmp_path / "val")
    bad = tmp_path / "val/chelsea.png"
    if kind == "RGBA":
        Image.open(bad).convert("RGBA").save(bad)
    else:
        content = bytearray(bad.read_bytes())
        content[200] ^= 1
        bad.write_bytes(content)
    monkeypatch.setattr("drrn.datamodule.prepare_patches", lambda *_: pytest.fail("too early"))
    with pytest.raises(UserError, match=r"chelsea\.png"):
        prepared(configure(f"data.val=[{tmp_path / 'val'}]"))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_image_is_measured_by_one_process(
    world: int, configure: Callable, tiny_images: Path, tmp_path: Path, inline_pool: None
) -> None:
    folder = tmp_path / "five"
    shutil.copytree(tiny_images, folder)
    for k in range(3):
        shutil.copy(tiny_images / "camera.png", folder / f"more{k}.png")
    config = configure(f"data.val=[{folder}]", "data.scales=[2,3]", "data.val_scales=[2]")
    for testing, scales in ((False, [2]), (True, [2, 3])):
        names = []
        for rank in range(world):
            data = prepared(config, rank=rank, world=world)
            data.trainer.testing = testing
            loaders = data.val_dataloader()
            assert len(loaders) == len(scales)
            names += [file.name for file in loaders[-1] if file is not None]
        assert sorted(names) == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_an_image_too_small_to_score_is_refused(scale: int, tmp_path: Path) -> None:
    """Refused before any training exactly when the protocol cannot score it."""
    outcomes = set()
    for side in range(2 * scale + 8, 3 * scale + 12):
        path = tmp_path / f"{side}.png"
        Image.fromarray(skimage.data.camera()[100 : 100 + side, 200:260]).save(path)
        x, truth = prepare(read_luminance(path), scale)
        try:
            score(x, truth, scale)
        except ValueError:
            with pytest.raises(UserError, match=f"too small to be scored at ×{scale}") as refusal:
                check_size(path, scale)
            assert str(path) in str(refusal.value)
            outcomes.add("refused")
        else:
            check_size(path, scale)
            outcomes.add("scored")
    assert outcomes == {"refused", "scored"}
