"""A student's classes edited after training: vectors to the bit, text side, errors, command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from promptkd import DistillConfig, Student, distill
from promptkd.class_names import PublishedNames
from promptkd.classes import ClassList, edit_folder, read_classes
from promptkd.cli import main
from promptkd.clip import load_clip
from promptkd.convert import with_class_names
from promptkd.errors import CheckpointError, DataError, ModelError
from promptkd.prompts import DeepPrompts
from promptkd.stages.distill import new_student
from promptkd.stages.progress import Progress
from promptkd.teacher import Teacher, TeacherInfo, zero_shot_teacher
from tiny import Models

OLD = ("cat", "dog", "red_bus", "tree")
NEW = ("sea", "green hill")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")


def tuned_teacher(models: Models, names: tuple[str, ...] = OLD, seed: int = 5) -> Teacher:
    """A teacher with random prompts on both sides."""
    clip = load_clip(models.teacher)
    assert clip.text is not None
    random = torch.Generator().manual_seed(seed)
    text = DeepPrompts.random(4, clip.text.width, 2, random)
    vision = DeepPrompts.random(4, clip.vision.width, 2, random)
    info = TeacherInfo("promptsrc", "a photo of a {}.", TEMPLATES, names, {})
    blank = Teacher(clip, info, torch.zeros(len(names), 40), vision, text)
    return with_class_names(blank, names)


def student_of(teacher: Any, models: Models) -> Student:
    return new_student(load_clip(models.student), teacher, DistillConfig(prompt_depth=2)).eval()


@pytest.fixture(scope="module", params=["tuned", "zero-shot"])
def teacher(request: pytest.FixtureRequest, models: Models) -> Teacher:
    if request.param == "tuned":
        return tuned_teacher(models)
    return zero_shot_teacher(load_clip(models.teacher), OLD, TEMPLATES)


@pytest.fixture(scope="module")
def student(teacher: Teacher, models: Models) -> Student:
    return student_of(teacher, models)


def test_subset_order_and_names_need_nothing(student: Student, photos: Path) -> None:
    chosen = student.with_classes(["tree", "red bus", "cat"])
    assert chosen.class_names == ("tree", "red bus", "cat")
    assert torch.equal(chosen.class_vectors, student.class_vectors[[3, 2, 0]])
    torch.testing.assert_close(chosen.logits(photos), student.logits(photos)[:, [3, 2, 0]])
    swapped = student.rename_classes({"cat": "dog", "dog": "cat", "tree": "larch"})
    assert swapped.class_names == ("dog", "cat", "red_bus", "larch")
    assert torch.equal(swapped.class_vectors, student.class_vectors)
    assert student.class_names == OLD
    assert chosen.info.added_classes == swapped.info.added_classes == ()
    assert not chosen.training


def test_new_names_equal_a_student_saved_with_their_vectors(
    student: Student, teacher: Teacher, models: Models, photos: Path, tmp_path: Path
) -> None:
    """From the stored text side, a Teacher, its folder and the CLIP's name: the same bits."""
    made = with_class_names(teacher, NEW).class_vectors
    vectors = torch.stack([made[0], *teacher.class_vectors[[1, 0]], made[1]])
    names = ("sea", "dog", "cat", "green hill")
    info = type(student.info)(names, added_classes=NEW)
    expected = Student(student.clip, student.prompts, student.projector, vectors, info).eval()
    folder = expected.save(tmp_path / "expected")
    teacher.save(tmp_path / "teacher")
    for source in (None, teacher, tmp_path / "teacher", models.teacher):
        found = student.with_classes(names, source)
        assert torch.equal(found.class_vectors, expected.class_vectors)
        assert torch.equal(found.logits(photos), expected.logits(photos))
        assert found.info.added_classes == NEW
        stored = Student.load(found.save(tmp_path / "found"), backbone=models.student)
        again = Student.load(folder, backbone=models.student)
        assert torch.equal(stored.logits(photos), again.logits(photos))
        assert stored.class_names == names
        assert stored.info.added_classes == NEW
    renamed = found.rename_classes({"sea": "ocean"}).with_classes(["ocean", "cat", "dog"])
    assert renamed.info.added_classes == ("ocean",)
    assert torch.equal(renamed.class_vectors, vectors[[0, 2, 1]])


