"""What distilling from very many pictures takes: bytes, hours, shards, network. Arithmetic only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

ROW_BYTES = 17
"""A picture's hash, size and mark in every view, beside its name and the teacher's answer."""
NAME_BYTES = 40
"""A picture's name in a shard, unless told otherwise."""
LIST_BYTES = 260
"""A picture's path and name in memory, in every process that works on the list."""
WHOLE_BYTES = 4
"""A value of the features on whole pictures, which are stored in float32."""
PROMPT_VECTORS, PROMPT_WIDTH = 36, 1024
"""Prompts whose gradients are added up: 4 in 9 layers, of a width that most students stay below."""


def row_bytes(content: str, width: int, num_classes: int) -> int:
    """Bytes of a teacher's answer on a view, as a cache stores it by default."""
    if content == "logits":
        return 2 * num_classes
    return 4 * width + 4 if content == "statistics" else 2 * width


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The size of the work, and how fast its parts run; the speeds are measured, never guessed.

    Attributes:
        images: pictures.
        picture_bytes: mean size of a file.
        views: K, random views of a picture in the cache.
        epochs: passes over the pictures.
        num_classes, feature_width, student_width: C, the teacher's D, the student's.
        batch_size: of all ranks together.
        content: of the cache.
        shard_rows: pictures a shard.
        jobs: jobs that fill the cache, each with its own machine or GPU.
        ranks: ranks that train.
        label_speed: pictures a second of one job: decoding, teacher and storing together.
        train_speed: pictures a second of one rank: decoding, cache, student and loss together.
        link: bytes a second of a rank's link to the others, and of a job's to the pictures.
        name_bytes: mean length of a picture's path below its root.
    """

    images: float
    picture_bytes: float
    views: int
    epochs: float
    num_classes: int
    feature_width: int
    student_width: int
    batch_size: int
    content: Literal["features", "statistics", "logits"]
    shard_rows: int
    jobs: int
    ranks: int
    label_speed: float
    train_speed: float
    link: float
    name_bytes: int = NAME_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the work takes. Bytes, hours, and bytes a second.

    Attributes:
        pictures_bytes: all picture files.
        cache_bytes: the whole cache; `view_bytes` of one view of it.
        shards: files of the cache, of `shard_bytes` each.
        list_bytes: memory of the list of pictures in every process.
        label_hours: filling the cache, all jobs at work; `label_machine_hours` of one job.
        train_hours, train_machine_hours: the same for training.
        steps: of training.
        label_read: what one job reads.
        train_read: what one rank reads, pictures and cache.
        exchange: what one rank receives from the others while it trains.
        exchange_share: of a step's time, on its link, when nothing overlaps.
    """

    pictures_bytes: float
    cache_bytes: float
    view_bytes: float
    shards: int
    shard_bytes: float
    list_bytes: float
    label_hours: float
    label_machine_hours: float
    train_hours: float
    train_machine_hours: float
    steps: int
    label_read: float
    train_read: float
    exchange: float
    exchange_share: float
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def make_plan(scale: Scale) -> Plan:
    """Work out what `scale` takes.

    Raises:
        ValueError: a number that is not positive.
    """
    for name, value in asdict(scale).items():
        if not isinstance(value, str) and not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")
    answer = row_bytes(scale.content, scale.feature_width, scale.num_classes)
    beside = ROW_BYTES + scale.name_bytes
    view_bytes = scale.images * (answer + beside)
    whole_bytes = scale.images * (WHOLE_BYTES * scale.feature_width + beside)
    per_view = math.ceil(scale.images / scale.shard_rows)
    label_hours = scale.images * (scale.views + 1) / scale.label_speed / 3600
    train_hours = scale.images * scale.epochs / scale.train_speed / 3600
    step_seconds = scale.batch_size / (scale.train_speed * scale.ranks)
    received = _received(scale) if scale.ranks > 1 else 0.0
    found = Plan(
        pictures_bytes=scale.images * scale.picture_bytes,
        cache_bytes=view_bytes * scale.views + whole_bytes,
        view_bytes=view_bytes,
        shards=per_view * (scale.views + 1),
        shard_bytes=scale.shard_rows * (answer + beside),
        list_bytes=scale.images * LIST_BYTES,
        label_hours=label_hours / scale.jobs,
        label_machine_hours=label_hours,
        train_hours=train_hours / scale.ranks,
        train_machine_hours=train_hours,
        steps=math.floor(scale.images * scale.epochs / scale.batch_size),
        label_read=scale.label_speed * scale.picture_bytes,
        train_read=scale.train_speed * (scale.picture_bytes + answer),
        exchange=received / step_seconds,
        exchange_share=received / scale.link / step_seconds,
        warnings=(),
    )
    return Plan(**{**asdict(found), "warnings": tuple(_warnings(scale, found))})


def _received(scale: Scale) -> float:
    """Bytes that a rank receives in a step: the others' features and teacher answers, and gradients."""
    others = (scale.ranks - 1) / scale.ranks
    answers = {
        "features": scale.feature_width,
        "statistics": scale.feature_width + 1,
        "logits": scale.num_classes,
    }
    row = scale.student_width + answers[scale.content]
    gradients = 2 * PROMPT_VECTORS * PROMPT_WIDTH
    return 4 * others * (scale.batch_size * row + gradients)


def _warnings(scale: Scale, plan: Plan) -> list[str]:
    found = []
    if plan.shards > 100_000:
        fewer = 64 * math.ceil(scale.images * (scale.views + 1) / 100_000 / 64)
        found.append(
            f"{plan.shards:,} shards are many files for a file system; use --shard-rows {fewer}"
        )
    if plan.label_read > scale.link:
        found.append("a job reads pictures faster than its link brings them; labelling will wait")
    if plan.train_read > scale.link:
        found.append("a rank reads pictures faster than its link brings them; training will wait")
    if plan.exchange_share > 0.1:
        found.append(
            f"exchanging features takes {100 * plan.exchange_share:.0f} % of a step; use larger "
            "batches, fewer ranks or a faster link"
        )
    if plan.list_bytes > 16e9:
        found.append(
            f"the list of pictures takes {plan.list_bytes / 1e9:.0f} GB of memory in every process"
        )
    if scale.content == "logits" and scale.num_classes > scale.feature_width:
        found.append("logits are larger than features here, and valid for these classes only")
    if scale.epochs < scale.views:
        found.append(
            f"{scale.epochs:g} epochs see {math.ceil(scale.epochs)} of {scale.views} views; the "
            "rest is labelled for nothing"
        )
    return found
