"""Batches decoded ahead by Rust threads: bounded, in order, with a limit on what may fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from promptkd import _rust
from promptkd.data.decode import (
    MAX_PIXELS,
    Failure,
    OnError,
    Pixels,
    box_crop,
    files_of,
    settle,
    view_crop,
    with_pillow,
)
from promptkd.data.pictures import Source
from promptkd.errors import DataError

_MIN_SEEN = 100
"""A share of failures is judged once this many pictures were seen."""


@dataclass(frozen=True, slots=True)
class Boxes:
    """Pictures to decode whole, or a box of each."""

    rows: NDArray[np.int64]
    """(B,) what the caller calls them."""
    sources: Sequence[Source]
    boxes: NDArray[np.int64] | None = None
    flips: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Views:
    """Pictures to decode a random view of each."""

    rows: NDArray[np.int64]
    """(B,) what the caller calls them."""
    sources: Sequence[Source]
    seed: int
    keys: NDArray[np.uint64]
    views: NDArray[np.uint32]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5


@dataclass(frozen=True, slots=True)
class Batch:
    """What became of a job: the pictures that could be read, and those that could not."""

    rows: NDArray[np.int64]
    """(G,) rows that could be read, in the job's order."""
    pixels: list[torch.Tensor]
    """uint8 (G, H, W, 3) for each target, in pinned memory if that was asked for."""
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    """(row, kind, message) of the others."""


def stream_batches(
    jobs: Iterable[Boxes | Views],
    targets: Sequence[_rust.Target],
    *,
    depth: int = 2,
    threads: int = 0,
    orient: bool = False,
    on_error: OnError = "raise",
    max_failures: int | float | None = None,
    max_pixels: int = MAX_PIXELS,
    scaled: bool = False,
    truncated: bool = False,
    pin: bool = False,
) -> Iterator[Batch]:
    """Decode jobs in the background, in their order, at most `depth` of them ahead.

    Memory is bounded by `depth` batches whatever the speeds. Closing the iterator, or dropping
    it, stops the threads.

    Args:
        jobs: batches of pictures; taken only as they are needed.
        targets: what is made of each picture.
        depth: batches that are decoded or lie finished ahead of the one in use.
        threads: how many threads decode; 0 is one for each processor.
        orient: apply the EXIF orientation.
        on_error: raise at the first picture that fails, or skip it and list it in its batch.
        max_failures: with "skip", how many pictures may fail in all (int), or which share of
            those seen (float, judged from 100 pictures on); None is no limit.
        max_pixels: pictures of more pixels are refused.
        scaled: as for `decode_images`.
        truncated: as for `decode_images`.
        pin: put the pixels into pinned memory, for copies to a GPU that don't wait.

    Yields:
        A Batch for each job.

    Raises:
        ImageError: a picture can't be decoded and `on_error` is "raise".
        DataError: more pictures failed than `max_failures` allows.
    """
    stream = _rust.BatchStream(
        targets,
        depth=depth,
        orient=orient,
        threads=threads,
        max_pixels=max_pixels,
        scaled=scaled,
        truncated=truncated,
    )
    waiting = iter(jobs)
    ahead = []
    failed = seen = 0
    for job in islice(waiting, depth):
        ahead.append(_submit(stream, job))
    while ahead:
        job = ahead.pop(0)
        pixels, failures = stream.take()
        for following in islice(waiting, 1):
            ahead.append(_submit(stream, following))
        crop = _crop(job)
        failures = with_pillow(job.sources, targets, pixels, failures, crop, orient, max_pixels)
        settle(pixels, failures, on_error)
        failed, seen = failed + len(failures), seen + len(job.sources)
        _check_limit(failed, seen, max_failures, failures)
        yield _batch(job, pixels, failures, pin)


def _submit(stream: _rust.BatchStream, job: Boxes | Views) -> Boxes | Views:
    files = files_of(job.sources)
    if isinstance(job, Boxes):
        stream.submit(files, boxes=job.boxes, flips=job.flips)
    else:
        stream.submit_views(
            files,
            seed=job.seed,
            keys=job.keys,
            views=job.views,
            scale=job.scale,
            ratio=job.ratio,
            flip=job.flip,
        )
    return job


def _crop(job: Boxes | Views) -> Any:
    if isinstance(job, Boxes):
        return box_crop(job.boxes, job.flips)
    return view_crop(job.seed, job.keys, job.views, job.scale, job.ratio, job.flip)


def _check_limit(
    failed: int, seen: int, limit: int | float | None, failures: list[Failure]
) -> None:
    if limit is None or not failures:
        return
    if isinstance(limit, float):
        if seen < _MIN_SEEN or failed <= limit * seen:
            return
        allowed = f"{limit:.1%}"
    else:
        if failed <= limit:
            return
        allowed = str(limit)
    raise DataError(
        f"{failed} of {seen} pictures can't be read, more than {allowed}; "
        f"the last: {failures[-1][2]}"
    )


def _batch(job: Boxes | Views, pixels: Pixels, failures: list[Failure], pin: bool) -> Batch:
    rows = np.asarray(job.rows, dtype=np.int64)
    tensors = [torch.from_numpy(array) for array in pixels]
    named = [(int(rows[place]), kind, message) for place, kind, message in failures]
    if failures:
        good = np.ones(len(rows), dtype=bool)
        good[[place for place, _, _ in failures]] = False
        rows = rows[good]
        tensors = [tensor[torch.from_numpy(good)] for tensor in tensors]
    if pin and torch.cuda.is_available():
        tensors = [tensor.pin_memory() for tensor in tensors]
    return Batch(rows, tensors, named)
