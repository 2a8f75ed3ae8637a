"""Problems for the loss, their answers in float64, and every tolerance, in one place."""

from dataclasses import astuple, dataclass, replace

import torch
import torch.nn.functional as F
from promptkd.kernels import op
from promptkd.loss import TeacherLogits, TeacherStatistics, kd_loss_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Relative errors against float64 of the same (rounded) inputs, where KL >= 0.1.
# "split" in half precision carries a high and a low part of its weights, "hybrid" only one.
LOSS_TOLERANCE = 5e-6
GRADIENT_TOLERANCE = {
    ("small", torch.float32): 1e-5,
    ("split", torch.float32): 1e-5,
    ("hybrid", torch.float32): 1e-5,
    ("tiles", torch.float32): 1e-5,
    ("small", torch.float16): 5e-6,
    ("split", torch.float16): 5e-6,
    ("hybrid", torch.float16): 5e-4,
    ("tiles", torch.float16): 5e-4,  # the gradient itself comes back in float16
    ("small", torch.bfloat16): 5e-5,
    ("split", torch.bfloat16): 5e-5,
    ("hybrid", torch.bfloat16): 8e-3,
    ("tiles", torch.bfloat16): 4e-3,
}
ROUNDING = 2.0**-24  # of a float32, relative
# Of a weight that is multiplied with class vectors; half precision carries two parts of it.
WEIGHT_ROUNDING = {torch.float32: ROUNDING, torch.float16: 2.0**-22, torch.bfloat16: 2.0**-17}
SCALE_GRADIENT_TOLERANCE = 1e-4
NEAR_TOLERANCE = 2e-3  # of the loss where KL is about 1e-5, from features or logits
NEAR_STATISTICS_ERROR = 1e-3  # absolute: statistics hold no detail of single classes
EXACT = 1e-12  # float64 against float64

KL_FLOOR = 0.1  # below it errors are measured against this KL

GRID = {
    "batch": (1, 3, 33),
    "num_classes": (1, 37, 102, 1000, 4099),
    "width": (64, 65, 512, 768, 1024),
    "temperature": (0.1, 1.0, 2.0, 4.0),
    "scale": (10.0, 100.0, 1000.0),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "teacher": ("features", "logits", "statistics"),
}


@dataclass(frozen=True)
class Case:
    batch: int = 3
    num_classes: int = 37
    width: int = 65
    temperature: float = 2.0
    scale: float = 30.0
    dtype: torch.dtype = torch.float32
    teacher: str = "features"
    noise: float = 1.0
    centred: bool = True
    teacher_scale_ratio: float = 1.25
    seed: int = 0


@dataclass(frozen=True)
class Problem:
    student: Tensor
    teacher: Tensor | TeacherLogits | TeacherStatistics
    vectors: Tensor
    student_scale: float
    teacher_scale: float | None
    temperature: float

    def arguments(self) -> dict[str, float | None]:
        return {
            "student_scale": self.student_scale,
            "teacher_scale": self.teacher_scale,
            "temperature": self.temperature,
        }


def make_problem(case: Case) -> Problem:
    """Features near a few class vectors, as a CLIP's are; the teacher's differ by `noise`."""
    g = torch.Generator().manual_seed(case.seed)
    vectors = torch.randn(case.num_classes, case.width, generator=g)
    if not case.centred:
        vectors = vectors + 1.5 * torch.randn(1, case.width, generator=g)
    vectors = F.normalize(vectors, dim=1).to(case.dtype)
    chosen = torch.randint(0, case.num_classes, (case.batch,), generator=g)
    base = vectors[chosen].float() + torch.randn(case.batch, case.width, generator=g) / 8
    other = torch.randn(case.batch, case.width, generator=g) * case.noise / case.width**0.5
    lengths = 0.5 + 4 * torch.rand(case.batch, 1, generator=g)
    teacher = base.to(case.dtype)
    student = ((teacher.float() + other) * (lengths if case.noise > 0 else 1)).to(case.dtype)
    teacher_scale = case.scale * case.teacher_scale_ratio
    problem = Problem(student, teacher, vectors, case.scale, teacher_scale, case.temperature)
    return replace_teacher(problem, case.teacher)


