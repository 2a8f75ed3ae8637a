"""The distillation loss: T² KL(teacher || student) over the class vectors, without labels.

The paper's equation (PromptKD, stage 2), with `z = scale · cos(features, class vectors) / T`:

    L = T² · Σ_b Σ_c p_t log(p_t / p_s),   p = softmax(z)

`kd_loss_reference` says the same in plain torch and in any dtype. `kd_loss` takes the fused path
of `promptkd.kernels` where there is one (CPU and CUDA, float32 and half precision), which never
writes the B x C logits; Triton is imported for a CUDA tensor only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from promptkd.kernels import op
except ImportError:  # a checkout that turned the link to kernels/ into a text file
    op = None  # type: ignore[assignment]

__all__ = [
    "Reduction",
    "Teacher",
    "TeacherLogits",
    "TeacherStatistics",
    "kd_loss",
    "kd_loss_reference",
    "teacher_statistics",
    "top_k",
]

Reduction: TypeAlias = Literal["batchmean", "paper", "none"]
Scale: TypeAlias = float | Tensor
EPSILON = 1e-12  # smallest norm a feature is divided by, as in F.normalize


@dataclass(frozen=True, slots=True)
class TeacherStatistics:
    """All the loss needs of a teacher whose classes, scale and temperature are fixed."""

    mu: Tensor
    """(B, D): the class vectors averaged with the teacher's probabilities."""
    h: Tensor
    """(B,): Σ_c p_t log p_t, the negative entropy of the teacher's probabilities."""


@dataclass(frozen=True, slots=True)
class TeacherLogits:
    """A teacher given by its answers alone."""

    logits: Tensor
    """(B, C): already multiplied by the teacher's logit scale, not divided by the temperature."""


Teacher: TypeAlias = Tensor | TeacherStatistics | TeacherLogits


