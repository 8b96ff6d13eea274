"""`--help`, and the answers of commands to unknown keys, groups and values."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable

import pytest

from drrn.command_line import COMMANDS, launch
from drrn.help import script


@pytest.mark.parametrize("name", COMMANDS)
def test_help_opens_with_a_sentence_and_two_examples(name: str, entry_point: Callable) -> None:
    code, out, err = entry_point(name, "--help")
    assert (code, err) == (0, "")
    about, _, keys = out.partition("Keys (key=value")
    assert about.split("\n")[0].endswith((".", ":"))
    assert about.count(f"python src/{name}.py") >= 2
    lines = [line for line in keys.splitlines() if line.startswith("  ")]
    assert len(lines) > 5
    silent = {line.strip().partition("=")[0] for line in lines if "  # " not in line}
    assert silent <= {"trainer.compile", "trainer.cuda_graph"}  # earlier names
    assert ("Groups" in out) == (name in ("train", "prepare"))
    assert "hydra." not in keys
    assert name != "prepare" or all(line.startswith("  data.") for line in lines)


def test_commands_are_named_as_they_were_typed(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["drrn report", "--help"])
    launch(importlib.import_module("report").main)
    out = capsys.readouterr().out
    assert "    drrn report study=fig6\n" in out
    assert "python src" not in out
    assert script("train") == "drrn train"
    monkeypatch.setattr(sys, "argv", ["src/report.py"])
    assert script("train") == "python src/train.py"


def test_help_shows_what_overrides_make_of_it(entry_point: Callable) -> None:
    out = entry_point("train", "--help", "model=vdsr", "optim=quick")[1]
    assert "model.B=19" in out
    assert "optim.schedule=cosine" in out
    out = entry_point("train", "--help", "model=srcnn", "data.scales=[3]")[1]
    assert "model.features=64                 # filters of the first layer" in out  # not DRRN's


@pytest.mark.parametrize(
    ("name", "argument", "words"),
    [
        ("train", "modle.B=1", ["modle.B", "did you mean model.B?"]),
        ("train", "model.b=1", ["model.b", "did you mean model.B?"]),
        ("train", "optm=quick", ["optm", "did you mean optim?"]),
        ("train", "optim=realease", ["paper, quick, release", "did you mean release?"]),
        ("train", "trainer.precison=16-mixed", ["did you mean trainer.precision?"]),
        ("train", "seed=1,2", ["add -m"]),
        ("train", "ckpt_path=epoch=3-step=40.ckpt", ["""'ckpt_path="epoch=3-step=40.ckpt"'"""]),
        ("train", "budget=gpu", ["+budget=gpu"]),
        ("train", "+callbacks=ema", ["replaced by callbacks=ema"]),
        ("train", "--max_steps=3", ["--max_steps=3: keys are given as KEY=VALUE, such as model.B=3"]),
        ("train", "callbacks=[ema,tmer]", ["allowed are", "did you mean timer?"]),
        ("train", "model.B=1,", ["without a space"]),
        ("train", "data.val=Set5", ["data.val=[Set5]"]),
        ("train", "help", ["model.B=3"]),
        ("report", "fig6", ["study=fig6"]),
        ("upscale", "input=photo (1).png", ["""'input="photo (1).png"'"""]),
        ("upscale", "inptu=photo.png", ["did you mean input?"]),
        ("upscale", "photo.png", ["input=FILE"]),
        ("evaluate", "set=[Set5]", ["did you mean sets?"]),
    ],
)
def test_a_slip_is_answered_in_one_line(name: str, argument: str, words: list[str], entry_point: Callable) -> None:
    code, out, err = entry_point(name, argument)
    assert (code, out) == (2, "")
    assert err.startswith(f"{name}.py: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_group_that_is_added_is_not_blamed_for_another_slip(entry_point: Callable) -> None:
    assert entry_point("train", "+budget=cpu", "sead=1")[2].startswith("train.py: sead: there is no such key")


def test_a_key_of_another_network_is_not_proposed(entry_point: Callable) -> None:
    err = entry_point("train", "model=srcnn", "model.B=2")[2]
    assert err.startswith("train.py: model.B: there is no such key")
    assert "did you mean model.B" not in err


def test_the_word_for_several_values_may_stand_anywhere(entry_point: Callable) -> None:
    code, _, err = entry_point("train", "model.B=1,0", "-m", "model.U=1")
    assert code == 2
    assert "model.B = 0" in err


def test_what_the_answer_says_to_type_works(entry_point: Callable) -> None:
    """The quoting that is proposed reaches the command as the user's file name."""
    rest = ("scale=2", "method=bicubic", "output=b.png")
    (typed,) = shlex.split(entry_point("upscale", "input=it's (1).png", *rest)[2].partition("once more, ")[2])
    err = entry_point("upscale", typed, *rest)[2]
    assert "it's (1).png" in err
    assert "quote" not in err
