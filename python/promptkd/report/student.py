"""A single distillation's part of the report: its curves, throughput, settings, fingerprints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from promptkd.report.charts import line_chart, reliability_chart
from promptkd.report.page import class_bars, table

_NONE = "\N{EN DASH}"
_SHOWN = 20  # classes that the teacher sees most often


def student_section(data: Mapping[str, Any], run: Path) -> str:
    """HTML of a student folder made by `promptkd distill`."""
    summary: Mapping[str, Any] = data["summary"]
    log = _log(run / "distill_log.jsonl")
    parts = [
        f"<h2>{escape(run.name)}</h2>",
        f"<p>Student {escape(data['backbone'])} of teacher {escape(data['teacher'])}, "
        f"{len(data['class_names'])} classes.</p>",
    ]
    if summary.get("failed"):
        parts.append(
            '<div class="note">Failed: it agrees with its teacher less than before distilling.</div>'
        )
    parts.append(_facts_table(summary, log))
    history = summary.get("history", [])
    charts = line_chart("training loss", "step", [("loss", _points(log, "loss"))])
    for key, title in (
        ("agreement", "agreement with the teacher, %"),
        ("holdout_kl", "KL to the teacher"),
    ):
        charts += line_chart(title, "step", [("pictures kept aside", _points(history, key))])
    parts.append(f'<div class="charts">{charts}</div>')
    if (known := data.get("calibration")) is not None:
        parts.append(_calibration(known))
    seen = (summary.get("teacher_report") or {}).get("predictions", {})
    if seen:
        total = max(sum(seen.values()), 1)
        rows = [(n, 100 * c / total, c) for n, c in sorted(seen.items(), key=lambda kv: -kv[1])]
        shown = (
            "" if len(rows) <= _SHOWN else f", the {_SHOWN} most frequent of {len(rows)} classes"
        )
        parts.append(f"<h3>What the teacher sees in the pictures{shown}</h3>")
        parts.append(class_bars(rows[:_SHOWN], full=max(rows[0][1], 1)))
    facts = {
        "teacher fingerprint": data["teacher_fingerprint"],
        "backbone hash": data["image_hash"],
        "preprocessing": data["preprocess"],
        "settings": summary.get("config"),
    }
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    parts.append(
        f"<details><summary>Settings and fingerprints</summary><pre>{escape(text)}</pre></details>"
    )
    return "".join(parts)


def _calibration(known: Mapping[str, Any]) -> str:
    """Reliability before and after the temperature was fitted."""
    labels = known["targets"] == "labels"
    by = "labels" if labels else "the teacher's probabilities, for want of labels"
    charts = "".join(
        reliability_chart(
            title,
            [(b["lower"], b["num_images"], b["confidence"], b["accuracy"]) for b in side["bins"]],
            side["error"],
        )
        for title, side in (("T = 1", known["before"]), ("calibrated", known["after"]))
    )
    lost = " (lost with the classes it held for)" if known["threshold"] is None else ""
    return (
        f"<h3>Calibration</h3><p>Temperature {known['temperature']:.3g}, fitted on "
        f"{known['num_images']} pictures by {by}. {100 * known['rate']:.3g} % of them look out of "
        f"domain by their {escape(known['score'])}{lost}.</p>"
        f'<div class="charts">{charts}</div>'
    )


def _facts_table(summary: Mapping[str, Any], log: list[dict[str, Any]]) -> str:
    before, after = summary.get("before") or {}, summary.get("after") or {}
    facts: dict[str, Any] = {
        "pictures learned from": summary.get("num_images"),
        "pictures kept aside": summary.get("num_holdout"),
        "steps": summary.get("steps"),
        "pictures a second": round(log[-1]["images_per_second"]) if log else None,
        "agreement before, %": _rounded(before.get("agreement")),
        "agreement after, %": _rounded(after.get("agreement")),
        "its own zero-shot agreement, %": _rounded(summary.get("zero_shot_agreement")),
        "unreadable pictures": len(summary.get("unreadable", [])),
    }
    return table(["", "value"], [[k, _NONE if v is None else str(v)] for k, v in facts.items()])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _points(rows: Any, key: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[key])) for row in rows if key in row]


def _log(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
