"""Sets of images: those of `data/registry.txt`, photographs of scikit-image, or any folder.

`T91`, `BSD200` (together the 291 training images), `Set5`, `Set14`, `BSD100` and `Urban100` are folders under the
data root. The registry lists their files with SHA-256 and URL, from which missing ones are downloaded; further lines
make further sets. `demo_train` and `demo_test` are photographs in scikit-image's wheel. Any other name is the path of
a folder. `BSD200@181-200` is a part of a set: its images 181 to 200 by name, such as those held out from
`BSD200@1-180`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from drrn.disk import sha256
from drrn.errors import UserError, counted, printable
from drrn.formats import FORMATS, OTHER_FORMATS
from drrn.home import DATA

if TYPE_CHECKING:
    from drrn.config import DataConfig

log = logging.getLogger(__name__)
S = TypeVar("S", bound=Sequence)
Listed = Mapping[str, tuple[str, str]]  # "Set5/baby.bmp" → its digest "sha256:…", its URL

REGISTRY = DATA / "registry.txt"
LINE = re.compile(r"((\S+)/\S+)\s+(sha256:\w+)\s+(\S+)")

# Photographs only (no text pages, drawings, microscopy), and no scene in both sets. The textures brick, grass and
# gravel are left out: they help a small network little on the test images.
DEMO_SETS = {
    "demo_train": ("astronaut.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"),
    "demo_test": ("camera.png", "chelsea.png", "coffee.png"),
}
TIMEOUT = 20  # seconds without data after which a download is retried


# ---------------------------------------------------------------------- the registry


@cache
def _registry(path: Path) -> Mapping[str, Listed]:
    """Parse a registry, whose lines are `name sha256:digest URL`; its sets in the file's order."""
    if not path.is_file():
        raise UserError(f"{path} is missing: it lists what to download; restore it from the repository")
    sets: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if (found := LINE.fullmatch(line.strip())) is None:
            raise UserError(f"{path}: the line {line!r} is not `name sha256:digest URL`")
        name, folder, digest, url = found.groups()
        sets[folder][name] = digest, url
    return dict(sets)


def registered_sets() -> dict[str, int]:
    """The sets of the registry with their numbers of images, in the file's order."""
    return {name: len(listed) for name, listed in _registry(REGISTRY).items()}


def known_sets() -> list[str]:
    """The names of all sets that are not folders."""
    return [*registered_sets(), *DEMO_SETS]


def is_set(name: str) -> bool:
    """Whether a name is a known set, a folder, or a part of one; a UserError if a known set lacks the part."""
    whole, _ = part_of(name)
    known = registered_sets() | {demo: len(files) for demo, files in DEMO_SETS.items()}
    if whole in known:
        _members(name, range(known[whole]))
    return whole in known or Path(whole).is_dir()


def part_of(name: str) -> tuple[str, range | None]:
    """Parse the name of a part: ("BSD200", range(180, 200)) for "BSD200@181-200"; (name, None) for a whole set."""
    found = re.fullmatch(r"(.+)@([1-9]\d*)-([1-9]\d*)", name)
    if found is None or Path(name).is_dir():
        return name, None
    return found[1], range(int(found[2]) - 1, int(found[3]))


def _members(name: str, files: S) -> S:
    """Select the images of `name` from those of its whole set, sorted by name; UserError if the part is too long."""
    whole, part = part_of(name)
    if part is None:
        return files
    if not part or part.stop > len(files):
        raise UserError(f"{name}: {whole} has the images 1-{len(files)}; give a part of it as {whole}@FIRST-LAST")
    return files[part.start : part.stop]


def is_absent(name: str, root: Path) -> bool:
    """Whether a set, or a part of one, must be downloaded: none of its registered files exists."""
    listed = _registry(REGISTRY).get(part_of(name)[0])
    return listed is not None and not any((root / file).is_file() for file in _members(name, sorted(listed)))


def fetch(set_name: str, root: Path, complete: bool = True) -> list[Path]:
    """Download the missing files of a registered set, or of a part of one; its files, each verified by SHA-256.

    Unless `complete`, missing files are downloaded only if no file of the set exists. A file with another digest and
    a failed download are a UserError that names the file.
    """
    listed = _registry(REGISTRY).get(part_of(set_name)[0], {})
    names = _members(set_name, sorted(listed))
    present = [name for name in names if (root / name).is_file()]
    for name in present:
        if (found := f"sha256:{sha256(root / name)}") != listed[name][0]:
            raise UserError(
                f"{root / name} is not the file that the registry lists ({listed[name][0]}): it is {found}. "
                "Delete it to download it again, or set data.root (DRRN_DATA) to another folder."
            )
    if present and len(present) < len(names) and not complete:
        there = f"only {len(present)} of the {len(names)} images of {set_name} are under {root}"
        _warn(f"{there}: their mean is not the mean of the set")
        return [root / name for name in present]
    if missing := {name: listed[name] for name in names if name not in present}:
        _download(missing, root)
    return [root / name for name in names]


