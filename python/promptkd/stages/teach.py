"""Stage 1: tune the prompts of a large CLIP on a few labelled pictures (PromptSRC, ICCV 2023).

    L = CE + 25·mean|t - t0| + 10·mean|v - v0| + KL(zero-shot || prompted)

t, v: prompted text and image features; t0, v0: those of the frozen CLIP; all unit length. The
epoch-end prompts are averaged with Gaussian weights (GPA). Class vectors are computed once, after
the final prompts, for all class names.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from promptkd.class_names import check_class_names, identity_of, plain_name
from promptkd.class_vectors import ensemble_features, prompted_class_vectors, unit
from promptkd.clip import Clip, load_clip
from promptkd.data.loader import CropRecipe, ViewLoader, epoch_order, prefetch, split_batches
from promptkd.data.sources import ImageList, few_shot, find_split, labelled
from promptkd.errors import DataError
from promptkd.prompts import DeepPrompts, PromptedNames, mean_by_class
from promptkd.ranks import ALONE, Ranks, join, pick_device
from promptkd.stages.encoder import Encoder
from promptkd.stages.progress import Progress
from promptkd.stages.run import Run, TrainConfig, Training
from promptkd.teacher import (
    PROMPT_TEMPLATE,
    Teacher,
    TeacherInfo,
    zero_shot_teacher,
)
from promptkd.templates import IMAGENET_TEMPLATES_60


@dataclass(frozen=True, slots=True, kw_only=True)
class TeachConfig(TrainConfig):
    """Stage 1. The defaults are PromptSRC's for a ViT-L/14."""

    method: Literal["promptsrc", "zero-shot"] = "promptsrc"
    """"promptsrc" tunes prompts; "zero-shot" only averages the templates' text features."""
    shots: int = 16
    """Labelled pictures a class; 0 takes all."""
    templates: tuple[str, ...] = IMAGENET_TEMPLATES_60
    """Templates behind t0 (and behind zero-shot class vectors)."""
    template: str = PROMPT_TEMPLATE
    """The sentence whose words before "{}" the text prompts replace."""
    text_weight: float = 25.0
    """Weight of mean|t - t0|."""
    image_weight: float = 10.0
    """Weight of mean|v - v0|."""
    logit_weight: float = 1.0
    """Weight of the KL to the zero-shot logits."""
    gpa_mean: float = 15.0
    """Epoch at which the Gaussian average of prompts peaks."""
    gpa_std: float = 1.0
    """Its width in epochs."""
    classes_per_step: int = 0
    """Save memory and time with very many classes: each step's losses run over the batch's own
    classes and so many others, drawn anew. 0: over all classes."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if self.gpa_std <= 0 or self.shots < 0 or self.classes_per_step < 0:
            raise ValueError(
                "TeachConfig: gpa_std must be positive, shots and classes_per_step not negative"
            )

    @classmethod
    def paper(cls, protocol: str = "base-to-novel", **changes: Any) -> TeachConfig:
        """PromptSRC's settings for a ViT-L/14 teacher.

        Args:
            protocol: "base-to-novel", "cross-dataset" or "few-shot".
            changes: fields to set otherwise.
        """
        fields: dict[str, dict[str, Any]] = {
            "base-to-novel": {"epochs": 20, "gpa_mean": 15.0, "gpa_std": 1.0},
            "cross-dataset": {"epochs": 20, "gpa_mean": 6.0, "gpa_std": 10.0},
            "few-shot": {"epochs": 50, "gpa_mean": 30.0, "gpa_std": 30.0},
        }
        if protocol not in fields:
            raise ValueError(f"unknown protocol '{protocol}'; choose from {', '.join(fields)}")
        return cls(**{**fields[protocol], **changes})


def gpa_weights(mean: float, std: float, epochs: int) -> list[float]:
    """w_e ∝ exp(-((e - mean)/std)²/2), e = 1..epochs, summing to 1."""
    raw = [math.exp(-0.5 * ((e - mean) / std) ** 2) for e in range(1, epochs + 1)]
    total = math.fsum(raw)
    if total == 0:  # every epoch lies too far out: all weight on the nearest
        nearest = min(range(epochs), key=lambda e: abs(e + 1 - mean))
        return [float(e == nearest) for e in range(epochs)]
    return [w / total for w in raw]


class PromptAverage(nn.Module):
    """Gaussian prompt averaging: the weighted sum of epoch-end prompts, kept in checkpoints."""

    def __init__(self, prompts: Sequence[nn.Parameter], weights: Sequence[float]) -> None:
        super().__init__()
        self._prompts = prompts
        self._weights = weights
        for index, prompt in enumerate(prompts):
            self.register_buffer(f"sum{index}", torch.zeros_like(prompt.data))

    @torch.no_grad()
    def add(self, epoch: int) -> None:
        """Add the prompts as they are at the end of an epoch (from 1)."""
        weight = self._weights[epoch - 1] if epoch <= len(self._weights) else 0.0
        for prompt, total in zip(self._prompts, self.buffers(), strict=True):
            total += weight * prompt

    @torch.no_grad()
    def install(self) -> None:
        """Put the averages in the prompts' place."""
        for prompt, total in zip(self._prompts, self.buffers(), strict=True):
            prompt.copy_(total)


