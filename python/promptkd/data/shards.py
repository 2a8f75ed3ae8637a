"""Pictures in tar shards, in webdataset's layout: files that share a name are one sample."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from promptkd import _rust
from promptkd.errors import DataError

PICTURES = frozenset(
    {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "heic", "avif"}
)
LABELS = frozenset({"cls", "txt"})

Slice = tuple[str, int, int]
"""Path of an archive, offset and size of the bytes in it: a source for the decoder."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture in a shard."""

    name: str
    """Its path in the archive without the extension: what its views are keyed by."""
    picture: Slice
    label: Slice | None = None

    def read_label(self) -> str | None:
        """The text beside the picture, stripped."""
        if self.label is None:
            return None
        path, offset, size = self.label
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size).decode("utf-8").strip()


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
    labels: dict[str, Slice] = {}
    for name, offset, size in members:
        folder, slash, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        key, kind = folder + slash + stem, extension.rpartition(".")[2].lower()
        if kind in PICTURES and stem:
            pictures.setdefault(key, (where, offset, size))
        elif kind in LABELS:
            labels.setdefault(key, (where, offset, size))
    if not pictures:
        raise DataError(f"'{where}': no pictures in this archive of {len(members)} files")
    return [Sample(key, picture, labels.get(key)) for key, picture in pictures.items()]


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


def read_parquet(
    path: str | os.PathLike[str], column: str = "path", label: str = "label"
) -> list[tuple[str, str | None]]:
    """Read (path, label) pairs from a Parquet file, through pyarrow.

    Raises:
        DataError: pyarrow is missing, or the file is no Parquet file or lacks the column.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError("to read Parquet, install pyarrow ('pip install pyarrow')") from error
    try:
        table = ParquetFile(path)
        names = table.schema_arrow.names
        if column not in names:
            raise DataError(f"'{path}': no column '{column}' among {', '.join(names)}")
        columns = [column, label] if label in names else [column]
        data = table.read(columns=columns).to_pydict()
    except (OSError, ArrowException) as error:
        raise DataError(f"'{path}': it can't be read as Parquet: {error}") from error
    paths = [str(p) for p in data[column]]
    labels = [None if v is None else str(v) for v in data.get(label, [None] * len(paths))]
    root = Path(path).parent
    return [(os.fspath(root / p), v) for p, v in zip(paths, labels, strict=True)]
