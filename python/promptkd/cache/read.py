"""Reading a teacher cache: rows of any view, straight from the mapped shards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from promptkd import _rust
from promptkd.cache.layout import WHOLE, Listing, Manifest, Unit, canonical, view_name
from promptkd.cache.recipe import DTYPES
from promptkd.cache.stored import StoredTeacher
from promptkd.data.sources import ImageList
from promptkd.errors import CheckpointError
from promptkd.loss import TeacherLogits, TeacherStatistics

_TYPES = dict(DTYPES.values()) | {
    "BOOL": torch.bool,
    "U64": torch.uint64,
}


class FeatureCache:
    """A teacher's answers on K views of N pictures, in files.

    Attributes:
        path: the folder.
        manifest: what it holds.
    """

    def __init__(self, path: Path, manifest: Manifest, *, checks: bool, threads: int) -> None:
        self.path, self.manifest = path, manifest
        self._checks, self._threads = checks, threads
        self._readers: dict[int, _rust.CacheReader] = {}

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, checks: bool = True, threads: int = 0
    ) -> FeatureCache:
        """Open a cache; nothing but its manifest is read.

        Args:
            path: the folder.
            checks: compare every block of data with its checksum when it is first read.
            threads: how many gather rows; 0: one for each processor, where there is enough to do.

        Raises:
            CheckpointError: no cache there, or none that this version reads.
        """
        folder = Path(path).expanduser()
        return cls(folder, Manifest.read(folder), checks=checks, threads=threads)

    @property
    def num_images(self) -> int:
        """N."""
        return self.manifest.num_images

    @property
    def num_views(self) -> int:
        """K."""
        return self.manifest.num_views

    @property
    def content(self) -> str:
        """ "features", "statistics" or "logits"."""
        return self.manifest.recipe.content

    def teacher(self) -> StoredTeacher:
        """The teacher without its towers.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        return StoredTeacher.load(self.path)

    def missing(self) -> list[str]:
        """Shards that are not written yet, relative to the folder."""
        units = self.manifest.all_units()
        return [u.name for u in units if not (self.path / u.name).is_file()]

    def read(
        self, name: str, view: int, rows: NDArray[np.int64] | None = None, *, pin: bool = False
    ) -> Tensor:
        """Rows (default: all) of a stored tensor of one view, in the type in which it is stored.

        Args:
            name: "features"; "mu" or "h"; "logits"; "failed" (bool), "hashes" or "sizes" (uint64).
            view: from 0; `WHOLE` for the whole pictures (features only).
            rows: (B,) rows of the cache.
            pin: gather into pinned memory, for copies to a GPU that don't wait.

        Raises:
            CheckpointError: a shard is missing, damaged, or of another cache.
        """
        if rows is None:
            rows = np.arange(self.num_images, dtype=np.int64)
        try:
            reader = self._reader(view)
            kind, shape = reader.describe(name)
            out = torch.empty((len(rows), *shape), dtype=_TYPES[kind], pin_memory=pin)
            self._copy(reader, name, rows, out)
        except (OSError, ValueError) as error:
            raise self._explain(error) from error
        return out

    def read_into(self, out: Tensor, name: str, view: int, rows: NDArray[np.int64]) -> None:
        """As `read`, into a contiguous CPU tensor (pinned memory, for one) of the stored type."""
        try:
            reader = self._reader(view)
            kind, shape = reader.describe(name)
            if out.dtype != _TYPES[kind] or list(out.shape) != [len(rows), *shape]:
                raise ValueError(
                    f"out must be {_TYPES[kind]} of shape {[len(rows), *shape]}, not {out.dtype} "
                    f"{list(out.shape)}"
                )
            self._copy(reader, name, rows, out)
        except (OSError, ValueError) as error:
            raise self._explain(error) from error

    def answers(
        self,
        view: int,
        rows: NDArray[np.int64],
        dtype: torch.dtype | None = None,
        *,
        pin: bool = False,
    ) -> Tensor | TeacherStatistics | TeacherLogits:
        """The teacher's answers on rows of a view, as the loss takes them.

        Args:
            view: from 0.
            rows: (B,) rows of the cache.
            dtype: default: the stored type.
            pin: as for `read`.
        """
        names = {"features": ["features"], "logits": ["logits"], "statistics": ["mu", "h"]}
        found = [self.read(name, view, rows, pin=pin) for name in names[self.content]]
        if dtype is not None:
            found = [tensor.to(dtype) for tensor in found]
        if self.content == "features":
            return found[0]
        return TeacherLogits(*found) if self.content == "logits" else TeacherStatistics(*found)

    def failed(self, view: int) -> NDArray[np.bool_]:
        """(N,) whether a picture could not be read."""
        flags: NDArray[np.bool_] = self.read("failed", view).numpy()
        return flags

    def view_bytes(self, view: int) -> int:
        """Size of a view's files that are there."""
        paths = (self.path / unit.name for unit in self.manifest.units(view))
        return sum(path.stat().st_size for path in paths if path.exists())

    def read_ahead(self, view: int) -> None:
        """Bring a view from the disk into the system's memory, file after file."""
        try:
            self._reader(view).advise(0, self.num_images)
        except (OSError, ValueError) as error:
            raise self._explain(error) from error

    def release(self, view: int) -> None:
        """Let a view's files go, from memory and from what is mapped; reading opens them again.

        A system maps some 65,000 files a process: many views of many shards don't fit at once.
        """
        reader = self._readers.pop(view, None)
        if reader is not None:
            reader.advise(0, self.num_images, wanted=False)  # somebody may still be reading

    def rows_of(self, images: ImageList) -> NDArray[np.int64]:
        """Row of the cache for each picture of a list.

        Raises:
            CheckpointError: a picture is not in the cache, or its file has another size.
        """
        listing = Listing.of(images)
        order = canonical(images)[1]
        if self.manifest.segments == (listing.segment(),):
            return order
        known = self._sizes_by_name()
        rows = np.empty(len(listing.images), dtype=np.int64)
        for place, (name, size) in enumerate(
            zip(listing.images.names, listing.sizes.tolist(), strict=True)
        ):
            row, stored = known.get(name, (-1, size))
            if row < 0:
                raise CheckpointError(
                    f"cache '{self.path}' holds other pictures: '{name}' is not among its "
                    f"{len(known)}; add it with 'promptkd cache extend'"
                )
            if stored != size:
                raise CheckpointError(
                    f"picture '{name}' has changed since cache '{self.path}' was built: it had "
                    f"{stored} bytes and has {size} now; build a cache in another folder"
                )
            rows[place] = row
        return rows[order]

    def listings(self, listing: Listing) -> list[Listing]:
        """The segments' own lists, as parts of a list that must hold all of their pictures."""
        if self.manifest.segments == (listing.segment(),):
            return [listing]
        rows = {name: row for row, name in enumerate(listing.images.names)}
        parts: list[list[int]] = [[] for _ in self.manifest.segments]
        for unit in self.manifest.units(WHOLE):
            for name in self._names(unit):
                if name not in rows:
                    raise CheckpointError(
                        f"cache '{self.path}' holds '{name}', which is not among the pictures now; "
                        "give all of them, old and new"
                    )
                parts[unit.segment].append(rows[name])
        found = [Listing(listing.images.select(p), listing.sizes[p]) for p in parts]
        for part, segment in zip(found, self.manifest.segments, strict=True):
            if part.segment() != segment:
                raise CheckpointError(
                    f"pictures of cache '{self.path}' have changed their size since it was built; "
                    "build one in another folder"
                )
        return found

    def info(self) -> dict[str, Any]:
        """Facts for people."""
        missing = self.missing()
        sizes = [p.stat().st_size for p in self.path.glob("view-*/shard-*.safetensors")]
        complete = not missing
        return {
            "path": str(self.path),
            "fingerprint": self.manifest.recipe.fingerprint(),
            **self.manifest.recipe.as_json(),
            "num_images": self.num_images,
            "num_views": self.num_views,
            "num_shards": len(sizes),
            "missing_shards": len(missing),
            "failed_images": int(self.failed(WHOLE).sum()) if complete else None,
            "bytes": sum(sizes),
            "model": self.teacher().model,
            "num_class_names": len(self.teacher().class_names),
        }

    def _copy(
        self, reader: _rust.CacheReader, name: str, rows: NDArray[np.int64], out: Tensor
    ) -> None:
        flat = out.reshape(-1).view(torch.uint8).numpy()
        wanted = np.ascontiguousarray(rows, dtype=np.int64)
        reader.gather(name, wanted, flat, threads=self._threads)

    def _reader(self, view: int) -> _rust.CacheReader:
        reader = self._readers.get(view)
        if reader is None:
            if not (view == WHOLE or 0 <= view < self.num_views):
                raise ValueError(f"view {view} of {self.num_views}")
            paths = [self.path / unit.name for unit in self.manifest.units(view)]
            expected = {
                "fingerprint": self.manifest.recipe.fingerprint(),
                "view": view_name(view),
            }
            starts = self.manifest.starts()
            reader = _rust.CacheReader(paths, starts, expected, checks=self._checks)
            self._readers[view] = reader
        return reader

    def _sizes_by_name(self) -> dict[str, tuple[int, int]]:
        """Row and size in bytes of every picture."""
        sizes = self.read("sizes", WHOLE).numpy().tolist()
        names = [n for unit in self.manifest.units(WHOLE) for n in self._names(unit)]
        return {name: (row, sizes[row]) for row, name in enumerate(names)}

    def _names(self, unit: Unit) -> list[str]:
        try:
            names: list[str] = json.loads(_rust.read_tensor(self.path / unit.name, "names"))
        except (OSError, ValueError) as error:
            raise self._explain(error) from error
        return names

    def _explain(self, error: object) -> CheckpointError:
        return CheckpointError(
            f"cache '{self.path}' can't be read: {error}; delete a damaged shard, then "
            "'promptkd cache build' makes what is missing again"
        )


def is_whole(folder: Path, manifest: Manifest, unit: Unit) -> bool:
    """Whether a shard is there, with a sound header, in its place."""
    try:
        found = _rust.inspect_shard(folder / unit.name)[0]
    except (OSError, ValueError):
        return False
    return all(found.get(key) == value for key, value in manifest.metadata(unit).items())
