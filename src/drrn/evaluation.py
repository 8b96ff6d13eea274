"""Scoring bicubic, networks and other programs' images on image sets: jobs, workers, the table.

The file of scores is in `drrn.scores`, the definition of a score in `drrn.protocol`.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text  # brackets in a folder's name are no markup

from drrn.degradations import READY
from drrn.disk import sha256, write_whole
from drrn.environment import environment
from drrn.errors import UserError, printable
from drrn.evaluation_config import EvaluateConfig
from drrn.fast.threads import Watch
from drrn.identity import structure_name
from drrn.images import luminance, read_luminance, read_pixels
from drrn.matlab import to_uint8
from drrn.metrics import METRICS
from drrn.paper import paper_numbers
from drrn.protocol import Protocol, describe, means, modcrop, over_colour, prepare, score, score_pixels
from drrn.scores import Scores
from drrn.sets import counterpart, fetch, image_files
from drrn.workers import end_with_parent


class Method(NamedTuple):
    """A method to score: bicubic, the network in a file, or the images in a folder."""

    name: str
    structure: str  # "Bicubic", "DRRN_B1U9"
    weights: str | None = None  # their SHA-256
    seed: int | None = None  # of its training, if the file has it
    steps: int | None = None
    experiment: str | None = None  # `identity.experiment`: equal for runs that differ in the seed only
    checkpoint: Path | None = None
    folder: Path | None = None
    input: str = "interpolated"  # of the network; or "low"
    scale: int | None = None  # of a network of one scale

    def facts(self) -> dict[str, Any]:
        """Its entry in the file of scores."""
        return {key: getattr(self, key) for key in ("name", "weights", "structure", "seed", "steps", "experiment")}


class ImageJob(NamedTuple):
    """A worker's task: one image at one scale by one method."""

    method: Method
    set_name: str  # its label
    scale: int
    path: Path
    digest: str  # SHA-256 of the image file
    picture: Path | None  # file for the super-resolved Y
    made: Path | None  # another program's result

    def key(self) -> tuple:
        """Key of the score in `Scores.rows`; the score is valid for an image file with this digest only."""
        return (self.method.weights, self.set_name, self.scale, self.path.name)


def evaluate(config: EvaluateConfig) -> None:
    """Score every image once, write `config.output` every few seconds, print the means."""
    departures = ("crop", "color", "rounding", "degradation", "precision")
    protocol = Protocol(**{name: getattr(config, name) for name in departures})
    if config.check_protocol:
        check_bicubic(Path(config.root))
    scores = Scores(Path(config.output), protocol.stamp())
    methods = methods_of(config)
    jobs = jobs_of(config, methods, scores.add_set)
    scores.add_methods([method.facts() for method in methods])

    def is_missing(job: ImageJob) -> bool:
        if config.degradation == READY or job.made is not None:  # those images may have changed since
            return True
        no_picture = job.picture is not None and not job.picture.is_file()
        return no_picture or not set(config.metrics) <= set(scores.find(job.key(), job.digest))

    missing = [job for job in jobs if is_missing(job)]
    facts = environment()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("scoring", total=len(jobs), completed=len(jobs) - len(missing))
        written, complete = time.monotonic(), False
        try:
            for job, row in score_all(missing, config, protocol):
                scores.rows[job.key()] = {**scores.find(job.key(), job.digest), **row}
                progress.advance(task)
                if time.monotonic() - written > 5:
                    scores.write(facts)
                    written = time.monotonic()
            complete = True
        finally:
            scores.write(facts, complete)
    if scores.dropped:
        print(f"{scores.dropped} scores removed: their images are no longer in the folders", file=sys.stderr)
    asked = {job.key()[:3] for job in jobs}
    print_table(means([row for key, row in scores.rows.items() if key[:3] in asked]), config.metrics, scores.protocol)
    there = len(jobs) - len(missing)
    print(f"{len(missing)} of {len(jobs)} scores computed, {there} were there already: {printable(config.output)}")


# ---------------------------------------------------------------------- methods and jobs


