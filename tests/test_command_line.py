"""The command `drrn` and the package of `pip install .`: complete, and usable in any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import skimage.data
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from drrn.command_line import COMMANDS, plain_words
from drrn.config import ModelConfig
from drrn.model import DRRN
from drrn.photos.plan import Options
from drrn.weights.ours import save_weights

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("photo.jpg|--compare|-x|2", {"input": "photo.jpg", "scale": "2", "compare": True}),
        ("a.png|--self-ensemble|--quality|80", {"input": "a.png", "self_ensemble": True, "quality": "80"}),
        ("photo.jpg|-x|2", {"input": "photo.jpg", "scale": "2"}),
        ("a (1).png|-x|2.5|-o|b, c's.png", {"input": "a (1).png", "scale": "2.5", "output": "b, c's.png"}),
        ("a.png|b=c.png|-x|3|--output|x", {"input": "a.png", "b": "c.png", "scale": "3", "output": "x"}),
        ("a\\b.png|c\\'d\\", {"input": ["a\\b.png", "c\\'d\\"]}),
        ("Ça [x=2] (1).png|-x|2|-o|a=b.png", {"input": "Ça [x=2] (1).png", "scale": "2", "output": "a=b.png"}),
        ("x=3.png|here=1.png|-x|2", {"x": "3.png", "input": "here=1.png", "scale": "2"}),
        ("input=[a.png]|scale=2|--help", {"input": ["a.png"], "scale": 2}),
        (
            "-x.png|-x2|--output=a b.png|--compare=false",
            {"input": "-x.png", "scale": "2", "output": "a b.png", "compare": False},
        ),
        (f"input=[{'long' * 99}.png]|-x=2", {"input": [f"{'long' * 99}.png"], "scale": "2"}),
    ],
)
def test_plain_words_are_keys(words: str, expected: dict[str, object], tmp_path: Path, monkeypatch) -> None:
    """By Hydra's own parser, which parses them next; a file that exists is no key."""
    for name in ("here=1.png", "-x.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    made = [word for word in plain_words(words.split("|"), Options) if word != "--help"]
    parsed = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(made)}
    assert {key: [*map(str, v)] if isinstance(v, list) else v for key, v in parsed.items()} == expected


def test_a_slip_in_an_option_is_left_to_hydra() -> None:
    """Not `output=utput=b.png`."""
    assert plain_words(["-output=b.png", "-cd"], Options) == ["-output=b.png", "-cd"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as installed by `pip install .`, without its dependencies (which are installed here)."""
    folder, pip = tmp_path_factory.mktemp("installed"), [sys.executable, "-m", "pip", "--quiet"]
    clone = tmp_path_factory.mktemp("clone") / "drrn"  # a build writes beside the sources
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    model = vars(ModelConfig(1, 1, 4, norm="none", bias=True, weight_sharing=True, multi_path=True))
    save_weights(clone / "data/weights/STANDIN.safetensors", DRRN(1, 1, 4, norm="none"), model, {"scales": [2]})
    means = [{"set": "Set5", "scale": scale, "psnr": 99.0} for scale in (2, 3, 4)]  # the best of what is there
    (clone / "data/weights/STANDIN.json").write_text(json.dumps({"means": means}))
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, clone], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_the_installed_package_is_whole(installed: Path) -> None:
    shipped = (".yaml", ".csv", ".json", ".safetensors")
    for name in ("conf", "sweeps", "data/paper", "data/weights"):
        ours = {p.relative_to(ROOT / name) for p in (ROOT / name).rglob("*") if p.suffix in shipped}
        ours -= {p for p in ours if name == "sweeps" and p.parts[0] == "wandb"}  # made for a clone
        assert ours or name == "data/weights"
        assert ours <= {p.relative_to(installed / "drrn" / name) for p in (installed / "drrn" / name).rglob("*")}
    modules = {p.relative_to(ROOT / "src") for p in (ROOT / "src").rglob("*.py") if p.parent != ROOT / "src"}
    assert modules <= {p.relative_to(installed) for p in installed.rglob("*.py")}
    assert {p.stem for p in (installed / "drrn/commands").glob("*.py")} == set(COMMANDS)


def test_the_installed_command_works_in_any_folder(installed: Path, tmp_path: Path) -> None:
    def drrn(*words: str, code: int = 0) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DRRN_")}
        environment |= {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        script = "import sys; from drrn.command_line import main; sys.argv[0] = 'drrn'; main()"
        done = subprocess.run(
            [sys.executable, "-c", script, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert all(f"drrn {name}" in drrn() for name in COMMANDS)
    assert "no command 'upscal'; did you mean upscale?" in drrn("upscal", code=2)
    assert "model.B" in drrn("train", "model.B=0", code=2)
    said = drrn("train", "sweeps=table4", "+budget=cpu", "seed=1,-1", code=2)
    assert "sweeps=table4 +budget=cpu seed=-1; nothing has been started" in said  # both files are found
    said = drrn("evaluate", "method=bicubic", "sets=[demo_test]", "scales=[3]", "output=scores.json")
    assert "29.65" in said
    Image.fromarray(skimage.data.coffee()[:40, :60]).save(tmp_path / "photo (1).jpg")
    drrn("upscale", "photo (1).jpg", "-x", "2", "compare=true")  # with the shipped network
    with Image.open(tmp_path / "photo (1)_x2.png") as big:
        assert big.size == (120, 80)
    assert "STANDIN" in (tmp_path / "photo (1)_x2.png.html").read_text()
    assert not (tmp_path / "data").exists()  # downloads go to the user's cache
