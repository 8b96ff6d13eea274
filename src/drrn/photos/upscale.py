"""Enlarge photographs: one file, several, or a folder with its structure."""

from __future__ import annotations

import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from drrn.config import key
from drrn.errors import UserError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from drrn.model import DRRN


MEMORY = 2_000_000_000  # bytes beside the loaded image, everything included
WORKING = 600_000_000  # of these, what strips, decoders, encoders and the weights take
PAPER_SCALES = [2, 3, 4]
STREAMED = (".png", ".tif", ".tiff")  # results that are written strip by strip


@dataclass
class Options:
    """What `conf/upscale.yaml` may hold."""

    input: Any = MISSING  # file, folder, or a list of them
    output: str | None = MISSING  # file, or folder
    scale: float | None = MISSING  # above 1
    checkpoint: str | None = MISSING  # weights; needed by method=network
    method: str = key("what enlarges", choices=("network", "bicubic"))
    overwrite: bool = MISSING  # replace existing outputs
    suffix: str | None = MISSING  # format of outputs in a folder; None: the input's own
    quality: int = key("of JPEG and WebP", at_least=1, below=101)
    self_ensemble: bool = MISSING  # average over 8 orientations
    tile: int | None = key("side of a tile, pixels; None: strips, by memory", at_least=1)
    device: str = MISSING  # auto, or torch's name of one
    max_pixels: int = key("largest input; results at most 16 times as many", at_least=1)


def check(options: Options) -> None:
    """Values of keys.

    Raises:
        UserError: by the key's name.
    """
    example = "python src/upscale.py input=photo.jpg scale=3 checkpoint=weights.safetensors output=big.png"
    for name in ("input", "output", "scale"):
        if getattr(options, name) in (None, "", []):
            raise UserError(f"{name} is missing: {example}")
    if not (math.isfinite(options.scale) and options.scale > 1):
        raise UserError(f"scale = {options.scale}: must be a number above 1")
    if options.method == "network" and not options.checkpoint:
        raise UserError("checkpoint is missing: give weights.safetensors or a .ckpt, or method=bicubic")
    if options.method == "bicubic" and options.checkpoint:
        raise UserError("checkpoint: method=bicubic uses none; leave out one of the two")
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", options.device):
        raise UserError(f"device = {options.device!r}: allowed are auto, cpu, cuda, cuda:1, mps, xpu")


def plan(options: Options) -> list[tuple[Path, Path]]:
    """Which file becomes which: (input, output) in the order of the inputs, each input once.

    Raises:
        UserError: a folder without images, one file for several, two inputs for one output, or an output that is
            an input.
    """
    from drrn.images import FORMATS

    given = options.input if isinstance(options.input, list) else [options.input]
    if not all(isinstance(name, str | int | float) and not isinstance(name, bool) and str(name) for name in given):
        raise UserError(f"input = {options.input}: a file, a folder, or a list of them")
    if options.suffix is not None and options.suffix.lower() not in FORMATS:
        raise UserError(f"suffix = {options.suffix!r}: allowed are {', '.join(FORMATS)}")
    output = Path(options.output)
    found: dict[Path, tuple[Path, Path]] = {}  # real path → (input, its place in an output folder)
    for source in (Path(str(name)) for name in given):
        if not source.is_dir():
            found.setdefault(source.resolve(), (source, Path(source.name)))
            continue
        images = [
            path
            for path in sorted(source.rglob("*"))
            if path.suffix.lower() in FORMATS
            and not path.is_dir()
            and not (output.is_dir() and path.resolve().is_relative_to(output.resolve()) and output != source)
        ]
        if not images:
            raise UserError(f"input: the folder {source} holds no image ({', '.join(FORMATS)})")
        for path in images:
            found.setdefault(path.resolve(), (path, path.relative_to(source)))

    if output.suffix.lower() in FORMATS and not output.is_dir():
        if len(found) > 1 or any(Path(str(name)).is_dir() for name in given):
            raise UserError(f"output = {output}: {len(found)} images need a folder, this is the name of one file")
        if options.suffix is not None:
            raise UserError(f"suffix = {options.suffix!r}: output = {output} has its own; leave out one of the two")
        jobs = [(source, output) for source, _ in found.values()]
    else:
        if output.exists() and not output.is_dir():
            raise UserError(f"output = {output}: neither a folder nor a name that ends in {', '.join(FORMATS)}")
        jobs = [
            (source, output / (place.with_suffix(options.suffix) if options.suffix else place))
            for source, place in found.values()
        ]

    taken: dict[Path, Path] = {}
    for source, target in jobs:
        real = target.resolve()
        if real in found or (target.exists() and any(s.exists() and target.samefile(s) for s, _ in jobs)):
            raise UserError(f"output: {target} is an input, and inputs are never overwritten; name another folder")
        if real in taken:
            raise UserError(f"output: {taken[real]} and {source} would both become {target}; enlarge them apart")
        taken[real] = source
    return jobs


