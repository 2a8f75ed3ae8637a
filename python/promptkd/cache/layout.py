"""Where things lie in a cache's folder: the manifest, the shards, their names and metadata.

    cache.json                           the manifest: recipe, number of views, segments of images
    teacher.safetensors                  class vectors, names and fingerprints of the teacher
    view-003/shard-00017.safetensors     rows of one view
    view-whole/shard-00017.safetensors   unit features of the whole pictures

A segment is a list of images that was added at once; its rows begin a new shard. All that the
manifest says stands in every shard too, so that it can be made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promptkd import _rust
from promptkd.cache.recipe import BATCH_ROWS, Recipe
from promptkd.data.pictures import size_of
from promptkd.data.sources import ImageList
from promptkd.errors import CheckpointError, DataError
from promptkd.files import write_json

KIND = "promptkd teacher cache"
FORMAT = 1
MANIFEST = "cache.json"
WHOLE = -1
"""Number of the view that shows the whole picture, as the teacher's own resize mode wants it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Images that were added at once: how many, and the digest of their names and sizes."""

    num_images: int
    digest: str


@dataclass(frozen=True, slots=True)
class Unit:
    """One shard: a view and a run of rows.

    Attributes:
        view: number of the view, or `WHOLE`.
        number: of the shard within the view.
        segment: which list its images belong to.
        first: its first row in the cache.
        start: the same within its segment.
        rows: how many rows it has.
    """

    view: int
    number: int
    segment: int
    first: int
    start: int
    rows: int

    @property
    def name(self) -> str:
        """Path relative to the cache."""
        return f"{view_folder(self.view)}/shard-{self.number:05}.safetensors"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a cache holds, whether or not all of it is written yet."""

    recipe: Recipe
    num_views: int
    shard_rows: int
    segments: tuple[Segment, ...]

    @property
    def num_images(self) -> int:
        """Rows of each view."""
        return sum(s.num_images for s in self.segments)

    def starts(self) -> list[int]:
        """First row of each shard of a view, then the number of rows."""
        starts: list[int] = []
        first = 0
        for segment in self.segments:
            starts += range(first, first + segment.num_images, self.shard_rows)
            first += segment.num_images
        return [*starts, first]

    def units(self, view: int) -> Iterator[Unit]:
        """The shards of a view, in order."""
        number, first = 0, 0
        for index, segment in enumerate(self.segments):
            for start in range(0, segment.num_images, self.shard_rows):
                rows = min(self.shard_rows, segment.num_images - start)
                yield Unit(view, number, index, first + start, start, rows)
                number += 1
            first += segment.num_images

    def all_units(self) -> Iterator[Unit]:
        """Every shard, view after view; the whole pictures come first."""
        for view in (WHOLE, *range(self.num_views)):
            yield from self.units(view)

    def metadata(self, unit: Unit) -> dict[str, str]:
        """What the shard says of itself."""
        segment = self.segments[unit.segment]
        return {
            "kind": KIND,
            "format": str(FORMAT),
            "fingerprint": self.recipe.fingerprint(),
            "recipe": json.dumps(self.recipe.as_json(), sort_keys=True),
            "view": view_name(unit.view),
            "shard": str(unit.number),
            "shard_rows": str(self.shard_rows),
            "segment": str(unit.segment),
            "segment_images": str(segment.num_images),
            "segment_digest": segment.digest,
            "first_row": str(unit.first),
            "rows": str(unit.rows),
        }

    def write(self, folder: Path) -> None:
        """Write cache.json, all of it or nothing."""
        data: dict[str, Any] = {
            "kind": KIND,
            "format": FORMAT,
            "fingerprint": self.recipe.fingerprint(),
            "recipe": self.recipe.as_json(),
            "num_views": self.num_views,
            "shard_rows": self.shard_rows,
            "segments": [[s.num_images, s.digest] for s in self.segments],
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / MANIFEST, {**data, "check": _digest(data)})
        except OSError as error:
            raise CheckpointError(f"the cache '{folder}' can't be written: {error}") from error

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read cache.json; where it is gone or damaged, gather it from the shards.

        Raises:
            CheckpointError: no cache there, or one of another version.
        """
        try:
            data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            check = data.pop("check")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls._from_shards(folder)
        if check != _digest(data) or data.get("kind") != KIND:
            return cls._from_shards(folder)
        return cls._from_json(folder, data)

    @classmethod
    def _from_json(cls, folder: Path, data: Any) -> Manifest:
        if data["format"] != FORMAT:
            raise CheckpointError(
                f"the cache '{folder}' has format {data['format']}; this version reads {FORMAT}"
            )
        recipe = Recipe.from_json(data["recipe"])
        segments = tuple(Segment(int(n), str(d)) for n, d in data["segments"])
        return cls(recipe, int(data["num_views"]), int(data["shard_rows"]), segments)

    @classmethod
    def _from_shards(cls, folder: Path) -> Manifest:
        """Gather the manifest from the metadata of the shards that are there."""
        sheets = []
        for path in sorted(folder.glob("view-*/shard-*.safetensors")):
            try:
                sheets.append(_rust.inspect_shard(path)[0])
            except (OSError, ValueError):
                continue
        sheets = [s for s in sheets if s.get("kind") == KIND]
        if not sheets:
            raise CheckpointError(
                f"'{folder}' holds no {KIND}: no readable {MANIFEST} and no shards; make one with "
                "'promptkd cache build'"
            )
        if len({s["fingerprint"] for s in sheets}) > 1:
            raise CheckpointError(
                f"the shards in '{folder}' belong to different caches, and {MANIFEST} can't be read"
            )
        segments = {int(s["segment"]): s for s in sheets}
        views = [int(s["view"]) for s in sheets if s["view"] != view_name(WHOLE)]
        if sorted(segments) != list(range(len(segments))):
            raise CheckpointError(f"the shards in '{folder}' don't make a whole cache")
        return cls(
            Recipe.from_json(json.loads(sheets[0]["recipe"])),
            max(views, default=0) + 1,
            int(sheets[0]["shard_rows"]),
            tuple(
                Segment(int(s["segment_images"]), s["segment_digest"])
                for _, s in sorted(segments.items())
            ),
        )

    def with_views(self, num_views: int) -> Manifest:
        """The same with another number of views."""
        return replace(self, num_views=num_views)

    def with_segment(self, segment: Segment) -> Manifest:
        """The same with more images."""
        return replace(self, segments=(*self.segments, segment))


