"""`drrn.config`: refusals by the key's name, through the real entry point; the names of runs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conftest import TINY
from drrn.config import Config, ModelConfig, check
from drrn.errors import UserError
from drrn.identity import run_dir, run_group, run_name, structure_name
from drrn.model import DRRN
from drrn.runs.record import run_record

ROOT = Path(__file__).resolve().parents[1]

# (command line, text that the message must contain): the promised refusals, and similar ones.
WRONG = {
    "B below 1": (["model.B=0"], ["model.B = 0", "at least 1"]),
    "B negative": (["model.B=-3"], ["model.B = -3", "at least 1"]),
    "B no number": (["model.B=two"], ["model.B", "two"]),
    "B a fraction": (["model.B=1.5"], ["model.B", "1.5"]),
    "B null": (["model.B=null"], ["model.B"]),
    "U below 0": (["model.U=-1"], ["model.U = -1", "at least 0"]),
    "no features": (["model.features=0"], ["model.features = 0", "at least 1"]),
    "unknown norm": (["model.norm=group"], ["model.norm = 'group'", "batch, none"]),
    "sharing no truth value": (["model.weight_sharing=maybe"], ["model.weight_sharing", "maybe"]),
    "unknown clip": (["optim.clip=gently"], ["optim.clip = 'gently'", "value, norm, none"]),
    "unknown algorithm": (["optim.algorithm=lion"], ["optim.algorithm = 'lion'", "sgd, adam"]),
    "unknown schedule": (["optim.schedule=linear"], ["optim.schedule = 'linear'", "halve, cosine"]),
    "rate 0": (["optim.lr=0"], ["optim.lr = 0", "above 0"]),
    "rate no number": (["optim.lr=nan"], ["optim.lr = nan", "above 0"]),
    "rate infinite": (["optim.lr=inf"], ["optim.lr = inf", "finite"]),
    "theta 0": (["optim.theta=0"], ["optim.theta = 0", "above 0"]),
    "momentum 1": (["optim.momentum=1"], ["optim.momentum = 1", "below 1"]),
    "bn_average 1": (["optim.bn_average=1"], ["optim.bn_average = 1", "below 1"]),
    "bn_average below 0": (["optim.bn_average=-0.1"], ["optim.bn_average = -0.1", "at least 0"]),
    "two schedules": (
        ["optim=paper", "optim.halve_every_steps=5"],
        ["optim.halve_every_epochs", "optim.halve_every_steps", "give one of the two"],
    ),
    "no schedule": (
        ["optim=paper", "optim.halve_every_epochs=null"],
        ["optim.halve_every_epochs", "give one of the two"],
    ),
    "warm-up of another schedule": (
        ["optim.warmup_steps=5", "optim.scheduler={_target_: torch.optim.lr_scheduler.ConstantLR}"],
        ["optim.warmup_steps = 5", "optim.scheduler"],
    ),
    "bias rate with adam": (
        ["optim.algorithm=adam", "optim.bias_lr_mult=0.1"],
        ["optim.bias_lr_mult = 0.1", "optim.algorithm=sgd"],
    ),
    "scale below 2": (["data.scales=[1]"], ["data.scales = [1]", "at least 2"]),
    "scale below 2 among others": (["data.scales=[2,3,0]"], ["data.scales = [2, 3, 0]", "at least 2"]),
    "a scale twice": (["data.scales=[2,2]"], ["data.scales = [2, 2]", "different"]),
    "no scale": (["data.scales=[]"], ["data.scales = []"]),
    "a fractional scale": (["data.scales=[2.5]"], ["data.scales", "2.5"]),
    "validation scale below 2": (["data.val_scales=[1]"], ["data.val_scales = [1]", "at least 2"]),
    "scales no list": (["data.scales=2"], ["data.scales"]),
    "unknown augment": (["data.augment=mixup"], ["data.augment = 'mixup'", "offline, online"]),
    "patch below a kernel": (["data.patch_size=2"], ["data.patch_size = 2", "at least 3"]),
    "stride 0": (["data.stride=0"], ["data.stride = 0", "at least 1"]),
    "no batch": (["data.batch_size=0"], ["data.batch_size = 0", "at least 1"]),
    "workers below 0": (["data.num_workers=-1"], ["data.num_workers = -1", "at least 0"]),
    "no training set": (["data.train=[]"], ["data.train is empty"]),
    "no evaluation set": (["data.val=[]"], ["data.val is empty"]),
    "a training folder that is not there": (["data.train=[no/such/folder]"], ["data.train", "no/such/folder"]),
    "an evaluation folder that is not there": (["data.val=[Set5,no/such]"], ["data.val", "no/such"]),
    "sets of one name": (["data.val=[Set5,./Set5]"], ["data.val", "the same name"]),
    "steps 0": (["trainer.max_steps=0"], ["trainer.max_steps = 0", "at least 1"]),
    "epochs 0": (["trainer.max_epochs=0"], ["trainer.max_epochs = 0", "above 0"]),
    "accumulation that does not divide": (
        ["data.batch_size=10", "trainer.accumulate_grad_batches=4"],
        ["data.batch_size = 10", "trainer.accumulate_grad_batches = 4"],
    ),
    "steps no number": (["trainer.max_steps=many"], ["trainer.max_steps", "many"]),
    "unknown logger": (["logger.kind=tensorboard"], ["logger.kind = 'tensorboard'", "wandb, csv, none"]),
    "unknown mode": (["logger.mode=on"], ["logger.mode"]),
    "unknown artifacts": (["logger.artifacts=all"], ["logger.artifacts = 'all'", "none, weights, checkpoints"]),
    "seed below 0": (["seed=-1"], ["seed = -1", "at least 0"]),
    "seed too large": (["seed=4294967296"], ["seed = 4294967296", "below"]),
    "no checkpoint": (["ckpt_path=no.ckpt"], ["ckpt_path = 'no.ckpt'", "no such file"]),
    "no weights": (["init_from=no.safetensors"], ["init_from = 'no.safetensors'", "no such file"]),
    "unknown key": (["model.depth=20"], ["depth"]),
    "unknown key added": (["+model.depth=20"], ["model.depth"]),
    "unknown key at the top": (["+colour=true"], ["colour"]),
    "unknown key of optim": (["++optim.beta=0.9"], ["optim.beta"]),
    "unknown group": (["model=edsr"], ["edsr", "drrn_ns_c"]),
    "unknown group file": (["optim=sota"], ["sota", "release"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_refused_by_the_entry_point(
    case: str, entry_point: Callable, tiny_images: Path, tmp_path: Path
) -> None:
    arguments, said = WRONG[case]
    harmless = (*TINY, f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]")  # in case it is not refused
    code, out, err = entry_point("train", *harmless, *arguments, f"output={tmp_path / 'runs'}")
    assert code == 2, err
    assert "Traceback" not in out + err
    assert "\ntrain.py: " in f"\n{err}"
    for text in said:
        assert text in err
    assert not (tmp_path / "runs").exists()


def test_a_patch_larger_than_the_images_is_refused(entry_point: Callable, tiny_images: Path, tmp_path: Path) -> None:
    code, out, err = entry_point(
        "train", f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", "data.patch_size=500",
        f"data.patches={tmp_path}", f"output={tmp_path / 'runs'}", "logger=none",
    )  # fmt: skip
    assert code == 2
    assert "data.patch_size" in err
    assert "500" in err
    assert "Traceback" not in out + err


def test_a_folder_without_a_separator_that_is_not_there_is_refused(entry_point: Callable, tmp_path: Path) -> None:
    """It could be the name of a set."""
    code, out, err = entry_point("train", "data.train=[T92]", f"output={tmp_path / 'runs'}", "logger=none")
    assert code == 2
    assert "'T92'" in err
    assert "T91" in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    "name",
    [
        "logger", "callbacks", "default_root_dir", "gradient_clip_val", "limit_train_batches", "overfit_batches",
        "use_distributed_sampler", "reload_dataloaders_every_n_epochs", "num_sanity_val_steps",
    ],
)  # fmt: skip
def test_what_the_training_script_settles_itself_is_refused_as_a_trainer_argument(
    name: str, entry_point: Callable, tiny_images: Path, tmp_path: Path
) -> None:
    """Lightning's own clip value would silently be ignored, shorter epochs would not be resumed at their position,
    batches would be distributed twice; the other arguments are already passed."""
    code, out, err = entry_point(
        "train", f"data.train=[{tiny_images}]", f"data.patches={tmp_path / 'patches'}", "logger=none",
        f"output={tmp_path / 'runs'}", f"+trainer.{name}=1",
    )  # fmt: skip
    assert code == 2, err
    assert f"trainer.{name}" in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "patches").exists()  # before anything heavy starts


def test_an_argument_that_lightning_does_not_have_is_refused_before_the_data_is_built(
    entry_point: Callable, tiny_images: Path, tmp_path: Path
) -> None:
    code, _, err = entry_point(
        "train", f"data.train=[{tiny_images}]", f"data.patches={tmp_path / 'patches'}", "logger=none",
        f"output={tmp_path / 'runs'}", "+trainer.max_stepps=1",
    )  # fmt: skip
    assert code == 2
    assert "trainer.max_stepps" in err
    assert not (tmp_path / "patches").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("precision", "half"), ("accelerator", "abacus"), ("strategy", "alone"), ("devices", "zero")]
)
def test_a_trainer_value_that_lightning_refuses_is_refused_by_key(
    key: str, value: str, entry_point: Callable, tiny_images: Path, tmp_path: Path
) -> None:
    code, out, err = entry_point(
        "train", f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", "data.batch_size=2", "data.scales=[2]",
        f"output={tmp_path / 'runs'}", "logger=none", f"trainer.{key}={value}",
    )  # fmt: skip
    assert code == 2, err
    assert "trainer" in err
    assert value in err
    assert "Traceback" not in out + err


def test_the_real_process_exits_with_2_and_imports_nothing_heavy(tmp_path: Path) -> None:
    """One refusal as a user meets it, and the modules imported until then."""
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', 'model.B=0', 'output={tmp_path}/runs']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'src' / 'train.py')!r}, run_name='__main__')\n"
        "finally:\n"
        "    print('heavy:', sorted({'torch', 'lightning', 'wandb', 'h5py', 'numpy', 'scipy'} & set(sys.modules)))\n"
    )
    environment = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr == "train.py: model.B = 0: must be at least 1\n"
    assert done.stdout == "heavy: []\n"
    assert list(tmp_path.iterdir()) == []


def test_prepare_refuses_likewise(entry_point: Callable, tmp_path: Path) -> None:
    code, out, err = entry_point("prepare", "data.scales=[1]", f"output={tmp_path / 'runs'}")
    assert code == 2
    assert err.startswith("prepare.py: data.scales = [1]")
    assert "Traceback" not in out + err


# ---------------------------------------------------------------------- what is right


def test_every_documented_key_is_known_and_every_known_key_is_documented(configure: Callable) -> None:
    """conf/ and the dataclasses list the same keys."""
    config = configure(tiny=False)
    for group, name in (("model", "drrn"), ("data", "train291"), ("optim", "paper"), ("trainer", "default")):
        written = set(OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml")) - {"network"}
        written -= {"checkpointing", "compile", "cuda_graph"}  # earlier names of speed.*
        held = getattr(config, group)
        assert written == set(held if group == "model" else vars(held))
    top = set(OmegaConf.load(ROOT / "conf/config.yaml")) - {"defaults", "hydra"}
    kept = {"model", "data", "optim", "trainer", "logger", "trainer_extra", "logger_extra"}
    assert top - {"logger"} == {field.name for field in dataclasses.fields(Config)} - kept
    written = set(OmegaConf.load(ROOT / "conf/config.yaml").logger)
    assert written == {field.name for field in dataclasses.fields(config.logger)}


def test_every_key_says_what_it_means(configure: Callable) -> None:
    config = configure()
    for group in (config, ModelConfig, config.data, config.optim, config.trainer, config.logger, config.speed):
        for field in dataclasses.fields(group):
            assert dataclasses.is_dataclass(getattr(group, field.name, None)) or field.metadata["meaning"], field.name


def test_the_papers_numbers(configure: Callable) -> None:
    """Sec. 4.1 and 4.2, number by number."""
    config = configure("optim=paper", tiny=False)
    shape, paths = {"B": 1, "U": 9, "features": 128, "norm": "batch"}, {"weight_sharing": True, "multi_path": True}
    assert config.model.items() >= (shape | paths).items()
    assert (config.data.train, config.data.scales) == (["T91", "BSD200"], [2, 3, 4])
    assert (config.data.patch_size, config.data.stride, config.data.batch_size) == (31, 21, 128)
    assert (config.data.val, config.data.val_scales, config.data.augment) == (["Set5"], [3], "offline")
    optim = config.optim
    assert (optim.algorithm, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
    assert (optim.theta, optim.halve_every_epochs, optim.schedule) == (0.01, 10, "halve")
    assert (optim.residual_scale, optim.bn_average) == (1.0, 0.999)


def test_the_releases_solver_is_the_default(configure: Callable) -> None:
    assert configure("optim=release", tiny=False).optim == configure(tiny=False).optim
    optim = configure("optim=release", tiny=False).optim
    assert (optim.clip, optim.bias_lr_mult, optim.halve_every_steps, optim.halve_every_epochs) == (
        "norm",
        0.1,
        65_360,
        None,
    )
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.theta) == (0.1, 0.9, 1e-4, 0.01)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["model=drrn"], "DRRN_B1U9"),
        (["model.B=1", "model.U=25"], "DRRN_B1U25"),
        (["model=drrn_ns"], "DRRN_NS_B3U4"),
        (["model=drrn_c"], "DRRN_C_B3U4"),
        (["model=drrn_ns_c"], "DRRN_NS_C_B3U4"),
        (["model=vdsr"], "VDSR_d20_64f"),
        (["model=vdsr", "model.features=128", "model.B=27"], "VDSR_d28"),
        (["model.norm=none", "model.bias=false"], "DRRN_B1U9_noBN_nobias"),
    ],
)
def test_structures_have_the_papers_names(arguments: list[str], name: str, configure: Callable) -> None:
    assert structure_name(configure(*arguments, tiny=False).model) == name


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["model=srcnn"], "SRCNN"),
        (["model=srcnn", "model.middle=5", "model.features=32"], "SRCNN_middle5_32f"),
        (["model=fsrcnn", "data.scales=[3]", "data.val_scales=[3]"], "FSRCNN_x3"),
        (["model=drcn", "model.features=8"], "DRCN_8f"),  # and no training arguments
        (["model=resnet", "model.U=3", "model.norm=none"], "ResNet_U3_normnone"),
    ],
)
def test_other_networks_are_called_by_what_is_unusual_of_them(
    arguments: list[str], name: str, configure: Callable, tmp_path: Path
) -> None:
    config = configure(*arguments, f"output={tmp_path}", tiny=False)
    assert structure_name(config.model) == name
    digest = run_dir(config).name.rpartition("-")[2]
    assert run_dir(config).name == f"{name}_s1-{digest}"
    values = [f"{key}{value}" for key, value in config.model.items() if key != "network"]
    earlier = run_dir(config).with_name("_".join([config.model["network"].upper(), *values, f"s1-{digest}"]))
    earlier.mkdir(parents=True)
    assert run_dir(config) == earlier  # where it was before they had short names


def test_structures_that_differ_have_names_that_differ() -> None:
    base = vars(ModelConfig(B=2, U=3, features=128, norm="batch", bias=True, weight_sharing=True, multi_path=True))
    changes = [
        dict(), dict(B=3), dict(U=4), dict(U=0), dict(features=64), dict(norm="none"), dict(bias=False),
        dict(weight_sharing=False), dict(multi_path=False), dict(weight_sharing=False, multi_path=False),
        dict(rectified_identity=True), dict(input_relu=False),
    ]  # fmt: skip
    names = [structure_name(base | change) for change in changes]
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------------- where a run lives


def test_a_runs_folder_is_the_same_tomorrow_and_in_another_process(configure: Callable, tmp_path: Path) -> None:
    """Pinned: a changed digest would orphan every finished run. Change it only together with a note to users."""
    config = configure(tiny=False)
    assert run_dir(config) == run_dir(configure(tiny=False))
    assert run_dir(config).parent == Path("runs/main")
    assert run_dir(config).name.startswith("DRRN_B1U9_s1-")
    script = (
        "from hydra import compose, initialize_config_dir\n"
        "from drrn.config import check\n"
        "from drrn.identity import run_dir\n"
        f"with initialize_config_dir({str(ROOT / 'conf')!r}, version_base='1.3'):\n"
        "    print(run_dir(check(compose('config'))))\n"
    )
    environment = {"PYTHONPATH": str(ROOT / "src"), "DRRN_HOME": str(ROOT), "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.strip() == str(run_dir(config))


DIFFERENT = [
    "model.B=2", "model.U=3", "model.features=4", "model.norm=none", "model.bias=false",
    "model.weight_sharing=false", "model.multi_path=false", "data.scales=[3]", "data.patch_size=30",
    "data.stride=20", "data.batch_size=4", "data.augment=online", "optim.lr=0.2", "optim.clip=value",
    "optim.theta=0.1", "optim=quick", "trainer.max_steps=2", "trainer.precision=bf16-mixed",
    "trainer.accumulate_grad_batches=2", "seed=2", "study=other", "output=elsewhere", "name=mine",
    "+trainer.gradient_clip_val=1",
]  # fmt: skip
SAME = [
    "data.num_workers=1", "data.root=elsewhere", "data.patches=elsewhere", "logger=csv", "ckpt_path=last",
    "trainer.log_every_n_steps=7", "trainer.checkpoint_every=7", "trainer.accelerator=auto",
    "trainer.max_time=00:01:00:00",
]  # fmt: skip


def test_runs_that_differ_live_in_folders_that_differ(configure: Callable) -> None:
    folders = {change: run_dir(configure(change)) for change in ["seed=1", *DIFFERENT]}
    assert len(set(folders.values())) == len(folders)


@pytest.mark.parametrize("change", SAME)
def test_what_does_not_change_the_result_does_not_move_the_run(change: str, configure: Callable) -> None:
    """So a run can be resumed with other workers, on another machine, or with more time."""
    assert run_dir(configure(change)) == run_dir(configure())


def test_the_keys_of_our_solver_are_no_part_of_a_run_with_anothers(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    solver = ("+optim.optimiser={_target_: torch.optim.RAdam}", "optim.bias_lr_mult=1")
    config, other = (configure(*solver, *more, tiny=False) for more in ((), ("optim.momentum=0.5",)))
    assert run_dir(config) == run_dir(other)
    record = run_record(config, DRRN(1, 9))["config"]
    left_out = dataclasses.asdict(config)["optim"].keys() - record["optim"].keys()
    assert left_out == {"algorithm", "momentum", "weight_decay"}
    assert run_group(record, None) == run_group(dataclasses.asdict(other), None)  # an earlier record
    earlier = Path("runs/main/DRRN_B1U9_s1-57b86615")  # as ce47e4d named it
    earlier.mkdir(parents=True)
    assert run_dir(config) == earlier


def test_a_name_of_ones_own(configure: Callable) -> None:
    config = configure("name=my/run", "study=s")
    assert run_name(config) == "my/run"
    assert run_dir(config).parent == Path("runs/s")  # no further folder


def test_check_leaves_its_argument_alone() -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["+trainer.limit_test_batches=1"])
    before = OmegaConf.to_yaml(cfg)
    assert check(cfg).trainer_extra == {"limit_test_batches": 1}
    assert OmegaConf.to_yaml(cfg) == before


def test_a_refusal_in_a_multirun_comes_before_any_job(
    entry_point: Callable, tiny_images: Path, tmp_path: Path
) -> None:
    code, _, err = entry_point(
        "train", "-m", "model.B=1,0", f"data.train=[{tiny_images}]", f"output={tmp_path / 'runs'}", "logger=none"
    )
    assert code == 2
    assert "model.B = 0" in err
    assert "nothing has been started" in err
    assert not (tmp_path / "runs").exists()


def test_speed_changes_no_run_and_has_its_earlier_names(configure, capsys) -> None:
    plain = configure()
    assert (plain.speed.compile, plain.speed.checkpointing) == ("auto", False)
    for typed, speed in (
        ("speed.checkpointing=true", ("auto", True)),
        ("model.checkpointing=true", ("auto", True)),
        ("speed.compile=false", (False, False)),
        ("trainer.compile=true", (True, False)),
        ("trainer.cuda_graph=true", ("auto", False)),
    ):
        config = configure(typed)
        assert (config.speed.compile, config.speed.checkpointing) == speed
        assert (config.model, config.trainer) == (plain.model, plain.trainer)
        assert run_dir(config) == run_dir(plain)
    assert "cuda_graph was removed" in capsys.readouterr().err
    for wrong in ("model.checkpointing=often", "trainer.compile=often", "speed.compile=often"):
        with pytest.raises(UserError, match=f"{wrong.replace('=', ' = ').replace('often', '.often.')}: allowed are"):
            configure(wrong)
    with pytest.raises(UserError, match="a compiled network sees its own process"):
        configure("speed.compile=true", "trainer.sync_batchnorm=true")


def test_losses_and_solvers_are_part_of_a_run_where_they_are_not_the_usual_ones(configure) -> None:
    usual = run_dir(configure("optim.bias_lr_mult=1"))
    for other in (
        "optim.loss=l1",
        "optim.warmup_steps=100",
        "optim.algorithm=adamw",
        "optim.optimiser={_target_: torch.optim.RMSprop}",
        "optim.scheduler={_target_: torch.optim.lr_scheduler.ConstantLR}",
    ):
        assert run_dir(configure(other, "optim.bias_lr_mult=1")) not in (
            usual,
            run_dir(configure("optim.bias_lr_mult=1")),
        )
    with pytest.raises(UserError, match=r"optim\.loss = 'l2': allowed are euclidean, l1, charbonnier"):
        configure("optim.loss=l2")


def test_processes_are_another_experiment_where_they_share_out_what_batchnorm_sees(configure) -> None:
    """Like micro-batches; without BatchNorm, or with a synchronised one, they only change rounding."""

    def folder(*overrides: str) -> Path:
        return run_dir(configure(*overrides))

    assert folder("model.norm=batch", "trainer.devices=2") != folder("model.norm=batch")
    assert folder("model.norm=batch", "trainer.devices=[0]") == folder("model.norm=batch")
    assert folder("model.norm=none", "trainer.devices=2") == folder("model.norm=none")
    assert folder("model.norm=batch", "trainer.devices=2", "trainer.sync_batchnorm=true") == folder(
        "model.norm=batch", "trainer.sync_batchnorm=true"
    )
