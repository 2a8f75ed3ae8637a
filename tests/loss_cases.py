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
ROUNDING = 6e-8  # of a float32, relative
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
    return _reference_answer(problem, torch.float64)


def eager_answer(problem: Problem) -> Answer:
    """The same by plain torch in float32."""
    return _reference_answer(problem, torch.float32)


def _reference_answer(problem: Problem, dtype: torch.dtype) -> Answer:
    student = problem.student.detach().cpu().to(dtype).requires_grad_()
    scale = torch.tensor(problem.student_scale, dtype=dtype, requires_grad=True)
    arguments = {**problem.arguments(), "student_scale": scale}
    loss = kd_loss_reference(
        student,
        _cast(problem.teacher, dtype),
        problem.vectors.cpu().to(dtype),
        **arguments,
        reduction="none",
    )
    gradient, scale_gradient = torch.autograd.grad(loss.sum(), (student, scale))
    return Answer(loss.detach(), gradient, scale_gradient)


def _cast(teacher, dtype):
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(teacher.logits.cpu().to(dtype))
    if isinstance(teacher, TeacherStatistics):
        return TeacherStatistics(teacher.mu.cpu().to(dtype), teacher.h.cpu().to(dtype))
    return teacher.cpu().to(dtype)


def assert_close(problem: Problem, answer: Answer, got: Answer, path: str) -> None:
    """Compare with the answer in float64, by the table above.

    To a loss comes what rounding the largest logit makes of it: one pass doesn't know lse while
    it sums. Where eager float32 on the same inputs is worse, twice its error is allowed.
    """
    largest = problem.student_scale / problem.temperature
    loss_allowed = LOSS_TOLERANCE + ROUNDING * largest / _kl_unit(problem, answer)
    if isinstance(problem.teacher, TeacherStatistics):  # h and the logits cancel: absolute
        size = 1 + problem.student_scale / problem.temperature
        loss_allowed += 2e-7 * size / _kl_unit(problem, answer)
    gradient_allowed = GRADIENT_TOLERANCE[path, problem.vectors.dtype]
    scale_allowed = max(SCALE_GRADIENT_TOLERANCE, gradient_allowed if path == "hybrid" else 0)
    allowed = Errors(loss_allowed, gradient_allowed, scale_allowed)
    assert (got.loss >= 0).all()
    found = errors(problem, answer, got)
    if found.within(allowed):
        return
    eager = errors(problem, answer, eager_answer(problem))
    assert found.within(allowed, eager), f"off by {found}; allowed {allowed}, eager {eager}"


@dataclass(frozen=True)
class Errors:
    """Relative errors of loss, gradient and scale gradient."""

    loss: float
    gradient: float
    scale_gradient: float

    def within(self, allowed: "Errors", eager: "Errors | None" = None) -> bool:
        pairs = zip(astuple(self), astuple(allowed), astuple(eager or Errors(0, 0, 0)), strict=True)
        return all(error <= max(bound, 2 * other) for error, bound, other in pairs)


def errors(problem: Problem, answer: Answer, got: Answer) -> Errors:
    """How far `got` is from `answer`.

    The loss is measured against at least KL_FLOOR, its gradient against what it would be at
    KL_FLOOR and at least a tenth of the largest it can be: N = 1 has neither.
    """
    square = problem.temperature**2
    loss = (got.loss.double().cpu() - answer.loss).abs().mean() / square / _kl_unit(problem, answer)
    norms = problem.student.double().cpu().norm(dim=1, keepdim=True)
    largest = problem.temperature * problem.student_scale / norms
    kl = (answer.loss.mean() / problem.temperature**2).clamp(min=1e-9, max=KL_FLOOR)
    unit = answer.gradient.norm() * (KL_FLOOR / kl).sqrt()  # it goes with the root of KL
    unit = unit.clamp(min=0.1 * largest.norm())
    gradient = (got.gradient.double().cpu() - answer.gradient).norm() / unit
    unit = answer.scale_gradient.abs().clamp(min=0.1 * problem.temperature * len(answer.loss))
    scale = (got.scale_gradient.double().cpu() - answer.scale_gradient).abs() / unit
    return Errors(float(loss), float(gradient), float(scale))


def _kl_unit(problem: Problem, answer: Answer) -> float:
    return max(float(answer.loss.abs().mean()) / problem.temperature**2, KL_FLOOR)


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
