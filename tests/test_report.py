"""The HTML report: self-contained, complete, readable from any results, and refusing bad ones."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from promptkd.cli import main
from promptkd.errors import DataError
from promptkd.report import write_report
from promptkd.report.charts import line_chart, nice_ticks, reliability_chart
from promptkd.report.page import thumbnail

EVIL = '<script>alert("x")</script>'
MINUS = "\N{MINUS SIGN}"
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects tags and text, and complains about tags that don't match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


def part(top1: float, error: float) -> dict[str, Any]:
    bins = [{"lower": 40.0, "num_images": 6, "confidence": 44.0, "accuracy": 50.0}]
    bins.append({"lower": 80.0, "num_images": 4, "confidence": 85.0, "accuracy": 75.0})
    return {"num_images": 10, "top1": top1, "top5": 97.53, "calibration_error": error, "bins": bins}


def cell(seed: int, status: str = "done") -> dict[str, Any]:
    scored = status != "diverged"
    confusions = [
        {"truth": "cat", "taken_for": EVIL, "num_images": 3, "share": 30.0,
         "examples": ["dtd/a.png", "dtd/gone.png", "../secret.png"]},
    ]  # fmt: skip
    classes = [
        {"label": n, "name": f"class {n}", "num_images": 10, "accuracy": float(n)}
        for n in range(30)
    ]
    scores = {"parts": {"all": part(70.11, 3.0), "base": part(81.5, 4.25), "novel": part(60.5, 5.5)},
              "harmonic_mean": 69.45, "classes": classes, "confusions": confusions}  # fmt: skip
    epochs = [{"epoch": float(e), "agreement": 50.0 + e, "kl": 1 / e} for e in range(1, 4)]
    return {
        "dataset": "dtd", "title": "DTD", "seed": seed, "status": status,
        "reasons": [] if status == "done" else [f"it {status}"], "num_classes": 30,
        "fingerprint": f"{seed:032x}", "values": {"all": 70.11} if scored else None,
        "scores": scores if scored else None,
        "teacher": {"model": "big", "method": "promptsrc", "fingerprint": "f00d", "warning": None,
                    "values": {"all": 75.25}, "zero_shot": {"all": 55.75}},
        "student_zero_shot": {"all": 44.75},
        "kept_aside": {"agreement": 88.25, "kl": 0.125, "zero_shot_agreement": 50.0} if scored else None,
        "curves": {"loss": [[50, 2.0], [100, float(seed)]], "epochs": epochs},
        "seconds": {"stage 1": 12.34, "stage 2": 56.78}, "images_per_second": 321.4,
        "unreadable": [], "settings": {"lr": 0.005, "note": EVIL},
    }  # fmt: skip


def summary(root: Path, *cells: dict[str, Any]) -> dict[str, Any]:
    spread = {"mean": 81.5, "std": 0.25}
    row = {
        "dataset": "dtd", "title": "DTD", "seeds": [1, 2], "collapsed": {},
        "ours": {"base": spread, "novel": {"mean": 75.0}, "harmonic_mean": None, "all": spread},
        "paper": {"base": 85.84, "novel": 71.37, "harmonic_mean": 77.94, "all": None},
        "without_collapsed": None,
    }  # fmt: skip
    return {
        "kind": "promptkd reproduction", "protocol": "base-to-novel", "selection": "clean",
        "seeds": [1, 2], "compared": ["base", "novel", "harmonic_mean"],
        "columns": {"base": "base", "novel": "novel", "harmonic_mean": "HM", "all": "all classes"},
        "notes": [f"a note {EVIL}"], "rows": [row], "mean": {**row, "title": "mean of 1"},
        "root": str(root), "models": {"teacher": "big", "student": "small"}, "cells": list(cells),
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two cells whose dataset has one of the three example pictures."""
    (tmp_path / "data" / "dtd").mkdir(parents=True)
    pixels = np.full((300, 200, 3), (200, 30, 30), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "data" / "dtd" / "a.png")
    Image.fromarray(pixels).save(tmp_path / "secret.png")
    folder = tmp_path / "run"
    folder.mkdir()
    data = summary(tmp_path / "data", cell(1), cell(2, "collapsed"), cell(3, "diverged"))
    (folder / "results.json").write_text(json.dumps(data))
    return folder


