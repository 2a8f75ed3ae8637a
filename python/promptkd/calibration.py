"""Probabilities that mean something: a temperature, how wrong they are, and what looks foreign."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, TypeAlias

from torch import Tensor

from promptkd.errors import DataError

Score: TypeAlias = Literal["energy", "probability"]

BINS = 15
MIN_PICTURES = 20
"""Fewer pictures fit no temperature worth having."""
_RANGE = (0.02, 50.0)
_HALVINGS = 60


@dataclass(frozen=True, slots=True)
class Bin:
    """Pictures whose highest probability lies in one of 15 equal intervals; empty ones are left out."""

    lower: float
    num_images: int
    confidence: float
    """Mean highest probability, in percent."""
    accuracy: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """How far the highest probability can be believed; all in percent but the last.

    Attributes:
        error: expected calibration error over 15 bins.
        bins: what it is made of.
        cross_entropy: mean, in nats.
    """

    error: float
    bins: tuple[Bin, ...]
    cross_entropy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a student's probabilities were set right.

    Attributes:
        temperature: T of softmax(logits / T).
        targets: "labels", or "teacher": its probabilities, where there are no labels.
        num_images: pictures it was fitted on.
        before, after: reliability on these pictures, at T = 1 and at `temperature`.
        score: what tells foreign pictures: "energy", T·log Σ exp(logits / T), or the highest
            "probability".
        rate: share of the pictures it was fitted on that lie below the threshold.
        threshold: pictures that score lower look out of domain; None once classes were added or
            taken away, since the score depends on them.
    """

    temperature: float
    targets: str
    num_images: int
    before: Reliability
    after: Reliability
    score: Score
    rate: float
    threshold: float | None

    def is_foreign(self, logits: Tensor) -> Tensor:
        """(N,) booleans: which of the pictures behind logits (N, C) look out of domain.

        Raises:
            DataError: the threshold was lost with the classes it held for.
        """
        return domain_score(logits.double(), self.temperature, self.score) < self._known_threshold

    def is_foreign_best(self, highest: Tensor, probability: Tensor) -> Tensor:
        """The same from the highest logit (N,) and its probability at `temperature` (N,) alone.

        That probability is p = exp(highest / T) / Σ exp(logits / T), so the energy is
        highest − T·log p.
        """
        certainty = probability.double()
        if self.score == "energy":
            certainty = highest.double() - self.temperature * certainty.log()
        return certainty < self._known_threshold

    @property
    def _known_threshold(self) -> float:
        if self.threshold is None:
            raise DataError("the classes have changed since calibrating; calibrate again")
        return self.threshold

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        """Rebuild from `asdict` gone through JSON."""
        sides = {
            side: Reliability(
                data[side]["error"],
                tuple(Bin(**b) for b in data[side]["bins"]),
                data[side]["cross_entropy"],
            )
            for side in ("before", "after")
        }
        return cls(**{**data, **sides})


def calibrate(
    logits: Tensor, targets: Tensor, *, rate: float = 0.05, score: Score = "energy"
) -> Calibration:
    """Fit a temperature, and a threshold below which pictures look out of domain.

    Args:
        logits: (N, C) of N pictures that were not trained on.
        targets: (N,) labels, or (N, C) a teacher's probabilities.
        rate: share of these pictures that the threshold is to cut off.
        score: see `Calibration`.

    Raises:
        DataError: under 20 pictures, or a rate outside [0, 0.5].
    """
    if len(logits) < MIN_PICTURES:
        raise DataError(
            f"{len(logits)} pictures are too few to fit a temperature on; give at least "
            f"{MIN_PICTURES} that were not trained on"
        )
    if not 0 <= rate <= 0.5:
        raise DataError(
            f"the rate of pictures to call out of domain must lie in [0, 0.5], not {rate}"
        )
    wide = logits.double()
    temperature = fit_temperature(wide, targets)
    scores = domain_score(wide, temperature, score)
    return Calibration(
        temperature=temperature,
        targets="labels" if targets.ndim == 1 else "teacher",
        num_images=len(logits),
        before=reliability(wide, targets),
        after=reliability(wide / temperature, targets),
        score=score,
        rate=rate,
        threshold=float(scores.quantile(rate)),
    )


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """T that minimises the cross-entropy of softmax(logits / T), within [0.02, 50].

    Convex in 1/T: its slope, mean over pictures of E[logit under softmax] - E[logit under target],
    rises, so its zero is found by halving, on a log scale.

    Args:
        logits: (N, C).
        targets: (N,) labels or (N, C) probabilities.
    """
    wide = logits.double()
    if targets.ndim == 1:
        wanted = wide.gather(1, targets[:, None]).mean()
    else:
        wanted = (targets.double() * wide).sum(dim=-1).mean()
    low, high = (math.log(1 / t) for t in reversed(_RANGE))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = ((wide * math.exp(middle)).softmax(dim=-1) * wide).sum(dim=-1).mean()
        low, high = (low, middle) if found > wanted else (middle, high)
    return math.exp(-(low + high) / 2)


def reliability(logits: Tensor, targets: Tensor) -> Reliability:
    """Expected calibration error of the highest probability, over 15 bins, and cross-entropy.

    With a teacher's probabilities for targets, a picture counts as right to the degree that the
    teacher believes in the student's answer.
    """
    log_probs = logits.double().log_softmax(dim=-1)
    confidence, best = log_probs.exp().max(dim=-1)
    if targets.ndim == 1:
        hits = (best == targets).double()
        entropy = -log_probs.gather(1, targets[:, None]).mean()
    else:
        hits = targets.double().gather(1, best[:, None]).squeeze(1)
        entropy = -(targets.double() * log_probs).sum(dim=-1).mean()
    bins, error = [], 0.0
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    for number in place.unique().tolist():
        inside = place == number
        # Rounded once: the order of the pictures doesn't matter.
        sure, right = (100 * fmean(part[inside].tolist()) for part in (confidence, hits))
        count = int(inside.sum())
        error += count / len(hits) * abs(sure - right)
        bins.append(Bin(100 * number / BINS, count, sure, right))
    return Reliability(error, tuple(bins), float(entropy))


def domain_score(logits: Tensor, temperature: float, score: Score) -> Tensor:
    """(N,): high for pictures like those of the calibration, low for foreign ones."""
    if score == "energy":
        return temperature * (logits / temperature).logsumexp(dim=-1)
    return (logits / temperature).softmax(dim=-1).amax(dim=-1)