@cache  # each warning once, however often a set is listed
def _warn(text: str) -> None:
    log.warning("%s", text)


def _download(missing: Listed, root: Path) -> None:
    """Download with pooch, which writes to a temporary name, verifies, and renames."""
    import pooch
    from rich.progress import track

    pooch.get_logger().setLevel(logging.WARNING)
    digests, urls = ({name: entry[k] for name, entry in missing.items()} for k in (0, 1))
    fetcher = pooch.create(path=root, base_url="", registry=digests, urls=urls, retry_if_failed=2)
    folder = next(iter(missing)).rpartition("/")[0]
    what = f"Fetching {folder} ({counted(len(missing), 'file')})"
    for name, (digest, url) in track(missing.items(), description=what):
        try:
            fetcher.fetch(name, downloader=pooch.HTTPDownloader(timeout=TIMEOUT))
        except Exception as error:  # pooch raises its own, requests' and OS errors alike
            raise UserError(
                f"{name} could not be fetched from {url}: {error}. Try again, or put the file at "
                f"{root / name} yourself (expected {digest})."
            ) from error


# ---------------------------------------------------------------------- the images of a set


def image_files(set_name: str, root: Path, complete: bool = True) -> list[Path]:
    """The image files of a set, sorted by name.

    Args:
        set_name: a known set, the path of a folder of images, or a part of either.
        root: the data root, which has the folders of known sets.
        complete: download missing files; else only if no file exists (Urban100 is often incomplete).

    Raises:
        UserError: the folder does not exist or has no image, a file in it has an image's suffix but is none, a name
            in it is not UTF-8, or a file cannot be downloaded.
    """
    whole, part = part_of(set_name)
    if whole in registered_sets():
        return fetch(set_name, root, complete=complete)
    if part is not None:
        return _members(set_name, image_files(whole, root))
    if set_name in DEMO_SETS:
        package = importlib.util.find_spec("skimage")  # without importing it
        files = [Path(package.origin).parent / "data" / name for name in DEMO_SETS[set_name]] if package else []
        if absent := [file.name for file in files if not file.is_file()]:
            raise UserError(f"this scikit-image does not ship {', '.join(absent)}: install the locked version")
        return files
    folder = Path(set_name)
    if not folder.is_dir():
        raise UserError(
            f"no set and no folder named {set_name!r}: give a folder of images, or one of {', '.join(known_sets())}"
        )
    return folder_images(folder / "HR" if is_ready(folder) else folder)


def is_ready(folder: Path) -> bool:
    """Whether a folder has ready pairs, in HR/ and LR/."""
    return all(os.path.isdir(folder / name) for name in ("HR", "LR"))  # noqa: PTH112 — Path.is_dir raises without permission


def ready_low(truth: Path, scale: int) -> Path:
    """The low resolution of FOLDER/HR/baby.png: FOLDER/LR/baby_x3.png, or another place that `counterpart` searches.

    An image outside such a folder is a UserError.
    """
    if truth.parent.name != "HR" or not is_ready(truth.parent.parent):
        raise UserError(f"{truth}: ready pairs need a folder with HR/ and LR/")
    return counterpart(truth.parent.with_name("LR"), ".", truth, scale, only_scale=True)


