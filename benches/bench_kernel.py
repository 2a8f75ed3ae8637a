"""The distillation loss, forward and backward: ours, eager torch and torch.compile.

    python benches/bench_kernel.py [--rounds 9] [--largest 200000]

prints the table, writes results/kernel.json and results/kernel.png. All sides are called in turn
on the same inputs. Without a GPU it is the CPU's table, with one thread and with all; times are
CPU time (of all threads together, waiting not counted), and peak memory is what the process grows
by during one call. With a GPU, times are by CUDA events and memory is torch's peak.
`pytest benches/bench_kernel.py --benchmark-only` times the parts one by one.
"""

import argparse
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# CPU time is measured: a thread that waits for another must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import matplotlib as mpl
import pytest
import torch
import torch.nn.functional as F
from common import RESULTS, Row, report
from promptkd.loss import kd_loss, kd_loss_reference, teacher_statistics
from torch import Tensor

mpl.use("Agg")
import matplotlib.pyplot as plt

BATCH, WIDTH = 256, 768
SCALE = 100.0
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
MIB = 1 << 20
# Eager's time over ours, on an AVX-512 AMD processor, and extra MiB at most.
TIME_TARGETS = {
    ("features", 1000): 1 / 0.65,
    ("statistics", 1000): 1 / 0.4,
    ("features", 21_841): 1 / 0.55,
    ("statistics", 21_841): 1 / 0.3,
}
MEMORY_TARGET_MIB = 16
# Class vectors read once at the copy bandwidth, or the products at the matmul peak (H100).
ROOFLINE_BYTES_PER_S, ROOFLINE_FLOP_PER_S = 3.0e12, 790e12


class Inputs:
    """The same features and class vectors for every side."""

    def __init__(self, num_classes: int, batch: int = BATCH) -> None:
        g = torch.Generator().manual_seed(0)
        vectors = F.normalize(torch.randn(num_classes, WIDTH, generator=g), dim=1)
        base = torch.randn(batch, WIDTH, generator=g)
        other = torch.randn(batch, WIDTH, generator=g)
        self.vectors = vectors.to(DEVICE, DTYPE)
        self.teacher = base.to(DEVICE, DTYPE)
        self.student = (base + 0.5 * other).to(DEVICE, DTYPE).requires_grad_()
        self.statistics = teacher_statistics(
            self.teacher, self.vectors, teacher_scale=SCALE, temperature=1.0
        )


def eager(student: Tensor, teacher: Tensor, vectors: Tensor) -> Tensor:
    """The loss as one writes it, the teacher's logits without a graph."""
    with torch.no_grad():
        p_t = F.softmax(SCALE * F.normalize(teacher, dim=1) @ vectors.T, dim=1)
    z_s = SCALE * F.normalize(student, dim=1) @ vectors.T
    return F.kl_div(F.log_softmax(z_s, dim=1), p_t, reduction="batchmean")


