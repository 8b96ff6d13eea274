"""The configuration of upscale.py and its jobs, an output for each input: all checks before the work."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from drrn.disk import check_output
from drrn.errors import UserError
from drrn.formats import FORMATS, OTHER_FORMATS
from drrn.help import script
from drrn.schema import key, typed
from drrn.weights.shipped import weights_file

is_folder = os.path.isdir  # False for a name that no file system allows, where Path.is_dir raises


@dataclass
class Options:
    """The keys of conf/upscale.yaml."""

    input: Any = key("a file, a folder with its structure, or a list of both")
    output: str | None = key("a file for one input (its suffix is the format), else a folder; null: photo_x2.png")
    scale: float | None = key("sides become scale × side, rounded; may be a fraction", above=1)
    checkpoint: str | None = key("weights, .ckpt, a run's folder or a shipped name; null: the best shipped")
    method: str = key("how to enlarge", choices=("network", "bicubic"))
    compare: bool = key("write a page beside each result, with a slider between bicubic and it")
    overwrite: bool = key("replace outputs that exist; otherwise they are skipped")
    suffix: str | None = key("format of outputs without a name; null: the input's in a folder, else .png or TIFF")
    quality: int = key("quality of JPEG and WebP, 1 to 100; 100 is a WebP without loss", at_least=1, below=101)
    self_ensemble: bool = key("average over the 8 orientations: a little better, 8 times slower")
    tile: int | None = key("side of a tile, pixels; null: strips that fit the free memory", at_least=1)
    device: str = key("auto, cpu, cuda, cuda:1, mps, xpu")
    precision: str = key("the network's; auto: bf16 if it is fast here", choices=("auto", "float32", "tf32", "bf16"))
    threads: int | None = key("CPU threads; null: one per free core", at_least=1, below=2**10)
    max_pixels: int = key("most pixels of an input; a result may have 16 times as many", at_least=1)


class PhotoJob(NamedTuple):
    """One file to enlarge."""

    source: Path
    target: Path
    wrong: str | None = None  # why it cannot be read

    @property
    def page(self) -> Path:
        """The page of `compare`."""
        return self.target.with_name(f"{self.target.name}.html")


def check(cfg: DictConfig) -> Options:
    """The checked configuration; a UserError names a wrong key."""
    options = typed(Options, cfg)
    for name in ("input", "scale"):
        if getattr(options, name) in (None, "", []):
            raise UserError(f"{name} is missing: {script('upscale')} input=photo.jpg scale=2")
    if options.method == "network":
        options.checkpoint = str(weights_file(options.checkpoint, options.scale))
    elif options.checkpoint:
        raise UserError("checkpoint: method=bicubic uses none; leave out one of the two")
    elif options.compare:
        raise UserError("compare: method=bicubic has nothing to compare with; leave out one of the two")
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", options.device):
        raise UserError(f"device = {options.device!r}: allowed are auto, cpu, cuda, cuda:1, mps, xpu")
    return options


def plan(options: Options) -> list[PhotoJob]:
    """The jobs in the order of the inputs, each input once.

    Raises:
        UserError: no input exists, a folder has no images, one output is a file for several inputs, or an output is
            an input, is the output of another input, has an unknown format or cannot be written.
    """
    if options.suffix is not None and options.suffix.lower() not in FORMATS:
        raise UserError(f"suffix = {options.suffix!r}: allowed are {', '.join(FORMATS)}")
    given = options.input if isinstance(options.input, list) else [options.input]
    if not all(isinstance(name, str | int | float) and not isinstance(name, bool) and str(name) for name in given):
        raise UserError(f"input = {options.input}: a file, a folder, or a list of them")
    sources = [Path(str(name)) for name in given]
    output = None if options.output is None else Path(options.output)
    one = output is not None and output.suffix.lower() in FORMATS and not is_folder(output)
    found: dict[str, PhotoJob] = {}  # by the input's real path
    for source in sources:
        for job in jobs_of(source, output, one, options):
            found.setdefault(os.path.realpath(job.source), job)
    if output is None and not options.overwrite:  # `*.png` again: results of the first time are no inputs
        results = {os.path.realpath(job.target) for job in found.values()}
        found = {real: job for real, job in found.items() if real not in results}
    if one:
        if len(found) > 1 or any(map(is_folder, sources)):
            raise UserError(f"output = {output}: {len(found)} images need a folder, this is the name of one file")
        if options.suffix is not None:
            raise UserError(f"suffix = {options.suffix!r}: output = {output} has its own; leave out one of the two")
        check_output("output", output)
    else:
        if output is not None and os.path.lexists(output) and not is_folder(output):
            raise UserError(f"output = {output}: neither a folder nor a name that ends in {', '.join(FORMATS)}")
        meant = output is not None and output.suffix[1:2].isalpha() and not options.output.endswith(os.sep)
        if meant and len(sources) == 1 and not is_folder(sources[0]) and not is_folder(output):
            raise UserError(f"output = {output}: a file's name ends in {', '.join(FORMATS)}, a folder's in {os.sep}")
        folders = [job.target.parent for job in found.values() if not job.wrong]
        for folder in dict.fromkeys([output, *folders] if output else folders):
            check_output("output", folder, folder=True)
    check_targets([job for job in found.values() if not job.wrong], set(found))
    if not any(map(os.path.lexists, sources)):  # if some do, those are enlarged
        raise UserError(f"input = {', '.join(map(str, sources))}: no such file or folder")
    return list(found.values())


def jobs_of(source: Path, output: Path | None, one: bool, options: Options) -> Iterator[PhotoJob]:
    """Jobs of a file or a folder; `output` is a folder, or with `one` a file; None: beside the input."""
    beside = source if source.name not in ("", "..") else Path(os.path.abspath(source))  # noqa: PTH100 — links stay
    if is_folder(source):
        folder = output or beside.with_name(f"{beside.name}_x{options.scale:g}")
        for path, place, wrong in members(source, folder):
            yield PhotoJob(path, folder / named(place, options.suffix), wrong)
    elif one:
        yield PhotoJob(source, output)
    elif output is not None:
        yield PhotoJob(source, output / named(Path(source.name), options.suffix))
    else:  # TIFF may hold what PNG cannot; everything else, JPEG too, becomes PNG, which is lossless
        own = source.suffix if source.suffix.lower() in (".tif", ".tiff") else ".png"
        yield PhotoJob(source, beside.with_name(f"{beside.stem}_x{options.scale:g}{options.suffix or own}"))


def members(folder: Path, output: Path) -> list[tuple[Path, Path, str | None]]:
    """Image files in a folder, without earlier results: (path, path in the folder, why it cannot be read or None)."""
    from drrn.sets import find_images

    root, results = Path(os.path.realpath(folder)), Path(os.path.realpath(output))
    inside = root in results.parents
    images = []
    try:
        for path, wrong in find_images(folder, deep=True):
            if inside and Path(os.path.realpath(path.parent)).is_relative_to(results):
                continue
            kind = OTHER_FORMATS.get(path.suffix.lower())
            if kind and path.is_file():
                wrong = None  # not allowed in a set, but Pillow reads it
            elif path.suffix.lower() in OTHER_FORMATS:
                wrong = f"is not read: save it as one of {', '.join(FORMATS)} first"
            images.append((path, path.relative_to(folder), wrong))
    except OSError as error:
        raise UserError(f"input: {error.filename or folder} cannot be listed: {error.strerror}") from error
    if not images:
        raise UserError(f"input: the folder {folder} holds no image ({', '.join(FORMATS)})")
    return images


def named(place: Path, suffix: str | None) -> Path:
    """The result's path: with `suffix`, else the input's own, or .png for a format that is only read."""
    own = ".png" if place.suffix.lower() in OTHER_FORMATS else place.suffix
    return place.with_suffix(suffix or own)


def check_targets(jobs: list[PhotoJob], inputs: set[str]) -> None:
    """Refuse two results with one path, and a result that would overwrite one of `inputs` (real paths)."""
    same = {(s.st_dev, s.st_ino) for s in (job.source.stat() for job in jobs if job.source.exists())}
    taken: dict[str, Path] = {}
    for source, target, _ in jobs:
        real = os.path.realpath(target)
        linked = target.exists() and (target.stat().st_dev, target.stat().st_ino) in same
        if real in inputs or linked:
            raise UserError(f"output: {target} is an input, and inputs are never overwritten; name another folder")
        if target.is_dir():
            raise UserError(f"output: {target} is a folder: {source} cannot be written there")
        if real in taken:
            raise UserError(f"output: {taken[real]} and {source} would both become {target}; rename one of them")
        taken[real] = source
