"""How fast each part of distilling runs on this machine, and which one the others wait for."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from promptkd.cache.build import build_cache
from promptkd.clip import Clip
from promptkd.data.loader import CropRecipe, ViewLoader
from promptkd.data.pictures import size_of
from promptkd.data.sources import ImageList
from promptkd.loss import kd_loss
from promptkd.stages.distill import DistillConfig, new_student
from promptkd.stages.encoder import Encoder, graph_bytes
from promptkd.student import Student
from promptkd.teacher import Teacher

_CPU_ROWS = 8
"""Pictures that go through a tower at a time on a CPU: more are no faster, and take long."""
_CACHED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Pictures a second of each part, alone on the machine.

    Attributes:
        decode: one view, for the student.
        decode_both: the same view for student and teacher.
        decode_teacher: one view, for the teacher.
        teacher: the teacher's forward pass.
        student: the student's forward and backward pass, and its update.
        loss: forward and backward pass of the loss.
        cache_fill: reading, hashing, decoding and storing; all of a cache but the teacher.
        cache_read: answers from a cache, in random order.
        batch_size: of the loss and the reader.
        num_classes: of the loss.
        feature_width: D.
        picture_bytes: mean size of a picture's file.
        graph_bytes: memory that one picture's graph takes in the student's tower.
        weight_bytes: memory of the towers' weights: student, teacher.
        overlaps: decoding goes on while a GPU computes.
    """

    decode: float
    decode_both: float
    decode_teacher: float
    teacher: float
    student: float
    loss: float
    cache_fill: float
    cache_read: float
    batch_size: int
    num_classes: int
    feature_width: int
    picture_bytes: float
    graph_bytes: int
    weight_bytes: tuple[int, int]
    overlaps: bool

    def modes(self) -> dict[str, dict[str, float]]:
        """Seconds a picture by part, for each way of working."""
        return {
            "fill a cache": {
                "decode": 1 / self.decode_teacher,
                "teacher": 1 / self.teacher,
                "store": max(1 / self.cache_fill - 1 / self.decode_teacher, 0.0),
            },
            "train from a cache": {
                "decode": 1 / self.decode,
                "cache": 1 / self.cache_read,
                "student": 1 / self.student,
                "loss": 1 / self.loss,
            },
            "train with the teacher": {
                "decode": 1 / self.decode_both,
                "teacher": 1 / self.teacher,
                "student": 1 / self.student,
                "loss": 1 / self.loss,
            },
        }

    def speed(self, mode: str) -> float:
        """Pictures a second of a way of working."""
        parts = dict(self.modes()[mode])
        if not self.overlaps:  # decoding takes the processor from the towers
            return 1 / sum(parts.values())
        decode = parts.pop("decode")
        return 1 / max(decode, sum(parts.values()))

    def bottleneck(self, mode: str) -> str:
        """The part that takes longest."""
        parts = self.modes()[mode]
        return max(parts, key=lambda name: parts[name])


