# mypy: ignore-errors
"""The k likeliest classes of each image and the log of the normaliser, without all logits.

A logit and its class make one int64 key: the logit's bits, ordered as integers, above the
inverted class number. So the largest keys are the largest logits, the lower class first where
two are equal, and the result does not depend on the order of work.
"""

import triton
import triton.language as tl

from .parts import dot, inverse_norm, load_scale

LOWEST = tl.constexpr(-(2**63))


@triton.jit
def top_k_kernel(
    features_ptr,  # (B, D)
    vectors_ptr,  # (N, D)
    scale_ptr,  # () float32 or None
    scale,
    key_ptr,  # (S, B, K) int64, out
    state_ptr,  # (2, S, B) float32, out: m, l
    B,
    N,
    D,
    tiles_per_split,
    K: tl.constexpr,  # power of two, at most CLASSES
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the K best keys, m and l of ROWS images over one split of the classes."""
    split = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = row < B
    d = tl.arange(0, WIDTH)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    best = tl.full([ROWS, K], LOWEST, tl.int64)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(N, CLASSES))
    for tile in range(first, last):
        n = (tile * CLASSES + tl.arange(0, CLASSES)).to(tl.int64)
        class_mask = n < N
        z = tl.zeros([ROWS, CLASSES], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
        for start in range(0, D, WIDTH):
            width_mask = start + d < D
            w = tl.load(
                vectors_ptr + n[:, None] * D + (start + d)[None, :],
                mask=class_mask[:, None] & width_mask[None, :],
                other=0.0,
            )
            f = tl.load(
                features_ptr + row[:, None] * D + (start + d)[None, :],
                mask=row_mask[:, None] & width_mask[None, :],
                other=0.0,
            )
            z = dot(f, tl.trans(w), z, PRECISION, UPCAST)
            f = f.to(tl.float32)
            squares += tl.sum(f * f, 1)
        z = z * (inverse_norm(squares) * load_scale(scale_ptr, scale))[:, None]
        bits = z.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = (bits.to(tl.int64) << 32) + (4294967295 - n)[None, :]
        key = tl.where(class_mask[None, :], key, LOWEST)
        both = tl.join(best, tl.topk(key, K, dim=1))
        best = tl.topk(tl.reshape(both, [ROWS, 2 * K]), K, dim=1)
        z = tl.where(class_mask[None, :], z, -float("inf"))
        new_m = tl.maximum(m, tl.max(z, 1))
        total = total * tl.exp(m - new_m) + tl.sum(tl.exp(z - new_m[:, None]), 1)
        m = new_m
    at = split * B + row
    size = tl.num_programs(1).to(tl.int64) * B
    tl.store(state_ptr + at, m, mask=row_mask)
    tl.store(state_ptr + size + at, total, mask=row_mask)
    places = at[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(key_ptr + places, best, mask=row_mask[:, None])
