"""Decoding speed: ours in each mode beside the libraries that a user would take instead.

Everything runs interleaved on the same files and the same boxes, so that the load of the machine
falls on all alike; figures are medians over the rounds, in images per second of CPU time.

    python benches/bench_decode.py [--corpus DIR] [--count 24] [--rounds 7]

writes results/decode.json and results/decode.png. Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decode_corpus import corpus
from PIL import Image
from promptkd import _rust
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.v2 import functional as v2

RESULTS = Path(__file__).resolve().parent / "results"
SIDE = 224
SQUASH = [_rust.Target(SIDE, SIDE)]
CENTRE = [_rust.Target(SIDE, SIDE, "shortest")]

Work = Callable[[list[bytes], list[list[int]]], Any]

# What has to hold, as ratios in one run: (ours, against, task) by size of the pictures.
ANTIALIASED = ("pillow", "torchvision", "torchvision.io + v2", "simplejpeg + torch")
TARGETS: dict[tuple[str, str, str], dict[str, float]] = {
    ("ours", "fastest peer", "crop"): {"500x375": 2.1, "1024x768": 2.3, "2048x1536": 2.35},
    ("ours, libjpeg", "fastest peer", "crop"): {
        "500x375": 1.4,
        "1024x768": 1.45,
        "2048x1536": 1.6,
    },
    ("ours", "fastest peer", "centre"): {"500x375": 1.55, "1024x768": 1.6, "2048x1536": 1.65},
    ("ours", "torchvision", "crop"): {"500x375": 3.6, "1024x768": 3.8, "2048x1536": 4.4},
    ("ours, scaled", "ours", "crop"): {"1024x768": 1.1, "2048x1536": 1.4},
    ("ours, avx2", "fastest peer", "crop"): {},
}


def ours(task: str, scaled: bool = False, **how: Any) -> Work:
    def work(files: list[bytes], boxes: list[list[int]]) -> Any:
        _rust.configure(**how)
        if task == "centre":
            return _rust.decode(files, CENTRE, threads=1, scaled=scaled)
        return _rust.decode(files, SQUASH, boxes=np.array(boxes), threads=1, scaled=scaled)

    return work


def one_by_one(view: Callable[[bytes, list[int] | None], Any], task: str) -> Work:
    def work(files: list[bytes], boxes: list[list[int]]) -> Any:
        return [view(f, b if task == "crop" else None) for f, b in zip(files, boxes, strict=True)]

    return work


def pillow(data: bytes, box: list[int] | None) -> Any:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if box is not None:
        return np.asarray(image.crop(tuple(box)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return _pillow_centre(image)


def _pillow_centre(image: Image.Image) -> Any:
    short = min(image.size)
    image = image.resize(
        (SIDE * image.width // short, SIDE * image.height // short), Image.Resampling.BICUBIC
    )
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


def torchvision_v1(data: bytes, box: list[int] | None) -> Any:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return F.pil_to_tensor(_torchvision_view(image, box))


def torchvision_io(data: bytes, box: list[int] | None) -> Any:
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return _tensor_view(decode_jpeg(encoded, mode=ImageReadMode.RGB), box)


def _torchvision_view(image: Any, box: list[int] | None) -> Any:
    how = InterpolationMode.BICUBIC
    if box is None:
        return F.center_crop(F.resize(image, SIDE, how, antialias=True), [SIDE, SIDE])
    left, top, right, bottom = box
    size = [SIDE, SIDE]
    return F.resized_crop(image, top, left, bottom - top, right - left, size, how, antialias=True)


def _tensor_view(image: torch.Tensor, box: list[int] | None) -> Any:
    """By torchvision's v2 functions, which resize uint8 as it is."""
    how = InterpolationMode.BICUBIC
    if box is None:
        return v2.center_crop(v2.resize(image, [SIDE], how, antialias=True), [SIDE, SIDE])
    left, top, right, bottom = box
    size = [SIDE, SIDE]
    return v2.resized_crop(image, top, left, bottom - top, right - left, size, how, antialias=True)