def test_a_teacher_that_knows_a_name_is_not_asked_to_compute_it(
    models: Models, tmp_path: Path
) -> None:
    wide = tuned_teacher(models, OLD + NEW)
    student = student_of(wide, models).with_classes(OLD)
    folder = wide.save(tmp_path / "teacher")
    sheet = json.loads((folder / "teacher.json").read_text())
    (folder / "teacher.json").write_text(json.dumps({**sheet, "model": "local-dir:/gone"}))
    found = student.with_classes([*OLD, *NEW], folder)
    assert torch.equal(found.class_vectors, wide.class_vectors)
    mixed = student.with_classes(["moon", "sea"], wide)
    assert torch.equal(mixed.class_vectors[1], wide.class_vectors[4])
    assert torch.equal(mixed.class_vectors[:1], with_class_names(wide, ["moon"]).class_vectors)


def test_the_text_side_is_small_and_survives_storage(
    student: Student, models: Models, tmp_path: Path
) -> None:
    assert student.text_side is not None
    loaded = Student.load(student.save(tmp_path / "s"), backbone=models.student)
    assert loaded.text_side is not None
    assert loaded.text_side.fingerprint() == student.text_side.fingerprint()
    assert torch.equal(
        loaded.with_classes(NEW).class_vectors, student.with_classes(NEW).class_vectors
    )
    without = student_of(zero_shot_teacher(load_clip(models.teacher), OLD, TEMPLATES), models)
    grown = (student.save(tmp_path / "s") / "student.safetensors").stat().st_size
    plain = (without.save(tmp_path / "t") / "student.safetensors").stat().st_size
    assert grown - plain < 3000  # 2 layers of 4 x 32 floats, or nothing


@pytest.mark.parametrize("by_name", [False, True])
def test_distilled_from_a_cache_it_knows_its_text_side(
    models: Models, photos: Path, tmp_path: Path, by_name: bool
) -> None:
    """When the cache is built, and when it stands for the teacher, which isn't loaded."""
    tuned = tuned_teacher(models)
    source: Any = models.teacher if by_name else tuned.save(tmp_path / "teacher")
    names = OLD if by_name else None
    config = DistillConfig(max_steps=2, min_steps=0, batch_size=8, views=1, prompt_depth=2)
    vectors = []
    for _ in range(2):
        made = distill(
            photos,
            names,
            teacher=source,
            student=models.student,
            cache=tmp_path / "cache",
            config=config,
            progress=Progress(quiet=True),
        )
        vectors.append(made.with_classes(NEW).class_vectors)
    expected = student_of(
        zero_shot_teacher(load_clip(models.teacher), OLD, config.templates) if by_name else tuned,
        models,
    )
    for found in vectors:
        assert torch.equal(found, expected.with_classes(NEW).class_vectors)


