"""The teacher: a large CLIP, its prompts, and the class vectors computed once from its text side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from promptkd.class_names import check_class_names, names_from_json, texts_as_json
from promptkd.class_vectors import TextSide, unit
from promptkd.clip import Clip, Preprocess, hash_tensors, load_clip
from promptkd.errors import CheckpointError, ModelError
from promptkd.files import TEACHER, read_folder, write_folder
from promptkd.prompts import DeepPrompts, stacked_prompts

PROMPT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """What made the class vectors: method, templates, class names; and how training went."""

    method: str
    template: str
    templates: tuple[str, ...]
    class_names: tuple[str, ...]
    summary: dict[str, Any]


class Teacher(nn.Module):
    """A prompted CLIP with stored class vectors; always in eval mode.

    Attributes:
        class_names: C names.
        class_vectors: (C, D) float, unit rows: text features of the names.
        logit_scale: exp of the learned log scale.
    """

    class_vectors: Tensor

    def __init__(
        self,
        clip: Clip,
        info: TeacherInfo,
        class_vectors: Tensor,
        vision_prompts: DeepPrompts | None = None,
        text_prompts: DeepPrompts | None = None,
    ) -> None:
        super().__init__()
        if class_vectors.shape != (len(info.class_names), clip.vision.output_dim):
            raise CheckpointError(
                f"{tuple(class_vectors.shape)} class vectors for {len(info.class_names)} class names "
                f"and a teacher of width {clip.vision.output_dim}"
            )
        self.clip = clip
        self.info = info
        self.vision = clip.vision
        self.vision_prompts = vision_prompts
        self.text_prompts = text_prompts
        self.register_buffer("class_vectors", class_vectors.detach())
        self.requires_grad_(False).eval()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The C names, in the order of the class vectors."""
        return self.info.class_names

    @property
    def logit_scale(self) -> float:
        """exp of the learned log scale."""
        return self.clip.logit_scale

    @property
    def preprocess(self) -> Preprocess:
        """How the image tower wants its pixels."""
        return self.clip.preprocess

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Encode normalised images (B, 3, H, W) to unit features (B, D) in float32 (or float64)."""
        prompts = self.vision_prompts() if self.vision_prompts is not None else None
        return unit(self.vision(images, prompts))

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) → logits (B, C) = scale · cos(features, class vectors)."""
        logits: Tensor = self.logit_scale * self.encode_image(images) @ self.class_vectors.T
        return logits

    def text_side(self) -> TextSide:
        """What made the class vectors; enough, with the text tower, to make those of other names."""
        info = self.info
        return TextSide.of(self.clip, info.template, info.templates, self.text_prompts)

    def without_text(self) -> Teacher:
        """The same teacher without its text tower: its class vectors are computed already."""
        return Teacher(
            self.clip.without_text(),
            self.info,
            self.class_vectors,
            self.vision_prompts,
            self.text_prompts,
        )

    def fingerprint(self) -> str:
        """Digest of all that the teacher's logits depend on."""
        return hash_tensors(
            {}, f"{self._class_vectors_hash()}|{self.image_fingerprint()}|{self.logit_scale}"
        )

    def image_fingerprint(self) -> str:
        """Digest of what the image features depend on: tower, vision prompts, preprocessing."""
        prompts = self.vision_prompts.state_dict() if self.vision_prompts is not None else {}
        key = f"{self.clip.image_hash}|{self.preprocess}|{self.vision.dtype}"
        return hash_tensors(prompts, key)

    def _class_vectors_hash(self) -> str:
        """Digest of the class vectors and of the weights, prompts, names and templates behind them."""
        prompts = self.text_prompts.state_dict() if self.text_prompts is not None else {}
        info = self.info
        texts = texts_as_json(info.class_names)
        made_by = (
            self.clip.text_hash,
            info.method,
            info.template,
            info.templates,
            info.class_names,
            *([texts] if texts else []),
        )
        return hash_tensors({**prompts, "class_vectors": self.class_vectors.float()}, repr(made_by))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a teacher folder: prompts and class vectors (safetensors), the rest as JSON."""
        tensors = {"class_vectors": self.class_vectors}
        for side in ("vision", "text"):
            prompts: DeepPrompts | None = getattr(self, f"{side}_prompts")
            if prompts is not None:
                tensors |= {f"{side}_prompts.{i}": t for i, t in enumerate(prompts())}
        data = {
            "kind": TEACHER,
            "model": self.clip.name,
            "image_hash": self.clip.image_hash,
            "text_hash": self.clip.text_hash,
            "class_vectors_hash": self._class_vectors_hash(),
            **asdict(self.info),
            "class_names": [str(name) for name in self.class_names],
            "class_texts": texts_as_json(self.class_names),
        }
        return write_folder(path, "teacher", tensors, data)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: Any = None,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        text: bool = False,
    ) -> Teacher:
        """Open a teacher folder.

        Args:
            path: the folder.
            model: the CLIP, when it is not to be found under its stored name.
            precision: how the frozen weights are stored.
            device: where the teacher goes.
            text: also load the text tower (needed to compute vectors for other names).

        Raises:
            CheckpointError: no teacher folder, damaged, of another model, or class vectors that
                were made by other weights, prompts, names or templates than the folder's.
        """
        tensors, data = read_folder(path, "teacher", TEACHER)
        clip = load_clip(
            model if model is not None else data["model"],
            precision=precision,
            device=device,
            text=text,
        )
        if clip.image_hash != data["image_hash"] or clip.text_hash != data["text_hash"]:
            raise CheckpointError(
                f"'{path}' was tuned on '{data['model']}' with weights {data['image_hash'][:8]}…, but "
                f"'{clip.name}' has {clip.image_hash[:8]}…; load it with the model it was tuned on"
            )
        info = TeacherInfo(
            data["method"],
            data["template"],
            tuple(data["templates"]),
            names_from_json(data),
            data["summary"],
        )
        teacher = cls(
            clip,
            info,
            tensors["class_vectors"],
            stacked_prompts(
                tensors, "vision_prompts", clip.vision.width, clip.vision.num_layers, path
            ),
            stacked_prompts(tensors, "text_prompts", None, None, path),
        ).to(device)
        if teacher._class_vectors_hash() != data["class_vectors_hash"]:
            raise CheckpointError(
                f"the class vectors in '{path}' were made by other weights, prompts, class names or "
                "templates than the folder names; make the teacher again with 'promptkd teach'"
            )
        return teacher


def zero_shot_teacher(clip: Clip, class_names: Sequence[str], templates: Sequence[str]) -> Teacher:
    """A teacher without training: class vectors are the ensemble over templates."""
    names = check_class_names(class_names)
    for template in templates:
        if template.count("{}") != 1:
            raise ModelError(f"the template '{template}' must hold '{{}}' once")
    vectors = TextSide.of(clip, "", templates, None).compute(clip, names)
    info = TeacherInfo("zero-shot", "", tuple(templates), names, {})
    return Teacher(clip, info, vectors)
