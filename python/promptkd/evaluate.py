"""Accuracy of logits against labels: top-1, top-5, per class, base, novel, harmonic mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from promptkd.calibration import reliability
from promptkd.class_names import plain_name
from promptkd.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracies in percent.

    Attributes:
        num_images: pictures scored.
        top1: over all classes.
        top5: over all classes (over all there are, when fewer than 5).
        per_class: top-1 of each class that has pictures.
        base: top-1 of base pictures among base classes, as the paper scores it; None without a split.
        novel: the same for novel.
        harmonic_mean: 2·base·novel / (base + novel).
        calibration_error: expected calibration error of the highest probability, over 15 bins.
    """

    num_images: int
    top1: float
    top5: float
    per_class: dict[str, float]
    base: float | None = None
    novel: float | None = None
    harmonic_mean: float | None = None
    calibration_error: float | None = None

    def table(self) -> Table:
        """For a terminal: the accuracies, then the classes from worst to best."""
        from rich.table import Table

        table = Table("", "accuracy %", title=f"{self.num_images} pictures")
        parts: dict[str, float | None] = {"top-1": self.top1, "top-5": self.top5}
        parts |= {"base": self.base, "novel": self.novel, "harmonic mean": self.harmonic_mean}
        parts["calibration error"] = self.calibration_error
        for name, value in parts.items():
            if value is not None:
                table.add_row(name, f"{value:.1f}", style="bold")
        table.add_section()
        for name, value in sorted(self.per_class.items(), key=lambda item: item[1]):
            table.add_row(name, f"{value:.1f}")
        return table


def score(
    logits: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    base: Sequence[str] = (),
    novel: Sequence[str] = (),
) -> Evaluation:
    """Score logits (N, C) against labels (N,); base and novel name the halves, if any.

    Logits are to be divided by the temperature, if there is one: the calibration error is theirs.

    Raises:
        DataError: a base or novel name that is not among the class names.
    """
    best = logits.argmax(dim=-1)
    hits = (best == labels).double()
    top = logits.topk(min(5, logits.shape[1]), dim=-1).indices
    per_class = {
        class_names[c]: 100 * float(hits[labels == c].mean()) for c in labels.unique().tolist()
    }
    halves = [_half(logits, labels, class_names, names) for names in (base, novel)]
    return Evaluation(
        num_images=len(labels),
        top1=100 * float(hits.mean()),
        top5=100 * float((top == labels[:, None]).any(dim=-1).double().mean()),
        per_class=per_class,
        base=halves[0],
        novel=halves[1],
        harmonic_mean=harmonic_mean(*halves),
        calibration_error=reliability(logits, labels).error,
    )


def harmonic_mean(base: float | None, novel: float | None) -> float | None:
    """2·base·novel / (base + novel); 0 when both are 0, None when one is unknown."""
    if base is None or novel is None:
        return None
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def _half(
    logits: Tensor, labels: Tensor, class_names: Sequence[str], names: Sequence[str]
) -> float | None:
    if not names:
        return None
    index = {plain_name(name): row for row, name in enumerate(class_names)}
    try:
        columns = torch.tensor([index[plain_name(name)] for name in names])
    except KeyError as error:
        raise DataError(
            f"the split names the class {error}, which the model doesn't know"
        ) from error
    rows = torch.isin(labels, columns)
    if not bool(rows.any()):
        return None
    best = columns[logits[rows][:, columns].argmax(dim=-1)]
    return 100 * float((best == labels[rows]).double().mean())
