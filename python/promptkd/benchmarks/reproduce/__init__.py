"""`promptkd reproduce`: the paper's table beside one's own numbers, honestly computed."""

from __future__ import annotations

from typing import Any

from promptkd.benchmarks.reproduce.cells import run_cell
from promptkd.benchmarks.reproduce.plan import Cell, Plan, finished, make_cells, trained_datasets
from promptkd.benchmarks.reproduce.summary import csv_text, markdown, summarise, terminal_table
from promptkd.files import write_bytes, write_json
from promptkd.report import write_report
from promptkd.stages.progress import Progress

__all__ = ["Cell", "Plan", "reproduce", "terminal_table", "trained_datasets"]


def reproduce(plan: Plan, progress: Progress | None = None) -> dict[str, Any]:
    """Run every cell that isn't finished; write tables and the report; return the summary.

    A cell is one dataset with one seed. Finished cells are read, not run again; an interrupted
    one goes on where it stopped. Tables are written after every cell.

    Args:
        plan: what to run.
        progress: where to report; default: a bar or lines on stderr.

    Raises:
        DataError: a dataset that can't be read, or settings that make no sense.
        CheckpointError: the output folder holds results of other settings.
    """
    progress = progress or Progress()
    cells = make_cells(plan)
    results = {place: found for place, c in enumerate(cells) if (found := finished(c)) is not None}
    if results:
        progress.say(f"{len(results)} of {len(cells)} cells are finished already")
    for place, cell in enumerate(cells):
        if place not in results:
            results[place] = run_cell(cell, progress)
            _write(plan, [results[p] for p in sorted(results)])
    return _write(plan, [results[p] for p in sorted(results)])


def _write(plan: Plan, results: list[dict[str, Any]]) -> dict[str, Any]:
    summary = summarise(plan, results)
    folder = plan.output.expanduser()
    write_json(folder / "results.json", summary)
    write_bytes(folder / "results.csv", csv_text(summary).encode())
    write_bytes(folder / "results.md", markdown(summary).encode())
    write_report([folder], folder / "report.html")
    return summary