def measure(
    images: ImageList,
    teacher: Teacher,
    student_clip: Clip,
    config: DistillConfig,
    *,
    seconds: float = 2.0,
    say: Callable[[str], None] = lambda _: None,
) -> Throughput:
    """Time every part on these pictures and models, each for about `seconds`."""
    student = new_student(student_clip, teacher, config).train()
    device, batch = student.device, config.batch_size
    rows = batch if device.type == "cuda" else min(batch, _CPU_ROWS)
    clock = _Clock(device, seconds, say)
    generator = torch.Generator().manual_seed(0)

    def noise(clip: Clip) -> Tensor:
        size = (rows, 3, *clip.preprocess.size)
        return torch.randn(size, generator=generator).to(device, config.compute_dtype)

    pixels = noise(student_clip)
    step, tower = _student_step(student, config, pixels)
    graph = graph_bytes(tower, [pixels, *student.buffers(), *student.parameters()])
    loaders = {
        "decode": [student_clip.preprocess],
        "decode_both": [student_clip.preprocess, teacher.preprocess],
        "decode_teacher": [teacher.preprocess],
    }
    speeds = {
        name: clock.speed(
            name,
            batch,
            _decoding(
                ViewLoader(
                    images, targets, CropRecipe(scale=config.crop_scale), seed=0, orient=True
                ),
                batch,
            ),
        )
        for name, targets in loaders.items()
    }
    teacher_pixels = noise(teacher.clip)
    speeds["teacher"] = clock.speed("teacher", rows, lambda: teacher.encode_image(teacher_pixels))
    speeds["student"] = clock.speed("student", rows, step)
    speeds["loss"] = clock.speed("loss", batch, _loss(student, teacher, config, generator))
    speeds |= _cache_speeds(images, teacher, clock, batch)
    sizes = [size_of(p) for p in images.paths[:: max(1, len(images) // 1000)]]
    return Throughput(
        **speeds,
        batch_size=batch,
        num_classes=len(teacher.class_names),
        feature_width=teacher.class_vectors.shape[1],
        picture_bytes=float(np.mean(sizes)),
        graph_bytes=graph // rows,
        weight_bytes=(tensor_bytes(student), tensor_bytes(teacher.vision)),
        overlaps=device.type == "cuda",
    )


class _Clock:
    """Repeats a function for some time."""

    def __init__(self, device: torch.device, seconds: float, say: Callable[[str], None]) -> None:
        self._device, self._seconds, self._say = device, seconds, say

    def speed(self, name: str, pictures: int, function: Callable[[], Any]) -> float:
        """Pictures a second, after one call to warm up."""
        function()
        self._wait()
        calls, start, elapsed = 0, time.perf_counter(), 0.0
        while elapsed < self._seconds:
            function()
            self._wait()
            calls, elapsed = calls + 1, time.perf_counter() - start
        found = pictures * calls / elapsed
        self._say(f"{name.replace('_', ' ')}: {found:,.1f} pictures/s")
        return found

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def tensor_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def _decoding(loader: ViewLoader, batch: int) -> Callable[[], Any]:
    place = [0]

    def load() -> None:
        view, first = divmod(place[0], max(len(loader.images), 1))
        loader.load([(first + k) % len(loader.images) for k in range(batch)], view)
        place[0] += batch

    return load


def _student_step(
    student: Student, config: DistillConfig, pixels: Tensor
) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    """A step without its loss, and the tower's forward pass alone."""
    encode = Encoder(student.vision, config)
    optimizer = config.make_optimizer(student.trainable_parameters())

    def tower() -> Tensor:
        return encode(pixels, student.prompts())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        student.projector(tower()).square().mean().backward()
        optimizer.step()

    return step, tower


def _loss(
    student: Student, teacher: Teacher, config: DistillConfig, generator: torch.Generator
) -> Callable[[], Any]:
    vectors = student.class_vectors - student.class_vectors.mean(dim=0, keepdim=True)
    size = (config.batch_size, vectors.shape[1])
    mine, theirs = (torch.randn(size, generator=generator).to(vectors) for _ in range(2))
    mine.requires_grad_()
    theirs = F.normalize(theirs, dim=-1)

    def loss() -> None:
        mine.grad = None
        kd_loss(
            mine,
            theirs,
            vectors,
            student_scale=student.logit_scale,
            teacher_scale=teacher.logit_scale,
            temperature=config.temperature,
        ).backward()

    return loss


class _Instant(Teacher):
    """A teacher that answers at once, to see what the rest of a cache costs."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Of unit length, and always the same."""
        return F.normalize(images.new_ones(len(images), self.class_vectors.shape[1]), dim=-1)


def _cache_speeds(
    images: ImageList, teacher: Teacher, clock: _Clock, batch: int
) -> dict[str, float]:
    sample = images.select(range(0, len(images), -(-len(images) // _CACHED)))
    instant = _Instant(teacher.clip, teacher.info, teacher.class_vectors)
    with tempfile.TemporaryDirectory(prefix="promptkd-") as folder:
        start = time.perf_counter()
        cache = build_cache(instant, sample, folder, views=1, content="features", part=(0, 1))
        fill = 2 * len(sample) / (time.perf_counter() - start)  # the whole picture and a view
        rows = np.arange(batch, dtype=np.int64) * 7 % len(sample)
        read = clock.speed("cache", batch, lambda: cache.answers(0, rows, torch.float32))
    return {"cache_fill": fill, "cache_read": read}
