"""Stage 2: distil a teacher into a small student on unlabelled pictures (PromptKD, CVPR 2024).

    L = kd_weight · T² · KL(softmax(z_t / T) || softmax(z_s / T)), averaged over the batch

z_t, z_s: logits of teacher and student against the same class vectors. The student's vision
prompts and projector train, nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from promptkd.benchmarks import paper
from promptkd.class_names import check_class_names, identity_of
from promptkd.clip import Clip, load_clip
from promptkd.data.sources import ImageList, unlabelled
from promptkd.data.sources import labelled as labels_of
from promptkd.errors import DataError, TrainingError
from promptkd.loss import TeacherLogits, TeacherStatistics, kd_loss
from promptkd.prompts import DeepPrompts
from promptkd.ranks import ALONE, Ranks, join, pick_device
from promptkd.stages.cached import CachedTeacher, Wanted, teacher_from_cache
from promptkd.stages.encoder import Encoder
from promptkd.stages.holdout import Holdout, describe_teacher, split_holdout
from promptkd.stages.progress import Progress
from promptkd.stages.run import Run, TrainConfig, Training
from promptkd.stages.teach import TeachConfig, teach
from promptkd.stages.views import Batch, ViewBatches
from promptkd.student import Projector, Student, StudentInfo
from promptkd.teacher import Teacher, zero_shot_teacher

_EVALUATIONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig(TrainConfig):
    """Stage 2. The defaults are our own recipe, good for a folder of any size."""

    epochs: int = 20
    """Passes over the pictures."""
    min_steps: int = 5000
    """Go on for at least so many steps, whatever `epochs` says (a small folder needs them)."""
    batch_size: int = 64
    """Pictures a step."""
    lr: float = 0.005
    """Peak learning rate."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """"sgd": momentum 0.9, no Nesterov; "adamw": the default betas."""
    schedule: Literal["paper", "cosine"] = "cosine"
    """"paper": by epochs, the first at 1e-5, then a cosine; "cosine": by steps, after a warm-up."""
    weight_decay: float = 0.01
    """On everything that trains."""
    warmup_steps: int = 100
    """Steps of linear warm-up ("cosine" only)."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Share of the picture that a training view covers."""
    temperature: float = 1.0
    """T; softens both sides."""
    kd_weight: float = 25.0
    """Factor of T²·KL averaged over the batch; does not depend on the number of classes."""
    views: int = 64
    """Views of a picture that the teacher sees; from then on they come around again, its answers
    kept in memory. 0: fresh views for ever, the teacher in every step."""
    min_confidence: float = 0.0
    """Pictures on which the teacher's highest probability is lower carry no loss."""
    holdout: float = 0.05
    """Share of the pictures kept aside to see whether it works."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        checks = [
            (self.temperature > 0, "temperature must be positive"),
            (self.kd_weight > 0, "kd_weight must be positive"),
            (self.views >= 0, "views must not be negative"),
            (0 <= self.min_confidence < 1, "min_confidence must lie in [0, 1)"),
            (0 <= self.holdout < 0.5, "holdout must lie in [0, 0.5)"),
        ]
        for good, message in checks:
            if not good:
                raise ValueError(f"DistillConfig: {message}")

    @classmethod
    def paper(
        cls,
        dataset: str,
        *,
        protocol: str = "base-to-novel",
        num_classes: int | None = None,
        **changes: Any,
    ) -> DistillConfig:
        """The paper's settings for a dataset, KD_WEIGHT/N resolved.

        The official loss is KD_WEIGHT · T² · ΣKL / (B·N), so on the batch mean the factor is
        KD_WEIGHT/N.

        Args:
            dataset: one of the paper's, for example "dtd".
            protocol: "base-to-novel", "cross-dataset" or "few-shot".
            num_classes: N, when it isn't the dataset's own.
            changes: fields to set otherwise.
        """
        entry = paper.find(dataset)
        recipe = entry.student(protocol)
        fields: dict[str, Any] = {
            "epochs": recipe.epochs,
            "min_steps": 0,
            "batch_size": recipe.batch_size,
            "lr": recipe.lr,
            "optimizer": "sgd",
            "schedule": "paper",
            "weight_decay": 5e-4,
            "warmup_steps": 0,
            "num_prompts": recipe.num_prompts,
            "prompt_depth": recipe.prompt_depth,
            "crop_scale": (0.08, 1.0),
            "temperature": recipe.temperature,
            "kd_weight": recipe.weight_per_row(num_classes or entry.num_classes),
            "views": 0,
            "holdout": 0.0,
        }
        return cls(**{**fields, **changes})


class DistillStep:
    """The loss of a batch; holds the class vectors less their mean, which changes no softmax.

    Each rank encodes its own rows; projector and loss see those of all.
    """

    def __init__(
        self,
        student: Student,
        teacher_scale: float,
        config: DistillConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        self.student, self.config, self.teacher_scale = student, config, teacher_scale
        self._ranks, self._encode = ranks, Encoder(student.vision, config)
        vectors = student.class_vectors
        self.class_vectors = vectors - vectors.mean(dim=0, keepdim=True)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": kd_weight·T²·KL, "kl": T²·KL}, batch means; {} for fewer than two rows."""
        counts = self._ranks.counts(len(batch.pixels))
        if sum(counts) < 2:
            return {}  # BatchNorm can't learn from one
        raw = self._encode(batch.pixels, self.student.prompts())
        teacher = _gather(self._ranks, batch.teacher_features, counts)
        rows = kd_loss(
            self.student.projector(self._ranks.gather(raw, counts)),
            teacher,
            self.class_vectors,
            student_scale=self.student.logit_scale,
            teacher_scale=self.teacher_scale if isinstance(teacher, Tensor) else None,
            temperature=self.config.temperature,
            reduction="none",
        )
        if self.config.min_confidence > 0:
            rows = rows * self._confident(teacher)
        kl = rows.mean()
        return {"loss": self.config.kd_weight * kl, "kl": kl.detach()}

    def _confident(self, teacher: Tensor | TeacherStatistics | TeacherLogits) -> Tensor:
        if isinstance(teacher, TeacherStatistics):
            raise TrainingError("min_confidence needs the teacher's features, not its statistics")
        if isinstance(teacher, TeacherLogits):
            logits = teacher.logits
        else:
            logits = self.teacher_scale * teacher @ self.class_vectors.T
        return (logits.softmax(dim=-1).amax(dim=-1) >= self.config.min_confidence).float()


