"""How many views of a picture a student needs: K of a cache, against fresh ones for ever.

    python benches/study_views.py                                # the default recipe, three seeds
    python benches/study_views.py --steps 300 --views 1 8 0      # shorter; 0 is fresh views

Distils the demo's students from one tuned teacher: for each seed from a cache that grows from one
K to the next, and with the teacher in every step. Prints harmonic mean of base and novel on the
demo's test part, KL to the teacher on the pictures kept aside, and the seconds that the teacher's
answers and the training took.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import promptkd
import torch
from common import machine
from promptkd.cache import build_cache, extend_cache
from promptkd.data.sources import labelled, read_split
from promptkd.demo import DATA
from promptkd.evaluate import score
from promptkd.files import write_json
from promptkd.stages.progress import Progress
from promptkd.student import Student
from promptkd.teacher import Teacher
from study_recipe import tuned_teacher

FRESH = 0
IMAGES, SPLIT = DATA / "images", read_split(DATA / "split.json")
NAMES = sorted({*SPLIT.base, *SPLIT.novel})


def harmonic_mean(student: Student) -> float:
    """Of the accuracies on base and on novel classes of the test part, in percent."""
    test = labelled(IMAGES, NAMES, part="test")
    assert test.labels is not None
    logits, labels = student.logits(list(test.paths)), torch.from_numpy(test.labels)
    return score(logits, labels, student.class_names, SPLIT.base, SPLIT.novel).harmonic_mean


def grow(teacher: Teacher, cache: Path, views: int, config: promptkd.DistillConfig) -> None:
    """Bring a cache to this many views."""
    if cache.exists():
        extend_cache(teacher, IMAGES, cache, views=views)
    else:
        crop = config.crop_scale
        build_cache(teacher, IMAGES, cache, views=views, seed=config.seed, crop_scale=crop)


def study(
    teacher: Teacher, seed: int, views: Sequence[int], steps: int | None, work: Path
) -> list[dict[str, Any]]:
    """A row for each number of views, the smallest first: each goes on from the last one's cache."""
    lengths = {} if steps is None else {"max_steps": steps, "min_steps": steps}
    rows, teacher_seconds = [], 0.0
    shutil.rmtree(work / f"seed-{seed}", ignore_errors=True)
    for number in sorted(views, key=lambda k: (k == FRESH, k)):
        config = promptkd.DistillConfig(seed=seed, views=number, **lengths)
        cache = None if number == FRESH else work / f"seed-{seed}"
        begun = time.perf_counter()
        if cache is not None:
            grow(teacher, cache, number, config)
            teacher_seconds += time.perf_counter() - begun
        begun = time.perf_counter()
        student = promptkd.distill(
            IMAGES,
            teacher=teacher,
            student=f"local-dir:{DATA / 'student'}",
            cache=cache,
            config=config,
            progress=Progress(quiet=True),
        )
        row = {
            "views": number or "fresh",
            "seed": seed,
            "teacher_seconds": 0.0 if number == FRESH else teacher_seconds,
            "training_seconds": time.perf_counter() - begun,
            "harmonic_mean": harmonic_mean(student),
            "kl_aside": student.info.summary["after"]["holdout_kl"],
        }
        rows.append(row)
        print(
            " | ".join(f"{k} {v if k == 'views' else f'{v:.3g}'}" for k, v in row.items()),
            flush=True,
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, in Markdown."""
    lines = [
        "| views | HM (mean ± deviation) | KL aside | teacher's answers s | training s | both s |",
        "|---|---|---|---|---|---|",
    ]
    for number in dict.fromkeys(row["views"] for row in rows):
        mine = [row for row in rows if row["views"] == number]
        means = {key: statistics.fmean(r[key] for r in mine) for key in mine[0] if key != "views"}
        found = [row["harmonic_mean"] for row in mine]
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        ahead, training = means["teacher_seconds"], means["training_seconds"]
        lines.append(
            f"| {number} | {means['harmonic_mean']:.1f} ± {deviation:.1f} | {means['kl_aside']:.3f} "
            f"| {'in every step' if number == 'fresh' else f'{ahead:.0f}'} | {training:.0f} "
            f"| {ahead + training:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run every number of views for every seed; print rows as they come, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--views", nargs="+", type=int, default=[1, 2, 4, 8, FRESH])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: those of the recipe")
    parser.add_argument("--work", type=Path, default=Path("runs/study-views"))
    arguments = parser.parse_args()
    teacher = tuned_teacher(0, NAMES, arguments.work)
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        rows += study(teacher, seed, arguments.views, arguments.steps, arguments.work)
        write_json(
            Path(__file__).parent / "results" / "views.json",
            {"machine": machine(), "steps": arguments.steps, "rows": rows},
        )
    print(table(rows))


if __name__ == "__main__":
    main()
