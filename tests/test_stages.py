"""Both stages end to end on tiny models: results, resume, reports, and bad input."""

import gc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import promptkd
import pytest
import torch
from PIL import Image
from promptkd import DistillConfig, Student, TeachConfig, Teacher
from promptkd.clip import load_clip
from promptkd.data.loader import epoch_order
from promptkd.errors import CheckpointError, DataError, ImageError, ModelError, TrainingError
from promptkd.stages.distill import DistillStep, new_student
from promptkd.stages.progress import Progress
from promptkd.stages.teach import gpa_weights
from promptkd.stages.views import Batch, ViewBatches
from promptkd.text_tower import TextTower
from tiny import CLASSES, Models, make_photos

TEMPLATES = ("a photo of a {}.", "a {}.")
TEACH = TeachConfig(epochs=3, batch_size=8, shots=4, lr=0.02, templates=TEMPLATES, gpa_mean=2.0)
DISTILL = DistillConfig(
    epochs=2, min_steps=0, max_steps=12, batch_size=8, warmup_steps=2, views=2, holdout=0.1
)
QUIET = Progress(quiet=True)


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trained(student: Student) -> dict[str, torch.Tensor]:
    return tensors_of(student.prompts) | tensors_of(student.projector)


@pytest.fixture(scope="module")
def teacher(models: Models, photos: Path) -> Teacher:
    return promptkd.teach(photos, CLASSES, model=models.teacher, config=TEACH, progress=QUIET)


def run_distill(teacher: Any, models: Models, photos: Any, **changes: Any) -> Student:
    keywords = {"config": DISTILL, "progress": QUIET} | changes
    return promptkd.distill(photos, teacher=teacher, student=models.student, **keywords)


# --- stage 1


def test_teaching_moves_prompts_and_nothing_else(models: Models, photos: Path) -> None:
    clip = load_clip(models.teacher)
    hashes = (clip.image_hash, clip.text_hash)
    teacher = promptkd.teach(photos, CLASSES, model=models.teacher, config=TEACH, progress=QUIET)
    fresh = load_clip(models.teacher)
    assert same(tensors_of(teacher.vision), tensors_of(fresh.vision))
    assert (fresh.image_hash, fresh.text_hash) == hashes
    assert teacher.vision_prompts is not None
    assert teacher.text_prompts is not None
    words = fresh.need_text("test").token_embedding(fresh.tokenize(["a photo of a"])[0, 1:5])
    assert not torch.equal(teacher.text_prompts.layers[0], words)
    assert {p.dtype for p in teacher.vision_prompts.parameters()} == {torch.float32}
    assert teacher.class_vectors.norm(dim=1).allclose(torch.ones(len(CLASSES)))


def test_names_without_labels_change_no_prompt(
    models: Models, photos: Path, teacher: Teacher
) -> None:
    names = ("first of all", *CLASSES, "a name that nobody labelled and that is much longer")
    more = promptkd.teach(photos, names, model=models.teacher, config=TEACH, progress=QUIET)
    assert same(tensors_of(more.vision_prompts), tensors_of(teacher.vision_prompts))  # type: ignore[arg-type]
    assert same(tensors_of(more.text_prompts), tensors_of(teacher.text_prompts))  # type: ignore[arg-type]
    assert more.class_names == names
    torch.testing.assert_close(more.class_vectors[1:4], teacher.class_vectors, rtol=1e-4, atol=1e-5)


def test_zero_shot_is_the_template_ensemble(models: Models) -> None:
    config = TeachConfig(method="zero-shot", templates=TEMPLATES)
    teacher = promptkd.teach(None, CLASSES, model=models.teacher, config=config, progress=QUIET)
    clip = load_clip(models.teacher)
    tower = clip.need_text("test")
    with torch.no_grad():
        raw = [
            tower(clip.tokenize([t.format(n.replace("_", " ")) for n in CLASSES]))
            for t in TEMPLATES
        ]
    expected = torch.nn.functional.normalize(sum(raw[1:], raw[0]) / len(raw), dim=-1)
    torch.testing.assert_close(teacher.class_vectors, expected, rtol=1e-5, atol=1e-6)


