"""Peak memory of a step, by batch size (stage 2's student) and by chunk size (stage 1's text side).

    python benches/bench_memory.py [--classes 1000] [--batches 1 8 32] [--precisions bf16]

Every figure is the peak of a fresh process' resident memory above what it held before the step,
weights packed already. The student's is compared with what `promptkd doctor` predicts: the bytes
of one picture's graph times the batch.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_step import our_clip
from common import Row, report, status_bytes
from official_step import name_classes
from promptkd.prompts import DeepPrompts
from promptkd.stages.encoder import Encoder, graph_bytes
from promptkd.stages.run import TrainConfig
from promptkd.stages.teach import PromptSRC, TeachConfig
from promptkd.text_tower import TextTower

STAGE_1_GB = 3.0
"""What stage 1's activations may take: 1000 classes, batch 4, half precision."""
CHUNKS_MB = (128, 256, 512, 1024, 2048)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro_batch 4": {"micro_batch": 4},
    "recompute": {"recompute": True},
}


def peak_bytes(step: Callable[[], Any]) -> int:
    """How far resident memory rises above where it is now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget earlier peaks
    before = status_bytes("VmRSS")
    step()
    return status_bytes("VmHWM") - before


def student_step(task: dict[str, Any]) -> dict[str, int]:
    """Forward and backward pass of a prompted tower over a batch."""
    tower = our_clip(task["model"], task["precision"]).vision
    encode = Encoder(tower, TrainConfig(precision=task["precision"], **task["way"]))
    prompts = DeepPrompts.random(4, tower.width, 9, torch.Generator().manual_seed(1))

    def step(batch: int) -> None:
        encode(torch.zeros(batch, 3, 224, 224), prompts()).square().sum().backward()

    one = torch.zeros(2, 3, 224, 224)
    weights = [*tower.buffers(), *tower.parameters(), *prompts.parameters()]
    graph = graph_bytes(lambda: encode(one, prompts()), [one, *weights])
    step(2)
    return {
        "peak": peak_bytes(lambda: step(task["batch"])),
        "predicted": graph * task["batch"] // 2,
    }


def teach_step(task: dict[str, Any]) -> dict[str, int]:
    """A step of stage 1."""
    TextTower.graph_bytes = task["chunk"]
    config = TeachConfig(precision=task["precision"], templates=("a photo of a {}.",))
    clip = our_clip(task["model"], task["precision"])
    model = PromptSRC(clip, name_classes(task["classes"]), config)

    def step(batch: int) -> None:
        pixels, labels = torch.zeros(batch, 3, 224, 224), torch.arange(batch)
        model.losses(pixels, labels)["loss"].backward()

    step(1)
    return {"peak": peak_bytes(lambda: step(task["batch"]))}


def in_child(task: dict[str, Any], threads: int | None) -> dict[str, int]:
    """Run a task in a fresh process that gives freed memory back at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--task", json.dumps({**task, "threads": threads})]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def student_rows(args: argparse.Namespace) -> list[Row]:
    """The plain way against the prediction, the others against the plain way."""
    rows = []
    for precision in args.precisions:
        for batch in args.batches:
            plain = 0.0
            for name, way in WAYS.items():
                task = {"kind": "student", "model": args.student, "precision": precision}
                found = in_child({**task, "way": way, "batch": batch}, args.threads)
                peak = found["peak"] / 1e9
                plain = plain or peak
                against = "plain" if way else "predicted"
                label = f"{args.student}, {precision}, batch {batch}, {name} (against {against})"
                rows.append(Row(label, peak, plain if way else found["predicted"] / 1e9, "GB"))
                print(label, found, flush=True)
    return rows


def teach_rows(args: argparse.Namespace) -> list[Row]:
    rows = []
    for chunk in args.chunks:
        task = {"kind": "teach", "model": args.teacher, "precision": "bf16"}
        task |= {"classes": args.classes, "batch": args.batch, "chunk": chunk * 2**20}
        found = in_child(task, args.threads)
        label = (
            f"stage 1 {args.teacher}, {args.classes} classes, batch {args.batch}, chunk {chunk} MiB"
        )
        is_meant = chunk * 2**20 == TextTower.graph_bytes  # the default is what must fit
        target = 1.0 if is_meant else None
        rows.append(Row(label, found["peak"] / 1e9, STAGE_1_GB, "GB", target))
        print(label, found, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="ViT-B-16")
    parser.add_argument("--teacher", default="ViT-L-14")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--chunks", type=int, nargs="*", default=list(CHUNKS_MB), help="MiB")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4, help="of stage 1")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task is None:
        print(report("memory", [*student_rows(args), *teach_rows(args)], output=args.output))
        return
    task = json.loads(args.task)
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    print(json.dumps((student_step if task["kind"] == "student" else teach_step)(task)))


if __name__ == "__main__":
    main()
