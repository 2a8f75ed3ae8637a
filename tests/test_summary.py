"""benches/summary.py lists what misses its target."""

import json
import subprocess
import sys
from pathlib import Path

SUMMARY = Path(__file__).parents[1] / "benches" / "summary.py"


def summary(folder: Path, *flags: str) -> list[str]:
    command = [sys.executable, str(SUMMARY), "--results", str(folder), *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_misses_are_listed(tmp_path: Path) -> None:
    rows = [
        {"name": "slow", "ratio": 1.5, "target": 2.0, "holds": False},
        {"name": "fast", "ratio": 3.0, "target": 2.0, "holds": True},
        {"name": "free", "ratio": 1.0, "target": None, "holds": None},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"machine": {}, "rows": rows}))
    (tmp_path / "b.json").write_text(json.dumps({"machine": {}, "rows": rows[1:]}))
    assert summary(tmp_path) == [
        "a: slow: 1.50x  target 2.00  MISSES",
        "a: 1 of 2 targets hold",
        "b: 1 of 1 targets hold",
    ]
    assert len(summary(tmp_path, "--all")) == 7
    assert summary(tmp_path / "nowhere")[0].startswith("no results in")
