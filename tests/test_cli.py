"""The command line from end to end on tiny models, as a user types it."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from promptkd.cli import main
from tiny import CLASSES, Models


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_all_verbs(
    models: Models, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES))
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    flags: list[Any] = ["--batch-size", 8, "--epochs", 2, "--json"]
    code, out, err = run(
        capsys,
        "teach",
        photos,
        "--classes",
        names,
        "--model",
        models.teacher,
        "--output",
        teacher,
        "--shots",
        4,
        "--templates",
        "a photo of a {}.",
        "--tensorboard",
        *flags,
    )
    assert code == 0, err
    assert json.loads(out)["classes"] == 3
    assert "stage 1: 12 labelled pictures of 3 classes" in err
    assert list((teacher / "tensorboard").iterdir())
    code, out, err = run(
        capsys,
        "distill",
        photos,
        "--teacher",
        teacher,
        "--student",
        models.student,
        "--output",
        student,
        "--min-steps",
        0,
        "--include-backbone",
        *flags,
    )
    assert code in (0, 1), err
    assert "agreement with the teacher" in err
    assert json.loads(out)["steps"] == 8

    code, out, _ = run(capsys, "predict", student, photos, "--top-k", 2)
    assert code == 0
    assert len(out.splitlines()) == 36
    code, out, _ = run(capsys, "predict", student, photos / "red_thing" / "00.png", "--json")
    assert json.loads(out)[0]["path"].endswith("00.png")
    for suffix in ("csv", "jsonl"):
        code, out, _ = run(
            capsys, "predict", student, photos, "--output", tmp_path / f"p.{suffix}", "--top-k", 2
        )
        assert code == 0
        assert "36 predictions" in out
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 36
    assert rows[0]["label1"] in CLASSES
    assert float(rows[0]["probability1"]) >= float(rows[0]["probability2"])
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == [line["path"] for line in lines]

    code, out, _ = run(capsys, "evaluate", student, photos, "--json")
    assert code == 0
    assert json.loads(out)["num_images"] == 36
    code, out, _ = run(capsys, "evaluate", student, photos)
    assert "top-1" in out

    code, out, err = run(
        capsys,
        "distill",
        photos,
        "--teacher",
        teacher,
        "--student",
        models.student,
        "--output",
        student,
        "--min-steps",
        0,
        *flags,
    )
    assert code == 1
    assert "go on with resume=True (--resume)" in err


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["predict", "nowhere", "x.png"], 1, "holds no student.json"),
        (["teach", "nowhere", "--output", "x"], 1, "neither a folder"),
        (["distill", "nowhere", "--output", "x"], 1, "neither a folder of pictures"),
        (["distill", "x", "--output", "y", "--teach.shots", "2"], 1, "needs --labelled"),
        (["demo", "--seeds", "0"], 1, "at least 1"),
    ],
)
def test_errors_are_one_sentence(
    args: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _, err = run(capsys, *args)
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args",
    [
        ["frobnicate"],
        ["teach"],
        ["teach", "x", "--output", "y", "--epochs", "many"],
        ["teach", "x", "--output", "y", "--lr", "-1"],
    ],
)
def test_wrong_use_is_exit_code_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize("verb", ["demo", "teach", "distill", "predict", "evaluate"])
def test_help_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--json" in shown
    assert "Example" in shown or verb == "demo"


def test_a_reader_that_has_enough_is_no_error() -> None:
    """As `promptkd --help | head -1`."""
    command = [sys.executable, "-m", "promptkd.cli", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
