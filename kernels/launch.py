# mypy: ignore-errors
"""Host side of the Triton kernels: scratch memory and launches, no synchronisation.

Imported when the first kernel is launched, since it imports Triton.
"""

import functools

import torch
import triton
from torch import Tensor

from . import configs
from .configs import Teacher, next_power_of_two
from .hybrid import difference_kernel, finish_kernel, statistics_kernel
from .small import small_kernel
from .split import attend_kernel, merge_kernel, merge_statistics_kernel
from .topk import top_k_kernel

INTERPRET = triton.knobs.runtime.interpret
# Fused multiply-add would leave z_t - z_s unequal to 0 for equal inputs.
EXACT = {"enable_fp_fusion": False}


def _options(tile: configs.Tile, vectors: Tensor) -> dict:
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return {
        "ROWS": tile.rows,
        "CLASSES": tile.classes,
        "WIDTH": tile.width,
        "PRECISION": "tf32" if tf32 and vectors.dtype == torch.float32 else "ieee",
        "UPCAST": INTERPRET,
        **EXACT,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def kd_rows(
    student: Tensor,
    student_scale: tuple[Tensor | None, float],
    teacher: Tensor | None,
    teacher_kind: Teacher,
    teacher_scale: tuple[Tensor | None, float],
    statistics: tuple[Tensor | None, Tensor | None],
    vectors: Tensor,
    temperature: float,
    weight: float,
    need_gradient: bool,
    design: configs.Design | None = None,
    tile: configs.Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight T² KL (B,), its gradients (B, D) and (B,); float32.

    Args:
        student: (B, D), contiguous, in the dtype of `vectors`.
        student_scale: a 0-dim float32 tensor on the device, or None and a number.
        teacher: features (B, D), logits (B, N), or None with statistics.
        teacher_kind: which of these.
        teacher_scale: as `student_scale`.
        statistics: (μ, h), or two None.
        vectors: (N, D), contiguous.
        temperature: T.
        weight: multiplies every row.
        need_gradient: without it the gradients come back as zeros.
        design: instead of the table's choice; for tests.
        tile: the same for every kernel launched; for tests.
    """
    (batch, width), num_classes = student.shape, vectors.shape[0]
    like = functools.partial(torch.empty, dtype=torch.float32, device=student.device)
    if need_gradient:
        out = like(batch), like(batch, width), like(batch)
    else:
        out = like(batch), like(batch, width).zero_(), like(batch).zero_()
    design = design or configs.choose_design(
        batch, num_classes, width, vectors.element_size(), teacher_kind
    )
    if design == "small":
        tile = tile or configs.small_tile(num_classes, vectors.element_size())
        small_kernel[(triton.cdiv(batch, tile.rows),)](
            student, teacher, vectors, *student_scale, *teacher_scale, temperature, weight, *out,
            batch, num_classes, width,
            TEACHER_LOGITS=teacher_kind == "logits", NEED_GRADIENT=need_gradient,
            **_options(tile, vectors),
        )  # fmt: skip
        return out
    run = _split if design == "split" else _hybrid
    run(
        student, student_scale, teacher, teacher_kind, teacher_scale, statistics, vectors,
        temperature, weight, need_gradient, out, tile,
    )  # fmt: skip
    return out


def _attend(
    student,
    student_scale,
    teacher,
    teacher_kind,
    teacher_scale,
    vectors,
    temperature,
    need_mean,
    tile=None,
) -> tuple[Tensor, Tensor, int]:
    (batch, width), num_classes = student.shape, vectors.shape[0]
    tile = tile or configs.split_tile(width, vectors.element_size())
    splits, tiles_per_split = configs.split_classes(batch, num_classes, tile)
    sides = 1 if teacher_kind == "none" else 2
    like = functools.partial(torch.empty, dtype=torch.float32, device=student.device)
    means = like(sides, splits, batch, width) if need_mean else like(0)
    state = like(6 if sides == 2 else 2, splits, batch)
    first, second = configs.split_width(width)
    attend_kernel[(triton.cdiv(batch, tile.rows), sides, splits)](
        student, teacher, vectors, *student_scale, *teacher_scale, temperature, means, state,
        batch, num_classes, width, tiles_per_split,
        TEACHER=teacher_kind, NEED_MEAN=need_mean, D0=first, D1=second, **_options(tile, vectors),
    )  # fmt: skip
    return means, state, splits


def _split(
    student, student_scale, teacher, teacher_kind, teacher_scale, statistics, vectors,
    temperature, weight, need_gradient, out, tile,
) -> None:  # fmt: skip
    batch, width = student.shape
    means, state, splits = _attend(
        student, student_scale, teacher, teacher_kind, teacher_scale, vectors, temperature,
        need_gradient, tile,
    )  # fmt: skip
    merge_kernel[(batch,)](
        student, *statistics, *student_scale, temperature, weight, means, state, *out,
        batch, splits, width, NEED_GRADIENT=need_gradient,
        BLOCK_S=next_power_of_two(splits), BLOCK_D=next_power_of_two(width), num_warps=4, **EXACT,
    )  # fmt: skip


def _hybrid(
    student, student_scale, teacher, teacher_kind, teacher_scale, statistics, vectors,
    temperature, weight, need_gradient, out, tile,
) -> None:  # fmt: skip
    (batch, width), num_classes = student.shape, vectors.shape[0]
    like = functools.partial(torch.empty, dtype=torch.float32, device=student.device)
    tile = tile or configs.HYBRID_TILES[vectors.element_size()]
    splits, tiles_per_split = configs.split_classes(batch, num_classes, tile)
    factors, state = like(2, batch), like(4, splits, batch)
    statistics_kernel[(triton.cdiv(batch, tile.rows), splits)](
        student, teacher, vectors, *student_scale, *teacher_scale, temperature, factors, state,
        batch, num_classes, width, tiles_per_split,
        TEACHER=teacher_kind, **_options(tile, vectors),
    )  # fmt: skip
    parts = 2 if teacher_kind == "none" and vectors.dtype != torch.float32 else 1
    chunk = configs.chunk_classes(batch, num_classes, parts * vectors.element_size(), tile)
    programs, tiles_per_program = configs.split_classes(batch, chunk, tile)
    scratch = vectors.new_empty(parts * batch * chunk if need_gradient else 0)
    sums, joined, delta = like(2, programs, batch).zero_(), like(2, batch), like(0)
    for start in range(0, num_classes, chunk):
        size = min(chunk, num_classes - start)
        difference_kernel[(triton.cdiv(batch, tile.rows), programs)](
            student, teacher, vectors, temperature, factors, state, scratch, sums, joined,
            batch, num_classes, width, splits, size, start, tiles_per_program,
            TEACHER=teacher_kind, NEED_GRADIENT=need_gradient, LOW_PART=parts == 2,
            **_options(tile, vectors),
        )  # fmt: skip
        if need_gradient:
            for part in scratch[: parts * batch * size].view(parts, batch, size):
                product = _multiply(part, vectors[start : start + size])
                delta = delta.add_(product) if delta.numel() else product
    finish_kernel[(batch,)](
        student, *statistics, *student_scale, temperature, weight, delta, sums, joined, *out,
        batch, programs, width, NEED_GRADIENT=need_gradient,
        BLOCK_P=next_power_of_two(programs), BLOCK_D=next_power_of_two(width), num_warps=4, **EXACT,
    )  # fmt: skip


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32, accumulated in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and _has_out_dtype():
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.is_cuda:
        return (a @ b).float()
    return a.float() @ b.float()


@functools.cache
def _has_out_dtype() -> bool:
    return any("out_dtype" in str(x) for x in torch._C._jit_get_schemas_for_operator("aten::mm"))


def statistics(
    features: Tensor, scale: tuple[Tensor | None, float], vectors: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return μ (B, D) and h (B,) of a teacher; where `configs.fits_split`."""
    batch, width = features.shape
    means, state, splits = _attend(
        features, scale, None, "none", (None, 1.0), vectors, temperature, True
    )
    mu = torch.empty(batch, width, dtype=torch.float32, device=features.device)
    h = torch.empty(batch, dtype=torch.float32, device=features.device)
    merge_statistics_kernel[(batch,)](
        features, *scale, temperature, means, state, mu, h, batch, splits, width,
        BLOCK_S=next_power_of_two(splits), BLOCK_D=next_power_of_two(width), num_warps=4, **EXACT,
    )  # fmt: skip
    return mu, h


def top_k(
    features: Tensor, scale: tuple[Tensor | None, float], vectors: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return the k largest probabilities and their classes; k at most `TOP_K_LARGEST`."""
    (batch, width), num_classes = features.shape, vectors.shape[0]
    tile = configs.TOP_K_TILES[vectors.element_size()]
    splits, tiles_per_split = configs.split_classes(batch, num_classes, tile)
    kept = max(2, next_power_of_two(k))
    keys = torch.empty(splits, batch, kept, dtype=torch.int64, device=features.device)
    state = torch.empty(2, splits, batch, dtype=torch.float32, device=features.device)
    top_k_kernel[(triton.cdiv(batch, tile.rows), splits)](
        features, vectors, *scale, keys, state, batch, num_classes, width, tiles_per_split,
        K=kept, **_options(tile, vectors),
    )  # fmt: skip
    best = keys.transpose(0, 1).reshape(batch, splits * kept).topk(k, dim=1).values
    bits = (best >> 32).int()
    logits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    log_sum = torch.logsumexp(state[0] + state[1].log(), dim=0)
    return (logits - log_sum[:, None]).exp(), 0xFFFFFFFF - (best & 0xFFFFFFFF)
