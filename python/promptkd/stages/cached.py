"""Stage 2 from a teacher cache: the teacher without its towers, and its answers on views."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from promptkd.cache.build import build_cache, exists, fill, renewed
from promptkd.cache.layout import WHOLE, Listing
from promptkd.cache.read import FeatureCache
from promptkd.cache.stored import StoredTeacher, digest_of_files, digest_of_prompts
from promptkd.class_names import names_from_json, same_names
from promptkd.class_vectors import TextSide
from promptkd.clip import Preprocess
from promptkd.data.decode import decode_views
from promptkd.data.loader import CropRecipe, ViewLoader, squashed
from promptkd.data.pictures import name_of, named, read_pictures
from promptkd.data.sources import ImageList
from promptkd.errors import CheckpointError, DataError
from promptkd.files import TEACHER, read_folder
from promptkd.loss import TeacherLogits, TeacherStatistics
from promptkd.prompts import stacked_prompts
from promptkd.ranks import ALONE, Ranks
from promptkd.teacher import Teacher

if TYPE_CHECKING:
    from promptkd.stages.distill import DistillConfig


@dataclass(frozen=True, slots=True)
class CachedClip:
    """The name of the CLIP behind a cache."""

    name: str


class CachedTeacher:
    """What stage 2 needs of a teacher, from a cache; it has no towers."""

    def __init__(
        self, cache: FeatureCache, stored: StoredTeacher, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.cache = cache
        self.class_names = stored.class_names
        self.class_vectors = stored.class_vectors.to(device, dtype)
        self.logit_scale = stored.logit_scale
        self.clip = CachedClip(stored.model)
        self._fingerprint, self._text_side = stored.fingerprint, stored.text_side

    def fingerprint(self) -> str:
        """Digest of all that the teacher's logits depend on."""
        return self._fingerprint

    def text_side(self) -> TextSide | None:
        """What made the class vectors; None in a cache that is older than this."""
        return self._text_side

    def log_probs(self, images: ImageList, temperature: float) -> tuple[Tensor, list[int]]:
        """log softmax of the logits on whole pictures, (n, C), and the n rows that could be read."""
        rows = self.cache.rows_of(images)
        kept = np.flatnonzero(~self.cache.read("failed", WHOLE, rows).numpy())
        features = self.cache.read("features", WHOLE, rows[kept]).to(self.class_vectors)
        logits = self.logit_scale * features @ self.class_vectors.T / temperature
        return F.log_softmax(logits.cpu(), dim=-1), kept.tolist()


@dataclass(frozen=True, slots=True)
class Wanted:
    """The teacher that was asked for, not loaded yet.

    Attributes:
        teacher, class_names, labelled: as given to `distill`.
        templates: of a zero-shot teacher.
        load: makes the teacher.
    """

    teacher: Any
    class_names: Sequence[str] | None
    labelled: Any
    templates: tuple[str, ...]
    load: Callable[[], Teacher]


