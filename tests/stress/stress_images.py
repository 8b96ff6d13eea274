"""Throw damaged image files at both readers: none may crash, hang, take over 1 GB or raise anything but UserError.

    python tests/stress/stress_images.py                 # 2,000 files, and a 24-megapixel photograph: 1 to 2 minutes
    python tests/stress/stress_images.py 300 --seed 7

Sound files of every kind that the readers know are damaged at random (seeded): cut, bytes and bits changed, runs
zeroed or repeated, lengths and sizes set to extremes, two files spliced. Each is read in a child process. A file
fails if the child dies, is silent for 20 s or takes too much memory; such files are kept and named; exit code 1.

Then a photograph of 6,000×4,000 is enlarged ×2 by `src/upscale.py`, with a narrow network (32 features): at most
2 GB more than with only torch and the photograph loaded.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SECONDS = 20
BYTES = 1_000_000_000
UPSCALE_BYTES = 2_000_000_000


def sound_files() -> dict[str, bytes]:
    """A small file of each kind that people have, by suffix and kind."""
    import numpy as np
    import tifffile
    from PIL import Image

    from drrn.photos.read import Photo
    from drrn.photos.write import write_photo
    from drrn.sets import image_files

    with Image.open(image_files("demo_test", Path())[1]) as photograph:
        rgb = photograph.convert("RGB").crop((90, 60, 180, 130))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    pixels = np.asarray(rgb)
    files = {}

    def save(name: str, image: Image.Image, **options: object) -> None:
        buffer = io.BytesIO()
        kind = {"jpg": "jpeg", "tif": "tiff", "jp2": "jpeg2000"}.get(name.split(".")[-1], name.split(".")[-1])
        image.save(buffer, kind, **options)
        files[name] = buffer.getvalue()

    grey, alpha = rgb.convert("L"), Image.linear_gradient("L").resize(rgb.size)
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    for suffix in ("png", "jpg", "webp", "bmp", "tif"):
        save(f"rgb.{suffix}", rgb)
    for suffix in ("png", "jpg", "bmp", "tif"):
        save(f"grey.{suffix}", grey)
    for suffix in ("gif", "ppm", "avif"):
        save(f"rgb.{suffix}", rgb)
    save("rgb.jp2", rgb, irreversible=False)
    for suffix in ("png", "webp", "tif"):
        save(f"rgba.{suffix}", rgba)
    save("exif.jpg", rgb, exif=exif)
    save("exif.png", rgb, exif=exif)
    save("progressive.jpg", rgb, progressive=True)
    save("cmyk.jpg", rgb.convert("CMYK"))
    save("palette.png", rgb.quantize(64), transparency=bytes(range(64)))
    save("palette.bmp", rgb.quantize(64))
    save("one.png", rgb.convert("1"))
    save("key.png", rgb, transparency=(1, 2, 3))
    save("lossless.webp", rgba, lossless=True)
    save("animated.webp", rgb, save_all=True, append_images=[rgba.convert("RGB").rotate(9)])
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        save(f"{compression}.tif", rgb, compression=compression)
    save("group4.tif", rgb.convert("1"), compression="group4")
    save("cmyk.tif", rgb.convert("CMYK"))
    with tempfile.TemporaryDirectory() as folder:
        for name, array in {
            "16.png": pixels.astype(np.uint16) * 257,
            "16a.png": np.asarray(rgba)[..., 2:].astype(np.uint16) * 257,
            "16.tif": pixels.astype(np.uint16) * 257,
            "16a.tif": np.asarray(rgba)[..., 2:].astype(np.uint16) * 257,
            "float.tif": pixels.astype(np.float32) / 255,
        }.items():
            path = Path(folder, name)
            write_photo(path, iter([array]), array.shape, array.dtype, Photo(array))
            files[name] = path.read_bytes()
    for name, options in {
        "planes.tif": {"planarconfig": "separate"},
        "tiled.tif": {"tile": (32, 32), "compression": "zlib", "predictor": True},
        "big.tif": {"bigtiff": True},
    }.items():
        array = pixels if name != "planes.tif" else np.moveaxis(pixels, 2, 0).astype(np.uint16)
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array, photometric="rgb", **options)
        files[name] = buffer.getvalue()
    return files


def damaged(files: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` damaged files, each file in turn; the first of every kind are plainly cut, down to 0 bytes."""
    rng = random.Random(seed)
    names = sorted(files)
    for number in range(count):
        name = names[number % len(names)]
        data = bytearray(files[name])
        kind = number // len(names)
        if kind == 0:
            data = data[: rng.choice((0, 1, 7, 20, len(data) // 3, len(data) - 3))]
        else:
            for _ in range(rng.choice((1, 1, 2, 4, 16))):
                # headers and directories stand at the ends, so half of the damage goes there
                place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 200))
                if rng.random() < 0.2:
                    place = max(0, len(data) - 1 - place)
                length = rng.choice((1, 2, 4, 8, 64))
                match rng.randrange(7):
                    case 0:
                        data[place] ^= 1 << rng.randrange(8)
                    case 1:
                        data[place] = rng.randrange(256)
                    case 2:
                        data[place : place + length] = bytes(len(data[place : place + length]))
                    case 3:  # extremes where numbers stand
                        data[place : place + 4] = rng.choice(
                            (
                                b"\xff\xff\xff\xff",
                                b"\x7f\xff\xff\xff",
                                b"\0\0\xff\xff",
                                b"\xff\xff\0\0",
                                b"\0\0\0\1",
                            )
                        )
                    case 4:
                        data[place:place] = data[place : place + length] * rng.choice((1, 50))
                    case 5:
                        del data[place : place + length]
                    case 6:
                        other = files[rng.choice(names)]
                        data[place:] = other[place:] or other
                data = data or bytearray(b"\0")
        yield name, bytes(data)


def stress(count: int, seed: int, keep: Path) -> tuple[Counter[str], list[str]]:
    """Read `count` damaged files.

    Args:
        keep: folder for the offending files.

    Returns:
        How often each reader read or refused, and the failures in words.
    """
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    child = None
    keep.mkdir(parents=True, exist_ok=True)
    try:
        for number, (name, data) in enumerate(damaged(sound_files(), count, seed)):
            path = keep / f"{number:05d}_{name}"
            path.write_bytes(data)
            if child is None:
                child = subprocess.Popen(
                    [sys.executable, __file__, "--worker"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                )  # fmt: skip
                child.stdout.readline()  # it is ready
            child.stdin.write(f"{path}\n".encode())
            ready, _, _ = select.select([child.stdout], [], [], SECONDS)
            answer = child.stdout.readline().decode().strip() if ready else f"silent for {SECONDS} s"
            if answer.startswith("ok "):
                outcomes.update(answer.split()[1:])
                path.unlink()
                continue
            if not answer:
                answer = f"the reader died with {child.wait()}"
            failures.append(f"{path}: {answer}")
            child.kill()
            child.communicate()
            child = None
    finally:
        if child is not None:
            child.kill()
            child.communicate()
    return outcomes, failures


def worker() -> None:
    """Read the files named on standard input with both readers; a line of result for each."""
    from drrn.errors import UserError
    from drrn.images import read_luminance
    from drrn.photos.read import read_photo

    real = sys.stdout
    sys.stdout = sys.stderr = io.StringIO()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("ready", file=real, flush=True)
    for line in sys.stdin:
        said = "ok"
        for reader in (read_photo, read_luminance):
            try:
                pixels = reader(Path(line.rstrip("\n")))
                size = (pixels if reader is read_luminance else pixels.pixels).size
                said += f" {reader.__name__}:read" if size else " (nothing)"
            except UserError as error:
                named = line.strip() in str(error)
                said = f"{said} {reader.__name__}:refused" if named else f"no name in {str(error)!r}"
            except BaseException as error:
                said = f"{reader.__name__} raised {type(error).__name__}: {error}".replace("\n", " ")
                break
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)  # KiB on Linux
        if grown > BYTES:
            said = f"memory grew by {grown / 1e6:.0f} MB"
        print(said, file=real, flush=True)


def flipped(folder: Path, count: int, seed: int) -> list[str]:
    """Flip a bit anywhere in PNG files: refused, or the same pixels (chunks have checksums); return the failures."""
    import numpy as np

    from drrn.errors import UserError
    from drrn.images import read_pixels

    rng, path, failures = random.Random(seed), folder / "flipped.png", []
    for name in ("rgb.png", "grey.png"):
        sound = sound_files()[name]
        path.write_bytes(sound)
        pixels = read_pixels(path)
        for _ in range(count // 2):
            place, bit = rng.randrange(len(sound)), rng.randrange(8)
            path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << bit]) + sound[place + 1 :])
            try:
                same = np.array_equal(read_pixels(path), pixels)
            except UserError:
                continue
            if not same:
                failures.append(f"{name} with bit {bit} of byte {place} flipped gives other pixels")
    path.unlink()
    return failures