def test_published_names_that_repeat_stay_what_they_are(models: Models) -> None:
    names = PublishedNames(("missile", "cat", "missile"))
    student = student_of(zero_shot_teacher(load_clip(models.teacher), names, TEMPLATES), models)
    more = student.with_classes([*names, "sea"])
    assert torch.equal(more.class_vectors[:3], student.class_vectors)
    with pytest.raises(DataError, match="'missile' stands 3 times"):
        student.with_classes([*names, "missile"])
    with pytest.raises(DataError, match="'sea' stands 2 times"):
        student.with_classes(["sea", "sea"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "cat"], "'cat' stands twice"),
        (["red_bus", "red bus"], "'red bus' stands twice"),
        (["cat", " "], "class name 2 of 2 is empty"),
        ([], "at least one name"),
        ("cat", "must be a list"),
    ],
)
def test_bad_names(student: Student, names: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        student.with_classes(names)


def test_bad_changes(student: Student) -> None:
    with pytest.raises(DataError, match="no class 'trees' among its 4; did you mean tree"):
        student.rename_classes({"trees": "oak"})
    with pytest.raises(DataError, match="'dog' stands twice"):
        student.rename_classes({"cat": "dog"})
    with pytest.raises(DataError, match="is empty"):
        student.rename_classes({"cat": ""})
    with pytest.raises(DataError, match="no class would be left"):
        student.classes.without(OLD)


def test_new_names_need_the_right_text_side(
    student: Student, teacher: Teacher, models: Models, tmp_path: Path
) -> None:
    other = tuned_teacher(models, seed=6)
    with pytest.raises(CheckpointError, match="is not the one whose class vectors"):
        student.with_classes(NEW, other)
    with pytest.raises(CheckpointError, match="made by a text tower with weights"):
        student.with_classes(NEW, models.student)
    folder = student.save(tmp_path / "s")
    sheet = json.loads((folder / "student.json").read_text())
    gone = {**sheet["text_side"], "model": "local-dir:/gone"}
    (folder / "student.json").write_text(json.dumps({**sheet, "text_side": gone}))
    lost = Student.load(folder, backbone=models.student)
    with pytest.raises(ModelError, match="'local-dir:/gone', which is not to be had here; pass"):
        lost.with_classes(NEW)
    assert lost.with_classes(NEW, models.teacher).class_names == NEW


def test_an_older_student_takes_its_own_teacher_only(
    student: Student, teacher: Teacher, models: Models, tmp_path: Path
) -> None:
    """Without a stored text side the vectors of shared names tell whose student it is."""
    folder = student.save(tmp_path / "s")
    sheet = json.loads((folder / "student.json").read_text())
    for key in ("text_side", "classes_digest", "added_classes"):
        del sheet[key]
    (folder / "student.json").write_text(json.dumps(sheet))
    old = Student.load(folder, backbone=models.student)
    with pytest.raises(DataError, match="holds no text side"):
        old.with_classes(NEW)
    with pytest.raises(DataError, match="holds no text side"):
        old.with_classes(NEW, models.teacher)
    with pytest.raises(CheckpointError, match="is not the one"):
        old.with_classes(NEW, tuned_teacher(models, seed=6))
    with pytest.raises(CheckpointError, match="is not the one"):
        old.with_classes(NEW, with_class_names(teacher, NEW))
    expected = student.with_classes(NEW).class_vectors
    assert torch.equal(old.with_classes(NEW, teacher).class_vectors, expected)


def test_names_edited_by_hand_are_noticed(student: Student, tmp_path: Path, models: Models) -> None:
    folder = student.save(tmp_path / "s")
    sheet = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps({**sheet, "class_names": sorted(OLD)[::-1]}))
    with pytest.raises(CheckpointError, match="were not written together with its 4 class vectors"):
        Student.load(folder, backbone=models.student)
    with pytest.raises(CheckpointError, match="were not written together"):
        read_classes(folder)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_command_line(
    student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str], photos: Path
) -> None:
    folder = student.save(tmp_path / "s", include_backbone=True)
    code, out, _ = run(capsys, "classes", "list", folder)
    assert (code, out.splitlines()) == (0, list(OLD))
    code, out, _ = run(capsys, "classes", "add", folder, *NEW, "--output", tmp_path / "t", "--json")
    assert code == 0
    shown = json.loads(out)
    assert (shown["classes"], shown["added"]) == ([*OLD, *NEW], list(NEW))
    assert read_classes(folder).names == OLD
    expected = student.with_classes([*OLD, *NEW])
    assert torch.equal(Student.load(tmp_path / "t").logits(photos), expected.logits(photos))
    code, out, _ = run(capsys, "classes", "remove", tmp_path / "t", "cat", "sea")
    assert (code, out.strip()) == (0, f"student of 4 classes in '{tmp_path / 't'}'")
    code, _, _ = run(capsys, "classes", "rename", tmp_path / "t", "tree", "larch")
    assert code == 0
    left = Student.load(tmp_path / "t")
    assert left.class_names == ("dog", "red_bus", "larch", "green hill")
    assert left.info.added_classes == ("green hill",)
    (tmp_path / "names.txt").write_text("moon\nsun\n")
    code, out, _ = run(
        capsys, "classes", "add", tmp_path / "t", "--classes", tmp_path / "names.txt", "--json"
    )
    assert json.loads(out)["added"] == ["green hill", "moon", "sun"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["add", "{s}", "cat"], "'cat' stands twice"),
        (["add", "{s}"], "at least one class to add"),
        (["remove", "{s}", "cow"], "no class 'cow'"),
        (["rename", "{s}", "cat", "dog"], "'dog' stands twice"),
        (["list", "{s}/nowhere"], "holds no student.json"),
        (["remove", "{s}", "cat", "--output", "{t}"], "already holds a student"),
    ],
)
def test_command_line_errors(
    student: Student,
    args: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One sentence, and the student stays as it was."""
    places = {"s": str(student.save(tmp_path / "s")), "t": str(student.save(tmp_path / "t"))}
    before = {p: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    code, _, err = run(capsys, "classes", *(a.format(**places) for a in args))
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert {p: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before


def test_edit_folder_keeps_the_rest(student: Student, models: Models, tmp_path: Path) -> None:
    folder = student.save(tmp_path / "s")
    edit_folder(folder, lambda old: old.select(OLD[::-1]))
    back = edit_folder(folder, lambda old: old.select(OLD))
    assert isinstance(back, ClassList)
    loaded = Student.load(folder, backbone=models.student)
    assert loaded.info == student.info
    for mine, theirs in zip(
        loaded.state_dict().values(), student.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
