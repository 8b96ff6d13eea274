"""Shared fixtures: an environment without a network, small real photographs, a patch file, an entry point.

`DRRN_DATA` names the folder with T91/, BSD200/, Set5/ …; the tests that need those files say that they are
skipped without it. Everything else runs on the photographs in scikit-image's wheel.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before NumPy and torch start their threads: the tests compute little and often.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ["DRRN_HOME"] = str(ROOT)
os.environ["WANDB_MODE"] = "offline"  # no account, no network
os.environ["WANDB_SILENT"] = "true"
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ.pop("WANDB_DIR", None)  # a run's own folder is where its W&B files belong
os.environ["NO_PROXY"] = "127.0.0.1,localhost"  # for the local test server
os.environ.pop("HYDRA_FULL_ERROR", None)

# All keys of a tiny run except its data, which is a folder of crops (fixture `tiny_images`).
TINY = (
    "model.features=2",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.scales=[2]",
    "data.val_scales=[2]",
    "trainer.max_steps=1",
    "trainer.accelerator=cpu",
    "logger=none",
)


def pytest_collection_finish() -> None:
    """Freeze the imports' objects: collecting garbage among them takes a sixth of composing a configuration."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Patch files and W&B's caches go to a temporary folder, never into the clone or the home."""
    keys = {
        "DRRN_PATCHES": "patches",
        "WANDB_CACHE_DIR": "wandb_cache",
        "WANDB_CONFIG_DIR": "wandb_config",
        "WANDB_DATA_DIR": "wandb_data",
    }
    patch = pytest.MonkeyPatch()
    for key, name in keys.items():
        patch.setenv(key, str(tmp_path_factory.mktemp(name)))
    yield
    patch.undo()


@pytest.fixture
def drrn_data() -> Path:
    """The folder of the training images and benchmark sets."""
    root = os.environ.get("DRRN_DATA")
    if not root:
        pytest.skip("set DRRN_DATA to the folder that holds T91/, BSD200/ and Set5/")
    if not (Path(root) / "T91").is_dir():
        pytest.skip(f"DRRN_DATA = {root} holds no T91/: `python src/prepare.py` fetches it")
    return Path(root)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two crops of photographs, one in colour and one grey, of sides that no scale divides."""
    import skimage.data
    from PIL import Image

    folder = tmp_path_factory.mktemp("sets") / "tiny"
    folder.mkdir()
    Image.fromarray(skimage.data.chelsea()[90:165, 120:211]).save(folder / "chelsea.png")  # 75×91, RGB
    Image.fromarray(skimage.data.camera()[100:164, 200:255]).save(folder / "camera.png")  # 64×55, L
    return folder


@pytest.fixture(scope="session")
def tiny_patches(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch file of the tiny images, ×2 and ×3, built once with two processes."""
    from drrn.patch_build import prepare_patches
    from drrn.patches import Recipe

    recipe = Recipe((str(tiny_images),), scales=(2, 3))
    return prepare_patches("tiny", recipe, Path("unused"), tmp_path_factory.mktemp("tiny_patches"), workers=2)


@pytest.fixture
def inline_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch files are built in this process: no workers have to start, and a test's monkeypatches apply."""
    from concurrent.futures import ThreadPoolExecutor

    import drrn.patch_build

    def pool(workers: int, mp_context: object, initializer: object) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(drrn.patch_build, "ProcessPoolExecutor", pool)


@pytest.fixture(scope="session")
def configure(tiny_images: Path) -> Callable:
    """`configure("model.B=2", …)` → the checked `Config` of a tiny run, composed by Hydra from conf/."""
    from hydra import compose, initialize_config_dir

    from drrn.config import Config
    from drrn.runs.request import request

    def configure(*overrides: str, tiny: bool = True) -> Config:
        base = (*TINY, f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]") if tiny else ()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return request(compose("config", [*base, *overrides]))

    return configure


@pytest.fixture
def entry_point(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """`entry_point("train", "model.B=0")` → (exit code, stdout, stderr) of `python src/train.py model.B=0`.

    In this process, so that Lightning is imported once for all tests.
    """
    import importlib

    from drrn.launch import launch

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [str(ROOT / "src" / f"{name}.py"), *arguments])
        capsys.readouterr()
        try:
            launch(module.main)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        else:
            code = 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def template(configure: Callable) -> dict[str, Any]:
    """A run's record at its start, for the tests of reports."""
    import json

    from drrn.model import DRRN
    from drrn.runs.record import run_record

    config = configure("data.scales=[2,3,4]", "data.batch_size=16", "trainer.max_steps=1500", "model.features=2")
    return json.loads(json.dumps(run_record(config, DRRN(**config.model))))


@pytest.fixture
def make(template: dict[str, Any]) -> Callable:
    """`make("model.B=3", psnr=31.0)` → the record of a run of 1,500 steps, scored on the whole of Set5 ×3."""
    import copy

    import torch
    import yaml

    from drrn.identity import structure_name
    from drrn.model import DRRN

    def make(*overrides: str, psnr: float = 31.0, images: int = 5, **changes: Any) -> dict[str, Any]:
        record = copy.deepcopy(template)
        for override in overrides:
            key, _, value = override.partition("=")
            *groups, last = key.split(".")
            place = record["config"]
            for group in groups:
                place = place[group]
            assert last in place
            place[last] = yaml.safe_load(value)
        config, model = record["config"], record["config"]["model"]
        name = structure_name(model)
        with torch.device("meta"):
            network = DRRN(**model)
        row = {"set": "Set5", "scale": 3, "psnr": psnr, "ssim": 0.9, "bicubic_psnr": 30.39, "bicubic_ssim": 0.8682}
        record |= {
            "name": f"{name} s{config['seed']}",
            "study": config["study"],
            "seed": config["seed"],
            "structure": {"name": name, "depth": network.depth, "conv_weights": network.conv_weight_count},
            "status": "finished",
            "budget": {"steps": 1500, "patches": 24_000, "epochs": 1.0, "seconds": 1.0},
            "scores": [{**row, "image": "baby.bmp"}],
            "means": [{**row, "images": images}],
            "validation": [
                {"step": step, "set": "Set5", "scale": 3, "image": image, "psnr": psnr + gain - 100 / step}
                for step in (500, 1000, 1500)
                for image, gain in (("baby.bmp", 1.0), ("bird.bmp", -1.0))
            ],
            "git": {"commit": "0123456789abcdef", "changed": False},
            "path": f"runs/{config['study']}/{name}_s{config['seed']}/record.json",
        }
        return record | changes

    return make


@pytest.fixture
def whole(make: Callable) -> Callable:
    """`whole("fig6", seeds=(1, 2))` → records of every point of a study, with PSNRs close to each other."""
    from drrn.report.studies import planned

    def whole(study: str, seeds: tuple[int, ...] = (1, 2), *overrides: str) -> list[dict[str, Any]]:
        records = []
        for number, model in enumerate(planned(study)):
            keys = [f"model.{key}={model[key]}" for key in ("B", "U", "weight_sharing", "multi_path")]
            records += [
                make(*keys, f"seed={seed}", f"study={study}", *overrides, psnr=31 + 0.01 * number + 0.003 * seed)
                for seed in seeds
            ]
        return records

    return whole
