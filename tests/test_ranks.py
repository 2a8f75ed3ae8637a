"""Several ranks of torchrun on this machine end with what one process ends with."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from promptkd import Student
from promptkd.errors import DataError
from promptkd.files import read_tensors
from promptkd.ranks import ALONE, Ranks, _fresh
from ranks_worker import both_stages
from tiny import Models, make_photos
from torch import nn

WORKER = Path(__file__).with_name("ranks_worker.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
Done = subprocess.CompletedProcess[str]


def torchrun(*arguments: object) -> Done:
    """A command under torchrun."""
    command = [*TORCHRUN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 pictures, one of which can't be read."""
    folder = make_photos(tmp_path_factory.mktemp("ranks") / "photos")
    (folder / "red_thing" / "03.jpg").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def alone(models: Models, pictures: Path) -> Path:
    """What one process makes of them."""
    output = pictures.parent / "alone"
    both_stages(models.teacher, models.student, str(pictures), output)
    return output


def assert_same(mine: Path, theirs: Path, *, adamw: bool = False) -> None:
    """Teachers and students agree to 1e-9, and in all that is said about them."""
    for name in ("teacher/teacher", "student"):
        a, b = (read_tensors(folder / f"{name}.safetensors")[0] for folder in (mine, theirs))
        assert a.keys() == b.keys()
        for key, value in a.items():
            # A bias before BatchNorm has no gradient but rounding, which AdamW brings to size.
            idle = adamw and key in ("projector.linear1.bias", "projector.norm.running_mean")
            near = 1e-6 if idle else 1e-9
            torch.testing.assert_close(value, b[key], rtol=near, atol=near)
    a, b = (json.loads((f / "student.json").read_text())["summary"] for f in (mine, theirs))
    assert a.keys() == b.keys()
    for key in ("steps", "unreadable", "num_holdout", "failed"):
        assert a[key] == b[key]
    assert a["after"] == pytest.approx(b["after"], rel=1e-6 if adamw else 1e-9)
    assert [row["step"] for row in a["history"]] == [row["step"] for row in b["history"]]


def evaluations(done: Done) -> set[str]:
    """What the ranks measured, which must be the same."""
    return {line.partition(": ")[2] for line in done.stdout.splitlines() if "rank" in line}


def test_two_ranks_make_the_student_of_one(
    models: Models, pictures: Path, photos: Path, alone: Path, tmp_path: Path
) -> None:
    """Batches of 7, 3 classes, a picture that can't be read: nothing divides by two."""
    arguments = (models.teacher, models.student, pictures, photos, tmp_path, "{}")
    done = torchrun("--nproc-per-node=2", WORKER, *arguments)
    assert_same(tmp_path, alone)
    expected = Student.load(alone, precision="fp64").evaluate(photos)
    assert evaluations(done) == {f"{expected.num_images} {expected.top1}"}
    assert done.stderr.count("stage 2:") == 1
    assert not list(tmp_path.glob("**/checkpoint.safetensors"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (3, {"distill": {"batch_size": 2, "max_steps": 20}}),  # ranks without rows
        (2, {"distill": {"views": 0}}),  # the teacher in every step
        (2, {"distill": {"micro_batch": 2, "recompute": True}, "teach": {"micro_batch": 2}}),
        (2, {"cache": True}),
        (2, {"teach": {"classes_per_step": 1, "batch_size": 2}}),
        (2, {"distill": {"optimizer": "adamw"}}),
    ],
)
def test_ranks_in_every_mode(
    models: Models,
    pictures: Path,
    photos: Path,
    tmp_path: Path,
    ranks: int,
    changes: dict[str, Any],
) -> None:
    def settings(name: str) -> dict[str, Any]:
        return {**changes, "cache": str(tmp_path / name)} if "cache" in changes else changes

    both_stages(
        models.teacher, models.student, str(pictures), tmp_path / "a", **settings("cache-a")
    )
    told = json.dumps(settings("cache-b"))
    arguments = (models.teacher, models.student, pictures, photos, tmp_path / "b", told)
    torchrun(f"--nproc-per-node={ranks}", WORKER, *arguments)
    adamw = changes.get("distill", {}).get("optimizer") == "adamw"
    assert_same(tmp_path / "b", tmp_path / "a", adamw=adamw)


@pytest.mark.long
def test_a_killed_rank_restarts_to_the_same_student(
    models: Models, pictures: Path, photos: Path, tmp_path: Path
) -> None:
    arguments = [models.teacher, models.student, pictures, photos]
    torchrun("--nproc-per-node=2", WORKER, *arguments, tmp_path / "a", "{}")
    flags = ("--nproc-per-node=2", "--max-restarts=1")
    done = torchrun(*flags, WORKER, *arguments, tmp_path / "b", json.dumps({"kill": 14}))
    assert "distill: going on at step" in done.stderr
    for name in ("student.safetensors", "student.json", "teacher/teacher.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.long
def test_only_the_first_rank_prints(models: Models, photos: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("red thing\ngreen thing\nblue thing")
    flags = ["--teacher", models.teacher, "--student", models.student, "--classes", names]
    flags += ["--max-steps", 4, "--batch-size", 8, "--output", tmp_path / "s", "--json"]
    start = ("--nproc-per-node=2", "-m", "promptkd.cli")
    done = torchrun(*start, "distill", photos, *flags, "--cache", tmp_path / "cache")
    assert json.loads(done.stdout)["steps"] == 4
    done = torchrun(*start, "evaluate", tmp_path / "s", photos, "--json")
    assert json.loads(done.stdout)["num_images"] == 36


# --- without torchrun


def test_ranks_meet_where_an_earlier_life_has_left_its_words() -> None:
    """torchrun keeps its store over restarts, with the addresses of the dead."""
    store = dist.HashStore()
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda rank: _fresh(store, rank, 3), range(3)))
        assert not any(place.check(["address"]) for place in found)
        found[0].set("address", "here")
        assert all(place.get("address") == b"here" for place in found)


def test_shares_are_whole_and_even() -> None:
    for count in (0, 1, 2, 7, 64):
        for size in (1, 2, 3, 8):
            rows = [Ranks(rank, size).cut(range(count)) for rank in range(size)]
            assert [r for part in rows for r in part] == list(range(count))
            assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_a_single_process_exchanges_nothing() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert ALONE.gather(rows) is rows
    assert ALONE.objects("x") == ["x"]
    assert ALONE.counts(5) == [5]
    parameter = nn.Parameter(torch.zeros(2))
    ALONE.add_gradients([parameter])
    assert parameter.grad is None

    def fail() -> None:
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        ALONE.first(fail)
