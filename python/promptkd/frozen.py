"""Frozen layers: the same numbers as the library's, at less cost, with gradients to inputs only."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from promptkd.errors import ModelError


class FrozenLinear(nn.Module):
    """A linear layer whose weight never trains: y = x Wᵀ + b, gradients to x only."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        return F.linear(x, self.weight, self.bias)


class FrozenAttention(nn.Module):
    """Self-attention with the weights of an `nn.MultiheadAttention`, called the same way.

    One product for queries, keys and values on contiguous rows and a fused attention, where
    the library's module takes a detour over transposed views.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        if source.in_proj_weight is None or source.bias_k is not None or not source.batch_first:
            raise ModelError("this attention layer has separate or extra projections: unsupported")
        self.num_heads = source.num_heads
        self.in_proj = FrozenLinear(source.in_proj_weight, source.in_proj_bias)
        self.out_proj = FrozenLinear(source.out_proj.weight, source.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Self-attention over query (B, L, D); attn_mask (L, L) is added to the scores."""
        batch, length, width = query.shape
        qkv = self.in_proj(query).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, width)), None


def freeze(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A private copy of `module` in `dtype`, frozen, with our linear and attention layers."""
    frozen = copy.deepcopy(module).to(dtype).eval()
    frozen.requires_grad_(False)
    for parent in list(frozen.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention:
                setattr(parent, name, FrozenAttention(child))
            elif type(child) is nn.Linear:
                setattr(parent, name, FrozenLinear(child.weight, child.bias))
    return frozen
