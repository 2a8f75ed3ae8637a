"""The views that stage 2 trains on, and the teacher's answers on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from promptkd.cache.encode import ViewEncoder
from promptkd.cache.layout import canonical
from promptkd.cache.recipe import BATCH_ROWS
from promptkd.data.loader import CropRecipe, ViewLoader, epoch_order, prefetch, split_batches
from promptkd.data.sources import ImageList
from promptkd.loss import TeacherLogits, TeacherStatistics
from promptkd.ranks import ALONE, Ranks
from promptkd.stages.cached import CachedTeacher, CachedViews, CheckedLoader
from promptkd.stages.progress import Progress
from promptkd.student import Student
from promptkd.teacher import Teacher

if TYPE_CHECKING:
    from promptkd.stages.distill import DistillConfig

Answer: TypeAlias = Tensor | TeacherStatistics | TeacherLogits
Answers: TypeAlias = tuple[Answer, Tensor]
"""The teacher's answers on some rows, and whether (B,) it could read them."""
MEMORY_BYTES = 2 * 1024**3


class TeacherViews:
    """Unit teacher features (N, D) of view 0, 1, … of a list of pictures.

    A view is always computed whole, in the same order and batches, so that a resumed run gets the
    same bits as one that was never interrupted, and as one from a cache of `within`, the list
    that the pictures are taken from.
    """

    def __init__(
        self,
        teacher: Teacher,
        images: ImageList,
        crop: CropRecipe,
        *,
        seed: int,
        orient: bool,
        dtype: torch.dtype,
        progress: Progress,
        within: ImageList | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._teacher, self._dtype, self._progress = teacher, dtype, progress
        self._ranks = ranks
        self._num_images = len(images)
        ordered = canonical(within if within is not None else images)[0]
        place = {name: row for row, name in enumerate(ordered.names)}
        self._rows = [place[name] for name in images.names]
        self._num_encoded = len(ordered)
        self._encoder = ViewEncoder(teacher, ordered, crop, seed=seed, orient=orient)
        self._kept: dict[int, Tensor] = {}

    def plan(self, views: int, num_epochs: int) -> int:
        """How many views to cycle through; 0 means fresh ones in every step.

        Views are kept only where epochs outnumber them and they fit in memory.
        """
        size = self._num_images * self._teacher.class_vectors.shape[1] * 4
        if views == 0 or num_epochs <= views:
            return 0
        if views * size > MEMORY_BYTES:
            self._progress.say(
                f"{views} views of {self._num_images} pictures would take "
                f"{views * size / 1024**3:.1f} GiB; the teacher runs in every step instead"
            )
            return 0
        return views

    def prepare(self, view: int) -> None:
        """Compute a view that is not there yet; all ranks together."""
        if view not in self._kept:
            self._kept[view] = self._compute(view)

    def answers(self, view: int, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features (B, D) of rows of a prepared view, and whether (B,) the teacher could read them."""
        found = self._kept[view][list(kept)]
        return found, ~found[:, 0].isnan()

    def encode(self, pixels: Tensor) -> Tensor:
        """Features (B, D) of uint8 pixels (B, H, W, 3), perhaps none."""
        clip = self._teacher.clip
        if len(pixels) == 0:
            return self._teacher.class_vectors.new_zeros(0, clip.vision.output_dim)
        return self._teacher.encode_image(
            clip.preprocess.normalize(pixels.to(clip.device), self._dtype)
        )

    def _compute(self, view: int) -> Tensor:
        """Features (N, D); rows of pictures that can't be read are NaN.

        Each rank computes a run of the batches that a single process computes.
        """
        width = self._teacher.class_vectors.shape[1]
        features = torch.zeros(self._num_encoded, width, dtype=self._dtype)
        mine = self._ranks.share(-(-self._num_encoded // BATCH_ROWS))
        done, stop = mine.start * BATCH_ROWS, min(mine.stop * BATCH_ROWS, self._num_encoded)
        for batch in self._encoder.encode(view, done, stop):
            rows = len(batch.hashes)
            features[done : done + rows] = batch.features[:rows].cpu()
            features[[done + place for place in batch.reasons]] = torch.nan
            done += rows
        self._ranks.add_up(features)
        return features[self._rows]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input: this rank's rows of it, perhaps none.

    Attributes:
        pixels: (B, 3, H, W), normalised.
        teacher_features: the teacher's (B, D), unit rows, or what a cache holds in their place.
    """

    pixels: Tensor
    teacher_features: Answer


class ViewBatches:
    """Batches of stage 2: pixels for the student and the teacher's features of the same views.

    A batch's rows are divided among the ranks, in order.
    """

    def __init__(
        self,
        images: ImageList,
        student: Student,
        teacher: Teacher | CachedTeacher,
        config: DistillConfig,
        *,
        orient: bool,
        progress: Progress,
        within: ImageList | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._images, self._student, self._config = images, student, config
        self._ranks = ranks
        self._dtype = config.compute_dtype
        if isinstance(teacher, CachedTeacher):
            self._from_cache(teacher, orient)
            return
        crop = CropRecipe(scale=config.crop_scale)
        self._online = TeacherViews(
            teacher,
            images,
            crop,
            seed=config.seed,
            orient=orient,
            dtype=self._dtype,
            progress=progress,
            within=within,
            ranks=ranks,
        )
        self._views: TeacherViews | CachedViews = self._online
        per_epoch = self.steps_per_epoch
        num_epochs = -(-config.num_steps(per_epoch) // per_epoch)
        self._period = self._views.plan(config.views, num_epochs)
        both = [student.clip.preprocess, teacher.preprocess]
        self._loader = ViewLoader(
            images, both if self._period == 0 else both[:1], crop, seed=config.seed, orient=orient
        )

    def _from_cache(self, teacher: CachedTeacher, orient: bool) -> None:
        recipe = teacher.cache.manifest.recipe
        pin = self._student.device.type == "cuda"
        views = CachedViews(teacher.cache, self._images, pin=pin)
        self._views, self._period = views, views.plan(self._config.views, 0)
        self._loader = CheckedLoader(
            self._images,
            [self._student.clip.preprocess],
            recipe.crop,
            seed=recipe.seed,
            orient=orient,
            views=views,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch."""
        return len(split_batches(range(len(self._images)), self._config.batch_size))

    @property
    def failures(self) -> dict[int, str]:
        """Pictures that could not be read, with the reason."""
        return self._loader.failures.reasons

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of an epoch from number `first` on; rows that can't be read are left out."""
        order = epoch_order(len(self._images), self._config.seed, epoch)
        rows = split_batches(order, self._config.batch_size)[first:]
        view = epoch % self._period if self._period else epoch
        self._loader.failures.join(self._ranks.objects(self.failures))
        if self._period:
            self._views.prepare(view)
        work = [(self._ranks.cut(r), view) for r in rows]
        for pixels, kept, answers in prefetch(self._load, work):
            yield self._batch(pixels, kept, answers, view)

    def _load(
        self, rows: Sequence[int], view: int
    ) -> tuple[list[Tensor], list[int], Answers | None]:
        """Pixels, rows that were read, and the teacher's answers where they are at hand."""
        pixels, kept = self._loader.load(rows, view)
        return pixels, kept, self._views.answers(view, kept) if self._period else None

    def _batch(
        self, pixels: Sequence[Tensor], kept: Sequence[int], answers: Answers | None, view: int
    ) -> Batch:
        """Rows that were read, without those that the teacher could not read."""
        device = self._student.device
        mine = self._student.clip.preprocess.normalize(pixels[0].to(device), self._dtype)
        if answers is None:
            return Batch(mine, self._online.encode(pixels[1]))
        found, good = answers
        if not bool(good.all()):
            mine = mine[good.to(device)]
            kept = [row for row, g in zip(kept, good.tolist(), strict=True) if g]
            found = self._views.answers(view, kept)[0]
        return Batch(mine, _move(found, device, self._dtype))


def _move(answers: Answer, device: torch.device, dtype: torch.dtype) -> Answer:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True).to(dtype)

    if isinstance(answers, TeacherStatistics):
        return TeacherStatistics(move(answers.mu), move(answers.h))
    if isinstance(answers, TeacherLogits):
        return TeacherLogits(move(answers.logits))
    return move(answers)
