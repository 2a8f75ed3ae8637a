"""The teacher as the cache keeps it: class vectors, names, scale, and what it was made of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from promptkd import _rust
from promptkd.class_names import names_from_json, texts_as_json
from promptkd.class_vectors import TextSide
from promptkd.clip import PRECISIONS, hash_tensors
from promptkd.errors import CheckpointError
from promptkd.files import temporary_for
from promptkd.prompts import DeepPrompts
from promptkd.teacher import Teacher

FILE = "teacher.safetensors"


@dataclass(frozen=True, slots=True)
class StoredTeacher:
    """All of a teacher but its towers.

    Attributes:
        class_names: C names.
        class_vectors: (C, D).
        logit_scale: exp of the learned log scale.
        fingerprint: `Teacher.fingerprint()`.
        model: name of the CLIP.
        model_files: digest of the CLIP's files where the name is that of a folder or file.
        image_hash: digest of the image tower's weights.
        prompts: digest of the vision prompts.
        precision: how the frozen weights were stored.
        method, templates: how the class vectors were made.
        text_side: what made them; None in caches that are older than this entry.
    """

    class_names: tuple[str, ...]
    class_vectors: Tensor = field(repr=False)
    logit_scale: float
    fingerprint: str
    model: str
    model_files: str
    image_hash: str
    prompts: str
    precision: str
    method: str
    templates: tuple[str, ...]
    text_side: TextSide | None = None

    @classmethod
    def of(cls, teacher: Teacher) -> StoredTeacher:
        """What is to be kept of a loaded teacher."""
        return cls(
            class_names=tuple(teacher.class_names),
            class_vectors=teacher.class_vectors.detach().cpu(),
            logit_scale=teacher.logit_scale,
            fingerprint=teacher.fingerprint(),
            model=teacher.clip.name,
            model_files=digest_of_files(teacher.clip.name),
            image_hash=teacher.clip.image_hash,
            prompts=digest_of_prompts(teacher.vision_prompts),
            precision=next(k for k, v in PRECISIONS.items() if v == teacher.vision.dtype),
            method=teacher.info.method,
            templates=tuple(teacher.info.templates),
            text_side=teacher.text_side(),
        )

    def save(self, folder: Path) -> None:
        """Write teacher.safetensors, all of it or nothing."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "class_vectors"}
        data["class_texts"] = texts_as_json(self.class_names)
        side = self.text_side
        data["text_side"] = None if side is None else side.as_json()
        tensors = {"class_vectors": self.class_vectors} | ({} if side is None else side.tensors())
        entries = [_entry(name, tensor) for name, tensor in tensors.items()]
        path = folder / FILE
        try:
            metadata = [("teacher", json.dumps(data, sort_keys=True))]
            _rust.write_shard(path, temporary_for(path), metadata, entries)
        except OSError as error:
            raise CheckpointError(f"the cache can't be written: {error}") from error

    @classmethod
    def load(cls, folder: Path) -> StoredTeacher:
        """Read teacher.safetensors.

        Raises:
            CheckpointError: missing or damaged.
        """
        path = folder / FILE
        try:
            damage = _rust.verify_shard(path)
            if damage:
                raise ValueError(f"'{path}': it is damaged: {damage[0]}")
            with safe_open(path, "pt") as file:
                data: dict[str, Any] = json.loads(file.metadata()["teacher"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            vectors = tensors["class_vectors"]
            side = data.get("text_side")
            text_side = None if side is None else TextSide.read(side, tensors, path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{error}; give the teacher to 'promptkd cache build' again: it writes this file "
                "and no shard that is there"
            ) from error
        names = names_from_json(data)
        data.pop("class_texts", None)
        lists = {"class_names": names, "templates": tuple(data["templates"])}
        return cls(**{**data, **lists, "class_vectors": vectors, "text_side": text_side})


def _entry(name: str, tensor: Tensor) -> tuple[str, str, list[int], NDArray[np.uint8]]:
    """A tensor as `write_shard` takes it, in float32 (float64 stays)."""
    wide = tensor.dtype == torch.float64
    values = tensor.detach().to(torch.float64 if wide else torch.float32).contiguous()
    raw = values.view(torch.uint8).reshape(-1).numpy()
    return name, "F64" if wide else "F32", list(values.shape), raw


def digest_of_prompts(prompts: DeepPrompts | None) -> str:
    """Digest of vision prompts; empty without any."""
    return "" if prompts is None else hash_tensors(prompts.state_dict())


def digest_of_files(model: str) -> str:
    """Digest of the files that a model's name stands for; empty where it names no local files."""
    place = Path(model.removeprefix("local-dir:")).expanduser()
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    if not all(p.is_file() for p in files):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
