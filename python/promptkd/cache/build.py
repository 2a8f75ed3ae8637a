"""Filling a teacher cache: one shard after the other, each written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from promptkd import _rust
from promptkd.cache.encode import Encoded, ViewEncoder
from promptkd.cache.layout import (
    MANIFEST,
    WHOLE,
    Listing,
    Manifest,
    Unit,
    check_shard_rows,
    view_folder,
)
from promptkd.cache.read import FeatureCache, is_whole
from promptkd.cache.recipe import BATCH_ROWS, DTYPES, Content, Recipe
from promptkd.cache.stored import FILE, StoredTeacher
from promptkd.data.loader import MAX_FAILED_FRACTION, CropRecipe
from promptkd.data.sources import unlabelled
from promptkd.errors import CheckpointError, DataError
from promptkd.files import sweep, temporary_for
from promptkd.loss import teacher_statistics
from promptkd.teacher import Teacher

SHARD_ROWS = 1024
_SAY_SECONDS = 10.0
Say = Callable[[str], None]


def build_cache(
    teacher: Teacher | str | os.PathLike[str],
    images: Any,
    path: str | os.PathLike[str],
    *,
    views: int = 8,
    seed: int = 0,
    content: Content | Literal["auto"] = "auto",
    dtype: str | None = None,
    temperature: float = 1.0,
    crop_scale: tuple[float, float] = (0.5, 1.0),
    orient: bool = True,
    shard_rows: int = SHARD_ROWS,
    part: tuple[int, int] | None = None,
    say: Say = lambda _: None,
) -> FeatureCache:
    """Store a teacher's answers on random views of pictures, to distil from without the teacher.

    Goes on where an earlier call with the same arguments was interrupted, and ends with the same
    bytes. Several processes may work on one cache at a time.

    Args:
        teacher: a `Teacher` or a teacher folder.
        images: as for `distill`.
        path: folder of the cache, made if absent.
        views: K, random views of each picture.
        seed: of the views.
        content: "features" stay valid for other class names and temperatures; "statistics" (half
            the loss's work) and "logits" (small for few classes) do not. "auto" takes features,
            or logits where features would fill more than half of the free disk.
        dtype: "float16", "float32" or "float64" for tests; default: float16, statistics float32.
        temperature: T, for statistics only.
        crop_scale: share of the picture that a view covers.
        orient: apply the EXIF orientation.
        shard_rows: pictures a file, a multiple of 64.
        part: (i, n): compute only every n-th shard, from the i-th on; default: all, or this
            rank's share under torchrun.
        say: gets a line about progress now and then.

    Returns:
        The cache, complete unless other parts are still to come.

    Raises:
        CheckpointError: there is another cache at `path`, or it can't be written.
        DataError: no pictures, or too many that can't be read.
    """
    if views < 1:
        raise ValueError(f"views must be at least 1, not {views}")
    guide = teacher if isinstance(teacher, Teacher) else Teacher.load(teacher)
    folder = Path(path).expanduser()
    listing = Listing.of(unlabelled(images))
    chosen = _choose(content, guide, len(listing.images) * views, folder, say)
    recipe = Recipe.of(
        guide,
        content=chosen,
        dtype=dtype or ("float32" if chosen == "statistics" else "float16"),
        seed=seed,
        crop=CropRecipe(scale=crop_scale),
        orient=orient,
        temperature=temperature,
    )
    manifest = Manifest(recipe, views, check_shard_rows(shard_rows), (listing.segment(),))
    if exists(folder):
        manifest = _joined(folder, Manifest.read(folder), manifest)
    return fill(folder, manifest, guide, [listing], part=part, say=say)


def extend_cache(
    teacher: Teacher | str | os.PathLike[str],
    images: Any,
    path: str | os.PathLike[str],
    *,
    views: int | None = None,
    part: tuple[int, int] | None = None,
    say: Say = lambda _: None,
) -> FeatureCache:
    """Add views, or the pictures that are new in `images`; what is there is not touched.

    Args:
        teacher: the one that filled the cache.
        images: all pictures, old and new.
        path: folder of the cache.
        views: K from now on; default: as many as there are.
        part: as for `build_cache`.
        say: gets a line about progress now and then.

    Raises:
        CheckpointError: another teacher, fewer views than there are, or old pictures that are
            gone or changed.
    """
    guide = teacher if isinstance(teacher, Teacher) else Teacher.load(teacher)
    cache = FeatureCache.open(path)
    manifest = cache.manifest
    _same_recipe(cache.path, manifest.recipe, renewed(manifest.recipe, guide))
    listing = Listing.of(unlabelled(images))
    listings = cache.listings(listing)
    new = listing.without({name for part in listings for name in part.images.names})
    if len(new.images):
        listings.append(new)
        manifest = manifest.with_segment(new.segment())
    if views is not None:
        if views < manifest.num_views:
            raise CheckpointError(
                f"cache '{cache.path}' has {manifest.num_views} views already; {views} are no more"
            )
        manifest = manifest.with_views(views)
    return fill(cache.path, manifest, guide, listings, part=part, say=say)


def merge_caches(
    paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> FeatureCache:
    """Join caches of the same recipe and pictures that were filled apart.

    Shards are linked where the file system allows, copied where not.

    Raises:
        CheckpointError: a cache of another recipe or other pictures, or two different shards of
            one name.
    """
    folders = [Path(p).expanduser() for p in paths]
    if not folders:
        raise CheckpointError("name at least one cache to merge")
    target = Path(output).expanduser()
    first, *others = [Manifest.read(folder) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        first = _joined(folder, first, other)
    if exists(target):
        first = _joined(target, Manifest.read(target), first)
    first.write(target)
    for folder in folders:
        for unit in first.all_units():
            if is_whole(folder, first, unit):
                _take(folder / unit.name, target / unit.name)
        if (folder / FILE).is_file() and not (target / FILE).is_file():
            StoredTeacher.load(folder).save(target)
    return FeatureCache.open(target)


def exists(folder: Path) -> bool:
    """Whether there is a cache, or what is left of one."""
    return (folder / MANIFEST).is_file() or any(folder.glob("view-*/shard-*.safetensors"))


def renewed(recipe: Recipe, teacher: Teacher) -> Recipe:
    """The recipe that the same settings give with this teacher."""
    return Recipe.of(
        teacher,
        content=recipe.content,
        dtype=recipe.dtype,
        seed=recipe.seed,
        crop=recipe.crop,
        orient=recipe.orient,
        temperature=recipe.temperature or 1.0,
    )


def fill(
    folder: Path,
    manifest: Manifest,
    teacher: Teacher,
    listings: Sequence[Listing],
    *,
    part: tuple[int, int] | None,
    say: Say,
) -> FeatureCache:
    """Write the manifest, the teacher's file, and every shard of this part that is not there."""
    index, count = _part(part)
    manifest.write(folder)
    sweep(folder)
    StoredTeacher.of(teacher).save(folder)
    units = [u for n, u in enumerate(manifest.all_units()) if n % count == index]
    todo = [u for u in units if not is_whole(folder, manifest, u)]
    work = _Work(folder, manifest, teacher, listings)
    started, said, rows = time.monotonic(), 0.0, 0
    for number, unit in enumerate(todo):
        work.write(unit)
        rows += unit.rows
        now = time.monotonic()
        if now - said >= _SAY_SECONDS or number + 1 == len(todo):
            speed = rows / (now - started)
            left = sum(u.rows for u in todo[number + 1 :]) / speed
            say(
                f"teacher cache: shard {number + 1} of {len(todo)} ({view_folder(unit.view)}), "
                f"{speed:.1f} pictures/s, {left / 60:.0f} min left"
            )
            said = now
    return FeatureCache.open(folder)


class _Work:
    """Computes and writes single shards."""

    def __init__(
        self, folder: Path, manifest: Manifest, teacher: Teacher, listings: Sequence[Listing]
    ) -> None:
        self._folder, self._manifest, self._teacher = folder, manifest, teacher
        self._listings = listings
        recipe = manifest.recipe
        self._encoders = [
            ViewEncoder(teacher, part.images, recipe.crop, seed=recipe.seed, orient=recipe.orient)
            for part in listings
        ]
        vectors = teacher.class_vectors
        self._centred = vectors - vectors.mean(dim=0, keepdim=True)
        self._failed: set[str] = set()

    def write(self, unit: Unit) -> None:
        """Compute a shard and put it into its place."""
        batches = []
        encoder = self._encoders[unit.segment]
        for number, batch in enumerate(
            encoder.encode(unit.view, unit.start, unit.start + unit.rows)
        ):
            self._count(unit, number * BATCH_ROWS, batch)
            batches.append(self._tensors(unit.view, batch))
        parts = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
        listing = self._listings[unit.segment]
        rows = slice(unit.start, unit.start + unit.rows)
        names = json.dumps(listing.images.names[rows]).encode()
        parts |= {"sizes": listing.sizes[rows], "names": np.frombuffer(names, dtype=np.uint8)}
        path = self._folder / unit.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _rust.write_shard(
                path,
                temporary_for(path),
                list(self._manifest.metadata(unit).items()),
                [_entry(name, array) for name, array in parts.items()],
            )
        except OSError as error:
            raise CheckpointError(
                f"the cache can't be written: {error}; what is there stays good, and the next "
                "build goes on from it"
            ) from error

    def _tensors(self, view: int, batch: Encoded) -> dict[str, NDArray[Any]]:
        """What is stored of a batch; failed rows are NaN, and marked."""
        rows = len(batch.hashes)
        failed = np.zeros(rows, dtype=np.bool_)
        failed[list(batch.reasons)] = True
        answers = {"features": batch.features} if view == WHOLE else self._content(batch.features)
        stored: dict[str, NDArray[Any]] = {"failed": failed, "hashes": batch.hashes}
        for name, tensor in answers.items():
            array = tensor[:rows].cpu().numpy()
            array[failed] = np.nan
            stored[name] = array
        return stored

    def _content(self, features: Tensor) -> dict[str, Tensor]:
        recipe = self._manifest.recipe
        dtype = DTYPES[recipe.dtype][1]
        if recipe.content == "features":
            return {"features": features.to(dtype)}
        scale = self._teacher.logit_scale
        if recipe.content == "logits":
            return {"logits": (scale * features @ self._centred.T.to(features.dtype)).to(dtype)}
        found = teacher_statistics(
            features,
            self._centred,
            teacher_scale=scale,
            temperature=recipe.temperature or 1.0,
        )
        return {"mu": found.mu.to(dtype), "h": found.h.to(features.dtype)}

    def _count(self, unit: Unit, offset: int, batch: Encoded) -> None:
        """End the build when too many pictures can't be read."""
        names = self._listings[unit.segment].images.names
        self._failed |= {names[unit.start + offset + place] for place in batch.reasons}
        limit = max(1, int(MAX_FAILED_FRACTION * self._manifest.num_images))
        if batch.reasons and len(self._failed) > limit:
            raise DataError(
                f"{len(self._failed)} of {self._manifest.num_images} pictures can't be read, more "
                f"than {limit}; the last: {list(batch.reasons.values())[-1]}"
            )


def _entry(name: str, array: NDArray[Any]) -> tuple[str, str, list[int], NDArray[np.uint8]]:
    kinds = {"b": "BOOL", "f": f"F{8 * array.itemsize}", "u": f"U{8 * array.itemsize}"}
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return name, kinds[array.dtype.kind], list(array.shape), flat


def _part(part: tuple[int, int] | None) -> tuple[int, int]:
    """(index, count) of this process's share."""
    if part is None:
        part = (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part must be i of n with 0 <= i < n, not {part[0]} of {part[1]}")
    return part


def _choose(
    content: Content | Literal["auto"], teacher: Teacher, rows: int, folder: Path, say: Say
) -> Content:
    if content != "auto":
        return content
    classes, width = teacher.class_vectors.shape
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    size = 2 * rows * width
    large = not exists(folder) and size > free / 2 and classes < width
    chosen: Content = "logits" if large else "features"
    if exists(folder):
        chosen = Manifest.read(folder).recipe.content
    bytes_each = 2 * (classes if chosen == "logits" else width)
    say(
        f"teacher cache: {chosen}, about {rows * bytes_each / 1e6:.1f} MB; "
        + (
            "valid for these class names only (features would fill more than half of the disk)"
            if chosen == "logits"
            else "valid for any class names and temperature"
        )
    )
    return chosen


def _same_recipe(folder: Path, found: Recipe, wanted: Recipe) -> None:
    difference = found.difference(wanted)
    if difference is not None:
        raise CheckpointError(
            f"cache '{folder}' is another one: {difference}; build one in another folder"
        )


def _joined(folder: Path, found: Manifest, wanted: Manifest) -> Manifest:
    """The manifest of a cache that is there, if it is the one that is wanted."""
    _same_recipe(folder, found.recipe, wanted.recipe)
    if found.segments != wanted.segments:
        raise CheckpointError(
            f"cache '{folder}' holds other pictures ({found.num_images}, now {wanted.num_images}; "
            "names and sizes must be the same); add new ones with 'promptkd cache extend'"
        )
    if found.shard_rows != wanted.shard_rows:
        raise CheckpointError(
            f"cache '{folder}' has shards of {found.shard_rows} rows, not {wanted.shard_rows}"
        )
    return found.with_views(max(found.num_views, wanted.num_views))


def _take(source: Path, target: Path) -> None:
    """Link or copy a shard; one that is there already must be the same."""
    if target.is_file():
        mine, theirs = (_rust.inspect_shard(p)[0]["check"] for p in (target, source))
        if mine != theirs:
            raise CheckpointError(
                f"'{source}' and '{target}' are different shards of one name; "
                "'promptkd cache verify' tells which one is right"
            )
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_for(target)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        raise CheckpointError(f"the cache '{target.parent}' can't be written: {error}") from error
