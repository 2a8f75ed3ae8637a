"""Models of open_clip by name, from files, or given as objects, and what can be wrong with them."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from promptkd.errors import CheckpointError, ModelError
from promptkd.prompts import Tokenize
from promptkd.towers import output_dim


@dataclass(slots=True)
class Loaded:
    """What the loaders below hand on: an open_clip model and its configuration."""

    name: str
    model: Any
    model_cfg: dict[str, Any]
    tokenizer: Callable[[], Tokenize]
    """Makes the tokenizer, which may need a download."""


def _default_tokenizer(model: Any) -> Tokenize:
    """CLIP's own tokenizer, for models that don't come by a name."""
    text = getattr(model, "text", model)
    tokenizer: Any = open_clip_package().SimpleTokenizer(
        context_length=int(getattr(text, "context_length", 77))
    )
    if int(getattr(text, "vocab_size", tokenizer.vocab_size)) != tokenizer.vocab_size:
        raise ModelError("its vocabulary is not CLIP's own; load the model by its name")
    found: Tokenize = tokenizer
    return found


def open_clip_package() -> Any:
    """Import open_clip on first use: it takes seconds, and a loaded student may not need it."""
    import open_clip

    return open_clip


@contextmanager
def quiet() -> Iterator[None]:
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


def resolve(name: str) -> Loaded:
    """Find out which form of name it is, see `promptkd.clip.load_clip`, and load it."""
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
            f"'{name}/{open_clip_package().list_pretrained_tags_by_model(name)[0]}'"
            if open_clip_package().list_pretrained_tags_by_model(name)
            else f"'{name}' names no weights; write 'architecture/path to weights'"
        )
    _unknown_architecture(architecture)
    weights = Path(tag).expanduser()
    if weights.is_file():
        return _from_file(weights, architecture)
    return _from_tag(architecture, tag)


def _unknown_architecture(architecture: str) -> None:
    known = open_clip_package().list_models()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"'{architecture}' is no file, folder or architecture of open_clip{hint}")


def _from_tag(architecture: str, tag: str) -> Loaded:
    open_clip = open_clip_package()
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
    name = f"{architecture}/{tag}"
    try:
        with quiet():
            _check_download(name, open_clip.factory.download_pretrained(cfg))
            model = open_clip.create_model(
                architecture, pretrained=tag, quick_gelu=quick_gelu, require_pretrained=True
            )
    except Exception as error:
        raise load_error(name, error) from error
    return Loaded(name, model, model_cfg, lambda: open_clip.get_tokenizer(architecture))


def _check_download(name: str, path: str | Path) -> None:
    """Compare a file of the hub's cache with the SHA-256 that it is named by."""
    blob = Path(path).resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return  # open_clip checks other downloads itself
    with blob.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.name:
        raise CheckpointError(
            f"the download of '{name}' is corrupt: its SHA-256 is {found[:8]}…, not "
            f"{blob.name[:8]}…; delete '{blob}' and load the model again"
        )


def _from_schema(name: str) -> Loaded:
    open_clip = open_clip_package()
    schema, _, place = name.partition(":")
    try:
        with quiet():
            if schema == "hf-hub":
                _check_download(name, open_clip.factory.download_pretrained_from_hf(place))
            model = open_clip.create_model(name, require_pretrained=True)
            model_cfg = _schema_config(name)
    except Exception as error:
        raise load_error(name, error) from error
    return Loaded(name, model, model_cfg, lambda: open_clip.get_tokenizer(name))


def _schema_config(name: str) -> dict[str, Any]:
    schema, _, place = name.partition(":")
    if schema == "local-dir":
        text = (Path(place) / "open_clip_config.json").read_text(encoding="utf-8")
    else:
        from huggingface_hub import hf_hub_download

        text = Path(hf_hub_download(place, "open_clip_config.json")).read_text(encoding="utf-8")
    cfg: dict[str, Any] = json.loads(text)["model_cfg"]
    return cfg