def folder_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name; a UserError if one with an image's suffix cannot be read."""
    files = []
    try:
        found = list(find_images(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error}") from error
    for path, wrong in found:
        if wrong and path.suffix.lower() in FORMATS:
            raise UserError(f"{path} {wrong}: remove it from the set, or repair it")
        if wrong:
            _warn(f"{printable(path)} {wrong}")
        elif path.name != printable(path.name):
            raise UserError(f"{path}: the name has control codes or bytes that are not UTF-8; rename it")
        else:
            files.append(path)
    if not files:
        raise UserError(f"{folder} holds no image ({', '.join(FORMATS)})")
    return files


def find_images(folder: Path, deep: bool = False) -> Iterator[tuple[Path, str | None]]:
    """All entries of a folder with an image's suffix, sorted by name, without hidden ones.

    With `deep` also those of its subfolders, except for hidden folders and links.

    Yields:
        (path, None) for a file; (path, problem) for an entry that cannot be read: a link to nothing or to itself, a
        pipe, a folder called x.png, or a format that sets do not have.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        suffix = path.suffix.lower()
        if suffix in FORMATS and path.is_file():
            yield path, None
        elif suffix in FORMATS and not (deep and path.is_dir()):
            yield path, "is not a file" if path.exists() else "is a link to nothing"
        elif suffix in OTHER_FORMATS and not path.is_dir():
            yield path, f"is not read: sets are of {', '.join(FORMATS)}"
        if deep and path.is_dir() and not path.is_symlink():
            yield from find_images(path, deep)


def set_label(set_name: str, files: list[Path]) -> str:
    """The label of a set in tables and records: the name of a known set or folder, of a part with its numbers.

    A folder is labelled Set5 only if all its images are Set5's; otherwise the label has the parent's name too.
    """
    whole, part = part_of(set_name)
    if part is not None:
        return set_label(whole, files) + set_name.removeprefix(whole)
    if set_name in known_sets():
        return set_name
    folder = Path(set_name).resolve()
    if folder.name not in known_sets():
        return folder.name or str(folder)
    listed = {digest for digest, _ in _registry(REGISTRY).get(folder.name, {}).values()}
    same = {f"sha256:{sha256(path)}" for path in files} <= listed
    return folder.name if same else f"{folder.parent.name}/{folder.name}"


# ---------------------------------------------------------------------- evaluation sets


def evaluation_sets(data: DataConfig, complete: bool = False) -> dict[str, dict[str, list[Path]]]:
    """The evaluation sets, with each image checked before hours of training; `complete` as in `image_files`.

    Returns:
        "validate" (during training) and "test" (at its end) → label → files.

    Raises:
        UserError: an image cannot be read, or is too small to be scored at the largest scale.
    """
    from drrn.metrics import in_training

    sets: dict[str, dict[str, list[Path]]] = {"validate": {}, "test": {}}
    for stage, key in (("validate", "val"), ("test", "test")):
        tested = stage == "test" or not data.test
        scales = [*(data.scales if tested else ()), *(data.val_scales if stage == "validate" else ())]
        metrics = [*in_training(), *((data.test_metrics or ()) if tested else ())]
        for name in getattr(data, key) or ():
            files = image_files(name, Path(data.root), complete)
            for file in files:
                check_size(file, max(scales), metrics, f"data.{key}")
            label = set_label(name, files)
            if label in sets[stage]:
                raise UserError(f"data.{key}: {name} has the label {label}, as another of these sets")
            sets[stage][label] = files
    return sets if data.test else {"validate": sets["validate"], "test": sets["validate"]}


def check_size(file: Path, scale: int, metrics: Iterable[str] = ("ssim",), key: str = "data.val") -> None:
    """Refuse an image that is too small for a metric at a scale, before hours of training.

    Its size counts after the crop to the scale and the shave by the scale on every side. `key` names the set's key.
    """
    from drrn.images import image_size
    from drrn.metrics import METRICS

    height, width = image_size(file)
    side = min(side - side % scale for side in (width, height)) - 2 * scale
    for name in metrics:
        if side < METRICS[name].smallest:
            raise UserError(
                f"{file} ({width}×{height}) is too small to be scored at ×{scale} by {name}: take it out of {key}"
            )


def counterpart(folder: Path, label: str, image: Path, scale: int, only_scale: bool) -> Path:
    """Find another program's version of an image: `baby_x3.png`, or `baby.png` if the scale is unambiguous.

    The file is in the folder itself or below it in `Set5/`, `x3/`, `Set5/x3/` or `x3/Set5/`. None, or several, is a
    UserError.
    """
    marked = re.compile(rf"({re.escape(image.stem)}|{re.escape(image.name)})[_-]?x{scale}(?!\d).*", re.IGNORECASE)
    for place in (f"{label}/x{scale}", f"x{scale}/{label}", label, f"x{scale}", "."):
        if not (folder / place).is_dir():
            continue
        clear = only_scale or f"x{scale}" in place.split("/")
        files = [path for path, wrong in find_images(folder / place) if wrong is None]
        found = [p for p in files if marked.fullmatch(p.stem) or (clear and image.stem in (p.stem, p.name))]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} are both {image.name} at ×{scale}: remove one")
        if found:
            return found[0]
    raise UserError(f"{folder} holds no {image.stem}_x{scale}.png, of {image.name} at ×{scale}")
