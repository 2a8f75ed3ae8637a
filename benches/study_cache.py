"""A teacher cache of many pictures from start to end: build, info, verify, extend, distil.

    python benches/study_cache.py                     # 100,000 generated pictures, 1 GB of disk
    python benches/study_cache.py --images 2000 --steps 50

Makes small JPEG pictures and models too small to be good for anything, runs the commands of the
command line on them, and prints how long each took and how much it wrote.
"""

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import machine
from PIL import Image
from promptkd.cli import main as promptkd
from promptkd.files import write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import CLASSES, make_models

IN_A_FOLDER = 1000
SIZE = 48


def make_pictures(folder: Path, count: int) -> int:
    """Blurred noise as JPEG, a thousand a folder; the bytes of all of them."""
    rng, total = np.random.default_rng(0), 0
    for number in range(count):
        path = folder / f"{number // IN_A_FOLDER:04}" / f"{number:07}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((SIZE, SIZE), Image.Resampling.BILINEAR).save(path)
        total += path.stat().st_size
    return total


def run(*words: object) -> float:
    """Seconds of a command, which must succeed."""
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = promptkd([str(word) for word in words])
    if code != 0:
        raise SystemExit(f"'promptkd {' '.join(map(str, words))}' failed: {printed.getvalue()}")
    return time.perf_counter() - begun


def bytes_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def study(count: int, steps: int, work: Path) -> list[tuple[str, float, int]]:
    """(command, seconds, bytes of the cache afterwards) of each."""
    photos, cache = work / "photos", work / "cache"
    begun = time.perf_counter()
    size = make_pictures(photos, count)
    print(f"{count:,} pictures, {size / 1e6:.0f} MB, in {time.perf_counter() - begun:.0f} s")
    models = make_models(work / "models")
    names = work / "names.txt"
    names.write_text("\n".join(CLASSES), encoding="utf-8")
    guide = ["--teacher", models.teacher, "--classes", names, "--device", "cpu"]
    template = ["--templates", "a photo of a {}."]
    distil = ["--student", models.student, "--output", work / "student", "--quiet"]
    distil += ["--max-steps", steps, "--min-steps", 0, "--views", 3, "--holdout", 0.001]
    commands: list[tuple[str, list[object]]] = [
        ("cache build, 2 views", ["build", photos, "--output", cache, "--views", 2, "--quiet"]),
        ("cache build again", ["build", photos, "--output", cache, "--views", 2, "--quiet"]),
        ("cache info", ["info", cache]),
        ("cache verify, every byte", ["verify", cache]),
        ("cache verify with the pictures", ["verify", cache, "--images", photos]),
        (
            "cache extend to 3 views",
            ["extend", photos, "--cache", cache, "--views", 3, "--quiet"],
        ),
    ]
    rows = []
    for name, words in commands:
        extra = [*guide, *template] if words[0] in ("build", "extend") else []
        rows.append((f"promptkd {name}", run("cache", *words, *extra), bytes_of(cache)))
        print(f"{rows[-1][0]}: {rows[-1][1]:.1f} s", flush=True)
    seconds = run("distill", photos, "--cache", cache, *guide, *template, *distil)
    rows.append((f"promptkd distill --cache, {steps} steps", seconds, bytes_of(cache)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="where files go; default: a temporary one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="study-cache-", dir=args.folder))
    try:
        rows = study(args.images, args.steps, work)
    finally:
        shutil.rmtree(work)
    print(f"\n| {args.images:,} pictures | seconds | cache MB |\n|---|---|---|")
    for name, seconds, size in rows:
        print(f"| `{name}` | {seconds:.1f} | {size / 1e6:.0f} |")
    found = [{"command": n, "seconds": s, "cache_bytes": b} for n, s, b in rows]
    content = {"machine": machine(), "images": args.images, "commands": found}
    write_json(Path(__file__).parent / "results" / "cache_large.json", content)


if __name__ == "__main__":
    main()
