"""docs/drrn.ipynb: every cell runs, with a training of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from skimage.metrics import peak_signal_noise_ratio

import drrn
import started

NOTEBOOK = Path(drrn.__file__).parents[2] / "docs/drrn.ipynb"


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(NOTEBOOK.parents[1] / "src"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "src").symlink_to(NOTEBOOK.parents[1] / "src")
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setattr("subprocess.run", started.run)
    names: dict[str, Any] = {}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        source = "".join(cell["source"])
        exec(compile(source.replace("steps = 600", "steps = 6"), NOTEBOOK.name, "exec"), names)
    said = capsys.readouterr().out
    assert "DRRN_B1U25: 52 layers, 297,216 convolution weights" in said
    assert "finished: " in said
    assert len(names["curve"]) == 3
    y = names["y"]
    bicubic, ours = (peak_signal_noise_ratio(y["truth"], y[name]) for name in ("bicubic", "DRRN"))
    assert f"bicubic  {bicubic:.2f} dB" in said
    assert f"DRRN     {ours:.2f} dB" in said
    assert ours > bicubic + 0.3
    assert [figure.get_axes()[0].has_data() for figure in map(plt.figure, plt.get_fignums())] == [True] * 3
    plt.close("all")
