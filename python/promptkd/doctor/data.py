"""What a sample of the pictures shows: size, damage, repeats, classes without any."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from promptkd import _rust
from promptkd.data.decode import decode_images, files_of
from promptkd.data.pictures import fetch, read_pictures, renamed, size_of
from promptkd.data.sources import ImageList

_TINY = 0.5
"""Pictures whose shorter side is below this share of the student's size are called tiny."""
_NAMED = 5


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
    sizes, unread = _sizes(some)
    sides = sizes.min(axis=1)
    known = {row for row, _, _ in unread}
    corrupt = {row: reason for row, _, reason in unread} | _undecodable(some, known)
    files = [size_of(p) for p in some.paths]
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


def _sizes(images: ImageList) -> tuple[NDArray[np.int64], list[tuple[int, str, str]]]:
    """(N, 2) width and height, and those that can't be read."""
    sources, absent = fetch(images.paths)
    sizes, failed = _rust.image_sizes(files_of(sources))
    for row, source in enumerate(sources):
        if isinstance(source, Image.Image):
            sizes[row] = source.size
    unread = [f for f in failed if not isinstance(sources[f[0]], Image.Image)]
    return sizes, renamed(images.paths, unread, absent)


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
        by_size[size_of(path)].append(row)
    by_size.pop(0, None)  # rows of a dataset, whose sizes aren't known
    pairs = [
        (row, theirs)
        for theirs, path in enumerate(test.paths)
        for row in by_size.get(size_of(path), ())
    ]
    mine = _hashes(train, sorted({a for a, _ in pairs}))
    other = _hashes(test, sorted({b for _, b in pairs}))
    return tuple((train.names[a], test.names[b]) for a, b in pairs if mine[a] == other[b])


def _hashes(images: ImageList, rows: Sequence[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        found |= dict(
            zip(part, read_pictures([images.paths[r] for r in part])[1].tolist(), strict=True)
        )
    return found
