"""A distillation step against the official code's, ViT-L/14 → ViT-B/16 with random weights.

    python benches/bench_step.py --official PATH [--classes 100 500 1000] [--rounds 3]

PATH is a folder or git directory of the public PromptKD code; without it, the same work runs
through open_clip's own towers. All sides are called in turn in one run. `pytest
benches/bench_step.py --benchmark-only` measures our parts alone.
"""

import argparse
import functools
import gc
import itertools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from bench_cache import write_answers
from common import CLOCKS, Row, interleave, report, typical
from decode_corpus import corpus
from official_step import LibraryStep, OfficialStep, TimedStep, name_classes
from promptkd.cache import FeatureCache
from promptkd.class_vectors import prompted_class_vectors
from promptkd.clip import Clip, load_clip
from promptkd.data.decode import decode_views
from promptkd.data.loader import squashed
from promptkd.loss import TeacherStatistics, kd_loss, teacher_statistics
from promptkd.prompts import DeepPrompts
from promptkd.stages.distill import Batch, DistillConfig, DistillStep, new_student
from promptkd.teacher import PROMPT_TEMPLATE, Teacher, TeacherInfo
from torch import Tensor, nn
from torch.nn import functional as F

PRECISIONS = ("fp32", "bf16")
# Whole step of the official code over ours, by classes; an AVX-512 AMD processor is meant.
TARGETS = {
    ("online", "fp32"): {100: 3.0, 500: 11.0, 1000: 20.0},
    ("online", "bf16"): {100: 5.5, 500: 20.0, 1000: 36.0},
    ("teacher cached", "fp32"): {100: 9.5, 500: 34.0, 1000: 62.0},
    ("teacher cached", "bf16"): {100: 15.0, 500: 56.0, 1000: 100.0},
}
AROUND = 0.05
"""Share of the student's bare forward and backward pass that all the rest may take."""
PHOTOGRAPHS, CACHED_ROWS = 64, 4096
PREDICT_TARGETS = {"fp32": 1.75, "bf16": 3.3}


