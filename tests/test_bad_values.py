"""Every key of every entry point with values of a wrong type and out of range: refused by the key's name.

The keys come from the composed configuration, the types from the dataclasses that check it, so a new key is tested at
once, and a numeric one needs a line in `OUT_OF_RANGE`.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from drrn.config import Config
from drrn.errors import UserError
from drrn.runs.request import request
from hydra_plugins.drrn_study import literal

ROOT = Path(__file__).resolve().parents[1]
HUGE = 10**20

# Wrong values by type, for every key. (A number is a valid file name, so strings accept numbers.)
WRONG_TYPES: dict[Any, list[Any]] = {
    int: ["word", "", 1.5, True, [1], {"a": 1}, HUGE],
    float: ["word", "", True, [1.0], {"a": 1}, float("nan"), float("inf"), float("-inf")],
    bool: ["word", "", 2, -1, 1.5, [True], {"a": 1}],
    str: ["", " ", [], ["a"], {"a": 1}],
    list[int]: ["word", 3, [], ["word"], [1.5], [[2]], [None], [HUGE], [{"a": 1}], {"a": 1}],
    list[str]: ["word", 3, [["a"]], [None], [""], ["a", " "], [{"a": 1}], {"a": 1}],
    dict[str, Any]: ["word", 3, [1], {"a": 1}, {"a": {}}, {"a": {"_target_": 1}}],
    Any: ["", True, [["a"]], [None], [""], [True], {"a": 1}],
}
# Wrong values by key. A key without a line here and without limits is in `FREE`.
OUT_OF_RANGE: dict[str, dict[str, list[Any]]] = {
    "train": {
        "seed": [-1, 2**32],
        "threads": [0, 2**12],
        "study": ["/", "../elsewhere", "/tmp/x"],
        "ckpt_path": ["no/such.ckpt"],
        "init_from": ["no/such.safetensors"],
        "from_record": ["no/record.json"],
        "plan": ["perhaps"],
        "model.B": [0, -1, 10_000],
        "model.U": [-1, 10_000],
        "model.features": [0, -1, 2**13],
        "model.norm": ["group"],
        "data.name": ["a/b"],
        "data.train": [[], ["T92"], ["no/such/folder"], ["T91", "T91"]],
        "data.val": [[], ["Set6"], ["no/such/folder"], ["Set5", "./Set5"]],
        "data.test": [[], ["Set6"], ["no/such/folder"], ["Set5", "./Set5"]],
        "data.test_metrics": [[], ["vmaf"], ["psnr", "psnr"]],
        "data.scales": [[1], [0], [-2], [2, 2]],
        "data.val_scales": [[1], [3, 3]],
        "data.patch_size": [2, 0, -31],
        "data.stride": [0, -1],
        "data.augment": ["mixup"],
        "data.degradation": ["bi", "JPEG"],
        "data.crops": [-1],
        "data.batch_size": [0, -1],
        "data.num_workers": [-1, 5000],
        "optim.algorithm": ["lion"],
        "optim.lr": [0, -0.1],
        "optim.momentum": [-0.1, 1],
        "optim.weight_decay": [-1],
        "optim.bias_lr_mult": [-1],
        "optim.last_lr_mult": [-1],
        "optim.theta": [0, -1],
        "optim.clip": ["gently"],
        "optim.schedule": ["exponential"],
        "optim.loss": ["l2"],
        "optim.warmup_steps": [-1],
        "optim.optimiser": [{"lr": 1}],
        "optim.scheduler": [{"_target_": 1}],
        "speed.compile": ["often", 2],
        "speed.validation": ["bf16", "often"],
        "optim.halve_every_epochs": [0, -1],
        "optim.halve_every_steps": [0, -1],
        "optim.residual_scale": [-1],
        "optim.bn_average": [-0.1, 1],
        "trainer.accelerator": ["abacus"],
        "trainer.devices": [0, -2, "none", "1.5", [], [-1], [0, 0], 1.5, None, HUGE],
        "trainer.num_nodes": [0, -1],
        "trainer.strategy": ["alone", "fsdp", "ddp_spawn"],
        "trainer.precision": ["half", "8"],
        "trainer.max_steps": [0, -1],
        "trainer.max_epochs": [0, -1],
        "trainer.max_time": ["tomorrow", "12:00", "1.5"],
        "trainer.accumulate_grad_batches": [0, 3],
        "trainer.val_check_interval": [0],
        "trainer.checkpoint_every": [0],
        "trainer.log_every_n_steps": [0],
        "logger.kind": ["tensorboard"],
        "logger.mode": ["on"],
        "logger.artifacts": ["all"],
        "logger.pictures_every": [0],
    },
    "evaluate": {
        "method": ["lanczos"],
        "explain": [0, -1.0],
        "checkpoint": ["no.ckpt", ["no.ckpt"], 1.5],
        "sets": [[], ["Set6"], ["no/such"], ["Set5", "Set5"]],
        "scales": [[1], [-2]],
        "metrics": [[], ["lpips"]],
        "workers": [0, -1, 5000],
        "threads": [0, 2**12],
        "crop": [-1],
        "color": ["hsv"],
        "rounding": ["floor"],
        "degradation": ["bi"],
        "precision": ["fp8", "auto"],
        "folder": ["no/such", "."],  # beside method=bicubic
    },
    "upscale": {
        "input": [None, []],
        "scale": [1, 0, -2, None],
        "checkpoint": ["weights.safetensors"],  # beside method=bicubic
        "method": ["lanczos"],
        "suffix": [".gif", "png"],
        "quality": [0, 101],
        "tile": [0, -1],
        "precision": ["half"],
        "threads": [0, 5000],
        "device": ["abacus", "cuda:x"],
        "max_pixels": [0, -1],
    },
    "report": {
        "runs": [["no", 1.5]],
        "study": [["fig6", 1.5]],
        "scores": [["no.json"]],
        "scale": [1, 0, -3],
        "box": [[1], [1, 2, 3, -4], [1, 2, 3, 4, 5]],
        "checkpoint": [["no.ckpt"]],
    },
    "convert": {
        "input": [None, "no.pth"],
        "output": ["weights.gif"],
        "form": ["keras"],
        "U": [-1],
        "scales": [[1]],
        "scale": [1, 0],
    },
}
FREE = {
    "train": {
        "name",
        "callbacks",
        "output",
        "data.root",
        "data.patches",
        "logger.project",
        "logger.entity",
        "logger.tags",
        "logger.notes",
        "logger.job_type",
    },
    "evaluate": {"output", "images", "root", "folder"},
    "upscale": {"output"},
    "report": {"output", "compare", "root", "others"},
    "convert": set(),
}
# The other overrides that make an entry point's configuration valid.
SOUND = {
    "train": [],
    "evaluate": ["method=bicubic"],
    "upscale": [f"input={ROOT / 'docs/demo.png'}", "output=no/such/big.png", "scale=2", "method=bicubic"],
    "report": ["runs=runs"],
    "convert": [f"input={ROOT / 'pyproject.toml'}", "info=true"],
}


ROOMS = {
    "evaluate": "drrn.evaluation_config",
    "upscale": "drrn.photos.plan",
    "report": "drrn.report.report",
    "convert": "drrn.weights.convert",
}


def schema(name: str) -> type:
    if name == "train":
        return Config
    module = importlib.import_module(ROOMS[name])
    return getattr(module, {"upscale": "Options"}.get(name, f"{name.capitalize()}Config"))


def kinds(of: type, group: str = "") -> Iterator[tuple[str, Any, bool]]:
    """(key, type, whether null is allowed) of every key."""
    for name, kind in get_type_hints(of).items():
        kind = of.__dataclass_fields__[name].metadata.get("keys", kind)
        parts = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        if is_dataclass(parts[0]):
            yield from kinds(parts[0], f"{group}{name}.")
        elif name not in ("trainer_extra", "logger_extra"):  # no keys: they hold +trainer.x and +logger.x
            yield f"{group}{name}", parts[0], type(None) in parts or kind is Any


@cache
def sound(name: str) -> DictConfig:
    """A valid configuration of an entry point; callers copy it."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config" if name == "train" else name, SOUND[name])


