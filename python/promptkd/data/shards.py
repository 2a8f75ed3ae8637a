"""Pictures in tar shards, in webdataset's layout: files that share a name are one sample."""

from __future__ import annotations

import glob
import itertools
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from promptkd import _rust
from promptkd.data.pictures import Found, Slice
from promptkd.errors import DataError

PICTURES = frozenset(
    {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "heic", "avif"}
)
LABELS = ("cls", "json", "txt")
"""Files that may hold a sample's label; the first kind that is there counts."""
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture in a shard."""

    name: str
    """Its path in the archive without the extension: what its views are keyed by."""
    picture: Slice
    label: Slice | None = None
    label_kind: str = ""
    """Ending of the label's file: cls, json or txt."""

    def read_label(self) -> str | int | None:
        """A name, or a place in the class names; None where there is no file with a label.

        Raises:
            DataError: it can't be read; the message names the archive and the byte.
        """
        if self.label is None:
            return None
        try:
            with open(self.label[0], "rb") as file:
                return self.label_in(file)
        except OSError as error:
            raise DataError(f"'{self.label[0]}' can't be read: {error}") from error

    def label_in(self, file: BinaryIO) -> str | int | None:
        """As `read_label`, from the opened archive."""
        if self.label is None:
            return None
        path, offset, size = self.label
        file.seek(offset)
        try:
            return _label(file.read(size).decode("utf-8").strip(), self.label_kind)
        except ValueError as error:
            raise DataError(
                f"the label of '{self.name}' in '{path}' at byte {offset} can't be read: {error}"
            ) from error


def _label(text: str, kind: str) -> str | int:
    if kind == "json":
        data = json.loads(text)
        if not isinstance(data, dict) or not isinstance(data.get("label"), str | int):
            raise ValueError('expected {"label": a name or number}')
        label: str | int = data["label"]
        return label
    if not text:
        raise ValueError("it is empty")
    return int(text) if kind == "cls" and text.isdecimal() else text


def shard_samples(path: str | os.PathLike[str]) -> list[Sample]:
    """List the samples of a tar shard by its headers alone; no picture is read.

    Raises:
        DataError: the archive is missing, cut or damaged, or holds no picture; the message names
            the file and the byte.
    """
    where = os.fspath(path)
    members, failure = _rust.tar_members(where)
    if failure is not None:
        raise DataError(failure[2])
    pictures: dict[str, Slice] = {}
    labels: dict[str, dict[str, Slice]] = {}
    for name, offset, size in members:
        folder, slash, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        key, kind = folder + slash + stem, extension.rpartition(".")[2].lower()
        if kind in PICTURES and stem:
            pictures.setdefault(key, (where, offset, size))
        elif kind in LABELS:
            labels.setdefault(key, {})[kind] = (where, offset, size)
    if not pictures:
        raise DataError(f"'{where}': no pictures in this archive of {len(members)} files")
    return [
        Sample(key, picture, *_first_label(labels.get(key, {})))
        for key, picture in pictures.items()
    ]


def _first_label(files: dict[str, Slice]) -> tuple[Slice | None, str]:
    kind = next((kind for kind in LABELS if kind in files), "")
    return files.get(kind), kind


def is_shard(path: str | os.PathLike[str]) -> bool:
    """Whether a path has a shard's ending."""
    return os.fspath(path).lower().endswith(".tar")


def shard_pictures(shards: Sequence[str | os.PathLike[str]], *, labels: bool) -> Found:
    """All pictures of some shards, in their order.

    A picture's name is that of its shard (below the folder that all share) and its own.

    Args:
        shards: paths of the archives.
        labels: whether they are wanted.

    Raises:
        DataError: a shard that is missing, cut, damaged or without pictures, a sample without a
            label if they are wanted; the message names the file and the byte.
    """
    paths = [os.path.expanduser(os.fspath(shard)) for shard in shards]
    folders = [os.path.dirname(os.path.abspath(path)) for path in paths]
    shared = os.path.commonpath(folders) if folders else ""
    pictures: list[Slice] = []
    names: list[str] = []
    values: list[str | int] = []
    for path in paths:
        samples = shard_samples(path)
        root = os.path.relpath(os.path.abspath(path), shared).replace(os.sep, "/")
        pictures += [sample.picture for sample in samples]
        names += [f"{root}/{sample.name}" for sample in samples]
        if labels:
            values += _labels_in(path, samples)
    return Found(pictures, names, values if labels else None)


def _labels_in(path: str, samples: Sequence[Sample]) -> Iterator[str | int]:
    with open(path, "rb") as file:
        for sample in samples:
            label = sample.label_in(file)
            if label is None:
                raise DataError(
                    f"'{path}': no label beside the picture '{sample.name}' at byte "
                    f"{sample.picture[1]}; expected {sample.name}.cls, .json or .txt"
                )
            yield label


def expand(pattern: str) -> list[str]:
    """The files that a pattern stands for, sorted: *, ? and [ ] as in a shell, {000..012}, {a,b}.

    A name without a star or the like is kept whether the file is there or not.
    """
    parts = _BRACES.split(pattern)
    choices = [[part] if n % 2 == 0 else _choices(part) for n, part in enumerate(parts)]
    spelled = ["".join(chosen) for chosen in itertools.product(*choices)]
    found = [sorted(glob.glob(s, recursive=True)) if glob.has_magic(s) else [s] for s in spelled]
    return [path for paths in found for path in paths]


def _choices(inside: str) -> list[str]:
    first, dots, last = inside.partition("..")
    if dots and first.isdecimal() and last.isdecimal():
        return [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    return inside.split(",")


def shuffled_samples(
    shards: Sequence[str | os.PathLike[str]],
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    window: int = 4096,
) -> Iterator[Sample]:
    """Samples of an epoch: whole shards in a random order, mixed within a bounded window.

    Reading stays nearly sequential and memory bounded. Each shard falls to one rank, so that no
    sample is lost or repeated; the same arguments give the same order.

    Args:
        shards: paths of the archives.
        seed: of the run.
        epoch: number of the epoch.
        rank: of this process.
        world: number of processes.
        window: samples that are mixed.

    Yields:
        A Sample each.
    """
    rows = _rust.epoch_rows(
        len(shards), seed=seed, epoch=epoch, start=0, count=len(shards), rank=rank, world=world
    )
    chooser = random.Random(f"{seed} {epoch} {rank}")
    held: list[Sample] = []
    for row in rows.tolist():
        for sample in shard_samples(shards[row]):
            held.append(sample)
            if len(held) > window:
                place = chooser.randrange(len(held))
                held[place], held[-1] = held[-1], held[place]
                yield held.pop()
    chooser.shuffle(held)
    yield from held


def build_index(path: str | os.PathLike[str], names: Iterator[str] | Sequence[str]) -> int:
    """Write an index of names for `_rust.Index`; returns how many there are.

    Args:
        path: of the index; it appears when it is complete.
        names: any number of them; they are not held in memory.
    """
    writer = _rust.IndexWriter(os.fspath(path))
    chunk: list[str] = []
    for name in names:
        chunk.append(name)
        if len(chunk) == 1 << 16:
            writer.add(chunk)
            chunk.clear()
    writer.add(chunk)
    return writer.finish()
