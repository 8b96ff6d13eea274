"""Scoring bicubic and networks on image sets: jobs, workers, the file of scores."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import MISSING, DictConfig

from drrn.config import check_sets, key, paths, typed
from drrn.errors import UserError

FORMAT = 1


@dataclass
class EvaluateConfig:
    """What conf/evaluate.yaml documents."""

    method: str = key("what is scored", choices=("network", "bicubic"))
    checkpoint: Any = MISSING
    sets: list[str] = MISSING
    scales: list[int] = key("of the evaluation", at_least=2)
    metrics: list[str] = MISSING
    output: str = MISSING
    images: str | None = MISSING
    root: str = MISSING
    workers: int = key("processes", at_least=1, below=1001)
    check_protocol: bool = MISSING
    protocol: str = key("its name", choices=("paper",))
    crop: int | None = key("pixels shaved off each side; null: the scale", at_least=0)
    color: str = key("luminance, or all channels", choices=("y", "rgb"))
    rounding: str = key("of what is compared", choices=("uint8", "float"))


class Method(NamedTuple):
    """What is scored: bicubic, or the network in a file."""

    name: str
    checkpoint: Path | None
    digest: str | None  # SHA-256 of the file
    structure: str  # "Bicubic", "DRRN_B1U9"
    seed: int | None  # of its training, where the file says
    steps: int | None
    experiment: str | None  # `drrn.config.experiment`: equal for runs that differ by their seed alone


class Job(NamedTuple):
    """One image at one scale by one network: what a worker computes."""

    method: Method
    set_name: str
    scale: int
    path: Path
    digest: str  # SHA-256 of the image file

    def key(self) -> tuple:
        """A score's place; it holds for the image file of this digest alone."""
        return (self.method.digest, self.set_name, self.scale, self.path.name)

    def picture(self, folder: str) -> Path:
        """Where `images` keeps the super-resolved Y."""
        method = self.method.name.replace(" ", "_").replace("/", "_")
        return Path(folder) / self.set_name / f"{self.path.stem}_x{self.scale}_{method}.png"


def check(cfg: DictConfig) -> EvaluateConfig:
    """The configuration, refused by key before anything heavy is imported.

    Raises:
        UserError: a wrong key, type or value.
    """
    config = typed(EvaluateConfig, cfg)
    for metric in config.metrics:
        if metric not in ("psnr", "ssim", "ifc"):
            raise UserError(f"metrics: {metric!r} is not one of psnr, ssim, ifc")
    if not config.scales:
        raise UserError("scales is empty: whole numbers of at least 2")
    if not config.metrics:
        raise UserError("metrics is empty")
    check_sets("sets", config.sets)
    config.checkpoint = paths("checkpoint", config.checkpoint)
    if config.method == "network" and not config.checkpoint:
        raise UserError("checkpoint is missing: give weights.safetensors or a .ckpt, or method=bicubic")
    for path in config.checkpoint:
        if not Path(path).is_file():
            raise UserError(f"checkpoint {path} does not exist")
    return config


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score every image once, write `config.output` as it goes, print the means."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from drrn.disk import write_json
    from drrn.images import sha256
    from drrn.protocol import Protocol, means
    from drrn.runs.record import environment
    from drrn.sets import image_files

    protocol = Protocol(config.protocol, 1, config.crop, config.color, config.rounding)
    if config.check_protocol:
        check_bicubic(Path(config.root))
    output = Path(config.output)
    result = {"format": FORMAT, "protocol": asdict(protocol), **environment(), "scores": []}
    done, known = previous_scores(output, asdict(protocol)) if output.is_file() else ({}, [])
    methods = [Method("bicubic", None, None, "Bicubic", None, None, None)] if config.method == "bicubic" else []
    methods += [network_in(Path(path)) for path in config.checkpoint]
    if len({m.name for m in methods}) < len(methods):  # two networks of one name: call them by their path
        methods = [m._replace(name=str(m.checkpoint)) for m in methods]
    jobs = [
        Job(method, Path(name).name, scale, path, sha256(path))
        for name in config.sets
        for path in image_files(name, Path(config.root), complete=False)
        for scale in config.scales
        for method in methods
    ]
    now = [
        {
            "name": m.name,
            "weights": m.digest,
            "structure": m.structure,
            "seed": m.seed,
            "steps": m.steps,
            "experiment": m.experiment,
        }
        for m in methods
    ]
    result["methods"] = [m for m in known if m["weights"] not in [n["weights"] for n in now]] + now
    for job in jobs:
        if done.get(job.key(), {}).get("image_sha256", job.digest) != job.digest:
            del done[job.key()]  # the image has changed since
    missing = [
        job
        for job in jobs
        if not set(config.metrics) <= set(done.get(job.key(), ()))
        or (config.images is not None and not job.picture(config.images).is_file())
    ]

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("scoring", total=len(jobs), completed=len(jobs) - len(missing))
        written = time.monotonic()
        try:
            for job, row in score_all(missing, config, protocol):
                done[job.key()] = {**done.get(job.key(), {}), **row}
                progress.update(task, advance=1, description=f"{job.set_name} ×{job.scale} {job.path.name}")
                if time.monotonic() - written > 5:
                    write_json(output, {**result, "scores": list(done.values())})
                    written = time.monotonic()
        except BaseException:
            write_json(output, {**result, "scores": list(done.values())})
            raise
    result["scores"] = list(done.values())
    result["means"] = means(result["scores"])
    write_json(output, result)
    asked = {job.key() for job in jobs}
    print_table(means([row for key, row in done.items() if key in asked]), config.metrics, protocol)
    print(f"{len(missing)} of {len(jobs)} scores computed, {len(jobs) - len(missing)} were there already: {output}")
    return result