@functools.cache
def make_model(architecture: str) -> Any:
    """An open_clip model with random weights and OpenAI's activation."""
    torch.manual_seed(0)
    config = {**open_clip.get_model_config(architecture), "quick_gelu": True}
    model = open_clip.CLIP(**config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("conv1.weight"):
            nn.init.normal_(parameter, std=0.02)
    return model


@functools.cache
def our_clip(architecture: str, precision: str) -> Clip:
    """The same weights in our own towers."""
    is_teacher = architecture == "ViT-L-14"
    return load_clip(make_model(architecture), precision=precision, text=is_teacher)


class OurStep:
    """Our step with the class vectors computed once; online, or on cached teacher features."""

    def __init__(self, names: list[str], precision: str, start: Any = None) -> None:
        guide, pupil = (our_clip(a, precision) for a in ("ViT-L-14", "ViT-B-16"))
        generator = torch.Generator().manual_seed(1)
        given = start.prompts() if start is not None else {}

        def prompts(key: str, width: int) -> DeepPrompts:
            return DeepPrompts(given[key]) if given else DeepPrompts.random(4, width, 9, generator)

        text = prompts("teacher text", guide.need_text("encode classes").width)
        begin = TimedStep.clock()
        vectors = prompted_class_vectors(guide, names, PROMPT_TEMPLATE, text)
        self.text_seconds = TimedStep.clock() - begin
        info = TeacherInfo("promptsrc", PROMPT_TEMPLATE, (), tuple(names), {})
        vision = prompts("teacher vision", guide.vision.width)
        self.teacher = Teacher(guide, info, vectors, vision, text)
        config = DistillConfig(
            kd_weight=1000 / len(names), optimizer="sgd", lr=0.005, precision=precision
        )
        self.student = new_student(pupil, self.teacher, config).train()
        if start is not None:
            self._copy(start)
        self.step = DistillStep(self.student, self.teacher.logit_scale, config)
        self.optimizer = config.make_optimizer(self.student.trainable_parameters())

    @torch.no_grad()
    def _copy(self, start: Any) -> None:
        for mine, other in zip(self.student.prompts(), start.prompts()["student"], strict=True):
            mine.copy_(other)
        projector, theirs = self.student.projector, start.projector()
        for linear, conv in ((projector.linear1, theirs[0]), (projector.linear2, theirs[3])):
            linear.weight.copy_(conv.weight.flatten(1))
            linear.bias.copy_(conv.bias)

    def teach(self, pixels: Tensor) -> Tensor:
        return self.teacher.encode_image(pixels)

    def statistics(self, features: Tensor) -> TeacherStatistics:
        """What a cache of statistics keeps of these features."""
        return teacher_statistics(
            features,
            self.step.class_vectors,
            teacher_scale=self.teacher.logit_scale,
            temperature=self.step.config.temperature,
        )

    def learn(self, pixels: Tensor, answers: Tensor | TeacherStatistics) -> float:
        loss = self.step(Batch(pixels, answers))["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def bare(self, pixels: Tensor) -> None:
        """The student's tower alone, forward and backward."""
        self.student.vision(pixels, self.student.prompts()).float().square().sum().backward()
        self.optimizer.zero_grad(set_to_none=True)


class Around:
    """What a step on a cache does beside the student's tower: reading, decoding, the loss."""

    def __init__(self, side: OurStep, features: Tensor, folder: Path) -> None:
        self._side, self._files = side, corpus(None, PHOTOGRAPHS)["500x375"]
        self._batch, width = features.shape
        rows = features.repeat(CACHED_ROWS // self._batch, 1)
        found = side.statistics(rows)
        write_answers(folder / "features", "features", {"features": rows.half().numpy()})
        parts = {"mu": found.mu.numpy(), "h": found.h.numpy()}
        write_answers(folder / "statistics", "statistics", parts)
        self._caches = {c: FeatureCache.open(folder / c) for c in ("features", "statistics")}
        self._answers = {c: self.read(c) for c in self._caches}
        self._student = torch.randn(self._batch, width, requires_grad=True)

    def read(self, content: str) -> Any:
        rows = np.random.default_rng().integers(0, CACHED_ROWS, self._batch)
        return self._caches[content].answers(0, rows, torch.float32)

    def decode(self) -> None:
        first = int(np.random.default_rng().integers(PHOTOGRAPHS - self._batch + 1))
        files = self._files[first : first + self._batch]
        keys = np.arange(first, first + len(files), dtype=np.uint64)
        views = np.zeros(len(files), dtype=np.uint32)
        target = squashed(self._side.student.clip.preprocess)
        [pixels], _ = decode_views(files, [target], seed=0, keys=keys, views=views)
        self._side.student.clip.preprocess.normalize(torch.from_numpy(pixels), torch.float32)

    def loss(self, content: str) -> None:
        teacher = self._answers[content]
        scale = self._side.teacher.logit_scale
        kd_loss(
            self._student,
            teacher,
            self._side.step.class_vectors,
            student_scale=scale,
            teacher_scale=scale if isinstance(teacher, Tensor) else None,
        ).backward()

    def seconds(self, clock: Callable[[], float], rounds: int = 30) -> dict[str, float]:
        """Of each part, by name."""
        functions: dict[str, Callable[[], Any]] = {"decoding": self.decode}
        for content in self._caches:
            functions[f"reading {content}"] = functools.partial(self.read, content)
            functions[f"loss of {content}"] = functools.partial(self.loss, content)
        return {k: typical(v) for k, v in interleave(functions, rounds, clock=clock).items()}


def measure_step(args: argparse.Namespace, num_classes: int) -> tuple[list[Row], dict[str, Any]]:
    """Rows of whole steps at a number of classes, and the seconds of all parts.

    The targets are for batches of 8.
    """
    names, rows = name_classes(num_classes), []
    teacher, student = make_model("ViT-L-14"), make_model("ViT-B-16")
    baseline: TimedStep = (
        OfficialStep(args.official, teacher, student, names, args.text_rows)
        if args.official
        else LibraryStep(teacher, student, names)
    )
    sides = {p: OurStep(names, p, baseline) for p in args.precisions}
    gc.collect()
    pixels = torch.randn(args.batch, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    known = {p: side.teach(pixels) for p, side in sides.items()}
    statistics = {p: side.statistics(known[p]) for p, side in sides.items()}
    rounds = args.rounds if num_classes <= 100 else 1
    first = {p: side.learn(pixels, known[p]) for p, side in sides.items()}  # warms up as well
    theirs = baseline(pixels) if rounds > 1 else None
    functions: dict[str, Callable[[], Any]] = {"official": lambda: baseline(pixels)}
    for p, side in sides.items():
        functions[f"{p} teacher image"] = lambda side=side: side.teach(pixels)
        functions[f"{p} student"] = lambda side=side, p=p: side.learn(pixels, known[p])
        functions[f"{p} student, statistics"] = lambda side=side, p=p: side.learn(
            pixels, statistics[p]
        )
        functions[f"{p} bare student"] = lambda side=side: side.bare(pixels)
    baseline.seconds.clear()
    taken = {
        k: typical(v)
        for k, v in interleave(functions, rounds, warm_up=False, clock=CLOCKS[args.clock]).items()
    }
    parts = {part: typical(values) for part, values in baseline.seconds.items()}
    parts["student"] = parts["whole"] - parts["teacher image"] - parts["teacher text"]
    for p, side in sides.items():
        taken[f"{p} class vectors, once"] = side.text_seconds
        cached, online = taken[f"{p} student"], taken[f"{p} student"] + taken[f"{p} teacher image"]
        modes = {"online": online, "teacher cached": cached}
        modes["statistics cached"] = taken[f"{p} student, statistics"]
        for mode, seconds in modes.items():
            target = TARGETS.get((mode, p), {}).get(num_classes) if args.batch == 8 else None
            name = f"step, {num_classes} classes, batch {args.batch}, {mode}, {p}"
            rows.append(Row(name, seconds, taken["official"], "s", target))
        rows += rest_of_step(args, num_classes, p, side, known[p], taken)
    details = {"classes": num_classes, "official": parts, "ours": taken}
    return rows, {**details, "first loss": {"official": theirs, **first}}


def rest_of_step(
    args: argparse.Namespace,
    num_classes: int,
    precision: str,
    side: OurStep,
    features: Tensor,
    taken: dict[str, float],
) -> list[Row]:
    """Reading, decoding and loss against the share of the student's bare pass they may take."""
    bare, rows = taken[f"{precision} bare student"], []
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        found = Around(side, features, Path(folder)).seconds(CLOCKS[args.clock])
    taken |= {f"{precision} {part}": seconds for part, seconds in found.items()}
    for content in ("features", "statistics"):
        rest = found["decoding"] + found[f"reading {content}"] + found[f"loss of {content}"]
        name = f"reading {content} + decoding + loss, {num_classes} classes, {precision}"
        print(f"{name}: {rest / bare:.1%} of the student's bare forward and backward pass")
        target = 1.0 if args.batch == 8 else None
        rows.append(Row(f"{name} ({AROUND:.0%} of bare student)", rest, AROUND * bare, "s", target))
    return rows


def measure_predict(args: argparse.Namespace) -> list[Row]:
    """Images/s of the student's encode_image against open_clip's own, in float32."""
    student = make_model("ViT-B-16")
    sides = {p: OurStep(["a cat", "a dog"], p) for p in args.precisions}
    rows = []
    for batch in (1, 32):
        pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(2))

        def library(pixels: Tensor = pixels) -> None:
            with torch.inference_mode():
                F.normalize(student.visual(pixels), dim=-1)

        functions: dict[str, Callable[[], Any]] = {"open_clip": library}
        for p, side in sides.items():
            functions[p] = lambda side=side, pixels=pixels: side.student.encode_image(pixels)
        rounds = args.rounds * (10 if batch == 1 else 1)
        taken = {
            k: typical(v)
            for k, v in interleave(functions, rounds, clock=CLOCKS[args.clock]).items()
        }
        for p in sides:
            name = f"encode_image, batch {batch}, {p} (open_clip fp32)"
            speed, theirs = batch / taken[p], batch / taken["open_clip"]
            rows.append(Row(name, speed, theirs, "images/s", PREDICT_TARGETS[p]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, help="folder or git directory of the public code")
    parser.add_argument("--classes", type=int, nargs="*", default=[100, 500, 1000])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--text-rows",
        type=int,
        default=250,
        help="classes that the official text side sees at once",
    )
    parser.add_argument("--rounds", type=int, default=3, help="at up to 100 classes; above, one")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for one thread on a busy machine"
    )
    parser.add_argument("--no-predict", action="store_true")
    parser.add_argument(
        "--output", type=Path, help="default: results/step.json or step_bBATCH.json"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    TimedStep.clock = staticmethod(CLOCKS[args.clock])
    if args.threads:
        torch.set_num_threads(args.threads)
    kind = "official code" if args.official else "open_clip's towers"
    rows: list[Row] = []
    details: list[dict[str, Any]] = []
    for number in args.classes:
        found, detail = measure_step(args, number)
        rows += found
        details.append(detail)
        for side in ("official", "ours", "first loss"):
            print(number, side, {k: v and round(v, 3) for k, v in detail[side].items()}, flush=True)
        if number == args.classes[0] and not args.no_predict:
            rows += measure_predict(args)
        # Written as it goes: many classes take long.
        more = {"baseline": kind, "batch": args.batch, "clock": args.clock, "parts": details}
        bench = "step" if args.batch == 8 else f"step_b{args.batch}"
        print(report(bench, rows, output=args.output, **more), flush=True)


@pytest.mark.parametrize(("part", "precision"), itertools.product(("teach", "bare"), PRECISIONS))
def test_part(benchmark: Any, part: str, precision: str) -> None:
    """Our teacher's forward pass, and our student's forward and backward."""
    side = OurStep(["a cat", "a dog"], precision)
    pixels = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    benchmark.group = part
    benchmark.pedantic(getattr(side, part), args=(pixels,), rounds=2, warmup_rounds=1)


if __name__ == "__main__":
    main()