def checked(name: str, cfg: DictConfig) -> Any:
    if name == "train":
        return request(cfg)
    module = importlib.import_module(ROOMS[name])
    if name == "upscale":
        return module.plan(module.check(cfg))
    return module.check(cfg)


def wrong_values(name: str, key: str, kind: Any, optional: bool) -> list[Any]:
    wrong = [*OUT_OF_RANGE[name].get(key, []), *WRONG_TYPES[kind], *([] if optional else [None])]
    return [value for value in wrong if (key, value) != ("speed.compile", True)]


KEYS = [(name, *entry) for name in SOUND for entry in kinds(schema(name))]
FIRST_OF_KIND = {(name, kind): key for name, key, kind, _ in reversed(KEYS)}.items()


@pytest.mark.parametrize("name", SOUND)
def test_all_keys_are_here(name: str) -> None:
    """Every documented key is tested, and has limits or none for a reason."""
    ours = {key: kind for key, kind, _ in kinds(schema(name))}

    def leaves(cfg: DictConfig, group: str = "") -> Iterator[str]:
        for key in cfg:
            if OmegaConf.is_dict(cfg[key]) and f"{group}{key}" not in ours:
                yield from leaves(cfg[key], f"{group}{key}.")
            else:
                yield f"{group}{key}"

    earlier = {"model.network", "model.checkpointing", "trainer.compile", "trainer.cuda_graph"}  # names of speed.*
    assert set(leaves(sound(name))) - earlier == set(ours)
    limited = {key for key, kind in ours.items() if kind is not bool}
    assert limited == set(OUT_OF_RANGE[name]) | FREE[name]
    checked(name, sound(name).copy())  # as it is, it is taken


