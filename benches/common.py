"""What the benchmarks share: interleaved timing, rows with targets, and the file they go to."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured ratio; `ratio` is how many times better ours is."""

    name: str
    ours: float
    baseline: float
    unit: str
    target: float | None = None

    @property
    def ratio(self) -> float:
        more_is_better = self.unit.endswith("/s")
        return self.ours / self.baseline if more_is_better else self.baseline / self.ours

    def as_json(self) -> dict[str, Any]:
        holds = None if self.target is None else self.ratio >= self.target
        return {**asdict(self), "ratio": self.ratio, "holds": holds}


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function, called in turn so that all see the same machine."""
    if warm_up:
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return seconds


def typical(seconds: Sequence[float]) -> float:
    """The median: other work on the machine lifts single values."""
    return statistics.median(seconds)


def status_bytes(field: str) -> int:
    """A field of this process' memory, for example VmRSS."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "load": round(os.getloadavg()[0], 1),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.partition(":")[::2] for line in reversed(lines) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    family = f"family {fields.get('cpu family')}, model {fields.get('model')}"
    return f"{fields.get('model name')} ({family})"


def report(bench: str, rows: Sequence[Row], *, output: Path | None = None, **more: Any) -> Path:
    """Print the rows as a table and write results/<bench>.json."""
    width = max(len(row.name) for row in rows)
    print(f"{'':{width}}  {'ours':>10} {'baseline':>10}  unit       ratio  target")
    for row in rows:
        target = "" if row.target is None else f"{row.target:6.2f}"
        verdict = "" if row.target is None else ("holds" if row.ratio >= row.target else "MISSES")
        print(
            f"{row.name:{width}}  {row.ours:10.4g} {row.baseline:10.4g}  {row.unit:9} "
            f"{row.ratio:6.2f}  {target} {verdict}"
        )
    path = output or RESULTS / f"{bench}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "rows": [row.as_json() for row in rows], **more}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