def upscale(options: Options, jobs: list[tuple[Path, Path]]) -> int:
    """Enlarge every file; what fails is said on stderr and the others go on.

    Returns:
        The number of files that failed.

    Raises:
        UserError: the checkpoint or the device cannot be used.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    network = None
    if options.method == "network":
        from drrn.weights.ours import load_network

        device = choose_device(options.device)
        network, about = load_network(Path(options.checkpoint))
        network = network.to(device)
        scales = about.get("scales") or PAPER_SCALES
        if options.scale not in scales:
            print(
                f"scale {options.scale:g} is outside the scales that these weights were trained for "
                f"({', '.join(map(str, scales))}): expect less of them",
                file=sys.stderr,
            )
    console, failed = Console(stderr=True), 0
    name = TextColumn("{task.description}", markup=False)  # brackets in a file's name are no markup
    bars = Progress(
        name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True, redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip
    with bars:
        files = bars.add_task("files", total=len(jobs), visible=len(jobs) > 1)
        for number, (source, target) in enumerate(jobs, start=1):
            start = time.monotonic()
            try:
                text, notes = enlarge_file(source, target, options, network, bars)
            except (UserError, OSError, MemoryError, RuntimeError) as error:  # torch's "out of memory" is the last
                failed += 1
                reason = str(error) or type(error).__name__
                reason = reason if str(source) in reason or str(target) in reason else f"{source}: {reason}"
                print(f"upscale.py: {reason}", file=sys.stderr)
            else:
                count = f"[{number}/{len(jobs)}] " if len(jobs) > 1 else ""
                print(f"{count}{text} in {time.monotonic() - start:.1f} s", flush=True)
                for note in notes:
                    print(f"  {source.name}: {note}", flush=True)
            bars.advance(files)
    return failed


def enlarge_file(
    source: Path, target: Path, options: Options, network: DRRN | None, bars: Progress
) -> tuple[str, list[str]]:
    """Enlarge one file.

    Returns:
        What was done, in a line, and notes for the user.

    Raises:
        UserError: naming the file and what is wrong.
    """
    from drrn.photos.enlarge import RESULT_FACTOR, enlarge, result_size
    from drrn.photos.read import read_photo
    from drrn.photos.write import stored_dtype, write_photo

    if target.exists() and not options.overwrite:
        raise UserError(f"{target} exists: overwrite=true replaces it")
    photo = read_photo(source, options.max_pixels)
    height, width, channels = photo.pixels.shape
    size = result_size(height, width, options.scale)
    if size[0] * size[1] > RESULT_FACTOR * options.max_pixels:
        raise UserError(
            f"{source}: {size[1]:,}×{size[0]:,} pixels at scale {options.scale:g} are more than {RESULT_FACTOR} × "
            f"max_pixels = {options.max_pixels:,}; if that is meant, raise max_pixels"
        )
    dtype = stored_dtype(target, photo.pixels.dtype, channels, size)
    room = None
    if network is not None and target.suffix.lower() not in STREAMED:
        room = room_beside(4 * size[0] * size[1], network)

    task = bars.add_task(source.name, total=None)
    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        bars.update(task, completed=done, total=total)
        if bars.disable and done and time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"{source}: {done} of {total} parts", file=sys.stderr, flush=True)

    try:
        strips = enlarge(photo.pixels, size, network, options.tile, options.self_ensemble, progress, room)
        notes = write_photo(target, strips, (*size, channels), dtype, photo, options.quality)
    finally:
        bars.remove_task(task)
    return f"{source} {width}×{height} → {target} {size[1]}×{size[0]}", photo.notes + notes


def room_beside(canvas: int, network: DRRN) -> int:
    """Bytes that feature maps may take when a result of so many bytes is in memory too."""
    from drrn.fast.strips import ROOM, free_room

    device = next(network.parameters()).device
    room, on_cpu = free_room(device), device.type == "cpu"
    return min(room, max(MEMORY - WORKING - canvas, ROOM // 8)) if on_cpu else room


def choose_device(name: str) -> torch.device:
    """`device` as torch's.

    Raises:
        UserError: torch has no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a CPU build asserts
        reason = str(error).split("\n")[0]
        raise UserError(f"device = {name!r} cannot be used here: {reason}") from error
    return device
