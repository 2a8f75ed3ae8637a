"""Results of all cells as tables: mean ± standard deviation beside the paper's numbers."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from promptkd.benchmarks.paper import PAPER, PAPER_MEAN, PaperResult
from promptkd.benchmarks.reproduce.plan import VALIDATION_SHARE, Plan, trained_datasets
from promptkd.benchmarks.reproduce.teachers import REASONS
from promptkd.evaluate import harmonic_mean

Values = Mapping[str, float]
Spread = dict[str, float]
"""{"mean": …, "std": …}; the sample standard deviation, absent for a single value."""

_NONE = "\N{EN DASH}"
_COLLAPSED = "†"
_TEST_CHOSEN = "*"


def columns(protocol: str) -> dict[str, str]:
    """Keys of a protocol's numbers and the heads of their columns."""
    if protocol == "base-to-novel":
        return {"base": "base", "novel": "novel", "harmonic_mean": "HM", "all": "all classes"}
    return {"all": "accuracy"}


def summarise(plan: Plan, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All results as plain data: what results.json holds and the tables and the report show."""
    heads = columns(plan.protocol)
    keys = [key for key in plan.keys if any(r["dataset"] == key for r in results)]
    rows = [_row(key, [r for r in results if r["dataset"] == key], plan) for key in keys]
    return {
        "kind": "promptkd reproduction",
        "protocol": plan.protocol,
        "selection": plan.selection,
        "seeds": list(plan.seeds),
        "columns": heads,
        "compared": compared(plan.protocol),
        "notes": _notes(plan, results),
        "rows": rows,
        "mean": _mean_row(plan, rows, results) if rows else None,
        "root": str(plan.root.expanduser().absolute()),
        "models": {"teacher": plan.teacher or plan.model, "student": plan.student},
        "cells": list(results),
    }


def _row(key: str, results: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    heads = columns(plan.protocol)
    sound = [r["values"] for r in results if r["status"] == "done"]
    scored = [r["values"] for r in results if r["values"] is not None]
    failed = {str(r["seed"]): r["reasons"] for r in results if r["status"] != "done"}
    return {
        "dataset": key,
        "title": PAPER[key].title,
        "seeds": [r["seed"] for r in results],
        "ours": {c: spread([v[c] for v in scored]) for c in heads},
        "without_collapsed": {c: spread([v[c] for v in sound]) for c in heads} if failed else None,
        "paper": {c: published(PAPER[key].result, plan.protocol, c) for c in heads},
        "collapsed": failed,
    }


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    found = {"mean": statistics.fmean(values)}
    return found | ({"std": statistics.stdev(values)} if len(values) > 1 else {})


def published(result: PaperResult, protocol: str, column: str) -> float | None:
    """The paper's number of a column, None where it published none."""
    if protocol == "base-to-novel" and column != "all":
        found: float | None = getattr(result, column)
        return found
    return result.cross if protocol == "cross-dataset" else None


def _mean_row(
    plan: Plan, rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Means over datasets, of every seed that has a number for all of them."""
    keys = [row["dataset"] for row in rows]
    whole = set(keys) == set(trained_datasets(plan.protocol))
    paper = {c: [row["paper"][c] for row in rows] for c in columns(plan.protocol)}
    means = {c: None if None in v else statistics.fmean(v) for c, v in paper.items()}
    if "harmonic_mean" in means:
        means["harmonic_mean"] = harmonic_mean(means["base"], means["novel"])
    if whole:
        means = {c: published(PAPER_MEAN, plan.protocol, c) for c in means}
    return {
        "title": f"mean of {len(keys)}",
        "seeds": [s for s in plan.seeds if _over_datasets(s, keys, results, False) is not None],
        "ours": _seed_spread(plan, keys, results, False),
        "without_collapsed": _seed_spread(plan, keys, results, True)
        if any(row["collapsed"] for row in rows)
        else None,
        "paper": means,
        "collapsed": {f"{r['title']} {s}": why for r in rows for s, why in r["collapsed"].items()},
    }


def _seed_spread(
    plan: Plan, keys: Sequence[str], results: Sequence[dict[str, Any]], sound: bool
) -> dict[str, Spread | None]:
    found = [_over_datasets(seed, keys, results, sound) for seed in plan.seeds]
    kept = [values for values in found if values is not None]
    return {c: spread([v[c] for v in kept]) for c in columns(plan.protocol)}


def _over_datasets(
    seed: int, keys: Sequence[str], results: Sequence[dict[str, Any]], sound: bool
) -> dict[str, float] | None:
    """One seed's means over datasets; the harmonic mean is that of the means, as in the paper."""
    found = [
        r["values"]
        for r in results
        if r["seed"] == seed
        and r["dataset"] in keys
        and r["values"] is not None
        and (r["status"] == "done" or not sound)
    ]
    if len(found) < len(keys):
        return None
    means = {c: statistics.fmean(v[c] for v in found) for c in found[0]}
    both = harmonic_mean(means.get("base"), means.get("novel"))
    return means if both is None else {**means, "harmonic_mean": both}


def _notes(plan: Plan, results: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of a table has to know."""
    notes = []
    if plan.selection == "paper":
        notes.append(
            f"{_TEST_CHOSEN} selection 'paper': the best epoch was chosen on TEST pictures, as the "
            "official code does; these numbers are optimistic"
        )
    if plan.selection == "validation":
        notes.append(
            f"selection 'validation': {VALIDATION_SHARE:.0%} of the training pictures are kept aside; "
            "the epoch is taken whose student agrees with its teacher most on them (no label is seen)"
        )
    if plan.cache:
        notes.append(
            "learned from a teacher cache: all seeds with one teacher see the same random views"
        )
    changed = {**plan.distill, **{f"stage 1 {k}": v for k, v in plan.teach.items()}}
    if plan.shots != 16:
        changed["shots"] = plan.shots
    if changed:
        listed = ", ".join(f"{k} {_setting(v)}" for k, v in changed.items())
        notes.append(f"settings that differ from the paper's: {listed}")
    for r in results:
        if r["status"] != "done":
            what = "collapsed" if r["status"] == "collapsed" else "diverged, and has no numbers"
            notes.append(f"{_COLLAPSED} {r['title']} seed {r['seed']} {what}: {r['reasons'][0]}")
        if r["teacher"]["warning"] is not None:
            warning = r["teacher"]["warning"].removesuffix(f"; {REASONS}")
            notes.append(f"{r['title']} seed {r['seed']}: {warning}")
    if any(r["teacher"]["warning"] is not None for r in results):
        notes.append(f"where a teacher is below its own zero-shot accuracy, {REASONS}")
    return notes


def _setting(value: Any) -> str:
    return " | ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


# ---------------------------------------------------------------- as text
def number(value: float | None) -> str:
    """Two decimals as in the paper; – where there is no number."""
    return _NONE if value is None or math.isnan(value) else f"{value:.2f}"


def spread_text(found: Spread | None) -> str:
    """mean ± std, or the mean of a single seed."""
    if found is None:
        return _NONE
    return number(found["mean"]) + (f" ± {found['std']:.2f}" if "std" in found else "")


def main_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table: every number beside the paper's."""
    mark = _TEST_CHOSEN if summary["selection"] == "paper" else ""
    heads, rows = ["dataset"], []
    beside = compared(summary["protocol"])
    for column, head in summary["columns"].items():
        heads += [head + mark, "paper"] if column in beside else [head + mark]
    for row in [*summary["rows"], *([summary["mean"]] if summary["mean"] else [])]:
        failed = _COLLAPSED if row["collapsed"] else ""
        rows.append(_text_row(row["title"], row["ours"], row["paper"], beside, failed))
        if row["without_collapsed"] is not None:
            sound = row["without_collapsed"]
            rows.append(_text_row("  sound seeds only", sound, row["paper"], beside, ""))
    return heads, rows


def compared(protocol: str) -> list[str]:
    """Columns that stand beside the paper's: it has no accuracy over base and novel together."""
    return [c for c in columns(protocol) if c != "all" or protocol != "base-to-novel"]


def _text_row(
    title: str,
    ours: Mapping[str, Spread | None],
    paper: Mapping[str, float | None],
    beside: Sequence[str],
    failed: str,
) -> list[str]:
    cells = [title]
    for column, found in ours.items():
        cells.append(spread_text(found) + (f" {failed}" if failed else ""))
        if column in beside:
            cells.append(number(paper[column]))
    return cells


def detail_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row a cell: teacher, zero-shot student, top-5, calibration, agreement."""
    parts = ["base", "novel"] if summary["protocol"] == "base-to-novel" else ["all"]
    heads = ["cell", "teacher", "its zero-shot", "student", "its zero-shot", "top-5"]
    heads += [f"ECE {part}" for part in parts] + ["agreement", "KL"]
    rows = []
    for r in summary["cells"]:
        cells = [f"{r['title']} seed {r['seed']}", number(r["teacher"]["values"]["all"])]
        cells.append(number(r["teacher"]["zero_shot"]["all"]))
        if r["values"] is None:
            rows.append([*cells, r["status"], *[_NONE] * (len(heads) - 4)])
            continue
        scores, aside = r["scores"]["parts"], r["kept_aside"]
        cells += [number(r["values"]["all"]), number(r["student_zero_shot"]["all"])]
        cells.append(number(scores["all"]["top5"]))
        cells += [number(scores[part]["calibration_error"]) for part in parts]
        rows.append([*cells, number(aside["agreement"]), f"{aside['kl']:.3f}"])
    return heads, rows


def title(summary: dict[str, Any]) -> str:
    """What a table is of."""
    seeds = ", ".join(str(s) for s in summary["seeds"])
    chosen = {
        "clean": "last epoch",
        "validation": "best epoch on training pictures kept aside",
        "paper": "best epoch on TEST",
    }[summary["selection"]]
    return f"{summary['protocol']}, accuracy %, seeds {seeds}, {chosen}"


def terminal_table(summary: dict[str, Any]) -> Group:
    """For a terminal of 80 columns: the paper's numbers stand below one's own."""
    mark = _TEST_CHOSEN if summary["selection"] == "paper" else ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("dataset", no_wrap=True)
    for head in summary["columns"].values():
        table.add_column(head + mark, justify="right", no_wrap=True)
    for row in [*summary["rows"], *([summary["mean"]] if summary["mean"] else [])]:
        if row is summary["mean"]:
            table.add_section()
        failed = f" {_COLLAPSED}" if row["collapsed"] else ""
        table.add_row(row["title"] + failed, *map(spread_text, row["ours"].values()))
        if row["without_collapsed"] is not None:
            table.add_row("  sound seeds", *map(spread_text, row["without_collapsed"].values()))
        table.add_row("  the paper", *map(number, row["paper"].values()), style="dim")
    # Title and notes beside the table, not in it: there they would be as narrow as it is.
    notes = [Text(note, style="italic") for note in summary["notes"]]
    return Group(Text(title(summary), style="bold"), Text(), table, Text(), *notes)


def markdown(summary: dict[str, Any]) -> str:
    """Both tables and the notes."""
    blocks = [f"# {title(summary)}", _markdown_table(*main_table(summary))]
    if summary["notes"]:
        blocks.append("\n".join(f"- {note}" for note in summary["notes"]))
    blocks += ["## Every cell, all classes together", _markdown_table(*detail_table(summary))]
    return "\n\n".join(blocks) + "\n"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] + ["--:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def csv_text(summary: dict[str, Any]) -> str:
    """One row a dataset and one of means; plain numbers, empty where there is none."""
    keys = list(summary["columns"])
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    heads = [f"{c}{end}" for c in keys for end in ("", "_std", "_paper", "_delta")]
    table.writerow(["dataset", "protocol", "selection", "seeds", "collapsed_seeds", *heads])
    for row in [*summary["rows"], *([summary["mean"]] if summary["mean"] else [])]:
        cells: list[Any] = [row["title"], summary["protocol"], summary["selection"]]
        cells += [" ".join(map(str, row["seeds"])), "; ".join(row["collapsed"])]
        for c in keys:
            found, paper = row["ours"][c] or {}, row["paper"][c]
            mean = found.get("mean")
            delta = None if mean is None or paper is None else mean - paper
            cells += [mean, found.get("std"), paper, delta]
        table.writerow(["" if v is None else v for v in cells])
    return file.getvalue()