def _digest(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def view_name(view: int) -> str:
    """ "3", or "whole"."""
    return "whole" if view == WHOLE else str(view)


def view_folder(view: int) -> str:
    """Name of the folder of a view."""
    return "view-whole" if view == WHOLE else f"view-{view:03}"


def check_shard_rows(shard_rows: int) -> int:
    """The same, if batches don't cross shards of it."""
    if shard_rows < 1 or shard_rows % BATCH_ROWS:
        raise ValueError(f"shard_rows must be a multiple of {BATCH_ROWS}, not {shard_rows}")
    return shard_rows


@dataclass(frozen=True, slots=True)
class Listing:
    """Different images in the order of their names, with their sizes in bytes."""

    images: ImageList
    sizes: NDArray[np.uint64]

    @classmethod
    def of(cls, images: ImageList) -> Listing:
        """Sort a list, drop what stands in it twice, and look at the files' sizes.

        Raises:
            DataError: a file is not there.
        """
        images = canonical(images)[0]
        try:
            sizes = [size_of(picture) for picture in images.paths]
        except OSError as error:
            raise DataError(f"'{error.filename}' can't be read: {error.strerror}") from error
        return cls(images, np.array(sizes, dtype=np.uint64))

    def segment(self) -> Segment:
        """Its number of images and digest."""
        digest = hashlib.blake2b(digest_size=16)
        for name, size in zip(self.images.names, self.sizes.tolist(), strict=True):
            digest.update(json.dumps([name, size]).encode())
        return Segment(len(self.images), digest.hexdigest())

    def without(self, names: set[str]) -> Listing:
        """The images whose names are not among these."""
        rows = [r for r, name in enumerate(self.images.names) if name not in names]
        return Listing(self.images.select(rows), self.sizes[rows])


def canonical(images: ImageList) -> tuple[ImageList, NDArray[np.int64]]:
    """The list sorted by name without repeats, and for each row of `images` its row there."""
    first: dict[str, int] = {}
    for row, name in enumerate(images.names):
        first.setdefault(name, row)
    order = sorted(first)
    place = {name: row for row, name in enumerate(order)}
    rows = np.array([place[name] for name in images.names], dtype=np.int64)
    return images.select([first[name] for name in order]), rows
