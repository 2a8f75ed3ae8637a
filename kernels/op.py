"""The registered operator `promptkd::kd_rows`: torch.compile and export keep it as one node.

Its forward pass computes the gradient as well, at the price of one product with W, and its
backward pass multiplies by what arrives. Triton is imported for a CUDA tensor only.
"""

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import configs, tiles

Scale = tuple[Tensor | None, float]

_SCHEMA = (
    "kd_rows(Tensor student, Tensor? student_scale, float student_scale_value, Tensor vectors, "
    "Tensor? teacher, Tensor? teacher_scale, float teacher_scale_value, Tensor? logits, "
    "Tensor? mu, Tensor? h, float temperature, str reduction, bool need_gradient) "
    "-> (Tensor, Tensor, Tensor)"
)


def _kd_rows(
    student: Tensor,
    student_scale: Tensor | None,
    student_scale_value: float,
    vectors: Tensor,
    teacher: Tensor | None,
    teacher_scale: Tensor | None,
    teacher_scale_value: float,
    logits: Tensor | None,
    mu: Tensor | None,
    h: Tensor | None,
    temperature: float,
    reduction: str,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return T² KL of each row divided as `reduction` says, and its gradients.

    Exactly one of teacher features, logits and (mu, h) is given. A scale is a 0-dim tensor, or
    None and its value. Returns (B,), (B, D) and (B,) in float32, or float64 for float64.
    """
    weight = 1.0
    if reduction != "none":
        weight /= student.shape[0] * (vectors.shape[0] if reduction == "paper" else 1)
    student_pair = (student_scale, student_scale_value)
    teacher_pair = (teacher_scale, teacher_scale_value)
    with torch.autocast(student.device.type, enabled=False):
        if _takes_kernels(student):
            from . import launch

            given = teacher if logits is None else logits
            kind: configs.Teacher = "none" if mu is not None else "features"
            with _device_of(student):
                return launch.kd_rows(
                    student.contiguous(),
                    _on_device(student_pair, student),
                    None if given is None else given.contiguous(),
                    kind if logits is None else "logits",
                    _on_device(teacher_pair, student),
                    (
                        None if mu is None else mu.contiguous(),
                        None if h is None else h.contiguous(),
                    ),
                    vectors.contiguous(),
                    temperature,
                    weight,
                    need_gradient,
                )
        return _in_tiles(
            student, student_pair, vectors, teacher, teacher_pair, logits, mu, h,
            temperature, weight, need_gradient,
        )  # fmt: skip


def _fake(
    student: Tensor,
    student_scale: Tensor | None,
    student_scale_value: float,
    vectors: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    batch = student.shape[0]
    return (
        student.new_empty(batch, dtype=dtype),
        student.new_empty(student.shape, dtype=dtype),
        student.new_empty(batch, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, student_scale, _, vectors = inputs[:4]
    assert vectors.ndim == 2
    ctx.set_materialize_grads(False)
    ctx.dtype = student.dtype
    ctx.scale_dtype = None if student_scale is None else student_scale.dtype
    ctx.save_for_backward(output[1], output[2])


def _backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    if any(x is not None for x in others):
        raise RuntimeError("kd_loss can be differentiated once; use kd_loss_reference for more")
    gradient, scale_gradient = ctx.saved_tensors
    out: list[Tensor | None] = [None] * 13
    if grad is not None and ctx.needs_input_grad[0]:
        out[0] = (gradient * grad[:, None]).to(ctx.dtype)
    if grad is not None and ctx.needs_input_grad[1]:
        out[1] = (scale_gradient * grad).sum().to(ctx.scale_dtype)
    return tuple(out)


# torch.library.custom_op would import torch._dynamo, seconds of it, at the first call.
_library = torch.library.Library("promptkd", "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("kd_rows", _kd_rows, "CPU")
_library.impl("kd_rows", _kd_rows, "CUDA")
torch.library.register_fake("promptkd::kd_rows", _fake, lib=_library)
torch.library.register_autograd(
    "promptkd::kd_rows", _backward, setup_context=_setup_context, lib=_library
)
kd_rows = torch.ops.promptkd.kd_rows.default


def _on_device(scale: Scale, like: Tensor) -> Scale:
    """A scale as the kernels take it: a number, or one float32 beside the features."""
    tensor, value = scale
    if tensor is None:
        return None, value
    if tensor.device != like.device:
        return None, float(tensor)
    return tensor.float(), value


def scaled_query(features: Tensor, scale: Scale, temperature: float, dtype: torch.dtype) -> Tensor:
    """Return scale · f/(‖f‖ T) (B, D); NaN where a norm is not finite."""
    unit, _ = _unit(features.to(dtype))
    return unit * ((scale[1] if scale[0] is None else scale[0]) / temperature)


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    norm = torch.where(norm < torch.inf, norm, torch.nan)
    return features / norm.clamp(min=1e-12), norm


def _in_tiles(
    student: Tensor,
    student_scale: Scale,
    vectors: Tensor,
    teacher: Tensor | None,
    teacher_scale: Scale,
    logits: Tensor | None,
    mu: Tensor | None,
    h: Tensor | None,
    temperature: float,
    weight: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch: KL and o_s − o_t from `tiles`, the gradients from these."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    unit, norm = _unit(student.to(dtype))
    scale = student_scale[1] if student_scale[0] is None else student_scale[0].to(dtype)
    query = unit * (scale / temperature)
    if mu is not None and h is not None:
        log_sum, delta = tiles.attend(query, vectors, need_gradient)
        kl = h.to(dtype) - torch.linalg.vecdot(query, mu.to(dtype)) + log_sum
        kl = torch.where((kl < 0) & kl.isfinite(), 0, kl)
        delta = delta - mu.to(dtype)
    else:
        q_t = None
        if teacher is not None:
            q_t = scaled_query(teacher, teacher_scale, temperature, dtype)
        kl, delta = tiles.kl_and_delta(query, q_t, logits, temperature, vectors, need_gradient)
    rows = kl * (temperature**2 * weight)
    if not need_gradient:
        return rows, torch.zeros_like(unit), torch.zeros_like(rows)
    along = torch.linalg.vecdot(unit, delta)
    # Below the smallest norm the divisor is constant, as in F.normalize.
    projection = torch.where(norm[:, 0] < 1e-12, 0, along)
    gradient = (delta - unit * projection[:, None]) / norm.clamp(min=1e-12)
    return rows, gradient * (weight * temperature * scale), along * (weight * temperature)


def statistics(
    features: Tensor, scale: Scale, vectors: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return μ (B, D) and h (B,) of a teacher; no gradients."""
    if _takes_kernels(features) and configs.fits_split(vectors.shape[1], vectors.element_size()):
        from . import launch

        with _device_of(features):
            return launch.statistics(
                features.contiguous(),
                _on_device(scale, features),
                vectors.contiguous(),
                temperature,
            )
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    query = scaled_query(features, scale, temperature, dtype)
    log_sum, mu = tiles.attend(query, vectors)
    return mu, torch.linalg.vecdot(query, mu) - log_sum


def top_k(features: Tensor, scale: Scale, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest probabilities (B, k) and their classes (B, k); no gradients."""
    if _takes_kernels(features) and k <= configs.TOP_K_LARGEST:
        from . import launch

        with _device_of(features):
            return launch.top_k(
                features.contiguous(), _on_device(scale, features), vectors.contiguous(), k
            )
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return tiles.top_k(scaled_query(features, scale, 1.0, dtype), vectors, k)


def _device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _takes_kernels(features: Tensor) -> bool:
    return features.is_cuda and features.dtype != torch.float64 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
