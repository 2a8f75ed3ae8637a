"""The loss in plain torch, one tile of logits at a time; what a CPU runs.

`kl_and_delta` returns KL(p_t || p_s) (B,) and o_s − o_t (B, D) from scaled queries
`q = scale · f/(‖f‖ T)`. Two ways, chosen by shape:

- by rows: all N logits of a few rows (both sides within ROW_BUDGET bytes); exact lse, then one
  product (p_s − p_t) W: three products in all;
- by classes: all rows, a tile of classes, running maximum and sums (attention over W): four
  products, for large N, small B, and half-precision W, which is widened tile by tile.

Neither copies W or stores B·N elements.
"""

import functools
import math
import platform
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_BUDGET = 10 << 20  # bytes of logits held by rows, both sides
MIN_ROWS = 48  # with fewer rows a product by rows loses more than the fourth product costs
MAX_TILE = 2048  # classes a tile
TILE_BYTES = 2 << 20  # of one tile's logits
NEAR_KL = 0.01  # below it the difference form cancels
NEAR_X = 0.25  # below it eˣ − 1 − x is summed as a series
MAX_X = 32.0  # above it eˣ could overflow a sum


def kl_and_delta(
    student: Tensor,
    teacher: Tensor | None,
    teacher_logits: Tensor | None,
    temperature: float,
    vectors: Tensor,
    need_delta: bool,
) -> tuple[Tensor, Tensor]:
    """Return KL (B,) and o_s − o_t (B, D), zeros where not needed.

    Args:
        student: (B, D) scaled queries in the dtype of the computation.
        teacher: the same of the teacher, or None where its logits are given.
        teacher_logits: (B, N), not yet divided by T, or None; read a tile at a time.
        temperature: T; divides given logits only.
        vectors: (N, D).
        need_delta: whether o_s − o_t is asked for.
    """
    batch, num_classes = student.shape[0], vectors.shape[0]
    rows = ROW_BUDGET // (2 * student.element_size() * num_classes) // 16 * 16
    rows = min(rows, -(-batch // 2))
    if rows >= MIN_ROWS and vectors.dtype == student.dtype:
        return _by_rows(student, teacher, teacher_logits, temperature, vectors, need_delta, rows)
    return _by_classes(student, teacher, teacher_logits, temperature, vectors, need_delta)


def attend(query: Tensor, vectors: Tensor, need_mean: bool = True) -> tuple[Tensor, Tensor]:
    """Return lse (B,) and o = softmax(query Wᵀ) W (B, D), zeros where not needed."""
    side = _Side(query, vectors.shape[1], need_mean)
    for _, part in class_tiles(query, vectors):
        side.add(product(query, part), part)
    return side.log_sum(), side.mean()


def class_tiles(query: Tensor, vectors: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first class, its tile of W in the query's dtype); never all classes at once."""
    num_classes = vectors.shape[0]
    size = min(MAX_TILE, max(TILE_BYTES // (query.element_size() * query.shape[0]), 64))
    size = min(size, -(-num_classes // 2))
    for start in range(0, num_classes, size):
        yield start, vectors[start : start + size].to(query.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a bᵀ: (M, K), (N, K) → (M, N), through oneDNN where that is the faster one."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and _onednn_is_faster():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return out
    return F.linear(a, b)


@functools.cache
def _onednn_is_faster() -> bool:
    """True on AMD with AVX-512, where MKL, torch's usual choice, runs at about half speed.

    The op is private, so it is tried once; a rule instead of a timing keeps runs repeatable.
    """
    try:
        a, b = torch.randn(17, 33), torch.randn(21, 33)
        out = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        if not torch.allclose(out, a @ b.T, atol=1e-4):
            return False
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("vendor_id"))
    except (OSError, StopIteration):
        return "AuthenticAMD" if "AuthenticAMD" in platform.processor() else ""


def _by_rows(
    student: Tensor,
    teacher: Tensor | None,
    teacher_logits: Tensor | None,
    temperature: float,
    vectors: Tensor,
    need_delta: bool,
    rows: int,
) -> tuple[Tensor, Tensor]:
    kl = student.new_empty(student.shape[0])
    delta = student.new_zeros(student.shape[0], vectors.shape[1])
    for start in range(0, student.shape[0], rows):
        block = slice(start, start + rows)
        log_s = product(student[block], vectors)
        if teacher is None:
            assert teacher_logits is not None
            log_t = teacher_logits[block].to(student.dtype) / temperature
        else:
            log_t = product(teacher[block], vectors)
        torch.log_softmax(log_s, 1, out=log_s)
        torch.log_softmax(log_t, 1, out=log_t)
        kl[block] = _kl_and_difference_(log_s, log_t)
        if need_delta:
            delta[block] = product(log_s, vectors.T)
        del log_s, log_t  # before the next block's are made
    return kl, delta


def _kl_and_difference_(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Return KL (b,) and leave p_s − p_t in `log_s`; a tile of classes at a time.

    Σ p_s − Σ p_t belongs to KL: it is 0 but for the rounding of the two normalisers, whose
    effect on Σ p_t (log p_t − log p_s) it cancels.
    """
    tiles = list(zip(log_s.split(MAX_TILE, 1), log_t.split(MAX_TILE, 1), strict=True))
    kl = log_s.new_zeros(log_s.shape[0])
    for s, t in tiles:
        kl += torch.linalg.vecdot(t.exp(), t - s)
    near = kl < NEAR_KL
    if near.any():
        return torch.where(near, _near_kl_and_difference_(tiles), kl)
    for s, t in tiles:
        torch.exp(s, out=s).sub_(t.exp_())
        kl += s.sum(1)
    return kl


def _near_kl_and_difference_(tiles: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The same as Σ p_t (eˣ − 1 − x), which cannot cancel, nor go negative."""
    kl = tiles[0][0].new_zeros(tiles[0][0].shape[0])
    for s, t in tiles:
        x = s - t
        small = x.abs() < NEAR_X
        p_t = t.exp_()
        difference = torch.exp(s, out=s).sub_(p_t)
        series = _series(x).mul_(p_t)
        first_order = x.mul_(p_t)
        kl += torch.where(small, series, difference - first_order).sum(1)
        torch.where(small, series.add_(first_order), difference, out=s)
    return kl


def _series(x: Tensor) -> Tensor:
    """Return eˣ − 1 − x where |x| < NEAR_X, and anything finite elsewhere."""
    y = x.clamp(-NEAR_X, NEAR_X)
    last = 7 if x.dtype == torch.float32 else 13
    total = torch.full_like(y, 1 / math.factorial(last))
    for n in range(last - 1, 1, -1):
        total.mul_(y).add_(1 / math.factorial(n))
    return total.mul_(y).mul_(y)


def _excess(x: Tensor) -> Tensor:
    """Return eˣ − 1 − x accurately; x above MAX_X counts as MAX_X in eˣ."""
    far = x.clamp(max=MAX_X).exp_().sub_(1).sub_(x)
    return torch.where(x.abs() < NEAR_X, _series(x), far)


class _Side:
    """Running maximum m, sum l and o of one side over tiles of classes."""

    def __init__(self, query: Tensor, width: int, need_mean: bool) -> None:
        self.maximum = query.new_full((query.shape[0], 1), -torch.inf)
        self.total = query.new_zeros(query.shape[0], 1)
        self.weighted = query.new_zeros(query.shape[0], width)
        self.need_mean = need_mean

    def add(self, logits: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Take a tile (B, n), leaving z − m in it; return its weights exp(z − m) and m's rise."""
        maximum = torch.maximum(self.maximum, logits.amax(1, keepdim=True))
        rise = maximum - self.maximum  # inf at first
        factor = rise.neg().exp()
        weights = logits.sub_(maximum).exp()
        self.total = self.total * factor + weights.sum(1, keepdim=True)
        if self.need_mean:
            self.weighted.mul_(factor).add_(product(weights, part.T))
        self.maximum = maximum
        return weights, rise[:, 0]

    def log_sum(self) -> Tensor:
        return (self.maximum + self.total.log())[:, 0]

    def mean(self) -> Tensor:
        return self.weighted / self.total


def _by_classes(
    student: Tensor,
    teacher: Tensor | None,
    teacher_logits: Tensor | None,
    temperature: float,
    vectors: Tensor,
    need_delta: bool,
) -> tuple[Tensor, Tensor]:
    """One pass, without knowing lse beforehand.

    With d = (z_t − m_t) − (z_s − m_s) and its mean c = E_t[d], KL = log E_t[e^(c − d)] = log1p(A)
    where A = E_t[eˣ − 1 − x], x = c − d: a sum of non-negative terms. c and A are kept up to date
    tile by tile; where eˣ is beyond range (far from convergence) KL = log l_s − log l_t + c.
    The maxima m come off before the difference, since a sum of z_t − z_s would be rounded as
    the logits are, which may be a thousand times as large as KL.
    """
    side_s = _Side(student, vectors.shape[1], need_delta)
    side_t = _Side(student, vectors.shape[1], need_delta)
    centre = student.new_zeros(student.shape[0])
    excess = torch.zeros_like(centre)
    far = torch.zeros_like(centre, dtype=torch.bool)
    for start, part in class_tiles(student, vectors):
        z_s = product(student, part)
        if teacher is None:
            assert teacher_logits is not None
            z_t = teacher_logits[:, start : start + part.shape[0]].to(student.dtype)
            z_t = z_t / temperature
        else:
            z_t = product(teacher, part)
        _, rise_s = side_s.add(z_s, part)
        before = side_t.total[:, 0]
        weights, rise_t = side_t.add(z_t, part)
        difference = z_t.sub_(z_s)
        factor = rise_t.neg().exp()
        before, after = before * factor, side_t.total[:, 0]
        if start:
            centre = centre + (rise_s - rise_t)
        moved = (before * centre + torch.linalg.vecdot(weights, difference)) / after
        step = moved - centre if start else torch.zeros_like(centre)
        x = moved[:, None] - difference
        # Not undone later: beside a new maximum the old sum may fall out of range.
        far |= (step > MAX_X) | (x.amax(1) > MAX_X)
        excess = excess * factor * step.clamp(max=MAX_X).exp() + before * _excess(step)
        excess += torch.linalg.vecdot(weights, _excess(x))
        centre = moved
    excess = excess / side_t.total[:, 0]
    far |= excess > 1
    plain = (side_s.total.log() - side_t.total.log())[:, 0] + centre
    kl = torch.where(far, plain, torch.log1p(excess))
    return torch.where(kl < 0, 0, kl), side_s.mean() - side_t.mean()


def top_k(query: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest softmax probabilities (B, k) of query Wᵀ and their classes (B, k)."""
    maximum = query.new_full((query.shape[0], 1), -torch.inf)
    total = torch.zeros_like(maximum)
    best = query.new_empty(query.shape[0], 0)
    index = torch.empty(query.shape[0], 0, dtype=torch.int64, device=query.device)
    for start, part in class_tiles(query, vectors):
        logits = product(query, part)
        new_maximum = torch.maximum(maximum, logits.amax(1, keepdim=True))
        total = total * (maximum - new_maximum).exp() + (logits - new_maximum).exp().sum(
            1, keepdim=True
        )
        maximum = new_maximum
        values, places = logits.topk(min(k, logits.shape[1]), dim=1)
        best, index = torch.cat([best, values], 1), torch.cat([index, places + start], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, order)
    return (best - maximum).exp() / total, index