def methods_of(config: EvaluateConfig) -> list[Method]:
    """The methods to score: bicubic, each network by a distinct name, or the images of a folder.

    A file that has no network, or a network of another scale, is a UserError.
    """
    if config.method == "images":
        name = Path(config.folder).resolve().name
        return [Method(name, name, f"images of {name}", folder=Path(config.folder))]
    methods = [Method("bicubic", "Bicubic")] if config.method == "bicubic" else []
    methods += [network_in(Path(path)) for path in config.checkpoint]
    if len({method.name for method in methods}) < len(methods):  # two have the same name: use their paths
        methods = [method._replace(name=str(method.checkpoint or method.name)) for method in methods]
    for method in methods:
        if method.scale not in (None, *config.scales):
            raise UserError(f"scales = {config.scales}: {method.checkpoint} enlarges by {method.scale}")
    return methods


def network_in(path: Path) -> Method:
    """The network in a file, named by its origin ("DRRN_B1U9 s1"), else by the file's name."""
    from drrn.weights.ours import load_network

    network, about = load_network(path)
    structure, digest = structure_name(about["model"]), sha256(path)
    name, scale = about.get("origin") or path.stem, getattr(network, "scale", None)
    training = about.get("seed"), about.get("steps"), about.get("experiment") or digest[:8]
    return Method(name, structure, digest, *training, path, input=network.input, scale=scale)


def jobs_of(
    config: EvaluateConfig, methods: list[Method], label_of: Callable[[str, dict[Path, str]], str]
) -> list[ImageJob]:
    """Sets × images × scales × methods; `label_of` gives a set's label (`Scores.add_set`).

    An unreadable set, two pictures with one file name, and a missing picture of another program are UserErrors.
    """
    jobs = []
    for name in config.sets:
        members = {path: sha256(path) for path in image_files(name, Path(config.root), complete=False)}
        label = label_of(name, members)
        stems = Counter(path.stem.lower() for path in members)
        for path, digest in members.items():
            shown = path.stem if stems[path.stem.lower()] == 1 else path.name  # a.png and a.jpg are two pictures
            for scale in config.scales:
                for method in (method for method in methods if method.scale in (None, scale)):
                    place, made = None, None
                    if config.images is not None:
                        drawn = f"{shown}_x{scale}_{re.sub('[ /]', '_', method.name)}.png"
                        place = Path(config.images) / label.strip("/") / drawn
                    if method.folder is not None:
                        made = counterpart(method.folder, label, path, scale, len(config.scales) == 1)
                    jobs.append(ImageJob(method, label, scale, path, digest, place, made))
    twice = [place for place, number in Counter(job.picture for job in jobs).items() if place and number > 1]
    if twice:
        raise UserError(f"images: {twice[0]} would be the file of two pictures: evaluate them into two folders")
    return jobs


# ---------------------------------------------------------------------- workers


