"""The loss as its callers see it: the reference, the CPU's fused path, and how they are joined."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from loss_cases import (
    EXACT,
    GRID,
    NEAR_STATISTICS_ERROR,
    NEAR_TOLERANCE,
    Answer,
    Case,
    StorageSpy,
    assert_close,
    exact_answer,
    make_problem,
    pairwise,
    replace_teacher,
)
from promptkd.kernels import op, tiles
from promptkd.loss import (
    TeacherLogits,
    TeacherStatistics,
    kd_loss,
    kd_loss_reference,
    teacher_statistics,
    top_k,
)
from torch.utils.checkpoint import checkpoint

TEACHERS = ("features", "logits", "statistics")


def run_fused(problem, reduction="none"):
    student = problem.student.detach().clone().requires_grad_()
    scale = torch.tensor(problem.student_scale, requires_grad=True)
    arguments = {**problem.arguments(), "student_scale": scale}
    loss = kd_loss(student, problem.teacher, problem.vectors, **arguments, reduction=reduction)
    gradient, scale_gradient = torch.autograd.grad(loss.sum(), (student, scale))
    return Answer(loss.detach(), gradient, scale_gradient)


# The reference


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_reference_is_the_papers_formula(temperature):
    problem = make_problem(Case(batch=5, temperature=temperature))
    student, teacher = problem.student.double(), problem.teacher.double()
    vectors = problem.vectors.double()
    z_s = problem.student_scale * F.normalize(student, dim=1) @ vectors.T
    z_t = problem.teacher_scale * F.normalize(teacher, dim=1) @ vectors.T
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    p_t = F.softmax(z_t / temperature, dim=1)
    expected = F.kl_div(log_p_s, p_t, reduction="sum") * temperature**2 / z_s.numel()
    arguments = problem.arguments()
    for function in (kd_loss, kd_loss_reference):
        loss = function(student, teacher, vectors, **arguments, reduction="paper")
        torch.testing.assert_close(loss, expected, rtol=EXACT, atol=0)
        mean = function(student, teacher, vectors, **arguments)
        torch.testing.assert_close(mean, expected * len(vectors), rtol=EXACT, atol=0)
        rows = function(student, teacher, vectors, **arguments, reduction="none")
        torch.testing.assert_close(rows.mean(), mean, rtol=EXACT, atol=0)


def test_statistics_and_logits_equal_the_full_path():
    problem = make_problem(Case(batch=4, temperature=3.0))
    student, teacher = problem.student.double().requires_grad_(), problem.teacher.double()
    vectors, arguments = problem.vectors.double(), problem.arguments()
    full = kd_loss(student, teacher, vectors, **arguments)
    (gradient,) = torch.autograd.grad(full, student)
    statistics = teacher_statistics(
        teacher, vectors, teacher_scale=problem.teacher_scale, temperature=3.0
    )
    logits = TeacherLogits(problem.teacher_scale * F.normalize(teacher, dim=1) @ vectors.T)
    for other in (statistics, logits):
        loss = kd_loss(student, other, vectors, **{**arguments, "teacher_scale": None})
        torch.testing.assert_close(loss, full, rtol=EXACT, atol=0)
        (got,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(got, gradient, rtol=1e-9, atol=EXACT)


# The CPU's fused path


@pytest.mark.parametrize("row", pairwise(GRID), ids=lambda x: "-".join(map(str, x.values())))
def test_cpu_path_over_every_pair(row):
    problem = make_problem(Case(**row, seed=row["batch"] * row["num_classes"] * row["width"]))
    assert_close(problem, exact_answer(problem), run_fused(problem), "tiles")


@pytest.mark.long
@pytest.mark.parametrize("num_classes", GRID["num_classes"])
@pytest.mark.parametrize("width", GRID["width"])
@pytest.mark.parametrize("dtype", GRID["dtype"], ids=str)
def test_cpu_path_over_the_whole_grid(num_classes, width, dtype):
    for batch in GRID["batch"]:
        for temperature in GRID["temperature"]:
            for scale in GRID["scale"]:
                case = Case(batch, num_classes, width, temperature, scale, dtype)
                problem = make_problem(case)
                for kind in TEACHERS:
                    chosen = replace_teacher(problem, kind)
                    assert_close(chosen, exact_answer(chosen), run_fused(chosen), "tiles")


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("by_rows", [True, False])
def test_both_ways_of_tiling(teacher, by_rows, monkeypatch):
    monkeypatch.setattr(tiles, "MIN_ROWS", 1 if by_rows else 1 << 30)
    monkeypatch.setattr(tiles, "MAX_TILE", 17)
    used = []
    for name in ("_by_rows", "_by_classes"):
        original = getattr(tiles, name)
        monkeypatch.setattr(tiles, name, lambda *a, f=original, n=name: (used.append(n), f(*a))[1])
    problem = make_problem(Case(batch=7, num_classes=102, teacher=teacher))
    assert_close(problem, exact_answer(problem), run_fused(problem), "tiles")
    if teacher != "statistics":
        assert used == ["_by_rows" if by_rows else "_by_classes"]


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", GRID["dtype"], ids=str)
def test_close_to_convergence(by_rows, teacher, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "MIN_ROWS", 1 if by_rows else 1 << 30)
    case = Case(batch=5, num_classes=100, dtype=dtype, teacher=teacher, temperature=1.0)
    problem = make_problem(replace(case, scale=8.0, noise=0.01, teacher_scale_ratio=1.0))
    answer, got = exact_answer(problem), run_fused(problem)
    mean = answer.loss.mean()
    assert 1e-6 < mean < 1e-4
    assert (got.loss >= 0).all()
    if teacher == "statistics":
        assert (got.loss.double() - answer.loss).abs().max() <= NEAR_STATISTICS_ERROR
    else:
        assert (got.loss.double() - answer.loss).abs().mean() <= NEAR_TOLERANCE * mean
    error = (got.gradient.double() - answer.gradient).norm() / answer.gradient.norm()
    assert error <= (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("batch", [3, 120])
@pytest.mark.parametrize("centred", [True, False])
def test_class_vectors_need_not_be_centred(batch, centred):
    problem = make_problem(Case(batch=batch, num_classes=150, centred=False))
    plain = exact_answer(problem)
    if centred:
        problem = replace(problem, vectors=problem.vectors - problem.vectors.mean(0))
        torch.testing.assert_close(exact_answer(problem).loss, plain.loss, rtol=1e-5, atol=0)
    got = run_fused(problem)
    torch.testing.assert_close(got.loss.double(), plain.loss, rtol=1e-5, atol=1e-6)
    assert (got.gradient.double() - plain.gradient).norm() <= 1e-5 * plain.gradient.norm()


@pytest.mark.parametrize("batch", [3, 120])
def test_equal_inputs_give_exactly_zero(batch):
    problem = make_problem(Case(batch=batch, num_classes=300, noise=0.0))
    got = run_fused(replace(problem, teacher_scale=problem.student_scale))
    assert got.loss.abs().max() == 0
    assert got.gradient.abs().max() == 0


def test_unlikely_classes_that_differ_wildly():
    """e^x of a class leaves the range although the rows are far from that class."""
    for batch in (2, 120):
        problem = make_problem(Case(batch=batch, num_classes=200, scale=2000.0, temperature=0.1))
        answer, got = exact_answer(problem), run_fused(problem)
        torch.testing.assert_close(got.loss.double(), answer.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [3, 120])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["student", "teacher", "vectors", "logits", "mu", "h"])
def test_non_finite_input_gives_a_non_finite_loss(batch, place, value):
    kind = {"logits": "logits", "mu": "statistics", "h": "statistics"}.get(place, "features")
    problem = make_problem(Case(batch=batch, num_classes=40, teacher=kind))
    owner = problem if place in ("student", "teacher", "vectors") else problem.teacher
    getattr(owner, place)[(1,) if place == "h" else (1, 2)] = value
    for function in (kd_loss, kd_loss_reference):
        rows = function(
            problem.student, problem.teacher, problem.vectors, **problem.arguments(),
            reduction="none",
        )  # fmt: skip
        assert not rows[1].isfinite()
        if place != "vectors":
            assert rows[[0, 2]].isfinite().all()


def test_zero_features_have_the_gradient_of_normalize():
    problem = make_problem(Case(num_classes=40))
    problem.student[1] = 0
    answer, got = exact_answer(problem), run_fused(problem)
    torch.testing.assert_close(got.gradient.double(), answer.gradient, rtol=1e-5, atol=1e-6)


def test_the_same_bits_every_time():
    problem = make_problem(Case(batch=100, num_classes=1000))
    first, second = run_fused(problem), run_fused(problem)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.gradient, second.gradient)


def test_onednn_and_plain_products_agree(monkeypatch):
    problem = make_problem(Case(batch=100, num_classes=500, width=96))
    monkeypatch.setattr(tiles, "_onednn_is_faster", lambda: False)
    plain = run_fused(problem)
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        monkeypatch.setattr(tiles, "_onednn_is_faster", lambda: True)
        torch.testing.assert_close(run_fused(problem).loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert_close(problem, exact_answer(problem), plain, "tiles")


def test_onednn_gives_way_where_its_private_op_is_gone(monkeypatch):
    def fail(*_args):
        raise RuntimeError("no such operator")

    tiles._onednn_is_faster.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", fail, raising=False)
    try:
        assert not tiles._onednn_is_faster()
    finally:
        tiles._onednn_is_faster.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("teacher", ["features", "statistics"])
@pytest.mark.parametrize(("batch", "num_classes"), [(8, 20_000), (128, 5000), (600, 3000)])
def test_no_storage_of_all_logits(batch, num_classes, teacher, dtype):
    problem = make_problem(Case(batch, num_classes, 16, dtype=dtype, teacher=teacher))
    student = problem.student.requires_grad_()
    largest = {}
    for function in (kd_loss, kd_loss_reference):
        with StorageSpy(problem.vectors) as spy:
            function(student, problem.teacher, problem.vectors, **problem.arguments()).backward()
        largest[function] = spy.largest
    assert largest[kd_loss] <= 0.55 * batch * num_classes
    assert largest[kd_loss_reference] >= batch * num_classes


def test_top_k_makes_no_storage_of_all_logits():
    problem = make_problem(Case(64, 5000, 16))
    with StorageSpy(problem.vectors) as spy:
        top_k(problem.student, problem.vectors, 5, scale=20.0)
    assert 0 < spy.largest <= 0.55 * 64 * 5000


# Gradients and how they travel


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("by_rows", [True, False])
def test_gradcheck_of_the_tiles(teacher, by_rows, monkeypatch):
    """Through normalisation and scale, in float64, which kd_loss itself leaves to the reference."""
    monkeypatch.setattr(tiles, "MIN_ROWS", 1 if by_rows else 1 << 30)
    monkeypatch.setattr(tiles, "MAX_TILE", 5)
    problem = make_problem(Case(batch=3, num_classes=11, width=6, scale=5.0, teacher=teacher))
    given = problem.teacher
    features = given.double() if teacher == "features" else None
    logits = given.logits.double() if teacher == "logits" else None
    mu, h = None, None
    if teacher == "statistics":
        mu, h = given.mu.double(), given.h.double()

    def loss(student, scale):
        rows, _, _ = op.kd_rows(
            student, scale, 1.0, problem.vectors.double(), features, None,
            problem.teacher_scale or 1.0, logits, mu, h, 2.0, "none", True,
        )  # fmt: skip
        return rows

    inputs = (
        problem.student.double().requires_grad_(),
        torch.tensor(5.0, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(loss, inputs, rtol=1e-6)
    torch.testing.assert_close(loss(*inputs), exact_answer(problem).loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", ["batchmean", "paper", "none"])
def test_gradient_is_multiplied_by_what_arrives(reduction):
    problem = make_problem(Case())
    student = problem.student.requires_grad_()
    weights = torch.tensor([3.0, -2.0, 0.5]) if reduction == "none" else torch.tensor(-7.0)
    gradients = []
    for function in (kd_loss, kd_loss_reference):
        loss = function(
            student, problem.teacher, problem.vectors, **problem.arguments(), reduction=reduction
        )
        gradients += torch.autograd.grad((loss * weights).sum(), student)
    fused, plain = gradients
    assert (fused - plain).norm() <= 1e-5 * plain.norm()


def test_only_the_student_gets_a_gradient():
    problem = make_problem(Case())
    tensors = [x.requires_grad_() for x in (problem.student, problem.teacher, problem.vectors)]
    scale = torch.tensor(30.0, requires_grad=True)
    for function in (kd_loss, kd_loss_reference):
        function(*tensors, student_scale=scale, teacher_scale=scale, temperature=2.0).backward()
        assert tensors[0].grad is not None
        assert tensors[1].grad is None
        assert tensors[2].grad is None
    statistics = teacher_statistics(
        problem.teacher, problem.vectors, teacher_scale=scale, temperature=2.0
    )
    assert not statistics.mu.requires_grad
    with torch.no_grad():
        assert not kd_loss(*tensors, student_scale=scale, teacher_scale=scale).requires_grad


def test_a_second_derivative_is_refused():
    problem = make_problem(Case())
    student = problem.student.requires_grad_()
    loss = kd_loss(student, problem.teacher, problem.vectors, **problem.arguments())
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features_beside_float32_class_vectors(dtype):
    problem = make_problem(Case())
    student = problem.student.to(dtype).requires_grad_()
    loss = kd_loss(student, problem.teacher, problem.vectors, **problem.arguments())
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == dtype
    exact = exact_answer(replace(problem, student=student.detach()))
    torch.testing.assert_close(loss.double(), exact.loss.mean(), rtol=1e-5, atol=0)


def test_autocast_changes_nothing():
    problem = make_problem(Case(batch=100, num_classes=200))
    plain = run_fused(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run_fused(problem)
        statistics = teacher_statistics(
            problem.teacher, problem.vectors, teacher_scale=30.0, temperature=2.0
        )
    assert torch.equal(cast.loss, plain.loss)
    assert torch.equal(cast.gradient, plain.gradient)
    assert statistics.mu.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    problem = make_problem(Case())
    student = problem.student.requires_grad_()

    def loss(x):
        return kd_loss(x * 2, problem.teacher, problem.vectors, **problem.arguments())

    (expected,) = torch.autograd.grad(loss(student), student)
    checkpoint(loss, student, use_reentrant=use_reentrant).backward()
    assert torch.equal(student.grad, expected)


RANK = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from promptkd.loss import kd_loss

class Step(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.scale = torch.nn.Parameter(torch.tensor(20.0))
    def forward(self, pictures, teacher, vectors):
        student = pictures @ self.weight
        return kd_loss(student, teacher, vectors, student_scale=self.scale, teacher_scale=25.0)

folder, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/meet{size}", rank=rank, world_size=size)
random = torch.Generator().manual_seed(3)
weight, vectors = (torch.randn(n, 9, generator=random) for n in (5, 40))
pictures, teacher = (torch.randn(8, n, generator=random) for n in (5, 9))
model = DistributedDataParallel(Step(weight))
loss = model(pictures[rank::size], teacher[rank::size], vectors)
loss.backward()
torch.save((model.module.weight.grad, model.module.scale.grad), f"{folder}/{size}-{rank}.pt")
dist.destroy_process_group()
"""


