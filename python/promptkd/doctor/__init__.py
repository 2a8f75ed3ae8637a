"""A look at the machine, the pictures and the models before a long run, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from promptkd.doctor.data import DataReport, look_at_data
from promptkd.doctor.machine import decoder_level, look_at_machine
from promptkd.plan import LIST_BYTES, NAME_BYTES, ROW_BYTES, WHOLE_BYTES, row_bytes
from promptkd.stages.distill import DistillConfig
from promptkd.throughput import Throughput

__all__ = [
    "Advice",
    "DataReport",
    "Diagnosis",
    "advise",
    "decoder_level",
    "diagnose",
    "look_at_data",
    "look_at_machine",
]

BATCH_SIZES = (8, 16, 32, 64, 128, 256)
_BUSY = 0.8
"""Share of the memory that a run may plan with."""


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