def simplejpeg_torch(data: bytes, box: list[int] | None) -> Any:
    import simplejpeg

    pixels = torch.from_numpy(simplejpeg.decode_jpeg(data))
    if box is None:
        return _tensor_view(pixels.permute(2, 0, 1), box)
    left, top, right, bottom = box
    view = pixels[top:bottom, left:right].permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(view, (SIDE, SIDE), mode="bicubic", antialias=True)


def opencv(data: bytes, box: list[int] | None) -> Any:
    import cv2

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    left, top, right, bottom = box or _centre_square(image.shape[1], image.shape[0])
    return cv2.resize(image[top:bottom, left:right], (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def _centre_square(width: int, height: int) -> list[int]:
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return [left, top, left + side, top + side]


PEERS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "pillow": (pillow, None),
    "torchvision": (torchvision_v1, None),
    "torchvision.io + v2": (torchvision_io, None),
    "simplejpeg + torch": (simplejpeg_torch, "simplejpeg"),
    "opencv, area": (opencv, "cv2"),
}


def workers(task: str) -> dict[str, Work]:
    """What is measured, by name."""
    found: dict[str, Work] = {
        "ours": ours(task),
        "ours, libjpeg": ours(task, jpeg="libjpeg"),
        "ours, scaled": ours(task, scaled=True),
    }
    for level in ("avx2", "portable"):
        try:
            _rust.configure(simd=level)
        except ValueError:
            continue
        found[f"ours, {level}"] = ours(task, simd=level)
    _rust.configure()
    for name, (view, module) in PEERS.items():
        try:
            if module is not None:
                __import__(module)
        except ImportError:
            continue
        found[name] = one_by_one(view, task)
    return found


def measure(files: list[bytes], task: str, rounds: int) -> dict[str, float]:
    """Images per CPU second of each, medians over interleaved rounds."""
    sizes, _ = _rust.image_sizes(files)
    keys, views = np.arange(len(files), dtype=np.uint64), np.zeros(len(files), np.uint32)
    boxes = _rust.random_views(0, keys, views, sizes)[0].tolist()
    speeds: dict[str, list[float]] = {}
    found = workers(task)
    for work in found.values():
        work(files[:4], boxes[:4])
    for _ in range(rounds):
        for name, work in found.items():
            started = time.process_time()
            work(files, boxes)
            speeds.setdefault(name, []).append(len(files) / (time.process_time() - started))
    _rust.configure()
    return {name: statistics.median(values) for name, values in speeds.items()}


def two_threads(files: list[bytes], rounds: int) -> float:
    """Wall speed of two threads over that of one; free cores are needed to see it."""
    batch = files * max(1, 96 // len(files))
    ratios = []
    for _ in range(rounds):
        walls = []
        for threads in (1, 2):
            started = time.perf_counter()
            _rust.decode(batch, CENTRE, threads=threads)
            walls.append(time.perf_counter() - started)
        ratios.append(walls[0] / walls[1])
    return statistics.median(ratios)


def scaled_error(files: list[bytes]) -> dict[str, float]:
    """What scaled decoding costs, in grey levels: largest, mean, share off by more than 8."""
    (exact,), _ = _rust.decode(files, CENTRE)
    (scaled,), _ = _rust.decode(files, CENTRE, scaled=True)
    error = np.abs(exact.astype(int) - scaled)
    return {
        "max": int(error.max()),
        "mean": round(float(error.mean()), 3),
        "over 8": round(float((error > 8).mean()), 4),
    }


def rows_of(speeds: dict[str, float], size: str, task: str) -> list[dict[str, Any]]:
    """The comparisons that have a target, for one size and task."""
    peers = {name: speeds[name] for name in ANTIALIASED if name in speeds}
    fastest = max(peers, key=lambda name: peers[name])
    rows = []
    for (name, against, wanted_task), targets in TARGETS.items():
        if wanted_task != task or name not in speeds or (targets and size not in targets):
            continue
        baseline = fastest if against == "fastest peer" else against
        ratio, target = speeds[name] / speeds[baseline], targets.get(size)
        rows.append(
            {
                "name": f"{task} {size}: {name} against {baseline}",
                "ours": round(speeds[name], 1),
                "baseline": round(speeds[baseline], 1),
                "unit": "images per CPU second",
                "ratio": round(ratio, 3),
                "target": target,
                "holds": None if target is None else ratio >= target,
            }
        )
    return rows


def machine() -> dict[str, Any]:
    versions = {}
    for name in ("torch", "torchvision", "pillow", "simplejpeg", "opencv-python-headless"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "threads": os.cpu_count(),
        "gpu": None,
        "versions": versions,
        "load": [round(v, 2) for v in os.getloadavg()],
    }


def plot(table: dict[str, dict[str, float]]) -> None:
    """Bars of the random resized crop, as multiples of torchvision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    crops = {name.split(" ")[1]: s for name, s in table.items() if name.startswith("crop")}
    figure, axes = plt.subplots(1, len(crops), figsize=(4 * len(crops), 3.6), sharex=True)
    for axis, (size, speeds) in zip(np.atleast_1d(axes), crops.items(), strict=True):
        names = sorted(speeds, key=lambda name: speeds[name])
        colours = ["tab:blue" if n.startswith("ours") else "tab:grey" for n in names]
        axis.barh(names, [speeds[n] / speeds["torchvision"] for n in names], color=colours)
        axis.set_title(size)
        axis.set_xlabel("speed, torchvision on Pillow = 1")
    figure.suptitle("JPEG to a 224 x 224 random resized crop, one thread")
    figure.tight_layout()
    figure.savefig(RESULTS / "decode.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, help="a folder of JPEG files")
    parser.add_argument("--count", type=int, default=24, help="files of each size")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table, rows, extra = {}, [], {}
    for size, files in corpus(arguments.corpus, arguments.count).items():
        for task in ("crop", "centre"):
            speeds = measure(files, task, arguments.rounds)
            table[f"{task} {size}"] = speeds
            rows += rows_of(speeds, size, task)
            print(f"\n{task} {size} (mean {sum(map(len, files)) // len(files)} bytes)")
            for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
                print(f"  {name:<22}{speed:9.1f} images per CPU second")
        ratio = two_threads(files, arguments.rounds)
        rows.append(
            {
                "name": f"{size}: two threads against one",
                "ours": round(ratio, 3),
                "baseline": 1.0,
                "unit": "wall speed",
                "ratio": round(ratio, 3),
                "target": 1.9,
                "holds": ratio >= 1.9,
            }
        )
        extra[size] = scaled_error(files)
        print(f"  scaled against exact, grey levels: {extra[size]}")
    print()
    for row in rows:
        mark = {True: "holds", False: "MISSED", None: ""}[row["holds"]]
        print(f"{row['name']:<62}{row['ratio']:6.2f}  target {row['target']}  {mark}")
    RESULTS.mkdir(exist_ok=True)
    result = {"machine": machine(), "rows": rows, "speeds": table, "scaled_error": extra}
    (RESULTS / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(table)


@pytest.mark.parametrize("size", ["500x375", "1024x768", "2048x1536"])
@pytest.mark.parametrize("name", ["ours", "torchvision", "torchvision.io + v2"])
def test_random_resized_crop(benchmark: Any, size: str, name: str) -> None:
    files = corpus(None, 8)[size]
    boxes = [[10, 10, 300, 300]] * len(files)
    benchmark.group = size
    benchmark(functools.partial(workers("crop")[name], files, boxes))


if __name__ == "__main__":
    main()
