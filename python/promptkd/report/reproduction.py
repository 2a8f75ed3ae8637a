"""A reproduction's part of the report: tables, curves, calibration, classes, confusions, costs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from promptkd.report.charts import line_chart, reliability_chart
from promptkd.report.page import class_bars, pair_card, table, thumbnail

_NONE = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
_SHOWN_CLASSES = 20
_SHOWN_PAIRS = 6
_CHOSEN = {
    "clean": "last epoch of every run",
    "validation": "the epoch with the best agreement on training pictures kept aside",
    "paper": "best epoch chosen on TEST pictures, as the official code does",
}


def reproduction_section(summary: Mapping[str, Any]) -> str:
    """HTML of a results.json."""
    chosen = _CHOSEN[summary["selection"]]
    models = summary["models"]
    parts = [
        f"<h2>{escape(summary['protocol'])}</h2>",
        f"<p>Accuracy in percent, mean ± standard deviation over seeds {_list(summary['seeds'])}; "
        f"{chosen}. Teacher {escape(str(models['teacher']))}, student "
        f"{escape(str(models['student']))}.</p>",
        accuracy_table(summary),
        *(f'<div class="note">{escape(note)}</div>' for note in summary["notes"]),
    ]
    for row in summary["rows"]:
        cells = [c for c in summary["cells"] if c["dataset"] == row["dataset"]]
        parts.append(_dataset(row["title"], cells, Path(summary["root"])))
    parts += ["<h2>Throughput and time</h2>", _costs(summary["cells"])]
    parts += ["<h2>Settings and fingerprints</h2>", _settings(summary["cells"])]
    return "".join(parts)


def accuracy_table(summary: Mapping[str, Any]) -> str:
    """Every number beside the paper's, and their difference."""
    mark = "*" if summary["selection"] == "paper" else ""
    heads, rows = ["dataset"], []
    rated = summary["compared"]
    for column, head in summary["columns"].items():
        heads += [head + mark, "paper", "Δ"] if column in rated else [head + mark]
    for row in [*summary["rows"], *([summary["mean"]] if summary["mean"] else [])]:
        failed = " †" if row["collapsed"] else ""
        rows.append(_accuracy_row(row["title"], row["ours"], row["paper"], rated, failed))
        if row["without_collapsed"] is not None:
            title = "\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}sound seeds only"
            rows.append(_accuracy_row(title, row["without_collapsed"], row["paper"], rated, ""))
    titles = [row[0] for row in rows]
    mean = titles.index(summary["mean"]["title"]) if summary["mean"] else None
    return table(heads, rows, mean)


def _accuracy_row(
    title: str,
    ours: Mapping[str, Any],
    paper: Mapping[str, float | None],
    rated: Collection[str],
    failed: str,
) -> list[str]:
    """A number a column; beside those that the paper has, the paper's and the difference."""
    cells = [title]
    for column, found in ours.items():
        mean: Any = None if found is None else found["mean"]
        deviation = f" ± {found['std']:.2f}" if found is not None and "std" in found else ""
        cells.append(_number(mean) + deviation + failed)
        if column in rated:
            published: Any = paper[column]
            cells.append(_number(published))
            cells.append(_NONE if None in (mean, published) else _signed(mean - published))
    return cells


def _dataset(title: str, cells: Sequence[Mapping[str, Any]], root: Path) -> str:
    scored = [c for c in cells if c["scores"] is not None]
    charts = [_curves(cells)]
    if scored:
        charts += [_reliability(scored, part) for part in _parts(scored[0])]
    parts = [f"<h2>{escape(title)}</h2>", _cell_table(cells)]
    parts.append(f'<div class="charts">{"".join(charts)}</div>')
    if scored:
        parts += [_classes(scored), _confusions(scored, root)]
    return "".join(parts)


def _parts(cell: Mapping[str, Any]) -> list[str]:
    """Base and novel where there are halves, else all classes."""
    return [p for p in cell["scores"]["parts"] if p != "all"] or ["all"]


