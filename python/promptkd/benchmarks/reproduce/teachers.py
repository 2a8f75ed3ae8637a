"""The teacher of a cell: tuned here, opened, converted or zero-shot; and what it is worth."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch

from promptkd import official
from promptkd.benchmarks.dataset import BenchmarkDataset, load
from promptkd.benchmarks.metrics import Scores
from promptkd.benchmarks.reproduce.plan import SOURCE, Cell
from promptkd.class_names import PublishedNames, plain_name
from promptkd.clip import load_clip
from promptkd.convert import official_teacher, with_class_names
from promptkd.data.sources import ImageList
from promptkd.errors import DataError
from promptkd.stages.progress import Progress
from promptkd.stages.teach import teach
from promptkd.teacher import Teacher, zero_shot_teacher

REASONS = (
    "likely reasons: it was tuned for other classes or another order of classes; its prompts belong "
    "to another CLIP; class vectors were made before its weights were loaded; or stage 1 diverged"
)


def teacher_for(cell: Cell, device: torch.device, progress: Progress) -> Teacher:
    """The teacher of a cell, which knows the dataset's class names in their order.

    Raises:
        DataError: a given teacher knows other classes.
        CheckpointError: a given teacher doesn't fit its model.
    """
    source = cell.teacher_source
    precision = cell.distill_config.precision
    names = PublishedNames(cell.data.class_names)
    if source is None:
        return _tuned(cell, device, progress)
    place = Path(source).expanduser()
    if (place / "teacher.json").is_file():
        teacher = Teacher.load(place, precision=precision, device=device, text=True)
        if cell.plan.protocol == "cross-dataset":
            return with_class_names(teacher, names)
        if [plain_name(n) for n in teacher.class_names] != [plain_name(n) for n in names]:
            raise DataError(
                f"the teacher '{place}' knows other classes than {cell.data.paper.title}: "
                f"{_some(teacher.class_names)}, not {_some(names)}"
            )
        return teacher
    if place.is_file() and ".tar" in place.name:
        checkpoint = official.load(place)
        clip = load_clip(cell.plan.model, precision=precision, device=device)
        _check_count(cell, checkpoint.num_classes, progress)
        return official_teacher(checkpoint, clip, names)
    clip = load_clip(source, precision=precision, device=device)
    return zero_shot_teacher(clip, names, (cell.data.template,))


def labelled_for(cell: Cell) -> tuple[ImageList, Path]:
    """The few labelled pictures that stage 1 sees, and the folder of its teacher.

    Sampled over all classes first, as the official code does; base-to-novel keeps those of the
    base classes.
    """
    plan, data, folder = cell.plan, cell.data, cell.folder / "teacher"
    if plan.protocol == "cross-dataset":
        data = _source_data(plan.root)
        folder = plan.output.expanduser() / "teachers" / f"{SOURCE}-seed{cell.seed}"
    images = data.few_shot(plan.shots, cell.seed).images("train")
    if cell.halves:
        assert images.labels is not None
        middle = len(data.base().class_names)
        images = images.select([row for row, y in enumerate(images.labels) if y < middle])
    return images, folder


def teacher_warning(scores: Scores, zero_shot: Scores) -> str | None:
    """A sentence on a teacher that is worse than its CLIP is without tuning, None if it isn't."""
    worse = [
        f"{found.top1:.1f} % on {part} classes (zero-shot {zero_shot.parts[part].top1:.1f} %)"
        for part, found in scores.parts.items()
        if found.top1 < zero_shot.parts[part].top1
    ]
    if not worse:
        return None
    return f"the teacher is below its own zero-shot accuracy: {', '.join(worse)}; {REASONS}"


def _tuned(cell: Cell, device: torch.device, progress: Progress) -> Teacher:
    images, folder = labelled_for(cell)
    assert images.class_names is not None
    teacher = teach(
        images,
        images.class_names,
        model=cell.plan.model,
        output=folder,
        resume=True,
        device=device,
        config=replace(cell.teach_config, shots=0),  # sampled already
        orient=False,
        progress=progress,
    )
    names = PublishedNames(cell.data.class_names)
    return teacher if teacher.class_names == names else with_class_names(teacher, names)


@functools.lru_cache(maxsize=1)
def _source_data(root: Path) -> BenchmarkDataset:
    return load(SOURCE, root)


def _check_count(cell: Cell, count: int | None, progress: Progress) -> None:
    total = len(cell.data.class_names)
    expected = {total, (total + 1) // 2}
    if cell.plan.protocol != "cross-dataset" and count is not None and count not in expected:
        progress.say(
            f"warning: the teacher '{cell.teacher_source}' was tuned on {count} classes; "
            f"{cell.data.paper.title} has {total}, {(total + 1) // 2} of them base",
            style="yellow",
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + f" … ({len(names)})"
