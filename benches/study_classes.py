"""What it costs to add a class after distilling: novel classes left out, then added by name.

    python benches/study_classes.py                       # seed 0, 5 classes, the default recipe
    python benches/study_classes.py --steps 1000 --leave-out 5 10

Per setting and seed two students of one tuned teacher: one distilled with all 40 names, one with
k novel names left out of the list (their pictures stay, unlabelled as all are) and added with
`with_classes` afterwards. Accuracy on the demo's test part: over all classes, on the pictures of
the left-out classes and on those of the others, all 40 names to choose from.
"""

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import promptkd
import torch
from common import machine
from promptkd.convert import with_class_names
from promptkd.data.sources import ImageList, labelled, read_split
from promptkd.demo import DATA, demo_teach_config
from promptkd.files import write_json
from promptkd.stages.progress import Progress
from promptkd.student import Student
from promptkd.teacher import Teacher

ROWS = ("distilled with all", "added afterwards")
PARTS = ("all", "left out", "others")


def tuned_teacher(seed: int, names: list[str], work: Path) -> Teacher:
    """The demo's teacher of a seed with its text tower, tuned on first use."""
    folder = work / f"teacher-{seed}"
    promptkd.teach(
        DATA / "images",
        names,
        model=f"local-dir:{DATA / 'teacher'}",
        output=folder,
        resume=True,
        config=demo_teach_config(seed),
        progress=Progress(quiet=True),
    )
    return Teacher.load(folder, text=True)


def accuracies(student: Student, test: ImageList, left_out: set[str]) -> dict[str, float]:
    """Top-1 in percent among all names, on all pictures and on two parts of them."""
    assert test.labels is not None
    labels = torch.from_numpy(test.labels)
    hits = student.logits(list(test.paths)).argmax(dim=-1) == labels
    late = torch.tensor([name in left_out for name in student.class_names])[labels]
    masks = (torch.ones_like(late), late, ~late)
    return {
        part: 100 * float(hits[mask].double().mean())
        for part, mask in zip(PARTS, masks, strict=True)
    }


def run(seed: int, num_left_out: int, steps: int | None, work: Path) -> dict[str, Any]:
    """Distil twice and measure both."""
    split = read_split(DATA / "split.json")
    names = sorted({*split.base, *split.novel})
    left_out = set(random.Random(seed).sample(sorted(split.novel), num_left_out))
    test = labelled(DATA / "images", names, part="test")
    teacher = tuned_teacher(seed, names, work)
    lengths = {} if steps is None else {"max_steps": steps, "min_steps": steps}
    config = promptkd.DistillConfig(seed=seed, **lengths)
    found = {}
    for row, known in zip(ROWS, (names, [n for n in names if n not in left_out]), strict=True):
        student = promptkd.distill(
            DATA / "images",
            teacher=with_class_names(teacher, known),
            student=f"local-dir:{DATA / 'student'}",
            config=config,
            progress=Progress(quiet=True),
        )
        found[row] = accuracies(student.with_classes(names), test, left_out)
    return {"seed": seed, "left_out": sorted(left_out), "steps": steps, "accuracy": found}


def main() -> None:
    """Run every number of classes for every seed and print a row for each student."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--leave-out", nargs="+", type=int, default=[5], help="novel classes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="default: those of the recipe")
    parser.add_argument("--work", type=Path, default=Path("runs/study-classes"))
    arguments = parser.parse_args()
    rows = []
    for number in arguments.leave_out:
        for seed in arguments.seeds:
            row = run(seed, number, arguments.steps, arguments.work)
            rows.append(row)
            for name, found in row["accuracy"].items():
                shown = " ".join(f"{part} {value:.1f}" for part, value in found.items())
                print(f"{number} left out | seed {seed} | {name} | {shown}", flush=True)
        mine = [r["accuracy"] for r in rows if len(r["left_out"]) == number]
        lost = statistics.fmean(a[ROWS[0]]["left out"] - a[ROWS[1]]["left out"] for a in mine)
        print(
            f"{number} left out: adding them costs them {lost:.1f} points of accuracy", flush=True
        )
    write_json(
        Path(__file__).parent / "results" / "classes.json", {"machine": machine(), "rows": rows}
    )


if __name__ == "__main__":
    main()
