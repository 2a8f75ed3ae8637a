"""Frozen self-attention, with the weights of open_clip's and of timm's own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from promptkd.errors import ModelError
from promptkd.frozen import FrozenLinear


class AttentionParts(NamedTuple):
    """What self-attention is made of, whatever layer it was read from.

    Attributes:
        in_weight, in_bias: of queries, keys and values, stacked: (3 A, W) and (3 A,) or None.
        out: the output projection, A → W.
        num_heads: that A is divided into.
        norms: of a head's queries, of its keys, and of all heads' outcome; None: none.
        in_halves: rotary pairs lie half a head apart, not side by side.
    """

    in_weight: Tensor
    in_bias: Tensor | None
    out: Any
    num_heads: int
    norms: tuple[nn.Module | None, nn.Module | None, nn.Module | None] = (None, None, None)
    in_halves: bool = False


def read_attention(source: Any) -> AttentionParts:
    """The parts of an attention layer of torch or timm.

    Raises:
        ModelError: a kind of layer that is not known; the message names it.
    """
    kind = type(source).__name__
    if type(source) is nn.MultiheadAttention:
        if source.in_proj_weight is None or source.bias_k is not None or not source.batch_first:
            raise ModelError("attention layers with separate or extra projections")
        return AttentionParts(
            source.in_proj_weight, source.in_proj_bias, source.out_proj, source.num_heads
        )
    if kind not in ("Attention", "EvaAttention", "AttentionRope") or not hasattr(source, "proj"):
        raise ModelError(f"attention layers of the kind {kind}")
    if getattr(source, "gate", None) is not None or getattr(source, "num_kv_groups", 1) != 1:
        raise ModelError("attention layers with gates or grouped heads")
    weight, bias = _stacked(source)
    norms = tuple(
        None if isinstance(norm, nn.Identity) else norm
        for norm in (source.q_norm, source.k_norm, getattr(source, "norm", nn.Identity()))
    )
    in_halves = bool(getattr(source, "rotate_half", False))
    return AttentionParts(weight, bias, source.proj, source.num_heads, norms, in_halves)  # type: ignore[arg-type]


def _stacked(source: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of queries, keys and values in one, of a layer of timm."""
    if source.qkv is not None:
        bias = source.qkv.bias
        if getattr(source, "q_bias", None) is not None:
            bias = torch.cat([source.q_bias, torch.zeros_like(source.q_bias), source.v_bias])
        return source.qkv.weight, bias
    parts = (source.q_proj, source.k_proj, source.v_proj)
    weight = torch.cat([p.weight for p in parts])
    if all(p.bias is None for p in parts):
        return weight, None
    # EVA's keys have no bias: one that is the same for all keys would change nothing.
    biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts]
    return weight, torch.cat(biases)


class FrozenAttention(nn.Module):
    """Self-attention with the weights of a layer that `read_attention` knows.

    One product for queries, keys and values on contiguous rows and a fused attention, where
    torch's own module takes a detour over transposed views.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        parts = read_attention(source)
        self.num_heads = parts.num_heads
        self.width = len(parts.in_weight) // 3
        self.in_proj = FrozenLinear(parts.in_weight, parts.in_bias)
        self.out_proj = FrozenLinear(parts.out.weight, parts.out.bias)
        self.q_norm, self.k_norm, self.norm = parts.norms
        self._in_halves = parts.in_halves

    def forward(
        self,
        x: Tensor,
        *,
        extra: Tensor | None = None,
        pick: Callable[[Tensor], Tensor] | None = None,
        mask: Tensor | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Self-attention over x (B, L, W).

        Args:
            x: the tokens.
            extra: (P, W) tokens, the same for every row, that are looked at but don't look:
                keys and values only.
            pick: (B, L, W) → (B, Q, W), the tokens that look; default: all.
            mask: added to the scores, of a shape that broadcasts to (B, heads, Q, L + P).
            rope: (2, L + P, A / heads), cosine and sine of the angle that each token, extra ones
                included, is turned by.
        """
        width = self.width
        if pick is None:
            query, both = self.in_proj(x).split([width, 2 * width], dim=-1)
        else:
            query, both = self.in_proj(pick(x), 0, width), self.in_proj(x, width)
        if extra is not None:
            others = self.in_proj(extra, width).expand(x.shape[0], -1, -1)
            both = torch.cat([both, others], dim=1)
        key, value = both.split(width, dim=-1)
        query, key, value = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value)
        )
        query = query if self.q_norm is None else self.q_norm(query)
        key = key if self.k_norm is None else self.k_norm(key)
        if rope is not None:
            seen = rope[:, : x.shape[1]]
            query = turn(query, seen if pick is None else pick(seen), in_halves=self._in_halves)
            key = turn(key, rope, in_halves=self._in_halves)
        out = attend(query, key, value, mask=mask).transpose(1, 2).flatten(2)
        joined: Tensor = self.out_proj(out if self.norm is None else self.norm(out))
        return joined


def turn(x: Tensor, rope: Tensor, *, in_halves: bool) -> Tensor:
    """Turn each pair of numbers of x (B, heads, L, d) by the angles of rope (2, L, d)."""
    cosine, sine = rope
    if in_halves:
        first, second = x.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
    else:
        across = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    turned: Tensor = (x * cosine + across * sine).to(x.dtype)
    return turned


def attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + mask) v over (B, heads, L, d).

    On a CPU torch's fused kernel is at its best in float32; in bfloat16 plain products take less
    than half its time.
    """
    if query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = query @ (key * query.shape[-1] ** -0.5).transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    looked: Tensor = scores.softmax(dim=-1) @ value
    return looked