def sides(inputs: Inputs, *, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of each side; returns the student's gradient."""

    def run(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(loss(), inputs.student)[0]

    given = inputs.student, inputs.teacher, inputs.vectors
    out = {
        "eager": run(lambda: eager(*given)),
        "features": run(lambda: kd_loss(*given, student_scale=SCALE, teacher_scale=SCALE)),
        "statistics": run(
            lambda: kd_loss(inputs.student, inputs.statistics, inputs.vectors, student_scale=SCALE)
        ),
    }
    if compiled:
        fused = torch.compile(eager, dynamic=False)
        out["compile"] = run(lambda: fused(*given))
    return out


def seconds(function: Callable[[], Any]) -> float:
    if CUDA:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.process_time()
    function()
    return time.process_time() - begin


def time_in_turn(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def ratio_to(times: dict[str, list[float]], name: str, baseline: str = "eager") -> float:
    """Median of the ratios round by round: what slows the machine slows both."""
    return statistics.median(b / a for a, b in zip(times[name], times[baseline], strict=True))


def extra_mib(function: Callable[[], Any]) -> float:
    """Memory one call needs beyond what is held before it."""
    function()
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / MIB


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def gradient_error(inputs: Inputs, function: Callable[[], Tensor], rows: int = 32) -> float:
    """Relative to float64, of the first rows."""
    student = inputs.student[:rows].detach().double().requires_grad_()
    loss = kd_loss_reference(
        student,
        inputs.teacher[:rows].double(),
        inputs.vectors.double(),
        student_scale=SCALE,
        teacher_scale=SCALE,
    )
    (exact,) = torch.autograd.grad(loss, student)
    exact = exact * rows / len(inputs.student)
    return float((function()[:rows].double() - exact).norm() / exact.norm())


def launches(function: Callable[[], Any]) -> int | None:
    """CUDA kernels of one call; None on the CPU."""
    if not CUDA:
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages())


def main_table(rounds: int) -> tuple[list[Row], list[dict[str, Any]]]:
    rows, details = [], []
    all_threads = torch.get_num_threads()
    for num_classes in (1000, 21_841):
        inputs = Inputs(num_classes)
        for threads in (1,) if CUDA else sorted({1, all_threads}):
            torch.set_num_threads(threads)
            functions = sides(inputs, compiled=True)
            times = time_in_turn(functions, rounds)
            memory = {name: extra_mib(function) for name, function in functions.items()}
            where = f"N={num_classes} B={BATCH}" + ("" if CUDA else f" threads={threads}")
            for name, function in functions.items():
                details.append(
                    {
                        "shape": where,
                        "side": name,
                        "ms": 1e3 * statistics.median(times[name]),
                        "times_faster_than_eager": ratio_to(times, name),
                        "extra_mib": memory[name],
                        "gradient_error": gradient_error(inputs, function),
                        "launches": launches(function),
                    }
                )
            for name in ("features", "statistics"):
                target = None if CUDA else TIME_TARGETS[name, num_classes]
                ours = 1e3 * statistics.median(times[name])
                for other in ("eager", "compile"):
                    rows.append(
                        Row(
                            f"loss, {name}, {where}, against {other}",
                            ours,
                            ours * ratio_to(times, name, other),
                            "ms",
                            target if other == "eager" else None,
                        )
                    )
            if not CUDA and num_classes == 21_841:
                mib = max(memory["features"], 0.01)
                name = f"loss, extra memory, {where}, against {MEMORY_TARGET_MIB} MiB allowed"
                rows.append(Row(name, mib, MEMORY_TARGET_MIB, "MiB", 1.0))
                rows.append(
                    Row(f"loss, extra memory, {where}, against eager", mib, memory["eager"], "MiB")
                )
        torch.set_num_threads(all_threads)
    return rows, details


def curve(largest: int, rounds: int) -> list[dict[str, Any]]:
    """Time and memory against the number of classes."""
    points = []
    for num_classes in (10, 100, 1000, 5000, 21_841, 100_000, 200_000, 1_000_000):
        if num_classes > largest:
            break
        inputs = Inputs(num_classes)
        functions = sides(inputs, compiled=False)
        times = time_in_turn(functions, max(3, rounds // 3))
        points.append(
            {
                "num_classes": num_classes,
                "ms": {k: 1e3 * statistics.median(v) for k, v in times.items()},
                "extra_mib": {k: extra_mib(f) for k, f in functions.items()},
            }
        )
    return points


def plot(points: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes = [p["num_classes"] for p in points]
    for axis, key, label in zip(axes, ("ms", "extra_mib"), ("ms", "extra MiB"), strict=True):
        for name in points[0][key]:
            values = [max(p[key][name], 1e-2) for p in points]
            axis.loglog(sizes, values, marker="o", label=name)
        axis.set(xlabel="classes", ylabel=label)
    if CUDA:
        flop = [2 * BATCH * WIDTH * n * 4 / ROOFLINE_FLOP_PER_S for n in sizes]
        read = [WIDTH * n * 2 / ROOFLINE_BYTES_PER_S for n in sizes]
        roof = [1e3 * max(a, b) for a, b in zip(flop, read, strict=True)]
    else:
        speed = matmul_flop_per_s()
        roof = [1e3 * 2 * BATCH * WIDTH * n * 3 / speed for n in sizes]
    axes[0].loglog(sizes, roof, "k--", label="roofline of the products")
    axes[0].legend()
    figure.suptitle(f"Loss, forward and backward, batch {BATCH}, width {WIDTH}")
    figure.savefig(path, dpi=120)


def matmul_flop_per_s() -> float:
    """What one large product reaches here, by the faster library."""
    from promptkd.kernels import tiles

    a, b = torch.randn(BATCH, WIDTH), torch.randn(4096, WIDTH)
    best = min(seconds(lambda: tiles.product(a, b)) for _ in range(20))  # CPU seconds
    return 2 * BATCH * WIDTH * 4096 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--largest", type=int, default=200_000, help="classes in the plot")
    arguments = parser.parse_args()
    rows, details = main_table(arguments.rounds)
    for one in details:
        count = "" if one["launches"] is None else f"{one['launches']:4d} launches"
        print(
            f"{one['shape']:26} {one['side']:10} {one['ms']:9.2f} ms "
            f"{one['times_faster_than_eager']:6.2f} x eager {one['extra_mib']:8.1f} MiB extra  "
            f"gradient off by {one['gradient_error']:.1e} {count}"
        )
    points = curve(arguments.largest, arguments.rounds)
    report("kernel", rows, details=details, curve=points)
    plot(points, RESULTS / "kernel.png")


@pytest.mark.parametrize("side", ["eager", "features", "statistics"])
@pytest.mark.parametrize("num_classes", [1000, 21_841])
def test_loss(benchmark: Any, num_classes: int, side: str) -> None:
    benchmark.group = f"loss, N={num_classes}, forward and backward"
    benchmark(sides(Inputs(num_classes), compiled=False)[side])


if __name__ == "__main__":
    main()
