"""Decoding speed: ours in each mode beside the libraries that a user would take instead.

Everything runs interleaved on the same files and the same boxes, so that the load of the machine
falls on all alike; figures are medians over the rounds, in images per second of CPU time, and of
wall time for loaders and threads.

    python benches/bench_decode.py [--corpus DIR] [--count 24] [--rounds 7] [--only crop ...] [--add]

writes results/decode.json and results/decode.png. Libraries that are not installed are left out:
`pip install simplejpeg opencv-python-headless kornia-rs nvidia-dali-cuda120 nvidia-nvimgcodec-cu12`.
`--only` takes some of the sizes or tasks, and `--add` keeps what the file has of the others.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import RESULTS, Row, report
from decode_corpus import SIZES, corpus
from PIL import Image
from promptkd import _rust
from promptkd.data.stream import Boxes, Views, stream_batches
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.v2 import functional as v2

SIDE = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH = 32
TASKS = ("crop", "centre", "loader", "threads")
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
    ("ours, avx2", "fastest peer", "centre"): {},
    ("ours, entropy alone", "fastest peer", "crop"): {},
    ("ours, entropy alone", "fastest peer", "centre"): {},
}
LOADER = {"500x375": 5.0, "1024x768": 4.5, "2048x1536": 3.2}


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


def kornia(data: bytes, box: list[int] | None) -> Any:
    from kornia_rs import imgproc, io

    image = np.asarray(io.decode_image_jpegturbo(data, "rgb"))
    left, top, right, bottom = box or _centre_square(image.shape[1], image.shape[0])
    view = np.ascontiguousarray(image[top:bottom, left:right])
    return imgproc.resize(view, (SIDE, SIDE), "bicubic", antialias=True)


@functools.cache
def _dali_pipeline(task: str, count: int) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=count, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        image = fn.decoders.image(fn.external_source(name="files"), output_type=types.RGB)
        how = {"interp_type": types.INTERP_CUBIC, "antialias": True}
        if task == "centre":
            return fn.crop(fn.resize(image, resize_shorter=SIDE, **how), crop=(SIDE, SIDE))
        start, size = fn.external_source(name="start"), fn.external_source(name="size")
        view = fn.slice(image, start, size, axes=(1, 0))
        return fn.resize(view, resize_x=SIDE, resize_y=SIDE, **how)

    built = pipeline()
    built.build()
    return built


def dali(task: str) -> Work:
    def work(files: list[bytes], boxes: list[list[int]]) -> Any:
        pipeline = _dali_pipeline(task, len(files))
        pipeline.feed_input("files", [np.frombuffer(data, np.uint8) for data in files])
        if task == "crop":
            sides = np.array(boxes, np.int32)
            pipeline.feed_input("start", list(sides[:, :2]))
            pipeline.feed_input("size", list(sides[:, 2:] - sides[:, :2]))
        return pipeline.run()

    return work


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
    "kornia-rs": (kornia, "kornia_rs"),
}


def workers(task: str) -> dict[str, Work]:
    """What is measured, by name."""
    found: dict[str, Work] = {
        "ours": ours(task),
        "ours, libjpeg": ours(task, jpeg="libjpeg"),
        "ours, scaled": ours(task, scaled=True),
        "ours, entropy alone": ours(task, jpeg="entropy"),
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
    return {**found, "dali": dali(task)} if _has_dali(task) else found


def _has_dali(task: str) -> bool:
    """It needs a library of codecs beside it, which it looks for when a pipeline is built."""
    try:
        _dali_pipeline(task, 1)
    except (ImportError, RuntimeError):
        return False
    return True


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


def two_threads(files: list[bytes], rounds: int) -> tuple[float, float]:
    """Pictures a second of two threads and of one; free cores are needed to see it."""
    batch = files * max(1, 96 // len(files))
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for threads, found in speeds.items():
            started = time.perf_counter()
            _rust.decode(batch, CENTRE, threads=threads)
            found.append(len(batch) / (time.perf_counter() - started))
    return statistics.median(speeds[2]), statistics.median(speeds[1])


class Files(torch.utils.data.Dataset[torch.Tensor]):
    """What a user of torchvision writes."""

    def __init__(self, paths: list[Path], transform: Callable[[Any], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def torchvision_loader(paths: list[Path], task: str) -> Callable[[], int]:
    """A DataLoader with two workers, which live on between the rounds."""
    how = InterpolationMode.BICUBIC
    views: dict[str, list[Any]] = {
        "crop": [
            transforms.RandomResizedCrop(SIDE, (0.08, 1.0), interpolation=how),
            transforms.RandomHorizontalFlip(),
        ],
        "centre": [transforms.Resize(SIDE, how), transforms.CenterCrop(SIDE)],
    }
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    data = Files(paths, transforms.Compose([*views[task], *last]))
    loader = torch.utils.data.DataLoader(
        data, batch_size=BATCH, num_workers=2, persistent_workers=True
    )
    return lambda: sum(len(batch) for batch in loader)


def our_loader(paths: list[Path], task: str) -> Callable[[], int]:
    """Two threads; the batches are normalised in Rust too."""

    def jobs() -> Iterator[Boxes | Views]:
        for start in range(0, len(paths), BATCH):
            rows = np.arange(start, min(start + BATCH, len(paths)))
            some = [str(path) for path in paths[start : start + BATCH]]
            if task == "centre":
                yield Boxes(rows, some)
            else:
                yield Views(rows, some, 0, rows.astype(np.uint64), np.zeros(len(rows), np.uint32))

    def run() -> int:
        done, targets = 0, CENTRE if task == "centre" else SQUASH
        for batch in stream_batches(jobs(), targets, threads=2):
            planes = _rust.normalize(batch.pixels[0].numpy(), MEAN, STD, threads=2)
            done += len(torch.from_numpy(planes))
        return done

    return run


def loaders(files: list[bytes], rounds: int, task: str) -> tuple[float, float]:
    """Pictures a second of wall time, from files to normalised float32 batches: ours, theirs."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jpg" for i in range(len(files))]
        for path, data in zip(paths, files, strict=True):
            path.write_bytes(data)
        paths *= max(1, 8 * BATCH // len(paths))
        runs = our_loader(paths, task), torchvision_loader(paths, task)
        speeds: list[list[float]] = [[], []]
        for round_ in range(rounds + 1):
            for run, found in zip(runs, speeds, strict=True):
                started = time.perf_counter()
                count = run()
                if round_ > 0:  # the first starts the workers
                    found.append(count / (time.perf_counter() - started))
    return statistics.median(speeds[0]), statistics.median(speeds[1])


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


def rows_of(speeds: dict[str, float], size: str, task: str) -> list[Row]:
    """The comparisons that have a target, for one size and task."""
    peers = {name: speeds[name] for name in ANTIALIASED if name in speeds}
    fastest = max(peers, key=lambda name: peers[name])
    rows = []
    for (name, against, wanted_task), targets in TARGETS.items():
        if wanted_task != task or name not in speeds or (targets and size not in targets):
            continue
        baseline = fastest if against == "fastest peer" else against
        label = f"{task} {size}: {name} against {baseline}"
        rows.append(Row(label, speeds[name], speeds[baseline], "img/CPU/s", targets.get(size)))
    return rows


def versions() -> dict[str, str]:
    found = {}
    names = ("torchvision", "pillow", "simplejpeg", "opencv-python-headless", "kornia-rs")
    for name in (*names, "nvidia-dali-cuda120"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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


def run(files: list[bytes], size: str, task: str, rounds: int, result: dict[str, Any]) -> list[Row]:
    """One task at one size: its rows; what else there is to know goes into `result`."""
    if task == "threads":
        return [Row(f"threads {size}: two against one", *two_threads(files, rounds), "img/s", 1.9)]
    if task == "loader":
        return [
            Row(
                f"loader {size}, {view}: ours against DataLoader",
                *loaders(files, rounds, view),
                "img/s",
                LOADER.get(size) if view == "crop" else None,
            )
            for view in ("crop", "centre")
        ]
    speeds = measure(files, task, rounds)
    result["speeds"][f"{task} {size}"] = speeds
    print(f"\n{task} {size} (mean {sum(map(len, files)) // len(files)} bytes)")
    for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
        print(f"  {name:<22}{speed:9.1f} images per CPU second", flush=True)
    if task == "centre":
        result["scaled_error"][size] = scaled_error(files)
        print(f"  scaled against exact, grey levels: {result['scaled_error'][size]}")
    return rows_of(speeds, size, task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, help="a folder of JPEG files")
    parser.add_argument("--count", type=int, default=24, help="files of each size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[], help="sizes or tasks to measure")
    parser.add_argument("--add", action="store_true", help="keep what was measured before")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "decode.json"
    result: dict[str, Any] = {"speeds": {}, "scaled_error": {}}
    rows: list[Row] = []
    if arguments.add:
        before = json.loads(path.read_text(encoding="utf-8"))
        result = {key: before[key] for key in result}
        fields = ("name", "ours", "baseline", "unit", "target")
        rows = [Row(**{field: row[field] for field in fields}) for row in before["rows"]]
    tasks = [task for task in TASKS if task in arguments.only] or TASKS
    for size, files in corpus(arguments.corpus, arguments.count).items():
        if set(SIZES).intersection(arguments.only) and size not in arguments.only:
            continue
        for task in tasks:
            found = run(files, size, task, arguments.rounds, result)
            names = {row.name for row in found}
            rows = [row for row in rows if row.name not in names] + found
    print()
    report("decode", rows, peers=versions(), **result)
    if any(name.startswith("crop") for name in result["speeds"]):
        plot(result["speeds"])


@pytest.mark.parametrize("size", ["500x375", "1024x768", "2048x1536"])
@pytest.mark.parametrize("name", ["ours", "torchvision", "torchvision.io + v2"])
def test_random_resized_crop(benchmark: Any, size: str, name: str) -> None:
    files = corpus(None, 8)[size]
    boxes = [[10, 10, 300, 300]] * len(files)
    benchmark.group = size
    benchmark(functools.partial(workers("crop")[name], files, boxes))


if __name__ == "__main__":
    main()