def kd_loss(
    student_features: Tensor,
    teacher: Teacher,
    class_vectors: Tensor,
    *,
    student_scale: Scale,
    teacher_scale: Scale | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Return T² KL(teacher || student) over the classes.

    Gradients go to `student_features` (through their normalisation) and to `student_scale`
    where it is a tensor that asks for one; never to the teacher or the class vectors. It can be
    differentiated once. Sums are in float32; float32 products on a GPU follow
    `torch.set_float32_matmul_precision`.

    Args:
        student_features: (B, D), of any length; they are normalised here.
        teacher: features (B, D), `TeacherStatistics` or `TeacherLogits`.
        class_vectors: (C, D) with unit rows, or such rows less their mean.
        student_scale: exp(logit scale), a number or a 0-dim tensor.
        teacher_scale: the same of the teacher; with teacher features only.
        temperature: T; softens both sides.
        reduction: "batchmean" divides the sum by B, "paper" by B·C, "none" gives (B,).

    Raises:
        ValueError: shapes, reduction, temperature or scales do not fit.
        TypeError: dtypes do not fit.
    """
    if not _is_fused(class_vectors):
        return kd_loss_reference(
            student_features,
            teacher,
            class_vectors,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            temperature=temperature,
            reduction=reduction,
        )
    _check(student_features, teacher, class_vectors, teacher_scale, temperature, reduction)
    _check_scales(student_scale, teacher_scale)
    vectors = class_vectors.detach()
    features, logits, mu, h = None, None, None, None
    if isinstance(teacher, TeacherStatistics):
        mu, h = teacher.mu.detach(), teacher.h.detach()
    elif isinstance(teacher, TeacherLogits):
        logits = teacher.logits.detach()
    else:
        features = teacher.detach().to(vectors.dtype)
    needs = student_features.requires_grad or (
        isinstance(student_scale, Tensor) and student_scale.requires_grad
    )
    rows: Tensor = op.kd_rows(
        student_features.to(vectors.dtype),
        *_as_pair(student_scale),
        vectors,
        features,
        *_as_pair(1.0 if teacher_scale is None else _detached(teacher_scale)),
        logits,
        mu,
        h,
        float(temperature),
        reduction,
        needs and torch.is_grad_enabled(),
    )[0]
    return rows if reduction == "none" else rows.sum()


def kd_loss_reference(
    student_features: Tensor,
    teacher: Teacher,
    class_vectors: Tensor,
    *,
    student_scale: Scale,
    teacher_scale: Scale | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Return what `kd_loss` returns, in plain torch with all B x C logits written.

    Half-precision inputs are computed in float32, float64 inputs in float64.
    """
    _check(student_features, teacher, class_vectors, teacher_scale, temperature, reduction)
    _check_scales(student_scale, teacher_scale)
    dtype = _compute_dtype(class_vectors)
    vectors = class_vectors.detach().to(dtype)
    student = F.normalize(student_features.to(dtype), dim=1, eps=EPSILON)
    log_p = F.log_softmax(student @ vectors.T * (student_scale / temperature), dim=1)
    if isinstance(teacher, TeacherStatistics):
        # Σ p_t log p_t − Σ p_t log p_s, where Σ p_t z_s = (scale/T) f·μ and lse = z − log p.
        mu, h = teacher.mu.detach().to(dtype), teacher.h.detach().to(dtype)
        first = student @ vectors[0] * (student_scale / temperature)
        log_sum = first - log_p[:, 0]
        rows = h - (student * mu).sum(1) * (student_scale / temperature) + log_sum
        clamped = torch.where((rows < 0) & rows.isfinite(), 0, rows)
        rows = rows + (clamped - rows).detach()  # never negative, gradient untouched
    else:
        if isinstance(teacher, TeacherLogits):
            logits = teacher.logits.detach().to(dtype)
        else:
            assert teacher_scale is not None
            features = F.normalize(teacher.detach().to(dtype), dim=1, eps=EPSILON)
            logits = features @ vectors.T * _detached(teacher_scale)
        log_q = F.log_softmax(logits / temperature, dim=1)
        rows = (log_q.exp() * (log_q - log_p)).sum(1)
    return _reduce(rows * temperature**2, class_vectors.shape[0], reduction)


def teacher_statistics(
    teacher_features: Tensor,
    class_vectors: Tensor,
    *,
    teacher_scale: Scale,
    temperature: float,
) -> TeacherStatistics:
    """Return (μ, h) of a teacher, from which `kd_loss` gives the same loss and gradient.

    Valid for these class vectors, this scale and this temperature only.

    Args:
        teacher_features: (B, D), of any length.
        class_vectors: (C, D).
        teacher_scale: exp(logit scale), a number or a 0-dim tensor.
        temperature: T.

    Raises:
        ValueError, TypeError: as `kd_loss`.
    """
    _check(teacher_features, teacher_features, class_vectors, teacher_scale, temperature)
    _check_scales(teacher_scale)
    if _is_fused(class_vectors):
        with torch.no_grad(), torch.autocast(class_vectors.device.type, enabled=False):
            features = teacher_features.to(class_vectors.dtype)
            pair = _as_pair(teacher_scale)
            return TeacherStatistics(*op.statistics(features, pair, class_vectors, temperature))
    dtype = _compute_dtype(class_vectors)
    with torch.no_grad():
        vectors = class_vectors.to(dtype)
        features = F.normalize(teacher_features.to(dtype), dim=1, eps=EPSILON)
        log_q = F.log_softmax(features @ vectors.T * (teacher_scale / temperature), dim=1)
        q = log_q.exp()
        return TeacherStatistics(mu=q @ vectors, h=(q * log_q).sum(1))


def top_k(
    features: Tensor, class_vectors: Tensor, k: int, *, scale: Scale
) -> tuple[Tensor, Tensor]:
    """Return the softmax probabilities (B, k) and indices (B, k) of the k likeliest classes.

    Args:
        features: (B, D), of any length.
        class_vectors: (C, D).
        k: from 1 to C.
        scale: exp(logit scale), a number or a 0-dim tensor.

    Raises:
        ValueError, TypeError: as `kd_loss`, and where k is not from 1 to C.
    """
    _check(features, features, class_vectors, scale, 1.0)
    _check_scales(scale)
    if not 1 <= k <= class_vectors.shape[0]:
        raise ValueError(f"k is {k}, but must be from 1 to the {class_vectors.shape[0]} classes")
    if _is_fused(class_vectors):
        with torch.no_grad(), torch.autocast(class_vectors.device.type, enabled=False):
            features = features.to(class_vectors.dtype)
            return op.top_k(features, _as_pair(scale), class_vectors, k)
    dtype = _compute_dtype(class_vectors)
    with torch.no_grad():
        normed = F.normalize(features.to(dtype), dim=1, eps=EPSILON)
        values, indices = torch.topk(normed @ class_vectors.to(dtype).T * scale, k, dim=1)
        log_sum = torch.logsumexp(normed @ class_vectors.to(dtype).T * scale, dim=1)
        return (values - log_sum[:, None]).exp(), indices


def _reduce(rows: Tensor, num_classes: int, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return rows
    divisor = rows.shape[0] * (num_classes if reduction == "paper" else 1)
    return rows.sum() / divisor


def _is_fused(class_vectors: Tensor) -> bool:
    """Whether the kernels take these; float64 is for checking, so it stays with the reference."""
    return (
        op is not None
        and class_vectors.device.type in ("cpu", "cuda")
        and class_vectors.dtype in (torch.float32, torch.float16, torch.bfloat16)
    )


def _as_pair(scale: Scale) -> tuple[Tensor | None, float]:
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))


