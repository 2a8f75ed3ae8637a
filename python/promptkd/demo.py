"""The demo: both stages on small real drawings, from a teacher and a student that come along.

40 classes of emoji in a drawing style that neither model has seen; 20 are base (a few labels),
20 novel (none). See `demo_data/` for the pictures, the models and their licences.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from promptkd.clip import load_clip
from promptkd.data.sources import ImageList, Split, labelled, read_split
from promptkd.errors import PromptKDError
from promptkd.evaluate import Evaluation, score
from promptkd.files import write_json
from promptkd.stages.distill import DistillConfig, distill
from promptkd.stages.holdout import whole_batches
from promptkd.stages.progress import Progress
from promptkd.stages.teach import TeachConfig, teach
from promptkd.student import Prediction, Student
from promptkd.teacher import Teacher, zero_shot_teacher

DATA = Path(__file__).parent / "demo_data"
TEMPLATES = ("a photo of a {}.",)
ROWS = ("student, zero-shot", "teacher, zero-shot", "teacher, tuned", "student, distilled")
COLUMNS = ("base", "novel", "harmonic_mean", "top1")
HEADS = ("base", "novel", "HM", "all")
_SHOWN = 12


def demo_teach_config(seed: int) -> TeachConfig:
    """Stage 1 for models as small as the demo's: fewer epochs, larger batches."""
    return TeachConfig(
        epochs=10,
        batch_size=32,
        lr=0.002,
        crop_scale=(0.6, 1.0),
        templates=TEMPLATES,
        gpa_mean=8.0,
        gpa_std=2.0,
        seed=seed,
    )


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Accuracies of every row, one `Evaluation` a seed (zero-shot rows don't depend on it)."""

    rows: dict[str, list[Evaluation]]
    examples: list[tuple[Prediction, str]]
    """Some test pictures' predictions and true classes, for the picture."""

    def mean(self, row: str, column: str) -> tuple[float, float]:
        """Mean and sample standard deviation over seeds (0 for one seed)."""
        values = [float(getattr(e, column)) for e in self.rows[row]]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def table(self) -> Table:
        """For a terminal."""
        seeds = len(self.rows[ROWS[-1]])
        title = f"accuracy % on held-out pictures ({seeds} seed{'s' if seeds > 1 else ''})"
        table = Table("", *HEADS, title=title)
        for row in ROWS:
            table.add_row(row, *self.cells(row), style="bold" if row == ROWS[-1] else None)
        return table

    def cells(self, row: str) -> list[str]:
        """A row's cells as text."""
        shown = []
        for column in COLUMNS:
            mean, deviation = self.mean(row, column)
            shown.append(
                f"{mean:.1f} ± {deviation:.1f}" if len(self.rows[row]) > 1 else f"{mean:.1f}"
            )
        return shown

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data: every seed's evaluation."""
        return {row: [asdict(e) for e in found] for row, found in self.rows.items()}


def run_demo(seeds: int, output: Path, progress: Progress) -> DemoResult:
    """Run both stages for seeds 0, 1, …, evaluate on the test part, write table and picture.

    Args:
        seeds: how often.
        output: folder for results.json, demo.png and the first seed's student.
        progress: where to report.

    Raises:
        PromptKDError: fewer than one seed.
    """
    if seeds < 1:
        raise PromptKDError("--seeds must be at least 1")
    split = read_split(DATA / "split.json")
    names = sorted({*split.base, *split.novel})
    test = labelled(DATA / "images", names, part="test")
    rows: dict[str, list[Evaluation]] = {row: [] for row in ROWS}
    for row, which in zip(ROWS, ("student", "teacher"), strict=False):
        clip = load_clip(f"local-dir:{DATA / which}")
        rows[row].append(_score(zero_shot_teacher(clip, names, TEMPLATES), test, split))
    examples: list[tuple[Prediction, str]] = []
    for seed in range(seeds):
        progress.say(f"demo: seed {seed}")
        teacher, student = _one_seed(names, seed, progress)
        rows[ROWS[2]].append(_score(teacher, test, split))
        rows[ROWS[3]].append(_score(student, test, split))
        if seed == 0:
            output.mkdir(parents=True, exist_ok=True)
            student.save(output / "student", include_backbone=True)
            examples = _examples(student, test)
    result = DemoResult(rows, examples)
    write_json(output / "results.json", result.as_dict())
    _draw(result, output / "demo.png", progress)
    return result


def _one_seed(names: Sequence[str], seed: int, progress: Progress) -> tuple[Teacher, Student]:
    images = DATA / "images"
    model, small = f"local-dir:{DATA / 'teacher'}", f"local-dir:{DATA / 'student'}"
    teacher = teach(images, names, model=model, config=demo_teach_config(seed), progress=progress)
    config = DistillConfig(seed=seed)
    return teacher, distill(
        images, teacher=teacher, student=small, config=config, progress=progress
    )


@torch.no_grad()
def _score(model: Teacher | Student, test: ImageList, split: Split) -> Evaluation:
    assert test.labels is not None
    preprocess = model.clip.preprocess
    compute = model.logits if isinstance(model, Teacher) else model.forward
    logits = torch.cat([compute(p) for p, _ in whole_batches(test, preprocess, model, True)])
    return score(
        logits.cpu(), torch.from_numpy(test.labels), model.class_names, split.base, split.novel
    )


def _examples(student: Student, test: ImageList) -> list[tuple[Prediction, str]]:
    assert test.labels is not None
    assert test.class_names is not None
    rows = range(0, len(test), max(1, len(test) // _SHOWN))[:_SHOWN]
    found = student.iter_predict([test.paths[r] for r in rows], top_k=3)
    return [(p, test.class_names[test.labels[r]]) for p, r in zip(found, rows, strict=True)]


def _draw(result: DemoResult, path: Path, progress: Progress) -> None:
    """Bars of the four rows above some test pictures with what the student says."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        progress.say("no picture drawn: matplotlib is missing (pip install 'promptkd[plots]')")
        return
    from PIL import Image

    figure = plt.figure(figsize=(11, 8.4), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    top, bottom = halves
    axes = top.subplots()
    for place, (row, colour) in enumerate(
        zip(ROWS, ("#b8c4d6", "#7d93b8", "#3f5f95", "#d9742b"), strict=True)
    ):
        for column, name in enumerate(COLUMNS):
            mean, deviation = result.mean(row, name)
            x = column + (place - 1.5) * 0.2
            axes.bar(
                x,
                mean,
                0.18,
                yerr=deviation or None,
                color=colour,
                label=row if column == 0 else None,
            )
            axes.text(x, mean + deviation + 1, f"{mean:.1f}", ha="center", fontsize=9)
    axes.set_xticks(range(len(HEADS)), HEADS)
    axes.set_ylabel("accuracy on held-out pictures (%)")
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="upper center")
    for axis, (prediction, truth) in zip(
        bottom.subplots(2, _SHOWN // 2).flat, result.examples, strict=False
    ):
        assert prediction.path is not None
        axis.imshow(Image.open(prediction.path).convert("RGB"))
        right = prediction.labels[0].replace("_", " ") == truth.replace("_", " ")
        axis.set_title(
            f"{prediction.labels[0]} {100 * prediction.probabilities[0]:.0f} %"
            + ("" if right else f"\n(is: {truth})"),
            fontsize=9,
            color="#2a7d3f" if right else "#b3261e",
        )
        axis.axis("off")
    bottom.suptitle("what the distilled student says", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    progress.say(f"picture: {path}")
