# mypy: ignore-errors
"""Few classes (N <= 512): all logits of a row block stay in registers; one launch.

z = scale (f / |f|) W^T / T        lse, p exact
KL = sum p_t (e^x - 1 - x),        x = log p_s - log p_t      (cannot be negative)
dF_s = w T s (g W - f_hat u) / |f|,    g = p_s - p_t,  u = f_hat . (g W) = sum g z_s T/s
"""

import triton
import triton.language as tl

from .parts import dot, dot_weights, excess, inverse_norm, load_scale, not_negative


@triton.jit
def small_kernel(
    student_ptr,  # (B, D)
    teacher_ptr,  # (B, D) features, or (B, N) logits
    vectors_ptr,  # (N, D)
    student_scale_ptr,  # () float32 or None
    student_scale,
    teacher_scale_ptr,
    teacher_scale,
    temperature,
    weight,
    loss_ptr,  # (B,) float32
    gradient_ptr,  # (B, D) float32
    scale_gradient_ptr,  # (B,) float32
    B,
    N,
    D,
    TEACHER_LOGITS: tl.constexpr,
    NEED_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,  # power of two >= N
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write loss and gradients of ROWS images."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    n = tl.arange(0, CLASSES)
    d = tl.arange(0, WIDTH)
    row_mask = row < B
    class_mask = n < N
    z_s = tl.zeros([ROWS, CLASSES], tl.float32)
    z_t = tl.zeros([ROWS, CLASSES], tl.float32)
    squares_s = tl.zeros([ROWS], tl.float32)
    squares_t = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        width_mask = d + start < D
        f_mask = row_mask[:, None] & width_mask[None, :]
        w_mask = class_mask[:, None] & width_mask[None, :]
        w = tl.load(vectors_ptr + n[:, None] * D + (start + d)[None, :], mask=w_mask, other=0.0)
        f_offsets = row[:, None] * D + (start + d)[None, :]
        f = tl.load(student_ptr + f_offsets, mask=f_mask, other=0.0)
        z_s = dot(f, tl.trans(w), z_s, PRECISION, UPCAST)
        f = f.to(tl.float32)
        squares_s += tl.sum(f * f, 1)
        if not TEACHER_LOGITS:
            f = tl.load(teacher_ptr + f_offsets, mask=f_mask, other=0.0)
            z_t = dot(f, tl.trans(w), z_t, PRECISION, UPCAST)
            f = f.to(tl.float32)
            squares_t += tl.sum(f * f, 1)

    scale = load_scale(student_scale_ptr, student_scale)
    inverse = inverse_norm(squares_s)
    z_s = z_s * (inverse * scale / temperature)[:, None]
    if TEACHER_LOGITS:
        offsets = row[:, None] * N + n[None, :]
        mask = row_mask[:, None] & class_mask[None, :]
        z_t = tl.load(teacher_ptr + offsets, mask=mask, other=0.0).to(tl.float32) / temperature
    else:
        scale_t = load_scale(teacher_scale_ptr, teacher_scale)
        z_t = z_t * (inverse_norm(squares_t) * scale_t / temperature)[:, None]

    z_s = tl.where(class_mask[None, :], z_s, -float("inf"))
    z_t = tl.where(class_mask[None, :], z_t, -float("inf"))
    z_s = z_s - tl.max(z_s, 1)[:, None]
    z_t = z_t - tl.max(z_t, 1)[:, None]
    log_s = z_s - tl.log(tl.sum(tl.exp(z_s), 1))[:, None]
    log_t = z_t - tl.log(tl.sum(tl.exp(z_t), 1))[:, None]
    p_s = tl.exp(log_s)
    p_t = tl.exp(log_t)
    log_s = tl.where(class_mask[None, :], log_s, 0.0)
    x = log_s - tl.where(class_mask[None, :], log_t, 0.0)
    near = tl.abs(x) < 0.25
    small_excess = p_t * excess(tl.where(near, x, 0.0))
    terms = tl.where(near, small_excess, p_s - p_t - p_t * x)
    kl = not_negative(tl.sum(terms, 1))
    tl.store(loss_ptr + row, kl * temperature * temperature * weight, mask=row_mask)

    if NEED_GRADIENT:
        g = tl.where(near, p_t * x + small_excess, p_s - p_t)
        # sum g = 0, so any constant may be taken off z_s; lse_s leaves the smallest terms
        along = tl.sum(g * log_s, 1) * temperature / scale
        tl.store(scale_gradient_ptr + row, weight * temperature * along, mask=row_mask)
        along = tl.where(squares_s < 1e-24, 0.0, along)  # as in F.normalize
        factor = weight * temperature * scale * inverse
        for start in range(0, D, WIDTH):
            width_mask = d + start < D
            f_mask = row_mask[:, None] & width_mask[None, :]
            w_mask = class_mask[:, None] & width_mask[None, :]
            w = tl.load(vectors_ptr + n[:, None] * D + (start + d)[None, :], mask=w_mask, other=0.0)
            out = tl.zeros([ROWS, WIDTH], tl.float32)
            out = dot_weights(g, w, out, PRECISION, UPCAST)
            f_offsets = row[:, None] * D + (start + d)[None, :]
            f = tl.load(student_ptr + f_offsets, mask=f_mask, other=0.0).to(tl.float32)
            f_hat = f * inverse[:, None]
            gradient = factor[:, None] * (out - f_hat * along[:, None])
            tl.store(gradient_ptr + f_offsets, gradient, mask=f_mask)