def network_in(path: Path) -> Method:
    """The network of a file, called by its origin ("DRRN_B1U9 s1"), else by the file's name."""
    from drrn.config import ModelConfig
    from drrn.identity import structure_name
    from drrn.images import sha256
    from drrn.weights.ours import load_network

    _, about = load_network(path)
    structure = structure_name(ModelConfig(**about["model"]))
    name = about.get("origin") or path.stem
    digest = sha256(path)
    experiment = about.get("experiment") or digest[:8]
    return Method(name, path, digest, structure, about.get("seed"), about.get("steps"), experiment)


def previous_scores(path: Path, protocol: dict[str, Any]) -> tuple[dict[tuple, dict[str, Any]], list[dict[str, Any]]]:
    """Scores that a file holds already, by `Job.key`, and the methods that it knows.

    Raises:
        UserError: not a file of scores, or scores of another protocol.
    """
    import json

    try:
        content = json.loads(path.read_text())
        rows = {(r["weights"], r["set"], r["scale"], r["image"]): r for r in content["scores"]}
        stamped, methods, version = content["protocol"], content["methods"], content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} exists and is not a file of scores ({error}): choose another output") from error
    if version != FORMAT:
        raise UserError(
            f"{path} holds scores of format {version}, this version writes {FORMAT}: choose another output"
        )
    if stamped != protocol:
        raise UserError(
            f"{path} holds scores of the protocol {stamped}, which do not compare with {protocol}: "
            "choose another output"
        )
    return rows, methods


