# mypy: ignore-errors
"""Many images and many classes: exact lse first, then p_s - p_t chunk by chunk for torch.mm.

    1. statistics_kernel   m and l of both sides, for each split of the classes
    2. difference_kernel   logits again; KL = sum p_t (e^x - 1 - x), u = sum g log p_s, and
                           g = p_s - p_t of one chunk of classes into a scratch (B, chunk);
                           beside statistics g = p_s
       torch.mm            o_s - o_t += g W, chunk by chunk
    3. finish_kernel       loss, gradient, scale gradient of each row

g is stored divided by the row's largest probability, so that half precision keeps it when each
of a million classes is unlikely. No atomics: every program adds to places of its own, in order.
"""

import triton
import triton.language as tl

from .parts import dot, excess, inverse_norm, load_scale, write_row


@triton.jit
def logits_tile(
    student_ptr,
    teacher_ptr,
    vectors_ptr,
    row,
    n,
    temperature,
    B,
    N,
    D,
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """f W^T of a tile for both sides, not yet scaled (given logits: divided by T)."""
    d = tl.arange(0, WIDTH)
    row_mask = row < B
    class_mask = n < N
    z_s = tl.zeros([ROWS, CLASSES], tl.float32)
    z_t = tl.zeros([ROWS, CLASSES], tl.float32)
    for start in range(0, D, WIDTH):
        width_mask = start + d < D
        w = tl.load(
            vectors_ptr + n[:, None] * D + (start + d)[None, :],
            mask=class_mask[:, None] & width_mask[None, :],
            other=0.0,
        )
        offsets = row[:, None] * D + (start + d)[None, :]
        mask = row_mask[:, None] & width_mask[None, :]
        f = tl.load(student_ptr + offsets, mask=mask, other=0.0)
        z_s = dot(f, tl.trans(w), z_s, PRECISION, UPCAST)
        if TEACHER == "features":
            f = tl.load(teacher_ptr + offsets, mask=mask, other=0.0)
            z_t = dot(f, tl.trans(w), z_t, PRECISION, UPCAST)
    if TEACHER == "logits":
        mask = row_mask[:, None] & class_mask[None, :]
        z_t = tl.load(teacher_ptr + row[:, None] * N + n[None, :], mask=mask, other=0.0)
        z_t = z_t.to(tl.float32) / temperature
    return z_s, z_t


@triton.jit
def statistics_kernel(
    student_ptr,  # (B, D)
    teacher_ptr,  # (B, D) features, (B, N) logits, or None
    vectors_ptr,  # (N, D)
    student_scale_ptr,  # () float32 or None
    student_scale,
    teacher_scale_ptr,
    teacher_scale,
    temperature,
    factor_ptr,  # (2, B) float32, out: scale / (|f| T) of student and teacher
    state_ptr,  # (4, S, B) float32, out: m_s, l_s, m_t, l_t
    B,
    N,
    D,
    tiles_per_split,
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write m and l of both sides for one split of the classes."""
    split = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = row < B
    d = tl.arange(0, WIDTH)
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
    factor_t = tl.full([ROWS], 1.0, tl.float32)
    if TEACHER == "features":
        scale_t = load_scale(teacher_scale_ptr, teacher_scale) / temperature
        factor_t = inverse_norm(squares_t) * scale_t
    if split == 0:
        tl.store(factor_ptr + row, factor_s, mask=row_mask)
        tl.store(factor_ptr + B + row, factor_t, mask=row_mask)

    m_s = tl.full([ROWS], -float("inf"), tl.float32)
    m_t = tl.full([ROWS], -float("inf"), tl.float32)
    l_s = tl.zeros([ROWS], tl.float32)
    l_t = tl.zeros([ROWS], tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(N, CLASSES))
    for tile in range(first, last):
        n = (tile * CLASSES + tl.arange(0, CLASSES)).to(tl.int64)
        z_s, z_t = logits_tile(
            student_ptr, teacher_ptr, vectors_ptr, row, n, temperature, B, N, D,
            TEACHER, ROWS, CLASSES, WIDTH, PRECISION, UPCAST,
        )  # fmt: skip
        z_s = tl.where((n < N)[None, :], z_s * factor_s[:, None], -float("inf"))
        new_m = tl.maximum(m_s, tl.max(z_s, 1))
        l_s = l_s * tl.exp(m_s - new_m) + tl.sum(tl.exp(z_s - new_m[:, None]), 1)
        m_s = new_m
        if TEACHER != "none":
            z_t = tl.where((n < N)[None, :], z_t * factor_t[:, None], -float("inf"))
            new_m = tl.maximum(m_t, tl.max(z_t, 1))
            l_t = l_t * tl.exp(m_t - new_m) + tl.sum(tl.exp(z_t - new_m[:, None]), 1)
            m_t = new_m
    size = tl.num_programs(1).to(tl.int64) * B
    at = split * B + row
    tl.store(state_ptr + at, m_s, mask=row_mask)
    tl.store(state_ptr + size + at, l_s, mask=row_mask)
    tl.store(state_ptr + 2 * size + at, m_t, mask=row_mask)
    tl.store(state_ptr + 3 * size + at, l_t, mask=row_mask)


@triton.jit
def join_rows(state_ptr, row, row_mask, B, S, ROWS: tl.constexpr):
    """Maximum and sum of one side over the splits, in order."""
    m = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for i in range(0, S):
        m_i = tl.load(state_ptr + i * B + row, mask=row_mask, other=0.0)
        l_i = tl.load(state_ptr + (S + i) * B + row, mask=row_mask, other=1.0)
        new_m = tl.maximum(m, m_i)
        total = total * tl.exp(m - new_m) + l_i * tl.exp(m_i - new_m)
        m = new_m
    return m, total


@triton.jit
def difference_kernel(
    student_ptr,  # (B, D)
    teacher_ptr,  # (B, D) features, (B, N) logits, or None
    vectors_ptr,  # (N, D)
    temperature,
    factor_ptr,  # (2, B) float32
    state_ptr,  # (4, S, B) float32
    scratch_ptr,  # (1 or 2, B, chunk) in the dtype of W, out: g / g_scale, and its low part
    sums_ptr,  # (2, P, B) float32, in and out: KL and u, P programs along the classes
    out_ptr,  # (2, B) float32, out: g_scale, lse_s
    B,
    N,
    D,
    S,
    chunk,
    chunk_start,
    tiles_per_program,
    TEACHER: tl.constexpr,
    NEED_GRADIENT: tl.constexpr,
    LOW_PART: tl.constexpr,  # of g too: beside statistics mu is taken off, and rounding shows
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write g of one chunk and add this chunk's part of KL and u."""
    program = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = row < B
    factor_s = tl.load(factor_ptr + row, mask=row_mask, other=0.0)
    factor_t = tl.load(factor_ptr + B + row, mask=row_mask, other=0.0)
    m_s, total_s = join_rows(state_ptr, row, row_mask, B, S, ROWS)
    log_total_s = tl.log(total_s)
    largest = 1.0 / total_s
    if TEACHER != "none":
        m_t, total_t = join_rows(
            state_ptr + 2 * tl.cast(S, tl.int64) * B, row, row_mask, B, S, ROWS
        )
        log_total_t = tl.log(total_t)
        largest = tl.maximum(largest, 1.0 / total_t)
    if program == 0:
        tl.store(out_ptr + row, largest, mask=row_mask)
        tl.store(out_ptr + B + row, m_s + log_total_s, mask=row_mask)

    kl = tl.zeros([ROWS], tl.float32)
    u = tl.zeros([ROWS], tl.float32)
    first = program * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tl.cdiv(chunk, CLASSES))
    for tile in range(first, last):
        place = (tile * CLASSES + tl.arange(0, CLASSES)).to(tl.int64)
        n = chunk_start + place
        mask = row_mask[:, None] & ((n < N) & (place < chunk))[None, :]
        z_s, z_t = logits_tile(
            student_ptr, teacher_ptr, vectors_ptr, row, n, temperature, B, N, D,
            TEACHER, ROWS, CLASSES, WIDTH, PRECISION, UPCAST,
        )  # fmt: skip
        log_s = (z_s * factor_s[:, None] - m_s[:, None]) - log_total_s[:, None]
        p_s = tl.exp(log_s)
        if TEACHER == "none":
            g = p_s
            u += tl.sum(tl.where(mask, p_s * log_s, 0.0), 1)
        else:
            log_t = (z_t * factor_t[:, None] - m_t[:, None]) - log_total_t[:, None]
            p_t = tl.exp(log_t)
            x = log_s - log_t
            near = tl.abs(x) < 0.25
            small_excess = p_t * excess(tl.where(near, x, 0.0))
            terms = tl.where(near, small_excess, p_s - p_t - p_t * x)
            kl += tl.sum(tl.where(mask, terms, 0.0), 1)
            g = tl.where(near, p_t * x + small_excess, p_s - p_t)
            u += tl.sum(tl.where(mask, g * log_s, 0.0), 1)
        if NEED_GRADIENT:
            g = g / largest[:, None]
            high = g.to(scratch_ptr.dtype.element_ty)
            at = row[:, None] * chunk + place[None, :]
            at_mask = row_mask[:, None] & (place < chunk)[None, :]
            tl.store(scratch_ptr + at, high, mask=at_mask)
            if LOW_PART:
                low = (g - high.to(tl.float32)).to(scratch_ptr.dtype.element_ty)
                scratch_size = tl.cast(chunk, tl.int64) * B
                tl.store(scratch_ptr + scratch_size + at, low, mask=at_mask)
    at = program * B + row
    size = tl.num_programs(1).to(tl.int64) * B
    kl += tl.load(sums_ptr + at, mask=row_mask, other=0.0)
    u += tl.load(sums_ptr + size + at, mask=row_mask, other=0.0)
    tl.store(sums_ptr + at, kl, mask=row_mask)
    tl.store(sums_ptr + size + at, u, mask=row_mask)


@triton.jit
def finish_kernel(
    student_ptr,  # (B, D)
    mu_ptr,  # (B, D), or None
    h_ptr,  # (B,), or None
    student_scale_ptr,
    student_scale,
    temperature,
    weight,
    delta_ptr,  # (B, D) float32: g W / g_scale
    sums_ptr,  # (2, P, B) float32
    out_ptr,  # (2, B) float32
    loss_ptr,  # (B,) float32
    gradient_ptr,  # (B, D) float32
    scale_gradient_ptr,  # (B,) float32
    B,
    P,
    D,
    NEED_GRADIENT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write loss and gradients of one row."""
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    offsets = row.to(tl.int64) * D + d
    scale = load_scale(student_scale_ptr, student_scale)
    delta = tl.zeros([BLOCK_D], tl.float32)
    if NEED_GRADIENT:
        delta = tl.load(delta_ptr + offsets, mask=d < D, other=0.0) * tl.load(out_ptr + row)
    i = tl.arange(0, BLOCK_P).to(tl.int64)
    u = tl.sum(tl.load(sums_ptr + (P + i) * B + row, mask=i < P, other=0.0), 0)
    if mu_ptr is None:
        kl = tl.sum(tl.load(sums_ptr + i * B + row, mask=i < P, other=0.0), 0)
        along = u * temperature / scale
    else:
        mu = tl.load(mu_ptr + offsets, mask=d < D, other=0.0).to(tl.float32)
        f = tl.load(student_ptr + offsets, mask=d < D, other=0.0).to(tl.float32)
        inverse = inverse_norm(tl.sum(f * f))
        cosine = tl.sum(f * mu) * inverse
        lse_s = tl.load(out_ptr + B + row)
        kl = tl.load(h_ptr + row).to(tl.float32) - cosine * scale / temperature + lse_s
        delta -= mu
        along = (u + lse_s) * temperature / scale - cosine
    write_row(
        row,
        kl,
        delta,
        along,
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
