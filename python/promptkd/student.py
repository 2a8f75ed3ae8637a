"""The student: a small prompted image tower, a projector, and the teacher's stored class vectors.

All that inference needs; neither the teacher nor a text encoder is imported here, and Triton only
where it is installed and a GPU predicts among many classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from promptkd.calibration import Calibration, Score, calibrate
from promptkd.class_names import names_from_json
from promptkd.class_vectors import TextSide
from promptkd.classes import ClassList
from promptkd.clip import (
    Clip,
    Preprocess,
    hash_tensors,
    load_clip,
    load_embedded,
    preprocess_dict,
)
from promptkd.data.inputs import ImageLike, as_list, is_many, with_names
from promptkd.data.loader import load_whole
from promptkd.data.sources import ImageList, Split, find_split, labelled, read_split
from promptkd.errors import CheckpointError, DataError
from promptkd.evaluate import Evaluation, score
from promptkd.files import (
    BACKBONE_FILE,
    STUDENT,
    read_folder,
    read_tensors,
    write_folder,
    write_tensors,
)
from promptkd.hub import HubMixin
from promptkd.prompts import DeepPrompts
from promptkd.ranks import ALONE, join

_BATCH = 64
_MANY_CLASSES = 20_000
"""From here on predictions go without all logits: a batch of them takes 5 MB, and as much again
for each step from logits to probabilities."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The most probable classes of one picture, best first."""

    path: str | None
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    out_of_domain: bool | None = None
    """Whether it looks unlike what the student was calibrated on; None without a calibration."""


@dataclass(frozen=True, slots=True)
class StudentInfo:
    """What a student was made from and how it went; stored beside its weights."""

    class_names: tuple[str, ...]
    teacher: str = ""
    teacher_fingerprint: str = ""
    orient: bool = True
    """Apply the EXIF orientation of pictures."""
    temperature: float = 1.0
    """T of the probabilities, softmax(logits / T)."""
    calibration: Calibration | None = None
    """What the temperature was fitted on."""
    added_classes: tuple[str, ...] = ()
    """Those of the names that came after distilling."""
    summary: dict[str, Any] = field(default_factory=dict)


class Projector(nn.Module):
    """Student width → teacher width: linear, BatchNorm, ReLU, linear (the paper's 1x1 convolutions)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_dim, out_dim)
        self.norm = nn.BatchNorm1d(out_dim, eps=1e-5, momentum=0.1)
        self.linear2 = nn.Linear(out_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Raw student features (B, D_s), not normalised → (B, D_t), not normalised."""
        wide = features.to(self.linear1.weight.dtype)
        hidden = torch.relu(self.norm(self.linear1(wide)))
        projected: Tensor = self.linear2(hidden)
        return projected


