"""Official checkpoints become folders of ours; what doesn't fit is refused."""

from __future__ import annotations

import json
import math
import warnings
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from promptkd import official
from promptkd.class_vectors import prompted_class_vectors
from promptkd.cli import main
from promptkd.clip import load_clip
from promptkd.convert import convert, official_student, official_teacher, with_class_names
from promptkd.errors import CheckpointError, DataError
from promptkd.student import Student
from promptkd.teacher import Teacher
from tiny import CLASSES, Models
from torch import Tensor

TEACHER = (48, 40, 32)  # image width, output width, text width of the tiny teacher
STUDENT = (32, 24)


def dassl(path: Path, state: dict[str, Tensor]) -> Path:
    """A file as Dassl writes it: half precision, with a live scheduler and optimiser."""
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    half = OrderedDict(
        (k, v if v.dtype == torch.int64 else v.half().contiguous()) for k, v in state.items()
    )
    content = {
        "state_dict": half,
        "epoch": 20,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler,
        "val_result": 81.5,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, path)
    return path


def deep(prefix: str, first: str, depth: int, width: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [first, *(f"{prefix}.resblocks.{i}.VPT_shallow" for i in range(1, depth))]
    return {name: 0.1 * torch.randn(4, width, generator=generator) for name in names}


def teacher_file(folder: Path, depth: int = 2, scale: float = 3.0, width: int = TEACHER[0]) -> Path:
    state = deep("image_encoder.transformer", "image_encoder.VPT", depth, width, 1)
    state |= deep("text_encoder.transformer", "prompt_learner.ctx", depth, TEACHER[2], 2)
    state |= {
        "logit_scale": torch.tensor(scale),
        "prompt_learner.token_suffix": torch.zeros(2, 5, 3),
    }
    return dassl(folder / "model-best.pth.tar", state)


def student_file(folder: Path, depth: int = 3, wide: int = TEACHER[1]) -> Path:
    generator = torch.Generator().manual_seed(3)
    state = deep("image_encoder.transformer", "image_encoder.VPT", depth, STUDENT[0], 4)
    shapes = {
        "0.weight": (wide, STUDENT[1], 1, 1),
        "0.bias": (wide,),
        "3.weight": (wide, wide, 1, 1),
    }
    shapes |= {"3.bias": (wide,), "1.weight": (wide,), "1.bias": (wide,)}
    shapes |= {"1.running_mean": (wide,), "1.running_var": (wide,)}
    for name, shape in shapes.items():
        value = torch.rand(shape, generator=generator)
        state[f"VPT_image_trans.conv1.{name}"] = value
    state["VPT_image_trans.conv1.1.num_batches_tracked"] = torch.tensor(7)
    return dassl(folder / "model.pth.tar-20", {**state, "logit_scale": torch.tensor(3.0)})


def test_teacher_then_student_by_command(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts as stored, class vectors of the prompted text tower, the depth of the file."""
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES))
    source, small = teacher_file(tmp_path), student_file(tmp_path)
    folder, pupil = tmp_path / "teacher", tmp_path / "student"
    wanted: list[Any] = ["--model", models.teacher, "--classes", names, "--output", folder]
    assert main(["convert", str(source), *map(str, wanted), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "teacher"
    stored = official.load(source)
    teacher = Teacher.load(folder, text=True)
    assert teacher.class_names == CLASSES
    assert teacher.vision_prompts is not None
    assert teacher.text_prompts is not None
    for mine, theirs in zip(teacher.vision_prompts(), stored.vision_prompts, strict=True):
        assert torch.equal(mine, theirs)
    again = prompted_class_vectors(teacher.clip, CLASSES, "a photo of a {}.", teacher.text_prompts)
    torch.testing.assert_close(teacher.class_vectors, again)
    assert teacher.info.summary["val_result"] == 81.5

    wanted = ["--model", models.student, "--teacher", folder, "--output", pupil]
    assert main(["convert", str(small), *map(str, wanted)]) == 0
    assert "student of 3 classes" in capsys.readouterr().out
    student = Student.load(pupil)
    assert student.prompts.depth == 3
    assert not student.info.orient, "the official code ignores EXIF orientation"
    assert torch.equal(student.class_vectors, teacher.class_vectors)
    raw = torch.randn(5, STUDENT[1], generator=torch.Generator().manual_seed(0))
    state = official.read_checkpoint(small).state_dict
    part = {k.rpartition("conv1.")[2]: v.float() for k, v in state.items() if "conv1." in k}
    hidden = torch.nn.functional.batch_norm(
        raw @ part["0.weight"].flatten(1).T + part["0.bias"],
        part["1.running_mean"], part["1.running_var"], part["1.weight"], part["1.bias"],
    )  # fmt: skip
    want = hidden.relu() @ part["3.weight"].flatten(1).T + part["3.bias"]
    with torch.no_grad():
        torch.testing.assert_close(student.projector(raw), want)


def test_other_class_names(models: Models, tmp_path: Path) -> None:
    clip = load_clip(models.teacher)
    teacher = official_teacher(official.load(teacher_file(tmp_path)), clip, CLASSES)
    other = with_class_names(teacher, ("blue thing", "cat"))
    torch.testing.assert_close(other.class_vectors[0], teacher.class_vectors[2])
    assert other.class_names == ("blue thing", "cat")
    assert other.image_fingerprint() == teacher.image_fingerprint()


def test_what_does_not_fit_is_refused(models: Models, tmp_path: Path) -> None:
    big, small = load_clip(models.teacher), load_clip(models.student)
    good = official.load(teacher_file(tmp_path))
    wrong = [
        (replace(good, vision_prompts=good.vision_prompts * 2), "4 layers; the model's vision"),
        (replace(good, text_prompts=good.text_prompts * 2), "4 layers; the model's text"),
        (replace(good, logit_scale=math.log(100)), r"logit scale is exp\(4.6052\)"),
        (replace(good, kind="student"), "is a student, not a teacher"),
    ]
    for checkpoint, message in wrong:
        with pytest.raises(CheckpointError, match=message):
            official_teacher(checkpoint, big, CLASSES)
    with pytest.raises(CheckpointError, match=r"of width 48 in 2 layers; .* has width 32"):
        official_teacher(good, small, CLASSES)
    teacher = official_teacher(good, big, CLASSES)
    pupil = official.load(student_file(tmp_path, wide=41))
    with pytest.raises(CheckpointError, match=r"from width 24 to 41, but .* have 40"):
        official_student(pupil, small, teacher)


def test_a_student_needs_its_teacher_and_a_teacher_its_names(
    models: Models, tmp_path: Path
) -> None:
    source, small, out = teacher_file(tmp_path), student_file(tmp_path), tmp_path / "out"
    with pytest.raises(DataError, match="holds no class vectors"):
        convert(small, out, model=models.student)
    with pytest.raises(DataError, match="holds no class vectors"):
        convert(small, out, model=models.student, teacher="x", class_names=CLASSES)
    with pytest.raises(DataError, match="give its class names"):
        convert(source, out, model=models.teacher)
    assert not out.exists()
    convert(source, out, model=models.teacher, class_names=CLASSES)
    with pytest.raises(CheckpointError, match="already holds a teacher"):
        convert(source, out, model=models.teacher, class_names=CLASSES)