_DIFFERENCES = {
    "missing": r"Missing key\(s\) in state_dict: (.*?)\. ",
    "not known to it": r"Unexpected key\(s\) in state_dict: (.*?)\. ",
}


def load_error(name: str, error: Exception) -> ModelError | CheckpointError:
    """The error to raise where loading the model `name` failed with `error`."""
    if isinstance(error, ModelError | CheckpointError):
        return error
    message = " ".join(str(error).split())
    if "Missing key" in message or "size mismatch" in message or "Unexpected key" in message:
        return CheckpointError(
            f"the weights of '{name}' don't fit its architecture: {_differences(message)}"
        )
    if "checksum" in message or "SafetensorError" in type(error).__name__:
        return CheckpointError(
            f"the weights of '{name}' are damaged, or their download is corrupt; delete the file "
            f"and load the model again ({message[:160]})"
        )
    if "ransformers" in message and "install" in message:
        return ModelError(
            f"'{name}' needs the package transformers for its text tower: "
            "pip install 'promptkd[text]'"
        )
    if "ownload" in message or "onnect" in message or "offline" in message.lower():
        return ModelError(
            f"the weights of '{name}' are not in the local cache and can't be downloaded; connect "
            f"to the network once, or name a file or 'local-dir:FOLDER' instead ({message[:160]})"
        )
    return ModelError(f"'{name}' can't be loaded: {message[:300]}")


def _differences(message: str) -> str:
    """The first keys of each kind that torch's message about a state dict names."""
    shapes = r"size mismatch for (\S+): copying .*?\[(.*?)\]\) from checkpoint, .*?\[(.*?)\]"
    parts = []
    for kind, pattern in _DIFFERENCES.items():
        keys = [
            k for found in re.findall(pattern, message + " ") for k in re.findall('"(.*?)"', found)
        ]
        parts += [f"{len(keys)} {kind} ({_first(keys)})"] if keys else []
    sizes = [f"{key} is ({a}), not ({b})" for key, a, b in re.findall(shapes, message)]
    parts += [f"{len(sizes)} of another shape ({_first(sizes)})"] if sizes else []
    return "; ".join(parts) or message[:300]


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def from_object(model: Any) -> Loaded:
    """A model that open_clip has made."""
    if not hasattr(model, "visual") or not hasattr(model, "logit_scale"):
        raise ModelError(
            f"a model object must be an open_clip CLIP model, not {type(model).__name__}; "
            "make one with open_clip.create_model(...)"
        )
    name = f"object:{type(model).__name__}"
    return Loaded(name, model, _config_of(model), lambda: _default_tokenizer(model))


def _config_of(model: Any) -> dict[str, Any]:
    """The configuration of an open_clip model as far as it can be read off the module."""
    visual = model.visual
    cfg: dict[str, Any] = {"vision_cfg": {}, "text_cfg": {}, "quick_gelu": False}
    if hasattr(visual, "conv1") and hasattr(visual, "transformer"):
        block = visual.transformer.resblocks[0]
        cfg["embed_dim"], cfg["vision_cfg"] = visual.output_dim, _vit_config(visual, block)
        cfg["quick_gelu"] = type(block.mlp.gelu).__name__ == "QuickGELU"
    elif hasattr(visual, "trunk"):
        cfg["embed_dim"], cfg["vision_cfg"] = output_dim(visual), _timm_config(visual)
    text = getattr(model, "text", model)
    if hasattr(text, "token_embedding"):
        cfg["text_cfg"] = {
            "context_length": text.context_length,
            "vocab_size": text.token_embedding.num_embeddings,
            "width": text.token_embedding.embedding_dim,
            "heads": text.transformer.resblocks[0].attn.num_heads,
            "layers": len(text.transformer.resblocks),
        }
    return cfg


