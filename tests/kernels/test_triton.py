"""The Triton kernels against float64: natively on a GPU, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from loss_cases import (
    GRID,
    NEAR_STATISTICS_ERROR,
    NEAR_TOLERANCE,
    Answer,
    Case,
    assert_close,
    exact_answer,
    make_problem,
    pairwise,
)
from promptkd.kernels import configs, op
from promptkd.loss import TeacherLogits, TeacherStatistics, kd_loss, kd_loss_reference, top_k

launch = pytest.importorskip("promptkd.kernels.launch")

DESIGNS = ("small", "split", "hybrid")
KINDS = {"features": "features", "logits": "logits", "statistics": "none"}


def run_kernels(problem, design, device, tile=None, weight=1.0, need_gradient=True):
    given, statistics = problem.teacher, (None, None)
    if isinstance(given, TeacherLogits):
        given, kind = given.logits.to(device), "logits"
    elif isinstance(given, TeacherStatistics):
        given, kind, statistics = None, "none", (given.mu.to(device), given.h.to(device))
    else:
        given, kind = given.to(device), "features"
    scale = torch.tensor(problem.student_scale, device=device)
    return Answer(
        *launch.kd_rows(
            problem.student.to(device),
            (scale, 1.0),
            given,
            kind,
            (None, problem.teacher_scale or 1.0),
            statistics,
            problem.vectors.to(device),
            problem.temperature,
            weight,
            need_gradient,
            design,
            tile,
        )
    )


def check(problem, answer, design, device, tile=None):
    got = run_kernels(problem, design, device, tile)
    summed = replace(got, scale_gradient=got.scale_gradient.double().sum())
    assert_close(problem, answer, summed, design)


def interpreter_tile(case, device):
    """Larger tiles for large problems: the interpreter's time goes by steps, not by elements."""
    if device.type == "cuda" or case.num_classes * case.width < 1 << 17:
        return None
    rows = 16 if case.batch <= 16 else 64
    return configs.Tile(rows, 512, 256, 4, 1)


def check_grid_row(row, design, device):
    case = Case(**row, seed=row["batch"] * row["num_classes"] * row["width"])
    size = torch.empty(0, dtype=case.dtype).element_size()
    if design == "small" and (
        case.teacher == "statistics" or case.num_classes > max(configs.SMALL_TILES[size])
    ):
        design = "split"
    if design == "split" and not configs.fits_split(case.width, size):
        design = "hybrid"
    problem = make_problem(case)
    tile = None if design == "small" else interpreter_tile(case, device)
    check(problem, exact_answer(problem), design, device, tile)


@pytest.mark.parametrize(
    "row", pairwise({**GRID, "design": DESIGNS}), ids=lambda x: "-".join(map(str, x.values()))
)
def test_every_pair_of_shape_dtype_and_teacher(row, device):
    row = dict(row)
    check_grid_row(row, row.pop("design"), device)


@pytest.mark.long
@pytest.mark.parametrize("width", GRID["width"])
@pytest.mark.parametrize("num_classes", GRID["num_classes"])
@pytest.mark.parametrize("batch", GRID["batch"])
def test_every_shape(batch, num_classes, width, device):
    """Every shape with every design; the other factors take turns, all of them on a GPU."""
    shape = {"batch": batch, "num_classes": num_classes, "width": width}
    rest = pairwise({k: v for k, v in GRID.items() if k not in shape})
    start = GRID["width"].index(width) + 5 * GRID["num_classes"].index(num_classes)
    for i, design in enumerate(DESIGNS):
        chosen = rest if device.type == "cuda" else [rest[(3 * start + i) % len(rest)]]
        for row in chosen:
            check_grid_row({**shape, **row}, design, device)


