"""Looking for damage in a teacher cache, and for pictures or a teacher that have changed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from promptkd import _rust
from promptkd.cache.encode import ViewEncoder
from promptkd.cache.layout import WHOLE, Listing, Unit
from promptkd.cache.read import FeatureCache, is_whole
from promptkd.cache.recipe import BATCH_ROWS
from promptkd.cache.stored import StoredTeacher
from promptkd.data.pictures import read_pictures
from promptkd.data.sources import unlabelled
from promptkd.errors import CheckpointError
from promptkd.teacher import Teacher

_TOLERANCE = {"float16": 2e-3, "float32": 1e-4, "float64": 1e-9}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify_cache` found; no problems is good."""

    num_shards: int
    num_pictures: int
    num_recomputed: int
    problems: tuple[str, ...]


def verify_cache(
    cache: FeatureCache, *, images: Any = None, teacher: Teacher | None = None, sample: int = 2
) -> Verdict:
    """Check every byte of a cache; with its pictures and teacher, what it says of them too.

    Args:
        cache: an open cache.
        images: the pictures: their bytes are compared with the stored hashes.
        teacher: computes `sample` batches of features of whole pictures again (with `images`).
        sample: how many.
    """
    problems: list[str] = []
    units = list(cache.manifest.all_units())
    for unit in units:
        problems += _check_shard(cache, unit)
    try:
        StoredTeacher.load(cache.path)
    except CheckpointError as error:
        problems.append(str(error))
    pictures = recomputed = 0
    if images is not None and not problems:
        listings = cache.listings(Listing.of(unlabelled(images)))
        pictures = sum(len(part.images) for part in listings)
        problems += _check_pictures(cache, listings)
        if teacher is not None and not problems:
            recomputed, found = _recompute(cache, listings, teacher, sample)
            problems += found
    return Verdict(len(units), pictures, recomputed, tuple(problems))


def _check_shard(cache: FeatureCache, unit: Unit) -> list[str]:
    path = cache.path / unit.name
    try:
        damage = _rust.verify_shard(path)
    except (OSError, ValueError) as error:
        return [str(error)]
    if damage:
        return [f"'{path}': {what} is damaged" for what in damage]
    if not is_whole(cache.path, cache.manifest, unit):
        return [f"'{path}': it belongs to another cache or another place in this one"]
    names = json.loads(_rust.read_tensor(path, "names"))
    return [] if len(names) == unit.rows else [f"'{path}': {len(names)} names"]


def _check_pictures(cache: FeatureCache, listings: list[Listing]) -> list[str]:
    """Pictures whose bytes are not those that the teacher saw, in any view."""
    problems = []
    stored = {view: cache.read("hashes", view).numpy() for view in _views(cache)}
    first = 0
    for part in listings:
        for start in range(0, len(part.images), BATCH_ROWS):
            names = part.images.names[start : start + BATCH_ROWS]
            hashes = read_pictures(part.images.paths[start : start + BATCH_ROWS])[1]
            rows = slice(first + start, first + start + len(names))
            same = np.logical_and.reduce([stored[v][rows] == hashes for v in stored])
            problems += [
                f"picture '{names[place]}' has changed since the cache was built"
                for place in np.flatnonzero(~same)
            ]
        first += len(part.images)
    return problems


def _views(cache: FeatureCache) -> list[int]:
    return [WHOLE, *range(cache.num_views)]


def _recompute(
    cache: FeatureCache, listings: list[Listing], teacher: Teacher, sample: int
) -> tuple[int, list[str]]:
    """Compute whole pictures of some batches again; the rows compared, and what differs."""
    recipe = cache.manifest.recipe
    units = list(cache.manifest.units(WHOLE))
    step = max(1, len(units) // max(1, sample))
    rows, problems = 0, []
    for unit in units[::step][:sample]:
        part = listings[unit.segment]
        encoder = ViewEncoder(
            teacher, part.images, recipe.crop, seed=recipe.seed, orient=recipe.orient
        )
        stop = unit.start + min(unit.rows, BATCH_ROWS)
        [batch] = encoder.encode(WHOLE, unit.start, stop)
        place = np.arange(unit.first, unit.first + stop - unit.start, dtype=np.int64)
        stored = cache.read("features", WHOLE, place).to(torch.float64)
        again = batch.features[: len(place)].cpu().to(torch.float64)
        good = ~cache.read("failed", WHOLE, place)
        gap = float((stored - again)[good].abs().max()) if bool(good.any()) else 0.0
        rows += len(place)
        if gap > _TOLERANCE[recipe.dtype]:
            problems.append(
                f"'{cache.path / unit.name}': this teacher gives other features, up to {gap:.2g} off"
            )
    return rows, problems
