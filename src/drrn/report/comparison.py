"""Comparison pictures (Fig. 7): the choice of the image, and the results shown side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from drrn.degradations import BI, READY, check_scales
from drrn.errors import UserError, printable
from drrn.help import script
from drrn.identity import WEIGHTS
from drrn.images import read_luminance
from drrn.inference import super_resolve
from drrn.pictures import Box, draw, save, side_by_side
from drrn.protocol import modcrop
from drrn.report.page import Picture, png
from drrn.sets import counterpart, image_files, is_ready
from drrn.weights.ours import load_network

if TYPE_CHECKING:
    from drrn.report.report import ReportConfig

# The images of the paper's Fig. 7: set, file, scale, and a box around the lines, pattern or text that it points to.
FIG7 = {
    "img059": ("Urban100", "img059.png", 3, Box(340, 300, 120, 80)),
    "253027": ("BSD100", "253027.jpg", 3, Box(190, 150, 90, 60)),
    "ppt3": ("Set14", "ppt3.bmp", 4, Box(30, 225, 120, 80)),
}

SHOWN = 5  # runs for which a picture has room


def compare(config: ReportConfig, records: list[dict[str, Any]], prefix: str = "") -> list[Picture]:
    """Draw crops side by side, of the requested image or else of the last image that the runs were tested on.

    Of more than `SHOWN` runs the best are shown, by PSNR on the last set and scale of the last run.
    The image is degraded as in the last run; runs of another degradation, and networks of another scale, are left
    out. Bicubic is the degradation for checkpoints, which do not store theirs, and for an image without a ready pair.

    Returns:
        The picture, also written to `config.output`; an empty list if no run has scores.

    Raises:
        UserError: the image or the weights of a run are missing, the box is not inside the image, a checkpoint
            enlarges by another scale, or the runs' degradation is not defined for the scale.
    """
    tested = [record for record in records if record.get("scores") and record.get("means")]
    if not config.compare and not tested:
        return []
    degradation = BI
    if tested and not config.checkpoint:
        degradation = _degradation(tested[-1])
        if others := [record["name"] for record in tested if _degradation(record) != degradation]:
            print(f"not in the picture of {degradation}, since trained for another degradation: {', '.join(others)}")
        tested = [record for record in tested if _degradation(record) == degradation]
        if len(tested) > SHOWN:
            print(f"the picture shows the best {SHOWN} of {len(tested)} runs; checkpoint=[…] names others")
            tested = best(tested)
    files = [Path(path) for path in config.checkpoint]
    files = files or [Path(record["path"]).with_name(WEIGHTS) for record in tested]
    loaded = {file: load_network(file) for file in files}
    names = {file: about.get("origin") or printable(file.stem) for file, (_, about) in loaded.items()}
    if len(set(names.values())) < len(names):  # two networks have one name: add their folders
        names = {file: printable(f"{file.parent.name}/{file.stem}".removesuffix("/weights")) for file in files}
    path, scale, box = _chosen(config, tested)
    if degradation == READY and config.compare and not (path.parent.name == "HR" and is_ready(path.parent.parent)):
        degradation = BI
    networks = {}
    for file, (network, _) in loaded.items():
        if getattr(network, "scale", scale) == scale:
            networks[names[file]] = network
        elif config.checkpoint:
            raise UserError(f"scale = {scale}: {file} enlarges by {network.scale}")
    low = [name for name, network in networks.items() if network.input == "low"]
    try:
        runs = {name: lambda x, y=y: y for name, y in _others(config.others, path, scale).items()}
        runs |= {name: lambda x, network=network: super_resolve(network, x) for name, network in networks.items()}
        check_scales("scale", [scale], degradation)
        shown = side_by_side(path, scale, runs, box, low, degradation)
    except ValueError as error:  # an image smaller than the scale or the metrics' windows
        raise UserError(f"{path} at ×{scale}: {error}") from error
    alike = any(other.stem == path.stem and other != path for other in path.parent.iterdir())
    name = f"{path.name if alike else path.stem}_x{scale}"  # a.png is not a.jpg
    stem = Path(config.output) / f"{prefix}{name}"
    written = save(draw(shown), stem)
    written += save(draw(shown, stacked=True), stem.with_name(f"{stem.name}_narrow"), [".png"])
    print(f"written: {printable(', '.join(map(str, written)))}")
    title = f"{name}: crops, PSNR and SSIM under each"
    return [Picture(title, title, png(written[0]), png(written[-1]), [path.name for path in written])]


def best(tested: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best `SHOWN` of the runs that were tested where the last one was, in their order."""
    last = tested[-1]["means"][-1]
    reached = {
        place: row["psnr"]
        for place, record in enumerate(tested)
        for row in record["means"]
        if (row["set"], row["scale"]) == (last["set"], last["scale"])
    }
    return [tested[place] for place in sorted(sorted(reached, key=reached.get)[-SHOWN:])]


def _degradation(record: dict[str, Any]) -> str:
    return record["protocol"].get("degradation", BI)


def _others(folders: dict[str, str], path: Path, scale: int) -> dict[str, NDArray[np.float64]]:
    """Other programs' results for an image: name → Y [H, W] in 0…1."""
    height, width = modcrop(read_luminance(path), scale).shape
    result = {}
    for name, folder in folders.items():
        made = counterpart(Path(folder), path.parent.name, path, scale, only_scale=True)
        y = modcrop(read_luminance(made), scale) / 255.0
        if y.shape != (height, width):
            raise UserError(f"others: {made} has {y.shape[1]}×{y.shape[0]} pixels; {width}×{height} are needed")
        result[printable(name)] = y
    return result


def _chosen(config: ReportConfig, tested: list[dict[str, Any]]) -> tuple[Path, int, Box | None]:
    """The image of a comparison, its scale and its box."""
    name, box = config.compare, Box(*config.box) if config.box else None
    if name in FIG7:
        set_name, file, scale, preset = FIG7[name]
        box, hint = box or preset, f"{script('prepare')} 'data.test=[{set_name}]'"
    elif name:
        if not Path(name).is_file():
            raise UserError(f"compare = {name!r}: no such file, and none of {', '.join(FIG7)}")
        return Path(name), config.scale or 3, box
    else:
        scores, data = tested[-1]["scores"], tested[-1]["config"]["data"]
        set_name, file = (data.get("test") or data["val"])[-1], scores[-1]["image"]
        scales = sorted({row["scale"] for row in scores})
        scale, hint = scales[len(scales) // 2], "the runs were tested on it"
    for path in image_files(set_name, Path(config.root), complete=False):
        if path.name == file:
            return path, config.scale or scale, box
    raise UserError(f"{printable(file)} of {printable(set_name)} is not under {config.root}: {hint}")
