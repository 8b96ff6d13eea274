"""Named sets of images: listed in the registry, fetched and verified, or a folder."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from pathlib import Path

from drrn.errors import UserError

log = logging.getLogger(__name__)

REGISTRY = Path(__file__).resolve().parents[2] / "data" / "registry.txt"

IMAGE_SETS = ("T91", "BSD200", "Set5", "Set14", "BSD100", "Urban100", "demo_train", "demo_test")

# Photographs only (no text pages, drawings, microscopy), and no scene on both sides of the split. Brick, grass and
# gravel are photographs too, but such textures teach a small network little about the held-out ones.
DEMO_SETS = {
    "demo_train": ("astronaut.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"),
    "demo_test": ("camera.png", "chelsea.png", "coffee.png"),
}
FETCHED_SETS = tuple(name for name in IMAGE_SETS if name not in DEMO_SETS)
TIMEOUT = 20  # seconds without a byte after which a download is tried again


def registered(set_name: str, registry: Path = REGISTRY) -> dict[str, tuple[str, str]]:
    """The files of one set in the registry: "Set5/baby.bmp" → ("sha256:…", URL).

    Raises:
        UserError: if the registry is absent or a line of it is not `name sha256:digest URL`.
    """
    if not registry.is_file():
        raise UserError(f"{registry} is missing: it lists what to download; restore it from the repository")
    files = {}
    for number, line in enumerate(registry.read_text().splitlines(), start=1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        if len(fields) != 3 or not fields[1].startswith("sha256:"):
            raise UserError(f"{registry}, line {number}: expected `name sha256:digest URL`, found {line!r}")
        if fields[0].startswith(f"{set_name}/"):
            files[fields[0]] = (fields[1], fields[2])
    return files


def fetch(set_name: str, root: Path, registry: Path = REGISTRY, complete: bool = True) -> list[Path]:
    """The registered files of a set under `root`, each verified by its SHA-256.

    Present files are left alone; absent ones are downloaded by pooch, which writes to a temporary name,
    verifies, and renames.

    Args:
        set_name: "Set5", …
        root: the data root.
        registry: the list of files.
        complete: False downloads only when no file of the set is there, and otherwise takes those that are.

    Raises:
        UserError: a present file has another digest, or a download failed (naming the file and URL).
    """
    from drrn.images import sha256

    files = registered(set_name, registry)
    present = [name for name in files if (root / name).is_file()]
    for name in present:
        if (found := f"sha256:{sha256(root / name)}") != files[name][0]:
            raise UserError(
                f"{root / name} is not the file that {registry.name} lists ({files[name][0]}): it is {found}. "
                "Delete it to have it fetched again, or point data.root (DRRN_DATA) elsewhere."
            )
    if present and not complete:
        if len(present) < len(files):
            _warn_of_a_part(set_name, len(present), len(files), root)
        return [root / name for name in present]
    if len(present) < len(files):
        _download([name for name in files if name not in present], files, root)
    return [root / name for name in files]


@cache  # once for each set, however often it is listed
def _warn_of_a_part(set_name: str, present: int, whole: int, root: Path) -> None:
    log.warning("only %d of the %d images of %s are under %s: a mean over them is not the set's",
                present, whole, set_name, root)  # fmt: skip


def _download(missing: list[str], files: dict[str, tuple[str, str]], root: Path) -> None:
    import pooch
    from rich.progress import track

    pooch.get_logger().setLevel(logging.WARNING)
    fetcher = pooch.create(
        path=root,
        base_url="",
        registry={name: files[name][0] for name in missing},
        urls={name: files[name][1] for name in missing},
        retry_if_failed=2,
    )
    for name in track(missing, description=f"Fetching {missing[0].split('/')[0]} ({len(missing)} files)"):
        try:
            fetcher.fetch(name, downloader=pooch.HTTPDownloader(timeout=TIMEOUT))
        except Exception as error:  # pooch raises its own, requests' and OS errors alike
            raise UserError(
                f"{name} could not be fetched from {files[name][1]}: {error}. Try again, or put the file at "
                f"{root / name} yourself (expected {files[name][0]})."
            ) from error


def image_files(set_name: str, root: Path, complete: bool = True) -> list[Path]:
    """The image files of a set, by name.

    Args:
        set_name: a known set, or the path of a folder of images.
        root: the data root, under which the known sets are folders.
        complete: fetch what is absent; False takes the files of a known set that are there (Urban100 is
            often incomplete) and fetches only when there is none.

    Raises:
        UserError: the folder does not exist or holds no image, or a file cannot be fetched.
    """
    from drrn.images import FORMATS

    if set_name in DEMO_SETS:
        package = importlib.util.find_spec("skimage")
        if package is None or package.submodule_search_locations is None:
            raise UserError(f"the set {set_name} is inside scikit-image: pip install scikit-image")
        folder = Path(package.submodule_search_locations[0]) / "data"
        absent = [name for name in DEMO_SETS[set_name] if not (folder / name).is_file()]
        if absent:
            raise UserError(f"this scikit-image does not ship {', '.join(absent)}: install the locked version")
        return [folder / name for name in DEMO_SETS[set_name]]
    if set_name in FETCHED_SETS:
        return sorted(fetch(set_name, root, complete=complete))
    folder = Path(set_name)
    if not folder.is_dir():
        raise UserError(
            f"no set and no folder named {set_name!r}: give a folder of images, or one of "
            f"{', '.join((*FETCHED_SETS, *DEMO_SETS))}"
        )
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in FORMATS and path.is_file())
    if not files:
        raise UserError(f"{folder} holds no image ({', '.join(FORMATS)})")
    return files
