# mypy: ignore-errors
"""Device functions the kernels share: products, norms, e^x - 1 - x, and the end of a row."""

import triton
import triton.language as tl

NEAR_X = tl.constexpr(0.25)  # below it e^x - 1 - x is summed as a series
MAX_X = tl.constexpr(32.0)  # above it e^x could overflow a sum
FAR = tl.constexpr(1e20)  # stands for a sum of e^x that went beyond MAX_X; it stays


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b in float32. UPCAST: the interpreter multiplies bfloat16 as integers."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_weights(p, w, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + p w for float32 weights p; beside half-precision w as a high and a low part."""
    high = p.to(w.dtype)
    acc = dot(high, w, acc, PRECISION, UPCAST)
    if w.dtype != tl.float32:
        low = (p - high.to(tl.float32)).to(w.dtype)
        acc = dot(low, w, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def load_scale(ptr, value):
    """A scale given as a number, or as a pointer to one float32 (no host synchronisation)."""
    if ptr is None:
        return value
    else:
        return tl.load(ptr).to(tl.float32)


@triton.jit
def inverse_norm(squares):
    """1/max(norm, 1e-12) from the sum of squares; NaN where that is not finite."""
    inverse = 1.0 / tl.maximum(tl.sqrt_rn(squares), 1e-12)
    return tl.where(squares < float("inf"), inverse, float("nan"))


@triton.jit
def excess(x):
    """e^x - 1 - x without cancellation, for x up to MAX_X; what is above counts as MAX_X."""
    y = tl.minimum(tl.maximum(x, -NEAR_X), NEAR_X)
    series = 1.0 / 5040 * y + 1.0 / 720
    series = series * y + 1.0 / 120
    series = series * y + 1.0 / 24
    series = series * y + 1.0 / 6
    series = (series * y + 0.5) * y * y
    return tl.where(tl.abs(x) < NEAR_X, series, tl.exp(tl.minimum(x, MAX_X)) - 1.0 - x)


@triton.jit
def log1p(y):
    """log(1 + y) for 0 <= y <= 1, to float32's last digits: 2 atanh(y / (2 + y))."""
    s = y / (2.0 + y)
    q = s * s
    series = 1.0 / 15 * q + 1.0 / 13
    series = series * q + 1.0 / 11
    series = series * q + 1.0 / 9
    series = series * q + 1.0 / 7
    series = series * q + 1.0 / 5
    series = series * q + 1.0 / 3
    series = series * q + 1.0
    return 2.0 * s * series


@triton.jit
def not_negative(kl):
    """Clamp at 0, letting what is not finite through."""
    return tl.where((kl < 0.0) & (kl > -float("inf")), 0.0, kl)


@triton.jit
def write_row(
    row,  # of the batch
    kl,  # KL(p_t || p_s)
    delta,  # [BLOCK_D] o_s - o_t
    along,  # f_hat . delta, or None to take it from delta
    student_ptr,  # (B, D)
    loss_ptr,  # (B,) float32
    gradient_ptr,  # (B, D) float32, with respect to the raw student features
    scale_gradient_ptr,  # (B,) float32
    scale,
    temperature,
    weight,
    D,
    NEED_GRADIENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write loss, gradient and scale gradient of one row.

    loss = w T^2 KL; d/df = w T s (delta - f_hat (f_hat . delta)) / |f|; d/ds = w T f_hat . delta.
    """
    tl.store(loss_ptr + row, not_negative(kl) * temperature * temperature * weight)
    if NEED_GRADIENT:
        d = tl.arange(0, BLOCK_D)
        offsets = row.to(tl.int64) * D + d
        f = tl.load(student_ptr + offsets, mask=d < D, other=0.0).to(tl.float32)
        squares = tl.sum(f * f)
        inverse = inverse_norm(squares)
        f_hat = f * inverse
        projection = tl.sum(f_hat * delta)
        if along is None:
            along = projection
        tl.store(scale_gradient_ptr + row, weight * temperature * along)
        # below the smallest norm the divisor is constant, as in F.normalize
        projection = tl.where(squares < 1e-24, 0.0, projection)
        gradient = weight * temperature * scale * inverse * (delta - f_hat * projection)
        tl.store(gradient_ptr + offsets, gradient, mask=d < D)
