"""Enlarge photographs file by file: print each outcome, count, stop cleanly."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from drrn.errors import UserError, counted, printable
from drrn.photos.compare import write_page
from drrn.photos.enlarge import RESULT_FACTOR, enlarge, result_size
from drrn.photos.plan import Options, PhotoJob
from drrn.photos.read import read_photo
from drrn.photos.write import stored_dtype, write_photo

if TYPE_CHECKING:  # torch is imported only for a network that has something to enlarge
    import torch
    from torch import nn

MEMORY = 2_000_000_000  # bytes for everything except the loaded image
WORKING = 600_000_000  # of these, bytes for strips, decoders, encoders and weights
PAPER_SCALES = [2, 3, 4]
STREAMED = (".png", ".tif", ".tiff")  # results that are written strip by strip


def upscale(options: Options, jobs: list[PhotoJob]) -> int:
    """Enlarge every file; a failure is reported on stderr, and the other files are still enlarged.

    Returns:
        The exit code: 0 all done, 1 some file failed, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.

    Raises:
        UserError: the checkpoint, the device or the precision cannot be used.
    """
    results: Counter[str] = Counter()
    try:
        with stopped_by_signals():
            network, precision, name = None, "float32", Path(options.checkpoint or "").stem
            if options.method == "network" and (options.overwrite or not all(job.target.exists() for job in jobs)):
                network, precision, name = prepare(options)
            with progress_bars() as bars:
                tools = Tools(options, network, precision, name, bars)
                files = bars.add_task("files", total=len(jobs), visible=len(jobs) > 1)
                for number, job in enumerate(jobs, start=1):
                    count = f"[{number}/{len(jobs)}] " if len(jobs) > 1 else ""
                    results[enlarge_job(job, count, tools)] += 1
                    bars.advance(files)
    except Stopped as stop:
        said = "stopped; the unfinished file is removed, the finished ones stay"
        print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr)
        return 128 + stop.args[0]
    if results["skipped"] and len(jobs) > 1:
        print(f"{results['skipped']} of {len(jobs)} were there already: overwrite=true replaces them")
    if results["failed"] and len(jobs) > 1:
        print(f"{Path(sys.argv[0]).name}: {results['failed']} of {len(jobs)} files failed", file=sys.stderr)
    return 1 if results["failed"] else 0


class Tools(NamedTuple):
    """The options, network and progress bars for all files."""

    options: Options
    network: nn.Module | None  # on its device; None: bicubic
    precision: str
    name: str  # of the network, for display
    bars: Progress


def enlarge_job(job: PhotoJob, count: str, tools: Tools) -> str:
    """Enlarge one file, print the outcome and return it: "done", "skipped" or "failed"."""
    start, outcome, options = time.monotonic(), "done", tools.options
    try:
        if job.wrong:
            raise UserError(f"{job.source} {job.wrong}")
        if job.target.exists() and not options.overwrite:
            print(f"{count}{printable(job.target)} exists: skipped; overwrite=true replaces it", flush=True)
            outcome = "skipped"
        else:
            text, notes = enlarge_file(job.source, job.target, tools)
            print(f"{count}{printable(text)} in {time.monotonic() - start:.1f} s", flush=True)
            for note in notes:
                print(f"  {printable(job.source.name)}: {printable(note)}", flush=True)
        if options.compare and (options.overwrite or not job.page.exists()):
            write_page(job.page, job.source, job.target, tools.name, options.max_pixels)
            print(f"{count}{printable(job.page)}: before and after", flush=True)
    except (UserError, OSError, MemoryError, RuntimeError) as error:  # torch's "out of memory" is the last
        reason = str(error) or type(error).__name__
        named = printable(job.source) in printable(reason) or printable(job.target) in printable(reason)
        said = printable(reason if named else f"{job.source}: {reason}")
        print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr)
        return "failed"
    return outcome


def progress_bars() -> Progress:
    """Progress bars, disabled if stderr is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),  # brackets in a file's name are no markup
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True, redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip


def prepare(options: Options) -> tuple[nn.Module, str, str]:
    """The network on its device, its precision and its name; a UserError if one of them is not available."""
    from drrn.fast.threads import Watch

    watch = Watch()
    import torch

    from drrn.fast.precision import chosen
    from drrn.fast.prepared import FOLDINGS
    from drrn.weights.ours import load_network

    device = choose_device(options.device)
    network, about = load_network(Path(options.checkpoint))
    precision = chosen(options.precision, device, type(network) in FOLDINGS)
    if network.input == "low" and options.scale != network.scale:
        raise UserError(f"scale = {options.scale:g}: {options.checkpoint} enlarges by {network.scale}")
    scales = about.get("scales") or PAPER_SCALES
    if options.scale not in scales:
        print(
            f"scale {options.scale:g} is outside the scales that these weights were trained for "
            f"({', '.join(map(str, scales))}): expect lower quality",
            file=sys.stderr,
        )
    where = str(device)
    if device.type == "cpu":
        threads = watch.choose(options.threads)
        torch.set_num_threads(threads.number)
        where = f"{counted(threads.number, 'thread')} ({threads.why})"
    print(f"{precision} on {where}", flush=True)
    return network.to(device), precision, about.get("origin") or Path(options.checkpoint).stem


def enlarge_file(source: Path, target: Path, tools: Tools) -> tuple[str, list[str]]:
    """Enlarge one file; return a line for the user (files and sizes) and notes on losses.

    Raises:
        UserError: it names the file and the reason.
    """
    options, network, precision, _, bars = tools
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

    task = bars.add_task(printable(source.name), total=None)
    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        bars.update(task, completed=done, total=total)
        if bars.disable and done and time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"{printable(source)}: {done} of {total} parts", file=sys.stderr, flush=True)

    how = {"tile": options.tile, "self_ensemble": options.self_ensemble, "room": room, "precision": precision}

    def computed() -> Iterator[NDArray[Any]]:
        """The result's strips; an error here is reported as one of computing, not of writing."""
        try:
            yield from enlarge(photo.pixels, size, network, progress=progress, **how)
        except (MemoryError, RuntimeError) as error:
            reason = str(error).split("\n")[0] or "out of memory"
            raise UserError(f"{source}: {reason}; a tile, such as tile=200, takes less memory") from error

    try:
        notes = write_photo(target, computed(), (*size, channels), dtype, photo, options.quality)
    finally:
        bars.remove_task(task)
    return f"{source} {width}×{height} → {target} {size[1]}×{size[0]}", photo.notes + notes


def room_beside(canvas: int, network: nn.Module) -> int:
    """Bytes available for feature maps while a result of `canvas` bytes is in memory."""
    from drrn.fast.strips import ROOM, free_room

    device = next(network.parameters()).device
    room = free_room(device)
    return min(room, max(MEMORY - WORKING - canvas, ROOM // 8)) if device.type == "cpu" else room


def choose_device(name: str) -> torch.device:
    """The torch device of a name; a UserError if it is not available."""
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


class Stopped(BaseException):
    """Raised by a signal, with its number, so that half-written files are removed on the way out."""


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` on Ctrl-C, SIGTERM and SIGHUP; a second one ends the process. Ignored signals stay so."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: h for n in numbers if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def stop(number: int, frame: Any) -> None:
        for other in before:
            signal.signal(other, lambda again, frame: os._exit(128 + again))
        raise Stopped(number)

    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
