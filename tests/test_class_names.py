"""Class names with templates and descriptions: files, vectors, fingerprints, both stages, commands."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import promptkd
import pytest
import torch
from promptkd import ClassName, DistillConfig, Student, TeachConfig, Teacher
from promptkd.class_names import read_class_names, texts_of
from promptkd.class_vectors import ensemble_features, prompted_class_vectors, unit
from promptkd.cli import main
from promptkd.clip import Clip, load_clip
from promptkd.errors import CheckpointError, DataError, ModelError
from promptkd.prompts import DeepPrompts, PromptedNames
from promptkd.stages.progress import Progress
from promptkd.stages.teach import PromptSRC
from promptkd.teacher import zero_shot_teacher
from tiny import CLASSES, Models

QUIET = Progress(quiet=True)
GENERAL = ("a photo of a {}.", "a drawing of the {}.")
OAK = ClassName(
    "oak",
    templates=("a photo of a {} tree.", "an {} in a park, from far"),
    descriptions=("Its leaves have round lobes, like waves.", "It bears acorns."),
)
FIR = ClassName("silver_fir", descriptions="A fir keeps its needles.")
NAMES = (OAK, "birch", FIR)
THINGS = (
    ClassName("red_thing", descriptions=("It is red.", "It is like blood.")),
    "green thing",
    ClassName("blue thing", templates="a photo of a {}, on the left."),
)

CSV = """name,templates,descriptions
oak,"a photo of a {} tree.|an {} in a park, from far","Its leaves have round lobes, like waves.
| It bears acorns."
birch,,
silver_fir,,A fir keeps its needles.
"""
ROWS: list[Any] = [
    {"name": "oak", "templates": list(OAK.templates), "descriptions": list(OAK.descriptions)},
    {"name": "birch"},
    {"name": "silver_fir", "descriptions": FIR.descriptions[0]},
]
FILES = {
    "names.csv": CSV,
    "names.tsv": "descriptions\tname\ttemplates\n"
    "Its leaves have round lobes, like waves.|It bears acorns.\toak\t"
    "a photo of a {} tree.|an {} in a park, from far\n"
    "\tbirch\t\nA fir keeps its needles.\tsilver_fir\t\n",
    "names.jsonl": "\n\n".join(map(json.dumps, ROWS)) + "\n",
    "names.json": json.dumps([ROWS[0], "birch", ROWS[2]]),
    "by-name.json": json.dumps(
        {
            "oak": {k: v for k, v in ROWS[0].items() if k != "name"},
            "birch": [],
            "silver_fir": list(FIR.descriptions),
        }
    ),
}


@pytest.fixture(scope="module")
def clip(models: Models) -> Clip:
    return load_clip(models.teacher)


@pytest.fixture(scope="module")
def prompts(clip: Clip) -> DeepPrompts:
    return DeepPrompts.random(4, clip.need_text("test").width, 2, torch.Generator().manual_seed(3))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------- names and their files
@pytest.mark.parametrize("file", FILES)
def test_every_form_of_file_holds_the_same(file: str, tmp_path: Path) -> None:
    found = read_class_names(write(tmp_path / file, FILES[file]))
    assert found == NAMES == ("oak", "birch", "silver_fir")
    assert [texts_of(name) for name in found] == [texts_of(name) for name in NAMES]
    assert type(found[1]) is str


def test_a_text_file_stays_a_name_a_line(tmp_path: Path) -> None:
    found = read_class_names(write(tmp_path / "names.txt", '\ufeffoak, red\n\n {"name"} \n'))
    assert found == ("oak, red", '{"name"}')
    assert all(type(name) is str for name in found)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.csv", "oak\nbirch\n", r"a.csv' has no column 'name' in its first line.*ends in .txt"),
        ("a.csv", "", "has no column 'name'"),
        ("a.csv", "name,descriptions\noak,red, and blue\n", "line 2 of .*a.csv' has more cells"),
        ("a.csv", "name,template\noak,x\n", "line 2 of .*has 'template', which is none of name, "),
        ("a.csv", "name,templates\noak,a tree\n", "line 2 of .*template 'a tree' of class 'oak'"),
        ("a.tsv", "name\tdescriptions\noak\ta {}\n", "description 'a {}' of class 'oak' holds"),
        ("a.csv", "name\noak\noak\n", r"a.csv': class name 'oak' stands twice \(places 1 and 2"),
        ("a.csv", "name,templates\n,a {}\n", r"a.csv': class name 1 of 1 is empty"),
        ("a.jsonl", '{"name": "oak"}\n{"nam\n', "line 2 of .*a.jsonl' is no JSON"),
        ("a.jsonl", '{"title": "oak"}\n', "line 1 of .*a.jsonl' gives no class name"),
        ("a.jsonl", '{"name": "o", "descriptions": [1]}', "line 1 .* must be sentences, not 1"),
        ("a.jsonl", '{"name": "o", "templates": 7}', "line 1 .* a sentence or a list of them"),
        ("a.json", "{oak}", "a.json' is no JSON"),
        ("a.json", "7", "a.json' must hold a list of classes or an object"),
        ("a.json", '{"oak": {"text": "x"}}', "class 'oak' in .*a.json' has 'text', which is none"),
        ("a.json", "[[]]", "entry 1 of .*a.json' gives no class name"),
        ("a.json", "{}", "a.json': class names must be a list with at least one"),
        ("a.txt", "oak\noak\n", "a.txt': class name 'oak' stands twice"),
    ],
)
def test_a_bad_file_is_one_sentence(file: str, text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / file, text)
    with pytest.raises(DataError, match=message) as caught:
        read_class_names(path)
    assert "\n" not in str(caught.value)
    assert file in str(caught.value)


def test_a_name_is_a_string_that_keeps_its_texts() -> None:
    assert OAK == "oak"
    assert {OAK: 1}["oak"] == 1
    # Ranks send names to each other as pickles.
    for other in (copy.deepcopy(OAK), pickle.loads(pickle.dumps(OAK))):  # noqa: S301
        assert (other, texts_of(other)) == ("oak", texts_of(OAK))
    assert texts_of(ClassName("oak", descriptions=["", "  "])) is None
    with pytest.raises(DataError, match=r"must hold '\{\}' once"):
        ClassName("oak", templates=["a {} and a {}"])


# ---------------------------------------------------------------- class vectors
def raw_features(clip: Clip, sentences: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([clip.need_text("test")(clip.tokenize([s])) for s in sentences])


def test_zero_shot_vectors_are_means_over_a_class_s_own_sentences(clip: Clip) -> None:
    found = ensemble_features(clip, NAMES, GENERAL)
    sentences = [
        [
            "a photo of a oak tree.",
            "an oak in a park, from far",
            "Its leaves have round lobes, like waves.",
            "It bears acorns.",
        ],
        ["a photo of a birch.", "a drawing of the birch."],
        ["a photo of a silver fir.", "a drawing of the silver fir.", "A fir keeps its needles."],
    ]
    expected = torch.stack([raw_features(clip, texts).mean(dim=0) for texts in sentences])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    plain = ensemble_features(clip, ["birch"], GENERAL)
    torch.testing.assert_close(found[1:2], plain, rtol=1e-5, atol=1e-6)


def test_prompted_vectors_read_the_words_after_the_name(clip: Clip, prompts: DeepPrompts) -> None:
    """Prompts stand for the words before it, so the same sentences come from longer plain names."""
    sentences = [
        [
            "oak tree.",
            "oak in a park, from far",
            "oak tree. Its leaves have round lobes, like waves.",
            "oak tree. It bears acorns.",
        ],
        ["birch."],
        ["silver fir.", "silver fir. A fir keeps its needles."],
    ]
    tower = clip.need_text("test")
    expected = []
    for texts in sentences:
        tokens = PromptedNames(texts, "a photo of a {}", 4, clip.tokenize).tokens
        with torch.no_grad():
            expected.append(tower(tokens, prompts()).mean(dim=0))
    found = prompted_class_vectors(clip, NAMES, "a photo of a {}.", prompts)
    torch.testing.assert_close(found, unit(torch.stack(expected)), rtol=1e-5, atol=1e-6)
    assert PromptedNames(("a", "b"), "a photo of a {}.", 4, clip.tokenize).counts is None


def test_a_text_that_would_be_cut_short_is_refused(clip: Clip, prompts: DeepPrompts) -> None:
    long = ClassName("oak", descriptions="leaf " * 90)
    with pytest.raises(ModelError, match="longer than the 77 tokens that the text tower reads"):
        ensemble_features(clip, ["birch", long], GENERAL)
    with pytest.raises(ModelError, match="shorten this template or description"):
        prompted_class_vectors(clip, ["birch", long], "a photo of a {}.", prompts)


def test_stage_1_learns_on_all_sentences(clip: Clip) -> None:
    """The losses see the means; a subset of classes takes their rows and no others."""
    config = TeachConfig(templates=GENERAL, prompt_depth=2)
    model = PromptSRC(clip, NAMES, config)
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([2, 1, 2, 1])
    whole = model._class_features(None)
    some = model._class_features(torch.tensor([1, 2]))
    torch.testing.assert_close(some, whole[1:], rtol=1e-5, atol=1e-6)
    finished = prompted_class_vectors(clip, NAMES, config.template, model.text_prompts)
    torch.testing.assert_close(unit(whole), finished, rtol=1e-5, atol=1e-6)
    model.losses(pixels, labels, torch.tensor([1, 2]))["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.prompts())


# ---------------------------------------------------------------- fingerprints and folders
def test_the_fingerprint_covers_the_texts(clip: Clip, tmp_path: Path) -> None:
    other = ClassName("oak", templates=OAK.templates, descriptions=OAK.descriptions[::-1])
    prints = {
        zero_shot_teacher(clip, names, GENERAL).fingerprint()
        for names in (NAMES, (other, *NAMES[1:]), tuple(map(str, NAMES)))
    }
    assert len(prints) == 3
    teacher = zero_shot_teacher(clip, NAMES, GENERAL)
    folder = teacher.save(tmp_path / "teacher")
    again = Teacher.load(folder)
    assert again.fingerprint() == teacher.fingerprint()
    assert [texts_of(n) for n in again.class_names] == [texts_of(n) for n in NAMES]
    sheet = json.loads((folder / "teacher.json").read_text())
    sheet["class_texts"]["0"]["descriptions"] = ["It bears plums."]
    (folder / "teacher.json").write_text(json.dumps(sheet))
    with pytest.raises(CheckpointError, match="made by other weights, prompts, class names"):
        Teacher.load(folder)


def test_folders_without_texts_are_those_of_before(clip: Clip) -> None:
    """No entry about texts goes into the digest of a teacher that has none."""
    plain = zero_shot_teacher(clip, ("oak", "birch"), GENERAL)
    same = zero_shot_teacher(clip, (ClassName("oak"), "birch"), GENERAL)
    assert plain.fingerprint() == same.fingerprint()


def run(models: Models, photos: Path, names: Any, **changes: Any) -> Student:
    config = DistillConfig(
        max_steps=2, min_steps=0, batch_size=8, views=1, prompt_depth=2, templates=GENERAL
    )
    given = {"teacher": models.teacher, "student": models.student, "config": config}
    return promptkd.distill(photos, names, progress=QUIET, **{**given, **changes})


def test_a_cache_of_other_texts_gives_its_vectors_to_nobody(
    models: Models, photos: Path, tmp_path: Path
) -> None:
    first = run(models, photos, THINGS, cache=tmp_path / "cache")
    known = run(models, photos, THINGS, cache=tmp_path / "cache")
    assert torch.equal(known.class_vectors, first.class_vectors)
    assert [texts_of(n) for n in known.class_names] == [texts_of(n) for n in THINGS]
    plain = run(models, photos, CLASSES, cache=tmp_path / "cache")
    clip = load_clip(models.teacher)
    for student, names in ((first, THINGS), (plain, CLASSES)):
        expected = zero_shot_teacher(clip, names, GENERAL).class_vectors
        torch.testing.assert_close(student.class_vectors, expected)
    assert not torch.equal(plain.class_vectors[0], first.class_vectors[0])


def test_a_run_with_other_texts_is_another_run(
    models: Models, photos: Path, tmp_path: Path
) -> None:
    run(models, photos, THINGS, output=tmp_path / "s")
    run(models, photos, THINGS, output=tmp_path / "s", resume=True)
    with pytest.raises(CheckpointError):
        run(models, photos, CLASSES, output=tmp_path / "s", resume=True)


def test_a_student_edits_described_classes(models: Models, photos: Path, tmp_path: Path) -> None:
    student = run(models, photos, THINGS, output=tmp_path / "s")
    loaded = Student.load(tmp_path / "s", backbone=models.student)
    assert [texts_of(n) for n in loaded.class_names] == [texts_of(n) for n in THINGS]
    bare = loaded.with_classes(["blue thing", "red thing"])
    assert torch.equal(bare.class_vectors, student.class_vectors[[2, 0]])
    assert texts_of(bare.class_names[1]) == texts_of(THINGS[0])
    renamed = bare.rename_classes({"red thing": "tomato"})
    assert texts_of(renamed.class_names[1]) == texts_of(THINGS[0])
    told = ClassName("red_thing", descriptions="It is a tomato.")
    expected = zero_shot_teacher(load_clip(models.teacher), (told, OAK), GENERAL).class_vectors
    retold = loaded.with_classes([told, "green thing", OAK])
    torch.testing.assert_close(retold.class_vectors[[0, 2]], expected)
    assert torch.equal(retold.class_vectors[1], student.class_vectors[1])
    assert retold.info.added_classes == ("red_thing", "oak")
    again = Student.load(retold.save(tmp_path / "t"), backbone=models.student)
    assert [texts_of(n) for n in again.class_names] == [texts_of(n) for n in retold.class_names]


# ---------------------------------------------------------------- the command line
def test_from_the_shell(
    models: Models, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"red_thing": ["It is red."], "green thing": [], "blue thing": ["It is the sky."]}
    things = write(tmp_path / "things.json", json.dumps(texts))
    more = write(tmp_path / "more.csv", "name,descriptions\na lemon,It is sour.\n")
    teaching = ["--model", models.teacher, "--templates", *GENERAL, "--shots", "2"]
    pupil = ["--student", models.student, "--include-backbone", "--batch-size", "12"]
    steps, shots = ["--max-steps", "2", "--quiet", "--json"], str(photos)
    picture = str(next(photos.rglob("*.jpg")))
    calls = [
        ["teach", shots, "--classes", str(things), "--output", f"{tmp_path}/t", *teaching, *steps],
        ["distill", shots, "--teacher", f"{tmp_path}/t", "--output", f"{tmp_path}/s", *pupil,
         *steps],
        ["distill", shots, "--teacher", models.teacher, "--classes", str(things),
         "--templates", *GENERAL, "--cache", f"{tmp_path}/c", "--output", f"{tmp_path}/z",
         *pupil, *steps],
        ["classes", "add", f"{tmp_path}/s", "--classes", str(more), "--json"],
        ["predict", f"{tmp_path}/s", picture, "--json"],
    ]  # fmt: skip
    for call in calls:
        code, shown = main(call), capsys.readouterr()
        assert code == 0 or "less than before distilling" in shown.err, shown.err
    assert sorted(json.loads(shown.out)[0]["labels"]) == ["a lemon", "blue thing", *CLASSES[1::-1]]
    names = read_class_names(things)
    teacher = Teacher.load(tmp_path / "t", text=True)
    assert teacher.text_prompts is not None
    assert torch.equal(
        teacher.class_vectors,
        prompted_class_vectors(teacher.clip, names, "a photo of a {}.", teacher.text_prompts),
    )
    zero = Student.load(tmp_path / "z")
    expected = zero_shot_teacher(load_clip(models.teacher), names, GENERAL).class_vectors
    assert torch.equal(zero.class_vectors, expected)
    student = Student.load(tmp_path / "s")
    assert texts_of(student.class_names[3]) == ((), ("It is sour.",))
    assert torch.equal(student.class_vectors[:3], teacher.class_vectors)
