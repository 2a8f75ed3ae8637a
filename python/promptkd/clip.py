"""Loading CLIP models; this module and `towers` are the only ones that know open_clip.

`load_clip` turns a model name, a weights file or an open_clip model into a `Clip`: a private,
frozen copy of the image tower, optionally the text tower, and everything that belongs to the
weights (activation, preprocessing, tokenizer, logit scale, fingerprints).
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from promptkd.errors import CheckpointError, ModelError
from promptkd.towers import TextTower, VisionTower, check_text, check_vision

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
        mean = torch.tensor(self.mean, dtype=wide, device=pixels.device)
        std = torch.tensor(self.std, dtype=wide, device=pixels.device)
        scaled = (pixels.to(wide) / 255 - mean) / std
        return scaled.permute(0, 3, 1, 2).contiguous().to(dtype)


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
    tokenize: Callable[[Sequence[str]], Tensor] = field(repr=False)

    @property
    def device(self) -> torch.device:
        """Where the towers live."""
        return next(self.vision.buffers()).device

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


def load_clip(
    model: str | Path | nn.Module,
    *,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    text: bool = True,
) -> Clip:
    """Load a CLIP model by name, from a file, or from an open_clip model object.

    Args:
        model: "architecture/pretrained tag" ("ViT-L-14/openai"), "architecture/path to weights",
            "hf-hub:org/repo", "local-dir:folder", a folder in open_clip's layout, a path to an
            OpenAI .pt, a safetensors or an open_clip checkpoint, or an open_clip model.
        precision: "fp32", "bf16", "fp16" (how frozen weights are stored) or "fp64".
        device: where the towers go.
        text: also keep the text tower.

    Raises:
        ModelError: unknown architecture or tag (near names are suggested), weights that are not
            cached and can't be downloaded, or an architecture that takes no prompts.
        CheckpointError: a weights file that does not fit the architecture.
    """
    if precision not in PRECISIONS:
        raise ModelError(f"unknown precision '{precision}'; choose from {', '.join(PRECISIONS)}")
    loaded = _from_object(model) if isinstance(model, nn.Module) else _resolve(str(model))
    return _freeze_clip(loaded, PRECISIONS[precision], device, text)


@dataclass(slots=True)
class _Loaded:
    """What the loaders below hand on: an open_clip model and its configuration."""

    name: str
    model: Any
    model_cfg: dict[str, Any]
    tokenizer: Callable[[Sequence[str]], Tensor] | None = None


def _freeze_clip(
    loaded: _Loaded, dtype: torch.dtype, device: torch.device | str, text: bool
) -> Clip:
    model = loaded.model
    check_vision(model.visual)
    activation = str(bool(loaded.model_cfg.get("quick_gelu", False)))
    image_hash = hash_tensors(model.visual.state_dict(), extra=f"quick_gelu={activation}")
    text_state = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    return Clip(
        name=loaded.name,
        vision=VisionTower(model.visual, dtype).to(device),
        text=TextTower(model, dtype).to(device) if text else None,
        preprocess=_preprocess(model),
        logit_scale=float(model.logit_scale.detach().double().exp()),
        image_hash=image_hash,
        text_hash=hash_tensors(text_state, extra=f"quick_gelu={activation}"),
        model_cfg=loaded.model_cfg,
        tokenize=loaded.tokenizer or _default_tokenizer(model),
    )


def hash_tensors(tensors: Mapping[str, Tensor], extra: str = "") -> str:
    """A digest (32 hex digits) of named tensors, independent of order, precision included."""
    digest = hashlib.blake2b(extra.encode(), digest_size=16)
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _preprocess(model: Any) -> Preprocess:
    open_clip = _open_clip()
    cfg = dict(open_clip.get_model_preprocess_cfg(model))
    cfg["size"] = getattr(model.visual, "image_size", cfg.get("size", 224))
    for key in ("mean", "std"):
        cfg[key] = cfg.get(key) or getattr(open_clip, f"OPENAI_DATASET_{key.upper()}")
    return Preprocess.from_open_clip(cfg)


def _default_tokenizer(model: Any) -> Callable[[Sequence[str]], Tensor]:
    length = int(getattr(getattr(model, "text", model), "context_length", 77))
    tokenizer: Callable[[Sequence[str]], Tensor] = _open_clip().SimpleTokenizer(
        context_length=length
    )
    return tokenizer


def _open_clip() -> Any:
    """Import open_clip on first use: it takes seconds, and a loaded student may not need it."""
    import open_clip

    return open_clip


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's log lines: what they warn of is decided here and tested."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _resolve(name: str) -> _Loaded:
    """Find out which form of name it is and load it."""
    if name.startswith(("hf-hub:", "local-dir:")):
        return _from_schema(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_schema(f"local-dir:{path}")
    if path.is_file():
        return _from_file(path)
    architecture, _, tag = name.partition("/")
    if not tag:
        _unknown_architecture(architecture)
        raise ModelError(
            f"'{name}' names no weights; write 'architecture/tag', for example "
            f"'{name}/{_open_clip().list_pretrained_tags_by_model(name)[0]}'"
            if _open_clip().list_pretrained_tags_by_model(name)
            else f"'{name}' names no weights; write 'architecture/path to weights'"
        )
    _unknown_architecture(architecture)
    weights = Path(tag).expanduser()
    if weights.is_file():
        return _from_file(weights, architecture)
    return _from_tag(architecture, tag)


def _unknown_architecture(architecture: str) -> None:
    known = _open_clip().list_models()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"'{architecture}' is no file, folder or architecture of open_clip{hint}")


def _from_tag(architecture: str, tag: str) -> _Loaded:
    open_clip = _open_clip()
    cfg = open_clip.get_pretrained_cfg(architecture, tag)
    if not cfg:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        near = difflib.get_close_matches(tag, tags, n=3, cutoff=0.3) or tags[:8]
        raise ModelError(
            f"'{architecture}' has no pretrained tag '{tag}' and no such file exists; "
            f"known tags: {', '.join(near) or 'none'}"
        )
    # The activation belongs to the weights. open_clip only warns where they disagree.
    quick_gelu = bool(cfg.get("quick_gelu", False))
    model_cfg = {**open_clip.get_model_config(architecture), "quick_gelu": quick_gelu}
    try:
        with _quiet():
            model = open_clip.create_model(
                architecture, pretrained=tag, quick_gelu=quick_gelu, require_pretrained=True
            )
            tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:
        raise _load_error(f"{architecture}/{tag}", error) from error
    return _Loaded(f"{architecture}/{tag}", model, model_cfg, tokenizer)


def _from_schema(name: str) -> _Loaded:
    open_clip = _open_clip()
    try:
        with _quiet():
            model = open_clip.create_model(name, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
            model_cfg = _schema_config(name)
    except Exception as error:
        raise _load_error(name, error) from error
    return _Loaded(name, model, model_cfg, tokenizer)


def _schema_config(name: str) -> dict[str, Any]:
    schema, _, place = name.partition(":")
    if schema == "local-dir":
        text = (Path(place) / "open_clip_config.json").read_text(encoding="utf-8")
    else:
        from huggingface_hub import hf_hub_download

        text = Path(hf_hub_download(place, "open_clip_config.json")).read_text(encoding="utf-8")
    cfg: dict[str, Any] = json.loads(text)["model_cfg"]
    return cfg


def _load_error(name: str, error: Exception) -> ModelError | CheckpointError:
    message = " ".join(str(error).split())
    if "Missing key" in message or "size mismatch" in message or "Unexpected key" in message:
        return CheckpointError(
            f"the weights of '{name}' don't fit its architecture: {message[:300]}"
        )
    if "ownload" in message or "onnect" in message or "offline" in message.lower():
        return ModelError(
            f"the weights of '{name}' are not in the local cache and can't be downloaded; connect "
            f"to the network once, or name a file or 'local-dir:FOLDER' instead ({message[:160]})"
        )
    return ModelError(f"'{name}' can't be loaded: {message[:300]}")


def _from_object(model: Any) -> _Loaded:
    if not hasattr(model, "visual") or not hasattr(model, "logit_scale"):
        raise ModelError(
            f"a model object must be an open_clip CLIP model, not {type(model).__name__}; "
            "make one with open_clip.create_model(...)"
        )
    check_vision(model.visual)
    text = getattr(model, "text", model)
    check_text(text)
    return _Loaded(f"object:{type(model).__name__}", model, _config_of(model))


def _config_of(model: Any) -> dict[str, Any]:
    """The configuration of an open_clip ViT, read off the module."""
    visual, text = model.visual, getattr(model, "text", model)
    block, text_block = visual.transformer.resblocks[0], text.transformer.resblocks[0]
    vision_cfg = {
        "image_size": list(visual.image_size),
        "layers": len(visual.transformer.resblocks),
        "width": visual.conv1.out_channels,
        "head_width": visual.conv1.out_channels // block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / visual.conv1.out_channels,
        "patch_size": list(visual.patch_size),
        "pool_type": visual.pool_type,
        "final_ln_after_pool": visual.final_ln_after_pool,
        "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
    }
    text_cfg = {
        "context_length": text.context_length,
        "vocab_size": text.token_embedding.num_embeddings,
        "width": text.token_embedding.embedding_dim,
        "heads": text_block.attn.num_heads,
        "layers": len(text.transformer.resblocks),
    }
    return {
        "embed_dim": visual.output_dim,
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
        "quick_gelu": type(block.mlp.gelu).__name__ == "QuickGELU",
    }


def _from_file(path: Path, architecture: str | None = None) -> _Loaded:
    """Weights in a file: OpenAI's layout, or open_clip's with its architecture or config."""
    config = path.parent / "open_clip_config.json"
    if architecture is None and path.suffix == ".safetensors" and config.is_file():
        return _from_schema(f"local-dir:{path.parent}")
    state, trained_here = _read_weights(path)
    open_clip = _open_clip()
    if architecture is None:
        if trained_here:
            raise ModelError(
                f"'{path}' is a training checkpoint that doesn't say its architecture; "
                f"write 'architecture/{path}'"
            )
        model_cfg = _openai_config(state, path)
    else:
        model_cfg = {**open_clip.get_model_config(architecture)}
        if path.suffix != ".safetensors" and not trained_here:
            model_cfg["quick_gelu"] = True  # a bare .pt is in OpenAI's layout
    model_cfg.pop("custom_text", None)
    model = open_clip.CLIP(**copy.deepcopy(model_cfg))
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise _load_error(str(path), error) from error
    name = str(path) if architecture is None else f"{architecture}/{path}"
    return _Loaded(name, model, model_cfg)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], bool]:
    """State dict of a weights file in float32, and whether a training checkpoint held it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        elif _is_torchscript(path):
            with _quiet():
                content = torch.jit.load(str(path), map_location="cpu").state_dict()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"'{path}' is no readable weights file (safetensors, TorchScript or state dict): "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    wrapped = isinstance(content, dict) and isinstance(content.get("state_dict"), dict)
    state = content["state_dict"] if wrapped else content
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(v, Tensor | int) for v in state.values())
    ):
        raise CheckpointError(f"'{path}' holds no state dict of tensors")
    state = {k.removeprefix("module."): v for k, v in state.items()}
    for key in ("input_resolution", "context_length", "vocab_size"):
        state.pop(key, None)
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, wrapped


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _openai_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The architecture that OpenAI's layout implies: read off the shapes, QuickGELU."""
    try:
        conv, position = state["visual.conv1.weight"], state["visual.positional_embedding"]
        width, text_width = conv.shape[0], state["ln_final.weight"].shape[0]
        layers = _count_layers(state, "visual.transformer.resblocks.")
        text_layers = _count_layers(state, "transformer.resblocks.")
        grid = math.isqrt(position.shape[0] - 1)
        return {
            "embed_dim": state["text_projection"].shape[1],
            "vision_cfg": {
                "image_size": grid * conv.shape[-1],
                "layers": layers,
                "width": width,
                "head_width": 64,
                "patch_size": conv.shape[-1],
            },
            "text_cfg": {
                "context_length": state["positional_embedding"].shape[0],
                "vocab_size": state["token_embedding.weight"].shape[0],
                "width": text_width,
                "heads": max(text_width // 64, 1),
                "layers": text_layers,
            },
            "quick_gelu": True,
        }
    except KeyError as error:
        raise CheckpointError(
            f"'{path}' is not in the layout of a CLIP ViT (no {error}); "
            "name the architecture: 'architecture/path'"
        ) from error


def _count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({k[len(prefix) :].split(".")[0] for k in state if k.startswith(prefix)})


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
        CLIPVisionCfg(**{k: _tuple(v) for k, v in cfg["vision_cfg"].items()}),
        bool(cfg.get("quick_gelu", False)),
    )
    vision = VisionTower(visual)
    try:
        vision.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    except RuntimeError as error:
        raise _load_error(str(data["backbone"]), error) from error
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
