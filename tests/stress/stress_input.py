"""Damage a patch file in every way: never a wrong batch, never a hang.

    python tests/stress/stress_input.py        # about 5 minutes

Every bit outside the pairs is flipped (attributes, types, shapes, offsets, checksums), one at a time; of zero padding
only the bits of every 64th byte. The file is also cut at 2,000 random lengths. Each damaged file is checked and read
whole, in at most 20 s: it is refused with the advice to delete it, or gives the pairs of the sound file; else the
exit code is 1.

A bit flipped in a pair is not detected: there is no digest over the 5 GB, which would have to be read at every start.
"""

from __future__ import annotations

import faulthandler
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SECONDS = 20


def damaged(whole: bytes, outside: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """(what was done, the file)."""
    zero = np.frombuffer(whole, np.uint8) == 0
    gaps = zero & np.roll(zero, 1) & np.roll(zero, -1)  # mostly padding that aligns the datasets
    for place in np.flatnonzero(outside & ~gaps).tolist() + np.flatnonzero(outside & gaps)[::64].tolist():
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            yield f"bit {bit} of byte {place}", bytes(data)
    for length in np.random.default_rng(1).integers(0, len(whole), 2000).tolist():
        yield f"cut to {length} bytes", whole[:length]


def main() -> int:
    """Build a small file, damage it, count."""
    from PIL import Image

    from drrn.errors import UserError
    from drrn.images import read_pixels
    from drrn.patch_build import prepare_patches
    from drrn.patches import Patches, Recipe, attributes, check_patch_file
    from drrn.sets import image_files

    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        Image.fromarray(read_pixels(image_files("demo_test", Path())[0])[:64, :60]).save(folder / "images/a.png")
        recipe = Recipe((str(folder / "images"),), scales=(2,))
        path = prepare_patches("stress", recipe, Path(), folder, workers=1)
        attrs = attributes(recipe, [folder / "images/a.png"])
        whole, good = path.read_bytes(), Patches(path)
        everything = np.arange(len(good))
        pairs = good[everything]
        outside = np.ones(len(whole), bool)
        for start, array in zip((good.data_at, good.label_at), pairs, strict=True):
            outside[start : start + array.nbytes] = False
        for what, data in damaged(whole, outside):
            path.unlink()
            path.write_bytes(data)
            faulthandler.dump_traceback_later(SECONDS, exit=True)  # a hang inside HDF5 ends the whole thing
            try:
                check_patch_file(path, attrs)
                taken = Patches(path)[everything]
            except UserError as refusal:
                outcomes["refused" if "Delete" in str(refusal) else f"WITHOUT ADVICE, {what}: {refusal}"] += 1
            except BaseException as error:
                outcomes[f"RAISED, {what}: {type(error).__name__}: {error}"] += 1
            else:
                same = all(np.array_equal(a, b) for a, b in zip(taken, pairs, strict=True))
                outcomes["taken, and right" if same else f"WRONG BATCH, {what}"] += 1
            faulthandler.cancel_dump_traceback_later()
    for outcome, count in outcomes.items():
        print(f"{count:6} {outcome}")
    return int(not set(outcomes) <= {"refused", "taken, and right"})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    sys.exit(main())
