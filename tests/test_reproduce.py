"""Reproducing the paper on miniature trees with tiny models: cells, protocols, tables, restarts."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from promptkd import benchmarks
from promptkd.benchmarks.metrics import Part, Scores, score_lists, score_part
from promptkd.benchmarks.reproduce import Plan, cells, reproduce
from promptkd.benchmarks.reproduce.plan import make_cells
from promptkd.benchmarks.reproduce.summary import (
    csv_text,
    main_table,
    markdown,
    summarise,
    terminal_table,
)
from promptkd.benchmarks.reproduce.teachers import teacher_warning
from promptkd.class_names import PublishedNames, check_class_names
from promptkd.cli import main
from promptkd.data.sources import ImageList, pictures_in
from promptkd.errors import CheckpointError, DataError
from promptkd.stages.distill import DistillConfig, distill
from promptkd.stages.progress import Progress
from promptkd.stages.teach import TeachConfig, teach
from promptkd.student import Student
from promptkd.teacher import Teacher
from rich.console import Console
from tiny import Models
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

QUIET = Progress(quiet=True)
TREES = Path(__file__).parent / "protocols" / "make_tree.py"
NONE = "\N{EN DASH}"
THREE = ("dtd", "eurosat", "fgvc_aircraft")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with four miniature datasets."""
    spec = importlib.util.spec_from_file_location("trees", TREES)
    assert spec is not None
    assert spec.loader is not None
    trees = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trees)
    folder = tmp_path_factory.mktemp("data")
    names = ["DescribableTextures", "EuroSAT", "FGVCAircraft", "ImageNet"]
    trees.build_tree(str(folder), 5, names)
    return folder


@pytest.fixture
def plan(root: Path, models: Models, tmp_path: Path) -> Callable[..., Plan]:
    """A plan of a few steps, with what a test wants otherwise."""

    def make(*datasets: str, **changes: Any) -> Plan:
        fields: dict[str, Any] = {
            "seeds": (1,),
            "output": tmp_path / "out",
            "model": models.teacher,
            "student": models.student,
            "shots": 2,
            "distill": {"epochs": 2, "batch_size": 32},
            "teach": {"max_steps": 2, "templates": ("a photo of a {}.",)},
        }
        return Plan(datasets=datasets, root=root, **{**fields, **changes})

    return make


