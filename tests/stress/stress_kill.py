"""Kill trainings at random moments and start them again until they are done; nothing may be lost or changed.

    python tests/stress/stress_kill.py            # at least 20 kills; `make stress` runs this
    python tests/stress/stress_kill.py 100 --seed 7

A round trains one small network twice with the same command: once left alone, once killed by SIGKILL, SIGTERM,
SIGINT and SIGHUP, sent to the process or, as terminals and clusters do, to it and its workers, and every third time
twice, half a second apart; a third of the rounds average the weights by a callback. Half of the moments are counted
from the start of the process (imports, the build of the patches, the first steps), half from its first checkpoint.
Then the two are compared bit for bit: weights, BatchNorm's statistics, momentum, learning rate, learning curve,
scores, and every row that was logged.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "model.U=2", "model.features=2", "data.train=[demo_train]", "data.val=[{images}]", "data.scales=[2]",
    "data.val_scales=[2]", "data.batch_size=6", "data.stride=100", "trainer.accelerator=cpu",
    "trainer.max_steps=400", "trainer.checkpoint_every=7", "trainer.val_check_interval=20",
    "trainer.log_every_n_steps=1", "optim.lr=0.01", "optim.theta=1e-4", "optim.halve_every_epochs=null",
    "optim.halve_every_steps=90", "logger=csv", "output=runs",
)  # fmt: skip
ROUNDS = (
    ("data.num_workers=0",),
    ("data.num_workers=2", "data.augment=online"),
    ("data.num_workers=1", "trainer.accumulate_grad_batches=3"),
    ("data.num_workers=2", "callbacks=ema", "callbacks.ema.decay=0.9"),
)
WORDS = {word: getattr(signal, word) for word in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")}


# ---------------------------------------------------------------------- one start


def start(arguments: list[str], cwd: Path) -> subprocess.Popen:
    """The real command in a process group of its own; its output goes to a file beside its runs."""
    cwd.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if key not in ("WANDB_SERVICE", "PYTHONPATH")}
    with (cwd / "said.txt").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "src/train.py"), *arguments],
            cwd=cwd, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            env=kept | {"OMP_NUM_THREADS": "1", "DRRN_PATCHES": str(cwd / "patches")},
        )  # fmt: skip


def wait_for_checkpoint(process: subprocess.Popen, cwd: Path, seconds: float = 120) -> None:
    """Until the process has written a checkpoint, or has ended."""
    since, until = time.time(), time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        for path in cwd.rglob("step*.ckpt"):
            try:
                if path.stat().st_mtime > since:
                    return
            except FileNotFoundError:  # replaced by a newer one
                pass
        time.sleep(0.02)


def kill(process: subprocess.Popen, name: str, group: bool, twice: bool = False) -> float:
    """Send a signal, to the process or to its whole group, or two; seconds until it has ended."""
    asked = time.monotonic()
    for pause in (0.5, 0.0) if twice else (0.0,):
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(process.pid, WORDS[name])
        time.sleep(pause)
    process.wait(timeout=120)
    return time.monotonic() - asked


# ---------------------------------------------------------------------- two runs, bit for bit


def run_folder(cwd: Path) -> Path:
    """The one run below a folder."""
    (record,) = cwd.rglob("record.json")
    return record.parent


def logged(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """A run's logged rows over all its starts: (step, kind of row) → row; repeated rows must be equal."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for path in (folder / "csv").rglob("metrics.csv"):
        with path.open() as file:
            for row in csv.DictReader(file):
                row = {key: value for key, value in row.items() if value}
                place = (row["step"], min(key for key in row if "/" in key))
                if rows.setdefault(place, row) != row:
                    raise AssertionError(f"{path}, step {row['step']}: {row} was {rows[place]} before")
    return rows


