"""Both stages across families: teachers and students of other sizes, pixels and widths."""

import os
from pathlib import Path
from typing import Any

import promptkd
import pytest
import tiny_families
import torch
from promptkd import DistillConfig, Student, TeachConfig, Teacher
from promptkd.clip import _tokenizer, load_clip
from promptkd.errors import CheckpointError, ModelError
from promptkd.loading import Loaded
from promptkd.stages.progress import Progress
from tiny import CLASSES, make_photos
from tiny_families import FAMILIES, PROMPTED, UNPROMPTED, StubTokenizer

TEACH = TeachConfig(
    max_steps=2, epochs=1, batch_size=6, shots=2, templates=("a {}.",), prompt_depth=2
)
DISTILL = DistillConfig(
    max_steps=2, min_steps=0, epochs=1, batch_size=4, views=1, holdout=0.2, prompt_depth=2
)
QUIET = Progress(quiet=True)
NAMES = list(PROMPTED)
# Each family is a tuned teacher once and a student once.
PAIRS = [(name, NAMES[(i + 1) % len(NAMES)]) for i, name in enumerate(NAMES)]
QUICK = {"clipa", "coca", "eva02", "siglip", "pe", "vitamin", "mobileclip-b", "registers"}


@pytest.fixture(autouse=True)
def stub_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers that need a download are stubs."""
    monkeypatch.setattr("open_clip.factory.HFTokenizer", StubTokenizer)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("few") / "photos", per_class=3)


def check_folder(student: Student, folder: Path, photos: Path) -> None:
    """Stored with its tower and opened again it gives the same logits."""
    student.save(folder, include_backbone=True)
    paths = sorted(photos.rglob("*.*"))[:4]
    again = Student.load(folder)
    assert torch.equal(again.logits(paths), student.logits(paths))
    assert again.fingerprint() == student.fingerprint()


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        pytest.param(a, b, marks=() if a in QUICK else pytest.mark.long, id=f"{a} teaches {b}")
        for a, b in PAIRS
    ],
)
def test_pair(teacher: str, student: str, few: Path, tmp_path: Path) -> None:
    large = tiny_families.save(tmp_path / "large", teacher, 1)
    small = tiny_families.save(tmp_path / "small", student, 2)
    folder = tmp_path / "teacher"
    tuned = promptkd.teach(few, CLASSES, model=large, config=TEACH, output=folder, progress=QUIET)
    assert tuned.class_vectors.shape == (3, FAMILIES[teacher]["embed_dim"])
    assert Teacher.load(folder).fingerprint() == tuned.fingerprint()
    made = promptkd.distill(few, teacher=folder, student=small, config=DISTILL, progress=QUIET)
    assert made.clip.preprocess != tuned.preprocess
    assert made.projector.linear2.out_features == FAMILIES[teacher]["embed_dim"]
    assert made.prompts.layers[0].grad is None or made.prompts.layers[0].grad.isfinite().all()
    check_folder(made, tmp_path / "student", few)


@pytest.mark.parametrize("name", UNPROMPTED)
def test_zero_shot_teachers(name: str, few: Path, tmp_path: Path) -> None:
    """They need no prompts; as a student or a tuned teacher they are refused."""
    large = tiny_families.save(tmp_path / "large", name, 1)
    small = tiny_families.save(tmp_path / "small", "siglip", 2)
    made = promptkd.distill(
        few, list(CLASSES), teacher=large, student=small, config=DISTILL, progress=QUIET
    )
    check_folder(made, tmp_path / "student", few)
    with pytest.raises(ModelError, match=r"can't be a student.*it can be a zero-shot teacher"):
        promptkd.distill(
            few, list(CLASSES), teacher=small, student=large, config=DISTILL, progress=QUIET
        )
    with pytest.raises(ModelError, match="can't be tuned as a teacher"):
        promptkd.teach(few, CLASSES, model=large, config=TEACH, progress=QUIET)


def test_a_student_needs_no_tokenizer(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing package or download is an error for teachers alone."""
    large = tiny_families.save(tmp_path / "large", "vit", 1)
    small = tiny_families.save(tmp_path / "small", "siglip", 2)

    def missing(*_: object, **__: object) -> None:
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr("open_clip.factory.HFTokenizer", missing)
    with pytest.raises(
        ModelError, match=r"tokenizer of 'local-dir:.*pip install 'promptkd\[text\]'"
    ):
        load_clip(small)
    made = promptkd.distill(
        few, list(CLASSES), teacher=large, student=small, config=DISTILL, progress=QUIET
    )
    assert made.clip.text is None

    def offline(*_: object, **__: object) -> Any:
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr("open_clip.factory.HFTokenizer", offline)
    with pytest.raises(ModelError, match=r"put its files \(tokenizer\.json.* into '.*small'"):
        load_clip(small)
    named = Loaded("ViT-B-16-SigLIP/webli", None, {}, offline)
    with pytest.raises(ModelError, match=r"tokenizer of .*webli.* connect to the network once"):
        _tokenizer(named, True)


def test_a_corrupt_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache names files by their SHA-256."""
    tiny_families.save(tmp_path / "m", "vit")
    weights = (tmp_path / "m" / "open_clip_model.safetensors").read_bytes()
    blob, link = tmp_path / ("0" * 64), tmp_path / "open_clip_model.safetensors"
    blob.write_bytes(weights)
    os.symlink(blob, link)
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_a, **_k: str(link))
    with pytest.raises(CheckpointError, match="'ViT-B-32/openai' is corrupt: its SHA-256 is"):
        load_clip("ViT-B-32/openai")
    cut = tmp_path / "cut" / "open_clip_model.safetensors"
    cut.parent.mkdir()
    cut.write_bytes(weights[: len(weights) // 2])
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_a, **_k: str(cut))
    with pytest.raises(CheckpointError, match="are damaged, or their download is corrupt; delete"):
        load_clip("ViT-B-32/openai")


def test_a_tag_of_another_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_families.save(tmp_path / "m", "vit")
    weights = str(tmp_path / "m" / "open_clip_model.safetensors")
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_a, **_k: weights)
    monkeypatch.setattr("open_clip.factory.get_model_config", lambda _: dict(FAMILIES["worldwide"]))
    with pytest.raises(CheckpointError, match=r"architecture: .* of another shape \(.* is \("):
        load_clip("ViT-B-32/openai")


@pytest.mark.parametrize("name", ["siglip", "eva02", "coca", "average", "clipa", "gap"])
def test_objects_bring_their_configuration(name: str, tmp_path: Path, few: Path) -> None:
    """A student on a model object can be stored with its tower."""
    from promptkd.stages.distill import new_student
    from promptkd.teacher import zero_shot_teacher

    guide = zero_shot_teacher(load_clip(tiny_families.make("vit")), CLASSES, ("a {}.",))
    student = new_student(load_clip(tiny_families.make(name), text=False), guide, DISTILL)
    check_folder(student.eval(), tmp_path / "s", few)


def test_a_weights_file_and_an_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of models with a text tower of their own."""
    folder = tiny_families.save(tmp_path / "m", "siglip").removeprefix("local-dir:")
    monkeypatch.setattr("open_clip.get_model_config", lambda _: dict(FAMILIES["siglip"]))
    monkeypatch.setattr(
        "open_clip.get_tokenizer", lambda _: StubTokenizer("", 16, clean="canonicalize")
    )
    clip = load_clip(f"ViT-B-16-SigLIP/{folder}/open_clip_model.safetensors")
    assert clip.image_hash == load_clip(f"local-dir:{folder}", text=False).image_hash
    assert clip.need_text("test").context_start == 0
