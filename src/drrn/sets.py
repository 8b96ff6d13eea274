"""Named sets of images: what `data/registry.txt` lists, photographs of scikit-image, or a folder.

A *set* is a folder of images. `T91`, `BSD200` (together the 291 training images), `Set5`, `Set14`, `BSD100` and
`Urban100` are folders of that name under the data root, listed with SHA-256 and URL in the registry and fetched from
there when absent; lines in the registry make another one. `demo_train` and `demo_test` are photographs inside
scikit-image's wheel. Any other name is taken as the path of a folder. `BSD200@181-200` is a part of a set: its images
181 to 200 by name, such as those held out from `BSD200@1-180`.
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

# Photographs only (no text pages, drawings, microscopy), and no scene on both sides of the split. Brick, grass and
# gravel are photographs too, but such textures teach a small network little about the held-out ones.
DEMO_SETS = {
    "demo_train": ("astronaut.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"),
    "demo_test": ("camera.png", "chelsea.png", "coffee.png"),
}
TIMEOUT = 20  # seconds without a byte after which a download is tried again


# ---------------------------------------------------------------------- the registry


@cache
def _registry(path: Path) -> Mapping[str, Listed]:
    """The sets of a registry, in its order; its lines are `name sha256:digest URL`."""
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
    """The sets of the registry and how many images each has, in the order in which they stand there."""
    return {name: len(listed) for name, listed in _registry(REGISTRY).items()}


def known_sets() -> list[str]:
    """Every set that has a name."""
    return [*registered_sets(), *DEMO_SETS]


def is_set(name: str) -> bool:
    """Whether a name is a known set's, a folder's, or a part's of one; a UserError if a known set lacks the part."""
    whole, _ = part_of(name)
    known = registered_sets() | {demo: len(files) for demo, files in DEMO_SETS.items()}
    if whole in known:
        _members(name, range(known[whole]))
    return whole in known or Path(whole).is_dir()


def part_of(name: str) -> tuple[str, range | None]:
    """The set of a part and its images, ("BSD200", range(180, 200)) of "BSD200@181-200"; of a set (name, None)."""
    found = re.fullmatch(r"(.+)@([1-9]\d*)-([1-9]\d*)", name)
    if found is None or Path(name).is_dir():
        return name, None
    return found[1], range(int(found[2]) - 1, int(found[3]))


def _members(name: str, files: S) -> S:
    """Of the images of a whole set, by name, those of `name`; a UserError for a part that the set does not have."""
    whole, part = part_of(name)
    if part is None:
        return files
    if not part or part.stop > len(files):
        raise UserError(f"{name}: {whole} has the images 1-{len(files)}, a part of it is {whole}@FIRST-LAST of these")
    return files[part.start : part.stop]


def is_absent(name: str, root: Path) -> bool:
    """Whether a set, or a part of one, would have to be downloaded: none of its registered files is there."""
    listed = _registry(REGISTRY).get(part_of(name)[0])
    return listed is not None and not any((root / file).is_file() for file in _members(name, sorted(listed)))


def fetch(set_name: str, root: Path, complete: bool = True) -> list[Path]:
    """The registered files of a set, or of a part of one, under the data root, each verified by its SHA-256.

    Unless `complete`, what is absent is downloaded only when no file of the set is there. A file of another digest,
    and a download that failed, are a UserError that names the file.
    """
    listed = _registry(REGISTRY).get(part_of(set_name)[0], {})
    names = _members(set_name, sorted(listed))
    present = [name for name in names if (root / name).is_file()]
    for name in present:
        if (found := f"sha256:{sha256(root / name)}") != listed[name][0]:
            raise UserError(
                f"{root / name} is not the file that the registry lists ({listed[name][0]}): it is {found}. "
                "Delete it to have it fetched again, or point data.root (DRRN_DATA) elsewhere."
            )
    if present and len(present) < len(names) and not complete:
        there = f"only {len(present)} of the {len(names)} images of {set_name} are under {root}"
        _warn(f"{there}: a mean over them is not the set's")
        return [root / name for name in present]
    if missing := {name: listed[name] for name in names if name not in present}:
        _download(missing, root)
    return [root / name for name in names]


@cache  # once for each set or file, however often it is listed
def _warn(text: str) -> None:
    log.warning("%s", text)


