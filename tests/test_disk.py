"""`drrn.disk`: paths are checked before they are read or written; the start of an entry point (`drrn.launch`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from drrn.disk import check_output, check_regular, write_json, write_whole
from drrn.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("path", "folder", "said"),
    [
        (".", False, "name a file"),
        ("/", False, "name a file"),
        ("..", False, "name a file"),
        ("there", False, "is a folder"),
        ("file", True, "is no folder"),
        ("file/below", False, "cannot be written there: Not a directory"),
        ("file/below/deep", True, "cannot be written there: Not a directory"),
        ("x" * 300, False, "300 bytes"),
        ("new/" + "×" * 130 + "/deep", True, "260 bytes"),
        ("/proc/new", False, "cannot be written there"),
        ("/proc/new/deep", True, "cannot be written there"),
        ("pipe", False, "no regular file"),
        ("loop/file", False, "cannot be written there"),
        ("a\0b", False, "name a file"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    path: str, folder: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=said) as refusal:
        check_output("output", Path(path), folder)
    assert "output" in str(refusal.value)
    if path.startswith("file"):  # and it is so
        with pytest.raises(UserError):
            write_whole(Path(path) / "in it" if folder else Path(path), lambda partial: partial.write_text("new"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "loop", "pipe", "there"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("path", ["new.json", "a/b/c.json", "file", "×" * 127, "there/in it"])
def test_what_can_be_written_is_not_refused_and_nothing_is_left(path: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("old")
    check_output("output", tmp_path / path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "there"]
    write_whole(tmp_path / path, lambda partial: partial.write_text("new"))
    assert (tmp_path / path).read_text() == "new"
    check_output("output", tmp_path / "there", folder=True)


def test_what_is_read_is_a_regular_file_of_a_sane_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "file").write_bytes(bytes(100))
    for path, said in (
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "link", "no regular file"),
        (tmp_path, "no regular file"),
        (Path("/dev/zero"), "no regular file"),
        (tmp_path / "none", "cannot be read"),
        (tmp_path / "file", "100 bytes"),
    ):
        with pytest.raises(UserError, match=said) as refusal:
            check_regular(path, 99)
        assert str(path) in str(refusal.value)
    assert check_regular(tmp_path / "file", 100) == 100


def test_names_that_are_no_text_are_kept_in_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xce\xb3.png")
    write_json(tmp_path / "a.json", {"image": name, "γ": 1})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "γ" in text
    assert json.loads(text)["image"] == name


def test_a_clean_up_that_fails_does_not_hide_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written"):
        write_whole(tmp_path / "file" / "below", lambda partial: partial.write_text(""))


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_the_characters_gets_others(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from drrn.launch import launch; launch(lambda: print('×2 → γ'))"],
        capture_output=True, timeout=60, env={"PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).strip() == {"latin-1": "×2 ? ?", "ascii": "?2 ? ?"}[encoding]


def test_paths_count_from_where_the_command_was_given(
    entry_point: Callable, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = entry_point(
        "evaluate", "method=bicubic", f"sets=[{tiny_images}]", "scales=[2]", "output=scores.json",
        "hydra.job.chdir=true", "hydra.run.dir=elsewhere", "workers=1",
    )  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "scores.json").is_file()