@pytest.mark.parametrize("dtype", GRID["dtype"], ids=str)
@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("design", DESIGNS)
def test_close_to_convergence(design, teacher, dtype, device):
    """Where KL is about 1e-5 differences of logits cancel; the non-negative forms do not."""
    if (design, teacher) == ("small", "statistics"):
        pytest.skip("statistics do not go to this design")
    case = Case(batch=5, num_classes=100, dtype=dtype, teacher=teacher, temperature=1.0)
    problem = make_problem(replace(case, scale=8.0, noise=0.01, teacher_scale_ratio=1.0))
    answer = exact_answer(problem)
    mean = answer.loss.mean()
    assert 1e-6 < mean < 1e-4
    got = run_kernels(problem, design, device)
    assert (got.loss >= 0).all()
    if teacher == "statistics":
        assert (got.loss.double().cpu() - answer.loss).abs().max() <= NEAR_STATISTICS_ERROR
    else:
        assert (got.loss.double().cpu() - answer.loss).abs().mean() <= NEAR_TOLERANCE * mean
    error = (got.gradient.double().cpu() - answer.gradient).norm() / answer.gradient.norm()
    assert error <= (2e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("centred", [True, False])
def test_class_vectors_need_not_be_centred(design, centred, device):
    problem = make_problem(Case(batch=4, num_classes=70, centred=centred))
    if centred:
        moved = replace(problem, vectors=problem.vectors - problem.vectors.mean(0))
        plain, other = exact_answer(problem), exact_answer(moved)
        torch.testing.assert_close(other.loss, plain.loss, rtol=1e-5, atol=0)
        problem = moved
    check(problem, exact_answer(problem), design, device)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("dtype", GRID["dtype"], ids=str)
def test_equal_inputs_give_exactly_zero(design, dtype, device):
    problem = make_problem(Case(batch=3, num_classes=90, noise=0.0, dtype=dtype))
    got = run_kernels(replace(problem, teacher_scale=problem.student_scale), design, device)
    assert got.loss.tolist() == [0.0, 0.0, 0.0]
    assert got.gradient.abs().max() == 0


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("dtype", GRID["dtype"], ids=str)
def test_certain_and_equal_answers_give_no_gradient(design, dtype, device):
    """All of p on one class, on both sides: p = e^(z - lse) is 1 only if z and lse agree to the
    bit, though a rounding of z is 1e-3 at this scale.
    """
    case = Case(batch=3, num_classes=102, width=64, temperature=0.1, scale=1000.0, dtype=dtype)
    problem = make_problem(replace(case, teacher="logits", seed=19584))
    assert exact_answer(problem).gradient.abs().max() == 0
    got = run_kernels(problem, design, device)
    assert got.gradient.abs().max() == 0
    assert got.loss.max() <= 1e-4


@pytest.mark.parametrize("design", DESIGNS)
def test_the_same_bits_every_time(design, device):
    problem = make_problem(Case(batch=20, num_classes=102, dtype=torch.float16))
    first, second = run_kernels(problem, design, device), run_kernels(problem, design, device)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.gradient, second.gradient)
    assert torch.equal(first.scale_gradient, second.scale_gradient)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["student", "teacher", "vectors", "logits", "mu"])
@pytest.mark.parametrize("design", DESIGNS)
def test_non_finite_input_gives_a_non_finite_loss(design, place, value, device):
    kind = {"logits": "logits", "mu": "statistics"}.get(place, "features")
    if (design, kind) == ("small", "statistics"):
        pytest.skip("statistics do not go to this design")
    problem = make_problem(Case(num_classes=40, teacher=kind))
    target = {
        "student": problem.student,
        "vectors": problem.vectors,
        "teacher": problem.teacher,
        "logits": getattr(problem.teacher, "logits", None),
        "mu": getattr(problem.teacher, "mu", None),
    }[place]
    target[1, 2] = value
    loss = run_kernels(problem, design, device).loss
    assert not loss[1].isfinite()
    if place != "vectors":
        assert loss[[0, 2]].isfinite().all()


@pytest.mark.parametrize("design", DESIGNS)
def test_loss_without_gradient(design, device):
    problem = make_problem(Case(num_classes=50))
    got = run_kernels(problem, design, device, need_gradient=False)
    full = run_kernels(problem, design, device)
    assert torch.equal(got.loss, full.loss)
    assert got.gradient.abs().max() == 0


@pytest.mark.parametrize("design", DESIGNS)
def test_zero_features_have_the_gradient_of_normalize(design, device):
    problem = make_problem(Case(num_classes=40))
    problem.student[1] = 0
    answer, got = exact_answer(problem), run_kernels(problem, design, device)
    torch.testing.assert_close(got.loss.cpu().double(), answer.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        got.gradient[1].cpu().double(), answer.gradient[1], rtol=1e-4, atol=1e-4 * 1e12
    )


def test_a_scale_may_be_a_number_or_a_tensor(device):
    problem = make_problem(Case(num_classes=60))
    with_tensor = run_kernels(problem, "split", device)
    student, vectors = problem.student.to(device), problem.vectors.to(device)
    rows = launch.kd_rows(
        student, (None, problem.student_scale), problem.teacher.to(device), "features",
        (torch.tensor(problem.teacher_scale, device=device), 1.0), (None, None), vectors,
        problem.temperature, 1.0, True, "split",
    )  # fmt: skip
    assert torch.equal(rows[0], with_tensor.loss)


