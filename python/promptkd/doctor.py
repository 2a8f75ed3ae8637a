"""A look at the machine, the pictures and the models before a long run."""

from __future__ import annotations

import os
import platform
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from promptkd import _rust, frozen
from promptkd.data.decode import decode_images
from promptkd.data.sources import ImageList
from promptkd.plan import LIST_BYTES, NAME_BYTES, ROW_BYTES, WHOLE_BYTES, row_bytes
from promptkd.stages.distill import DistillConfig
from promptkd.throughput import Throughput

BATCH_SIZES = (8, 16, 32, 64, 128, 256)
_PACKAGES = ("promptkd", "torch", "open_clip_torch", "triton", "numpy", "pillow")
_TINY = 0.5
"""Pictures whose shorter side is below this share of the student's size are called tiny."""
_BUSY = 0.8
"""Share of the memory that a run may plan with."""
_NAMED = 5


def look_at_machine(device: torch.device) -> dict[str, Any]:
    """Devices, versions, and which of the fast paths are in use."""
    gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "processor": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "memory_bytes": memory_bytes(device),
        "loss_kernels": _kernels(gpu),
        "decoder": f"{decoder_level()} instructions",
        "packed_weights": [n for n in ("float32", "bfloat16") if frozen.packs(getattr(torch, n))],
        "pinned_memory": gpu,
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _kernels(gpu: bool) -> str:
    if find_spec("promptkd.kernels") is None:
        return "off: promptkd.kernels can't be imported; the plain loss is used"
    if not gpu:
        return "fused, for the processor"
    return "fused, Triton" if _version("triton") else "off: Triton is missing"


def decoder_level() -> str:
    """The instructions that resizing uses on this processor."""
    try:
        for level in ("avx512", "avx2"):
            try:
                _rust.configure(simd=level)
            except ValueError:
                continue
            return level
        return "portable"
    finally:
        _rust.configure()


def memory_bytes(device: torch.device) -> int:
    """Memory of the device: a GPU's own, or the machine's (as far as this process may use it)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


@dataclass(frozen=True, slots=True)
class DataReport:
    """What a sample of the pictures showed.

    Attributes:
        num_images: pictures in the list; `looked_at` of them were decoded.
        picture_bytes: mean size of a file of the sample.
        median_side: median length of the shorter side in pixels.
        tiny: names of pictures much smaller than the student's input.
        corrupt: why pictures can't be decoded.
        empty_classes: class names without a labelled picture.
        in_train_and_test: (name, name) of pictures with the same bytes in both.
    """

    num_images: int
    looked_at: int
    picture_bytes: float
    median_side: int
    tiny: tuple[str, ...]
    corrupt: tuple[str, ...]
    empty_classes: tuple[str, ...]
    in_train_and_test: tuple[tuple[str, str], ...]

    def warnings(self) -> list[str]:
        """One sentence for everything that should be seen to."""
        kinds: list[tuple[Sequence[Any], str]] = [
            (self.empty_classes, "classes without a labelled picture"),
            (self.in_train_and_test, "pictures stand in both train and test"),
            (self.tiny, f"of {self.looked_at} pictures are much smaller than the student's input"),
            (self.corrupt, f"of {self.looked_at} pictures can't be decoded"),
        ]
        return [
            f"{len(found)} {what}: "
            + ", ".join(map(_name, found[:_NAMED]))
            + (" …" if len(found) > _NAMED else "")
            for found, what in kinds
            if found
        ]


def _name(item: Any) -> str:
    return " = ".join(item) if isinstance(item, tuple) else str(item)


def look_at_data(
    images: ImageList,
    size: int,
    *,
    labelled: ImageList | None = None,
    test: ImageList | None = None,
    sample: int = 500,
) -> DataReport:
    """Decode a sample of the pictures; compare the bytes of train and test.

    Args:
        images: the pictures to distil on.
        size: shorter side of the student's input in pixels.
        labelled: those with labels, if any.
        test: those to evaluate on, if any.
        sample: how many to decode, evenly spread.
    """
    some = images.select(range(0, len(images), -(-len(images) // sample)))
    sizes, unread = _rust.image_sizes(some.paths)
    sides = sizes.min(axis=1)
    known = {row for row, _, _ in unread}
    corrupt = {row: reason for row, _, reason in unread} | _undecodable(some, known)
    files = [os.stat(p).st_size for p in some.paths]
    good = [row for row in range(len(some)) if row not in known]
    return DataReport(
        num_images=len(images),
        looked_at=len(some),
        picture_bytes=sum(files) / len(files),
        median_side=int(torch.tensor(sides[good]).median()) if good else 0,
        tiny=tuple(some.names[row] for row in good if sides[row] < _TINY * size),
        corrupt=tuple(corrupt.values()),
        empty_classes=_empty_classes(labelled),
        in_train_and_test=() if test is None else _same_bytes(images, test),
    )


def _undecodable(images: ImageList, known: set[int]) -> dict[int, str]:
    rows = [row for row in range(len(images)) if row not in known]
    target = _rust.Target(32, 32, "squash", "bilinear", 0)
    found: dict[int, str] = {}
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        _, failed = decode_images(
            [images.paths[r] for r in part], [target], orient=False, on_error="skip"
        )
        found |= {part[place]: reason for place, _, reason in failed}
    return found


def _empty_classes(labelled: ImageList | None) -> tuple[str, ...]:
    if labelled is None or labelled.labels is None or labelled.class_names is None:
        return ()
    present = set(labelled.labels.tolist())
    return tuple(n for row, n in enumerate(labelled.class_names) if row not in present)


def _same_bytes(train: ImageList, test: ImageList) -> tuple[tuple[str, str], ...]:
    """Pictures of the same bytes; only files of equal size are read."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for row, path in enumerate(train.paths):
        by_size[os.stat(path).st_size].append(row)
    pairs = [
        (row, theirs)
        for theirs, path in enumerate(test.paths)
        for row in by_size.get(os.stat(path).st_size, ())
    ]
    mine = _hashes(train, sorted({a for a, _ in pairs}))
    other = _hashes(test, sorted({b for _, b in pairs}))
    return tuple((train.names[a], test.names[b]) for a, b in pairs if mine[a] == other[b])


