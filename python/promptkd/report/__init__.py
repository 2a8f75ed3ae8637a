"""`promptkd report`: runs as one self-contained HTML file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promptkd.errors import DataError
from promptkd.files import write_bytes
from promptkd.report.page import page
from promptkd.report.reproduction import reproduction_section
from promptkd.report.student import student_section

__all__ = ["write_report"]


def write_report(runs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> Path:
    """Write one HTML file about runs: folders of `promptkd reproduce` or of `promptkd distill`.

    Raises:
        DataError: no runs, or a folder that is neither, or whose files are damaged.
    """
    if not runs:
        raise DataError("name at least one run: a folder made by 'promptkd reproduce' or 'distill'")
    sections = [_section(Path(run).expanduser()) for run in runs]
    target = Path(output).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(
        target, page("promptkd report", "<h1>promptkd report</h1>" + "".join(sections)).encode()
    )
    return target


def _section(run: Path) -> str:
    """A run's part of the page."""
    try:
        if (run / "results.json").is_file():
            data = _read(run / "results.json")
            if data.get("kind") == "promptkd reproduction":
                return reproduction_section(data)
        if (run / "student.json").is_file():
            return student_section(_read(run / "student.json"), run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"'{run}' holds a damaged result: {error!r}") from error
    raise DataError(
        f"'{run}' is no run: expected results.json of 'promptkd reproduce' or student.json of "
        "'promptkd distill'"
    )


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