def difference(a: Any, b: Any, where: str) -> str | None:
    """The first place where two nested values differ in a bit, or None."""
    if type(a) is not type(b):
        return f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else where
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"
        found = (difference(a[key], b[key], f"{where}.{key}") for key in a)
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} items"
        found = (difference(x, y, f"{where}[{k}]") for k, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        return None if a == b else f"{where}: {a!r} and {b!r}"
    return next((one for one in found if one is not None), None)


def compare(straight: Path, interrupted: Path) -> None:
    """Two finished runs of one command.

    Raises:
        AssertionError: something differs.
    """
    held: list[dict[str, Any]] = []
    for folder in (straight, interrupted):
        checkpoint = torch.load(max((folder / "checkpoints").glob("*.ckpt")), weights_only=True)
        record = json.loads((folder / "record.json").read_text())
        keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "validation", "drrn")
        content: dict[str, Any] = {"checkpoint": {key: checkpoint[key] for key in keys}}
        content["averaged from"] = checkpoint.get("current_model_state")
        content["record"] = {key: record[key] for key in ("status", "validation", "scores", "means", "experiment")}
        content["record"] |= {"budget": {**record["budget"], "seconds": None}}
        content["logged"] = logged(folder)
        content["weights"] = (folder / "weights.safetensors").read_bytes()
        if len(list((folder / "checkpoints").iterdir())) > 2:
            raise AssertionError(f"{folder} holds {sorted((folder / 'checkpoints').iterdir())}")
        held.append(content)
    where = difference(*held, "")
    if where is not None:
        raise AssertionError(f"{interrupted} is not what {straight} is: {where}")


# ---------------------------------------------------------------------- the stress


def main() -> None:
    """Rounds until there have been enough kills."""
    sys.path.insert(0, str(ROOT / "src"))
    from drrn.runs.checkpoints import read_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", nargs="?", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    kills, slowest, told, began = 0, 0.0, dict.fromkeys(WORDS, 0), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        images = home / "images"
        crops(images)
        number = 0
        while kills < options.kills:
            extra = ROUNDS[(number + options.seed) % len(ROUNDS)]
            arguments = [word.format(images=images) for word in SMALL] + [*extra, f"seed={number + 1}"]
            straight, interrupted = home / f"straight{number}", home / f"interrupted{number}"
            process, since = start(arguments, straight), time.monotonic()
            wait_for_checkpoint(process, straight)
            startup = time.monotonic() - since
            if process.wait(600):
                raise AssertionError((straight / "said.txt").read_text())

            here, began_at, process = 0, time.time(), start(arguments, interrupted)
            while True:
                if chance.random() < 0.5:
                    time.sleep(chance.uniform(0, 1.2 * startup))
                else:
                    wait_for_checkpoint(process, interrupted)
                    time.sleep(chance.uniform(0, 2))
                if process.poll() is not None:
                    break
                word, group, twice = chance.choice(list(WORDS)), chance.random() < 0.5, chance.random() < 0.33
                took = kill(process, word, group, twice)
                if process.returncode == 0:  # it was about to end
                    break
                kills, here, told[word] = kills + 1, here + 1, told[word] + 1
                slowest = max(slowest, took)
                expected = (-WORDS[word], 128 + WORDS[word]) if word != "SIGKILL" else (-9,)
                kept = sorted(interrupted.rglob("step*.ckpt"))
                sent = f"{word}{' twice' * twice}{' to the group' * group}"
                print(
                    f"round {number + 1}, kill {kills}: {sent}, ended with "
                    f"{process.returncode} after {took:.1f} s, {kept[-1].stem if kept else 'nothing kept yet'}",
                    flush=True,
                )
                if process.returncode not in expected or took > 30:
                    raise AssertionError((interrupted / "said.txt").read_text())
                for record in interrupted.rglob("record.json"):
                    held = json.loads(record.read_text())
                    if record.stat().st_mtime < began_at:  # from an earlier start
                        continue
                    if process.returncode > 0 and (held["status"], held["ended_by"]) != ("stopped", f"signal {word}"):
                        raise AssertionError(f"{record}: {held['status']}, {held['ended_by']} after {word}")
                for path in kept:
                    read_checkpoint(path)
                began_at, process = time.time(), start(arguments, interrupted)
            if process.wait(600):
                raise AssertionError((interrupted / "said.txt").read_text())
            compare(run_folder(straight), run_folder(interrupted))
            print(f"round {number + 1} ({' '.join(extra)}): the same bit for bit after {here} kills", flush=True)
            number += 1
    words = ", ".join(f"{count} {word}" for word, count in told.items())
    print(
        f"{kills} kills ({words}) in {number} rounds, no run lost, none changed; "
        f"the slowest end took {slowest:.1f} s; {time.monotonic() - began:.0f} s in all"
    )


def crops(folder: Path) -> None:
    """Two small photographs to validate on."""
    import skimage.data
    from PIL import Image

    folder.mkdir()
    Image.fromarray(skimage.data.chelsea()[90:165, 120:211]).save(folder / "chelsea.png")
    Image.fromarray(skimage.data.camera()[100:164, 200:255]).save(folder / "camera.png")


if __name__ == "__main__":
    main()
