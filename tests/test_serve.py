"""The page to try a student on: its answers, its limits, and itself in a real browser."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from promptkd import DistillConfig, Student
from promptkd.clip import load_clip
from promptkd.errors import DataError, ModelError
from promptkd.serve import Limits, Trial, check_upload, serve
from promptkd.stages.distill import new_student
from promptkd.teacher import zero_shot_teacher
from tiny import CLASSES, Models

LINES = "\n".join(CLASSES)


@pytest.fixture(scope="module")
def student(models: Models, photos: Path) -> Student:
    teacher = zero_shot_teacher(load_clip(models.teacher), CLASSES, ("a photo of a {}.",))
    made = new_student(load_clip(models.student), teacher, DistillConfig(prompt_depth=2))
    with torch.no_grad():
        made.train().project(torch.randn(16, 3, 48, 48))
    made.eval().calibrate(photos)
    return made


def test_an_answer_has_labels_bars_and_neighbours(student: Student, photos: Path) -> None:
    trial = Trial(student)
    file = str(photos / CLASSES[0] / "00.png")
    shown = trial.answer([file], LINES)
    found = student.predict(file)
    assert not isinstance(found, list)
    for label, share in zip(found.labels, found.probabilities, strict=True):
        assert f"<span>{label}</span>" in shown
        assert f"width:{100 * share:.1f}%" in shown
    assert f"Nearest to {found.labels[0]}: " in shown
    assert 'src="data:image/jpeg;base64,' in shown
    assert "3 classes. Drop a picture." in trial.answer(None, LINES)


def test_the_class_list_is_edited(student: Student, photos: Path) -> None:
    trial = Trial(student)
    file = str(photos / CLASSES[0] / "00.png")
    shown = trial.answer([file], "a lemon\n\n  red_thing \n")
    assert "<span>a lemon</span>" in shown
    assert CLASSES[1] not in shown
    for number in range(12):
        trial.answer([file], f"red_thing\nthing {number}")
    assert len(trial._students) == 8
    assert "class name &#x27;a&#x27; stands twice" in trial.answer([file], "a\na")
    assert "at least one name" in trial.answer([file], " \n")
    many = "\n".join(f"class {n}" for n in range(1001))
    assert "1001 classes are more than this page takes" in trial.answer([file], many)


def test_names_and_errors_are_escaped(student: Student, tmp_path: Path) -> None:
    bad = tmp_path / "<b>bad.png"
    bad.write_bytes(b"nothing")
    shown = Trial(student).answer([str(bad)], LINES)
    assert "&#x27;&lt;b&gt;bad.png&#x27; is no picture that can be read" in shown
    assert str(tmp_path) not in shown
    Image.new("RGB", (60, 60), "red").save(tmp_path / "red.png")
    odd = Trial(student.rename_classes({CLASSES[0]: "<i>x"}))
    assert "<i>x" not in odd.answer([str(tmp_path / "red.png")], "\n".join(odd.student.class_names))


def test_uploads_have_limits(student: Student, photos: Path, tmp_path: Path) -> None:
    file = photos / CLASSES[0] / "00.png"
    check_upload(file, Limits())
    with pytest.raises(DataError, match=r"has 0\.0 MiB, more than 0 MiB"):
        check_upload(file, Limits(file_bytes=100))
    with pytest.raises(DataError, match="pixels, more than 0 million"):
        check_upload(file, Limits(pixels=100))
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(DataError, match=r"'bomb\.png' has "):
        check_upload(tmp_path / "bomb.png", Limits())
    shown = Trial(student, limits=Limits(pictures=2)).answer([str(file)] * 3, LINES)
    assert shown.count('class="result"') == 2
    assert "only the first 2 pictures are looked at" in shown


def test_without_gradio_it_says_what_to_install(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ModelError, match=r"pip install 'promptkd\[serve\]'"):
        serve(student)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_in_a_browser(student: Student, photos: Path, tmp_path: Path) -> None:
    """Upload two pictures and a file that is none, change the class list, and read the page."""
    from playwright.sync_api import sync_playwright

    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    chromium = next(filter(None, found), None)
    assert chromium, "this test drives a real browser: install chromium"
    (tmp_path / "notes.txt").write_text("nothing")
    page = serve(student, block=False)
    try:
        assert page.local_url.startswith("http://127.0.0.1:")
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1200, "height": 900})
            tab.goto(page.local_url)
            tab.get_by_text("3 classes. Drop a picture.").wait_for()
            files = [photos / CLASSES[0] / "00.png", photos / CLASSES[2] / "01.jpg"]
            tab.locator("input[type=file]").set_input_files([*files, tmp_path / "notes.txt"])
            tab.get_by_text("'notes.txt' is no picture that can be read").wait_for()
            assert tab.locator(".result").count() == 2
            found = student.predict(files[0])
            assert not isinstance(found, list)
            first = tab.locator(".result").first.inner_text()
            assert f"{100 * found.probabilities[0]:.1f} %" in first
            assert tab.locator(".result img").first.evaluate("e => e.naturalWidth") > 0
            assert tab.locator(".result .fill").first.bounding_box()["width"] > 1  # type: ignore[index]
            tab.get_by_label("Classes", exact=True).fill("a lemon\nred_thing")
            tab.get_by_role("button", name="Use these classes").click()
            tab.locator(".result .row").get_by_text("a lemon").first.wait_for()
            assert tab.locator(".result").first.locator(".row").count() == 2
            tab.screenshot(path=tmp_path / "page.png")
            browser.close()
    finally:
        page.close()