def replace_teacher(problem: Problem, kind: str) -> Problem:
    """The same teacher as features, logits or statistics; the latter two rounded to float32."""
    if kind == "features":
        return problem
    vectors, features = problem.vectors.double(), problem.teacher.double()
    logits = F.normalize(features, dim=1) @ vectors.T * problem.teacher_scale
    if kind == "logits":
        return replace(problem, teacher=TeacherLogits(logits.float()), teacher_scale=None)
    log_p = F.log_softmax(logits / problem.temperature, dim=1)
    mu, h = log_p.exp() @ vectors, (log_p.exp() * log_p).sum(1)
    return replace(problem, teacher=TeacherStatistics(mu.float(), h.float()), teacher_scale=None)


@dataclass(frozen=True)
class Answer:
    loss: Tensor  # (B,) T² KL
    gradient: Tensor  # (B, D) of the sum
    scale_gradient: Tensor  # ()


def exact_answer(problem: Problem) -> Answer:
    """Loss and gradients of each row in float64."""
    student = problem.student.detach().cpu().double().requires_grad_()
    scale = torch.tensor(problem.student_scale, dtype=torch.float64, requires_grad=True)
    loss = kd_loss_reference(
        student,
        _double(problem.teacher),
        problem.vectors.cpu().double(),
        **{**problem.arguments(), "student_scale": scale},
        reduction="none",
    )
    gradient, scale_gradient = torch.autograd.grad(loss.sum(), (student, scale))
    return Answer(loss.detach(), gradient, scale_gradient)


def _double(teacher):
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(teacher.logits.cpu().double())
    if isinstance(teacher, TeacherStatistics):
        return TeacherStatistics(teacher.mu.cpu().double(), teacher.h.cpu().double())
    return teacher.cpu().double()


@dataclass(frozen=True)
class Errors:
    """Of the loss, summed over rows; of the gradient, its norm; of the scale's gradient."""

    loss: float
    gradient: float
    scale_gradient: float


def assert_close(problem: Problem, answer: Answer, got: Answer, path: str) -> None:
    """Compare with the answer in float64: the table's tolerance, and what rounded logits make of it."""
    assert (got.loss >= 0).all()
    found, allowed = errors(answer, got), allowed_errors(problem, answer, path)
    pairs = zip(astuple(found), astuple(allowed), strict=True)
    assert all(error <= bound for error, bound in pairs), f"off by {found}; allowed {allowed}"


def errors(answer: Answer, got: Answer) -> Errors:
    """How far `got` is from `answer`."""
    loss = (got.loss.double().cpu() - answer.loss).abs().sum()
    gradient = (got.gradient.double().cpu() - answer.gradient).norm()
    scale_gradient = (got.scale_gradient.double().cpu() - answer.scale_gradient).abs()
    return Errors(float(loss), float(gradient), float(scale_gradient))


