"""Frozen image and text towers that take deep prompts: open_clip's own ViT and its text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from promptkd.errors import ModelError
from promptkd.frozen import freeze, run_block


class VisionTower(nn.Module):
    """A frozen ViT that takes deep prompts; without prompts it equals open_clip's own tower."""

    def __init__(self, visual: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        check_vision(visual)
        trunk: Any = freeze(visual, dtype)
        self.trunk = trunk
        self.width = int(trunk.class_embedding.shape[0])
        self.num_layers = len(trunk.transformer.resblocks)
        self.output_dim = int(trunk.output_dim)
        self.dtype = dtype
        # Only the class token is read, so that the last block need not compute the others.
        self._reads_class_token = trunk.pool_type == "tok" and trunk.attn_pool is None

    def cast(self, dtype: torch.dtype) -> VisionTower:
        """Store the frozen weights in another precision, in place."""
        self.trunk.to(dtype)
        self.dtype = dtype
        return self

    def forward(self, images: Tensor, prompts: Sequence[Tensor] | None = None) -> Tensor:
        """Encode images (B, 3, H, W), normalised, to raw features (B, D), not unit length.

        Args:
            images: normalised pixels; cast to the tower's precision.
            prompts: one (P, width) tensor a prompted layer, layers 0..d-1.
        """
        prompts = prompts or ()
        if len(prompts) > self.num_layers:
            raise ModelError(
                f"{len(prompts)} layers of vision prompts for a tower of {self.num_layers} layers; "
                f"lower prompt_depth to {self.num_layers} or less"
            )
        x = self._embed(images.to(self.dtype))
        length = x.shape[1]
        for layer, block in enumerate(self.trunk.transformer.resblocks):
            extra = None
            if layer < len(prompts):
                extra = prompts[layer].to(self.dtype)
                extra = self.trunk.ln_pre(extra) if layer == 0 else extra
            last = layer == self.num_layers - 1
            if extra is not None and layer == len(prompts) - 1 and not last:
                # Nothing replaces the last prompts: they live on as tokens.
                x, extra = torch.cat([x, extra.expand(x.shape[0], -1, -1)], dim=1), None
            pick = _class_token if last and self._reads_class_token else None
            x = run_block(block, x, extra=extra, pick=pick)
        return self._pool(x[:, :length])

    def _embed(self, images: Tensor) -> Tensor:
        """Class token and patches with their positions (B, L, width), normalised."""
        trunk = self.trunk
        patches = trunk.conv1(images)
        # Not len(): an exporter would take it for a constant.
        first = trunk.class_embedding.expand(patches.shape[0], 1, -1)
        x = torch.cat([first, patches], dim=1) + trunk.positional_embedding
        embedded: Tensor = trunk.ln_pre(x)
        return embedded

    def _pool(self, x: Tensor) -> Tensor:
        """Pooling must not see the prompts, which stand last."""
        features: Tensor = self.trunk._pool(x)[0]
        return features if self.trunk.proj is None else features @ self.trunk.proj


def _class_token(x: Tensor) -> Tensor:
    return x[:, :1]


_GRAPH_WIDTHS = 14  # values kept for a token in a block, in units of the width


class TextTower(nn.Module):
    """open_clip's causal text transformer, frozen; reads no further than the last end token."""

    positional_embedding: Tensor
    projection: Tensor
    graph_bytes = 1024**3
    """Largest graph (estimated) that is kept for the backward pass."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        text: Any = getattr(model, "text", model)
        check_text(text)
        self.dtype = dtype
        transformer: Any = freeze(text.transformer, dtype)
        self.transformer = transformer
        self.token_embedding = freeze(text.token_embedding, dtype)
        self.ln_final = freeze(text.ln_final, dtype)
        self.register_buffer("positional_embedding", text.positional_embedding.detach().to(dtype))
        projection = text.text_projection
        if isinstance(projection, nn.Linear):
            projection = projection.weight.T
        self.register_buffer("projection", projection.detach().to(dtype).clone())
        self.width = int(self.positional_embedding.shape[1])
        self.context_length = int(text.context_length)
        self.num_layers = len(transformer.resblocks)
        self.output_dim = int(self.projection.shape[1])

    def forward(self, tokens: Tensor, prompts: Sequence[Tensor] | None = None) -> Tensor:
        """Encode token ids (N, L) to raw features (N, D), read at the end token.

        A graph of more than `graph_bytes` is not kept: the rows go through in chunks, each of
        which is computed again in the backward pass, with the same gradients.

        Args:
            tokens: ids; the end token is the largest id of a row, and all rows begin alike. What
                stands behind the end tokens is not looked at: the tower is causal.
            prompts: one (P, width) tensor a prompted layer. The first replaces the embeddings
                of tokens 1..P, later ones what the block before made of them.
        """
        tokens, prompts = cut_tokens(tokens), list(prompts or ())
        needs_graph = torch.is_grad_enabled() and any(p.requires_grad for p in prompts)
        row_bytes = _GRAPH_WIDTHS * self.width * self.num_layers * tokens.shape[1]
        row_bytes *= self.positional_embedding.element_size()
        if not needs_graph or row_bytes * len(tokens) <= self.graph_bytes:
            return self._encode(tokens, prompts)
        rows = max(1, self.graph_bytes // (4 * row_bytes))
        parts = [
            checkpoint(
                self._encode,
                cut_tokens(part),
                prompts,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for part in tokens.split(rows)
        ]
        return torch.cat(parts)

    def _encode(self, tokens: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """Features (N, D). The words that all rows begin with go through once, not N times."""
        length, ends = tokens.shape[1], tokens.argmax(dim=-1)
        shared = _shared_prefix(tokens, ends, len(prompts[0]) if prompts else 0)
        x = self.token_embedding(tokens[:, shared:]) + self.positional_embedding[shared:length]
        head = self.token_embedding(tokens[:1, :shared])
        if prompts:
            head = _put_context(head, prompts[0])
        head = head + self.positional_embedding[:shared]
        mask = torch.full((length, length), -math.inf, dtype=x.dtype, device=x.device).triu(1)
        # The rest sees itself causally and, behind it, all of the shared words.
        seen = torch.cat([mask[shared:, shared:], mask[shared:, :shared]], dim=1)
        read = torch.arange(len(tokens), device=tokens.device), ends - shared
        for layer, block in enumerate(self.transformer.resblocks):
            if 0 < layer < len(prompts):
                head = _put_context(head, prompts[layer])
            if layer < self.num_layers - 1:
                x = run_block(block, x, extra=head[0], mask=seen)
                head = run_block(block, head, mask=mask[:shared, :shared])
            else:
                x = run_block(
                    block,
                    x,
                    extra=head[0],
                    pick=lambda t: t[read][:, None],
                    mask=seen[read[1]][:, None, None],
                )
        features: Tensor = self.ln_final(x[:, 0]) @ self.projection
        return features


def _shared_prefix(tokens: Tensor, ends: Tensor, num_prompts: int) -> int:
    """How many leading tokens all rows of (N, L) have in common, prompts included; no end token."""
    alike = (tokens == tokens[:1]).all(dim=0)
    alike[1 : 1 + num_prompts] = True
    shared = min(int(alike.int().cumprod(0).sum()), int(ends.min()))
    if shared < 1 + num_prompts:
        raise ModelError(
            f"the token rows don't all begin with a start token and {num_prompts} prompts"
        )
    return shared


def _put_context(x: Tensor, context: Tensor) -> Tensor:
    """Replace tokens 1..P of x (N, L, W) by `context` (P, W)."""
    inner = context.to(x.dtype).expand(x.shape[0], -1, -1)
    return torch.cat([x[:, :1], inner, x[:, 1 + context.shape[0] :]], dim=1)


def cut_tokens(tokens: Tensor) -> Tensor:
    """Drop the columns of (N, L) token ids behind the last end token of any row."""
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]


def check_vision(visual: Any) -> None:
    """Raise a `ModelError` where an image tower takes no deep prompts."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(visual) is not VisionTransformer:
        raise ModelError(
            f"the image tower {type(visual).__name__} takes no deep prompts; "
            "use one of open_clip's own ViT models (OpenAI, LAION, DataComp, DFN, MetaCLIP)"
        )
    if not all(type(b) is ResidualAttentionBlock for b in visual.transformer.resblocks):
        raise ModelError("the image tower has custom blocks, which take no deep prompts")


def check_text(text: nn.Module) -> None:
    """Raise a `ModelError` where a text tower is not the one that `TextTower` computes."""
    transformer = getattr(text, "transformer", None)
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    causal = getattr(text, "attn_mask", None) is not None
    if (
        transformer is None
        or not hasattr(transformer, "resblocks")
        or pool != "argmax"
        or not causal
    ):
        raise ModelError(
            f"the text tower {type(text).__name__} is not open_clip's causal text transformer "
            "read at the end token; use an OpenAI, LAION, DataComp, DFN or MetaCLIP ViT"
        )