def _download(missing: Listed, root: Path) -> None:
    """Pooch writes to a temporary name, verifies, renames."""
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


# ---------------------------------------------------------------------- the members of a set


def image_files(set_name: str, root: Path, complete: bool = True) -> list[Path]:
    """The image files of a set, by name.

    Args:
        set_name: a known set, the path of a folder of images, or a part of either.
        root: the data root, under which the known sets are folders.
        complete: fetch what is absent; else only when no file is there (Urban100 is often incomplete).

    Raises:
        UserError: the folder does not exist or holds no image, something in it looks like an image and is none, a
            name in it is not UTF-8, or a file cannot be fetched.
    """
    whole, part = part_of(set_name)
    if whole in registered_sets():
        return fetch(set_name, root, complete=complete)
    if part is not None:
        return _members(set_name, image_files(whole, root))
    if set_name in DEMO_SETS:
        package = importlib.util.find_spec("skimage")  # it need not be imported
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
    """Whether a folder holds ready pairs, HR and LR."""
    return all(os.path.isdir(folder / name) for name in ("HR", "LR"))  # noqa: PTH112 — Path's raises without rights


def ready_low(truth: Path, scale: int) -> Path:
    """The low resolution of FOLDER/HR/baby.png: FOLDER/LR/baby_x3.png, or as `counterpart` says.

    An image of no such folder is a UserError.
    """
    if truth.parent.name != "HR" or not is_ready(truth.parent.parent):
        raise UserError(f"{truth}: of ready pairs a set is a folder that holds HR and LR")
    return counterpart(truth.parent.with_name("LR"), ".", truth, scale, only_scale=True)


def folder_images(folder: Path) -> list[Path]:
    """The image files of a folder, by name: all of what looks like an image, or a UserError."""
    files = []
    try:
        found = list(find_images(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error}") from error
    for path, wrong in found:
        if wrong and path.suffix.lower() in FORMATS:
            raise UserError(f"{path} {wrong}: take it out of the set, or mend it")
        if wrong:
            _warn(f"{printable(path)} {wrong}")
        elif path.name != printable(path.name):
            raise UserError(f"{path}: a name with bytes that are not UTF-8 or control codes; rename it")
        else:
            files.append(path)
    if not files:
        raise UserError(f"{folder} holds no image ({', '.join(FORMATS)})")
    return files


def find_images(folder: Path, deep: bool = False) -> Iterator[tuple[Path, str | None]]:
    """All in a folder that looks like an image by its suffix, by name; hidden files do not.

    With `deep` in its folders too, but for hidden ones and links.

    Yields:
        (path, None) for a file, (path, what is wrong with it) for what cannot be read: a link to nothing or to
        itself, a pipe, a folder called x.png, or a format that sets do not have.
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
    """What tables and records call a set: a known one by its name, a folder by its own, a part with its numbers.

    A folder is called Set5 only if all its images are Set5's; another one of that name has its parent's before it.
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


# ---------------------------------------------------------------------- sets to measure on


def evaluation_sets(data: DataConfig, complete: bool = False) -> dict[str, dict[str, list[Path]]]:
    """The sets to measure on, each image looked at before hours of training; `complete` as above.

    Returns:
        "validate" (while training) and "test" (at the end) → label → files.

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
                raise UserError(f"data.{key}: {name} is {label}, which is there already")
            sets[stage][label] = files
    return sets if data.test else {"validate": sets["validate"], "test": sets["validate"]}


def check_size(file: Path, scale: int, metrics: Iterable[str] = ("ssim",), key: str = "data.val") -> None:
    """Refuse, before hours of training, an image of a set that `key` names and that cannot be scored at a scale.

    Cropped to the scale and shaved by it on every side, it is smaller than a metric takes.
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
    """What another program made of an image: `baby_x3.png`, or `baby.png` where it is clear which scale that is.

    It lies in the folder itself or below it in `Set5/`, `x3/`, `Set5/x3/` or `x3/Set5/`. None, or several, is a
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
            raise UserError(f"{found[0]} and {found[1]} are both of {image.name} at ×{scale}: leave one")
        if found:
            return found[0]
    raise UserError(f"{folder} holds no {image.stem}_x{scale}.png, of {image.name} at ×{scale}")
