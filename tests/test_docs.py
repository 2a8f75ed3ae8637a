"""Every code block of docs/ runs: Python in one namespace a page, shell lines of `promptkd` as typed.

Tiny models stand for those that the pages name.
"""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from promptkd import DistillConfig
from promptkd.cli import main
from promptkd.clip import load_clip
from promptkd.stages.distill import new_student
from promptkd.teacher import zero_shot_teacher
from tiny import CLASSES, Models

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page.name for page in sorted(DOCS.glob("*.md")) if BLOCK.search(page.read_text())]


@pytest.fixture
def place(models: Models, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages speak of: a student, its teacher, pictures in photos/ and photo.jpg."""
    teacher = zero_shot_teacher(load_clip(models.teacher), CLASSES, ("a photo of a {}.",))
    teacher.save(tmp_path / "teacher")
    student = new_student(load_clip(models.student), teacher, DistillConfig(prompt_depth=2))
    with torch.no_grad():
        student.train().project(torch.randn(16, 3, 48, 48))
    student.eval().save(tmp_path / "student", include_backbone=True)
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copyfile(photos / CLASSES[0] / "01.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(
    page: str, place: Path, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    namespace: dict[str, object] = {"__name__": "docs"}
    for language, code in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
        code = code.replace("ViT-L-14/openai", models.teacher)
        code = code.replace("ViT-B-16/openai", models.student)
        if language == "python":
            exec(compile(code, page, "exec"), namespace)
        elif language == "sh":
            for line in code.splitlines():
                program, *args = shlex.split(line)
                assert program == "promptkd", f"{page}: '{line}' can't be run here"
                assert main(args) == 0, f"{page}: {line}\n{capsys.readouterr().err}"
        else:
            assert language in ("text", "json"), f"{page}: a block of {language} is not run"


def test_the_command_lines_page_has_every_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the commands themselves, nested ones too."""
    monkeypatch.syspath_prepend(str(DOCS.parent / "scripts"))
    hook = importlib.import_module("docs_hook")
    page = hook.on_page_markdown((DOCS / "cli.md").read_text(encoding="utf-8"))
    for verb in ("distill", "cache build", "classes add", "data list", "export", "serve"):
        assert f"## promptkd {verb}\n\n```text\nusage: promptkd {verb}" in page
    assert hook.on_page_markdown("# Another page") == "# Another page"
