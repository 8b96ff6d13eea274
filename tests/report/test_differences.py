"""Paired differences over images: the interval against SciPy's and a plain loop, the table by hand."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import bootstrap

from drrn.report.differences import differences_table, interval, most_images
from drrn.report.measurements import MISSING
from drrn.report.studies import run_groups


def scored(record: dict, gain: float, images: int = 100, set_name: str = "BSD100") -> dict:
    """A record with scores of a set: images that differ by 2 dB, a network better by `gain`."""
    of_set = [random.Random(k).gauss(27, 2) for k in range(images)]
    noise = random.Random(str(record["structure"]) + str(record["seed"]))
    rows = [{"set": set_name, "scale": 3, "image": f"{k}.jpg", "psnr": psnr + gain + noise.gauss(0, 0.05)}
            for k, psnr in enumerate(of_set)]  # fmt: skip
    return record | {"scores": record["scores"] + rows}


def test_the_interval_is_scipys() -> None:
    rng = np.random.default_rng(3)
    images = rng.normal(27, 2, 100)
    a, b = images + rng.normal(0.03, 0.1, 100), images
    low, high = interval(a - b)
    theirs = bootstrap(
        (a, b), lambda a, b, axis: np.mean(a - b, axis=axis), paired=True, method="percentile", random_state=1
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(theirs), abs=0.001)  # of an interval of 0.04
    plain = random.Random(5)
    means = sorted(sum(plain.choices(list(a - b), k=100)) / 100 for _ in range(4000))
    assert (low, high) == pytest.approx((means[100], means[3899]), abs=0.0015)
    assert low < np.mean(a - b) < high
    assert interval(a - b) == (low, high)
    wide = interval(rng.permutation(a) - b)  # unpaired, it includes the images' 2 dB
    assert wide[1] - wide[0] > 5 * (high - low)


def test_table(make: Callable) -> None:
    """DRRN_NS is better than VDSR, DRRN and DRRN_NS are not distinguished; the paper's differences beside them."""
    base = ("model.B=3", "model.U=4")
    runs = []
    for seed in (1, 2):
        runs.append(scored(make(*base, f"seed={seed}"), 0.30))
        runs.append(scored(make(*base, "model.weight_sharing=false", f"seed={seed}"), 0.30))
        runs.append(scored(make("model.B=27", "model.U=0", f"seed={seed}"), 0.0))
    (group,) = run_groups("table4", runs)
    assert most_images(group) == ("BSD100", 3)
    table = differences_table(group)
    rows = {row[0]: row[1:] for row in table.rows}
    assert set(rows) == {"DRRN_NS_B3U4_2f − VDSR_d28_2f", "DRRN_B3U4_2f − DRRN_NS_B3U4_2f"}
    what, gain, between, spread, paper, order = rows["DRRN_NS_B3U4_2f − VDSR_d28_2f"]
    assert (what, paper, order) == ("local residuals", "+0.11", "first better")
    assert float(gain) == pytest.approx(0.3, abs=0.02)
    low, high = (float(word.replace("−", "-")) for word in between.split(" to "))
    assert 0.28 < low < float(gain) < high < 0.32
    assert spread.endswith("(2)")
    assert rows["DRRN_B3U4_2f − DRRN_NS_B3U4_2f"][-2:] == ["+0.02", "not distinguished"]
    assert "100 images of BSD100 ×3" in table.notes[0]


def test_a_difference_that_one_seed_contradicts_is_no_order(make: Callable) -> None:
    gains = {1: 0.5, 2: -0.1}
    runs = [scored(make("model.B=3", "model.U=2", f"seed={seed}"), gain) for seed, gain in gains.items()]
    runs += [scored(make("model.B=3", "model.U=1", f"seed={seed}"), 0.0) for seed in gains]
    (row,) = differences_table(*run_groups("fig6", runs)).rows
    assert float(row[3].split(" to ")[0]) > 0.1  # over images alone
    assert row[-1] == "not distinguished"


def test_a_part_of_a_set_and_too_few_images_say_nothing(make: Callable) -> None:
    runs = [scored(make("model.B=3", f"model.U={u}"), 0.1 * u, images=99) for u in (1, 2)]
    (group,) = run_groups("fig6", runs)
    assert differences_table(group) is None
    runs = [scored(make("model.B=3", f"model.U={u}"), 0.1 * u, 12, "own") for u in (1, 2)]
    (group,) = run_groups("fig6", runs)
    (row,) = differences_table(group).rows
    assert row[:2] == ["DRRN_B3U2_2f − DRRN_B3U1_2f", "U"]
    assert row[-3:] == [MISSING, MISSING, "first better"]  # one seed; the paper has no number of B3U1