def _vit_config(visual: Any, block: Any) -> dict[str, Any]:
    """Of open_clip's own ViT, what `load_embedded` builds it from."""
    width, pooler, scale = visual.conv1.out_channels, visual.attn_pool, block.ls_1
    cfg = {
        "image_size": list(visual.image_size),
        "layers": len(visual.transformer.resblocks),
        "width": width,
        "head_width": width // block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / width,
        "patch_size": list(visual.patch_size),
        "pool_type": visual.pool_type,
        "final_ln_after_pool": visual.final_ln_after_pool,
        "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
        "norm_kwargs": {"eps": visual.ln_post.eps},
        "ls_init_value": None if isinstance(scale, nn.Identity) else 1.0,
    }
    if isinstance(block.mlp.gelu, nn.GELU):
        cfg["act_kwargs"] = {"approximate": block.mlp.gelu.approximate}
    if pooler is not None:
        cfg["attentional_pool"] = visual.attn_pool_type or True
        cfg["attn_pooler_queries"] = len(pooler.query)
        cfg["attn_pooler_heads"] = pooler.attn.num_heads
    return cfg


def _timm_config(visual: Any) -> dict[str, Any]:
    """Of a model of timm, as open_clip makes it."""
    trunk, head = visual.trunk, visual.head
    has_own = isinstance(getattr(trunk, "head", None), nn.Linear)
    plain = None if has_own else "none"
    projection = "mlp" if hasattr(head, "mlp") else "linear" if hasattr(head, "proj") else plain
    return {
        "image_size": list(visual.image_size),
        "timm_model_name": trunk.pretrained_cfg["architecture"],
        "timm_pool": getattr(trunk, "global_pool", ""),
        "timm_proj": projection,
        "timm_proj_bias": hasattr(head, "proj") and head.proj.bias is not None,
    }


def _from_file(path: Path, architecture: str | None = None) -> Loaded:
    """Weights in a file: OpenAI's layout, or open_clip's with its architecture or config."""
    config = path.parent / "open_clip_config.json"
    if architecture is None and path.suffix == ".safetensors" and config.is_file():
        return _from_schema(f"local-dir:{path.parent}")
    state, trained_here = _read_weights(path)
    open_clip = open_clip_package()
    if architecture is None:
        if trained_here:
            raise ModelError(
                f"'{path}' is a training checkpoint that doesn't say its architecture; "
                f"write 'architecture/{path}'"
            )
        model_cfg = _openai_config(state, path)
    else:
        model_cfg = {**open_clip.get_model_config(architecture)}
        is_openais = (
            not model_cfg.get("custom_text") and "hf_tokenizer_name" not in (model_cfg["text_cfg"])
        )
        if path.suffix != ".safetensors" and not trained_here and is_openais:
            model_cfg["quick_gelu"] = True  # a bare .pt is in OpenAI's layout
    name = str(path) if architecture is None else f"{architecture}/{path}"
    try:
        model = _build(model_cfg)
        model.load_state_dict(_in_layout_of(model, state), strict=True)
    except Exception as error:
        raise load_error(name, error) from error
    if architecture is None:
        return Loaded(name, model, model_cfg, lambda: _default_tokenizer(model))
    return Loaded(name, model, model_cfg, lambda: open_clip.get_tokenizer(architecture))


def _build(model_cfg: Mapping[str, Any]) -> Any:
    """A model of open_clip with random weights; nothing is downloaded for them."""
    open_clip = open_clip_package()
    cfg = copy.deepcopy(dict(model_cfg))
    custom = cfg.pop("custom_text", False)
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in cfg["text_cfg"]:
        custom, cfg["text_cfg"]["hf_model_pretrained"] = True, False
    if custom and "multimodal_cfg" in cfg:
        return open_clip.CoCa(**cfg)
    return open_clip.CustomTextCLIP(**cfg) if custom else open_clip.CLIP(**cfg)


def _in_layout_of(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as `model` names them, where they come in an older or another library's layout."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for key in ("logit_scale", "logit_bias"):
        own = getattr(model, key, None)
        if own is not None and key in state:
            state[key] = state[key].reshape(own.shape)
    return state


def _read_weights(path: Path) -> tuple[dict[str, Tensor], bool]:
    """State dict of a weights file in float32, and whether a training checkpoint held it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        elif _is_torchscript(path):
            with quiet():
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