class Student(HubMixin, nn.Module):
    """Classifies pictures by a distilled image tower and stored class vectors.

    As a module it maps normalised pixels (B, 3, H, W) to logits (B, C); in training mode the
    projector's BatchNorm uses batch statistics.
    """

    class_vectors: Tensor

    def __init__(
        self,
        clip: Clip,
        prompts: DeepPrompts,
        projector: Projector,
        class_vectors: Tensor,
        info: StudentInfo,
        text_side: TextSide | None = None,
    ) -> None:
        super().__init__()
        if class_vectors.ndim != 2 or class_vectors.shape[0] != len(info.class_names):
            raise CheckpointError(
                f"{tuple(class_vectors.shape)} class vectors for {len(info.class_names)} class names"
            )
        self.clip = clip
        self.info = info
        self.text_side = text_side
        self.vision = clip.vision
        self.prompts = prompts
        self.projector = projector
        self.register_buffer("class_vectors", class_vectors.detach().clone())

    @property
    def class_names(self) -> tuple[str, ...]:
        """The C names, in the order of the logits."""
        return self.info.class_names

    @property
    def logit_scale(self) -> float:
        """exp of the student's own log scale, frozen."""
        return self.clip.logit_scale

    @property
    def device(self) -> torch.device:
        """Where the student lives."""
        return self.class_vectors.device

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All that distillation trains: vision prompts and projector."""
        return [*self.prompts.parameters(), *self.projector.parameters()]

    def project(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, H, W) → projected features (B, D), not unit length."""
        projected: Tensor = self.projector(self.vision(pixels, self.prompts()))
        return projected

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, H, W) → logits (B, C) = scale · cos(projected, class vectors)."""
        features = F.normalize(self.project(pixels), dim=-1)
        return self.logit_scale * features @ self.class_vectors.T

    def as_linear_head(self) -> tuple[nn.Module, Tensor]:
        """The student as features and a matrix: logits = tower(pixels) @ weight.T.

        Returns:
            A module from normalised pixels (B, 3, H, W) to unit features (B, D), which shares its
            weights with the student, and the weight (C, D), logit scale · class vectors.
        """
        return FeatureTower(self), self.logit_scale * self.class_vectors

    # --- pictures in, answers out

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Pictures (paths, PIL images, uint8 arrays (H, W, 3)) → normalised pixels (B, 3, H, W).

        A float tensor (B, 3, H, W) counts as preprocessed already.

        Raises:
            ImageError: a picture that can't be read; the message names it.
        """
        if isinstance(images, Tensor) and images.is_floating_point():
            return images.to(self.device)
        (pixels,), _ = load_whole(as_list(images), [self.clip.preprocess], orient=self.info.orient)
        return self.clip.preprocess.normalize(pixels.to(self.device), self._compute_dtype)

    @torch.inference_mode()
    def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Pictures → unit features (B, D) in the space of the class vectors."""
        return torch.cat(
            [F.normalize(self._eval(self.project, b), dim=-1) for b in self._batches(images)]
        )

    @torch.inference_mode()
    def logits(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Pictures → logits (B, C)."""
        return torch.cat([self._eval(self.forward, b) for b in self._batches(images)])

    def predict(
        self, images: ImageLike | Sequence[ImageLike], top_k: int = 5
    ) -> Prediction | list[Prediction]:
        """Classify one picture, a list of them, a folder, a list file or tar shards.

        Args:
            images: a path, PIL image, uint8 array (H, W, 3) or tensor (3, H, W); a list of these,
                a folder, a file that lists pictures, tar shards or a pattern of names gives a list,
                in order (a folder sorted by name).
            top_k: classes to name, at most all.

        Raises:
            ImageError: a picture that can't be read.
            DataError: a folder without pictures, or a top_k under 1.
        """
        if top_k < 1:
            raise DataError(f"top_k must be at least 1, not {top_k}")
        single = not is_many(images)
        found = list(self.iter_predict(images, top_k))
        return found[0] if single else found

    def iter_predict(
        self, images: ImageLike | Sequence[ImageLike] | ImageList, top_k: int = 5
    ) -> Iterator[Prediction]:
        """Like `predict`, giving predictions batch by batch."""
        items, names = with_names(images)
        count = min(top_k, len(self.class_names))
        for start in range(0, len(items), _BATCH):
            values, rows, foreign = self._best(items[start : start + _BATCH], count)
            for path, value, row, odd in zip(
                names[start : start + _BATCH], values.tolist(), rows.tolist(), foreign, strict=True
            ):
                labels = tuple(self.class_names[r] for r in row)
                yield Prediction(path, labels, tuple(value), odd)

    @torch.inference_mode()
    def _best(
        self, images: Sequence[ImageLike], count: int
    ) -> tuple[Tensor, Tensor, list[bool | None]]:
        """Of pictures (B): probabilities (B, k), class numbers (B, k), and what is out of domain."""
        temperature, found = self.info.temperature, self.info.calibration
        domain = found if found is not None and found.threshold is not None else None
        foreign: list[bool | None] = [None] * len(images)
        if len(self.class_names) < _MANY_CLASSES:
            logits = self.logits(images)
            rows = logits.topk(count, dim=-1).indices  # small probabilities may all be 0
            values = logits.div(temperature).softmax(dim=-1).gather(1, rows)
            if domain is not None:
                foreign = domain.is_foreign(logits).tolist()
            return values, rows, foreign
        from promptkd.loss import top_k  # few classes need no kernels

        features = self.encode_image(images)
        scale = self.logit_scale / temperature
        values, rows = top_k(features, self.class_vectors, count, scale=scale)
        if domain is not None:
            nearest = self.class_vectors[rows[:, 0]].double()
            highest = self.logit_scale * torch.linalg.vecdot(features.double(), nearest)
            foreign = domain.is_foreign_best(highest, values[:, 0]).tolist()
        return values, rows, foreign

    def predict_proba(self, images: ImageLike | Sequence[ImageLike]) -> NDArray[np.float64]:
        """Probabilities (N, C) of pictures, rows in their order, columns in that of `class_names`.

        As scikit-learn's classifiers have it, but of pictures: paths, images, or a folder.

        Raises:
            ImageError: a picture that can't be read.
            DataError: a folder without pictures.
        """
        scaled = self.logits(images).double() / self.info.temperature
        probabilities: NDArray[np.float64] = scaled.softmax(dim=-1).cpu().numpy()
        return probabilities

    def evaluate(
        self,
        source: Any,
        *,
        split: str | os.PathLike[str] | None = None,
        together: bool = False,
    ) -> Evaluation:
        """Accuracy on labelled pictures: top-1, top-5, per class; with a split base/novel/HM.

        Args:
            source: see `promptkd.data.labelled`; of a folder with a split.json its `test` part.
            split: a split.json to take base and novel names from, when it is not beside the folder.
            together: all ranks of a torchrun job call this, and each looks at a share of the
                pictures.
        """
        images = labelled(source, self.class_names, part="test")
        assert images.labels is not None
        found = read_split(Path(split)) if split is not None else _split_beside(source)
        ranks = join(self.device) if together else ALONE
        mine = list(ranks.cut(images.paths))
        empty = torch.zeros(0, len(self.class_names), dtype=self.class_vectors.dtype)
        logits = ranks.gather(self.logits(mine).cpu() if mine else empty)
        halves = (found.base, found.novel) if found is not None else ((), ())
        scaled = logits / self.info.temperature
        return score(scaled, torch.from_numpy(images.labels), self.class_names, *halves)

    def calibrate(self, source: Any, *, rate: float = 0.05, score: Score = "energy") -> Calibration:
        """Set the temperature, and what looks out of domain, by labelled pictures.

        They must be others than were trained on. No class changes its rank.

        Args:
            source: see `promptkd.data.labelled`; of a folder with a split.json its `val` part.
            rate: share of these pictures that are to look out of domain.
            score: what tells foreign pictures, see `promptkd.calibration.Calibration`.

        Raises:
            DataError: no labelled pictures, or fewer than 20.
        """
        images = labelled(source, self.class_names, part="val")
        assert images.labels is not None
        labels, logits = torch.from_numpy(images.labels), self.logits(list(images.paths)).cpu()
        return self.set_calibration(calibrate(logits, labels, rate=rate, score=score))

    def set_calibration(self, calibration: Calibration) -> Calibration:
        """Use a calibration from now on."""
        temperature = calibration.temperature
        self.info = replace(self.info, temperature=temperature, calibration=calibration)
        return calibration

    def _batches(self, images: ImageLike | Sequence[ImageLike]) -> Iterator[Tensor]:
        if isinstance(images, Tensor) and images.is_floating_point():
            yield from images.to(self.device).split(_BATCH)
            return
        items = as_list(images)
        for start in range(0, len(items), _BATCH):
            yield self.preprocess(items[start : start + _BATCH])

    def _eval(self, function: Any, pixels: Tensor) -> Tensor:
        """Run with running BatchNorm statistics, whatever mode the module is in."""
        was_training = self.training
        self.eval()
        try:
            result: Tensor = function(pixels)
        finally:
            self.train(was_training)
        return result

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.vision.dtype == torch.float64 else torch.float32

    # --- other classes

    @property
    def classes(self) -> ClassList:
        """The names with their vectors and what makes those of other names."""
        info = self.info
        return ClassList(info.class_names, self.class_vectors, self.text_side, info.added_classes)

    def with_classes(self, names: Sequence[str], teacher: Any = None) -> Student:
        """A student for other classes: fewer, in another order, or new ones; no training.

        Classes that it knows keep their vectors to the bit. New names get theirs from the teacher,
        or from the text prompts stored here and the text tower, which is loaded by its name.

        Args:
            names: what to tell apart from now on.
            teacher: see `promptkd.classes.ClassList.select`; needed for new names alone, where the
                text tower is not to be found by its stored name.

        Returns:
            A new `Student` that shares its towers with this one.

        Raises:
            DataError: an empty or repeated name, or new names without a text side.
            CheckpointError: another teacher than the one that the student learned from.
            ModelError: the text tower is not to be had.
        """
        return self._with(self.classes.select(names, teacher))

    def rename_classes(self, changes: Mapping[str, str]) -> Student:
        """The same classes under other names, {old: new}; nothing is computed.

        Raises:
            DataError: an old name that is not there, a new one that is empty or taken.
        """
        return self._with(self.classes.renamed(changes))

    def _with(self, classes: ClassList) -> Student:
        known = self.info.calibration
        if known is not None and classes.regrouped:
            known = replace(known, threshold=None)  # it held for the old classes
        info = replace(
            self.info,
            class_names=classes.names,
            added_classes=classes.added,
            calibration=known,
        )
        other = Student(
            self.clip, self.prompts, self.projector, classes.vectors, info, classes.text_side
        )
        return other.train(self.training)

    # --- storage

    def fingerprint(self) -> str:
        """Digest of all that the student's predictions depend on."""
        parts = {f"prompts.{i}": t for i, t in enumerate(self.prompts())}
        parts |= {"class_vectors": self.class_vectors, **self.projector.state_dict()}
        info = self.info
        rest = (self.clip.image_hash, self.clip.preprocess, self.logit_scale)
        return hash_tensors(parts, repr((*rest, info.orient, info.temperature, info.class_names)))

    def with_summary(self, **summary: Any) -> Student:
        """The same student with more entries in its training summary."""
        self.info = replace(self.info, summary={**self.info.summary, **summary})
        return self

    def save(self, path: str | os.PathLike[str], *, include_backbone: bool = False) -> Path:
        """Write a student folder (safetensors and JSON, no pickle).

        Args:
            path: the folder, made if absent.
            include_backbone: store the frozen image tower too; otherwise its name and hash.
        """
        tensors = {f"prompts.{i}": t for i, t in enumerate(self.prompts())}
        tensors |= {f"projector.{k}": v for k, v in self.projector.state_dict().items()}
        data = {
            "kind": STUDENT,
            "backbone": self.clip.name,
            "image_hash": self.clip.image_hash,
            "model_cfg": self.clip.model_cfg,
            "preprocess": preprocess_dict(self.clip.preprocess),
            "logit_scale": self.logit_scale,
            "embedded": include_backbone,
            **asdict(self.info),
        }
        self.classes.store(tensors, data)
        if include_backbone:
            folder = Path(path).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / BACKBONE_FILE, self.vision.state_dict())
        return write_folder(path, "student", tensors, data)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backbone: Any = None,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
    ) -> Student:
        """Open a student folder, in eval mode.

        Args:
            path: the folder.
            backbone: the student's CLIP (name, path or object), when its stored name is not to be
                found here.
            precision: how the frozen tower is stored.
            device: where the student goes.

        Raises:
            CheckpointError: no student folder, damaged, or the backbone has other weights.
        """
        tensors, data = read_folder(path, "student", STUDENT)
        if data["embedded"] and backbone is None:
            state, _ = read_tensors(Path(path).expanduser() / BACKBONE_FILE)
            clip = load_embedded(data, state, precision=precision, device=device)
        else:
            name = data["backbone"] if backbone is None else backbone
            clip = load_clip(name, precision=precision, device=device, text=False)
            if clip.image_hash != data["image_hash"]:
                raise CheckpointError(
                    f"'{path}' was distilled into '{data['backbone']}' with weights "
                    f"{data['image_hash'][:8]}…, but '{clip.name}' has {clip.image_hash[:8]}…"
                )
        classes = ClassList.stored(tensors, data, path)
        parts = *_trained_parts(tensors, path), classes.vectors
        return cls(clip, *parts, _info(data), classes.text_side).to(device).eval()


