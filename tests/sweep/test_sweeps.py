"""Every shipped configuration is run for a step, with tiny networks and data: all files of conf/'s groups and of
sweeps/, later ones included."""

from __future__ import annotations

import csv
import re
import runpy
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

import train as entry
from drrn.config import check
from drrn.errors import UserError
from drrn.identity import run_dir, structure_name
from drrn.runs.record import FILE, read_record
from hydra_plugins.drrn_study import literal

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("model", "data", "optim", "trainer", "logger", "experiment", "budget")
SHIPPED = [(group, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]
SWEEPS = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))

# Overrides that make each take about a second: one step, few features, only this machine.
SMALL = (
    "model.features=2", "data.scales=[2]", "data.val_scales=[2]", "data.batch_size=2", "data.num_workers=0",
    "trainer.max_steps=1", "trainer.max_epochs=null", "trainer.max_time=null", "trainer.val_check_interval=9",
    "trainer.accumulate_grad_batches=1", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=1",
    "trainer.strategy=auto", "trainer.log_every_n_steps=1", "data.test=null", "data.test_metrics=null",
)  # fmt: skip


@pytest.fixture
def small(tiny_images: Path, tmp_path: Path) -> tuple[str, ...]:
    return (*SMALL, f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]", f"output={tmp_path}")


def points_of(name: str) -> list[dict]:
    """The points of a study."""
    return yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["points"]


def finished_runs(folder: Path) -> list[dict]:
    records = [read_record(path) for path in sorted(folder.rglob(FILE))]
    for record in records:
        assert record["status"] == "finished"
        assert record["budget"]["steps"] == 1
        assert {row["image"] for row in record["scores"]} == {"camera.png", "chelsea.png"}
    return records


@pytest.mark.parametrize(("group", "name"), SHIPPED, ids=[f"{group}={name}" for group, name in SHIPPED])
def test_every_configuration_trains_for_a_step(
    group: str, name: str, entry_point: Callable, small: tuple[str, ...], tmp_path: Path
) -> None:
    if name == "mlflow":
        pytest.importorskip("mlflow", reason="MLflow is not in requirements.lock")
    logger = () if group == "logger" else ("logger=none",)
    plus = "+" if group == "budget" else ""  # a budget is in no defaults list, so it is added
    code, _, err = entry_point("train", f"{plus}{group}={name}", *logger, *small)
    assert code == 0, err
    (record,) = finished_runs(tmp_path)
    as_written = yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())
    if group in ("model", "optim"):  # the record has the file's values
        ran = {"network": "drrn", **record["config"][group]}  # a DRRN's record has no `network`
        kept = {key: value for key, value in as_written.items() if "${" not in str(value)}
        for key in ("defaults", "features", "checkpointing"):
            kept.pop(key, None)
        assert {key: ran[key] for key in kept} == kept


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/debug").glob("*.yaml")))
def test_every_debug_preset_trains_for_a_step(
    name: str, entry_point: Callable, small: tuple[str, ...], tmp_path: Path
) -> None:
    code, out, err = entry_point("train", f"debug={name}", "logger=none", *small)
    assert code == 0, err
    records = [read_record(path) for path in tmp_path.rglob(FILE)]
    if name == "fdr":
        assert "nothing of it is kept" in out
        assert list(tmp_path.iterdir()) == []
        code, _, err = entry_point("train", "-m", f"debug={name}", *small)
        assert code == 2
        assert "trainer.fast_dev_run leaves no record" in err
        assert list(tmp_path.iterdir()) == []
        return
    assert [(record["status"], record["study"]) for record in records] == [("finished", "debug")]
    limited = {"camera.png"} if name != "overfit" else {"camera.png", "chelsea.png"}
    assert {row["image"] for row in records[0]["scores"]} == limited
    if name == "profiler":
        (log,) = tmp_path.rglob("train.log")
        for text in (err, log.read_text()):
            assert text.count("FIT Profiler Report") == 1
            assert "run_training_batch" in text