@pytest.mark.parametrize("dtype", GRID["dtype"], ids=str)
def test_statistics_of_a_teacher(dtype, device):
    problem = make_problem(Case(batch=3, num_classes=150, dtype=dtype))
    mu, h = launch.statistics(
        problem.teacher.to(device), (None, 30.0), problem.vectors.to(device), 2.0
    )
    features, vectors = F.normalize(problem.teacher.double(), dim=1), problem.vectors.double()
    log_p = F.log_softmax(15 * features @ vectors.T, dim=1)
    tolerance = 1e-4 if dtype == torch.bfloat16 else 5e-6
    torch.testing.assert_close(
        mu.cpu().double(), log_p.exp() @ vectors, rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        h.cpu().double(), (log_p.exp() * log_p).sum(1), rtol=tolerance, atol=1e-5
    )


@pytest.mark.parametrize("num_classes", [5, 300])
@pytest.mark.parametrize("k", [1, 5])
def test_top_k(num_classes, k, device):
    problem = make_problem(Case(batch=3, num_classes=num_classes))
    values, indices = launch.top_k(
        problem.student.to(device), (None, 20.0), problem.vectors.to(device), k
    )
    expected, classes = top_k(problem.student.double(), problem.vectors.double(), k, scale=20.0)
    assert torch.equal(indices.cpu(), classes)
    torch.testing.assert_close(values.cpu().double(), expected, rtol=1e-5, atol=1e-7)


def test_top_k_takes_the_lower_class_of_equal_ones(device):
    vectors = F.normalize(torch.ones(140, 16), dim=1)
    _, indices = launch.top_k(torch.ones(2, 16, device=device), (None, 5.0), vectors.to(device), 4)
    assert indices.tolist() == [[0, 1, 2, 3]] * 2


def test_the_operator_reaches_the_kernels(device, monkeypatch):
    """What a CUDA tensor does, here with the operator told that the CPU takes kernels."""
    monkeypatch.setattr(op, "_takes_kernels", lambda features: True)
    problem = make_problem(Case(num_classes=45))
    expected = kd_loss_reference(
        problem.student, problem.teacher, problem.vectors, **problem.arguments(), reduction="paper"
    )
    rows, _, _ = op.kd_rows(
        problem.student.to(device), None, problem.student_scale, problem.vectors.to(device),
        problem.teacher.to(device), None, problem.teacher_scale, None, None, None,
        problem.temperature, "paper", True,
    )  # fmt: skip
    torch.testing.assert_close(rows.sum().cpu(), expected, rtol=1e-5, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("design", DESIGNS)
def test_a_cuda_graph_captures_loss_and_gradient(design, device, monkeypatch):
    """Replayed on other features it gives their loss; nothing waits for the GPU meanwhile."""
    monkeypatch.setattr(configs, "choose_design", lambda *_: design)
    problem = make_problem(Case(batch=20, num_classes=102))
    student = problem.student.to(device).requires_grad_()
    teacher, vectors = problem.teacher.to(device), problem.vectors.to(device)
    arguments = {
        **problem.arguments(), "student_scale": torch.tensor(problem.student_scale, device=device)
    }  # fmt: skip

    def step():
        loss = kd_loss(student, teacher, vectors, **arguments)
        return loss.detach(), *torch.autograd.grad(loss, student)

    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        for _ in range(2):  # compiles the kernels
            first = step()
    torch.cuda.current_stream().wait_stream(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        student.copy_(student.flip(0) + 0.1)
    graph.replay()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, wanted, before in zip(captured, expected, first, strict=True):
        assert torch.equal(got, wanted)
        assert not torch.equal(got, before)


def test_table_of_shapes():
    choose = configs.choose_design
    assert choose(256, 100, 768, 2, "features") == "small"
    assert choose(256, 100, 768, 2, "none") == "split"
    assert choose(256, 400, 768, 4, "features") == "split"
    assert choose(64, 100_000, 768, 2, "features") == "split"
    assert choose(256, 21_841, 768, 2, "features") == "hybrid"
    assert choose(8, 1000, 1280, 2, "features") == "hybrid"
    for batch, num_classes in ((1, 1), (1, 10**6), (64, 100_000), (4096, 1000)):
        for element_size in (2, 4):
            tile = configs.split_tile(768, element_size)
            splits, tiles = configs.split_classes(batch, num_classes, tile)
            covered = splits * tiles * tile.classes
            assert covered >= num_classes > (splits - 1) * tiles * tile.classes
    for batch, num_classes in ((128, 20_001), (4096, 10**6)):
        chunk = configs.chunk_classes(batch, num_classes, 2, configs.HYBRID_TILES[2])
        assert chunk < num_classes
        assert chunk * batch * 2 <= configs.SCRATCH_BYTES
    for width in (1, 64, 65, 512, 768, 1000, 1024):
        assert sum(configs.split_width(width)) >= width