def test_ranks_of_data_parallel_training_get_the_gradient_of_the_whole_batch(tmp_path):
    arguments = [("0", "1"), ("0", "2"), ("1", "2")]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, tmp_path, *x], stderr=subprocess.PIPE)
        for x in arguments
    ]
    for rank in ranks:
        _, complaint = rank.communicate(timeout=240)
        assert rank.returncode == 0, complaint.decode()
    alone, first, second = (
        torch.load(tmp_path / f"{size}-{rank}.pt", weights_only=True) for rank, size in arguments
    )
    for one, two, whole in zip(first, second, alone, strict=True):
        assert torch.equal(one, two)
        assert whole.abs().max() > 0
        torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_operator_is_well_formed(teacher):
    problem = make_problem(Case(num_classes=20, width=16, teacher=teacher))
    given = problem.teacher
    features = given if teacher == "features" else None
    logits = given.logits if teacher == "logits" else None
    mu, h = (given.mu, given.h) if teacher == "statistics" else (None, None)
    arguments = (
        problem.student.requires_grad_(), torch.tensor(20.0, requires_grad=True), 1.0,
        problem.vectors, features, None, 25.0, logits, mu, h, 2.0, "batchmean", True,
    )  # fmt: skip
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.kd_rows, arguments, test_utils=checks)


