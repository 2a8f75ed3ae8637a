"""The student: kinds of input, storage, and accuracies against torchmetrics."""

import copy
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import promptkd.loss
import promptkd.student
import pytest
import torch
from loss_cases import StorageSpy
from PIL import Image
from promptkd import DistillConfig, Prediction, Student
from promptkd.calibration import calibrate
from promptkd.clip import load_clip
from promptkd.errors import CheckpointError, DataError, ImageError
from promptkd.evaluate import score
from promptkd.stages.distill import new_student
from promptkd.teacher import zero_shot_teacher
from tiny import Models

NAMES = ("cat", "dog", "red_bus", "tree", "house", "sea", "hill")


@pytest.fixture(scope="module")
def student(models: Models) -> Student:
    teacher = zero_shot_teacher(load_clip(models.teacher), NAMES, ("a photo of a {}.",))
    made = new_student(load_clip(models.student), teacher, DistillConfig(prompt_depth=2))
    made.train()
    with torch.no_grad():
        for _ in range(3):
            made.project(torch.randn(16, 3, 48, 48))  # gives BatchNorm statistics of its own
    return made.eval()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(3).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def probabilities(prediction: Prediction | list[Prediction]) -> dict[str, float]:
    assert isinstance(prediction, Prediction)
    return dict(zip(prediction.labels, prediction.probabilities, strict=True))


def test_every_kind_of_input_gives_the_same_answer(student: Student, picture: Path) -> None:
    image = Image.open(picture)
    array = np.asarray(image)
    expected = probabilities(student.predict(picture, top_k=7))
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    kinds = [str(picture), image, array, torch.from_numpy(array.copy()).permute(2, 0, 1)]
    for kind in kinds:
        assert probabilities(student.predict(kind, top_k=7)) == pytest.approx(expected, abs=1e-6)
    many = student.predict([picture, image], top_k=2)
    assert isinstance(many, list)
    assert [p.path for p in many] == [str(picture), None]
    assert len(many[0].labels) == 2
    folder = student.predict(picture.parent)
    assert isinstance(folder, list)
    assert folder[0].path == str(picture)
    stacked = student.logits(np.stack([array, array]))
    torch.testing.assert_close(stacked[0], student.logits(picture)[0], rtol=1e-5, atol=1e-5)


def test_logits_are_cosines_with_the_class_vectors(student: Student, picture: Path) -> None:
    pixels = student.preprocess(picture)
    assert pixels.shape == (1, 3, 48, 48)
    features = student.encode_image(picture)
    assert float(features.norm()) == pytest.approx(1, abs=1e-6)
    expected = student.logit_scale * features @ student.class_vectors.T
    torch.testing.assert_close(student.logits(pixels), expected)
    torch.testing.assert_close(student(pixels).detach(), expected)


def test_training_mode_survives_a_prediction(student: Student, picture: Path) -> None:
    learner = copy.deepcopy(student).train()
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    torch.testing.assert_close(learner.logits(picture), student.logits(picture))
    assert learner.training
    assert all(torch.equal(before[k], v) for k, v in learner.state_dict().items())