def allowed_errors(problem: Problem, answer: Answer, path: str) -> Errors:
    """The table's tolerances, where KL >= KL_FLOOR, plus the least that float32 logits cost.

    Whoever computes logits in float32 gets z + e instead of z, with |e| <= r (`_logit_rounding`).
    To first order in e, with p_s, p_t of the exact logits,

        |dKL| = |sum (p_s - p_t) e_s + sum p_t (log p_t/p_s - KL) e_t|
             <= r_s |p_s - p_t|_1 + r_t E_t|log p_t/p_s - KL|
        |do|  = |sum p (w - o) e| <= r E_p|w - o|            for o_s and o_t each,

    so that the bound is narrow where rounding does not show (equal or certain answers) and wide
    only where every float32 computation is off. Statistics hold lse_t inside h: there the loss is
    h - q mu + lse_s, off by r_s twice (q mu is a sum like a logit) and by the roundings of h and lse_s.
    To o come 4 roundings of the weights p and the rounded partial sums of N terms, as
    `_logit_rounding` has them. Gradient and scale's gradient are |do| times T s/|f| and T.
    """
    student = problem.student.cpu().double()
    vectors = problem.vectors.cpu().double()
    norms = student.norm(dim=1)
    z_s = F.normalize(student, dim=1) @ vectors.T * (problem.student_scale / problem.temperature)
    log_s = F.log_softmax(z_s, dim=1)
    r_s = _logit_rounding(z_s, problem.student_scale / problem.temperature, student.shape[1])
    moved = r_s * _spread(log_s.exp(), vectors)
    if isinstance(problem.teacher, TeacherStatistics):
        h = problem.teacher.h.cpu().double()
        kl = 2 * r_s + ROUNDING * (h.abs() + z_s.logsumexp(1).abs())
    else:
        if isinstance(problem.teacher, TeacherLogits):
            z_t = problem.teacher.logits.cpu().double() / problem.temperature
            r_t = ROUNDING * z_t.abs().amax(1)  # T divided by, the maximum taken off
        else:
            unit, scale = F.normalize(problem.teacher.cpu().double(), dim=1), problem.teacher_scale
            z_t = unit @ vectors.T * (scale / problem.temperature)
            r_t = _logit_rounding(z_t, scale / problem.temperature, student.shape[1])
        log_t = F.log_softmax(z_t, dim=1)
        p_t, ratio = log_t.exp(), log_t - log_s
        exact = (p_t * ratio).sum(1, keepdim=True)
        kl = r_s * (log_s.exp() - p_t).abs().sum(1) + r_t * (p_t * (ratio - exact).abs()).sum(1)
        moved += r_t * _spread(p_t, vectors)
    weights = 4 * WEIGHT_ROUNDING[problem.vectors.dtype] + ROUNDING / 2 * (len(vectors) / 3) ** 0.5
    moved += weights * vectors.norm(dim=1).max()
    square, dtype = problem.temperature**2, problem.vectors.dtype
    loss = LOSS_TOLERANCE * max(float(answer.loss.sum()), KL_FLOOR * square * len(kl))
    # The gradient goes with the root of KL.
    floor = KL_FLOOR * square / answer.loss.mean().clamp(min=1e-9)
    gradient_tolerance = GRADIENT_TOLERANCE[path, dtype]
    gradient = gradient_tolerance * answer.gradient.norm() * floor.sqrt().clamp(min=1)
    gradient += (moved / norms).norm() * problem.temperature * problem.student_scale
    if path == "tiles":  # comes back in that dtype, where the smallest numbers are far apart
        info = torch.finfo(dtype)
        gradient += info.smallest_normal * info.eps / 2 * answer.gradient.numel() ** 0.5
    scale_tolerance = max(SCALE_GRADIENT_TOLERANCE, gradient_tolerance if path == "hybrid" else 0)
    scale_gradient = scale_tolerance * answer.scale_gradient.abs()
    scale_gradient += moved.sum() * problem.temperature
    return Errors(loss + square * float(kl.sum()), float(gradient), float(scale_gradient))


def _logit_rounding(z: Tensor, scale: float, width: int) -> Tensor:
    """(B,) how far a float32 logit scale · f/|f| · w may be from the exact one.

    A rounding is off by half of ROUNDING in the root mean square. Norm, division, scale and the
    maximum taken off are good for 4 of z. A sum of D products rounds each of D partial sums, with
    random signs (Higham and Mary 2019), so that squares add up: the partial sums grow evenly to z
    (a third of D z²), beside a walk that leads nowhere, as long as the scale over root(D).
    """
    return ROUNDING / 2 * ((4 + (width / 3) ** 0.5) * z.abs().amax(1) + scale)


def _spread(p: Tensor, vectors: Tensor) -> Tensor:
    """(B,) E_p|w - o|, the mean distance of class vectors from their mean."""
    o = p @ vectors
    squares = vectors.square().sum(1) - 2 * o @ vectors.T + o.square().sum(1, keepdim=True)
    return (p * squares.clamp(min=0).sqrt()).sum(1)


def pairwise(grid: dict[str, tuple]) -> list[dict]:
    """Return few combinations that hold every pair of values of every two factors."""
    names = list(grid)
    missing = {
        ((a, x), (b, y))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for x in range(len(grid[a]))
        for y in range(len(grid[b]))
    }
    generator = torch.Generator().manual_seed(1)
    rows = []
    while missing:
        best, best_count = None, -1
        for _ in range(60):  # the best of some random rows that start from a missing pair
            (a, x), (b, y) = min(missing, key=str)
            row = {n: int(torch.randint(0, len(grid[n]), (1,), generator=generator)) for n in names}
            row |= {a: x, b: y}
            count = sum(row[p] == u and row[q] == v for (p, u), (q, v) in missing)
            if count > best_count:
                best, best_count = row, count
        missing = {pair for pair in missing if not all(best[name] == value for name, value in pair)}
        rows.append({n: grid[n][i] for n, i in best.items()})
    return rows


class StorageSpy(TorchDispatchMode):
    """Remembers the largest storage, in elements, that any operation makes."""

    def __init__(self, *given):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is op.kd_rows:
            with self:  # look inside the operator
                return op._kd_rows(*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.given:
                    self.largest = max(self.largest, storage.nbytes() // x.element_size())
        return out