def test_compile_keeps_the_operator_in_one_graph():
    problem = make_problem(Case())
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def loss(student):
        return kd_loss(student, problem.teacher, problem.vectors, **problem.arguments())

    student = problem.student.requires_grad_()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    torch._dynamo.reset()
    (expected,) = torch.autograd.grad(loss(student), student)
    (got,) = torch.autograd.grad(compiled(student), student)
    assert torch.equal(got, expected)
    assert len(graphs) == 1
    assert "kd_rows" in graphs[0].code


def test_export_keeps_the_operator():
    problem = make_problem(Case())

    class Loss(torch.nn.Module):
        def forward(self, student, teacher, vectors):
            return kd_loss(student, teacher, vectors, student_scale=20.0, teacher_scale=20.0)

    inputs = (problem.student, problem.teacher, problem.vectors)
    program = torch.export.export(Loss(), inputs)
    assert "kd_rows" in program.graph_module.code
    torch.testing.assert_close(program.module()(*inputs), Loss()(*inputs))


# The rest


@pytest.mark.parametrize("dtype", GRID["dtype"], ids=str)
@pytest.mark.parametrize(("num_classes", "k"), [(1, 1), (37, 37), (5000, 5)])
def test_top_k(num_classes, k, dtype):
    problem = make_problem(Case(batch=3, num_classes=num_classes, width=33, dtype=dtype))
    values, indices = top_k(problem.student, problem.vectors, k, scale=20.0)
    expected, classes = top_k(problem.student.double(), problem.vectors.double(), k, scale=20.0)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-7)
    logits = F.normalize(problem.student.double(), dim=1) @ problem.vectors.double().T
    torch.testing.assert_close(logits.gather(1, indices), logits.gather(1, classes))
    assert indices.dtype == torch.int64