def test_photos_are_turned_upright(student: Student, tmp_path: Path) -> None:
    pixels = np.random.default_rng(5).integers(0, 255, (40, 80, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[274] = 6  # turned a quarter: the viewer turns it back
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    torch.testing.assert_close(student.logits(tmp_path / "turned.png"), student.logits(upright))
    plain = copy.copy(student)
    object.__setattr__(plain, "info", type(student.info)(student.info.class_names, orient=False))
    assert not torch.allclose(
        plain.logits(tmp_path / "turned.png"), plain.logits(upright), atol=1e-3
    )


@pytest.mark.parametrize("embedded", [False, True])
def test_saved_and_loaded_is_the_same(
    student: Student, picture: Path, tmp_path: Path, models: Models, embedded: bool
) -> None:
    folder = student.save(tmp_path / "s", include_backbone=embedded)
    loaded = Student.load(folder, backbone=None if embedded else models.student)
    assert torch.equal(loaded.logits(picture), student.logits(picture))
    assert loaded.info == student.info
    assert loaded.clip.preprocess == student.clip.preprocess
    again = loaded.save(tmp_path / "again", include_backbone=embedded)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (again / file.name).read_bytes()


def test_an_embedded_student_needs_no_other_folder(
    student: Student, picture: Path, tmp_path: Path
) -> None:
    folder = student.save(tmp_path / "s", include_backbone=True)
    sheet = json.loads((folder / "student.json").read_text())
    sheet["backbone"] = "local-dir:/gone"
    (folder / "student.json").write_text(json.dumps(sheet))
    half = Student.load(folder, precision="bf16")
    assert half.vision.dtype == torch.bfloat16
    torch.testing.assert_close(half.logits(picture), student.logits(picture), rtol=0.1, atol=0.3)


def test_loading_needs_neither_teacher_nor_triton(
    student: Student, picture: Path, tmp_path: Path
) -> None:
    folder = student.save(tmp_path / "s", include_backbone=True)
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from promptkd.student import Student\n"
        f"print(Student.load({str(folder)!r}).predict({str(picture)!r}).labels[0])\n"
        "assert 'matplotlib' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() in NAMES


def test_storage_errors(student: Student, tmp_path: Path, models: Models) -> None:
    with pytest.raises(CheckpointError, match=r"holds no student\.json"):
        Student.load(tmp_path)
    folder = student.save(tmp_path / "s")
    with pytest.raises(CheckpointError, match="was distilled into"):
        Student.load(folder, backbone=models.teacher)
    sheet = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps({**sheet, "class_names": ["cat"]}))
    with pytest.raises(CheckpointError, match="the 1 class names in"):
        Student.load(folder)
    (folder / "student.json").write_text(json.dumps({**sheet, "kind": "something"}))
    with pytest.raises(CheckpointError, match="does not describe a promptkd student"):
        Student.load(folder)
    (folder / "student.json").write_text(json.dumps(sheet)[:50])
    with pytest.raises(CheckpointError, match="is damaged"):
        Student.load(folder)


def test_input_errors(student: Student, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        student.predict(tmp_path / "bad.jpg")
    with pytest.raises(ImageError, match=r"gone\.jpg"):
        student.predict(tmp_path / "gone.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in"):
        student.predict(tmp_path / "empty")
    with pytest.raises(DataError, match="top_k must be at least 1"):
        student.predict(tmp_path / "bad.jpg", top_k=0)
    with pytest.raises(DataError, match="no labelled pictures"):
        student.evaluate(tmp_path / "empty")


def test_a_linear_head_gives_the_logits(student: Student, photos: Path) -> None:
    tower, weight = student.as_linear_head()
    pixels = student.preprocess(photos)
    features = tower(pixels)
    assert features.shape == (36, weight.shape[1])
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(36))
    torch.testing.assert_close(features @ weight.T, student(pixels))
    assert not tower.training
    assert {id(p) for p in tower.parameters()} == {id(p) for p in student.parameters()}


@pytest.mark.parametrize("score_name", ["energy", "probability"])
def test_many_classes_are_told_without_all_logits(
    student: Student, photos: Path, score_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said of 30,000 classes is what all logits say, and they are nowhere written."""
    random = torch.Generator().manual_seed(7)
    width, count = student.class_vectors.shape[1], 30_000
    vectors = torch.nn.functional.normalize(torch.randn(count, width, generator=random), dim=1)
    names = tuple(f"class {i}" for i in range(count))
    info = replace(student.info, class_names=names)
    many = Student(student.clip, student.prompts, student.projector, vectors, info).eval()
    logits = many.logits(photos)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]
    many.set_calibration(calibrate(logits, targets, rate=0.25, score=score_name))  # type: ignore[arg-type]
    calls: list[int] = []
    fused = promptkd.loss.top_k
    monkeypatch.setattr(
        promptkd.loss, "top_k", lambda *a, **k: (calls.append(1), fused(*a, **k))[1]
    )
    with StorageSpy(many.class_vectors) as spy:
        found = many.predict(photos, top_k=4)
    assert calls
    assert 0 < spy.largest < 36 * count / 2
    calls.clear()
    monkeypatch.setattr(promptkd.student, "_MANY_CLASSES", count + 1)
    with StorageSpy(many.class_vectors) as spy:
        plain = many.predict(photos, top_k=4)
    assert not calls
    assert spy.largest >= 36 * count
    assert isinstance(found, list)
    assert isinstance(plain, list)
    for a, b in zip(found, plain, strict=True):
        assert (a.path, a.labels, a.out_of_domain) == (b.path, b.labels, b.out_of_domain)
        assert a.probabilities == pytest.approx(b.probabilities, rel=1e-4)
    assert sum(bool(p.out_of_domain) for p in found) == 9


def test_predict_proba_is_what_predict_says(student: Student, photos: Path) -> None:
    warm = copy.copy(student)
    object.__setattr__(warm, "info", replace(student.info, temperature=3.0))
    paths = sorted(photos.rglob("*.png"))
    table = warm.predict_proba(paths)
    assert table.shape == (18, len(NAMES))
    assert table.dtype == np.float64
    np.testing.assert_allclose(table.sum(axis=1), 1)
    for row, prediction in zip(table, warm.predict(paths, top_k=7), strict=True):  # type: ignore[arg-type]
        assert dict(zip(NAMES, row, strict=True)) == pytest.approx(
            probabilities(prediction), abs=1e-6
        )
    assert warm.predict_proba(paths[0]).shape == (1, len(NAMES))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_it_compiles_in_one_piece(student: Student, photos: Path, backend: str) -> None:
    compiled = torch.compile(student, backend=backend, fullgraph=True, dynamic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        for paths in (sorted(photos.rglob("*.png")), sorted(photos.rglob("*.jpg"))[:5]):
            pixels = student.preprocess(paths)
            found = compiled(pixels).detach()
            torch.testing.assert_close(found, student.logits(pixels), rtol=1e-5, atol=1e-4)


def test_accuracies_are_torchmetrics_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.functional.classification import multiclass_accuracy
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 7, generator=generator)
    labels = torch.randint(0, 7, (200,), generator=generator)
    logits[torch.arange(200), labels] += 1
    found = score(logits, labels, NAMES, NAMES[:4], NAMES[4:])

    def theirs(
        scores: torch.Tensor, truth: torch.Tensor, classes: int, **options: object
    ) -> torch.Tensor:
        return 100 * multiclass_accuracy(scores, truth, num_classes=classes, **options)  # type: ignore[arg-type]

    assert found.top1 == pytest.approx(float(theirs(logits, labels, 7, average="micro")))
    assert found.top5 == pytest.approx(float(theirs(logits, labels, 7, average="micro", top_k=5)))
    per_class = theirs(logits, labels, 7, average="none").tolist()
    assert list(found.per_class.values()) == pytest.approx(per_class)
    is_base = labels < 4
    base = float(theirs(logits[is_base][:, :4], labels[is_base], 4, average="micro"))
    novel = float(theirs(logits[~is_base][:, 4:], labels[~is_base] - 4, 3, average="micro"))
    assert (found.base, found.novel) == (pytest.approx(base), pytest.approx(novel))
    assert found.harmonic_mean == pytest.approx(2 * base * novel / (base + novel))
    with pytest.raises(DataError, match="'bear', which the model doesn't know"):
        score(logits, labels, NAMES, ["bear"])