@pytest.mark.parametrize(("name", "key", "kind", "optional"), KEYS, ids=[f"{name} {key}" for name, key, *_ in KEYS])
def test_every_key_refuses_what_it_cannot_be(
    name: str,
    key: str,
    kind: Any,
    optional: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """All wrong values, by the entry point's own check."""
    monkeypatch.chdir(tmp_path)
    for value in wrong_values(name, key, kind, optional):
        cfg = sound(name).copy()
        OmegaConf.update(cfg, key, value, merge=False)
        with pytest.raises(UserError) as refusal:
            checked(name, cfg)
        assert key in str(refusal.value), f"{key} = {value!r}: {refusal.value}"
        words = re.search(r"\n|of type '|Config|NoneType|valid bool", str(refusal.value))  # OmegaConf's
        assert not words, refusal.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "key", "kind", "optional"),
    [(name, key, kind, optional) for name, key, kind, optional in KEYS if ((name, kind), key) in FIRST_OF_KIND],
    ids=str,
)
def test_every_entry_point_refuses_each_kind_of_value(
    name: str,
    key: str,
    kind: Any,
    optional: bool,
    entry_point: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """By that check, with exit code 2, before any work; a key of each type."""
    monkeypatch.chdir(tmp_path)
    value = wrong_values(name, key, kind, optional)[0]
    work = {"train": "train.start", "evaluate": "drrn.evaluation.evaluate", "upscale": "drrn.photos.upscale.upscale"}
    monkeypatch.setattr(work.get(name, f"{name}.{name}"), lambda *_: pytest.fail(f"{key}={value!r} was taken"))
    others = [argument for argument in SOUND[name] if not argument.startswith(f"{key}=")]
    code, out, err = entry_point(name, *others, f"{key}={literal(value)}")
    assert code == 2
    assert err.startswith(f"{name}.py: ")
    assert key in err
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["5", "[a]", "null"])
def test_a_group_that_is_no_group_is_refused(value: str, entry_point: Callable) -> None:
    for group in ("model", "data", "optim", "trainer", "logger"):
        code, out, err = entry_point("train", f"{group}={value}")
        assert code == 2, err
        assert group in err
        assert "Traceback" not in out + err


def test_where_other_trainer_arguments_are_kept_is_no_key(entry_point: Callable) -> None:
    code, _, err = entry_point("train", "++trainer_extra.fast_dev_run=true")
    assert code == 2
    assert "trainer_extra" in err


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("prepare", "data.train=[T92]"),
        ("evaluate", "checkpoint=1.5"),
        ("report", "box={a:1}"),
        ("convert", "scales=[[2]]"),
    ],
)
def test_as_a_user_meets_it(name: str, wrong: str, tmp_path: Path) -> None:
    """One line, exit code 2, nothing written; in a process of its own."""
    done = subprocess.run(
        [sys.executable, ROOT / "src" / f"{name}.py", *SOUND.get(name, []), wrong],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}.py: ")
    assert done.stderr.count("\n") == 1
    assert wrong.partition("=")[0] in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