def test_the_report_is_one_file_that_asks_for_nothing(run: Path, tmp_path: Path) -> None:
    path = write_report([run], tmp_path / "new" / "report.html")
    page = path.read_text(encoding="utf-8")
    found = parse(path)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "iframe", "object", "embed"}
    for tag, attributes in found.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), f"{tag} {key}"
            assert key not in ("href", "srcset"), f"{tag} {key}"
            assert key != "src" or str(value).startswith("data:image/jpeg;base64,")
    assert not re.search(r"https?://|url\(|@import", page)
    policy = next(a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in str(policy)
    assert "prefers-color-scheme: dark" in page
    assert any(a.get("name") == "viewport" for t, a in found.tags if t == "meta")
    assert EVIL not in page
    assert EVIL in "".join(found.text)


def test_everything_is_in_it(run: Path, tmp_path: Path) -> None:
    found = parse(write_report([run], tmp_path / "report.html"))
    text = " ".join(found.text)
    numbers = ["81.50 ± 0.25", "85.84", f"{MINUS}4.34", "75.00", "+3.63", "71.37"]  # Δ of the table
    numbers += ["75.25", "55.75", "70.11", "44.75", "97.53", "4.25", "5.50", "88.25", "0.125"]
    numbers += ["321", "12.3", "56.8", "f00d", f"{1:032x}", "collapsed", "diverged"]
    numbers += ["3 pictures", "10 more classes", "2 example pictures are no longer to be found"]
    numbers[-3] = "6 pictures in 2 runs"
    for shown in numbers:
        assert shown in text, shown
    labels = [a["aria-label"] for t, a in found.tags if t == "svg"]
    assert [str(label) for label in labels] == [
        "training loss", "agreement with the teacher, %", "KL to the teacher",
        "calibration, base classes (ECE 4.2 %)", "calibration, novel classes (ECE 5.5 %)",
    ]  # fmt: skip
    [picture] = [str(a["src"]) for t, a in found.tags if t == "img"]
    with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as image:
        assert image.height <= 96
        red = image.convert("RGB").getpixel((5, 5))
    assert isinstance(red, tuple)
    assert abs(red[0] - 200) < 8


def test_charts_put_values_where_they_belong() -> None:
    svg = line_chart("t", "step", [("a", [(0, 0.0), (10, 100.0)]), ("b", [(5, float("nan"))])])
    [points] = re.findall(r'points="([^"]+)"', svg)
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in points.split())
    assert (x0, y0) == (46, 190)  # left and bottom of the frame
    assert (x1, y1) == (348, 28)
    assert ">b<" not in svg, "a series without finite values has no line and no legend"
    assert line_chart("t", "x", [("a", []), ("b", [(1, float("inf"))])]) == ""
    bars = reliability_chart("c", [(0.0, 5, 3.0, 0.0), (280 / 3, 5, 99.0, 100.0)], 2.0)
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" fill-opacity', bars)]
    assert heights == [0, 162]
    assert reliability_chart("c", [], 0) == ""


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3, 3), (0, 0), (-5, 17), (1e-9, 2e-9), (0, 1e6)]
)
def test_ticks_are_few_and_enclose(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 9
    assert ticks[0] <= low + 1e-12 * abs(low)
    assert ticks[-1] >= high - 1e-12 * abs(high)


@pytest.mark.parametrize(("low", "high"), [(1, 2), (6, 6), (1, 20), (10, 4000)])
def test_epochs_and_steps_have_whole_ticks(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, whole=True)
    assert all(tick == round(tick) for tick in ticks)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low <= high <= ticks[-1]
    svg = line_chart("a", "epoch", [("seed", [(low, 10.0), (high, 20.0)])])
    assert ">1.2<" not in svg


def test_thumbnails_stay_inside_the_data_folder(run: Path) -> None:
    root = run.parent / "data"
    assert thumbnail(root, "dtd/a.png") is not None
    (root / "broken.png").write_bytes(b"\x89PNG....")
    for name in ("../secret.png", str(run.parent / "secret.png"), "gone.png", "broken.png", "dtd"):
        assert thumbnail(root, name) is None, name


def test_a_student_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my student"
    folder.mkdir()
    before, after = {"agreement": 20.0, "holdout_kl": 2.0}, {"agreement": 91.25, "holdout_kl": 0.5}
    history = [{"step": 50.0, **before}, {"step": 100.0, **after}]
    data = {
        "kind": "promptkd student", "backbone": "small", "teacher": "big", "class_names": ["a", "b"],
        "teacher_fingerprint": "beef", "image_hash": "cafe", "preprocess": {},
        "summary": {"steps": 100, "num_images": 40, "num_holdout": 4, "failed": True,
                    "before": before, "after": after, "zero_shot_agreement": 95.0,
                    "history": history, "unreadable": [], "config": {"lr": 0.003},
                    "teacher_report": {"predictions": {"a": 30, "b": 10}}},
    }  # fmt: skip
    (folder / "student.json").write_text(json.dumps(data))
    log = [{"step": 50, "loss": 3.0, "images_per_second": 70.0}]
    (folder / "distill_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    text = " ".join(parse(write_report([folder], tmp_path / "r.html")).text)
    for shown in ("my student", "91.25", "95.0", "beef", "cafe", "70", "75.0 %", "Failed", "0.003"):
        assert shown in text, shown
    # What is seen most often fills the width.
    assert re.findall(r"width:([\d.]+)%", (tmp_path / "r.html").read_text()) == ["100.0", "33.3"]


def test_by_command_and_bad_runs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "two.html"
    assert main(["report", str(run), str(run), "--output", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == target.stat().st_size
    assert sum(tag == "h2" for tag, _ in parse(target).tags) == 8
    assert main(["report", str(tmp_path), "--output", str(target)]) == 1
    assert "is no run: expected results.json" in capsys.readouterr().err
    with pytest.raises(DataError, match="name at least one run"):
        write_report([], target)
    good = json.loads((run / "results.json").read_text())
    for damage in ("cells", "rows", "models"):
        bad = copy.deepcopy(good)
        bad[damage] = None
        (run / "results.json").write_text(json.dumps(bad))
        with pytest.raises(DataError, match="holds a damaged result"):
            write_report([run], target)
    (run / "results.json").write_text("{")
    with pytest.raises(DataError, match="holds a damaged result"):
        write_report([run], target)
