"""The model card of a student, written from its run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promptkd.evaluate import Evaluation
    from promptkd.student import Student

_SHOWN_CLASSES = 200
_SETTINGS = {
    "batch_size": "batch size",
    "lr": "learning rate",
    "temperature": "temperature of distilling",
    "kd_weight": "weight of the loss",
    "seed": "seed",
}


def model_card(
    student: Student,
    *,
    license: str | None = None,
    results: Mapping[str, Evaluation] | None = None,
    repository: str = "org/name",
) -> str:
    """The card of a student, in Markdown with the hub's metadata, written from its run.

    Args:
        student: what it is about.
        license: as the hub spells it, "mit" for example; default: "other", since the weights of
            the backbone have their own.
        results: accuracies by the name of the split they were measured on.
        repository: where the student will be found.
    """
    tower = _public(student.clip.name)
    parts = [
        _front_matter(student, license),
        f"# A student for {len(student.class_names)} classes\n",
        f"Classifies pictures. {tower} with learned prompts and a projector, distilled without "
        f"labels from {_public(student.info.teacher) or 'a teacher'} by PromptKD.\n",
        _use(repository),
        _classes(student),
        _training(student),
        _numbers(student, results or {}),
        "## Licence\n\n"
        + (f"{license}. " if license else "Not stated by its maker. ")
        + f"The frozen image tower is that of {tower} and keeps its own licence.\n",
        _fingerprints(student),
    ]
    return "\n".join(parts)


def _front_matter(student: Student, license: str | None) -> str:
    lines = [
        "---",
        f"license: {license or 'other'}",
        "library_name: promptkd",
        "pipeline_tag: image-classification",
        "tags:",
        *(f"- {tag}" for tag in ("promptkd", "clip", "distillation")),
        "---",
        "",
    ]
    return "\n".join(lines)


def _public(name: str) -> str:
    """A model's name without the folders of the machine that it was loaded from."""
    local = name.startswith("local-dir:") or name.endswith((".pt", ".pth", ".bin", ".safetensors"))
    return f"{PurePath(name).name} (a local model)" if local else name


def _use(repository: str) -> str:
    return (
        "## How to use\n\n```python\nfrom promptkd import Student\n\n"
        f'student = Student.from_pretrained("{repository}")\n'
        'print(student.predict("photo.jpg").labels)\n```\n\n'
        "Other class names, without training: `student.with_classes([...])`.\n"
    )


def _classes(student: Student) -> str:
    names = student.class_names
    rest = f" and {len(names) - _SHOWN_CLASSES} more" if len(names) > _SHOWN_CLASSES else ""
    text = f"## Classes\n\n{', '.join(names[:_SHOWN_CLASSES])}{rest}.\n"
    if student.info.added_classes:
        text += f"\nAdded after distilling: {', '.join(student.info.added_classes)}.\n"
    return text


def _training(student: Student) -> str:
    summary = student.info.summary
    config = summary.get("config") or {}
    rows = {
        "teacher": _public(student.info.teacher),
        "unlabelled pictures learned from": summary.get("num_images"),
        "pictures kept aside": summary.get("num_holdout"),
        "steps": summary.get("steps"),
        **{shown: config.get(key) for key, shown in _SETTINGS.items()},
    }
    return "## Data and training\n\n" + _table(("", "value"), rows)


def _numbers(student: Student, results: Mapping[str, Evaluation]) -> str:
    summary, found = student.info.summary, student.info.calibration
    rows: dict[str, Any] = {
        f"{name}: {key} (%)": value
        for name, evaluation in results.items()
        for key, value in asdict(evaluation).items()
        if key != "per_class"
    }
    aside = "pictures kept aside: agreement with the teacher (%)"
    rows |= {
        f"{aside}, before": (summary.get("before") or {}).get("agreement"),
        f"{aside}, after": (summary.get("after") or {}).get("agreement"),
    }
    if found is not None:
        by = f"calibration error (%) on {found.num_images} pictures, by {found.targets}"
        rows |= {f"{by}, T = 1": found.before.error, by: found.after.error}
        rows["temperature of the probabilities"] = found.temperature
    return "## Numbers\n\n" + _table(("measured on", "value"), rows)


def _fingerprints(student: Student) -> str:
    rows = {
        "student": student.fingerprint(),
        "teacher": student.info.teacher_fingerprint,
        "image tower": student.clip.image_hash,
        "text tower": student.text_side.text_hash if student.text_side else None,
    }
    return "## Fingerprints\n\n" + _table(("", "digest"), rows)


def _table(heads: tuple[str, str], rows: Mapping[str, Any]) -> str:
    """A Markdown table of the rows that have a value."""
    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|"]
    for name, value in rows.items():
        if value not in (None, ""):
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"| {name.replace('num_images (%)', 'pictures')} | {shown} |")
    return "\n".join(lines) + "\n"
