"""A tiny model with random weights of every family that open_clip builds.

Their tokenizers would have to be downloaded where a family doesn't use CLIP's own; `StubTokenizer`
stands in for those: it takes words for tokens and puts start, end and padding where they belong.
"""

import copy
import json
import re
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from timm.layers import LayerNorm
from timm.models import (
    convnext,
    eva,
    register_model,
    vision_transformer,
    vision_transformer_hybrid,
    vitamin,
)
from torch import Tensor, nn

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2}


@register_model
def tiny_siglip(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    own = {"img_size": 24, "patch_size": 8, "class_token": False, "global_pool": "map"}
    return _timm_vit("tiny_siglip", own, kwargs)


@register_model
def tiny_siglip_odd(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Like SO400M-14 at 384 px: the patches leave a rest."""
    own = {"img_size": 27, "patch_size": 6, "class_token": False, "global_pool": "map"}
    return _timm_vit("tiny_siglip_odd", own, kwargs)


@register_model
def tiny_clip_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    norm = partial(LayerNorm, eps=1e-5)
    own = {"img_size": 28, "patch_size": 7, "pre_norm": True, "norm_layer": norm}
    return _timm_vit("tiny_clip_vit", own, kwargs)


@register_model
def tiny_registers(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    own = {"img_size": 32, "patch_size": 8, "reg_tokens": 4, "no_embed_class": True}
    own |= {"global_pool": "avg", "init_values": 0.5, "qk_norm": True}
    return _timm_vit("tiny_registers", own, kwargs)


@register_model
def tiny_gap(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    own = {"img_size": 32, "patch_size": 16, "class_token": False, "global_pool": "avg"}
    own |= {"qkv_bias": False, "init_values": 0.3, "fc_norm": False}
    return _timm_vit("tiny_gap", own, kwargs)


def _timm_vit(name: str, own: dict[str, Any], kwargs: Any) -> nn.Module:
    made: nn.Module = vision_transformer._create_vision_transformer(
        name, **{**SMALL, **own, **kwargs}
    )
    return made


@register_model
def tiny_mobile(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    stem = vision_transformer_hybrid.ConvStem(
        channels=(8, 8, 32), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=nn.GELU
    )
    made: nn.Module = vision_transformer_hybrid._create_vision_transformer_hybrid(
        "tiny_mobile",
        backbone=stem,
        embed_args={"proj": False},
        **{**SMALL, "img_size": 48, "no_embed_class": True, **kwargs},
    )
    return made


@register_model
def tiny_vitamin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    cfg = vitamin.VitCfg(embed_dim=(8, 16, 32), depths=(1, 1, 1), stem_width=8, head_type="1d")
    made: nn.Module = vitamin._create_vitamin(
        "tiny_vitamin",
        embed_cfg=cfg,
        **{
            **SMALL,
            "img_size": 48,
            "mlp_layer": vitamin.GeGluMlp,
            "mlp_ratio": 2.0,
            "class_token": False,
            "global_pool": "avg",
            **kwargs,
        },
    )
    return made


@register_model
def tiny_eva01(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _eva("tiny_eva01", {"img_size": 28, "patch_size": 7, "mlp_ratio": 4.3}, kwargs)


@register_model
def tiny_eva02(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    own = {"img_size": 32, "patch_size": 8, "qkv_fused": False, "mlp_ratio": 4 * 2 / 3}
    own |= {"swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
    own |= {"use_rot_pos_emb": True, "ref_feat_shape": (3, 3)}
    return _eva("tiny_eva02", own, kwargs)


@register_model
def tiny_eva02_e(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _eva("tiny_eva02_e", {"img_size": 21, "patch_size": 7, "use_post_norm": True}, kwargs)


_PE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "attn_type": "rope",
    "use_pre_transformer_norm": True,
    "use_rot_pos_emb": True,
    "rope_grid_indexing": "xy",
    "attn_pool_num_heads": 4,
    "attn_pool_mlp_ratio": 4.0,
    "norm_layer": partial(LayerNorm, eps=1e-5),
    "global_pool": "map",
}


@register_model
def tiny_pe(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _eva("tiny_pe", {**_PE, "ref_feat_shape": (4, 4), "rope_grid_offset": 1.0}, kwargs)


@register_model
def tiny_pe_g(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _eva("tiny_pe_g", {**_PE, "class_token": False}, kwargs)


def _eva(name: str, own: dict[str, Any], kwargs: Any) -> nn.Module:
    made: nn.Module = eva._create_eva(name, **{**SMALL, **own, **kwargs})
    return made


@register_model
def tiny_convnext(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    made: nn.Module = convnext._create_convnext("tiny_convnext", **{**sizes, **kwargs})
    return made


TEXT: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 32,
    "heads": 2,
    "layers": 3,
}
CLIPA_TEXT = TEXT | {
    "context_length": 16,
    "vocab_size": 400,
    "hf_tokenizer_name": "a/bert",
    "tokenizer_kwargs": {"strip_sep_token": True},
    "pool_type": "last",
    "no_causal_mask": True,
}
SIGLIP_TEXT = TEXT | {
    "context_length": 16,
    "vocab_size": 400,
    "hf_tokenizer_name": "a/siglip",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "width": 48,
    "pool_type": "last",
    "no_causal_mask": True,
    "proj_bias": True,
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}
EOS_TEXT = TEXT | {
    "context_length": 16,
    "vocab_size": 400,
    "hf_tokenizer_name": "a/xlm",
    "pool_type": "eos",
    "eos_id": 2,
}


def _vit(**changes: Any) -> dict[str, Any]:
    own = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
    return own | changes


def _timm(name: str, size: int, **changes: Any) -> dict[str, Any]:
    own = {"timm_model_name": name, "timm_pool": "token", "timm_proj": None, "image_size": size}
    return own | changes


def _cfg(embed: int, vision: Any, text: Any = TEXT, **more: Any) -> dict[str, Any]:
    return {"embed_dim": embed, "vision_cfg": vision, "text_cfg": text, **more}


_MAP = {"timm_pool": "map", "timm_proj": "none"}
_OWN = {"custom_text": True}
_CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
_CLS = {"context_length": 20, "embed_cls": True, "output_tokens": True}
_POOLED = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5}
_DECODER = {"context_length": 20, "vocab_size": 400, "width": 32, "heads": 2, "layers": 1}

PROMPTED: dict[str, dict[str, Any]] = {
    "vit": _cfg(24, _vit(), quick_gelu=True),
    "average": _cfg(28, _vit(image_size=40, pool_type="avg", ls_init_value=0.4)),
    "clipa": _cfg(20, _vit(image_size=42, patch_size=14, **_CLIPA), CLIPA_TEXT),
    "coca": _cfg(
        36,
        _vit(output_tokens=True, **_POOLED),
        TEXT | _CLS,
        multimodal_cfg=_DECODER,
        **_OWN,
    ),
    "worldwide": _cfg(24, _vit(width=48), EOS_TEXT),
    "eva01": _cfg(20, _timm("tiny_eva01", 28), **_OWN),
    "eva02": _cfg(24, _timm("tiny_eva02", 32), **_OWN),
    "eva02-e": _cfg(28, _timm("tiny_eva02_e", 21), **_OWN),
    "siglip": _cfg(32, _timm("tiny_siglip", 24, **_MAP), SIGLIP_TEXT, init_logit_bias=-10, **_OWN),
    "siglip-rest": _cfg(32, _timm("tiny_siglip_odd", 27, **_MAP), SIGLIP_TEXT, **_OWN),
    "pe": _cfg(20, _timm("tiny_pe", 32, timm_pool="map"), **_OWN),
    "pe-g": _cfg(20, _timm("tiny_pe_g", 32, timm_pool="map"), **_OWN),
    "vitamin": _cfg(24, _timm("tiny_vitamin", 48, timm_pool="", timm_proj="linear"), **_OWN),
    "mobileclip-b": _cfg(28, _timm("tiny_mobile", 48), **_OWN),
    "mobileclip2-l": _cfg(24, _timm("tiny_clip_vit", 28), TEXT | {"no_causal_mask": True}, **_OWN),
    "registers": _cfg(20, _timm("tiny_registers", 32, timm_pool="avg")),
    "gap": _cfg(20, _timm("tiny_gap", 32, timm_pool="", timm_proj="linear")),
}
UNPROMPTED: dict[str, dict[str, Any]] = {
    "resnet": _cfg(24, _vit(image_size=64, layers=[1, 1, 1, 1], width=8, head_width=16)),
    "convnext": _cfg(20, _timm("tiny_convnext", 64, timm_pool="", timm_proj="mlp")),
}
FAMILIES = PROMPTED | UNPROMPTED


class StubTokenizer:
    """Words for tokens, in the place of a tokenizer that would have to be downloaded."""

    def __init__(self, source: Any, context_length: int = 77, **kwargs: Any) -> None:
        self.context_length = context_length
        if kwargs.get("clean") == "canonicalize":  # SigLIP's: no start, padded with the end
            self.first, self.end, self.padding = [], [1], 1
        elif kwargs.get("strip_sep_token"):  # CLIPA's: no end
            self.first, self.end, self.padding = [101], [], 0
        else:
            self.first, self.end, self.padding = [0], [2], 1

    def __call__(self, texts: list[str]) -> Tensor:
        rows = torch.full((len(texts), self.context_length), self.padding)
        for row, text in enumerate(texts):
            words = [110 + zlib.crc32(w.encode()) % 290 for w in re.findall(r"\w+", text.lower())]
            ids = [*self.first, *words[: self.context_length - 2], *self.end]
            rows[row, : len(ids)] = torch.tensor(ids)
        return rows


def make(name: str, seed: int = 0) -> Any:
    """A model of a family, with nothing in it at zero or one."""
    cfg = copy.deepcopy(FAMILIES[name])
    custom = cfg.pop("custom_text", False)
    kind = open_clip.CLIP if not custom else open_clip.CustomTextCLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (open_clip.CoCa if "multimodal_cfg" in cfg else kind)(**cfg).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            for key, buffer in model.named_buffers():
                if key.endswith("running_var"):
                    buffer += torch.rand_like(buffer)
            model.logit_scale.fill_(3.0)
    return model


def save(folder: Path, name: str, seed: int = 0) -> str:
    """A model of a family as a folder in open_clip's layout; each family has its own pixels."""
    folder.mkdir(parents=True)
    number = list(FAMILIES).index(name)
    preprocess = {
        "mean": [0.3 + 0.02 * number, 0.5, 0.4],
        "std": [0.2 + 0.01 * number, 0.3, 0.25],
        "interpolation": "bilinear" if number % 2 else "bicubic",
        "resize_mode": ("shortest", "squash", "longest")[number % 3],
    }
    config = {"model_cfg": FAMILIES[name], "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = {k: v.contiguous() for k, v in make(name, seed).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"