def _gather(
    ranks: Ranks, answers: Tensor | TeacherStatistics | TeacherLogits, counts: Sequence[int]
) -> Tensor | TeacherStatistics | TeacherLogits:
    if isinstance(answers, TeacherStatistics):
        return TeacherStatistics(ranks.gather(answers.mu, counts), ranks.gather(answers.h, counts))
    if isinstance(answers, TeacherLogits):
        return TeacherLogits(ranks.gather(answers.logits, counts))
    return ranks.gather(answers, counts)


def new_student(
    clip: Clip, teacher: Teacher | CachedTeacher, config: DistillConfig, *, orient: bool = True
) -> Student:
    """An untrained student: random prompts and projector from the seed, the teacher's vectors."""
    clip.need_prompts("a student")
    generator = torch.Generator().manual_seed(config.seed)
    depth = min(config.prompt_depth, clip.vision.num_layers)
    prompts = DeepPrompts.random(config.num_prompts, clip.vision.width, depth, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        projector = Projector(clip.vision.output_dim, teacher.class_vectors.shape[1])
    wide = config.compute_dtype
    info = StudentInfo(
        class_names=teacher.class_names,
        teacher=teacher.clip.name,
        teacher_fingerprint=teacher.fingerprint(),
        orient=orient,
    )
    vectors = teacher.class_vectors.to(wide)
    side = teacher.text_side()
    return Student(clip, prompts.to(wide), projector.to(wide), vectors, info, side).to(clip.device)


def distill(
    images: Any,
    class_names: Sequence[str] | None = None,
    *,
    teacher: Any = "ViT-L-14/openai",
    student: Any = "ViT-B-16/openai",
    labelled: Any = None,
    validation: Any = None,
    cache: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    config: DistillConfig | None = None,
    teach_config: TeachConfig | None = None,
    orient: bool = True,
    progress: Progress | None = None,
    on_epoch: Callable[[int, Student], None] | None = None,
) -> Student:
    """Stage 2: make a student from a teacher and unlabelled pictures.

    Under torchrun every rank calls this and gets the student; a batch's pictures are divided among
    them, and the first one alone prints and writes.

    Args:
        images: in any form of `promptkd.data.sources.unlabelled`: a folder (with a split.json its
            `train` part), a list file, a list of paths, tar shards, a dataset.
        class_names: what to tell apart; not together with a teacher that brings its own.
        teacher: a model name (zero-shot: template ensemble), a teacher folder, or a `Teacher`.
        student: the small CLIP, in any form that `promptkd.clip.load_clip` takes.
        labelled: a few labelled pictures: run stage 1 on `teacher` (a model name) first.
        cache: folder of a teacher cache, built if absent; its views are used, and the teacher is
            not loaded.
        validation: labelled pictures to fit the probabilities' temperature on; default: the
            teacher's probabilities of the pictures kept aside.
        output: folder for the student, checkpoints and log (stage 1 goes to `output`/teacher).
        resume: go on with the run in `output`.
        device: default: the GPU if there is one.
        config: see `DistillConfig`.
        teach_config: settings of stage 1, and the templates of a zero-shot teacher.
        orient: apply the EXIF orientation of the pictures; off to reproduce the paper's datasets.
        progress: where to report; default: a bar or lines on stderr.
        on_epoch: called after every epoch with its number, from 1, and the student in eval mode.

    Returns:
        The student in eval mode; `student.info.summary` tells how it went.

    Raises:
        DataError: no pictures, a single one, no or repeated class names, names beside a teacher
            that brings its own.
        ModelError: an unknown or unsuitable model.
        CheckpointError: `output` holds another run, or a damaged checkpoint; `cache` was built by
            another teacher or from other pictures.
        TrainingError: the loss diverged; the last good checkpoint is kept.
    """
    config = config or DistillConfig()
    place = pick_device(device)
    ranks = join(place)
    progress = progress or Progress() if ranks.is_first else Progress(quiet=True)
    pictures = unlabelled(images)
    if len(pictures) < 2:
        raise DataError("distilling needs at least two pictures (BatchNorm can't learn from one)")
    folder = Path(output).expanduser() if output is not None else None

    def load() -> Teacher:
        return _the_teacher(
            teacher,
            class_names,
            labelled,
            folder,
            resume,
            place,
            config,
            teach_config,
            orient,
            progress,
        )

    guide: Teacher | CachedTeacher
    if cache is None:
        guide = load()
    else:
        templates = teach_config.templates if teach_config is not None else config.templates
        guide = teacher_from_cache(
            cache,
            Wanted(teacher, class_names, labelled, templates, load),
            pictures,
            config,
            num_views=views_to_cache(config, len(pictures)),
            orient=orient,
            device=place,
            say=progress.say,
            ranks=ranks,
        )
    clip = load_clip(student, precision=config.precision, device=place, text="optional")
    clip.need_prompts("a student")
    identity = {
        "config": config.identity(),
        "teacher": guide.fingerprint(),
        "student": clip.image_hash,
        "class_names": identity_of(guide.class_names),
        "images": pictures.digest(),
        "orient": orient,
        "cache": guide.cache.manifest.recipe.fingerprint()
        if isinstance(guide, CachedTeacher)
        else None,
    }
    checked = None if validation is None else labels_of(validation, guide.class_names, part="val")
    run = Run(folder, "distill", identity, resume=resume, ranks=ranks)
    if resume and folder is not None and run.has("student.json"):
        return Student.load(folder, backbone=student, precision=config.precision, device=place)
    pupil = new_student(clip, guide, config, orient=orient)
    del clip  # only the student holds its text tower now, and lets go of it when training starts
    if isinstance(guide, Teacher):
        guide = guide.without_text()
    _train(pupil, guide, pictures, config, run, progress, orient, on_epoch)
    if checked is not None:
        pupil.calibrate(checked)
    if folder is not None and ranks.is_first:
        pupil.save(folder)
    run.finish()
    return pupil


def views_to_cache(config: DistillConfig, num_images: int) -> int:
    """As many views as epochs, at most `config.views`."""
    num_train = len(split_holdout(num_images, config.holdout, config.seed)[0])
    per_epoch = max(1, num_train // config.batch_size)
    num_epochs = -(-config.num_steps(per_epoch) // per_epoch)
    return min(num_epochs, config.views or num_epochs)


def _the_teacher(
    teacher: Any,
    class_names: Sequence[str] | None,
    labelled: Any,
    folder: Path | None,
    resume: bool,
    place: torch.device,
    config: DistillConfig,
    teach_config: TeachConfig | None,
    orient: bool,
    progress: Progress,
) -> Teacher:
    """The teacher asked for: given, opened, tuned, or zero-shot."""
    is_folder = (
        isinstance(teacher, str | os.PathLike) and (Path(teacher) / "teacher.json").is_file()
    )
    if isinstance(teacher, Teacher) or is_folder:
        if labelled is not None:
            raise DataError(
                "a finished teacher needs no labelled pictures; give a model name to tune one"
            )
        if class_names is not None:
            raise DataError("this teacher brings its class names; leave class_names out")
        if isinstance(teacher, Teacher):
            return teacher.to(place)
        return Teacher.load(teacher, precision=config.precision, device=place)
    stage1 = replace(teach_config or TeachConfig(), precision=config.precision)
    if labelled is not None:
        return teach(
            labelled,
            class_names,
            model=teacher,
            output=None if folder is None else folder / "teacher",
            resume=resume,
            device=place,
            config=stage1,
            orient=orient,
            progress=progress,
        )
    if class_names is None:
        raise DataError(
            "give class_names: what the pictures may show (a teacher folder or Teacher brings its own)"
        )
    names = check_class_names(class_names)
    templates = teach_config.templates if teach_config is not None else config.templates
    return zero_shot_teacher(
        load_clip(teacher, precision=config.precision, device=place), names, templates
    )


def _train(
    student: Student,
    teacher: Teacher | CachedTeacher,
    pictures: ImageList,
    config: DistillConfig,
    run: Run,
    progress: Progress,
    orient: bool,
    on_epoch: Callable[[int, Student], None] | None,
) -> None:
    """Train the student in place and write down how it went."""
    ranks = run.ranks
    train_rows, held_rows = split_holdout(len(pictures), config.holdout, config.seed)
    images = pictures.select(train_rows)
    progress.say(
        f"stage 2: {len(images)} pictures to learn from, {len(held_rows)} kept aside, "
        f"{len(student.class_names)} classes; kd_weight {config.kd_weight:g} on the batch mean "
        f"(the paper's KD_WEIGHT {config.kd_weight * len(student.class_names):g})"
    )
    report = describe_teacher(teacher, pictures, orient=orient, progress=progress, ranks=ranks)
    held = pictures.select(held_rows)
    holdout = Holdout(teacher, student, held, config.temperature, orient=orient, ranks=ranks)
    before = holdout.measure(student)
    zero_shot = holdout.zero_shot_agreement(config.templates)
    student.clip = student.clip.without_text()
    batches = ViewBatches(
        images,
        student,
        teacher,
        config,
        orient=orient,
        progress=progress,
        within=pictures,
        ranks=ranks,
    )
    step = DistillStep(student, teacher.logit_scale, config, ranks)
    num_steps = config.num_steps(batches.steps_per_epoch)
    every = max(1, num_steps // _EVALUATIONS)

    def measure(done: int) -> dict[str, float] | None:
        return holdout.measure(student) if done % every == 0 or done == num_steps else None

    def look(epoch: int) -> None:
        if on_epoch is not None:
            student.eval()
            on_epoch(epoch, student)
            student.train()

    training = Training(
        config=config,
        parameters=student.trainable_parameters(),
        modules={"prompts": student.prompts, "projector": student.projector},
        batches=batches,
        step=step,
        run=run,
        progress=progress,
        partial=list(student.prompts.parameters()),
        on_step=measure,
        on_epoch=look,
    )
    student.train()
    steps = training.execute()
    student.eval()
    student.with_summary(
        steps=steps,
        num_images=len(images),
        num_holdout=len(held_rows),
        zero_shot_agreement=zero_shot,
        before=before,
        after=holdout.measure(student),
        history=training.history,
        teacher_report=report,
        unreadable=sorted({m for found in ranks.objects(batches.failures) for m in found.values()}),
        config=asdict(config),
    )
    holdout.verdict(student, progress)
    holdout.calibrate(student, progress)
