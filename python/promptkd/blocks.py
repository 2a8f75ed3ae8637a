"""Residual attention blocks of open_clip and timm, run one by one with frozen layers in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from promptkd.attention import FrozenAttention
from promptkd.errors import ModelError
from promptkd.frozen import FrozenLinear, FrozenPatches, FrozenQuickGelu

_recompute: ContextVar[bool] = ContextVar("recompute", default=False)


@contextmanager
def recomputing() -> Iterator[None]:
    """Within it blocks keep only their inputs, and compute the rest again in the backward pass."""
    token = _recompute.set(True)
    try:
        yield
    finally:
        _recompute.reset(token)


Pick: TypeAlias = Callable[[Tensor], Tensor]


def run_block(
    block: Any,
    x: Tensor,
    *,
    extra: Tensor | None = None,
    pick: Pick | None = None,
    mask: Tensor | None = None,
    rope: Tensor | None = None,
) -> Tensor:
    """One frozen residual attention block over x (B, L, W); see also `recomputing`.

    Args:
        block: the block, of a kind that `block_parts` knows, gone through `freeze`.
        x: the tokens.
        extra: (P, W) tokens that the others look at and that end with this block.
        pick: (B, L, W) → (B, Q, W), the tokens whose outcome is wanted; default: all.
        mask: added to the scores.
        rope: rotations of all tokens, see `promptkd.attention.FrozenAttention`.
    """
    if _recompute.get() and torch.is_grad_enabled():
        out: Tensor = checkpoint(
            _run, block, x, extra, pick, mask, rope, use_reentrant=False, preserve_rng_state=False
        )
        return out
    return _run(block, x, extra, pick, mask, rope)


def _run(
    block: Any,
    x: Tensor,
    extra: Tensor | None,
    pick: Pick | None,
    mask: Tensor | None,
    rope: Tensor | None,
) -> Tensor:
    parts = block_parts(block)
    shown = None if extra is None else parts.before_attention(extra)
    tokens = parts.before_attention(x)
    looked = parts.attention(tokens, extra=shown, pick=pick, mask=mask, rope=rope)
    x = (x if pick is None else pick(x)) + parts.after_attention(looked)
    out: Tensor = x + parts.after_mlp(parts.mlp(parts.before_mlp(x)))
    return out


class BlockParts(NamedTuple):
    """x + after(attention(before(x))), then the same with the MLP."""

    before_attention: Any
    attention: Any
    after_attention: Any
    before_mlp: Any
    mlp: Any
    after_mlp: Any


def block_parts(block: Any) -> BlockParts:
    """The parts of a residual attention block of open_clip or timm.

    Raises:
        ModelError: a kind of block that is not known.
    """
    b = block
    match type(block).__name__:
        case "ResidualAttentionBlock":
            return BlockParts(b.ln_1, b.attn, b.ls_1, b.ln_2, b.mlp, b.ls_2)
        case "Block" if hasattr(b, "ls1"):
            return BlockParts(b.norm1, b.attn, b.ls1, b.norm2, b.mlp, b.ls2)
        case "EvaBlock":
            scales = _scaled_by(b.gamma_1), _scaled_by(b.gamma_2)
            return BlockParts(b.norm1, b.attn, scales[0], b.norm2, b.mlp, scales[1])
        case "EvaBlockPostNorm":
            return BlockParts(_same, b.attn, b.norm1, _same, b.mlp, b.norm2)
    raise ModelError(f"blocks of the kind {type(block).__name__}")


def _same(x: Tensor) -> Tensor:
    return x


def _scaled_by(scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    return _same if scale is None else lambda x: scale * x


def copy_of(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A private copy of `module` in `dtype` that doesn't train."""
    copied = copy.deepcopy(module).to(dtype).eval()
    return copied.requires_grad_(False)


def freeze(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A private copy of `module` in `dtype`, frozen, with our own layers in place.

    Attention is replaced in blocks alone, since pooling layers call theirs in ways of their own;
    convolutions are left to who knows how they are called.
    """
    frozen = copy_of(module, dtype)
    for parent in list(frozen.modules()):
        for name, child in list(parent.named_children()):
            if name == "attn" and is_block(parent):
                setattr(parent, name, FrozenAttention(child))
            elif type(child) is nn.Linear:
                setattr(parent, name, FrozenLinear(child.weight, child.bias))
            elif type(child).__name__ == "QuickGELU":
                setattr(parent, name, FrozenQuickGelu())
    return frozen


def is_block(module: nn.Module) -> bool:
    """Whether `run_block` knows this kind of module."""
    try:
        block_parts(module)
    except ModelError:
        return False
    return True


def freeze_patches(parent: Any, name: str) -> bool:
    """Put `FrozenPatches` in the place of a convolution over patches; whether it was one."""
    conv = getattr(parent, name, None)
    if type(conv) is not nn.Conv2d or not _cuts_patches(conv):
        return False
    setattr(parent, name, FrozenPatches(conv.weight, conv.bias))
    return True


def _cuts_patches(conv: nn.Conv2d) -> bool:
    return (
        conv.stride == conv.kernel_size
        and conv.groups == 1
        and conv.padding == (0, 0)
        and conv.dilation == (1, 1)
    )
