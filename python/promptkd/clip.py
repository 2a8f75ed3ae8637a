"""Loading CLIP models: names, files, objects.

`load_clip` turns a model name, a weights file or an open_clip model into a `Clip`: a private,
frozen copy of the image tower, optionally the text tower, and everything that belongs to the
weights (activation, preprocessing, tokenizer, logit scale, fingerprints).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from promptkd.errors import ModelError
from promptkd.loading import Loaded, from_object, load_error, open_clip_package, quiet, resolve
from promptkd.prompts import Tokenize, context_start
from promptkd.text_tower import TextTower
from promptkd.towers import CAN_TAKE_PROMPTS, VisionTower

PRECISIONS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


Interpolation: TypeAlias = Literal["bicubic", "bilinear"]
ResizeMode: TypeAlias = Literal["shortest", "longest", "squash"]


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How a tower wants its pixels: size (height, width), mean, std, resize mode, interpolation."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    fill: int = 0

    @classmethod
    def from_open_clip(cls, cfg: Mapping[str, Any]) -> Preprocess:
        """Read open_clip's `preprocess_cfg`; sizes given as one number are square."""
        size = cfg.get("size", 224)
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        return cls(
            size=(height, width),
            mean=_three(cfg["mean"]),
            std=_three(cfg["std"]),
            interpolation=_one_of(Interpolation, cfg.get("interpolation") or "bicubic"),
            resize_mode=_one_of(ResizeMode, cfg.get("resize_mode") or "shortest"),
            fill=int(cfg.get("fill_color") or 0),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocess:
        """Rebuild from `asdict` gone through JSON."""
        return cls(
            size=(int(data["size"][0]), int(data["size"][1])),
            mean=_three(data["mean"]),
            std=_three(data["std"]),
            interpolation=_one_of(Interpolation, data["interpolation"]),
            resize_mode=_one_of(ResizeMode, data["resize_mode"]),
            fill=int(data["fill"]),
        )

    def normalize(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Turn uint8 pixels (B, H, W, 3) into normalised (B, 3, H, W) of `dtype`.

        The arithmetic is float32 (float64 for float64) whatever the result's type.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mean = torch.tensor(self.mean, dtype=wide, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, dtype=wide, device=pixels.device)[:, None, None]
        planes = pixels.permute(0, 3, 1, 2).contiguous().to(wide)
        return planes.div_(255).sub_(mean).div_(std).to(dtype)


def _one_of(choices: Any, value: Any) -> Any:
    """`value`, if it is one of a Literal's; open_clip's "random" interpolation is bicubic here."""
    if value == "random" and choices is Interpolation:
        return "bicubic"
    if value not in get_args(choices):
        raise ModelError(
            f"preprocessing '{value}' is unknown; known: {', '.join(get_args(choices))}"
        )
    return value


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return red, green, blue


@dataclass(frozen=True, slots=True)
class Clip:
    """A loaded CLIP: frozen towers and what belongs to its weights."""

    name: str
    vision: VisionTower
    text: TextTower | None
    preprocess: Preprocess
    logit_scale: float
    """exp of the learned log scale."""
    image_hash: str
    text_hash: str
    model_cfg: dict[str, Any] = field(repr=False)
    """open_clip's model configuration, enough to build the architecture again."""
    tokenize: Tokenize = field(repr=False)

    @property
    def device(self) -> torch.device:
        """Where the towers live."""
        return next(chain(self.vision.parameters(), self.vision.buffers())).device

    def to(self, device: torch.device | str) -> Clip:
        """Move the towers, in place."""
        self.vision.to(device)
        if self.text is not None:
            self.text.to(device)
        return self

    def without_text(self) -> Clip:
        """The same model without its text tower, whose memory is free once nobody else holds it."""
        return replace(self, text=None)

    def need_text(self, purpose: str) -> TextTower:
        """The text tower, or an error that says what for."""
        if self.text is None:
            raise ModelError(f"{self.name} was loaded without its text tower, needed to {purpose}")
        return self.text

    def need_prompted_text(self, purpose: str) -> TextTower:
        """The text tower, if it takes prompts, or an error that says what for."""
        tower = self.need_text(purpose)
        if tower.refusal:
            raise ModelError(
                f"'{self.name}' can't {purpose}: {tower.refusal}, so that it takes no prompts; "
                "it can be a zero-shot teacher"
            )
        return tower

    def need_prompts(self, role: str) -> None:
        """Raise a `ModelError` where the image tower takes no deep prompts."""
        if self.vision.refusal:
            raise ModelError(
                f"'{self.name}' can't be {role}: {self.vision.refusal}, so that it takes no deep "
                f"prompts, but it can be a zero-shot teacher; these take prompts: "
                f"{CAN_TAKE_PROMPTS} ('promptkd models' lists them all)"
            )


def load_clip(
    model: str | Path | nn.Module,
    *,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    text: bool | Literal["optional"] = True,
) -> Clip:
    """Load a CLIP model by name, from a file, or from an open_clip model object.

    Args:
        model: "architecture/pretrained tag" ("ViT-L-14/openai"), "architecture/path to weights",
            "hf-hub:org/repo", "local-dir:folder", a folder in open_clip's layout, a path to an
            OpenAI .pt, a safetensors or an open_clip checkpoint, or an open_clip model.
        precision: "fp32", "bf16", "fp16" (how frozen weights are stored) or "fp64".
        device: where the towers go.
        text: also keep the text tower; "optional": if its tokenizer is to be had.

    Raises:
        ModelError: unknown architecture or tag (near names are suggested), weights or a tokenizer
            that are not cached and can't be downloaded, a package that is missing.
        CheckpointError: weights that are damaged or don't fit the architecture.
    """
    if precision not in PRECISIONS:
        raise ModelError(f"unknown precision '{precision}'; choose from {', '.join(PRECISIONS)}")
    loaded = from_object(model) if isinstance(model, nn.Module) else resolve(str(model))
    return _freeze_clip(loaded, PRECISIONS[precision], device, text)


def _freeze_clip(
    loaded: Loaded,
    dtype: torch.dtype,
    device: torch.device | str,
    text: bool | Literal["optional"],
) -> Clip:
    model = loaded.model
    activation = str(bool(loaded.model_cfg.get("quick_gelu", False)))
    image_hash = hash_tensors(model.visual.state_dict(), extra=f"quick_gelu={activation}")
    text_state = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    tokenize = _tokenizer(loaded, text) if text else None
    return Clip(
        name=loaded.name,
        vision=VisionTower(model.visual, dtype).to(device),
        text=None
        if tokenize is None
        else TextTower(model, dtype, context_start(tokenize)).to(device),
        preprocess=_preprocess(model),
        logit_scale=float(model.logit_scale.detach().double().exp().reshape(())),
        image_hash=image_hash,
        text_hash=hash_tensors(text_state, extra=f"quick_gelu={activation}"),
        model_cfg=loaded.model_cfg,
        tokenize=tokenize or _no_text,
    )


def _tokenizer(loaded: Loaded, text: bool | Literal["optional"]) -> Tokenize | None:
    """A model's tokenizer; None where it is optional and not to be had."""
    try:
        with quiet():
            found = loaded.tokenizer()
            # Where its files are missing, transformers may make one that knows no word.
            if torch.equal(*found(["photo", "cat"])):
                raise ModelError("it can't tell words apart")
            return found
    except Exception as error:
        if text == "optional":
            return None
        message = " ".join(str(error).split())[:160]
        way_out = "connect to the network once, so that it can be downloaded"
        if isinstance(error, ImportError):
            way_out = "it needs the package transformers: pip install 'promptkd[text]'"
        elif loaded.name.startswith("local-dir:"):
            folder = loaded.name.partition(":")[2]
            way_out = f"put its files (tokenizer.json, tokenizer_config.json) into '{folder}'"
        raise ModelError(
            f"the tokenizer of '{loaded.name}' is not to be had: {way_out} ({message})"
        ) from error


def hash_tensors(tensors: Mapping[str, Tensor], extra: str = "") -> str:
    """A digest (32 hex digits) of named tensors, independent of order, precision included."""
    digest = hashlib.blake2b(extra.encode(), digest_size=16)
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _preprocess(model: Any) -> Preprocess:
    open_clip = open_clip_package()
    cfg = dict(open_clip.get_model_preprocess_cfg(model))
    cfg["size"] = getattr(model.visual, "image_size", cfg.get("size", 224))
    for key in ("mean", "std"):
        cfg[key] = cfg.get(key) or getattr(open_clip, f"OPENAI_DATASET_{key.upper()}")
    return Preprocess.from_open_clip(cfg)


def load_embedded(
    data: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> Clip:
    """A `Clip` without text from a stored configuration and an image tower's own state dict.

    Raises:
        CheckpointError: the tensors don't fit the configuration.
    """
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    cfg = data["model_cfg"]
    visual = _build_vision_tower(
        int(cfg["embed_dim"]),
        CLIPVisionCfg(
            **{k: _tuple(v) for k, v in cfg["vision_cfg"].items()}
            | {"timm_model_pretrained": False}
        ),
        bool(cfg.get("quick_gelu", False)),
    )
    vision = VisionTower(visual)
    try:
        vision.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    except RuntimeError as error:
        raise load_error(str(data["backbone"]), error) from error
    return Clip(
        name=data["backbone"],
        vision=vision.cast(PRECISIONS[precision]).to(device),
        text=None,
        preprocess=Preprocess.from_json(data["preprocess"]),
        logit_scale=float(data["logit_scale"]),
        image_hash=data["image_hash"],
        text_hash="",
        model_cfg=cfg,
        tokenize=_no_text,
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _no_text(names: Sequence[str]) -> Tensor:
    raise ModelError("this model was stored without its text side")


def preprocess_dict(preprocess: Preprocess) -> dict[str, Any]:
    """`Preprocess` as plain JSON data."""
    return asdict(preprocess)
