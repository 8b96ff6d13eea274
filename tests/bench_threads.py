"""The bench of threads: `python tests/bench.py threads`, on a CPU of two cores or more.

A command uses one thread per core that is free when it starts (`drrn.fast.threads`). Here that choice alternates with
fixed numbers, on the idle machine and beside a process that keeps one core busy.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import bench
from drrn.fast.threads import Watch, allowed_cores
from drrn.inference import super_resolve
from drrn.protocol import score


def threaded(number: int | None, build: Callable[..., Callable[[], Any]], *arguments: Any) -> Callable[[], Any]:
    """The work of `build`, with a number of threads; None: one per free core."""
    torch.set_num_threads(number or Watch().choose().number)
    return build(*arguments)


def training(features: int, steps: int) -> Callable[[], Any]:
    """Steps of B1U5, batch 32."""
    step = bench.our_step(5, 32, features)

    def run() -> None:
        for _ in range(steps):
            step()

    return run


def evaluation(features: int, side: int) -> Callable[[], Any]:
    """An image enlarged in float32 and scored."""
    model, x = bench.network(5, "batch", features).eval(), np.random.default_rng(0).random((side, side), np.float32)
    return lambda: score(super_resolve(model, x), x, 3)


def enlarging(features: int, side: int) -> Callable[[], Any]:
    """An image in upscale.py's default precision."""
    return bench.our_inference(5, side, "batch", features, "auto")


def demo(folder: str, steps: int) -> Callable[[], Any]:
    """The command of `make demo`, shorter."""
    return bench.command(
        "src/train.py", "sweeps=demo", "logger=none", f"output={folder}", "ckpt_path=null",
        f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}",
    )  # fmt: skip


@contextmanager
def busy(on: bool) -> Iterator[None]:
    """If `on`, another process keeps a core busy."""
    if not on:
        yield
        return
    loop = "import os; parent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"
    with subprocess.Popen([sys.executable, "-c", loop]) as process:  # it ends with a bench that is killed
        try:
            yield
        finally:
            process.kill()


def threads(sizes: dict[str, Any]) -> Iterator[bench.Row]:
    """The time of the best fixed number over the time of a command's own choice."""
    os.environ.pop("OMP_NUM_THREADS", None)
    features, steps, side, demo_steps, rounds = sizes["threads"]
    cores = len(allowed_cores())
    fixed = sorted({1, max(1, cores - 1), cores})
    works = {
        "training": (training, features, steps),
        "evaluation": (evaluation, 4 * features, side),
        "enlarging": (enlarging, 4 * features, side),
    }
    for beside in (False, True):
        where = "beside one busy process" if beside else "idle"
        with busy(beside), tempfile.TemporaryDirectory() as folder:
            for name, work in works.items():
                things = {said(n): (threaded, n, *work) for n in (None, *fixed)}
                yield against_the_best(f"{name}, {where}", bench.in_turn(things, rounds))
            if not beside:
                demo(f"{folder}/first", 1)()  # it builds the patch file, for all
            things = {said(n): (demo, f"{folder}/{n}", demo_steps) for n in (None, *fixed)}
            numbers = {said(n): {"OMP_NUM_THREADS": str(n)} for n in fixed}
            times = bench.in_turn(things, 1, warm=False, environment=numbers)
            yield against_the_best(f"a short demo, {where}", times)


def said(number: int | None) -> str:
    return "what is free" if number is None else f"{number} thread{'s' if number > 1 else ''}"


def against_the_best(what: str, times: dict[str, list[float]]) -> bench.Row:
    ours, *fixed = times
    best = min(fixed, key=lambda name: statistics.median(times[name]))
    return bench.ratio(f"threads, {what}: of the best fixed number's rate", "≥ 0.9", times, best, ours)