def on_terminal(summary: dict[str, Any], width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(terminal_table(summary))
    return console.file.getvalue()


def times(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- from end to end
def test_three_datasets_twice(
    root: Path,
    models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table, every file, numbers as torchmetrics has them; the second run does nothing."""
    out = tmp_path / "out"
    command = ["reproduce", *THREE, "--root", root, "--output", out, "--seeds", 1, "--shots", 2]
    command += ["--model", models.teacher, "--student", models.student, "--quiet"]
    command += ["--distill.epochs", 2, "--distill.batch-size", 32]
    command += ["--teach.max-steps", 2, "--teach.templates", "a photo of a {}."]
    assert main(list(map(str, command))) == 0
    shown = capsys.readouterr().out
    assert "mean of 3" in shown
    assert "85.84" in shown, "the paper's number for DTD"
    files = ("report.html", "results.csv", "results.json", "results.md")
    assert all((out / name).stat().st_size > 100 for name in files)
    summary = json.loads((out / "results.json").read_text())
    assert [row["dataset"] for row in summary["rows"]] == list(THREE)
    assert [c["status"] in ("done", "collapsed") for c in summary["cells"]] == [True] * 3
    for cell in summary["cells"]:
        check_with_torchmetrics(cell, root, out)
    dtd = summary["cells"][0]
    report = (out / "report.html").read_text()
    for key in ("base", "novel", "harmonic_mean"):
        assert f">{dtd['values'][key]:.2f}" in report
    assert set(dtd["seconds"]) == {
        "stage 1", "measuring the teacher", "stage 2", "measuring the student",
    }  # fmt: skip

    before = times(out / "cells")
    never = "a finished cell was run again"
    monkeypatch.setattr("promptkd.benchmarks.reproduce.run_cell", lambda *_: pytest.fail(never))
    assert main([*map(str, command), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == summary
    assert times(out / "cells") == before


def check_with_torchmetrics(cell: dict[str, Any], root: Path, out: Path) -> None:
    """Every accuracy and calibration error of a cell, from its student's own predictions."""
    data = benchmarks.load(cell["dataset"], root)
    student = Student.load(out / "cells" / cell["dataset"] / "seed1" / "student")
    logits = student.logits([s.path for s in data.test]).double()
    labels = torch.tensor([s.label for s in data.test])
    middle = len(data.base().class_names)
    bounds = {"all": (0, len(data.class_names)), "base": (0, middle)}
    bounds["novel"] = (middle, len(data.class_names))
    for part, (first, last) in bounds.items():
        rows = (labels >= first) & (labels < last)
        mine, truth = logits[rows, first:last], labels[rows] - first
        count, found = last - first, cell["scores"]["parts"][part]
        for key, k in (("top1", 1), ("top5", min(5, count))):
            metric = MulticlassAccuracy(count, top_k=k, average="micro")
            assert found[key] == pytest.approx(100 * float(metric(mine, truth)), abs=1e-4), key
        error = MulticlassCalibrationError(count, n_bins=15)(mine.softmax(-1), truth)
        assert found["calibration_error"] == pytest.approx(100 * float(error), abs=1e-3)
    base, novel = (cell["scores"]["parts"][p]["top1"] for p in ("base", "novel"))
    whole = 2 * base * novel / (base + novel) if base + novel else 0.0
    assert cell["values"]["harmonic_mean"] == pytest.approx(whole)
    per_class = MulticlassAccuracy(len(data.class_names), average="none")(logits, labels)
    for row in cell["scores"]["classes"]:
        assert row["accuracy"] == pytest.approx(100 * float(per_class[row["label"]]), abs=1e-4)


def test_cross_dataset_with_the_epoch_chosen_on_test(plan: Callable[..., Plan]) -> None:
    """One teacher of ImageNet, where "missile" stands twice; "paper" is marked everywhere."""
    wanted = plan("dtd", protocol="cross-dataset", selection="paper")
    summary = reproduce(wanted, QUIET)
    source = Teacher.load(wanted.output / "teachers" / "imagenet-seed1")
    assert source.class_names.count("missile") == 2
    [cell] = summary["cells"]
    rows = cell["curves"]["epochs"]
    assert [row["epoch"] for row in rows] == [1, 2]
    best = max(row["test_accuracy"] for row in rows)
    assert cell["values"] == {"all": pytest.approx(best)}
    assert (wanted.output / "cells" / "dtd" / "seed1" / "best" / "student.json").is_file()
    assert summary["rows"][0]["paper"] == {"all": 55.08}
    shown = on_terminal(summary, 200)
    texts = [markdown(summary), (wanted.output / "report.html").read_text(), shown]
    for text in texts:
        assert "accuracy*" in text
        assert "chosen on TEST" in text
    assert "cross-dataset,paper" in csv_text(summary)


def test_few_shot_goes_on_where_it_stopped(
    plan: Callable[..., Plan], models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan("eurosat", protocol="few-shot", teacher=models.teacher)
    first = reproduce(wanted, QUIET)
    assert main_table(first)[1][0][2] == NONE, "the paper has no few-shot number"
    assert first["cells"][0]["teacher"]["method"] == "zero-shot"
    path = wanted.output / "cells" / "eurosat" / "seed1" / "result.json"
    path.unlink()
    trained = "the student was trained again"
    monkeypatch.setattr("promptkd.stages.distill._train", lambda *_: pytest.fail(trained))
    second = reproduce(wanted, QUIET)
    for key in ("values", "scores", "kept_aside", "curves", "fingerprint", "teacher"):
        assert second["cells"][0][key] == first["cells"][0][key]
    path.write_text(path.read_text()[:-40])
    with pytest.raises(CheckpointError, match=r"result.json' is damaged .*; delete it"):
        reproduce(wanted, QUIET)


def test_one_cache_for_all_seeds_and_the_epoch_chosen_on_training_pictures(
    plan: Callable[..., Plan], models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"epochs": 3, "batch_size": 16}
    wanted = plan("dtd", selection="validation", cache=True, seeds=(1, 2), teacher=models.teacher,
                  distill=changes)  # fmt: skip
    one, two = make_cells(wanted)
    learned, aside = set(one.to_learn_from().names), set(one.kept_aside().names)
    assert not learned & aside
    assert learned | aside == set(one.data.images("train").names)
    assert len(aside) == -(-len(one.data.train) // 10)
    assert aside != set(two.kept_aside().names)
    summary = reproduce(wanted, QUIET)
    for cell in summary["cells"]:
        rows = cell["curves"]["epochs"]
        best = max(rows, key=lambda row: (row["agreement"], -row["kl"]))
        assert cell["kept_aside"]["agreement"] == pytest.approx(best["agreement"])
        assert cell["kept_aside"]["kl"] == pytest.approx(best["kl"], rel=1e-4)
        assert "test_accuracy" not in rows[0]
    texts = [markdown(summary), (wanted.output / "report.html").read_text()]
    for text in texts:
        assert "of the training pictures are kept aside" in text
        assert "all seeds with one teacher see the same random views" in text
        assert "base*" not in text
    assert "base-to-novel,validation" in csv_text(summary)

    [cache] = (wanted.output / "caches").iterdir()
    before = {name: t for name, t in times(cache).items() if "shard-" in name}
    assert len(before) == 1 + 3, "whole pictures and three views of all training pictures"
    shutil.rmtree(wanted.output / "cells" / "dtd" / "seed2")
    encoded = "the teacher looked at views again"
    monkeypatch.setattr(
        "promptkd.cache.encode.ViewEncoder._features", lambda *_: pytest.fail(encoded)
    )
    again = reproduce(wanted, QUIET)
    assert [cell["values"] for cell in again["cells"]] == [c["values"] for c in summary["cells"]]
    assert {name: t for name, t in times(cache).items() if "shard-" in name} == before


def test_a_diverged_cell_is_told_and_stored(plan: Callable[..., Plan], models: Models) -> None:
    changes = {"epochs": 2, "batch_size": 32, "lr": 1e30, "prompt_depth": 1}
    wanted = plan("eurosat", teacher=models.teacher, distill=changes)
    summary = reproduce(wanted, QUIET)
    [cell] = summary["cells"]
    assert (cell["status"], cell["values"]) == ("diverged", None)
    assert main_table(summary)[1][0][1] == f"{NONE} †"
    assert any("EuroSAT seed 1 diverged" in note for note in summary["notes"])
    assert "diverged" in (wanted.output / "report.html").read_text()
    other = plan("eurosat", teacher=models.teacher, distill={**changes, "lr": 0.1})
    with pytest.raises(CheckpointError, match=r"its distill lr is 1e\+30, now 0.1; give another"):
        reproduce(other, QUIET)


def test_settings_are_the_papers(plan: Callable[..., Plan], root: Path) -> None:
    [cell] = make_cells(plan("dtd", distill={}, teach={}, shots=16, protocol="few-shot"))
    n = len(cell.data.class_names)
    stage1, stage2 = cell.teach_config, cell.distill_config
    assert (stage2.epochs, stage2.batch_size, stage2.lr, stage2.prompt_depth) == (20, 8, 0.005, 9)
    assert stage2.kd_weight == pytest.approx(200 / n)
    assert (stage1.gpa_mean, stage1.gpa_std, stage1.epochs, stage1.shots) == (45, 5, 50, 16)
    [cell] = make_cells(plan("eurosat", distill={}, teach={}, protocol="cross-dataset"))
    assert cell.distill_config.prompt_depth == 3
    assert cell.distill_config.kd_weight == pytest.approx(1000 / len(cell.data.class_names))
    aside = cell.kept_aside()
    assert aside.labels is None
    assert set(aside.paths) == {s.path for s in cell.data.val}
    assert not set(aside.paths) & {s.path for s in cell.data.train}


def test_a_given_teacher_must_know_the_classes(
    plan: Callable[..., Plan], models: Models, tmp_path: Path
) -> None:
    config = TeachConfig(method="zero-shot", templates=("a photo of a {}.",))
    teach(None, ("cat", "dog"), model=models.teacher, config=config, output=tmp_path / "eurosat-1",
          progress=QUIET)  # fmt: skip
    wanted = plan("eurosat", teacher=str(tmp_path / "{dataset}-{seed}"))
    with pytest.raises(DataError, match=r"eurosat-1' knows other classes than EuroSAT: cat, dog"):
        reproduce(wanted, QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datasets": ("mnist",)}, "unknown dataset 'mnist'; known are imagenet"),
        ({"datasets": ("imagenet-r",)}, "ImageNet-R can't be distilled on under base-to-novel"),
        ({"protocol": "cross-dataset", "datasets": ("imagenet",)}, "under cross-dataset; choose"),
        ({"datasets": ()}, "at least one dataset"),
        ({"seeds": (1, 1)}, "seeds must differ"),
        ({"shots": 0}, "at least one labelled picture a class"),
        ({"root": Path("nowhere")}, "'nowhere' is no folder"),
    ],
)
def test_wrong_plans(change: dict[str, Any], message: str, root: Path, tmp_path: Path) -> None:
    fields = {"datasets": ("dtd",), "root": root, "output": tmp_path / "out", **change}
    with pytest.raises(DataError, match=re.escape(message)):
        Plan(**fields)
    assert not (tmp_path / "out").exists()


def test_a_missing_dataset_or_wrong_setting_stops_before_any_work(
    plan: Callable[..., Plan], tmp_path: Path
) -> None:
    for wanted, message in (
        (plan("dtd", "sun397"), r"(?s)SUN397: .*expected under"),
        (plan("dtd", distill={"epochs": 0}), "DTD: DistillConfig: epochs must be at least 1"),
    ):
        with pytest.raises(DataError, match=message):
            reproduce(wanted, QUIET)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the parts
def scores(accuracy: float) -> Scores:
    return Scores({"all": Part(10, accuracy, accuracy, 0.0, ())}, None, (), ())


def test_what_counts_as_collapsed() -> None:
    good = {"agreement": 80.0, "zero_shot_agreement": 60.0, "kl": 0.1, "uniform_kl": 2.0}
    assert cells.collapse_reasons(good, scores(70), scores(60)) == []
    wrong = [
        ({"agreement": 50.0}, 70, "agrees with its teacher on 50.0 %"),
        ({"kl": 2.5}, 70, "KL to the teacher on pictures kept aside is 2.500"),
        ({"kl": float("nan")}, 70, "kept aside is nan"),
        ({}, 50, "accuracy is 50.0 %, below its own zero-shot 60.0 %"),
    ]
    for change, accuracy, message in wrong:
        [reason] = cells.collapse_reasons({**good, **change}, scores(accuracy), scores(60))
        assert message in reason
    assert teacher_warning(scores(70), scores(70)) is None
    said = str(teacher_warning(scores(60), scores(70)))
    assert "60.0 % on all classes (zero-shot 70.0 %); likely reasons" in said


def test_classes_with_equal_names_are_told_apart() -> None:
    logits = torch.eye(4, dtype=torch.float64)[torch.tensor([0, 2, 2, 1, 3, 0])] * 5
    labels = torch.tensor([0, 0, 0, 1, 2, 3])
    names = ["missile", "dog", "missile", "cat"]
    found = score_lists(logits, labels, names, names=list("abcdef"))
    assert [(c.label, c.name, round(c.accuracy)) for c in found.classes] == [
        (0, "missile", 33), (1, "dog", 100), (2, "missile", 0), (3, "cat", 0),
    ]  # fmt: skip
    first = found.confusions[0]
    assert (first.truth, first.taken_for, first.num_images) == ("missile", "missile", 2)
    assert first.examples == ("b", "c")
    assert first.share == pytest.approx(200 / 3)
    with pytest.raises(DataError, match=r"no test pictures to score \(novel: classes 2 to 3\)"):
        score_lists(logits[:4], labels[:4], names, halves=True)
    assert score_part(logits[:1], labels[:1]).top5 == 100


def result(key: str, seed: int, base: float, novel: float, status: str = "done") -> dict[str, Any]:
    whole = 2 * base * novel / (base + novel)
    values = {"base": base, "novel": novel, "harmonic_mean": whole, "all": base}
    return {
        "dataset": key,
        "title": benchmarks.PAPER[key].title,
        "seed": seed,
        "status": status,
        "reasons": [] if status == "done" else ["it agrees with nobody"],
        "values": values,
        "teacher": {"warning": None},
    }


def test_means_deviations_and_collapsed_seeds(root: Path) -> None:
    def plan(*datasets: str) -> Plan:
        return Plan(datasets=datasets, root=root, output=Path("out"), seeds=(1, 2))

    results = [result("dtd", 1, 80, 60), result("dtd", 2, 84, 64),
               result("eurosat", 1, 90, 70), result("eurosat", 2, 10, 20, "collapsed")]  # fmt: skip
    found = summarise(plan("dtd", "eurosat"), results)
    dtd, eurosat = found["rows"]
    assert dtd["ours"]["base"] == {"mean": 82, "std": pytest.approx(8**0.5)}
    assert dtd["without_collapsed"] is None
    assert eurosat["ours"]["base"]["mean"] == 50
    assert eurosat["without_collapsed"]["base"] == {"mean": 90}
    assert eurosat["collapsed"] == {"2": ["it agrees with nobody"]}
    mean = found["mean"]
    seed1, seed2 = 2 * 85 * 65 / 150, 2 * 47 * 42 / 89
    assert mean["ours"]["harmonic_mean"]["mean"] == pytest.approx((seed1 + seed2) / 2)
    assert mean["without_collapsed"]["harmonic_mean"] == {"mean": pytest.approx(seed1)}
    assert mean["paper"]["base"] == pytest.approx((85.84 + 97.54) / 2)
    assert mean["paper"]["all"] is None
    heads, rows = main_table(found)
    assert len({len(heads), *map(len, rows)}) == 1
    assert [row[0] for row in rows] == [
        "DTD", "EuroSAT", "  sound seeds only", "mean of 2", "  sound seeds only",
    ]  # fmt: skip
    assert rows[0][1:3] == ["82.00 ± 2.83", "85.84"]
    assert rows[1][1] == "50.00 ± 56.57 †"
    assert found["notes"][-1] == "† EuroSAT seed 2 collapsed: it agrees with nobody"
    warning = teacher_warning(scores(60), scores(70))
    warned = [{**r, "teacher": {"warning": warning}} for r in results]
    notes = summarise(plan("dtd", "eurosat"), warned)["notes"]
    assert "EuroSAT seed 1: the teacher is below its own zero-shot accuracy: 60.0 %" in str(notes)
    assert str(notes).count("likely reasons") == 1, "once, not for every cell"
    every = tuple(benchmarks.PAPER)[:11]
    whole = summarise(plan(*every), [result(k, s, 80, 60) for k in every for s in (1, 2)])
    assert whole["mean"]["paper"] == {
        "base": 86.96, "novel": 80.73, "harmonic_mean": 83.73, "all": None,
    }  # fmt: skip


@pytest.mark.parametrize("protocol", ["base-to-novel", "cross-dataset"])
def test_the_table_fits_a_terminal(root: Path, protocol: str) -> None:
    """At 80 columns: no number is cut or wrapped, in the widest case there is."""
    every = tuple(benchmarks.PAPER)[1:11]
    fields: dict[str, Any] = {"root": root, "output": Path("out"), "seeds": (1, 2, 3)}
    plan = Plan(datasets=every, protocol=protocol, selection="paper", **fields)
    status = {1: "done", 2: "collapsed", 3: "done"}
    results = [result(key, s, 50 + 20 * s % 41, 12 * s, status[s]) for key in every for s in status]
    found = summarise(plan, results)
    lines = on_terminal(found, 80).splitlines()
    assert max(map(len, lines)) <= 80
    table = "\n".join(lines)
    for row in [*found["rows"], found["mean"]]:
        [line] = [line for line in lines if line.startswith(f"{row['title']} †")]
        for column in found["columns"]:
            assert f"{row['ours'][column]['mean']:.2f} ± {row['ours'][column]['std']:.2f}" in line
    assert table.count("  the paper") == table.count("  sound seeds") == len(every) + 1
    head = "base* " if protocol == "base-to-novel" else "accuracy*"
    assert head in table
    assert "chosen on TEST pictures" in table


def test_published_names_may_repeat_and_ones_own_may_not(photos: Path, models: Models) -> None:
    """ImageNet has two classes called "missile": both stages keep them apart by their places."""
    names = ("missile", "green thing", "missile")
    with pytest.raises(DataError, match=r"'missile' stands twice \(places 1 and 3\)"):
        check_class_names(names)
    with pytest.raises(DataError, match="class name 2 of 2 is empty"):
        check_class_names(PublishedNames(["a", " "]))
    found = pictures_in(photos)
    rows = np.arange(len(found)) // 12
    images = ImageList(found.paths, found.names, rows, PublishedNames(names))
    config = TeachConfig(epochs=1, max_steps=2, shots=2, templates=("a photo of a {}.",))
    teacher = teach(images, model=models.teacher, config=config, progress=QUIET)
    assert teacher.class_names == names
    assert teacher.class_vectors[0].equal(teacher.class_vectors[2])
    epochs = []
    student = distill(
        images,
        teacher=teacher,
        student=models.student,
        config=DistillConfig.paper("dtd", num_classes=3, epochs=2, batch_size=18),
        progress=QUIET,
        on_epoch=lambda epoch, pupil: epochs.append((epoch, pupil.training)),
    )
    assert student.class_names == names
    assert epochs == [(1, False), (2, False)]
    assert not student.training


# ---------------------------------------------------------------- promptkd data
def test_data_verbs(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "list"]) == 0
    assert "fgvc_aircraft" in capsys.readouterr().out
    assert main(["data", "check", str(root), "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [r["key"] for r in reports] == ["imagenet", "fgvc_aircraft", "dtd", "eurosat"]
    assert main(["data", "check", str(root), "--datasets", "dtd", "sun397"]) == 1
    shown = capsys.readouterr()
    assert "SUN397/Training_01.txt" in shown.out or "sun397/" in shown.out
    assert "can't be used: SUN397" in shown.err
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "holds none of the 15 datasets" in capsys.readouterr().err
    assert main(["data", "download", "imagenet", "--root", str(tmp_path / "new")]) == 1
    assert "get it from image-net.org" in capsys.readouterr().err
