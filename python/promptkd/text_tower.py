"""Frozen text towers of open_clip; its own transformer takes deep prompts, others are run as is."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from promptkd.blocks import block_parts, copy_of, freeze, run_block
from promptkd.errors import ModelError

_GRAPH_WIDTHS = 14  # values kept for a token in a block, in units of the width
_END = ("argmax", "eos")  # poolings that read at the end token


class TextTower(nn.Module):
    """A frozen text tower; without prompts it equals the library's own.

    Where it is causal and read at the end token it looks no further than the last one, and the
    words that all rows begin with go through once.

    Attributes:
        context_start: where prompts go: behind the tokens that every sentence begins with.
        refusal: why it takes no prompts; empty where it does.
        width, num_layers: of the blocks that prompts go into; 0 without them.
    """

    positional_embedding: Tensor
    graph_bytes = 1024**3
    """Largest graph (estimated) that is kept for the backward pass."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype = torch.float32, context_start: int = 1
    ) -> None:
        super().__init__()
        self.dtype, self.context_start = dtype, context_start
        self.width = self.num_layers = 0
        self.refusal = refusal_of(model)
        text: Any = getattr(model, "text", model)
        if self.refusal:
            self.plain = _PlainText(model, dtype)
            return
        self.transformer = freeze(text.transformer, dtype)
        self.token_embedding = freeze(text.token_embedding, dtype)
        self.ln_final = freeze(text.ln_final, dtype)
        self.register_buffer("positional_embedding", text.positional_embedding.detach().to(dtype))
        token = getattr(text, "cls_emb", None)
        self.register_buffer("class_token", None if token is None else token.detach().to(dtype))
        matrix, bias = _projection(text.text_projection)
        self.register_buffer("projection", None if matrix is None else matrix.to(dtype).clone())
        self.register_buffer("projection_bias", None if bias is None else bias.to(dtype).clone())
        self.is_causal = text.attn_mask is not None
        self.pooling = _pooling(text)
        self._end_id = int(getattr(text, "text_eos_id", getattr(text, "eos_id", -1)))
        self._pad_id = int(getattr(text, "pad_id", 0))
        self._masks_padding = token is not None or bool(getattr(text, "use_pad_mask", False))
        self._class_mask_last = bool(getattr(text, "correct_cls_mask", False))
        self.width = int(self.positional_embedding.shape[1])
        self.num_layers = len(text.transformer.resblocks)

    transformer: Any
    token_embedding: Any
    ln_final: Any
    class_token: Tensor | None
    projection: Tensor | None
    projection_bias: Tensor | None

    @property
    def may_cut(self) -> bool:
        """Whether what stands behind the last end token can be left out."""
        return (
            not self.refusal and self.is_causal and self.pooling in _END and not self._masks_padding
        )

    def cut(self, tokens: Tensor) -> Tensor:
        """Drop the columns of (N, L) token ids that no feature depends on."""
        if not self.may_cut:
            return tokens
        return tokens[:, : int(self._read_at(tokens).max()) + 1]

    def forward(self, tokens: Tensor, prompts: Sequence[Tensor] | None = None) -> Tensor:
        """Encode token ids (N, L) to raw features (N, D).

        A graph of more than `graph_bytes` is not kept: the rows go through in chunks, each of
        which is computed again in the backward pass, with the same gradients.

        Args:
            tokens: ids; where prompts are given all rows begin alike.
            prompts: one (P, width) tensor a prompted layer. The first replaces the embeddings
                of the P tokens from `context_start`, later ones what the block before made of
                them.

        Raises:
            ModelError: prompts for a tower that takes none, or rows that don't begin alike.
        """
        prompts = list(prompts or ())
        if self.refusal:
            if prompts:
                raise ModelError(f"{self.refusal}, so that it takes no prompts")
            features: Tensor = self.plain(tokens)
            return features
        tokens = self.cut(tokens)
        needs_graph = torch.is_grad_enabled() and any(p.requires_grad for p in prompts)
        row_bytes = _GRAPH_WIDTHS * self.width * self.num_layers * tokens.shape[1]
        row_bytes *= self.positional_embedding.element_size()
        if not needs_graph or row_bytes * len(tokens) <= self.graph_bytes:
            return self._encode(tokens, prompts)
        rows = max(1, self.graph_bytes // (4 * row_bytes))
        parts = [
            checkpoint(
                self._encode,
                self.cut(part),
                prompts,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for part in tokens.split(rows)
        ]
        return torch.cat(parts)

    def _encode(self, tokens: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        x: Tensor
        shared = self._shared_prefix(tokens, len(prompts[0]) if prompts else 0)
        if shared and self.may_cut:
            x = self._run_behind(shared, tokens, prompts)
        else:
            x = self._run_whole(tokens, prompts)
        x = self.ln_final(x)
        if self.projection is not None:
            x = x @ self.projection
        return x if self.projection_bias is None else x + self.projection_bias

    def _run_behind(self, shared: int, tokens: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """What the last block makes of the end tokens; the shared words go through once, not N times."""
        length, ends = tokens.shape[1], self._read_at(tokens)
        x = self.token_embedding(tokens[:, shared:]) + self.positional_embedding[shared:length]
        head = self.token_embedding(tokens[:1, :shared])
        if prompts:
            head = self._put_context(head, prompts[0])
        head = head + self.positional_embedding[:shared]
        mask = _causal(length, x)
        # The rest sees itself causally and, behind it, all of the shared words.
        seen = torch.cat([mask[shared:, shared:], mask[shared:, :shared]], dim=1)
        read = torch.arange(len(tokens), device=tokens.device), ends - shared
        for layer, block in enumerate(self.transformer.resblocks):
            if 0 < layer < len(prompts):
                head = self._put_context(head, prompts[layer])
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
        made: Tensor = x[:, 0]
        return made

    def _run_whole(self, tokens: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """What the last block makes of the tokens that are read, nothing cut or shared."""
        x = self.token_embedding(tokens)
        if prompts:
            x = self._put_context(x, prompts[0])
        if self.class_token is not None:
            x = torch.cat([x, self.class_token.expand(len(x), 1, -1)], dim=1)
        length = x.shape[1]
        x = x + self.positional_embedding[:length]
        mask = self._mask(tokens, x)
        read = torch.arange(len(tokens), device=tokens.device), self._read_at(tokens)
        for layer, block in enumerate(self.transformer.resblocks):
            if 0 < layer < len(prompts):
                x = self._put_context(x, prompts[layer])
            if layer < self.num_layers - 1:
                x = run_block(block, x, mask=None if mask is None else mask[:, None])
            else:
                rows = None if mask is None else mask.expand(len(x), -1, -1)[read][:, None, None]
                x = run_block(block, x, pick=lambda t: t[read][:, None], mask=rows)
        made: Tensor = x[:, 0]
        return made

    def _mask(self, tokens: Tensor, x: Tensor) -> Tensor | None:
        """What is added to the scores, (1 or N, L, L), or None."""
        mask = _causal(x.shape[1], x)[None] if self.is_causal else None
        if not self._masks_padding:
            return mask
        words = tokens != self._pad_id
        if self.class_token is not None:
            own = words.new_ones(len(words), 1)
            # CoCa's weights were trained with the mask of the class token in the wrong place.
            parts = [words, own] if self._class_mask_last else [own, words]
            words = torch.cat(parts, dim=1)
        padding = torch.zeros_like(words, dtype=x.dtype).masked_fill(~words, -math.inf)[:, None]
        return padding.expand(-1, x.shape[1], -1) if mask is None else mask + padding

    def _read_at(self, tokens: Tensor) -> Tensor:
        """The position (N,) whose outcome is the feature."""
        if self.class_token is not None:
            return tokens.new_full((len(tokens),), tokens.shape[1])
        if self.pooling == "argmax":
            return tokens.argmax(dim=-1)
        if self.pooling == "eos":
            return (tokens == self._end_id).int().argmax(dim=-1)
        return tokens.new_full((len(tokens),), tokens.shape[1] - 1 if self.pooling == "last" else 0)

    def _shared_prefix(self, tokens: Tensor, num_prompts: int) -> int:
        """How many leading tokens all rows have in common, prompts included; no end token."""
        start = self.context_start
        alike = (tokens == tokens[:1]).all(dim=0)
        alike[start : start + num_prompts] = True
        shared = min(int(alike.int().cumprod(0).sum()), int(self._read_at(tokens).min()))
        if shared < (start + num_prompts if num_prompts else 0):
            raise ModelError(
                f"the token rows don't all begin with {start} start tokens and {num_prompts} prompts"
            )
        return shared

    def _put_context(self, x: Tensor, context: Tensor) -> Tensor:
        """Replace P tokens of x (N, L, W) by `context` (P, W)."""
        start = self.context_start
        inner = context.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :start], inner, x[:, start + context.shape[0] :]], dim=1)


class _PlainText(nn.Module):
    """A text tower that is run as the library does."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.has_own = hasattr(model, "text")
        self.text: Any
        if self.has_own:
            self.text = copy_of(model.text, dtype)
            return
        visual, model.visual = model.visual, None  # not copied: it is large
        try:
            self.text = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
        finally:
            model.visual = visual

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids (N, L) → features (N, D)."""
        out: Any = self.text(tokens) if self.has_own else self.text.encode_text(tokens)
        features: Tensor = out[0] if isinstance(out, tuple) else out
        return features


def _causal(length: int, x: Tensor) -> Tensor:
    return torch.full((length, length), -math.inf, dtype=x.dtype, device=x.device).triu(1)


def _projection(given: Any) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(given, nn.Linear):
        bias = None if given.bias is None else given.bias.detach()
        return given.weight.detach().T, bias
    return (None if given is None else given.detach()), None


def _pooling(text: Any) -> str:
    return str(getattr(text, "text_pool_type", getattr(text, "pool_type", "")))


def refusal_of(model: Any) -> str:
    """Why a model's text tower takes no prompts; empty where it does."""
    text = getattr(model, "text", model)
    kind = type(text).__name__
    if not hasattr(getattr(text, "transformer", None), "resblocks"):
        return f"the text tower {kind} is not open_clip's own transformer"
    try:
        for block in text.transformer.resblocks:
            block_parts(block)
    except ModelError as error:
        return f"the text tower {kind} has {error}"
    if _pooling(text) not in (*_END, "last", "first"):
        return f"the text tower {kind} is read at no single token"
    return ""
