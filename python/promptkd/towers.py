"""Frozen image towers of open_clip and timm; those made of plain blocks take deep prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from promptkd.attention import read_attention
from promptkd.blocks import block_parts, copy_of, freeze, freeze_patches, run_block
from promptkd.errors import ModelError
from promptkd.frozen import FrozenPatches

CAN_TAKE_PROMPTS = (
    "open_clip's own ViTs (OpenAI, LAION, DataComp, DFN, MetaCLIP, CLIPA, CoCa), EVA-01 and EVA-02, "
    "SigLIP and SigLIP2, PE-Core, ViTamin, MobileCLIP-B, MobileCLIP2-B and -L"
)


class Layout(Protocol):
    """How a library's image tower is laid out around its blocks."""

    pooling: str
    """What the features are read from."""
    reads_class_token: bool
    """The last block need not compute the other tokens."""
    num_prefix: int
    """Class and register tokens, which stand first."""

    def blocks(self, tower: Any) -> Sequence[nn.Module]:
        """The residual attention blocks."""

    def embed(self, tower: Any, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) → tokens with their positions (B, L, width), normalised."""

    def norm_first(self, tower: Any, prompts: Tensor) -> Tensor:
        """The first prompts (P, width) are normalised with the tokens; no positions."""

    def pool(self, tower: Any, x: Tensor) -> Tensor:
        """Tokens without prompts (B, L, width) → features (B, D)."""


class OpenClipLayout:
    """open_clip's own `VisionTransformer`."""

    num_prefix = 1

    def __init__(self, visual: Any) -> None:
        pooled = "attention pooling" if visual.attn_pool is not None else None
        kinds = {"tok": "class token", "avg": "average of patches", "none": "all tokens"}
        self.pooling = pooled or kinds[visual.pool_type]
        self.reads_class_token = self.pooling == "class token"

    def blocks(self, tower: Any) -> Sequence[nn.Module]:
        """The residual attention blocks."""
        blocks: Sequence[nn.Module] = tower.transformer.resblocks
        return blocks

    def embed(self, tower: Any, images: Tensor) -> Tensor:
        """Class token and patches."""
        patches = tower.conv1(images)
        # Not len(): an exporter would take it for a constant.
        first = tower.class_embedding.expand(patches.shape[0], 1, -1)
        x = torch.cat([first, patches], dim=1) + tower.positional_embedding
        embedded: Tensor = tower.ln_pre(x)
        return embedded

    def norm_first(self, tower: Any, prompts: Tensor) -> Tensor:
        """As the paper does."""
        normed: Tensor = tower.ln_pre(prompts)
        return normed

    def pool(self, tower: Any, x: Tensor) -> Tensor:
        """open_clip's own pooling and projection."""
        features: Tensor = tower._pool(x)[0]
        return features if tower.proj is None else features @ tower.proj


class TimmLayout:
    """A plain ViT of timm (`VisionTransformer` or `Eva`) in open_clip's `TimmModel`."""

    def __init__(self, visual: Any) -> None:
        trunk = visual.trunk
        self.num_prefix = int(trunk.num_prefix_tokens)
        kinds = {"token": "class token", "avg": "average of patches"}
        pooled = "attention pooling" if trunk.attn_pool is not None else None
        self.pooling = pooled or kinds.get(trunk.global_pool, trunk.global_pool)
        self.reads_class_token = self.pooling == "class token"

    def blocks(self, tower: Any) -> Sequence[nn.Module]:
        """The residual attention blocks."""
        return list(tower.trunk.blocks)

    def embed(self, tower: Any, images: Tensor) -> Tensor:
        """Class and register tokens, if there are any, and patches."""
        trunk, place = tower.trunk, tower.trunk.patch_embed
        cuts = isinstance(place.proj, FrozenPatches)
        x = trunk._pos_embed(place.norm(place.proj(images)) if cuts else place(images))
        # Eva's gives the rotations as well, which the tower has already.
        embedded: Tensor = trunk.norm_pre(x[0] if isinstance(x, tuple) else x)
        return embedded

    def norm_first(self, tower: Any, prompts: Tensor) -> Tensor:
        """As the paper does."""
        normed: Tensor = tower.trunk.norm_pre(prompts)
        return normed

    def pool(self, tower: Any, x: Tensor) -> Tensor:
        """timm's own pooling, and open_clip's projection."""
        features: Tensor = tower.head(tower.trunk.forward_head(tower.trunk.norm(x)))
        return features


def layout_of(visual: Any) -> Layout:
    """The layout of an image tower that takes deep prompts.

    Raises:
        ModelError: it takes none; the message begins with what it is.
    """
    kind = type(visual).__name__
    if kind == "VisionTransformer" and hasattr(visual, "conv1"):
        layout: Layout = OpenClipLayout(visual)
    elif kind == "TimmModel" and _is_plain(visual.trunk):
        layout = TimmLayout(visual)
    else:
        inner = type(visual.trunk).__name__ if hasattr(visual, "trunk") else kind
        raise ModelError(f"the image tower {inner} is not made of plain blocks")
    for block in layout.blocks(visual):
        try:
            read_attention(block_parts(block).attention)
        except ModelError as error:
            raise ModelError(f"the image tower {kind} has {error}") from error
    return layout


def _is_plain(trunk: Any) -> bool:
    """Whether a tower of timm is embeddings, blocks and pooling, of a fixed size, and no more."""
    return (
        type(trunk).__name__ in ("VisionTransformer", "Eva")
        and not trunk.dynamic_img_size
        and not getattr(trunk, "rope_mixed", False)
    )


