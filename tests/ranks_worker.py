"""Both stages in one process of a torchrun job, or alone; run by test_ranks.py.

Arguments: models of teacher and student, pictures, labelled pictures to evaluate on, output folder,
JSON of settings: "teach" and
"distill" (changes of the configs), "kill" (the step of stage 2 at which rank 1 dies, once),
"cache" (a folder).
"""

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import promptkd
import torch
from promptkd import DistillConfig, Student, TeachConfig
from promptkd.stages import run
from promptkd.stages.distill import Batch, DistillStep
from promptkd.stages.progress import Progress
from tiny import CLASSES

TEMPLATES = ("a photo of a {}.", "a {}.")
TEACH = {
    "epochs": 2,
    "batch_size": 7,
    "shots": 7,
    "lr": 0.02,
    "templates": TEMPLATES,
    "precision": "fp64",
}
DISTILL = {
    "epochs": 6,
    "min_steps": 0,
    "batch_size": 7,
    "warmup_steps": 2,
    "views": 2,
    "optimizer": "sgd",
    "holdout": 0.15,
    "precision": "fp64",
}


def both_stages(teacher: str, student: str, photos: str, output: Path, **settings: Any) -> Student:
    """A student from a tuned teacher."""
    return promptkd.distill(
        photos,
        CLASSES,
        teacher=teacher,
        student=student,
        labelled=photos,
        cache=settings.get("cache"),
        output=output,
        resume=True,
        config=DistillConfig(**{**DISTILL, **settings.get("distill", {})}),
        teach_config=TeachConfig(**{**TEACH, **settings.get("teach", {})}),
        progress=Progress(),
    )


def die_at(step: int) -> None:
    """Kill rank 1 before this step of stage 2, in the job's first life."""
    call = DistillStep.__call__
    seen: list[int] = []

    def dying(self: DistillStep, batch: Batch) -> dict[str, torch.Tensor]:
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, batch)

    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        DistillStep.__call__ = dying  # type: ignore[method-assign]


def main(
    teacher: str, student: str, photos: str, labelled: str, output: str, settings: str
) -> None:
    torch.set_num_threads(1)
    run._EPOCH_CHECKPOINT_SECONDS = 0.0
    told: Mapping[str, Any] = json.loads(settings)
    if "kill" in told:
        die_at(told["kill"])
    made = both_stages(teacher, student, photos, Path(output), **told)
    found = made.evaluate(labelled, together=True)
    rank = os.environ.get("RANK", "0")
    # In one piece: torchrun's ranks share an unbuffered stream, and print sends the end by itself.
    os.write(1, f"rank {rank}: {found.num_images} {found.top1}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