def score_all(jobs: list[Job], config: EvaluateConfig, protocol: Any) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Every job's scores as they come: in this process, or in `workers` processes, each job in one of them."""
    settings = (tuple(config.metrics), protocol, config.images, config.workers)
    if config.workers == 1:
        yield from ((job, score_image(job, *settings)) for job in jobs)
        return
    from drrn.workers import end_with_parent

    with ProcessPoolExecutor(config.workers, get_context("spawn"), end_with_parent) as pool:
        futures = {pool.submit(score_image, job, *settings): job for job in jobs}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        except BrokenProcessPool as error:
            raise UserError(
                "a scoring process was killed (out of memory?): the same command goes on with the images that are "
                f"missing; fewer than workers = {config.workers} take less memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_networks: dict[Path, Any] = {}  # a worker process loads each network once


def score_image(
    job: Job, metrics: tuple[str, ...], protocol: Any, images: str | None, workers: int
) -> dict[str, Any]:
    """Score one image (in a worker process)."""
    import numpy as np

    from drrn.images import read_luminance, read_pixels
    from drrn.matlab import rgb2ycbcr, to_uint8, ycbcr2rgb
    from drrn.protocol import degrade, modcrop, prepare, score

    started = time.monotonic()
    try:
        x, truth = prepare(read_luminance(job.path), job.scale)
        prediction = x if job.method.checkpoint is None else run_network(job.method.checkpoint, x, workers)
        row = score(prediction, truth, job.scale, metrics, protocol)
        rgb = modcrop(read_pixels(job.path), job.scale) if protocol.color == "rgb" else np.empty(())
        if rgb.ndim == 3 and "psnr" in metrics:  # a grey image's only channel is Y
            ycbcr = degrade(rgb2ycbcr(rgb) / 255.0, job.scale)
            ycbcr[..., 0] = prediction
            row["psnr"] = score(ycbcr2rgb(ycbcr), rgb / 255.0, job.scale, ("psnr",), protocol)["psnr"]
    except ValueError as error:
        raise UserError(f"{job.path} at ×{job.scale}: {error}") from error
    if images is not None:
        from PIL import Image

        from drrn.disk import write_whole

        picture = Image.fromarray(to_uint8(np.asarray(prediction)))
        write_whole(job.picture(images), lambda partial: picture.save(partial, format="PNG"))
    return {
        "method": job.method.name,
        "weights": job.method.digest,
        "set": job.set_name,
        "scale": job.scale,
        "image": job.path.name,
        "image_sha256": job.digest,
        "seconds": round(time.monotonic() - started, 3),
        **row,
    }


def run_network(checkpoint: Path, x: Any, workers: int) -> Any:
    """Super-resolve x [H, W] by the network in a file, on this worker's device."""
    import multiprocessing

    import torch

    from drrn.inference import super_resolve
    from drrn.weights.ours import load_network

    if checkpoint not in _networks:
        network, _ = load_network(checkpoint)
        if torch.cuda.is_available():
            torch.backends.cudnn.allow_tf32 = False  # PyTorch's default is True; scores are those of float32
            worker = (*multiprocessing.current_process()._identity, 1)[0]  # 1, 2, … in a pool
            network.to(f"cuda:{(worker - 1) % torch.cuda.device_count()}")
        else:
            torch.set_num_threads(
                max(1, (os.cpu_count() or 1) // workers) if workers > 1 else torch.get_num_threads()
            )
        _networks[checkpoint] = network
    return super_resolve(_networks[checkpoint], x)


def check_bicubic(root: Path) -> None:
    """Make sure that bicubic on Set5 gives the numbers that the paper prints (Tab. 2).

    Raises:
        UserError: it does not: the images or the installed libraries are not what the protocol needs.
    """
    from drrn.images import read_luminance
    from drrn.paper import paper_numbers
    from drrn.protocol import prepare, score
    from drrn.sets import fetch

    files = fetch("Set5", root)
    for row in paper_numbers("table2"):
        if (row["dataset"], row["method"]) != ("Set5", "Bicubic"):
            continue
        scale = int(row["scale"])
        scores = [score(*prepare(read_luminance(path), scale), scale) for path in files]
        for metric, tolerance in (("psnr", 0.01), ("ssim", 0.001)):
            measured = sum(s[metric] for s in scores) / len(scores)
            if abs(measured - float(row[metric])) > tolerance:
                raise UserError(
                    f"the protocol is broken here: bicubic on Set5 ×{scale} has {metric.upper()} {measured:.4f}, "
                    f"the paper {row[metric]}. Check the images under {root}/Set5 and the installed versions."
                )
    print("protocol checked: bicubic on Set5 agrees with Table 2", file=sys.stderr)


def print_table(rows: list[dict[str, Any]], metrics: list[str], protocol: Any) -> None:
    """Means as a table: a row for each set and scale, a column for each method."""
    from rich.console import Console
    from rich.table import Table

    from drrn.metrics import METRICS
    from drrn.protocol import describe

    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = Table(title=" / ".join(m.upper() for m in metrics), caption=describe(asdict(protocol)))
    for column in ("set", "scale", "images", *methods):
        table.add_column(column, justify="left" if column == "set" else "right")
    for set_name, scale in dict.fromkeys((row["set"], row["scale"]) for row in rows):
        cells = {row["method"]: row for row in rows if (row["set"], row["scale"]) == (set_name, scale)}
        images = max(cell["images"] for cell in cells.values())
        table.add_row(
            set_name,
            f"×{scale}",
            str(images),
            *(
                " / ".join(f"{cells[m][k]:.{METRICS[k].digits}f}" for k in metrics) if m in cells else ""
                for m in methods
            ),
        )
    Console().print(table)