def test_gpa_weights() -> None:
    weights = gpa_weights(15, 1, 20)
    assert sum(weights) == pytest.approx(1)
    assert weights.index(max(weights)) == 14
    assert weights[13] / weights[14] == pytest.approx(0.6065306597)
    assert gpa_weights(1000, 1, 3) == [0.0, 0.0, 1.0]


def test_teacher_folder(models: Models, teacher: Teacher, tmp_path: Path) -> None:
    teacher.save(tmp_path / "t")
    loaded = Teacher.load(tmp_path / "t")
    assert loaded.fingerprint() == teacher.fingerprint()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.encode_image(images), teacher.encode_image(images))
    with pytest.raises(CheckpointError, match="load it with the model it was tuned on"):
        Teacher.load(tmp_path / "t", model=models.student)
    sheet = json.loads((tmp_path / "t" / "teacher.json").read_text())
    sheet["class_names"] = list(reversed(sheet["class_names"]))
    (tmp_path / "t" / "teacher.json").write_text(json.dumps(sheet))
    with pytest.raises(CheckpointError, match="were made by other weights, prompts, class names"):
        Teacher.load(tmp_path / "t")
    (tmp_path / "t" / "teacher.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="damaged"):
        Teacher.load(tmp_path / "t")
    with pytest.raises(CheckpointError, match=r"holds no teacher\.json"):
        Teacher.load(tmp_path)


# --- stage 2


def test_distilling_learns_and_reports(models: Models, photos: Path, teacher: Teacher) -> None:
    config = replace(DISTILL, max_steps=60, epochs=20)
    student = run_distill(teacher, models, photos, config=config)
    summary = student.info.summary
    assert summary["steps"] == 60
    assert summary["num_holdout"] == 4
    assert summary["after"]["holdout_kl"] < summary["before"]["holdout_kl"]
    assert [row["step"] for row in summary["history"]][-1] == 60
    assert sum(summary["teacher_report"]["predictions"].values()) == 36
    assert not student.training
    assert same(tensors_of(student.vision), tensors_of(load_clip(models.student).vision))
    assert all(p.dtype == torch.float32 for p in student.trainable_parameters())


def test_both_towers_see_the_same_view(models: Models, photos: Path, teacher: Teacher) -> None:
    """A 64 px teacher and a 48 px student of other mean, std and interpolation."""
    from promptkd.data.sources import unlabelled

    student = new_student(load_clip(models.student), teacher, DISTILL)
    fresh = replace(DISTILL, views=0)
    batches = ViewBatches(unlabelled(photos), student, teacher, fresh, orient=True, progress=QUIET)
    batch = next(iter(batches.batches(0, 0)))
    assert batch.pixels.shape == (8, 3, 48, 48)
    again = next(iter(batches.batches(1, 0)))
    assert not torch.equal(batch.pixels, again.pixels)
    # Bring the student's pixels back to colours: the teacher's answers on them are close to its own.
    low, spread = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.5, 0.5])
    colours = batch.pixels * spread[:, None, None] + low[:, None, None]
    resized = torch.nn.functional.interpolate(colours, size=64, mode="bicubic", antialias=True)
    own = (resized - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[
        :, None, None
    ]
    assert isinstance(batch.teacher_features, torch.Tensor)
    similar = torch.nn.functional.cosine_similarity(
        teacher.encode_image(own), batch.teacher_features
    )
    assert similar.min() > 0.98


def test_views_come_around_and_are_computed_once(
    models: Models, photos: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = Teacher.encode_image
    monkeypatch.setattr(
        Teacher, "encode_image", lambda self, x: seen.append(len(x)) or encode(self, x)
    )
    run_distill(
        teacher, models, photos, config=replace(DISTILL, epochs=6, max_steps=None, holdout=0.0)
    )
    assert sum(seen) == 36 + 2 * 64  # a look at all pictures, then two views, each padded to 64
    seen.clear()
    run_distill(
        teacher, models, photos, config=replace(DISTILL, epochs=2, max_steps=None, holdout=0.0)
    )
    assert sum(seen) == 36 + 2 * 32  # every view once: in the steps themselves


def test_min_confidence_masks_rows(models: Models, teacher: Teacher) -> None:
    student = new_student(load_clip(models.student), teacher, DISTILL).train()
    pixels = torch.randn(8, 3, 48, 48)
    features = torch.nn.functional.normalize(torch.randn(8, 40), dim=-1)
    top = (teacher.logit_scale * features @ teacher.class_vectors.T).softmax(-1).amax(-1)
    threshold = float(top.sort().values[3:5].mean())
    step = DistillStep(student, teacher.logit_scale, replace(DISTILL, min_confidence=threshold))
    plain = DistillStep(student, teacher.logit_scale, DISTILL)
    masked, whole = (s(Batch(pixels, features))["kl"] for s in (step, plain))
    assert 0 < float(masked) < float(whole)


def test_stage1_runs_first_when_there_are_labels(
    models: Models, photos: Path, tmp_path: Path
) -> None:
    student = run_distill(
        models.teacher,
        models,
        photos,
        class_names=CLASSES,
        labelled=photos,
        teach_config=TEACH,
        output=tmp_path,
    )
    assert Teacher.load(tmp_path / "teacher").info.method == "promptsrc"
    assert student.info.teacher_fingerprint == Teacher.load(tmp_path / "teacher").fingerprint()
    assert not list(tmp_path.glob("**/checkpoint.safetensors"))


def test_split_beside_the_folder(models: Models, photos: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "images", per_class=6)
    names = sorted(
        str(p.relative_to(tmp_path / "images")) for p in (tmp_path / "images").glob("*/*")
    )
    train = [n for n in names if int(n.split("/")[1][:2]) < 4]
    split = {"train": train, "val": [], "test": sorted(set(names) - set(train))}
    split |= {"base": ["red thing", "blue thing"], "novel": ["green thing"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    student = run_distill(
        models.teacher,
        models,
        tmp_path / "images",
        class_names=CLASSES,
        labelled=tmp_path / "images",
        teach_config=replace(TEACH, max_steps=2),
    )
    assert student.info.summary["num_images"] + student.info.summary["num_holdout"] == 12
    found = student.evaluate(tmp_path / "images")
    assert found.num_images == 6
    assert found.novel == 100.0  # a single novel class
    assert found.harmonic_mean is not None
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "split.json").rename(elsewhere)
    assert student.evaluate(tmp_path / "images", split=elsewhere).num_images == 18


def test_a_student_worse_than_its_own_zero_shot_has_failed(
    models: Models, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Teacher and student are the same model, so zero-shot agrees fully and one step can only hurt."""
    names = [f"{a} {b}" for a in ("old", "new", "big") for b in ("cat", "dog", "sea", "car", "hut")]
    config = replace(DISTILL, max_steps=1, holdout=0.4)
    student = promptkd.distill(
        photos,
        names,
        teacher=models.student,
        student=models.student,
        config=config,
        teach_config=TeachConfig(templates=DISTILL.templates),
    )
    assert student.info.summary["zero_shot_agreement"] == 100.0
    assert student.info.summary["failed"] is True
    shown = capfd.readouterr().err
    assert "FAILED: the student agrees with its teacher less" in shown
    assert "sees none of" in shown


def test_no_text_tower_is_kept_while_the_student_trains(models: Models, photos: Path) -> None:
    """Not the student's and not a zero-shot teacher's: on a GPU they are hundreds of megabytes."""

    def towers() -> set[int]:
        gc.collect()
        return {id(item) for item in gc.get_objects() if issubclass(type(item), TextTower)}

    before = towers()
    kept: list[int] = []

    def count(epoch: int, student: Student) -> None:
        kept.append(len(towers() - before))

    run_distill(models.teacher, models, photos, class_names=CLASSES, on_epoch=count)
    assert kept
    assert not any(kept)


# --- interruption


class Stop(Progress):
    """Interrupts a run at a step, as Ctrl-C does."""

    def __init__(self, at: int) -> None:
        super().__init__(quiet=True)
        self.at = at

    def due(self, done: int, num_steps: int) -> bool:
        self.interrupt(done)
        return super().due(done, num_steps)

    def update(self, done: int, values: Mapping[str, float]) -> None:
        self.interrupt(done)
        super().update(done, values)

    def interrupt(self, done: int) -> None:
        if done == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 5, 11])
def test_interrupted_distilling_ends_in_the_same_student(
    models: Models, photos: Path, teacher: Teacher, tmp_path: Path, at: int
) -> None:
    teacher.save(tmp_path / "teacher")
    config = replace(DISTILL, epochs=3)
    whole = run_distill(tmp_path / "teacher", models, photos, output=tmp_path / "a", config=config)
    with pytest.raises(KeyboardInterrupt):
        run_distill(
            tmp_path / "teacher",
            models,
            photos,
            output=tmp_path / "b",
            config=config,
            progress=Stop(at),
        )
    resumed = run_distill(
        tmp_path / "teacher", models, photos, output=tmp_path / "b", config=config, resume=True
    )
    assert same(trained(resumed), trained(whole))
    for name in ("student.safetensors", "student.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "b" / "distill_log.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps))
    again = run_distill(
        tmp_path / "teacher", models, photos, output=tmp_path / "b", config=config, resume=True
    )
    assert same(trained(again), trained(whole))


@pytest.mark.parametrize("at", [2, 4])
def test_interrupted_teaching_averages_the_same(
    models: Models, photos: Path, tmp_path: Path, at: int
) -> None:
    def run(folder: str, **changes: Any) -> Teacher:
        keywords = {"config": replace(TEACH, shots=6), "progress": QUIET} | changes
        return promptkd.teach(
            photos, CLASSES, model=models.teacher, output=tmp_path / folder, **keywords
        )

    whole = run("a")
    with pytest.raises(KeyboardInterrupt):
        run("b", progress=Stop(at))
    resumed = run("b", resume=True)
    assert resumed.fingerprint() == whole.fingerprint()
    assert run("b", resume=True).fingerprint() == whole.fingerprint()


KILL = """
import sys, promptkd
from promptkd.stages.progress import Progress
photos, teacher, student, output = sys.argv[1:]
config = promptkd.DistillConfig(epochs=400, min_steps=0, batch_size=8, views=2, checkpoint_minutes=0.002)
promptkd.distill(photos, teacher=teacher, student=student, output=output, resume=True,
    config=config, progress=Progress(quiet=True))
"""


@pytest.mark.long
def test_killed_distilling_ends_in_the_same_student(
    models: Models, photos: Path, teacher: Teacher, tmp_path: Path
) -> None:
    teacher.save(tmp_path / "teacher")
    command = [sys.executable, "-c", KILL, str(photos), str(tmp_path / "teacher"), models.student]
    subprocess.run([*command, str(tmp_path / "a")], check=True)
    kills = 0
    for wait in (9, 12, 14, 16, 18):
        process = subprocess.Popen([*command, str(tmp_path / "b")])
        time.sleep(wait)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    subprocess.run([*command, str(tmp_path / "b")], check=True)
    assert kills > 0
    for name in ("student.safetensors", "student.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# --- what goes wrong


def test_diverging_loss_stops_with_the_last_good_checkpoint(
    models: Models, photos: Path, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptkd.stages.run._EPOCH_CHECKPOINT_SECONDS", 0.0)
    call = DistillStep.__call__
    steps: list[int] = []

    def poisoned(self: DistillStep, batch: Batch) -> dict[str, torch.Tensor]:
        steps.append(1)
        losses = call(self, batch)
        return {**losses, "loss": losses["loss"] * float("nan")} if len(steps) == 10 else losses

    monkeypatch.setattr(DistillStep, "__call__", poisoned)
    config = replace(DISTILL, epochs=4)
    with pytest.raises(
        TrainingError, match="the loss is nan at step 10; the last good checkpoint is in"
    ):
        run_distill(teacher, models, photos, output=tmp_path, config=config)
    assert (tmp_path / "checkpoint.safetensors").is_file()
    monkeypatch.setattr(DistillStep, "__call__", call)
    assert (
        run_distill(
            teacher, models, photos, output=tmp_path, config=config, resume=True
        ).info.summary["steps"]
        == 12
    )


def test_growing_loss_counts_as_diverged() -> None:
    from promptkd.stages.run import Run, _Watch

    watch = _Watch(Run(None, "distill", {}, resume=False))
    for step in range(119):
        watch.check(torch.tensor(1.0 if step < 100 else 50.0), step)
    with pytest.raises(TrainingError, match="the loss has diverged, from 1 to"):
        watch.check(torch.tensor(50.0), 119)


def test_output_folders_are_not_mixed_up(
    models: Models, photos: Path, teacher: Teacher, tmp_path: Path
) -> None:
    run_distill(teacher, models, photos, output=tmp_path)
    with pytest.raises(CheckpointError, match="already holds this run"):
        run_distill(teacher, models, photos, output=tmp_path)
    with pytest.raises(CheckpointError, match="holds another run: its config is"):
        run_distill(
            teacher, models, photos, output=tmp_path, resume=True, config=replace(DISTILL, lr=0.1)
        )
    other = promptkd.teach(
        None,
        ["a", "b"],
        model=models.teacher,
        progress=QUIET,
        config=replace(TEACH, method="zero-shot"),
    )
    with pytest.raises(CheckpointError, match="its teacher is"):
        run_distill(other, models, photos, output=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="already holds something else"):
        promptkd.teach(
            photos, CLASSES, model=models.teacher, output=tmp_path, config=TEACH, progress=QUIET
        )


def one_picture(folder: Path) -> Path:
    folder.mkdir()
    Image.new("RGB", (50, 50)).save(folder / "one.png")
    return folder


@pytest.mark.parametrize(
    ("images", "names", "message"),
    [
        (lambda p: p / "nowhere", CLASSES, "neither a folder of pictures, a file that lists them"),
        (lambda p: (p / "empty").mkdir() or p / "empty", CLASSES, "no pictures in"),
        (lambda p: one_picture(p / "one"), CLASSES, "at least two pictures"),
        (lambda p: [p / "a.jpg"], CLASSES, "is in the list but is no file"),
        (lambda p: 3, CLASSES, "tar shards, a dataset or a list of paths, not int"),
        (None, ("cat", "dog", "cat"), "stands twice"),
        (None, ("cat", " "), "class name 2 of 2 is empty"),
        (None, None, "give class_names"),
    ],
)
def test_bad_pictures_and_names(
    models: Models,
    photos: Path,
    tmp_path: Path,
    images: Callable[[Path], Any] | None,
    names: Any,
    message: str,
) -> None:
    source = photos if images is None else images(tmp_path)
    with pytest.raises(DataError, match=message):
        run_distill(models.teacher, models, source, class_names=names)


def test_prompts_of_the_wrong_shape(teacher: Teacher, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = teacher.save(tmp_path / "t")
    stored = load_file(folder / "teacher.safetensors")
    for change in (
        {"vision_prompts.0": torch.zeros(4, 7)},
        {"vision_prompts.9": torch.zeros(4, 48)},
    ):
        save_file({**stored, **change}, folder / "teacher.safetensors")
        with pytest.raises(CheckpointError, match=r"don't fit|lacks the tensor"):
            Teacher.load(folder)


def test_names_beside_a_teacher_that_brings_its_own(
    models: Models, photos: Path, teacher: Teacher
) -> None:
    with pytest.raises(DataError, match="brings its class names"):
        run_distill(teacher, models, photos, class_names=CLASSES)
    with pytest.raises(DataError, match="needs no labelled pictures"):
        run_distill(teacher, models, photos, labelled=photos)


def test_label_that_is_no_class_name(models: Models, photos: Path) -> None:
    with pytest.raises(DataError, match="not among the 2 class names: 'red_thing'"):
        promptkd.teach(
            photos,
            ["green thing", "blue thing"],
            model=models.teacher,
            config=TEACH,
            progress=QUIET,
        )


def test_unknown_models_fail_before_any_work(models: Models, photos: Path) -> None:
    with pytest.raises(ModelError, match="did you mean"):
        promptkd.distill(
            photos,
            CLASSES,
            teacher=models.teacher,
            student="ViT-B16/openai",
            config=DISTILL,
            progress=QUIET,
        )


def test_a_few_unreadable_pictures_are_left_out_and_named(
    models: Models, photos: Path, teacher: Teacher, tmp_path: Path
) -> None:
    folder = make_photos(tmp_path / "photos")
    (folder / "red_thing" / "00.png").write_bytes(b"broken")
    student = run_distill(teacher, models, folder, config=replace(DISTILL, holdout=0.0))
    assert [m for m in student.info.summary["unreadable"] if "00.png" in m]
    for path in folder.glob("*/0*"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="pictures can't be read, more than"):
        run_distill(teacher, models, folder)
    for path in folder.glob("*/*"):
        path.write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"\.(png|jpg)"):
        run_distill(teacher, models, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"lr": 0.0},
        {"temperature": 0.0},
        {"crop_scale": (0.5, 1.5)},
        {"precision": "fp8"},
        {"holdout": 0.7},
        {"templates": ("no braces",)},
    ],
)
def test_configs_are_checked_when_made(change: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=f"DistillConfig: {next(iter(change))}|DistillConfig: every template"
    ):
        DistillConfig(**change)


def test_paper_settings() -> None:
    config = DistillConfig.paper("dtd")
    assert (config.optimizer, config.schedule, config.lr, config.batch_size) == (
        "sgd",
        "paper",
        0.005,
        8,
    )
    assert config.kd_weight == pytest.approx(200 / 47)
    assert DistillConfig.paper("eurosat").kd_weight == pytest.approx(100)
    assert DistillConfig.paper("dtd", protocol="cross-dataset").prompt_depth == 3
    rates = [config.learning_rate(step, 10, 200) for step in (0, 9, 10, 199)]
    assert rates[:3] == [1e-5, 1e-5, 0.005]
    assert rates[3] == pytest.approx(
        0.005 * (1 + torch.cos(torch.tensor(18 * torch.pi / 20)).item()) / 2
    )
    assert TeachConfig.paper("cross-dataset").gpa_std == 10


def test_an_epoch_is_a_permutation() -> None:
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))
    assert epoch_order(50, 1, 2) != epoch_order(50, 1, 3) != epoch_order(50, 2, 3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_prompts(
    models: Models, photos: Path, teacher: Teacher, precision: str
) -> None:
    student = run_distill(
        teacher, models, photos, config=replace(DISTILL, precision=precision, max_steps=4)
    )
    assert {p.dtype for p in student.trainable_parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in student.trainable_parameters())
    assert student.vision.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def test_environment_has_no_hidden_state(models: Models, photos: Path, teacher: Teacher) -> None:
    """The global random state neither matters nor changes."""
    torch.manual_seed(1)
    first = run_distill(teacher, models, photos)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    second = run_distill(teacher, models, photos)
    assert same(trained(first), trained(second))
    torch.manual_seed(1)
    run_distill(teacher, models, photos)
    assert torch.equal(torch.get_rng_state(), state)