def teacher_from_cache(
    path: str | os.PathLike[str],
    wanted: Wanted,
    images: ImageList,
    config: DistillConfig,
    *,
    num_views: int,
    orient: bool,
    device: torch.device,
    say: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> CachedTeacher:
    """Open the cache at `path`, or build it with `num_views` views; its teacher.

    Ranks divide the shards among them. The teacher itself is loaded only to fill the cache, or
    where the cache alone can't tell whether it was built by the teacher that is wanted.

    Raises:
        CheckpointError: the cache was built by another teacher, from other pictures, or with
            other settings.
    """
    folder = Path(path).expanduser()
    if not ranks.first(lambda: exists(folder)):
        made = build_cache(
            wanted.load(),
            images,
            folder,
            views=num_views,
            seed=config.seed,
            dtype="float64" if config.precision == "fp64" else None,
            temperature=config.temperature,
            crop_scale=config.crop_scale,
            orient=orient,
            part=(ranks.rank, ranks.size),
            say=say,
        )
        ranks.wait()
        return CachedTeacher(made, made.teacher(), device, config.compute_dtype)
    cache = FeatureCache.open(folder)
    _check_settings(cache, config, orient)
    missing = ranks.first(cache.missing)
    stored = None if missing else _known(cache, wanted, config.precision)
    if stored is None:
        teacher = wanted.load()
        recipe = cache.manifest.recipe
        difference = recipe.difference(renewed(recipe, teacher))
        if difference is not None:
            raise CheckpointError(
                f"cache '{folder}' was built by another teacher: {difference}; build one in "
                "another folder with 'promptkd cache build'"
            )
        if missing:
            listings = cache.listings(Listing.of(images))
            part = (ranks.rank, ranks.size)
            cache = fill(folder, cache.manifest, teacher, listings, part=part, say=say)
            ranks.wait()
        stored = StoredTeacher.of(teacher)
    say(f"teacher cache '{folder}': {cache.num_views} views, {cache.content}; no teacher needed")
    return CachedTeacher(cache, stored, device, config.compute_dtype)


def _check_settings(cache: FeatureCache, config: DistillConfig, orient: bool) -> None:
    recipe = cache.manifest.recipe
    pairs: list[tuple[str, Any, Any]] = [
        ("crop_scale", recipe.scale, tuple(config.crop_scale)),
        ("orient", recipe.orient, orient),
    ]
    if recipe.content == "statistics":
        pairs.append(("temperature", recipe.temperature, config.temperature))
        pairs.append(("min_confidence", 0.0, config.min_confidence))
    for name, found, asked in pairs:
        if found != asked:
            raise CheckpointError(
                f"cache '{cache.path}' of {recipe.content} was built for {name} {found}, not "
                f"{asked}; change the setting, or build a cache in another folder"
            )


def _known(cache: FeatureCache, wanted: Wanted, precision: str) -> StoredTeacher | None:
    """The cache's own teacher, if it can be seen without loading that it is the one wanted."""
    try:
        stored = cache.teacher()
    except CheckpointError:
        return None  # it is written again once the teacher is there
    if isinstance(wanted.teacher, Teacher) or wanted.labelled is not None:
        return None
    if stored.precision != precision:
        return None
    if (Path(wanted.teacher) / "teacher.json").is_file():
        same = wanted.class_names is None and _is_folder_of(stored, wanted.teacher)
    else:
        same = (
            wanted.class_names is not None
            and stored.method == "zero-shot"
            and stored.model == str(wanted.teacher)
            and same_names(stored.class_names, wanted.class_names)
            and stored.templates == tuple(wanted.templates)
            and stored.model_files == digest_of_files(stored.model)
        )
    return stored if same else None


def _is_folder_of(stored: StoredTeacher, folder: str | os.PathLike[str]) -> bool:
    """Whether a teacher folder holds this teacher; its CLIP is not opened."""
    tensors, data = read_folder(folder, "teacher", TEACHER)
    vectors = tensors["class_vectors"]
    return (
        data["image_hash"] == stored.image_hash
        and digest_of_prompts(stacked_prompts(tensors, "vision_prompts", None, None, folder))
        == stored.prompts
        and same_names(names_from_json(data), stored.class_names)
        and vectors.shape == stored.class_vectors.shape
        and torch.equal(vectors.to(stored.class_vectors.dtype), stored.class_vectors)
    )


class CachedViews:
    """The teacher's answers on the cached views of a list of pictures.

    Rows are gathered at random, but a view's files are brought into memory in order while the
    first of them are used, and the view before is let go: memory holds one view of a larger cache.
    """

    def __init__(self, cache: FeatureCache, images: ImageList, *, pin: bool) -> None:
        self.cache, self.rows, self._pin = cache, cache.rows_of(images), pin
        self._view: int | None = None

    def plan(self, views: int, num_epochs: int) -> int:
        """How many views to cycle through: those of the cache, or the first `views` of them."""
        return min(self.cache.num_views, views or self.cache.num_views)

    def prepare(self, view: int) -> None:
        """Begin to read a view; the one before is no longer needed."""
        if view == self._view:
            return
        if self._view is not None:
            self.cache.release(self._view)
        self._view = view
        if self.cache.view_bytes(view) <= _memory_bytes() / 2:
            threading.Thread(target=self._read_ahead, args=(view,), daemon=True).start()

    def answers(
        self, view: int, kept: Sequence[int]
    ) -> tuple[Tensor | TeacherStatistics | TeacherLogits, Tensor]:
        """Answers on these rows of the list, and whether (B,) the teacher could read them."""
        rows = self.rows[list(kept)]
        good = ~self.cache.read("failed", view, rows)
        return self.cache.answers(view, rows, pin=self._pin), good

    def _read_ahead(self, view: int) -> None:
        with suppress(CheckpointError):  # whoever reads a damaged row is told
            self.cache.read_ahead(view)


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class CheckedLoader(ViewLoader):
    """Loads views, and refuses pictures whose bytes are not those that the teacher saw."""

    def __init__(
        self,
        images: ImageList,
        preprocess: Sequence[Preprocess],
        crop: CropRecipe,
        *,
        seed: int,
        orient: bool,
        views: CachedViews,
    ) -> None:
        super().__init__(images, preprocess, crop, seed=seed, orient=orient)
        self._views = views
        self._target = squashed(preprocess[0])

    def load(self, rows: Sequence[int], view: int) -> tuple[list[Tensor], list[int]]:
        """As `ViewLoader.load`, for one tower."""
        good = [r for r in rows if r not in self.failures.reasons]
        paths = [self.images.paths[r] for r in good]
        files, hashes, reasons = read_pictures(paths)
        self._compare(good, view, hashes, reasons)
        pixels, failed = decode_views(
            files,
            [self._target],
            seed=self._seed,
            keys=self._keys[good],
            views=np.full(len(good), view, dtype=np.uint32),
            scale=self._crop.scale,
            ratio=self._crop.ratio,
            flip=self._crop.flip,
            orient=self._orient,
            on_error="skip",
        )
        for place, _, reason in failed:
            self.failures.add(good[place], reasons.get(place) or named(paths[place], reason))
        bad = {place for place, _, _ in failed}
        kept = [place for place in range(len(good)) if place not in bad]
        return [torch.from_numpy(pixels[0])[kept]], [good[place] for place in kept]

    def _compare(
        self,
        rows: list[int],
        view: int,
        hashes: NDArray[np.uint64],
        unreadable: dict[int, str],
    ) -> None:
        stored = self._views.cache.read("hashes", view, self._views.rows[rows]).numpy()
        changed = [int(p) for p in np.flatnonzero(stored != hashes) if int(p) not in unreadable]
        if changed:
            raise DataError(
                f"picture {name_of(self.images.paths[rows[changed[0]]])} has changed since cache "
                f"'{self._views.cache.path}' was built; build a cache in another folder"
            )