def score_all(
    jobs: list[ImageJob], config: EvaluateConfig, protocol: Protocol
) -> Iterator[tuple[ImageJob, dict[str, Any]]]:
    """Score the jobs in this process, or in `workers` processes, and yield each result as it is ready."""
    threads = Watch().choose(config.threads).number if config.checkpoint and jobs else 1
    settings = (tuple(config.metrics), protocol, max(1, threads // config.workers))
    if config.workers == 1:
        yield from ((job, score_image(job, *settings)) for job in jobs)
        return
    with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        futures = {pool.submit(score_image, job, *settings): job for job in jobs}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        except BrokenProcessPool as error:
            raise UserError(
                "a scoring process was killed (out of memory?): the same command scores the images that are "
                f"missing; fewer than workers = {config.workers} take less memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def score_image(job: ImageJob, metrics: tuple[str, ...], protocol: Protocol, threads: int = 1) -> dict[str, Any]:
    """Score one image (in a worker process)."""
    started, colours = time.monotonic(), None
    try:
        pixels = read_pixels(job.path)
        y, _ = prepare(pixels, job.scale, job.method.input, protocol.degradation, job.path)
        if job.made is not None:
            over = over_colour(metrics, protocol)
            made = made_by_another(job, modcrop(pixels, job.scale), over)
            y, colours = luminance(made) / 255.0, made / 255.0 if made.ndim == 3 else None
        elif job.method.checkpoint is not None:
            y = run_network(job.method.checkpoint, y, threads, protocol.precision)
        row = score_pixels(y, pixels, job.scale, metrics, protocol, colours, job.path)
    except ValueError as error:
        raise UserError(f"{job.path} at ×{job.scale}: {error}") from error
    if job.picture is not None:
        write_whole(job.picture, lambda partial: Image.fromarray(to_uint8(y)).save(partial, format="PNG"))
    return {
        "method": job.method.name,
        "weights": job.method.weights,
        "set": job.set_name,
        "scale": job.scale,
        "image": job.path.name,
        "image_sha256": job.digest,
        "seconds": round(time.monotonic() - started, 3),
        **row,
    }


def made_by_another(job: ImageJob, truth: NDArray[np.uint8], over: Sequence[str] = ()) -> NDArray[np.uint8]:
    """Another program's 8-bit picture, cropped to the scale like `truth` [H, W] or [H, W, 3].

    Programs save grey results as RGB. If the truth is grey, one of three equal channels is used, since the Y of RGB
    is in 16…235 and that of a grey image in 0…255. `over` are the metrics that are taken over colour. Another size,
    or other channels, are a UserError.
    """
    whole = read_pixels(job.made)
    made, (height, width) = modcrop(whole, job.scale), truth.shape[:2]
    if made.shape[:2] != (height, width):
        raise UserError(
            f"{job.made} is {whole.shape[0]}×{whole.shape[1]}, {job.path} at ×{job.scale} {height}×{width}"
        )
    if made.ndim > truth.ndim:
        if (made != made[..., :1]).any():
            raise UserError(f"{job.made} has colours, but {job.path} is grey: save the result as a grey image")
        return made[..., 0]
    if made.ndim < truth.ndim and over:
        raise UserError(f"{job.made} is grey, but {job.path} has colours, which {', '.join(over)} would compare")
    return made


def run_network(checkpoint: Path, x: NDArray, threads: int, precision: str) -> NDArray:
    """Super-resolve x [H, W] with the network in a file, on this worker's device; errors of `super_resolve`."""
    from drrn.inference import super_resolve

    return super_resolve(_loaded(checkpoint, threads), x, precision=precision)


@cache
def _loaded(checkpoint: Path, threads: int) -> Any:
    """The network in a file, loaded once in each process, on the process's device."""
    import torch

    from drrn.weights.ours import load_network

    torch.set_num_threads(threads)
    network, _ = load_network(checkpoint)
    if torch.cuda.is_available():
        worker = (*multiprocessing.current_process()._identity, 1)[0]  # 1, 2, … in a pool
        network.to(f"cuda:{(worker - 1) % torch.cuda.device_count()}")
    return network


def check_bicubic(root: Path) -> None:
    """Raise a UserError unless bicubic on Set5 gives the numbers of the paper (Tab. 2)."""
    files = fetch("Set5", root)
    for row in paper_numbers("table2"):
        if (row["dataset"], row["method"]) != ("Set5", "Bicubic"):
            continue
        scale = int(row["scale"])
        (measured,) = means([score(*prepare(read_luminance(path), scale), scale) for path in files])
        for metric, tolerance in (("psnr", 0.01), ("ssim", 0.001)):
            if abs(measured[metric] - float(row[metric])) > tolerance:
                raise UserError(
                    f"the protocol is broken here: bicubic on Set5 ×{scale} has {metric.upper()} "
                    f"{measured[metric]:.4f}, the paper {row[metric]}. Check the images under {root}/Set5 and the "
                    "installed versions."
                )
    print("protocol checked: bicubic on Set5 agrees with Table 2", file=sys.stderr)


def print_table(rows: list[dict[str, Any]], metrics: list[str], protocol: dict[str, Any]) -> None:
    """Print means as a table: a row for each set and scale, a column for each method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    places: dict[tuple, dict[str, dict[str, Any]]] = defaultdict(dict)  # set and scale → method → its row
    for row in rows:
        places[row["set"], row["scale"]][row["method"]] = row
    table = Table(title=" / ".join(m.upper() for m in metrics), caption=describe(protocol))
    for column in ("set", "scale", "images", *methods):
        table.add_column(Text(printable(column)), justify="left" if column == "set" else "right")

    def cell(row: dict[str, Any]) -> str:
        return " / ".join(f"{row[name]:.{METRICS[name].digits}f}" if name in row else "–" for name in metrics)

    for (name, scale), measured in places.items():
        images = max(row["images"] for row in measured.values())
        cells = (cell(measured[method]) if method in measured else "" for method in methods)
        table.add_row(Text(printable(name)), f"×{scale}", str(images), *cells)
    Console().print(table)