def _hashes(images: ImageList, rows: Sequence[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        found |= dict(
            zip(part, _rust.read_files([images.paths[r] for r in part])[1].tolist(), strict=True)
        )
    return found


@dataclass(frozen=True, slots=True)
class Advice:
    """Estimates and recommendations for a run.

    Attributes:
        graph_bytes: memory of the student's graph by batch size.
        batch_size: recommended; `micro_batch` too where the batch does not fit (0: it does).
        views: K; `content` of the cache.
        cache_bytes: what such a cache takes on disk.
        hours: filling the cache, training from it, and training with the teacher in every step.
        list_bytes: memory of the list of pictures.
    """

    graph_bytes: dict[int, int]
    batch_size: int
    micro_batch: int
    views: int
    content: str
    cache_bytes: float
    hours: dict[str, float]
    list_bytes: int


def advise(
    speeds: Throughput, num_images: int, config: DistillConfig, *, memory: int, disk: int
) -> Advice:
    """What to set, from measured speeds and the machine's limits."""
    free = _BUSY * memory - sum(speeds.weight_bytes) - LIST_BYTES * num_images
    fits = [size for size in BATCH_SIZES if size * speeds.graph_bytes <= free]
    batch = min(config.batch_size, max(2, num_images))
    micro = 0 if batch * speeds.graph_bytes <= free else max(fits, default=1)
    per_epoch = max(1, num_images // batch)
    epochs = -(-config.num_steps(per_epoch) // per_epoch)
    wanted = min(epochs, config.views or epochs)
    views, content = _cache_for(speeds, num_images, wanted, disk)
    answer = row_bytes(content, speeds.feature_width, speeds.num_classes)
    beside = ROW_BYTES + NAME_BYTES
    steps = config.num_steps(per_epoch)
    seen = steps * batch
    return Advice(
        graph_bytes={size: size * speeds.graph_bytes for size in BATCH_SIZES},
        batch_size=batch,
        micro_batch=micro,
        views=views,
        content=content,
        cache_bytes=num_images
        * (views * (answer + beside) + WHOLE_BYTES * speeds.feature_width + beside),
        hours={
            "fill a cache": num_images * (views + 1) / speeds.speed("fill a cache") / 3600,
            "train from a cache": seen / speeds.speed("train from a cache") / 3600,
            "train with the teacher": seen / speeds.speed("train with the teacher") / 3600,
        },
        list_bytes=LIST_BYTES * num_images,
    )


def _cache_for(speeds: Throughput, num_images: int, wanted: int, disk: int) -> tuple[int, str]:
    """K and content that fit in half of the free disk: features, logits where they are smaller."""
    classes, width = speeds.num_classes, speeds.feature_width
    beside = ROW_BYTES + NAME_BYTES
    left = disk / 2 / num_images - WHOLE_BYTES * width - beside
    contents = ["features", "logits"] if classes < width else ["features"]
    for content in contents:
        if wanted * (row_bytes(content, width, classes) + beside) <= left:
            return wanted, content
    smallest = row_bytes(contents[-1], width, classes) + beside
    return max(1, int(left // smallest)), contents[-1]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that the doctor found."""

    machine: dict[str, Any]
    data: DataReport
    speeds: Throughput | None = None
    advice: Advice | None = None
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def diagnose(
    machine: dict[str, Any],
    data: DataReport,
    config: DistillConfig,
    speeds: Throughput | None,
    more: Sequence[str] = (),
) -> Diagnosis:
    """Put the findings together, with what they mean for a run of `config`."""
    warnings = [*more, *data.warnings()]
    advice = None
    if speeds is not None:
        memory, disk = machine["memory_bytes"], machine["free_disk_bytes"]
        advice = advise(speeds, data.num_images, config, memory=memory, disk=disk)
        if advice.micro_batch:
            warnings.append(
                f"a batch of {advice.batch_size} needs "
                f"{advice.batch_size * speeds.graph_bytes / 1e9:.1f} GB of memory for the student; "
                f"use --micro-batch {advice.micro_batch}"
            )
        if advice.cache_bytes > disk:
            warnings.append(
                f"a cache of a single view takes {advice.cache_bytes / 1e9:.1f} GB, more than the "
                f"{disk / 1e9:.1f} GB that are free here"
            )
    if machine["decoder"].startswith("portable"):
        warnings.append(
            "the decoder runs without AVX2 or AVX-512: resizing is several times slower"
        )
    if machine["loss_kernels"].startswith("off"):
        warnings.append(f"the loss kernels are {machine['loss_kernels']}")
    return Diagnosis(machine, data, speeds, advice, warnings)
