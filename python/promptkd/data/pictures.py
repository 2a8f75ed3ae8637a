"""What a picture is before it is decoded: a file, a part of one, bytes, an image, a dataset's row."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from promptkd import _rust
from promptkd.errors import DataError

Slice: TypeAlias = tuple[str, int, int]
"""Path of an archive, offset and size of the bytes in it."""
Source: TypeAlias = str | os.PathLike[str] | bytes | tuple[str, int, int] | Image.Image
"""What the decoder takes."""


class Rows:
    """The pictures of a dataset object, one at a time: few such objects can be shared by threads."""

    def __init__(self, read: Callable[[int], Any]) -> None:
        self._read, self._lock = read, threading.Lock()

    def fetch(self, index: int) -> Source:
        """The picture of a row: a path, the bytes of a file, or a Pillow image.

        Raises:
            DataError: the dataset fails to give it, or gives something else.
        """
        with self._lock:
            try:
                item = self._read(index)
            except Exception as error:  # whatever a foreign object raises
                raise DataError(f"{row_name(index)} can't be had: {error}") from error
        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim in (2, 3):
            return Image.fromarray(item)
        if isinstance(item, str | bytes | Image.Image):
            return item
        raise DataError(
            f"{row_name(index)} is of type {type(item).__name__}, not a picture; give the dataset "
            "without a transform: random views are cut here"
        )


@dataclass(frozen=True, slots=True)
class Row:
    """A picture of a dataset object, fetched when it is needed."""

    rows: Rows
    index: int


Picture: TypeAlias = Source | Row


@dataclass(frozen=True, slots=True)
class Found:
    """Pictures as some source has them.

    Attributes:
        pictures: N of them.
        names: what their views are keyed by.
        labels: class names, or places in `class_names` (where it is None: in the names that the
            user gives); None where there are none.
        class_names: those that the source knows.
        origin: what tells the source from another one whose pictures have the same names.
    """

    pictures: Sequence[Picture]
    names: Sequence[str]
    labels: Sequence[str | int] | None = None
    class_names: tuple[str, ...] | None = None
    origin: str = ""


def row_name(index: int) -> str:
    """How a row of a dataset is named in messages."""
    return f"row {index} of the dataset"


def name_of(picture: Picture, place: int = 0) -> str:
    """How a picture is named in messages, as Rust does."""
    match picture:
        case Row():
            return row_name(picture.index)
        case Image.Image():
            return f"image {place} (a Pillow image)"
        case bytes():
            return f"image {place} (bytes)"
        case (path, offset, _):
            return f"'{path}' at byte {offset}"
        case _:
            return f"'{os.fspath(picture)}'"


def named(picture: Picture, reason: str) -> str:
    """A decoder's complaint about bytes or an image, with the picture's name in it."""
    if not reason.startswith("image "):
        return reason
    return f"{name_of(picture)}: {reason.partition(': ')[2]}"


def size_of(picture: Picture) -> int:
    """Bytes of a file; 0 where that is not known without reading it.

    Raises:
        OSError: a file that is not there.
    """
    match picture:
        case Row() | Image.Image():
            return 0
        case bytes():
            return len(picture)
        case (_, _, size):
            return int(size)
        case _:
            return os.stat(picture).st_size


def fetch(pictures: Sequence[Picture]) -> tuple[list[Source], dict[int, str]]:
    """Rows of datasets fetched, everything else as it is; and why some can't be had (then b"")."""
    sources: list[Source] = []
    absent: dict[int, str] = {}
    for place, picture in enumerate(pictures):
        try:
            sources.append(
                picture.rows.fetch(picture.index) if isinstance(picture, Row) else picture
            )
        except DataError as error:
            sources.append(b"")
            absent[place] = str(error)
    return sources, absent


def renamed(
    pictures: Sequence[Picture], failures: list[tuple[int, str, str]], absent: dict[int, str]
) -> list[tuple[int, str, str]]:
    """Failures of what `fetch` gave, with the names of the rows."""
    return [
        (place, "unreadable", absent[place])
        if place in absent
        else (
            place,
            kind,
            named(pictures[place], reason) if isinstance(pictures[place], Row) else reason,
        )
        for place, kind, reason in failures
    ]


def read_pictures(
    pictures: Sequence[Picture],
) -> tuple[list[Source], NDArray[np.uint64], dict[int, str]]:
    """Read files whole.

    Returns:
        What to decode: their bytes, or Pillow images; a checksum of each; and why some can't be
        read, by place, whose bytes are empty.
    """
    sources, absent = fetch(pictures)
    plain = [_pixels(s) if isinstance(s, Image.Image) else s for s in sources]
    files, hashes, failed = _rust.read_files(plain)
    reasons = {place: named(pictures[place], reason) for place, reason in failed} | absent
    kept: list[Source] = [
        s if isinstance(s, Image.Image) else f for s, f in zip(sources, files, strict=True)
    ]
    return kept, hashes, reasons


def _pixels(image: Image.Image) -> bytes:
    return repr(image.size).encode() + image.convert("RGB").tobytes()
