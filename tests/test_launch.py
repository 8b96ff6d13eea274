"""`drrn.launch`: whether this process is one of several that somebody else started."""

from __future__ import annotations

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
