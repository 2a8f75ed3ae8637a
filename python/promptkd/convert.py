"""Official checkpoints to our folders, and a teacher's class vectors for other names."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptkd import official
from promptkd.class_names import check_class_names
from promptkd.class_vectors import prompted_class_vectors
from promptkd.clip import Clip, load_clip
from promptkd.errors import CheckpointError, DataError
from promptkd.official import OfficialCheckpoint
from promptkd.prompts import DeepPrompts
from promptkd.student import Projector, Student, StudentInfo
from promptkd.teacher import (
    PROMPT_TEMPLATE,
    Teacher,
    TeacherInfo,
    zero_shot_teacher,
)
from promptkd.templates import IMAGENET_TEMPLATES_60

_SCALE_ROUNDING = 0.005
"""Official files keep the log of the logit scale (4.6) in half precision."""


def convert(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: Any,
    class_names: Sequence[str] | None = None,
    teacher: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> Teacher | Student:
    """Turn an official checkpoint into a teacher or student folder.

    Args:
        path: a PromptSRC teacher or PromptKD student in Dassl's format.
        output: the folder to write; it must not hold a teacher or student yet.
        model: the CLIP that the checkpoint's prompts were tuned on.
        class_names: for a teacher: all names it is to know, in label order.
        teacher: for a student, whose file holds no class vectors: the folder of its teacher.
        device: where to compute class vectors.

    Raises:
        CheckpointError: no official checkpoint, or one that doesn't fit the model or teacher.
        DataError: a teacher without class names, a student without its teacher, or either with
            what the other needs.
    """
    checkpoint = official.load(path)
    folder = Path(output).expanduser()
    for kind in ("teacher", "student"):
        if (folder / f"{kind}.json").exists():
            raise CheckpointError(f"'{folder}' already holds a {kind}; give another output folder")
    if checkpoint.kind == "teacher":
        if teacher is not None or class_names is None:
            raise DataError(f"'{path}' is a teacher: give its class names, and no other teacher")
        clip = load_clip(model, device=device)
        made: Teacher | Student = official_teacher(checkpoint, clip, class_names)
    else:
        if teacher is None or class_names is not None:
            raise DataError(
                f"'{path}' is a student, whose file holds no class vectors: give the folder of its "
                "teacher (convert that first), which brings the class names"
            )
        clip = load_clip(model, device=device, text=False)
        made = official_student(checkpoint, clip, Teacher.load(teacher, device=device))
    made.save(folder)
    return made


def official_teacher(
    checkpoint: OfficialCheckpoint, clip: Clip, class_names: Sequence[str]
) -> Teacher:
    """A PromptSRC teacher on its CLIP, with class vectors of `class_names` computed here.

    Raises:
        CheckpointError: not a teacher, or prompts that don't fit the CLIP.
    """
    _check_kind(checkpoint, "teacher")
    names = check_class_names(class_names)
    clip.need_prompts("a tuned teacher")
    tower = clip.need_prompted_text("compute class vectors behind text prompts")
    vision = _fitting(
        checkpoint.vision_prompts, "vision", clip.vision.width, clip.vision.num_layers
    )
    text = _fitting(checkpoint.text_prompts, "text", tower.width, tower.num_layers)
    _check_scale(checkpoint, clip)
    prompts = DeepPrompts(text).to(clip.device)
    vectors = prompted_class_vectors(clip, names, PROMPT_TEMPLATE, prompts)
    info = TeacherInfo(
        "promptsrc", PROMPT_TEMPLATE, IMAGENET_TEMPLATES_60, names, _origin(checkpoint)
    )
    seen = DeepPrompts(vision).to(clip.device) if vision else None
    return Teacher(clip, info, vectors, seen, prompts)


def official_student(checkpoint: OfficialCheckpoint, clip: Clip, teacher: Teacher) -> Student:
    """A PromptKD student on its CLIP, with its teacher's class vectors and names.

    Raises:
        CheckpointError: not a student, or parts that don't fit the CLIP or the teacher.
    """
    _check_kind(checkpoint, "student")
    clip.need_prompts("a student")
    vision = _fitting(
        checkpoint.vision_prompts, "vision", clip.vision.width, clip.vision.num_layers
    )
    _check_scale(checkpoint, clip)
    wide, narrow = checkpoint.projector["linear1.weight"].shape
    ends = (clip.vision.output_dim, teacher.class_vectors.shape[1])
    if (narrow, wide) != ends:
        raise CheckpointError(
            f"the projector leads from width {narrow} to {wide}, but '{clip.name}' gives {ends[0]} "
            f"and the class vectors of teacher '{teacher.clip.name}' have {ends[1]}"
        )
    projector = Projector(narrow, wide)
    projector.load_state_dict(dict(checkpoint.projector))
    info = StudentInfo(
        class_names=teacher.class_names,
        teacher=teacher.clip.name,
        teacher_fingerprint=teacher.fingerprint(),
        orient=False,  # the official code ignores EXIF orientation
        summary=_origin(checkpoint),
    )
    vectors = teacher.class_vectors.float()
    student = Student(clip, DeepPrompts(vision), projector, vectors, info, teacher.text_side())
    return student.to(clip.device).eval()


def with_class_names(teacher: Teacher, class_names: Sequence[str]) -> Teacher:
    """The same teacher with class vectors of other names; its text tower must be loaded."""
    if teacher.text_prompts is None:
        return zero_shot_teacher(teacher.clip, class_names, teacher.info.templates)
    names = check_class_names(class_names)
    info = teacher.info
    vectors = teacher.text_side().compute(teacher.clip, names)
    other = TeacherInfo(info.method, info.template, info.templates, names, info.summary)
    return Teacher(teacher.clip, other, vectors, teacher.vision_prompts, teacher.text_prompts)


def _check_kind(checkpoint: OfficialCheckpoint, kind: str) -> None:
    if checkpoint.kind != kind:
        raise CheckpointError(f"the checkpoint is a {checkpoint.kind}, not a {kind}")


def _fitting(prompts: Sequence[Tensor], side: str, width: int, layers: int) -> list[Tensor]:
    if prompts and (prompts[0].shape[1] != width or len(prompts) > layers):
        raise CheckpointError(
            f"the checkpoint has {side} prompts of width {prompts[0].shape[1]} in {len(prompts)} "
            f"layers; the model's {side} tower has width {width} and {layers} layers"
        )
    return list(prompts)


def _check_scale(checkpoint: OfficialCheckpoint, clip: Clip) -> None:
    """The logit scale is frozen in both methods, so another one means another CLIP."""
    stored = checkpoint.logit_scale
    if stored is not None and abs(stored - math.log(clip.logit_scale)) > _SCALE_ROUNDING:
        raise CheckpointError(
            f"the checkpoint's logit scale is exp({stored:.4f}), that of '{clip.name}' "
            f"exp({math.log(clip.logit_scale):.4f}): it was tuned on another model"
        )


def _origin(checkpoint: OfficialCheckpoint) -> dict[str, Any]:
    return {
        "converted_from": f"official {checkpoint.kind} in Dassl's format",
        "epoch": checkpoint.epoch,
        "val_result": checkpoint.val_result,
        "stored_as": str(checkpoint.dtype),
    }
