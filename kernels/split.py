# mypy: ignore-errors
"""Few images or a middling number of classes: attention over W, the classes split over CTAs.

Each program takes ROWS images, a run of class tiles and one side, and keeps that side's running
maximum m, the sum l = sum e^(z-m) and o = sum e^(z-m) w. With d = (z_t - m_t) - (z_s - m_s) the
teacher's side keeps c = E_t[d] and A = sum e^(z_t-m_t) (e^x - 1 - x), x = c - d, so that over all
classes

    KL = log E_t[e^(c-d)] = log1p(A / l_t)       (a sum of non-negative terms)
    KL = log l_s - log l_t + c                    (far from convergence, where e^x overflows)

The maxima come off before the difference, since a sum of z_t - z_s would be rounded as the logits
are, which may be a thousand times as large as KL.

`merge_kernel` joins the splits of a row in a fixed order and writes loss and gradient.
"""

import triton
import triton.language as tl

from .parts import FAR, MAX_X, dot, dot_weights, excess, inverse_norm, load_scale, log1p, write_row


@triton.jit
def attend_kernel(
    student_ptr,  # (B, D)
    teacher_ptr,  # (B, D) features, (B, N) logits, or None: the student's side alone
    vectors_ptr,  # (N, D)
    student_scale_ptr,  # () float32 or None
    student_scale,
    teacher_scale_ptr,
    teacher_scale,
    temperature,
    mean_ptr,  # (sides, S, B, D) float32, out: o
    state_ptr,  # (sides, 2, S, B) float32, out: m, l; then of the teacher (2, S, B): c, A
    B,
    N,
    D,
    tiles_per_split,
    TEACHER: tl.constexpr,  # "features", "logits" or "none"
    NEED_MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    D0: tl.constexpr,  # D as two powers of two: columns 0 .. D0 and D0 .. D0 + D1
    D1: tl.constexpr,  # 0: none
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write m, l, o of ROWS images over one split of the classes; the teacher's side c and A."""
    # Neighbouring programs read the same classes, so W comes from memory once.
    side = tl.program_id(1)
    split = tl.program_id(2)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = row < B
    d = tl.arange(0, WIDTH)
    d0 = tl.arange(0, D0)
    # The student's logits are needed on both sides, the teacher's on its own.
    teacher_width = tl.where(side == 1, D, 0)
    teacher_mask = row < tl.where(side == 1, B, 0)

    squares_s = tl.zeros([ROWS], tl.float32)
    squares_t = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        offsets = row[:, None] * D + (start + d)[None, :]
        mask = row_mask[:, None] & (start + d < D)[None, :]
        f = tl.load(student_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        squares_s += tl.sum(f * f, 1)
        if TEACHER == "features":
            f = tl.load(teacher_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            squares_t += tl.sum(f * f, 1)
    scale_s = load_scale(student_scale_ptr, student_scale) / temperature
    factor_s = inverse_norm(squares_s) * scale_s
    if TEACHER == "features":
        scale_t = load_scale(teacher_scale_ptr, teacher_scale) / temperature
        factor_t = inverse_norm(squares_t) * scale_t

    m = tl.full([ROWS], -float("inf"), tl.float32)
    m_s = tl.full([ROWS], -float("inf"), tl.float32)  # on both sides
    total = tl.zeros([ROWS], tl.float32)
    c = tl.zeros([ROWS], tl.float32)
    a = tl.zeros([ROWS], tl.float32)
    o0 = tl.zeros([ROWS, D0], tl.float32)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        o1 = tl.zeros([ROWS, D1], tl.float32)

    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(N, CLASSES))
    for tile in range(first, last):
        n = (tile * CLASSES + tl.arange(0, CLASSES)).to(tl.int64)
        class_mask = n < N
        z_s = logits_tile(
            student_ptr, vectors_ptr, row, n, B, N, D, D, ROWS, CLASSES, WIDTH, PRECISION, UPCAST
        )
        z_s = z_s * factor_s[:, None]
        z = z_s
        if TEACHER == "features":
            z_t = logits_tile(
                teacher_ptr, vectors_ptr, row, n, B, N, D, teacher_width,
                ROWS, CLASSES, WIDTH, PRECISION, UPCAST,
            )  # fmt: skip
            z_t = z_t * factor_t[:, None]
        if TEACHER == "logits":
            mask = teacher_mask[:, None] & class_mask[None, :]
            z_t = tl.load(teacher_ptr + row[:, None] * N + n[None, :], mask=mask, other=0.0)
            z_t = z_t.to(tl.float32) / temperature
        if TEACHER != "none":
            z = tl.where(side == 1, z_t, z_s)
        z = tl.where(class_mask[None, :], z, -float("inf"))
        new_m = tl.maximum(m, tl.max(z, 1))
        rise = tl.where(tile > first, new_m - m, 0.0)
        alpha = tl.exp(-rise)
        z = z - new_m[:, None]
        p = tl.exp(z)
        before = total * alpha
        total = before + tl.sum(p, 1)
        m = new_m
        if TEACHER != "none":
            new_m = tl.maximum(m_s, tl.max(tl.where(class_mask[None, :], z_s, -float("inf")), 1))
            c += tl.where(tile > first, new_m - m_s, 0.0) - rise
            m_s = new_m
            difference = tl.where(class_mask[None, :], z - (z_s - m_s[:, None]), 0.0)
            new_c = (before * c + tl.sum(p * difference, 1)) / total
            step = tl.where(tile > first, new_c - c, 0.0)
            x = tl.where(class_mask[None, :], new_c[:, None] - difference, 0.0)
            # Not undone later: beside a new maximum the old sum may fall out of range.
            far = (tl.maximum(step, tl.max(x, 1)) > MAX_X) | (a >= FAR)
            moved = a * alpha * tl.exp(tl.minimum(step, MAX_X)) + before * excess(step)
            a = tl.where(far, FAR, moved + tl.sum(p * excess(x), 1))
            c = new_c
        if NEED_MEAN:
            w = tl.load(
                vectors_ptr + n[:, None] * D + d0[None, :],
                mask=class_mask[:, None] & (d0 < D)[None, :],
                other=0.0,
            )
            o0 = dot_weights(p, w, o0 * alpha[:, None], PRECISION, UPCAST)
            if D1 > 0:
                w = tl.load(
                    vectors_ptr + n[:, None] * D + d1[None, :],
                    mask=class_mask[:, None] & (d1 < D)[None, :],
                    other=0.0,
                )
                o1 = dot_weights(p, w, o1 * alpha[:, None], PRECISION, UPCAST)

    splits = tl.num_programs(2).to(tl.int64)
    at = split * B + row
    size = splits * B
    tl.store(state_ptr + side * 2 * size + at, m, mask=row_mask)
    tl.store(state_ptr + (side * 2 + 1) * size + at, total, mask=row_mask)
    if TEACHER != "none":
        tl.store(state_ptr + 4 * size + at, c, mask=teacher_mask)
        tl.store(state_ptr + 5 * size + at, a, mask=teacher_mask)
    if NEED_MEAN:
        offsets = (side * size + at)[:, None] * D
        mask = row_mask[:, None] & (d0 < D)[None, :]
        tl.store(mean_ptr + offsets + d0[None, :], o0, mask=mask)
        if D1 > 0:
            mask = row_mask[:, None] & (d1 < D)[None, :]
            tl.store(mean_ptr + offsets + d1[None, :], o1, mask=mask)


@triton.jit
def logits_tile(
    features_ptr, vectors_ptr, row, n, B, N, D, width,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """f W^T (ROWS, CLASSES) over the first `width` columns, not yet scaled."""
    d = tl.arange(0, WIDTH)
    z = tl.zeros([ROWS, CLASSES], tl.float32)
    for start in range(0, width, WIDTH):
        width_mask = start + d < D
        w = tl.load(
            vectors_ptr + n[:, None] * D + (start + d)[None, :],
            mask=(n < N)[:, None] & width_mask[None, :],
            other=0.0,
        )
        f = tl.load(
            features_ptr + row[:, None] * D + (start + d)[None, :],
            mask=(row < B)[:, None] & width_mask[None, :],
            other=0.0,
        )
        z = dot(f, tl.trans(w), z, PRECISION, UPCAST)
    return z


@triton.jit
def join_sums(state_ptr, row, B, S, BLOCK_S: tl.constexpr):
    """Of one side of a row: maximum, sum, and each split's share e^(m_i - m) / l."""
    i = tl.arange(0, BLOCK_S)
    mask = i < S
    m = tl.load(state_ptr + i.to(tl.int64) * B + row, mask=mask, other=-float("inf"))
    sums = tl.load(state_ptr + (S + i).to(tl.int64) * B + row, mask=mask, other=0.0)
    top = tl.max(m, 0)
    factors = tl.where(mask, tl.exp(m - top), 0.0)
    total = tl.sum(factors * sums, 0)
    return top, total, factors / total, sums


@triton.jit
def join_means(mean_ptr, state_ptr, row, top, total, B, S, D, BLOCK_D: tl.constexpr):
    """o of one side of a row: sum over the splits, eight at a time, in order."""
    d = tl.arange(0, BLOCK_D)
    mean = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, S, 8):
        i = (start + tl.arange(0, 8)).to(tl.int64)
        m = tl.load(state_ptr + i * B + row, mask=i < S, other=-float("inf"))
        share = tl.where(i < S, tl.exp(m - top) / total, 0.0)
        mask = (i < S)[:, None] & (d < D)[None, :]
        part = tl.load(mean_ptr + (i[:, None] * B + row) * D + d[None, :], mask=mask, other=0.0)
        mean += tl.sum(part * share[:, None], 0)
    return mean


@triton.jit
def merge_kernel(
    student_ptr,  # (B, D)
    mu_ptr,  # (B, D) of the teacher's statistics, or None
    h_ptr,  # (B,), or None
    student_scale_ptr,  # () float32 or None
    student_scale,
    temperature,
    weight,
    mean_ptr,  # (2, S, B, D) float32
    state_ptr,  # (6, S, B) float32
    loss_ptr,  # (B,) float32
    gradient_ptr,  # (B, D) float32
    scale_gradient_ptr,  # (B,) float32
    B,
    S,
    D,
    NEED_GRADIENT: tl.constexpr,
    BLOCK_S: tl.constexpr,  # power of two >= S
    BLOCK_D: tl.constexpr,  # power of two >= D
):
    """Join the splits of one row and write its loss and gradients."""
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    size = tl.cast(S, tl.int64) * B
    scale = load_scale(student_scale_ptr, student_scale)
    top_s, total_s, _, _ = join_sums(state_ptr, row, B, S, BLOCK_S)
    log_sum_s = top_s + tl.log(total_s)
    delta = tl.zeros([BLOCK_D], tl.float32)
    if NEED_GRADIENT:
        delta = join_means(mean_ptr, state_ptr, row, top_s, total_s, B, S, D, BLOCK_D)
    if mu_ptr is None:
        teacher_ptr = state_ptr + 2 * size
        top_t, total_t, share, sums = join_sums(teacher_ptr, row, B, S, BLOCK_S)
        i = tl.arange(0, BLOCK_S).to(tl.int64)
        at = i * B + row
        # c of a split is less that split's maxima
        drop_s = top_s - tl.load(state_ptr + at, mask=i < S, other=0.0)
        drop_t = top_t - tl.load(teacher_ptr + at, mask=i < S, other=0.0)
        c_i = tl.load(state_ptr + 4 * size + at, mask=i < S, other=0.0) + (drop_s - drop_t)
        a_i = tl.load(state_ptr + 5 * size + at, mask=i < S, other=0.0)
        c = tl.sum(share * sums * c_i, 0)
        step = tl.where(i < S, c - c_i, 0.0)
        far = (tl.max(step, 0) > MAX_X) | (tl.max(a_i, 0) >= FAR)
        grown = a_i * tl.exp(tl.minimum(step, MAX_X)) + sums * excess(step)
        a = tl.sum(tl.where(far, 0.0, share * grown), 0)
        plain = tl.log(total_s) - tl.log(total_t) + c
        kl = tl.where(far | (a > 1.0), plain, log1p(a))
        if NEED_GRADIENT:
            delta -= join_means(
                mean_ptr + size * D, teacher_ptr, row, top_t, total_t, B, S, D, BLOCK_D
            )
    else:
        offsets = row.to(tl.int64) * D + d
        mu = tl.load(mu_ptr + offsets, mask=d < D, other=0.0).to(tl.float32)
        f = tl.load(student_ptr + offsets, mask=d < D, other=0.0).to(tl.float32)
        along = tl.sum(f * mu) * inverse_norm(tl.sum(f * f))
        kl = tl.load(h_ptr + row).to(tl.float32) - along * scale / temperature + log_sum_s
        delta -= mu
    write_row(
        row,
        kl,
        delta,
        None,
        student_ptr,
        loss_ptr,
        gradient_ptr,
        scale_gradient_ptr,
        scale,
        temperature,
        weight,
        D,
        NEED_GRADIENT,
        BLOCK_D,
    )


@triton.jit
def merge_statistics_kernel(
    features_ptr,  # (B, D)
    scale_ptr,  # () float32 or None
    scale,
    temperature,
    mean_ptr,  # (1, S, B, D) float32
    state_ptr,  # (2, S, B) float32
    mu_ptr,  # (B, D) float32
    h_ptr,  # (B,) float32
    B,
    S,
    D,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """mu = o and h = (s/T) f_hat . o - lse."""
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    top, total, _, _ = join_sums(state_ptr, row, B, S, BLOCK_S)
    mean = join_means(mean_ptr, state_ptr, row, top, total, B, S, D, BLOCK_D)
    offsets = row.to(tl.int64) * D + d
    f = tl.load(features_ptr + offsets, mask=d < D, other=0.0).to(tl.float32)
    along = tl.sum(f * mean) * inverse_norm(tl.sum(f * f))
    factor = load_scale(scale_ptr, scale) / temperature
    tl.store(mu_ptr + offsets, mean, mask=d < D)
    tl.store(h_ptr + row, along * factor - top - tl.log(total))
