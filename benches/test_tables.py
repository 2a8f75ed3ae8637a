"""`pytest benches`: every benchmark prints its table and writes its file and plot.

Hours on a slow machine; `pytest benches -k kernel` runs one. Nothing here judges a time.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BENCHES = sorted(HERE.glob("bench_*.py"))


@pytest.mark.parametrize("bench", BENCHES, ids=lambda path: path.stem.removeprefix("bench_"))
def test_table(bench: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = HERE / "results" / f"{bench.stem.removeprefix('bench_')}.json"
    before = results.stat().st_mtime_ns if results.exists() else 0
    with capfd.disabled():
        code = subprocess.call([sys.executable, str(bench)])
    assert code == 0
    assert results.stat().st_mtime_ns > before
