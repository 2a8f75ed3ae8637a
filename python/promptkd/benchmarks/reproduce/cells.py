"""One cell: its teacher, distilling, and everything measured; stored as one result.json."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from promptkd.benchmarks.metrics import Scores, score_lists, score_part
from promptkd.benchmarks.reproduce.plan import CACHE_SEED, Cell, fingerprint
from promptkd.benchmarks.reproduce.teachers import teacher_for, teacher_warning
from promptkd.cache import build_cache
from promptkd.class_names import PublishedNames
from promptkd.clip import hash_tensors, load_clip
from promptkd.data.sources import ImageList
from promptkd.errors import DataError, TrainingError
from promptkd.files import write_json
from promptkd.ranks import pick_device
from promptkd.stages.distill import distill, views_to_cache
from promptkd.stages.holdout import whole_batches
from promptkd.stages.progress import Progress
from promptkd.student import Student
from promptkd.teacher import Teacher, zero_shot_teacher

KEPT_ASIDE = 512


def run_cell(cell: Cell, progress: Progress) -> dict[str, Any]:
    """Run a cell to the end, from where an earlier call stopped, and store its result."""
    title = f"{cell.data.paper.title}, seed {cell.seed}"
    progress.say(f"{title}: {cell.plan.protocol}, into '{cell.folder}'")
    settings = cell.settings()
    cell.folder.mkdir(parents=True, exist_ok=True)
    work = _Work(cell, progress)
    result = {
        "kind": "promptkd cell",
        "fingerprint": fingerprint(settings),
        "dataset": cell.data.paper.key,
        "title": cell.data.paper.title,
        "seed": cell.seed,
        "protocol": cell.plan.protocol,
        "selection": cell.plan.selection,
        "num_classes": len(cell.data.class_names),
        **work.run(),
        "settings": settings,
    }
    write_json(cell.folder / "result.json", result)
    return result


def logits_on(model: Teacher | Student, images: ImageList) -> tuple[Tensor, list[int]]:
    """Logits (n, C) of whole pictures, EXIF orientation ignored, and the n rows that can be read."""
    compute = model.logits if isinstance(model, Teacher) else model.forward
    found, kept = [model.class_vectors.new_zeros(0, len(model.class_vectors)).cpu()], []
    with torch.no_grad():
        for pixels, rows in whole_batches(images, model.clip.preprocess, model, orient=False):
            found.append(compute(pixels).cpu())
            kept += rows
    return torch.cat(found), kept


def compare(teacher: Tensor, student: Tensor) -> dict[str, float]:
    """Top-1 agreement in percent and mean KL(teacher || student) of logits (N, C)."""
    wanted, mine = teacher.double().log_softmax(dim=-1), student.double().log_softmax(dim=-1)
    kl = F.kl_div(mine, wanted, reduction="batchmean", log_target=True)
    same = wanted.argmax(dim=-1) == mine.argmax(dim=-1)
    return {"agreement": 100 * float(same.double().mean()), "kl": float(kl)}


def collapse_reasons(kept_aside: dict[str, float], scores: Scores, zero_shot: Scores) -> list[str]:
    """Why a student counts as collapsed; empty if it doesn't.

    Args:
        kept_aside: `agreement` and `kl` of the student, `zero_shot_agreement` of its CLIP before
            distilling, and `uniform_kl` of answering nothing, all against the teacher.
        scores: the student on the test list.
        zero_shot: the student's CLIP, zero-shot, on the test list.
    """
    reasons = []
    agreement, before = kept_aside["agreement"], kept_aside["zero_shot_agreement"]
    if agreement < before:
        reasons.append(
            f"it agrees with its teacher on {agreement:.1f} % of the pictures kept aside, less than "
            f"its own zero-shot CLIP ({before:.1f} %)"
        )
    kl, uniform = kept_aside["kl"], kept_aside["uniform_kl"]
    if not kl < uniform:
        reasons.append(
            f"its KL to the teacher on pictures kept aside is {kl:.3f}; answering with equal "
            f"probabilities has {uniform:.3f}"
        )
    found, own = scores.parts["all"].top1, zero_shot.parts["all"].top1
    if found < own:
        reasons.append(f"its accuracy is {found:.1f} %, below its own zero-shot {own:.1f} %")
    return reasons


class _EpochWatch:
    """After every epoch: agreement on pictures kept aside, and the best student so far.

    What is best is told by test pictures under "paper", by those kept aside under "validation".
    """

    def __init__(self, cell: Cell, kept: ImageList, teacher_logits: Tensor) -> None:
        self._cell, self._kept, self._teacher_logits = cell, kept, teacher_logits
        self._path = cell.folder / "epochs.json"
        self.rows: list[dict[str, float]] = []
        if self._path.is_file():
            self.rows = json.loads(self._path.read_text(encoding="utf-8"))

    @property
    def best_folder(self) -> Path:
        """Where the best student so far lies."""
        return self._cell.folder / "best"

    @property
    def chooses(self) -> bool:
        """Whether another epoch than the last may be taken."""
        return self._cell.plan.selection != "clean"

    def __call__(self, epoch: int, student: Student) -> None:
        """Measure; a resumed run takes some epochs again, and their rows are replaced."""
        earlier = [row for row in self.rows if row["epoch"] < epoch]
        logits, _ = logits_on(student, self._kept)
        row = {"epoch": float(epoch), **compare(self._teacher_logits, logits)}
        if self._cell.plan.selection == "paper":
            row["test_accuracy"] = self._test_accuracy(student)
        if self.chooses and all(_merit(row) > _merit(other) for other in earlier):
            student.save(self.best_folder)
        self.rows = [*earlier, row]
        write_json(self._path, self.rows)

    def _test_accuracy(self, student: Student) -> float:
        """What the official code chooses by: base test pictures, or all in the other protocols."""
        data = self._cell.data.base() if self._cell.halves else self._cell.data
        images = data.images("test")
        assert images.labels is not None
        logits, rows = logits_on(student, images)
        labels = torch.from_numpy(images.labels[rows])
        return score_part(logits[:, : len(data.class_names)], labels).top1


def _merit(row: Mapping[str, float]) -> tuple[float, float]:
    """What the best epoch has most of: accuracy on test if it was measured, else agreement."""
    return row.get("test_accuracy", row["agreement"]), -row["kl"]


class _Work:
    """The steps of a cell, each timed."""

    def __init__(self, cell: Cell, progress: Progress) -> None:
        self._cell, self._progress = cell, progress
        self._device = pick_device(cell.plan.device)
        self._names = PublishedNames(cell.data.class_names)
        self._test = cell.data.images("test")
        self._seconds: dict[str, float] = {}
        self._unreadable: set[str] = set()

    def run(self) -> dict[str, Any]:
        """All of the result that isn't settings."""
        with self._timed("stage 1"):
            teacher = teacher_for(self._cell, self._device, self._progress)
        with self._timed("measuring the teacher"):
            teacher_facts = self._judge_teacher(teacher)
            kept, teacher_logits = self._keep_aside(teacher)
        watch = _EpochWatch(self._cell, kept, teacher_logits)
        found: dict[str, Any] = {"teacher": teacher_facts, "scores": None, "values": None}
        try:
            with self._timed("stage 2"):
                student = self._distill(teacher, watch)
        except TrainingError as error:
            self._progress.say(f"FAILED: {error}", style="bold red")
            found |= {"status": "diverged", "reasons": [str(error)], "kept_aside": None}
            return {**found, **self._course(watch)}
        with self._timed("measuring the student"):
            scores = self._score(student)
            small = load_clip(
                self._cell.plan.student,
                precision=self._cell.distill_config.precision,
                device=self._device,
            )
            zero_shot = zero_shot_teacher(small, self._names, (self._cell.data.template,))
            own = self._score(zero_shot)
            aside = self._compare_aside(student, zero_shot, kept, teacher_logits)
        reasons = collapse_reasons(aside, scores, own)
        for reason in reasons:
            self._progress.say(f"COLLAPSED: {reason}", style="bold red")
        found |= {
            "status": "collapsed" if reasons else "done",
            "reasons": reasons,
            "values": _values(scores),
            "scores": asdict(scores),
            "student_zero_shot": _values(own),
            "kept_aside": aside,
            "student_backbone": {"name": small.name, "image_hash": small.image_hash},
        }
        return {**found, **self._course(watch)}

    def _judge_teacher(self, teacher: Teacher) -> dict[str, Any]:
        """Its accuracy on the test list beside that of its own CLIP without tuning."""
        scores = self._score(teacher)
        plain = zero_shot_teacher(teacher.clip, self._names, (self._cell.data.template,))
        zero_shot = self._score(plain)
        warning = teacher_warning(scores, zero_shot)
        shown = ", ".join(f"{part} {found.top1:.1f} %" for part, found in scores.parts.items())
        self._progress.say(f"teacher before distilling: {shown}")
        if warning is not None:
            self._progress.say(f"warning: {warning}", style="yellow")
        return {
            "model": teacher.clip.name,
            "method": teacher.info.method,
            "fingerprint": teacher.fingerprint(),
            "values": _values(scores),
            "zero_shot": _values(zero_shot),
            "warning": warning,
        }

    def _keep_aside(self, teacher: Teacher) -> tuple[ImageList, Tensor]:
        images = self._cell.kept_aside()
        generator = torch.Generator().manual_seed(self._cell.seed)
        order = torch.randperm(len(images), generator=generator)[:KEPT_ASIDE]
        sample = images.select(sorted(order.tolist()))
        logits, rows = logits_on(teacher, sample)
        return sample.select(rows), logits

    def _distill(self, teacher: Teacher, watch: _EpochWatch) -> Student:
        cell = self._cell
        images = cell.to_learn_from()
        student = distill(
            images,
            teacher=teacher,
            student=cell.plan.student,
            cache=self._cache(teacher, len(images)) if cell.plan.cache else None,
            output=cell.folder / "student",
            resume=True,
            device=self._device,
            config=cell.distill_config,
            orient=False,
            progress=self._progress,
            on_epoch=watch,
        )
        if watch.chooses and (watch.best_folder / "student.json").is_file():
            return Student.load(
                watch.best_folder,
                backbone=cell.plan.student,
                precision=cell.distill_config.precision,
                device=self._device,
            )
        return student

    def _cache(self, teacher: Teacher, num_images: int) -> Path:
        """The teacher's answers on all training pictures; what another seed has stored is kept."""
        cell, config = self._cell, self._cell.distill_config
        images = cell.data.images("train")
        which = hash_tensors({}, f"{teacher.fingerprint()}|{images.digest()}|{config.crop_scale}")
        folder = cell.plan.output.expanduser() / "caches" / f"{cell.data.paper.key}-{which[:12]}"
        build_cache(
            teacher,
            images,
            folder,
            views=views_to_cache(config, num_images),
            seed=CACHE_SEED,
            dtype="float64" if config.precision == "fp64" else None,
            crop_scale=config.crop_scale,
            orient=False,
            say=self._progress.say,
        )
        return folder

    def _score(self, model: Teacher | Student) -> Scores:
        assert self._test.labels is not None
        logits, rows = logits_on(model, self._test)
        unreadable = set(self._test.names) - {self._test.names[r] for r in rows}
        if unreadable - self._unreadable:
            self._progress.say(
                f"warning: {len(unreadable)} test pictures can't be read and aren't scored, the "
                f"first is '{min(unreadable)}'",
                style="yellow",
            )
        self._unreadable |= unreadable
        if not rows:
            raise DataError(f"no test picture of {self._cell.data.paper.title} can be read")
        return score_lists(
            logits,
            torch.from_numpy(self._test.labels[rows]),
            self._names,
            halves=self._cell.halves,
            names=[self._test.names[r] for r in rows],
        )

    def _compare_aside(
        self, student: Student, zero_shot: Teacher, kept: ImageList, teacher_logits: Tensor
    ) -> dict[str, float]:
        wanted = teacher_logits.double().log_softmax(dim=-1)
        entropy = -(wanted.exp() * wanted).sum(dim=-1).mean()
        return {
            "num_images": float(len(kept)),
            **compare(teacher_logits, logits_on(student, kept)[0]),
            "zero_shot_agreement": compare(teacher_logits, logits_on(zero_shot, kept)[0])[
                "agreement"
            ],
            "uniform_kl": math.log(len(self._names)) - float(entropy),
        }

    def _course(self, watch: _EpochWatch) -> dict[str, Any]:
        """How it went: curves, times, throughput, what couldn't be read."""
        log = _read_log(self._cell.folder / "student" / "distill_log.jsonl")
        return {
            "curves": {
                "loss": [[row["step"], row["loss"]] for row in log if "loss" in row],
                "epochs": watch.rows,
            },
            "seconds": self._seconds,
            "images_per_second": log[-1].get("images_per_second") if log else None,
            "unreadable": sorted(self._unreadable),
        }

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.monotonic() - began


def _values(scores: Scores) -> dict[str, float]:
    """The numbers that tables show: top-1 of every part, and the harmonic mean."""
    values = {part: found.top1 for part, found in scores.parts.items()}
    if scores.harmonic_mean is not None:
        values["harmonic_mean"] = scores.harmonic_mean
    return values


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