def test_statistics_of_a_teacher_through_the_tiles():
    problem = make_problem(Case(batch=5, num_classes=3000))
    arguments = {"teacher_scale": 30.0, "temperature": 2.0}
    got = teacher_statistics(problem.teacher, problem.vectors, **arguments)
    exact = teacher_statistics(problem.teacher.double(), problem.vectors.double(), **arguments)
    torch.testing.assert_close(got.mu.double(), exact.mu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.h.double(), exact.h, rtol=1e-5, atol=1e-5)


WRONG = {
    "student width": ({"student": torch.ones(3, 4)}, ValueError, "features have shape"),
    "teacher batch": ({"teacher": torch.ones(2, 5)}, ValueError, "teacher features have shape"),
    "mu": (
        {"teacher": TeacherStatistics(torch.ones(3, 4), torch.ones(3)), "teacher_scale": None},
        ValueError,
        "mu have shape",
    ),
    "logits": (
        {"teacher": TeacherLogits(torch.ones(3, 5)), "teacher_scale": None},
        ValueError,
        "logits have shape",
    ),
    "one image": ({"student": torch.ones(5)}, ValueError, "not \\(B, D\\)"),
    "vectors": ({"vectors": torch.ones(5)}, ValueError, "not \\(C, D\\)"),
    "integers": ({"student": torch.ones(3, 5, dtype=torch.int64)}, TypeError, "not floating"),
    "dtype": ({"student": torch.ones(3, 5).double()}, TypeError, "give class_vectors in"),
    "two halves": (
        {
            "student": torch.ones(3, 5).half(),
            "teacher": torch.ones(3, 5).half(),
            "vectors": torch.ones(7, 5).bfloat16(),
        },
        TypeError,
        "give class_vectors in torch.float32",
    ),
    "no teacher scale": ({"teacher_scale": None}, ValueError, "need teacher_scale"),
    "scale beside logits": (
        {"teacher": TeacherLogits(torch.ones(3, 7))},
        ValueError,
        "leave it out",
    ),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
    "reduction": ({"reduction": "mean"}, ValueError, "reduction is 'mean'"),
    "scale": ({"student_scale": torch.ones(1)}, ValueError, "a scale has shape"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("function", [kd_loss, kd_loss_reference])
def test_what_does_not_fit_is_one_clear_error(function, name):
    changes, error, message = WRONG[name]
    arguments = {
        "student": torch.ones(3, 5),
        "teacher": torch.ones(3, 5),
        "vectors": torch.ones(7, 5),
        "student_scale": 1.0,
        "teacher_scale": 1.0,
        **changes,
    }
    positional = [arguments.pop(x) for x in ("student", "teacher", "vectors")]
    with pytest.raises(error, match=message) as caught:
        function(*positional, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [0, 8])
def test_top_k_refuses_other_k(k):
    with pytest.raises(ValueError, match="from 1 to the 7 classes"):
        top_k(torch.ones(2, 5), torch.ones(7, 5), k, scale=1.0)


def test_the_loss_does_not_import_triton():
    code = (
        "import sys, torch\n"
        "from promptkd.loss import kd_loss, top_k\n"
        "x = torch.ones(2, 4, requires_grad=True)\n"
        "kd_loss(x, torch.ones(2, 4), torch.eye(4), student_scale=1.0, teacher_scale=1.0)"
        ".backward()\n"
        "top_k(x, torch.eye(4), 1, scale=1.0)\n"
        "assert 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_the_kernels_the_reference_is_taken(monkeypatch):
    import promptkd.loss

    problem = make_problem(Case())
    monkeypatch.setattr(promptkd.loss, "op", None)
    loss = kd_loss(problem.student, problem.teacher, problem.vectors, **problem.arguments())
    expected = kd_loss_reference(
        problem.student, problem.teacher, problem.vectors, **problem.arguments()
    )
    assert torch.equal(loss, expected)
