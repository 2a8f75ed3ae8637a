"""How DistillConfig's defaults were chosen: settings compared on the demo's `val` part.

    python benches/study_recipe.py                                    # the defaults, seed 0
    python benches/study_recipe.py --seeds 0 1 2 lr=0.003 'lr=0.003 weight_decay=0.1'

Prints a row a setting and seed: harmonic mean and cross-entropy on val, agreement with the teacher
and KL on val and on the pictures kept aside from training. The test part is not touched. Tuned
teachers and their answers on the views are kept in --work, since all settings of a seed share them.
"""

import argparse
import ast
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import promptkd
import torch
from promptkd.data.sources import ImageList, Split, labelled, read_split
from promptkd.demo import DATA, demo_teach_config
from promptkd.evaluate import score
from promptkd.files import write_json
from promptkd.stages.holdout import teacher_log_probs, whole_batches
from promptkd.stages.progress import Progress
from promptkd.teacher import Teacher
from torch import nn


def tuned_teacher(seed: int, names: list[str], work: Path) -> Teacher:
    """The demo's teacher of a seed, tuned on first use."""
    return promptkd.teach(
        DATA / "images",
        names,
        model=f"local-dir:{DATA / 'teacher'}",
        output=work / f"teacher-{seed}",
        resume=True,
        config=demo_teach_config(seed),
        progress=Progress(quiet=True),
    )


def cross_entropy(logits: torch.Tensor, val: ImageList, split: Split) -> float:
    """Of the true names within base and novel, at each half's best scale; mean of the two.

    It follows accuracy within the halves, but every picture counts by degrees: 169 pictures tell
    settings apart where their harmonic means differ by chance.
    """
    assert val.labels is not None
    assert val.class_names is not None
    truth = torch.from_numpy(val.labels)
    scales, found = torch.arange(0.4, 1.5, 0.1), []
    for half in (split.base, split.novel):
        names = torch.tensor([name in half for name in val.class_names])
        rows = names[truth]
        target = (torch.cumsum(names, 0) - 1)[truth[rows]]
        scores = logits[rows][:, names]
        found.append(min(float(nn.functional.cross_entropy(s * scores, target)) for s in scales))
    return sum(found) / 2


def run(
    seed: int, changes: dict[str, Any], val: ImageList, split: Split, work: Path
) -> dict[str, Any]:
    """Distil once and measure on val."""
    assert val.labels is not None
    assert val.class_names is not None
    config = promptkd.DistillConfig(seed=seed, **changes)
    teacher = tuned_teacher(seed, list(val.class_names), work)
    begun = time.monotonic()
    student = promptkd.distill(
        DATA / "images",
        teacher=teacher,
        student=f"local-dir:{DATA / 'student'}",
        cache=work / f"views-{seed}-{config.crop_scale}-{config.views}",
        config=config,
        progress=Progress(quiet=True),
    )
    target, _ = teacher_log_probs(teacher, val, 1.0, orient=True)
    pixels = whole_batches(val, student.clip.preprocess, student, True)
    with torch.no_grad():
        mine = torch.cat([student(p) for p, _ in pixels]).log_softmax(dim=-1)
    found = score(mine, torch.from_numpy(val.labels), val.class_names, split.base, split.novel)
    after = student.info.summary["after"]
    return {
        "settings": changes,
        "seed": seed,
        "val_hm": found.harmonic_mean,
        "val_ce": cross_entropy(mine, val, split),
        "val_agreement": 100 * float((target.argmax(-1) == mine.argmax(-1)).double().mean()),
        "val_kl": float((target.exp() * (target - mine)).sum(-1).mean()),
        **after,
        "seconds": time.monotonic() - begun,
    }


def main() -> None:
    """Run every setting for every seed and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "settings", nargs="*", default=[""], help="'field=value field=value', one a setting"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=Path("runs/study-recipe"))
    arguments = parser.parse_args()
    split = read_split(DATA / "split.json")
    val = labelled(DATA / "images", sorted({*split.base, *split.novel}), part="val")
    rows = []
    for text in arguments.settings:
        pairs = (part.split("=", 1) for part in text.split())
        changes = {name: ast.literal_eval(value) for name, value in pairs}
        for seed in arguments.seeds:
            row = run(seed, changes, val, split, arguments.work)
            rows.append(row)
            numbers = " ".join(f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float))
            print(f"{text or 'defaults'} | seed {seed} | {numbers}", flush=True)
    write_json(
        Path(__file__).parent / "results" / "recipe.json",
        {"defaults": asdict(promptkd.DistillConfig()), "rows": rows},
    )


if __name__ == "__main__":
    main()