def photograph(folder: Path) -> list[str]:
    """Enlarge a photograph of 6,000×4,000 pixels and measure the memory; return the failures."""
    from PIL import Image

    from drrn.config import ModelConfig
    from drrn.model import DRRN
    from drrn.sets import image_files
    from drrn.weights.ours import save_weights

    source = Path(__file__).resolve().parents[2] / "src"
    with Image.open(image_files("demo_test", Path())[2]) as image:
        image.resize((6000, 4000), Image.Resampling.BICUBIC).save(folder / "large.jpg", quality=92)
    model = vars(ModelConfig(B=1, U=1, features=32, norm="batch", bias=True, weight_sharing=True, multi_path=True))
    save_weights(folder / "narrow.safetensors", DRRN(1, 1, 32), model, {"scales": [2]})
    large = str(folder / "large.jpg")
    load = f"import torch; from drrn.photos.read import *; photo = read_photo(Path({large!r}))"
    target = folder / "larger.jpg"  # JPEG keeps the result in memory too; PNG and TIFF do not
    checkpoint = f"checkpoint={folder / 'narrow.safetensors'}"
    arguments = [f"input={folder / 'large.jpg'}", "scale=2", checkpoint, f"output={target}"]
    enlarge = f"import sys, upscale; sys.argv[1:] = {arguments!r}; upscale.launch(upscale.main)"
    over = _peak(enlarge, source) - _peak(load, source)
    print(f"6,000×4,000 ×2: {over / 1e9:.2f} GB over the loaded image")
    failures = [] if over <= UPSCALE_BYTES else [f"6,000×4,000 ×2 took {over / 1e9:.2f} GB over the loaded image"]
    with warnings.catch_warnings(action="ignore"), Image.open(target) as image:
        if image.size != (12_000, 8_000):
            failures.append(f"{target}: {image.size}")
    for path in folder.glob("large*"):
        path.unlink()
    (folder / "narrow.safetensors").unlink()
    return failures


def _peak(code: str, source: Path) -> int:
    """Peak resident memory, in bytes, of a Python process that runs some code; Linux only."""
    told = 'print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])'
    code = f"import atexit; atexit.register(lambda: {told})\n{code}"  # a command ends its process by itself
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(source)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return 1024 * int(run.stdout.split()[-1])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", nargs="?", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return 0
    keep = Path(tempfile.mkdtemp(prefix="drrn_stress_"))
    outcomes, failures = stress(options.count, options.seed, keep)
    print(", ".join(f"{outcome} {n}" for outcome, n in sorted(outcomes.items())))
    for failure in failures:
        print(failure)
    print(f"{options.count} damaged files, seed {options.seed}: {len(failures)} failures")
    failures += (others := flipped(keep, options.count, options.seed))
    print("\n".join(others) or f"{options.count} flipped bits of PNG files: none gives other pixels")
    failures += (large := photograph(keep))
    print("\n".join(large) or "the large photograph: as promised")
    if not failures:
        keep.rmdir()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    sys.exit(main())