class PromptSRC(nn.Module):
    """The trained prompts and the losses of stage 1 over the classes that have labels.

    Each rank encodes its own pictures and a share of the class names; the losses see all of them.
    """

    def __init__(
        self,
        clip: Clip,
        class_names: Sequence[str],
        config: TeachConfig,
        *,
        generator: torch.Generator | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.clip, self.config, self._ranks = clip, config, ranks
        self._encode = Encoder(clip.vision, config)
        clip.need_prompts("tuned as a teacher")
        tower = clip.need_prompted_text("tune a teacher")
        generator = generator or torch.Generator().manual_seed(config.seed)
        names = PromptedNames(class_names, config.template, config.num_prompts, clip.tokenize)
        self.tokens = tower.cut(names.tokens).to(clip.device)
        self._counts = names.counts  # of rows a class, None where each has one
        depth = min(config.prompt_depth, clip.vision.num_layers)
        text_depth = min(config.prompt_depth, tower.num_layers)
        wide = torch.float64 if tower.dtype == torch.float64 else torch.float32
        vision = DeepPrompts.random(config.num_prompts, clip.vision.width, depth, generator)
        later = DeepPrompts.random(config.num_prompts, tower.width, text_depth - 1, generator)
        context = tower.token_embedding(names.context.to(clip.device)).detach().cpu().to(wide)
        self.vision_prompts = vision.to(wide).to(clip.device)
        self.text_prompts = DeepPrompts([context, *later()]).to(wide).to(clip.device)
        fixed = shared_rows(
            ranks, class_names, lambda mine: ensemble_features(clip, mine, config.templates)
        )
        self.fixed_text = fixed / fixed.norm(dim=-1, keepdim=True)

    def prompts(self) -> list[nn.Parameter]:
        """All that stage 1 trains."""
        return [*self.vision_prompts.parameters(), *self.text_prompts.parameters()]

    def losses(
        self, pixels: Tensor, labels: Tensor, classes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Weighted loss terms of a batch; {} where none of its pictures could be read.

        Args:
            pixels: (B, 3, H, W), normalised: this rank's rows, perhaps none.
            labels: (B,), their classes.
            classes: (K,), sorted: the only classes that the losses run over, labels among them.
        """
        config, scale, ranks = self.config, self.clip.logit_scale, self._ranks
        counts = ranks.counts(len(pixels))
        if sum(counts) == 0:
            return {}
        labels, fixed_text = ranks.gather(labels, counts), self.fixed_text
        if classes is not None:
            labels, fixed_text = torch.searchsorted(classes, labels), fixed_text[classes]
        text = unit(self._class_features(classes))
        image = unit(ranks.gather(self._encode(pixels, self.vision_prompts()), counts))
        with torch.no_grad():
            frozen = unit(ranks.gather(self._encode(pixels, ()), counts))
            zero_shot = F.log_softmax(scale * frozen @ fixed_text.T, dim=1)
        logits = scale * image @ text.T
        prompted = F.log_softmax(logits, dim=1)
        terms = {
            "ce": F.cross_entropy(logits, labels),
            "scl_text": config.text_weight * (text - fixed_text).abs().mean(),
            "scl_image": config.image_weight * (image - frozen).abs().mean(),
            "scl_logits": config.logit_weight
            * F.kl_div(prompted, zero_shot, reduction="sum", log_target=True)
            / logits.numel(),
        }
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def _class_features(self, classes: Tensor | None) -> Tensor:
        """Raw text features of the classes (all by default), the mean over a class's sentences."""
        tokens, counts = self.tokens, self._counts
        if classes is not None and counts is None:
            tokens = tokens[classes]
        elif classes is not None and counts is not None:
            parts = tokens.split(counts.tolist())
            tokens = torch.cat([parts[label] for label in classes.tolist()])
            counts = counts[classes.cpu()]
        return mean_by_class(self._text(tokens), counts)

    def _text(self, tokens: Tensor) -> Tensor:
        """Raw text features of token rows, each rank encoding its share of them."""
        tower = self.clip.need_text("tune a teacher")

        def encode(mine: Tensor) -> Tensor:
            raw: Tensor = tower(mine, self.text_prompts())
            return raw.to(self.config.compute_dtype)

        return shared_rows(self._ranks, tokens, encode)


def shared_rows(ranks: Ranks, items: Any, compute: Callable[[Any], Tensor]) -> Tensor:
    """`compute` of items, a row each, divided among the ranks; at least one item."""
    counts = [len(ranks.share(len(items), rank)) for rank in range(ranks.size)]
    # A rank without any computes the first one, to know the shape, and hands on none of it.
    rows = compute(ranks.cut(items) if counts[ranks.rank] else items[:1])
    return ranks.gather(rows[: counts[ranks.rank]], counts)


@dataclass(frozen=True, slots=True)
class _FewShotBatches:
    """Seeded views of the few-shot pictures with their labels; each rank has its share of a batch."""

    loader: ViewLoader
    labels: Tensor
    clip: Clip
    config: TeachConfig
    ranks: Ranks

    @property
    def steps_per_epoch(self) -> int:
        return len(split_batches(range(len(self.labels)), self.config.batch_size))

    def batches(
        self, epoch: int, first: int
    ) -> Iterator[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]]:
        order = epoch_order(len(self.labels), self.config.seed, epoch)
        rows = split_batches(order, self.config.batch_size)[first:]
        self.loader.failures.join(self.ranks.objects(self.loader.failures.reasons))
        device, dtype = self.clip.device, self.config.compute_dtype
        work = [(self.ranks.cut(r), epoch) for r in rows]
        for number, ((pixels,), kept) in enumerate(prefetch(self.loader.load, work)):
            images = self.clip.preprocess.normalize(pixels.to(device), dtype)
            labels = self.labels[list(kept)].to(device)
            if self.config.classes_per_step:
                yield images, labels, self._classes(rows[number], epoch, first + number).to(device)
            else:
                yield images, labels

    def _classes(self, rows: Sequence[int], epoch: int, number: int) -> Tensor:
        """The classes of a whole batch and `classes_per_step` others, sorted."""
        present = self.labels[list(rows)].unique()
        seed = (self.config.seed * 1_000_003 + epoch) * 1_000_003 + number
        generator = torch.Generator().manual_seed(seed % 2**63)
        every = torch.randperm(int(self.labels.max()) + 1, generator=generator)
        others = every[~torch.isin(every, present)][: self.config.classes_per_step]
        return torch.cat([present, others]).sort().values


def teach(
    labelled_images: Any,
    class_names: Sequence[str] | None = None,
    *,
    model: Any = "ViT-L-14/openai",
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    config: TeachConfig | None = None,
    orient: bool = True,
    progress: Progress | None = None,
) -> Teacher:
    """Stage 1: make a teacher from a large CLIP and a few labelled pictures.

    Under torchrun every rank calls this and gets the teacher; pictures and class names are divided
    among them, and the first one alone prints and writes.

    Args:
        labelled_images: in any form of `promptkd.data.sources.labelled`: a folder with one
            sub-folder a class, a list file, (path, class name) pairs, tar shards, a dataset; with
            a split.json its `train` part, of the base classes where it names them. None for
            `method="zero-shot"`.
        class_names: all C names that the teacher is to know; the losses run over those that have
            labels. Default: the names found.
        model: the CLIP, in any form that `promptkd.clip.load_clip` takes.
        output: folder for the teacher, checkpoints and log.
        resume: go on with the run in `output`.
        device: default: the GPU if there is one.
        config: see `TeachConfig`.
        orient: apply the EXIF orientation of the pictures.
        progress: where to report; default: a bar or lines on stderr.

    Raises:
        DataError: no labelled pictures, labels that are not among the names, repeated names.
        ModelError: an unknown or unsuitable model.
        CheckpointError: `output` holds another run.
        TrainingError: the loss diverged.
    """
    config = config or TeachConfig()
    place = pick_device(device)
    ranks = join(place)
    progress = progress or Progress() if ranks.is_first else Progress(quiet=True)
    images = None
    if config.method == "promptsrc":
        images = _few_shot_images(labelled_images, class_names, config)
        class_names = images.class_names if class_names is None else class_names
    if not class_names:
        raise DataError("a zero-shot teacher needs class names")
    names = check_class_names(class_names)
    clip = load_clip(model, precision=config.precision, device=place)
    folder = Path(output).expanduser() if output is not None else None
    identity = {
        "config": config.identity(),
        "model": [clip.image_hash, clip.text_hash],
        "class_names": identity_of(names),
        "images": images.digest() if images is not None else "",
        "orient": orient,
    }
    run = Run(folder, "teach", identity, resume=resume, ranks=ranks)
    if resume and folder is not None and run.has("teacher.json"):
        return Teacher.load(
            folder, model=model, precision=config.precision, device=place, text=True
        )
    if images is None:
        teacher = zero_shot_teacher(clip, names, config.templates)
    else:
        teacher = _tune(clip, images, names, config, run, progress, orient)
    if folder is not None and ranks.is_first:
        teacher.save(folder)
    run.finish()
    return teacher.to(place)


def _few_shot_images(
    source: Any, class_names: Sequence[str] | None, config: TeachConfig
) -> ImageList:
    """The labelled pictures that stage 1 sees."""
    if source is None:
        raise DataError("stage 1 needs labelled pictures; or use method='zero-shot'")
    names = None if class_names is None else check_class_names(class_names)
    images = labelled(source, names, part="train")
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        split = find_split(Path(source))
        if split is not None and split.base:
            assert images.labels is not None
            assert images.class_names is not None
            base = {plain_name(name) for name in split.base}
            is_base = [plain_name(images.class_names[y]) in base for y in images.labels]
            images = images.select([row for row, keep in enumerate(is_base) if keep])
    return few_shot(images, config.shots, config.seed)


def _tune(
    clip: Clip,
    images: ImageList,
    names: Sequence[str],
    config: TeachConfig,
    run: Run,
    progress: Progress,
    orient: bool,
) -> Teacher:
    assert images.labels is not None
    assert images.class_names == tuple(names)
    if len(images) < 2:
        raise DataError("stage 1 needs at least two labelled pictures")
    present = sorted(set(images.labels.tolist()))
    row_of = {label: row for row, label in enumerate(present)}
    labels = torch.tensor([row_of[label] for label in images.labels.tolist()])
    ranks, known = run.ranks, [names[label] for label in present]
    model = PromptSRC(clip, known, config, ranks=ranks)
    progress.say(
        f"stage 1: {len(images)} labelled pictures of {len(present)} classes "
        f"({len(names)} names), {sum(p.numel() for p in model.prompts()):,} trained values"
    )
    crop = CropRecipe(scale=config.crop_scale)
    loader = ViewLoader(images, [clip.preprocess], crop, seed=config.seed, orient=orient)
    batches = _FewShotBatches(loader, labels, clip, config, ranks)
    epochs = math.ceil(config.num_steps(batches.steps_per_epoch) / batches.steps_per_epoch)
    average = PromptAverage(model.prompts(), gpa_weights(config.gpa_mean, config.gpa_std, epochs))
    training = Training(
        config=config,
        parameters=model.prompts(),
        modules={"vision": model.vision_prompts, "text": model.text_prompts, "gpa": average},
        batches=batches,
        step=lambda batch: model.losses(*batch),
        run=run,
        progress=progress,
        partial=model.prompts(),
        on_epoch=average.add,
    )
    steps = training.execute()
    if steps % batches.steps_per_epoch == 0:
        average.install()
    failed = {m for found in ranks.objects(loader.failures.reasons) for m in found.values()}
    return finish_teacher(model, names, {"steps": steps, "failed": sorted(failed)}, ranks)


def finish_teacher(
    model: PromptSRC, names: Sequence[str], summary: dict[str, Any], ranks: Ranks = ALONE
) -> Teacher:
    """Compute the class vectors of all names, once, with the final prompts."""
    config, clip, prompts = model.config, model.clip, model.text_prompts

    def compute(mine: Sequence[str]) -> Tensor:
        return prompted_class_vectors(clip, mine, config.template, prompts)

    vectors = shared_rows(ranks, names, compute)
    info = TeacherInfo(
        config.method, config.template, tuple(config.templates), tuple(names), summary
    )
    return Teacher(model.clip, info, vectors, model.vision_prompts, model.text_prompts)
