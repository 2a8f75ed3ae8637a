"""Checkpoints of the official code: PromptSRC teachers and PromptKD students in Dassl's format.

A Dassl file (`model-best.pth.tar`, `model.pth.tar-20`) is a pickle that holds live objects, a
scheduler with its optimiser, so `torch.load(weights_only=True)` refuses every real one and plain
unpickling would run whatever the file says.  `torchfile` reads it without running anything.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from promptkd.errors import CheckpointError
from promptkd.torchfile import TensorRef, TorchFile

_TRAINED = re.compile(r"VPT|prompt_learner\.(ctx|token_suffix)|logit_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class OfficialCheckpoint:
    """The trained parts of an official checkpoint, in float32 on the CPU.

    Attributes:
        kind: "teacher" (PromptSRC: has text prompts) or "student" (PromptKD: has a projector).
        vision_prompts: one (P, width) tensor for each of the first `vision_depth` layers.
        text_prompts: the same for the text side, the context vectors first; empty in a student.
        projector: "linear1.weight" (D, Ds), "linear1.bias", "norm.weight", "norm.bias",
            "norm.running_mean", "norm.running_var", "norm.num_batches_tracked" (int64),
            "linear2.weight" (D, D), "linear2.bias"; empty in a teacher.
        logit_scale: log of the logit scale as stored, or None.
        num_classes: classes that the text side was built for, or None; a student file has no
            class vectors and no class names.
        dtype: what the prompts were stored in.
        epoch: epochs done when it was saved.
        val_result: the accuracy (per cent) it was chosen by, or None; the official code
            measures it on test pictures.
    """

    kind: Literal["teacher", "student"]
    vision_prompts: tuple[Tensor, ...]
    text_prompts: tuple[Tensor, ...]
    projector: Mapping[str, Tensor]
    logit_scale: float | None
    num_classes: int | None
    dtype: torch.dtype
    epoch: int | None
    val_result: float | None

    @property
    def vision_depth(self) -> int:
        """Number of prompted layers of the image tower."""
        return len(self.vision_prompts)

    @property
    def text_depth(self) -> int:
        """Number of prompted layers of the text tower."""
        return len(self.text_prompts)


class DasslCheckpoint(NamedTuple):
    """What a Dassl file holds, live objects left out.

    Attributes:
        state_dict: every tensor of the model by its name, as stored; "module." taken off.
        epoch: epochs done, or None.
        val_result: as stored, or None.
        placeholders: full names of the classes that were replaced by inert placeholders.
    """

    state_dict: dict[str, Tensor]
    epoch: int | None
    val_result: float | None
    placeholders: tuple[str, ...]


def load(path: str | os.PathLike[str]) -> OfficialCheckpoint:
    """Read the trained parts of a PromptSRC teacher or a PromptKD student.

    The prompt depth is that of the file: layers 0 to d-1 as far as it has prompts for them.

    Raises:
        CheckpointError: no such file, another format, a pickle that asks for more than tensors
            and plain data, or tensors that are not what the two methods save.
    """
    checkpoint = read_checkpoint(path, only=_TRAINED)
    state, where = checkpoint.state_dict, f"'{path}'"
    vision = _prompts(state, "image_encoder.VPT", "image_encoder.transformer", where)
    text = _prompts(state, "prompt_learner.ctx", "text_encoder.transformer", where)
    projector = _projector(state, where)
    if not text and not projector:
        raise CheckpointError(
            f"{where} is neither a PromptSRC teacher (no 'prompt_learner.ctx') nor a PromptKD "
            f"student (no 'VPT_image_trans'); it holds {_some(read_checkpoint(path).state_dict)}"
        )
    if projector and not vision:
        raise CheckpointError(f"{where} has a projector but no prompts 'image_encoder.VPT'")
    first = vision[0] if vision else text[0]
    scale = state.get("logit_scale")
    suffixes = (f"prompt_learner.token_suffix{n}" for n in ("", "2"))
    rows = [int(state[key].shape[0]) for key in suffixes if key in state]
    result = OfficialCheckpoint(
        kind="student" if projector else "teacher",
        vision_prompts=tuple(t.float() for t in vision),
        text_prompts=tuple(t.float() for t in text),
        projector=projector,
        logit_scale=float(scale) if scale is not None and scale.numel() == 1 else None,
        num_classes=rows[0] if len(rows) == 1 else None,
        dtype=first.dtype,
        epoch=checkpoint.epoch,
        val_result=checkpoint.val_result,
    )
    everything = (*result.vision_prompts, *result.text_prompts, *projector.values())
    if not all(bool(torch.isfinite(t).all()) for t in everything):
        raise CheckpointError(f"{where} has prompts or projector weights that are not finite")
    return result


def read_checkpoint(
    path: str | os.PathLike[str], *, only: re.Pattern[str] | None = None
) -> DasslCheckpoint:
    """Read any Dassl checkpoint: its tensors, and what is plain data beside them.

    Args:
        path: the file.
        only: leave out tensors in whose name this is not found; a teacher's file is 1.7 GB.

    Raises:
        CheckpointError: as `load`.
    """
    where = f"'{path}'"
    with TorchFile(Path(path).expanduser()) as archive:
        content, placeholders = archive.unpickle()
        if not isinstance(content, dict) or not isinstance(dict.get(content, "state_dict"), dict):
            raise CheckpointError(f"{where} is no Dassl checkpoint: it has no 'state_dict'")
        state: dict[str, Tensor] = {}
        for key, value in dict.items(dict.__getitem__(content, "state_dict")):
            if not isinstance(key, str) or not isinstance(value, TensorRef):
                raise CheckpointError(f"{where} state_dict[{key!r}] is no tensor")
            if only is None or only.search(key):
                state[key.removeprefix("module.")] = archive.tensor(key, value)
    epoch, val = dict.get(content, "epoch"), dict.get(content, "val_result")
    return DasslCheckpoint(
        state,
        epoch if isinstance(epoch, int) else None,
        float(val) if isinstance(val, int | float) and math.isfinite(val) else None,
        placeholders,
    )


# ---------------------------------------------------------------- the two methods' key names
def _prompts(state: dict[str, Tensor], first: str, tower: str, where: str) -> list[Tensor]:
    """Prompts of layers 0 to d-1: `first`, then `tower`.resblocks.i.VPT_shallow, i = 1 to d-1."""
    pattern = re.compile(re.escape(tower) + r"\.resblocks\.(\d+)\.VPT_shallow")
    found = {int(m[1]): state[key] for key in state if (m := pattern.fullmatch(key))}
    if first in state:
        found[0] = state[first]
    if sorted(found) != list(range(len(found))):
        missing = min(set(range(max(found))) - set(found))
        raise CheckpointError(f"{where} has prompts of {tower} in layer {max(found)}, but none in "
                              f"layer {missing}")  # fmt: skip
    layers = [found[i] for i in range(len(found))]
    for i, tensor in enumerate(layers):
        if tensor.ndim != 2 or tensor.shape != layers[0].shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{where} has prompts of {tower} of shape {tuple(tensor.shape)} in layer {i}; "
                f"one (prompts, width) matrix a layer is expected"
            )
    return layers


_PROJECTOR = {
    "conv1.0.weight": "linear1.weight",
    "conv1.0.bias": "linear1.bias",
    "conv1.1.weight": "norm.weight",
    "conv1.1.bias": "norm.bias",
    "conv1.1.running_mean": "norm.running_mean",
    "conv1.1.running_var": "norm.running_var",
    "conv1.1.num_batches_tracked": "norm.num_batches_tracked",
    "conv1.3.weight": "linear2.weight",
    "conv1.3.bias": "linear2.bias",
}


def _projector(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The projector under the names of `promptkd.student.Projector`; 1x1 kernels as matrices."""
    prefix = "VPT_image_trans."
    held = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not held:
        return {}
    odd = sorted(set(held) ^ set(_PROJECTOR))
    if odd:
        raise CheckpointError(
            f"{where} has another projector than PromptKD's two layers: '{prefix}{odd[0]}' is "
            + ("missing" if odd[0] in _PROJECTOR else "not of it")
        )
    projector = {}
    for key, name in _PROJECTOR.items():
        tensor = held[key]
        if name.startswith("linear") and name.endswith("weight"):
            tensor = tensor.flatten(1)
        projector[name] = tensor.float() if tensor.is_floating_point() else tensor.long()
    wide, narrow = projector["linear1.weight"].shape
    expected = {"linear1.weight": (wide, narrow), "linear2.weight": (wide, wide)}
    for name, tensor in projector.items():
        shape = () if name.endswith("tracked") else expected.get(name, (wide,))
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{where} projector {name} is {tuple(tensor.shape)}, not {shape}")
    return projector


def _some(state: dict[str, Tensor]) -> str:
    keys = sorted(state)
    return ", ".join(f"'{k}'" for k in keys[:3]) + (", …" if len(keys) > 3 else "") or "nothing"