def _cell_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Seed by seed: teacher, zero-shot and student, top-5, calibration, agreement."""
    parts = next((_parts(c) for c in cells if c["scores"] is not None), ["all"])
    heads = ["seed", "state", "teacher", "its zero-shot", "student", "its zero-shot", "top-5"]
    heads += [f"ECE {part}" for part in parts] + ["agreement", "KL"]
    rows = []
    for cell in cells:
        teacher = cell["teacher"]
        row = [str(cell["seed"]), cell["status"]]
        row += [_number(teacher["values"]["all"]), _number(teacher["zero_shot"]["all"])]
        if cell["scores"] is None:
            rows.append([*row, *[_NONE] * (len(heads) - len(row))])
            continue
        found = cell["scores"]["parts"]
        row += [_number(found["all"]["top1"]), _number(cell["student_zero_shot"]["all"])]
        row.append(_number(found["all"]["top5"]))
        row += [_number(found[part]["calibration_error"]) for part in parts]
        aside = cell["kept_aside"]
        rows.append([*row, _number(aside["agreement"]), f"{aside['kl']:.3f}"])
    caption = "<p>All classes together; agreement with the teacher on pictures kept aside.</p>"
    return caption + table(heads, rows)


def _curves(cells: Sequence[Mapping[str, Any]]) -> str:
    """Training loss by step, and agreement on pictures kept aside by epoch, a line a seed."""
    loss = [(f"seed {c['seed']}", [(s, v) for s, v in c["curves"]["loss"]]) for c in cells]
    epochs = [(f"seed {c['seed']}", c["curves"]["epochs"]) for c in cells]
    charts = line_chart("training loss", "step", loss)
    for key, title in (
        ("agreement", "agreement with the teacher, %"),
        ("kl", "KL to the teacher"),
        ("test_accuracy", "TEST accuracy that the epoch is chosen by, %"),
    ):
        lines = [(name, [(r["epoch"], r[key]) for r in rows if key in r]) for name, rows in epochs]
        charts += line_chart(title, "epoch", lines)
    return charts


def _reliability(cells: Sequence[Mapping[str, Any]], part: str) -> str:
    """The pictures of all seeds in one diagram."""
    pooled: dict[float, list[float]] = {}
    for cell in cells:
        for b in cell["scores"]["parts"][part]["bins"]:
            total = pooled.setdefault(b["lower"], [0.0, 0.0, 0.0])
            for place, value in enumerate((1.0, b["confidence"], b["accuracy"])):
                total[place] += b["num_images"] * value
    bins = [(low, int(n), sure / n, right / n) for low, (n, sure, right) in sorted(pooled.items())]
    error = statistics.fmean(c["scores"]["parts"][part]["calibration_error"] for c in cells)
    name = "all classes" if part == "all" else f"{part} classes"
    return reliability_chart(f"calibration, {name}", bins, error)


def _classes(cells: Sequence[Mapping[str, Any]]) -> str:
    """Mean accuracy of every class over seeds, the worst first."""
    found: dict[int, tuple[str, int, list[float]]] = {}
    for cell in cells:
        for c in cell["scores"]["classes"]:
            found.setdefault(c["label"], (c["name"], c["num_images"], []))[2].append(c["accuracy"])
    rows = sorted(
        ((name, statistics.fmean(values), count) for name, count, values in found.values()),
        key=lambda row: (row[1], row[0]),
    )
    head = "<h3>Accuracy by class, the worst first</h3>" + class_bars(rows[:_SHOWN_CLASSES])
    rest = rows[_SHOWN_CLASSES:]
    if not rest:
        return head
    return f"{head}<details><summary>{len(rest)} more classes</summary>{class_bars(rest)}</details>"


def _confusions(cells: Sequence[Mapping[str, Any]], root: Path) -> str:
    """The most frequent confusions over all seeds, with pictures where they can be found."""
    found: dict[tuple[str, str], tuple[int, list[str]]] = {}
    for cell in cells:
        for c in cell["scores"]["confusions"]:
            key = (c["truth"], c["taken_for"])
            count, names = found.get(key, (0, []))
            names += [n for n in c["examples"] if n not in names]
            found[key] = (count + c["num_images"], names)
    ordered = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))[:_SHOWN_PAIRS]
    if not ordered:
        return "<h3>Confusions</h3><p>None: every test picture was right.</p>"
    seeds = f" in {len(cells)} runs" if len(cells) > 1 else ""
    cards, lost = [], 0
    for (truth, taken_for), (count, names) in ordered:
        urls = [url for name in names[:3] if (url := thumbnail(root, name)) is not None]
        lost += min(len(names), 3) - len(urls)
        pictures = "picture" if count == 1 else "pictures"
        cards.append(pair_card(truth, taken_for, f"{count} {pictures}{seeds}", urls))
    missing = f"<p>{lost} example pictures are no longer to be found.</p>" if lost else ""
    return f'<h3>Most frequent confusions</h3><div class="pairs">{"".join(cards)}</div>{missing}'


def _costs(cells: Sequence[Mapping[str, Any]]) -> str:
    parts = list(dict.fromkeys(part for c in cells for part in c["seconds"]))
    rows = []
    for cell in cells:
        speed = cell["images_per_second"]
        times = [f"{cell['seconds'][p]:.1f}" if p in cell["seconds"] else _NONE for p in parts]
        rows.append(
            [
                f"{cell['title']} seed {cell['seed']}",
                _NONE if speed is None else f"{speed:.0f}",
                *times,
            ]
        )
    return table(["run", "stage 2, pictures/s", *(f"{p}, s" for p in parts)], rows)


def _settings(cells: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f"<details><summary>{escape(cell['title'])} seed {cell['seed']}: "
        f"{escape(cell['fingerprint'])}</summary><pre>{escape(_facts(cell))}</pre></details>"
        for cell in cells
    )


def _facts(cell: Mapping[str, Any]) -> str:
    teacher = {k: cell["teacher"][k] for k in ("model", "method", "fingerprint")}
    facts = {
        "teacher": teacher,
        "student backbone": cell.get("student_backbone"),
        "unreadable pictures": cell["unreadable"],
        "settings": cell["settings"],
    }
    return json.dumps(facts, indent=1, ensure_ascii=False)


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


def _signed(value: float) -> str:
    return f"+{value:.2f}" if value >= 0 else f"{_MINUS}{-value:.2f}"


def _list(values: Sequence[Any]) -> str:
    return escape(", ".join(map(str, values)))
