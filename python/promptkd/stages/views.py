"""The views that stage 2 trains on, and the teacher's answers on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from promptkd.data.loader import (
    CropRecipe,
    ViewLoader,
    chunks,
    epoch_order,
    prefetch,
    split_batches,
)
from promptkd.data.sources import ImageList
from promptkd.stages.progress import Progress
from promptkd.student import Student
from promptkd.teacher import Teacher

if TYPE_CHECKING:
    from promptkd.stages.distill import DistillConfig

MEMORY_BYTES = 2 * 1024**3


class TeacherViews:
    """Unit teacher features (N, D) of view 0, 1, … of a list of pictures.

    A view is always computed whole, in the same order and batches, so that a resumed run gets the
    same bits as one that was never interrupted.
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
    ) -> None:
        self._teacher, self._dtype, self._progress = teacher, dtype, progress
        self._num_images = len(images)
        self._loader = ViewLoader(images, [teacher.preprocess], crop, seed=seed, orient=orient)
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

    def features(self, view: int) -> Tensor:
        """Features (N, D) of a view, computed on first use; unreadable pictures are rows of zeros."""
        if view not in self._kept:
            self._kept[view] = self._compute(view)
        return self._kept[view]

    def encode(self, pixels: Tensor) -> Tensor:
        """Features (B, D) of uint8 pixels (B, H, W, 3)."""
        clip = self._teacher.clip
        return self._teacher.encode_image(
            clip.preprocess.normalize(pixels.to(clip.device), self._dtype)
        )

    def _compute(self, view: int) -> Tensor:
        width = self._teacher.class_vectors.shape[1]
        features = torch.zeros(self._num_images, width, dtype=self._dtype)
        for (pixels,), kept in prefetch(
            self._loader.load, [(c, view) for c in chunks(self._num_images)]
        ):
            if kept:
                features[kept] = self.encode(pixels).cpu()
        return features


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input: normalised pixels (B, 3, H, W) and the teacher's unit features (B, D)."""

    pixels: Tensor
    teacher_features: Tensor


class ViewBatches:
    """Batches of stage 2: pixels for the student and the teacher's features of the same views."""

    def __init__(
        self,
        images: ImageList,
        student: Student,
        teacher: Teacher,
        config: DistillConfig,
        *,
        orient: bool,
        progress: Progress,
    ) -> None:
        self._images, self._student, self._config = images, student, config
        self._dtype = config.compute_dtype
        crop = CropRecipe(scale=config.crop_scale)
        self._views = TeacherViews(
            teacher,
            images,
            crop,
            seed=config.seed,
            orient=orient,
            dtype=self._dtype,
            progress=progress,
        )
        per_epoch = self.steps_per_epoch
        num_epochs = -(-config.num_steps(per_epoch) // per_epoch)
        self._period = self._views.plan(config.views, num_epochs)
        both = [student.clip.preprocess, teacher.preprocess]
        self._loader = ViewLoader(
            images, both if self._period == 0 else both[:1], crop, seed=config.seed, orient=orient
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
        known = self._views.features(view) if self._period else None
        for pixels, kept in prefetch(self._loader.load, [(r, view) for r in rows]):
            if len(kept) < 2:
                continue  # BatchNorm needs two
            device = self._student.device
            mine = self._student.clip.preprocess.normalize(pixels[0].to(device), self._dtype)
            if known is not None:
                yield Batch(mine, known[kept].to(device))
            else:
                yield Batch(mine, self._views.encode(pixels[1]))
