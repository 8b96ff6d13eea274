"""`drrn.launch`: one process or one of several of torchrun or Slurm; folders without permissions; keys of sweeps."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drrn.launch import first_process, launched

KEYS = ("TORCHELASTIC_RUN_ID", "RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_NAME")


@pytest.mark.parametrize(
    ("environment", "one_of_several", "first"),
    [
        ({}, False, True),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, True, True),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1"}, True, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_JOB_NAME": "fig8"}, True, False),  # srun
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "fig8"}, False, True),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "fig8"}, False, True),  # salloc: a shell, and no srun in it
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "interactive"}, False, True),  # in a step of it
    ],
)
def test_srun_and_torchrun_start_several_and_salloc_does_not(
    environment: dict[str, str], one_of_several: bool, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert (launched(), first_process()) == (one_of_several, first)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("convert", ("input={}", "info=true")),
        ("train", ("init_from={}",)),
        ("train", ("output={}", "logger=none")),
        ("train", ("-m", "output={}", "plan=only", "model.B=1,2")),
    ],
)
def test_a_folder_without_rights_is_named_in_a_line(
    name: str, arguments: tuple[str, ...], entry_point: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a file in a folder without permission, Path.exists and the like raise."""
    stat = os.stat

    def refused(path: Any, *more: Any, **how: Any) -> os.stat_result:
        if str(path).startswith(f"{tmp_path}/closed/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *more, **how)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "stat", refused)
    code, out, err = entry_point(name, *(text.format(tmp_path / "closed/within") for text in arguments))
    assert code == 2, err
    assert f"{tmp_path}/closed/within" in err
    assert "Permission denied" in err
    assert "Traceback" not in out + err
    assert err.count("\n") == 1


@pytest.mark.parametrize("given", ["hydra.sweeper.points=[{seed: 2}]", "hydra/sweeper=search"])
def test_what_only_a_sweep_reads_is_refused_without_one(given: str, entry_point: Callable) -> None:
    code, _, err = entry_point("train", given, "plan=only")
    assert (code, err) == (2, f"train.py: {given}: this is no sweep; add -m\n")
