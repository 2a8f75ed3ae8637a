"""Class vectors from the text side of a CLIP, and what is needed to make more of them later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from promptkd.class_names import plain_name, texts_of
from promptkd.clip import Clip, hash_tensors, load_clip
from promptkd.errors import CheckpointError, ModelError
from promptkd.prompts import (
    DeepPrompts,
    PromptedNames,
    mean_by_class,
    stacked_prompts,
    tokenize_whole,
)

_TEXT_CHUNK = 256
_TENSORS = "text_prompts"


def unit(features: Tensor) -> Tensor:
    """Rows of unit length, in float32 (float64 stays)."""
    wide = _wide(features)
    normed: Tensor = wide / wide.norm(dim=-1, keepdim=True)
    return normed


@torch.no_grad()
def prompted_class_vectors(
    clip: Clip, class_names: Sequence[str], template: str, prompts: DeepPrompts
) -> Tensor:
    """Class vectors (C, D), unit rows, of names behind learned text prompts."""
    tower = clip.need_prompted_text("compute class vectors behind text prompts")
    names = PromptedNames(class_names, template, prompts.num_prompts, clip.tokenize)
    chunks = names.tokens.split(_TEXT_CHUNK)
    raw = torch.cat([_wide(tower(tower.cut(c).to(clip.device), prompts())) for c in chunks])
    return unit(mean_by_class(raw, names.counts))


@torch.no_grad()
def ensemble_features(clip: Clip, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Mean over templates of raw (not normalised) text features, (C, D), as PromptSRC's t0.

    Of a name with texts of its own: the mean over its templates, or the general ones if it has
    none, and its descriptions.
    """
    if not templates:
        raise ModelError("zero-shot class vectors need at least one template")
    own = [row for row, name in enumerate(class_names) if texts_of(name) is not None]
    plain = [row for row, name in enumerate(class_names) if texts_of(name) is None]
    parts = []
    if plain or not own:
        names = [plain_name(class_names[row]) for row in plain]
        total = _raw_features(clip, [templates[0].format(name) for name in names])
        for template in templates[1:]:
            total = total + _raw_features(clip, [template.format(name) for name in names])
        parts.append(total / len(templates))
    if own:
        parts.append(_features_of_texts(clip, [class_names[row] for row in own], templates))
    order = torch.tensor([*plain, *own]).argsort()
    return torch.cat(parts)[order.to(clip.device)] if own else parts[0]


def _features_of_texts(clip: Clip, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    sentences = []
    for name in names:
        own, descriptions = texts_of(name) or ((), ())
        named = [t.format(plain_name(name)) for t in own or templates]
        sentences.append([*named, *descriptions])
    raw = _raw_features(clip, [text for texts in sentences for text in texts], names)
    return mean_by_class(raw, torch.tensor([len(texts) for texts in sentences]))


def _raw_features(clip: Clip, sentences: Sequence[str], names: Sequence[str] = ()) -> Tensor:
    """Text features (S, D), not normalised; of `names` with texts no sentence may be cut short."""
    tower = clip.need_text("compute class vectors")
    chunks = tokenize_whole(clip.tokenize, sentences, names).split(_TEXT_CHUNK)
    return torch.cat([_wide(tower(tower.cut(c).to(clip.device))) for c in chunks])


def _wide(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


@dataclass(frozen=True, slots=True, eq=False)
class TextSide:
    """What made a teacher's class vectors, but for the text tower, which is named.

    Attributes:
        model: name of the CLIP whose text tower it is.
        text_hash: digest of the text tower's weights.
        template: the sentence whose words the prompts replace; empty without prompts.
        templates: of the zero-shot ensemble.
        prompts: (P, width) for every prompted layer of the text tower; none for zero-shot.
    """

    model: str
    text_hash: str
    template: str
    templates: tuple[str, ...]
    prompts: tuple[Tensor, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, clip: Clip, template: str, templates: Sequence[str], prompts: Any) -> TextSide:
        """The text side of a loaded CLIP with its prompts (`DeepPrompts`, or None for zero-shot)."""
        tensors = () if prompts is None else tuple(t.detach().cpu().clone() for t in prompts())
        return cls(clip.name, clip.text_hash, template, tuple(templates), tensors)

    @classmethod
    def read(cls, data: Mapping[str, Any], tensors: dict[str, Tensor], path: Any) -> TextSide:
        """From a teacher's or student's folder: its JSON entries and tensors."""
        prompts = stacked_prompts(tensors, _TENSORS, None, None, path)
        found = () if prompts is None else tuple(t.detach() for t in prompts())
        templates = tuple(data["templates"])
        return cls(data["model"], data["text_hash"], data["template"], templates, found)

    def as_json(self) -> dict[str, Any]:
        """All but the prompts."""
        return {
            "model": self.model,
            "text_hash": self.text_hash,
            "template": self.template,
            "templates": list(self.templates),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The prompts, named as in a folder."""
        return {f"{_TENSORS}.{i}": t for i, t in enumerate(self.prompts)}

    def fingerprint(self) -> str:
        """Digest of all that the vector of a name depends on."""
        made_by = (self.text_hash, self.template if self.prompts else self.templates)
        return hash_tensors(self.tensors(), repr(made_by))

    def compute(self, clip: Clip, class_names: Sequence[str]) -> Tensor:
        """Class vectors (C, D), unit rows, by a loaded CLIP's text tower."""
        if self.prompts:
            prompts = DeepPrompts(self.prompts).to(clip.device)
            return prompted_class_vectors(clip, class_names, self.template, prompts)
        return F.normalize(ensemble_features(clip, class_names, self.templates), dim=-1)

    def load_clip(self, model: Any = None, *, device: torch.device | str = "cpu") -> Clip:
        """The CLIP with its text tower, by its stored name or as `model` says.

        Raises:
            ModelError: it is not to be found; the message says what to pass.
            CheckpointError: its text tower has other weights.
        """
        try:
            clip = load_clip(self.model if model is None else model, device=device)
        except (ModelError, CheckpointError) as error:
            if model is not None:
                raise
            raise ModelError(
                f"new class names need the text tower of '{self.model}', which is not to be had "
                "here; pass the teacher's folder or the place of that CLIP as teacher (--teacher): "
                f"{error}"
            ) from error
        if clip.text_hash != self.text_hash:
            raise CheckpointError(
                f"the class vectors were made by a text tower with weights {self.text_hash[:8]}…, "
                f"but '{clip.name}' has {clip.text_hash[:8]}…; pass the CLIP that the teacher was "
                f"tuned on, '{self.model}'"
            )
        return clip


def is_folder_of(kind: str, place: Any) -> bool:
    """Whether `place` is a folder that `promptkd` wrote a teacher or student to."""
    return isinstance(place, str | os.PathLike) and (Path(place) / f"{kind}.json").is_file()
