"""Temperature, reliability and what looks out of domain, against plain references."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from promptkd import DistillConfig, Student, distill
from promptkd.calibration import (
    Calibration,
    Score,
    calibrate,
    domain_score,
    fit_temperature,
    reliability,
)
from promptkd.cli import main
from promptkd.clip import load_clip
from promptkd.errors import DataError
from promptkd.report import write_report
from promptkd.stages.distill import new_student
from promptkd.stages.progress import Progress
from promptkd.teacher import zero_shot_teacher
from tiny import CLASSES, Models
from torch.nn import functional as F


def drawn(num_images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels that are drawn from their softmax: calibrated at T = 1."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_images, classes, generator=random, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=random).squeeze(1)


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_the_temperature_undoes_a_scale(scale: float) -> None:
    logits, labels = drawn(20_000, 7)
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale, rel=0.03)
    exact = fit_temperature(scale * logits, logits.softmax(-1))
    assert exact == pytest.approx(scale, rel=1e-9)


@pytest.mark.parametrize("soft", [False, True])
def test_the_temperature_is_where_the_cross_entropy_is_lowest(soft: bool) -> None:
    logits, labels = drawn(501, 37, seed=3)
    random = torch.Generator().manual_seed(4)
    noise = torch.randn(logits.shape, generator=random, dtype=torch.float64)
    targets = (logits / 2).softmax(-1) if soft else labels
    logits = 2.5 * logits + noise
    found = fit_temperature(logits, targets)

    def entropy(temperature: float) -> float:
        return float(F.cross_entropy(logits / temperature, targets))

    assert entropy(found) <= min(entropy(found * 1.01), entropy(found / 1.01))
    assert reliability(logits / found, targets).cross_entropy == pytest.approx(entropy(found))


def test_the_error_is_torchmetrics_own() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.functional.classification import multiclass_calibration_error
    logits, labels = drawn(800, 5)
    found = reliability(4 * logits, labels)
    theirs = multiclass_calibration_error(
        (4 * logits).softmax(-1), labels, num_classes=5, n_bins=15, norm="l1"
    )
    assert found.error == pytest.approx(100 * float(theirs), abs=1e-4)
    assert sum(b.num_images for b in found.bins) == 800
    hard = F.one_hot(labels, 5).double()
    soft = reliability(4 * logits, hard)
    assert soft.error == pytest.approx(found.error)
    assert soft.bins == found.bins


def test_calibrating_lowers_the_error_and_cuts_off_the_rate() -> None:
    logits, labels = drawn(4000, 9)
    for score in ("energy", "probability"):
        found = calibrate(5 * logits, labels, rate=0.1, score=score)  # type: ignore[arg-type]
        assert found.after.error < 3 < 10 < found.before.error
        assert found.after.cross_entropy < found.before.cross_entropy
        assert float(found.is_foreign(5 * logits).double().mean()) == pytest.approx(0.1, abs=1e-3)
        assert bool(found.is_foreign(torch.zeros(1, 9)).all())  # flat logits look foreign
        assert found.targets == "labels"
        assert Calibration.from_json(json.loads(json.dumps(_plain(found)))) == found
    energy = domain_score(logits, 2.0, "energy")
    torch.testing.assert_close(energy, 2 * (logits / 2).exp().sum(-1).log())


def _plain(found: Calibration) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(found)


def test_bad_input() -> None:
    logits, labels = drawn(30, 4)
    with pytest.raises(DataError, match="19 pictures are too few"):
        calibrate(logits[:19], labels[:19])
    with pytest.raises(DataError, match=r"must lie in \[0, 0.5\], not 0.7"):
        calibrate(logits, labels, rate=0.7)
    lost = replace(calibrate(logits, labels), threshold=None)
    with pytest.raises(DataError, match="calibrate again"):
        lost.is_foreign(logits)


@pytest.fixture
def student(models: Models) -> Student:
    teacher = zero_shot_teacher(load_clip(models.teacher), CLASSES, ("a photo of a {}.",))
    made = new_student(load_clip(models.student), teacher, DistillConfig(prompt_depth=2))
    with torch.no_grad():
        made.train().project(torch.randn(16, 3, 48, 48))
    return made.eval()


def test_a_student_keeps_and_uses_it(
    student: Student, photos: Path, tmp_path: Path, models: Models
) -> None:
    plain = student.predict(photos, top_k=3)
    found = student.calibrate(photos, rate=0.25)
    loaded = Student.load(student.save(tmp_path / "s"), backbone=models.student)
    assert loaded.info == student.info
    told = loaded.predict(photos, top_k=3)
    assert isinstance(plain, list)
    assert isinstance(told, list)
    expected = (student.logits(photos) / found.temperature).softmax(-1).topk(3).values
    for before, after, row in zip(plain, told, expected.tolist(), strict=True):
        assert before.labels == after.labels
        assert after.probabilities == pytest.approx(row)
        assert before.out_of_domain is None
    assert sum(bool(p.out_of_domain) for p in told) == 9
    assert loaded.evaluate(photos).calibration_error == pytest.approx(found.after.error)


@pytest.mark.parametrize("score", ["energy", "probability"])
def test_the_highest_logit_and_its_probability_tell_what_is_foreign(score: Score) -> None:
    logits, labels = drawn(300, 9)
    found = calibrate(5 * logits, labels, rate=0.1, score=score)
    probability, best = (5 * logits / found.temperature).softmax(-1).max(-1)
    highest = 5 * logits.gather(1, best[:, None])[:, 0]
    told = found.is_foreign_best(highest, probability)
    assert torch.equal(told, found.is_foreign(5 * logits))
    assert 0 < int(told.sum()) < 300


def test_other_classes_lose_the_threshold_and_keep_the_temperature(
    student: Student, photos: Path
) -> None:
    found = student.calibrate(photos)
    same = student.rename_classes({CLASSES[0]: "tomato"}).with_classes(
        [CLASSES[2], "tomato", CLASSES[1]]
    )
    assert same.info.calibration == found
    for names in (CLASSES[:2], (*CLASSES, "a lemon"), (*CLASSES[:2], "a lemon")):
        other = student.with_classes(names)
        assert other.info.temperature == found.temperature
        assert other.info.calibration is not None
        assert other.info.calibration.threshold is None
        first = other.predict(sorted(photos.rglob("*.png"))[0])
        assert getattr(first, "out_of_domain", 0) is None


@pytest.mark.parametrize("labels", [False, True])
def test_distilling_calibrates(
    models: Models, photos: Path, tmp_path: Path, labels: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the teacher's probabilities of the pictures kept aside, or on labels where given."""
    config = DistillConfig(
        max_steps=3, min_steps=0, batch_size=4, views=1, prompt_depth=2, holdout=0.48,
        temperature=2.0, templates=("a photo of a {}.",),
    )  # fmt: skip
    pictures = [*sorted(str(p) for p in photos.rglob("*.*"))] * 2
    copies = tmp_path / "copies.txt"
    copies.write_text("\n".join(pictures))
    student = distill(
        copies,
        CLASSES,
        teacher=models.teacher,
        student=models.student,
        validation=photos if labels else None,
        output=tmp_path / "student",
        config=config,
        progress=Progress(),
    )
    found = student.info.calibration
    assert found is not None
    assert found.temperature == student.info.temperature
    assert found.targets == ("labels" if labels else "teacher")
    assert found.num_images == (36 if labels else 35)
    assert "fitted to the teacher's probabilities: calibration error" in capsys.readouterr().err
    write_report([tmp_path / "student"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    by = "by labels." if labels else "by the teacher&#x27;s probabilities"
    assert f"fitted on {found.num_images} pictures" in page
    assert by in page or by.replace("&#x27;", "'") in page
    for title, side in (("T = 1", found.before), ("calibrated", found.after)):
        assert f"{title} (ECE {side.error:.1f} %)" in page


def test_bad_validation_labels_end_it_before_training(models: Models, photos: Path) -> None:
    with pytest.raises(DataError, match="labels that are not among"):
        distill(
            photos,
            ["cat", "dog"],
            teacher=models.teacher,
            student=models.student,
            validation=photos,
            progress=Progress(quiet=True),
        )


def test_command_line(
    student: Student, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = student.save(tmp_path / "s", include_backbone=True)
    before = (folder / "student.safetensors").read_bytes()
    assert main(["calibrate", str(folder), str(photos), "--rate", "0.25", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (folder / "student.safetensors").read_bytes() == before
    loaded = Student.load(folder)
    assert loaded.info.temperature == shown["temperature"]
    assert loaded.info.calibration == Calibration.from_json(shown)
    assert main(["predict", str(folder), str(photos)]) == 0
    assert capsys.readouterr().out.count("(looks out of domain)") == 9
    assert main(["predict", str(folder), str(photos), "--output", str(tmp_path / "p.csv")]) == 0
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["out_of_domain"] for r in rows].count("True") == 9
    assert main(["calibrate", str(folder), str(photos)]) == 0
    capsys.readouterr()
    assert main(["classes", "remove", str(folder), CLASSES[1]]) == 0
    left = Student.load(folder).info.calibration
    assert left is not None
    assert left.threshold is None
    assert main(["calibrate", str(folder), str(tmp_path / "nowhere")]) == 1
    assert "neither a folder" in capsys.readouterr().err
