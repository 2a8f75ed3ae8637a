"""The teacher's answers on training views: in every step, or once a view and kept in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from promptkd.data.loader import CropRecipe, ViewLoader, chunks, prefetch
from promptkd.data.sources import ImageList
from promptkd.stages.progress import Progress
from promptkd.teacher import Teacher

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
