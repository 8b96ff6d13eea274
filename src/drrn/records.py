"""The run record: one JSON a run, enough to check a result by hand and to make it again.

Tables and figures read nothing but these files, so they need no account and no network.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import platform
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from drrn import Refusal
from drrn.config import Config, experiment, run_name, structure_name
from drrn.protocol import METRICS, PAPER

FORMAT = 1
FILE = "record.json"
PACKAGES = (
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "torchmetrics",
    "wandb",
    "h5py",
    "numpy",
    "scipy",
    "pillow",
)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write to a temporary name beside `path`, flush it to the disk, then rename.

    Whatever happens, power failures included, `path` is the old file or the new one.

    Raises:
        Refusal: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)  # the new name
    except Refusal:
        raise
    except Exception as error:  # libraries raise their own kinds for a full or read-only disk
        raise Refusal(f"{path} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """A file or a folder, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"  # before any file: what fails here is our bug
    write_whole(path, lambda partial: partial.write_text(text))


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; the kernel lets go of it when the process ends, however it ends. The file stays.

    Args:
        path: of the lock file.
        what: what another process does that holds it, for the message.

    Raises:
        Refusal: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise Refusal(f"{what} by another process (it holds {path}): wait for it, or end it") from error
    try:
        yield
    finally:
        lock.release()


def end_with_parent() -> None:
    """Let a worker end when the process that gives it work is killed: it would wait for ever (in the worker)."""

    def watch(parent: multiprocessing.process.BaseProcess) -> None:
        parent.join()
        os._exit(1)

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()


def read_record(path: Path) -> dict[str, Any]:
    """A run record.

    Raises:
        Refusal: it is missing, not JSON, or of a format that this version does not read.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refusal(f"{path} is not a readable run record: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise Refusal(f"{path} is not a run record of format {FORMAT}")
    return record


def finished_record(folder: Path) -> Path | None:
    """The record of a run that is finished, here or in another study's folder; None if it is not.

    Fig. 8's DRRN_B3U4 is Fig. 6's and Table 4's too: folders are named by what a run is, so it has one name.

    Raises:
        Refusal: a record cannot be read.
    """
    own, others = folder / FILE, sorted(folder.parents[1].glob(f"*/{folder.name}/{FILE}"))
    paths = [*([own] if own.is_file() else []), *others]
    return next((path for path in paths if read_record(path)["status"] == "finished"), None)


def find_records(folder: Path) -> list[dict[str, Any]]:
    """All run records below a folder, by path; each gains `path`.

    Raises:
        Refusal: there is none.
    """
    paths = sorted(folder.rglob(FILE))
    if not paths:
        raise Refusal(f"no run record ({FILE}) below {folder}: train something first, or name another folder")
    return [{**read_record(path), "path": str(path)} for path in paths]


def git_commit() -> dict[str, Any] | None:
    """Commit of the source tree and whether it has uncommitted changes; None outside a clone."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    """Versions, machine and commit."""
    import torch

    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "git": git_commit(),
    }


def means(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of images → the plain mean of every metric for each network, set and scale (protocol, step 7).

    A metric that some image of a group lacks is left out there: a mean over a part of a set is not the set's.
    """
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in scores:
        groups[tuple((key, row[key]) for key in ("method", "weights", "set", "scale") if key in row)].append(row)
    result = []
    for place, rows in groups.items():
        metrics = [key for key in rows[0] if key.split("_")[-1] in METRICS and all(key in row for row in rows)]
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in metrics}
        result.append({**dict(place), "images": len(rows), **mean})
    return result


def run_record(config: Config, network: Any) -> dict[str, Any]:
    """The record of a run that is about to start; `status`, `budget` and `scores` are filled in as it goes.

    Args:
        config: the whole checked configuration.
        network: a `drrn.model.DRRN`.
    """
    return {
        "format": FORMAT,
        "name": run_name(config),
        "study": config.study,
        "status": "running",
        "experiment": experiment(config),
        "seed": config.seed,
        "structure": {
            "name": structure_name(config.model),
            "depth": network.depth,
            "conv_weights": network.conv_weight_count,
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        "protocol": asdict(PAPER),
        "config": asdict(config),
        **environment(),
    }
