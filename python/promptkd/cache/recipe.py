"""What a teacher cache holds and what that depends on: its recipe, and the fingerprint of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch

from promptkd.clip import hash_tensors
from promptkd.data.loader import CropRecipe
from promptkd.teacher import Teacher

Content: TypeAlias = Literal["features", "statistics", "logits"]
CONTENTS: tuple[str, ...] = get_args(Content)

BATCH_ROWS = 64
"""Rows that the teacher sees at once, the last batch padded: answers then don't depend on how
the work was divided."""
DECODER = "libjpeg-turbo 3.1, resized as Pillow 12.1.1"

DTYPES: dict[str, tuple[str, torch.dtype]] = {
    "float16": ("F16", torch.float16),
    "float32": ("F32", torch.float32),
    "float64": ("F64", torch.float64),
}
"""Name in the recipe → name in safetensors, type in torch."""

_WORDS = {
    "content": "content",
    "dtype": "dtype",
    "teacher": "teacher's image side",
    "class_vectors": "teacher's class vectors",
    "logit_scale": "teacher's logit scale",
    "temperature": "temperature",
    "seed": "seed of the views",
    "scale": "crop_scale",
    "ratio": "crop ratio",
    "flip": "chance of a flip",
    "orient": "orient",
    "decoder": "decoder",
    "batch_rows": "batch size",
    "num_classes": "number of classes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that a row of the cache depends on, beside the picture and the number of the view.

    Attributes:
        content: "features", "statistics" or "logits".
        dtype: of features, μ and logits: "float16", "float32" or "float64".
        teacher: `Teacher.image_fingerprint()`.
        seed: of the views.
        scale, ratio, flip: `CropRecipe` of the views.
        orient: whether the EXIF orientation of pictures is applied.
        class_vectors, logit_scale, num_classes: statistics and logits only.
        temperature: statistics only.
    """

    content: Content
    dtype: str
    teacher: str
    seed: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    orient: bool
    decoder: str = DECODER
    batch_rows: int = BATCH_ROWS
    class_vectors: str | None = None
    logit_scale: float | None = None
    num_classes: int | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.content not in CONTENTS:
            raise ValueError(f"content must be one of {', '.join(CONTENTS)}, not '{self.content}'")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not '{self.dtype}'")

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        *,
        content: Content,
        dtype: str,
        seed: int,
        crop: CropRecipe,
        orient: bool,
        temperature: float,
    ) -> Recipe:
        """The recipe of a cache that `teacher` is to fill."""
        classes: dict[str, Any] = {}
        if content != "features":
            classes = {
                "class_vectors": vectors_hash(teacher.class_vectors),
                "logit_scale": teacher.logit_scale,
                "num_classes": len(teacher.class_names),
            }
        if content == "statistics":
            classes["temperature"] = float(temperature)
        return cls(
            content=content,
            dtype=dtype,
            teacher=teacher.image_fingerprint(),
            seed=seed,
            scale=crop.scale,
            ratio=crop.ratio,
            flip=crop.flip,
            orient=orient,
            **classes,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Rebuild from `as_json` gone through JSON."""
        pairs = {k: (float(data[k][0]), float(data[k][1])) for k in ("scale", "ratio")}
        return cls(**{**data, **pairs})

    def as_json(self) -> dict[str, Any]:
        """Everything that is set."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    @property
    def crop(self) -> CropRecipe:
        """Which boxes the views are."""
        return CropRecipe(self.scale, self.ratio, self.flip)

    def fingerprint(self) -> str:
        """32 hex digits over the recipe."""
        text = json.dumps(self.as_json(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def difference(self, other: Recipe) -> str | None:
        """What differs in `other`, in words: "its dtype is float16, not float32"; or None."""
        mine, theirs = self.as_json(), other.as_json()
        for key, word in _WORDS.items():
            if mine.get(key) != theirs.get(key):
                return f"its {word} is {_short(mine.get(key))}, not {_short(theirs.get(key))}"
        return None


def vectors_hash(vectors: torch.Tensor) -> str:
    """Digest of class vectors, as the loss sees them."""
    return hash_tensors({"class_vectors": vectors.float()})


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 32:
        return f"{value[:8]}…"
    return json.dumps(value) if not isinstance(value, str) else value