@pytest.fixture(scope="module")
def shared_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of all studies, so that a network of two studies is trained once."""
    return tmp_path_factory.mktemp("studies")


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_runs_each_of_its_points(
    name: str, entry_point: Callable, small: tuple[str, ...], shared_output: Path
) -> None:
    points = points_of(name)
    already = len(finished_runs(shared_output))
    code, out, err = entry_point(
        "train", f"sweeps={name}", "logger=none", *small, f"output={shared_output}", "plan=none"
    )
    assert code == 0, out + err
    records = finished_runs(shared_output)
    assert len(records) == already + len(points) - out.count("skipped")  # none is lost, none is another's run
    assert f"{len(points)} of {len(points)} runs done" in out
    assert out.count("skipped") == {"fig6": 1, "fig8": 3, "table2": 2, "table4": 4}.get(
        name, 0
    )  # what an earlier study has trained
    for point in points:
        made_small = {argument.partition("=")[0] for argument in small}
        wanted = {key: value for key, value in point.items() if key.startswith("model.") and key not in made_small}
        assert any(
            all(record["config"]["model"].get(key.removeprefix("model.")) == value for key, value in wanted.items())
            for record in records
        ), point


def as_shipped(*overrides: str) -> object:
    """A shipped configuration without the tiny overrides, composed and checked, not run."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return check(compose("config", list(overrides)))


@cache
def points_as_shipped(name: str) -> list:
    return [
        as_shipped(f"sweeps={name}", *(f"{key}={literal(value)}" for key, value in point.items()))
        for point in points_of(name)
    ]


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_right_as_it_is_shipped(name: str) -> None:
    """With its own budget and data, every point passes the checks and has a folder of its own."""
    configs = points_as_shipped(name)
    assert len({run_dir(config) for config in configs}) == len(configs)
    assert {config.study for config in configs} == {name}


@pytest.mark.parametrize("budget", ["cpu", "gpu", "paper"])
def test_every_network_of_fig1_takes_the_loss_of_every_budget(budget: str) -> None:
    from drrn.losses import loss_of
    from drrn.networks import on_paper

    for point in points_of("fig1"):
        config = as_shipped("sweeps=fig1", f"+budget={budget}", *(f"{k}={literal(v)}" for k, v in point.items()))
        loss_of(on_paper(config.model), config.optim.loss)