def _detached(scale: Scale) -> Scale:
    return scale.detach() if isinstance(scale, Tensor) else scale


def _compute_dtype(class_vectors: Tensor) -> torch.dtype:
    return torch.promote_types(class_vectors.dtype, torch.float32)


def _check(
    features: Tensor,
    teacher: Teacher,
    class_vectors: Tensor,
    teacher_scale: Scale | None,
    temperature: float,
    reduction: str = "none",
) -> None:
    """Raise one clear sentence where the arguments do not fit each other."""
    if reduction not in ("batchmean", "paper", "none"):
        raise ValueError(f"reduction is {reduction!r}, not 'batchmean', 'paper' or 'none'")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, but must be positive and finite")
    if class_vectors.ndim != 2 or 0 in class_vectors.shape:
        raise ValueError(f"class_vectors have shape {tuple(class_vectors.shape)}, not (C, D)")
    if not class_vectors.is_floating_point():
        raise TypeError(f"class_vectors are {class_vectors.dtype}, not floating point")
    if features.ndim != 2 or features.shape[0] == 0:
        raise ValueError(f"features have shape {tuple(features.shape)}, not (B, D)")
    batch, (classes, width) = features.shape[0], class_vectors.shape
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [("features", features, (batch, width))]
    if isinstance(teacher, TeacherStatistics):
        expected += [("mu", teacher.mu, (batch, width)), ("h", teacher.h, (batch,))]
    elif isinstance(teacher, TeacherLogits):
        expected += [("teacher logits", teacher.logits, (batch, classes))]
    else:
        expected += [("teacher features", teacher, (batch, width))]
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} have shape {tuple(tensor.shape)}, but {shape} is needed for "
                f"{batch} images and class_vectors of shape {(classes, width)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} are {tensor.dtype}, not floating point")
        if tensor.device != class_vectors.device:
            raise ValueError(
                f"{name} are on {tensor.device}, but class_vectors on {class_vectors.device}"
            )
        exact = torch.promote_types(tensor.dtype, class_vectors.dtype) == class_vectors.dtype
        if name.endswith("features") and not exact:
            raise TypeError(
                f"{name} are {tensor.dtype} and class_vectors {class_vectors.dtype}; "
                f"give class_vectors in {torch.promote_types(tensor.dtype, class_vectors.dtype)}"
            )
    if isinstance(teacher, Tensor) and teacher_scale is None:
        raise ValueError("teacher features need teacher_scale")
    if not isinstance(teacher, Tensor) and teacher_scale is not None:
        raise ValueError("teacher_scale goes with teacher features only; leave it out")


def _check_scales(*scales: Scale | None) -> None:
    for scale in scales:
        if isinstance(scale, Tensor) and scale.ndim != 0:
            raise ValueError(f"a scale has shape {tuple(scale.shape)}, not a number or 0-dim")
