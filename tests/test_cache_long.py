"""The teacher cache under kills and with several writers."""

import subprocess
import sys
from pathlib import Path

import pytest
from cache_writers import contents
from tiny import Models, make_photos

pytestmark = pytest.mark.long

WRITERS = Path(__file__).with_name("cache_writers.py")


def writer(*args: object, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    command = [sys.executable, *launcher, str(WRITERS), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]", seconds: int = 170) -> str:
    """What a writer printed."""
    text, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0
    return text.strip()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("long") / "photos", 50)


@pytest.fixture(scope="module")
def expected(models: Models, pictures: Path) -> dict[str, bytes]:
    """What one undisturbed build writes."""
    path = pictures.parent / "undisturbed"
    finish(writer(models.teacher, pictures, path, 0))
    return contents(path)


def test_killed_builds_go_on_to_the_same_bytes(
    models: Models, pictures: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    cut = int(finish(writer(models.teacher, pictures, tmp_path / "c", 50), seconds=600))
    assert cut >= 10  # the others were done before they were killed, and left the same bytes
    assert contents(tmp_path / "c") == expected


def test_two_writers_at_once(
    models: Models, pictures: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    both = [writer(models.teacher, pictures, tmp_path / "c", 0) for _ in range(2)]
    for process in both:
        finish(process)
    assert contents(tmp_path / "c") == expected


def test_two_ranks_of_torchrun(
    models: Models, pictures: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    finish(writer(models.teacher, pictures, tmp_path / "c", 0, launcher=launcher))
    assert contents(tmp_path / "c") == expected