@pytest.mark.parametrize(("name", "table"), [("fig6", "fig6"), ("fig8", "fig8"), ("table4", "table4")])
def test_a_papers_study_holds_the_papers_points(name: str, table: str) -> None:
    """Structures and depths of data/paper/; a VDSR has no B and U there, only a depth."""
    if name not in SWEEPS:
        pytest.skip(f"sweeps/{name}.yaml does not exist yet")
    with (ROOT / "data" / "paper" / f"{table}.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if "does not name it" not in row.get("note", "")]
    expected = set()
    for row in rows:
        method = row.get("method") or "DRRN"
        if name == "fig8" and method == "DRRN_NS_C":
            continue  # the caption's name; Sec. 4.5 compares DRRN with chains of "the same parameter number"
        expected.add(f"VDSR_d{row['depth']}" if method == "VDSR" else f"{method}_B{row['B']}U{row['U']}")
    configs = points_as_shipped(name)
    assert {structure_name(config.model) for config in configs} == expected
    for config in configs:
        assert config.model["features"] == 128
        assert (config.data.train, config.data.scales) == (["T91", "BSD200"], [2, 3, 4])


@pytest.mark.parametrize(
    "path",
    [*(ROOT / "conf").glob("*/*.yaml"), *(ROOT / "conf").glob("hydra/*/*.yaml"), *(ROOT / "sweeps").glob("*.yaml")],
    ids=lambda p: p.stem,
)
def test_every_file_opens_with_what_it_is_and_how_to_run_it(path: Path) -> None:
    """The commands in the headers can be composed."""
    head = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    commands = [line for line in head if re.match(r"#   python src/(train|prepare)\.py", line)]
    assert commands, f"{path} names no command"
    for command in commands:
        words = shlex.split(re.split(r"\s{2,}\(", command.removeprefix("#").strip())[0], comments=True)
        overrides = [word for word in words[2:] if word != "-m"]
        overrides = [re.sub(r"=([^\[\],]+),.*$", r"=\1", word) for word in overrides]  # the first of a choice
        try:
            as_shipped(*overrides)
        except UserError as error:
            if not str(error).startswith("data.train: the folder"):  # of images that users add by hand
                raise


def agents_command(path: Path, point: int = 0) -> list[str]:
    """`wandb agent`'s command for one point of a sweep file, by W&B's own functions."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load(path.read_text())
    chosen = {}
    for key, spec in sweep["parameters"].items():
        values = spec.get("values", [spec.get("value")])
        chosen[key] = {"value": values[point if key == "hydra.sweeper.points" else 0]}
    known = create_sweep_command_args({"args": chosen})
    known |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    command: list[str] = []
    for word in create_sweep_command(sweep["command"]):
        command += known[word[2:-1]] if word.startswith("${") else [word]
    return command


@pytest.mark.parametrize("name", SWEEPS)
def test_a_wandb_queue_holds_the_points_of_its_study(name: str) -> None:
    """The file equals the output of `make queues`; its points are parsed by Hydra's command-line parser."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    path = ROOT / "sweeps" / "wandb" / f"{name}.yaml"
    assert path.read_text() == runpy.run_path(str(path.with_name("make.py")))["queue"](name)
    key = "hydra.sweeper.points="
    points = []
    for index in range(len(points_of(name))):
        (override,) = (word for word in agents_command(path, index) if word.startswith(key))
        parsed = OverridesParser.create().parse_override(override)
        assert not parsed.is_sweep_override()
        points += parsed.value()
    assert points == points_of(name)


def test_a_wandb_agents_command_trains_one_point(
    entry_point: Callable, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last point, with the environment of an agent, but offline."""
    env, interpreter, program, *overrides = agents_command(ROOT / "sweeps/wandb/table4.yaml", -1)
    assert (env, interpreter, ROOT / program) == ("/usr/bin/env", "python", ROOT / "src" / "train.py")
    assert "logger.mode=online" in overrides
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc12345")
    monkeypatch.setenv("WANDB_RUN_ID", "run54321")
    code, out, err = entry_point("train", *overrides, "logger=none", *small)
    assert code == 0, out + err
    (record,) = finished_runs(tmp_path)
    assert record["structure"]["name"] == structure_name(points_as_shipped("table4")[-1].model) + "_2f"
    assert record["study"] == "table4"
    assert record["wandb_id"] == "run54321"  # the run that the server knows, not one of ours


# ---------------------------------------------------------------------- the sweeper


def jobs_of(*arguments: str, points: list[dict] | None = None) -> list[list[str]]:
    """The overrides of the jobs that the sweeper would start."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import HydraContext, RunMode

    loader = ConfigLoaderImpl(create_config_search_path(str(ROOT / "conf")))
    from hydra_plugins.drrn_study import StudySweeper  # after Hydra's search for plugins, which imports them anew

    sweeper = StudySweeper(points=points)
    config = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
    sweeper.setup(
        hydra_context=HydraContext(config_loader=loader, callbacks=None),
        task_function=entry.main,
        config=config,
    )
    return sweeper.jobs(list(arguments))


def test_choices_on_the_command_line_are_a_grid() -> None:
    assert {tuple(sorted(job)) for job in jobs_of("model.B=1,3", "model.U=9,25")} == {
        ("model.B=1", "model.U=9"), ("model.B=1", "model.U=25"), ("model.B=3", "model.U=9"),
        ("model.B=3", "model.U=25"),
    }  # fmt: skip


def test_points_are_multiplied_by_the_command_line_and_give_way_to_it() -> None:
    points = [{"model.B": 1, "model.U": 2}, {"model.B": 3, "name": None}]
    assert {tuple(sorted(job)) for job in jobs_of("seed=1,2", points=points)} == {
        ("model.B=1", "model.U=2", "seed=1"), ("model.B=1", "model.U=2", "seed=2"),
        ("model.B=3", "name=null", "seed=1"), ("model.B=3", "name=null", "seed=2"),
    }  # fmt: skip
    jobs = {tuple(sorted(job)) for job in jobs_of("model.U=7", points=points[:1])}
    assert jobs == {("model.B=1", "model.U=7")}


@pytest.mark.parametrize(
    "value",
    [
        True,
        None,
        0.5,
        1e-4,
        7,
        "text",
        "null",
        "1",
        "",
        [2, 3],
        ["a b", None],
        "a=b, [c]",
        "it's",
        "/a/b c.png",
        "grüße",
        {"a": 1},
    ],
)
def test_a_points_value_of_any_kind_reaches_the_configuration(value: object) -> None:
    """Values are quoted for Hydra's grammar, which parses None, commas and brackets specially."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    ((override,),) = jobs_of(points=[{"model.x": value}])
    parsed = OverridesParser.create().parse_override(override)
    assert not parsed.is_sweep_override()
    assert parsed.value() == value


def test_runs_that_are_the_same_are_run_once_and_ranked_wherever_hydra_goes(
    entry_point: Callable, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are relative to the command's directory; the closing table has the best first."""
    monkeypatch.chdir(tmp_path)
    code, out, err = entry_point(
        "train", "-m", "model.B=1,2,1", "model.U=0", "logger=none", *small, "output=here", "hydra.job.chdir=true"
    )
    assert code == 0, out + err
    records = finished_runs(tmp_path / "here")
    assert len(records) == 2
    table = out.split("Outcome")[1]
    assert "2 of 2 runs done" in table
    assert "python src/report.py runs=here/main" in table
    for record in records:
        (mean,) = record["means"]
        (line,) = (line for line in table.splitlines() if record["structure"]["name"] in line)
        psnr, gain = line.replace("−", "-").split()[2:4]
        assert (psnr, float(gain)) == (f"{mean['psnr']:.2f}", round(mean["psnr"] - mean["bicubic_psnr"], 2))
    best = max(records, key=lambda record: record["means"][0]["psnr"])["structure"]["name"]
    assert table.index(best) == table.index("VDSR")
    assert {path.name for path in tmp_path.iterdir()} == {"here"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hydra.sweeper.max_batch_size=0"], ["hydra.sweeper.max_batch_size", "0", "at least 1"]),
        (["hydra.sweeper.max_batch_size=few"], ["hydra.sweeper.max_batch_size", "few"]),
        (["hydra.sweeper.points=[]"], ["hydra.sweeper.points"]),
        (["hydra.sweeper.points=[3]"], ["hydra.sweeper.points"]),
        (["hydra/launcher=machine", "hydra.launcher.n_jobs=0"], ["hydra.launcher.n_jobs", "0"]),
        (["name='${'"], ["name"]),
        (["name='${nothing}'"], ["nothing"]),
        (["hydra.sweeper.points=[{name: '${'}]"], ["name"]),
        (["model.U=-3"], ["model.U", "-3", "nothing has been started"]),
        (["optim.lr=interval(0.1,1)"], ["optim.lr=interval(0.1,1)", "hydra/sweeper=search"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_a_sweep_cannot_be_is_said_in_a_line(
    overrides: list[str], said: list[str], entry_point: Callable, small: tuple[str, ...], tmp_path: Path
) -> None:
    code, out, err = entry_point("train", "-m", "model.B=1,2", "logger=none", *small, *overrides)
    assert code == 2, out + err
    assert "Traceback" not in err
    assert "Error in call" not in err
    for words in said:
        assert words in err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- a search


def test_a_search_without_optuna_says_what_to_install(entry_point: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "optuna" in name else real(name, *a))
    code, out, err = entry_point("train", "-m", "hydra/sweeper=search")
    assert (code, out, err) == (2, "", "train.py: hydra/sweeper=search needs Optuna: pip install '.[optuna]'\n")


def test_a_search_is_resumed_trial_by_trial(entry_point: Callable, small: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="Optuna is in the extra `optuna`")
    words = ("train", "-m", "hydra/sweeper=search", *small, "optim=quick", "model.B=1", "model.U=0", "logger=none")
    for trials in (2, 3):
        code, out, err = entry_point(*words, f"hydra.sweeper.n_trials={trials}")
        assert code == 0, out + err
        records = finished_runs(tmp_path)
        assert len(records) == trials
        best = max(record["means"][0]["psnr"] for record in records)
        assert out.splitlines()[-1].startswith(f"{best:.2f} dB: optim.lr=")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("model.B=0", "model.B = 0: must be at least 1 (in the job "),
        ("model.B=choice(1,0)", "model.B = 0: must be at least 1 (in the job "),
        ("debug=fdr", "trainer.fast_dev_run leaves no record"),
        ("plan=only", "plan = only: the trials"),
        ("hydra.sweeper.direction=[maximize,minimize]", "hydra.sweeper.direction = ['maximize', 'minimize']"),
        ("hydra.sweeper.direction=minimize", "hydra.sweeper.direction = minimize: a trial returns its PSNR"),
        ("sweeps=fig8", "hydra.sweeper.points: a search chooses its points itself"),
    ],
)
def test_a_search_is_refused_before_its_first_trial(
    wrong: str, said: str, entry_point: Callable, small: tuple[str, ...], tmp_path: Path
) -> None:
    if not said.startswith("hydra.sweeper"):
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="Optuna is in the extra `optuna`")
    code, out, err = entry_point("train", "-m", "hydra/sweeper=search", *small, "model.U=0", "logger=none", wrong)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_what_a_sweeper_maximises_is_the_psnr_of_the_finished_run(
    configure: Callable, tmp_path: Path, make: Callable
) -> None:
    from drrn.disk import write_json
    from drrn.sweep.outcome import scores_of

    config = configure("data.val=[Set5]", "data.val_scales=[3]", "data.scales=[3]", f"output={tmp_path}")
    assert scores_of(config) == {}
    for status, expected in (("stopped", None), ("finished", 31.5)):
        write_json(run_dir(config) / FILE, make(psnr=31.5, status=status))
        assert scores_of(config).get("psnr") == expected
