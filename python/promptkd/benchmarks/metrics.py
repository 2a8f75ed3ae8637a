"""What predictions are worth: the paper's accuracies, top-5, calibration, classes, confusions.

Classes are told apart by their places, never by name: ImageNet has two called "missile".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from promptkd.calibration import Bin, reliability
from promptkd.errors import DataError
from promptkd.evaluate import harmonic_mean

_PAIRS = 10
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Part:
    """Pictures of some classes, told apart among these classes alone; all in percent.

    Attributes:
        num_images: pictures scored.
        top1: accuracy.
        top5: the same when any of the five best counts (of all, where there are fewer).
        calibration_error: expected calibration error of the highest probability, over 15 bins.
        bins: what it is made of.
    """

    num_images: int
    top1: float
    top5: float
    calibration_error: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class ClassAccuracy:
    """One class's pictures, told apart among all classes."""

    label: int
    name: str
    num_images: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Confusion:
    """Pictures of one class that were taken for another; a few of them by name."""

    truth: str
    taken_for: str
    num_images: int
    share: float
    """In percent of the class's pictures."""
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """All that is measured on a test list.

    Attributes:
        parts: "all" (over all classes together), and "base" and "novel" where there are halves.
        harmonic_mean: 2·base·novel/(base + novel), None without halves.
        classes: every class that has pictures, in label order.
        confusions: the most frequent confusions among all classes, the largest first.
    """

    parts: dict[str, Part]
    harmonic_mean: float | None
    classes: tuple[ClassAccuracy, ...]
    confusions: tuple[Confusion, ...]


def score_lists(
    logits: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    *,
    halves: bool = False,
    names: Sequence[str] = (),
) -> Scores:
    """Score logits (N, C) of N test pictures.

    Args:
        logits: of all C classes, a row a picture.
        labels: (N,) places in `class_names`.
        class_names: C names.
        halves: also score the first ceil(C/2) classes (base) and the others (novel), each
            among its own classes, as the paper does.
        names: the pictures' names, for examples of confusions.

    Raises:
        DataError: no pictures, or a half without any.
    """
    middle = math.ceil(len(class_names) / 2)
    bounds = {"all": (0, len(class_names))}
    if halves:
        bounds |= {"base": (0, middle), "novel": (middle, len(class_names))}
    parts = {}
    for part, (first, last) in bounds.items():
        rows = (labels >= first) & (labels < last)
        if not bool(rows.any()):
            raise DataError(f"no test pictures to score ({part}: classes {first} to {last - 1})")
        parts[part] = score_part(logits[rows, first:last], labels[rows] - first)
    whole = harmonic_mean(parts["base"].top1, parts["novel"].top1) if halves else None
    best = logits.argmax(dim=-1)
    return Scores(
        parts, whole, _classes(best, labels, class_names), _pairs(best, labels, class_names, names)
    )


def score_part(logits: Tensor, labels: Tensor) -> Part:
    """Score logits (N, C) against labels (N,) over these C classes."""
    hits = (logits.argmax(dim=-1) == labels).double()
    top = logits.topk(min(5, logits.shape[1]), dim=-1).indices
    found = reliability(logits, labels)
    return Part(
        num_images=len(labels),
        top1=100 * float(hits.mean()),
        top5=100 * float((top == labels[:, None]).any(dim=-1).double().mean()),
        calibration_error=found.error,
        bins=found.bins,
    )


def _classes(best: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[ClassAccuracy, ...]:
    found = []
    for label in labels.unique().tolist():
        hits = best[labels == label] == label
        found.append(
            ClassAccuracy(label, names[label], len(hits), 100 * float(hits.double().mean()))
        )
    return tuple(found)


def _pairs(
    best: Tensor, labels: Tensor, class_names: Sequence[str], names: Sequence[str]
) -> tuple[Confusion, ...]:
    """The most frequent (truth, taken for) pairs; equal counts in label order."""
    wrong = (best != labels).nonzero().flatten().tolist()
    rows: dict[tuple[int, int], list[int]] = {}
    for row in wrong:
        rows.setdefault((int(labels[row]), int(best[row])), []).append(row)
    totals = torch.bincount(labels, minlength=len(class_names)).tolist()
    ordered = sorted(rows.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(
        Confusion(
            class_names[truth],
            class_names[taken],
            len(found),
            100 * len(found) / totals[truth],
            tuple(names[row] for row in found[:_EXAMPLES]) if names else (),
        )
        for (truth, taken), found in ordered[:_PAIRS]
    )