class VisionTower(nn.Module):
    """A frozen image tower; without prompts it equals the library's own.

    Attributes:
        layout: where its tokens stand; None where it takes no prompts.
        width, num_layers: of the blocks that prompts go into; 0 without them.
        output_dim: D, the width of the features.
        refusal: why it takes no prompts; empty where it does.
    """

    rope: Tensor | None

    def __init__(self, visual: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.output_dim = output_dim(visual)
        self.refusal, self.layout = "", None
        self.width = self.num_layers = 0
        try:
            self.layout = layout_of(visual)
        except ModelError as error:
            self.refusal = str(error)
        self.trunk: Any = copy_of(visual, dtype) if self.layout is None else freeze(visual, dtype)
        self.register_buffer("rope", None, persistent=False)
        if self.layout is not None:
            blocks: Any = self.layout.blocks(self.trunk)
            self.num_layers = len(blocks)
            self.width = int(blocks[0].attn.out_proj.weight.shape[0])
            for parent, name in ((self.trunk, "conv1"), (_patch_embed(self.trunk), "proj")):
                freeze_patches(parent, name)
            self.rope = _rope(visual, self.layout.num_prefix)

    def train(self, mode: bool = True) -> VisionTower:
        """Stay as in use: dropout and batch statistics belong to the model's own training."""
        return super().train(False)

    def cast(self, dtype: torch.dtype) -> VisionTower:
        """Store the frozen weights in another precision, in place."""
        self.trunk.to(dtype)
        self.dtype = dtype
        return self

    def forward(self, images: Tensor, prompts: Sequence[Tensor] | None = None) -> Tensor:
        """Encode images (B, 3, H, W), normalised, to raw features (B, D), not unit length.

        Args:
            images: normalised pixels; cast to the tower's precision.
            prompts: one (P, width) tensor a prompted layer, layers 0..d-1. They stand last, carry
                no position, and pooling does not see them.

        Raises:
            ModelError: more layers of prompts than there are.
        """
        prompts = prompts or ()
        if len(prompts) > self.num_layers:
            raise ModelError(
                f"{len(prompts)} layers of vision prompts for a tower of {self.num_layers} layers; "
                f"lower prompt_depth to {self.num_layers} or less"
                if self.layout is not None
                else f"{self.refusal}, so that it takes no deep prompts"
            )
        layout = self.layout
        if layout is None:
            out: Any = self.trunk(images.to(self.dtype))
            plain: Tensor = out[0] if isinstance(out, tuple) else out
            return plain
        x = self._embed(images.to(self.dtype))
        length = x.shape[1]
        rope = self._rope_with(prompts[0].shape[0] if prompts else 0)
        for layer, block in enumerate(layout.blocks(self.trunk)):
            extra = None
            if layer < len(prompts):
                extra = prompts[layer].to(self.dtype)
                extra = layout.norm_first(self.trunk, extra) if layer == 0 else extra
            last = layer == self.num_layers - 1
            if extra is not None and layer == len(prompts) - 1 and not last:
                # Nothing replaces the last prompts: they live on as tokens.
                x, extra = torch.cat([x, extra.expand(x.shape[0], -1, -1)], dim=1), None
            pick = _class_token if last and layout.reads_class_token else None
            x = run_block(block, x, extra=extra, pick=pick, rope=rope)
        return layout.pool(self.trunk, x[:, :length])

    def _embed(self, images: Tensor) -> Tensor:
        assert self.layout is not None
        return self.layout.embed(self.trunk, images)

    def _rope_with(self, num_prompts: int) -> Tensor | None:
        """The rotations of all tokens, prompts last, which are turned by nothing."""
        if self.rope is None or num_prompts == 0:
            return self.rope
        return torch.cat([self.rope, _no_turn(self.rope, num_prompts)], dim=1)


def _class_token(x: Tensor) -> Tensor:
    return x[:, :1]


def _patch_embed(trunk: Any) -> Any:
    """timm's plain patch embedding; None for others, convolutional stems among them."""
    found = getattr(getattr(trunk, "trunk", None), "patch_embed", None)
    return found if type(found).__name__ == "PatchEmbed" else None


def _rope(visual: Any, num_prefix: int) -> Tensor | None:
    """Cosine and sine (2, L, A / heads) of EVA's rotary positions; prefix tokens aren't turned.

    In the precision of the model given: rounded to a half they would turn by other angles.
    """
    rope = getattr(getattr(visual, "trunk", None), "rope", None)
    if rope is None:
        return None
    found: Tensor = rope.get_embed()
    sine, cosine = found.detach().chunk(2, dim=-1)
    turns = torch.stack([cosine, sine])
    return torch.cat([_no_turn(turns, num_prefix), turns], dim=1)


def _no_turn(rope: Tensor, count: int) -> Tensor:
    """Cosine 1 and sine 0 for `count` tokens."""
    one = F.pad(rope.new_ones(1, count, rope.shape[-1]), (0, 0, 0, 0, 0, 1))
    return one


def output_dim(visual: Any) -> int:
    """D of an image tower of open_clip."""
    if hasattr(visual, "output_dim"):
        return int(visual.output_dim)
    linears = [m for m in visual.head.modules() if isinstance(m, nn.Linear)]
    if linears:
        return int(linears[-1].out_features)
    trunk = visual.trunk
    return int(trunk.num_classes or trunk.num_features)
