"""A dataset's raw lists: read or drawn, looked for on disk, and checked to be sound."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from promptkd.benchmarks import readers
from promptkd.benchmarks.layouts import Layout
from promptkd.benchmarks.readers import Parts
from promptkd.errors import DataError


def read_parts(
    layout: Layout, root: Path, split_seed: int | None = None
) -> tuple[Parts, tuple[Any, ...] | None]:
    """The raw lists, and the random state after a split was drawn (None if none was)."""
    folder = root / layout.folder
    if not folder.is_dir():
        raise DataError(f"'{folder}' is not there")
    if layout.native is not None:
        return layout.native(folder), None
    assert layout.split is not None
    assert layout.generate is not None
    if (folder / layout.split).is_file():
        return readers.read_split(folder / layout.split, layout.images), None
    if split_seed is None:
        raise DataError(
            f"split file '{folder / layout.split}' is missing; get it by CoOp's instructions "
            "(the archives of 'promptkd data download' have it), or give split_seed to draw one"
        )
    rng = random.Random(split_seed)
    parts = layout.generate(folder, rng)
    return parts, rng.getstate()


def absent_pictures(layout: Layout, root: Path, parts: Parts) -> list[Path]:
    """Listed files that don't exist, once each."""
    folder = root / layout.folder
    if layout.scanned:
        return []
    paths = dict.fromkeys(row.path for rows in parts for row in rows)
    return [folder / p for p in paths if not (folder / p).is_file()]


def checked_names(layout: Layout, root: Path, parts: Parts) -> tuple[str, ...]:
    """Class names by label: 0 to n-1 without a gap, one name each, pictures in every list."""
    folder = root / layout.folder
    source = folder / layout.split if layout.split else folder
    names: dict[int, str] = {}
    for row in (row for rows in parts for row in rows):
        if names.setdefault(row.label, row.name) != row.name:
            raise DataError(
                f"label {row.label} of '{source}' has two names: "
                f"'{names[row.label]}' and '{row.name}'"
            )
    if not names or min(names) < 0:
        raise DataError(f"'{source}' lists no pictures, or a label below 0")
    for expected, label in enumerate(sorted(names)):
        if label != expected:
            raise DataError(f"label {expected} of '{source}' has no pictures: an empty class")
    for part in ("test",) if layout.test_only else ("train", "test"):
        empty = sorted(set(names) - {row.label for row in getattr(parts, part)})
        if empty:
            raise DataError(
                f"class '{names[empty[0]]}' (label {empty[0]}) of '{source}' has no pictures "
                f"in the {part} list: an empty class"
            )
    return tuple(names[label] for label in range(len(names)))