class FeatureTower(nn.Module):
    """Normalised pixels (B, 3, H, W) → unit features (B, D) in the space of the class vectors."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.train(student.training)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels."""
        return F.normalize(self.student.project(pixels), dim=-1)


def _trained_parts(tensors: dict[str, Tensor], path: Any) -> tuple[DeepPrompts, Projector]:
    try:
        depth = sum(k.startswith("prompts.") for k in tensors)
        prompts = DeepPrompts([tensors[f"prompts.{i}"] for i in range(depth)])
        weight = tensors["projector.linear1.weight"]
        projector = Projector(weight.shape[1], weight.shape[0]).to(weight.dtype)
        state = {
            k.removeprefix("projector."): v
            for k, v in tensors.items()
            if k.startswith("projector.")
        }
        projector.load_state_dict(state)
    except (KeyError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"'{path}' lacks parts of a student or holds the wrong shapes: {error}"
        ) from error
    return prompts, projector


def _info(data: dict[str, Any]) -> StudentInfo:
    known = data.get("calibration")
    return StudentInfo(
        class_names=names_from_json(data),
        teacher=data["teacher"],
        teacher_fingerprint=data["teacher_fingerprint"],
        orient=bool(data["orient"]),
        temperature=float(data["temperature"]),
        calibration=None if known is None else Calibration.from_json(known),
        added_classes=tuple(data.get("added_classes", ())),
        summary=data["summary"],
    )


def _split_beside(source: Any) -> Split | None:
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        return find_split(Path(source))
    return None


__all__ = ["ImageLike", "Prediction", "Preprocess", "Projector", "Student", "StudentInfo"]
