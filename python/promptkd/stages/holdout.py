"""Seeing without labels whether distillation works: pictures kept aside, agreement and KL there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from promptkd.calibration import MIN_PICTURES, calibrate
from promptkd.class_vectors import ensemble_features, unit
from promptkd.clip import Preprocess
from promptkd.data.loader import chunks, load_whole, prefetch
from promptkd.data.sources import ImageList
from promptkd.errors import DataError
from promptkd.ranks import ALONE, Ranks
from promptkd.stages.cached import CachedTeacher
from promptkd.stages.progress import Progress
from promptkd.student import Student
from promptkd.teacher import Teacher

LOW_CONFIDENCE = 0.5
MAX_HOLDOUT = 512
_LOOK_AT = 512


def split_holdout(num_images: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to learn from and rows kept aside (at most 512); at least two stay to learn from."""
    held = min(math.ceil(num_images * share), num_images - 2, MAX_HOLDOUT)
    generator = torch.Generator().manual_seed(seed + 7_919)
    order = torch.randperm(num_images, generator=generator).tolist()
    return sorted(order[held:]), sorted(order[:held])


class Holdout:
    """Pictures kept aside, their pixels for the student, and the teacher's answers on them.

    Each rank looks at its share of the pictures; the answers are those on all of them.
    """

    def __init__(
        self,
        teacher: Teacher | CachedTeacher,
        student: Student,
        images: ImageList,
        temperature: float,
        *,
        orient: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self._student, self._orient, self._temperature = student, orient, temperature
        self._ranks = ranks
        mine = images.select(ranks.share(len(images)))
        log_probs, kept = teacher_log_probs(teacher, mine, temperature, orient=orient)
        self.log_probs = ranks.gather(log_probs)
        self._images = mine.select(kept)
        self.last: dict[str, float] | None = None
        self.zero_shot: float | None = None

    def measure(self, student: Student) -> dict[str, float] | None:
        """Top-1 agreement with the teacher in percent, and KL(teacher || student); None if empty."""
        if len(self.log_probs) == 0:
            return None
        mine = F.log_softmax(self._logits(student) / self._temperature, dim=-1)
        kl = (self.log_probs.exp() * (self.log_probs - mine)).sum(dim=-1).mean()
        self.last = {"agreement": self._agreement(mine), "holdout_kl": float(kl)}
        return self.last

    @torch.no_grad()
    def _logits(self, student: Student) -> Tensor:
        was_training = student.training
        student.eval()
        rows = [student(p) for p in self._pixels()]
        student.train(was_training)
        return self._gather(rows, len(student.class_names))

    def calibrate(self, student: Student, progress: Progress) -> None:
        """Fit the student's temperature to the teacher's probabilities, where pictures suffice."""
        if len(self.log_probs) < MIN_PICTURES:
            return
        teacher = (self.log_probs * self._temperature).softmax(dim=-1)
        found = student.set_calibration(calibrate(self._logits(student), teacher))
        progress.say(
            f"temperature {found.temperature:.2f}, fitted to the teacher's probabilities: "
            f"calibration error {found.before.error:.1f} % → {found.after.error:.1f} %"
        )

    @torch.no_grad()
    def zero_shot_agreement(self, templates: Sequence[str]) -> float | None:
        """Agreement of the student's own CLIP, before any distillation; None without text side."""
        student = self._student
        if len(self.log_probs) == 0 or student.clip.text is None:
            return None
        vectors = unit(ensemble_features(student.clip, student.class_names, templates))
        rows = [unit(student.vision(p)) @ vectors.T for p in self._pixels()]
        self.zero_shot = self._agreement(self._gather(rows, len(vectors)))
        return self.zero_shot

    def verdict(self, student: Student, progress: Progress) -> None:
        """Say whether it worked; a student below its own zero-shot agreement has failed."""
        before, after = student.info.summary["before"], student.info.summary["after"]
        if after is None:
            student.with_summary(failed=False)
            return
        failed = self.zero_shot is not None and after["agreement"] < self.zero_shot
        student.with_summary(failed=failed)
        own = "" if self.zero_shot is None else f" (its own zero-shot: {self.zero_shot:.1f} %)"
        progress.say(
            f"agreement with the teacher on {len(self.log_probs)} pictures kept aside: "
            f"{before['agreement']:.1f} % → {after['agreement']:.1f} %{own}; "
            f"KL {before['holdout_kl']:.3f} → {after['holdout_kl']:.3f}"
        )
        if failed:
            progress.say(
                "FAILED: the student agrees with its teacher less than it did before distilling. "
                "Try more pictures or steps, a lower lr, or another seed.",
                style="bold red",
            )

    def _gather(self, rows: Sequence[Tensor], num_classes: int) -> Tensor:
        """All ranks' rows (n, C), on the CPU."""
        empty = torch.zeros(0, num_classes, dtype=self._student.class_vectors.dtype)
        return self._ranks.gather(torch.cat([empty, *(r.cpu() for r in rows)]))

    def _agreement(self, scores: Tensor) -> float:
        same = scores.argmax(dim=-1) == self.log_probs.argmax(dim=-1)
        return 100 * float(same.double().mean())

    def _pixels(self) -> Iterator[Tensor]:
        student = self._student
        for pixels, _ in whole_batches(
            self._images, student.clip.preprocess, student, self._orient
        ):
            yield pixels


def whole_batches(
    images: ImageList, preprocess: Preprocess, module: Student | Teacher, orient: bool
) -> Iterator[tuple[Tensor, list[int]]]:
    """Normalised test views, batch by batch, on a module's device, with the rows that could be read."""
    device = module.class_vectors.device
    dtype = torch.float64 if module.vision.dtype == torch.float64 else torch.float32

    def load(rows: list[int]) -> tuple[Tensor, list[int]]:
        paths = [images.paths[r] for r in rows]
        (pixels,), kept = load_whole(paths, [preprocess], orient=orient, on_error="skip")
        return pixels, [rows[k] for k in kept]

    for pixels, kept in prefetch(load, [(rows,) for rows in chunks(len(images))]):
        if kept:
            yield preprocess.normalize(pixels.to(device), dtype), kept


@torch.no_grad()
def teacher_log_probs(
    teacher: Teacher | CachedTeacher, images: ImageList, temperature: float, *, orient: bool
) -> tuple[Tensor, list[int]]:
    """log softmax of the teacher's logits on whole pictures, (n, C), and the n rows it could read."""
    if len(images) == 0:
        return teacher.class_vectors.new_zeros(0, len(teacher.class_names)).cpu(), []
    if isinstance(teacher, CachedTeacher):
        return teacher.log_probs(images, temperature)
    vectors = teacher.class_vectors
    rows, kept = [vectors.new_zeros(0, len(vectors))], []
    for pixels, read in whole_batches(images, teacher.preprocess, teacher, orient):
        rows.append(teacher.logits(pixels) / temperature)
        kept += read
    return F.log_softmax(torch.cat(rows).cpu(), dim=-1), kept


def describe_teacher(
    teacher: Teacher | CachedTeacher,
    images: ImageList,
    *,
    orient: bool,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """What the teacher makes of (a sample of) the pictures, told to the user before training."""
    sample = images.select(range(0, len(images), math.ceil(len(images) / _LOOK_AT)))
    mine = sample.select(ranks.share(len(sample)))
    log_probs = ranks.gather(teacher_log_probs(teacher, mine, 1.0, orient=orient)[0])
    if len(log_probs) == 0:
        if isinstance(teacher, CachedTeacher):
            raise DataError(f"none of {len(sample)} pictures could be read for the cache")
        load_whole(sample.paths[:1], [teacher.preprocess], orient=orient)  # raises with the reason
        raise DataError(f"none of {len(sample)} pictures can be read")
    best, label = log_probs.exp().max(dim=-1)
    counts = torch.bincount(label, minlength=len(teacher.class_names)).tolist()
    unsure = 100 * float((best < LOW_CONFIDENCE).double().mean())
    by_class = dict(zip(teacher.class_names, counts, strict=True))
    empty = [name for name, count in by_class.items() if count == 0]
    most = sorted(by_class.items(), key=lambda kv: -kv[1])
    progress.say(
        f"teacher on {len(log_probs)} pictures: "
        + ", ".join(f"{name} {count}" for name, count in most[:8])
        + (f" … {most[-1][0]} {most[-1][1]}" if len(most) > 8 else "")
        + f"; {unsure:.0f} % with a top probability below {LOW_CONFIDENCE}"
    )
    if empty:
        progress.say(
            f"warning: the teacher sees none of {len(empty)} classes: {', '.join(empty[:8])}"
            + (" …" if len(empty) > 8 else ""),
            style="yellow",
        )
    if unsure > 50:
        progress.say(
            "warning: the teacher is uncertain about most pictures; check the class names, or tune "
            "it on a few labelled pictures first",
            style="yellow",
        )
    return {"num_images": len(log_probs), "predictions": by_class, "low_confidence_percent": unsure}
