"""Frozen layers: the same numbers as the library's, at less cost, with gradients to inputs only.

A weight that never trains can be laid out once for the processor, for y = x Wᵀ and, transposed,
for the gradient g W; oneDNN does so through operators that torch keeps private. They are used
where they pay (`packs`) and where they exist; `F.linear` does the rest.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from promptkd.errors import ModelError

QUICK_GELU_SLOPE = 1.702
_MIN_ROWS = 16  # a product of fewer rows gains nothing from packed weights, which take memory


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Whether packed weights pay on this processor; never a matter of timing.

    bfloat16: wherever oneDNN computes it natively. float32: on AMD, where torch's MKL lags
    behind oneDNN. Everything else stays with `F.linear`.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        torch.ops.mkldnn._linear_pointwise  # noqa: B018 - does it exist?
        torch.ops.mkldnn._reorder_linear_weight  # noqa: B018
        native = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False
    if dtype == torch.bfloat16:
        return native
    has_avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return dtype == torch.float32 and has_avx2 and _cpu_vendor() == "AuthenticAMD"


@functools.cache
def _cpu_vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(found, "")


class _Packed:
    """One weight (out, in) in oneDNN's own layout, for both directions."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._forward = _pack(weight)
        self._backward: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        return _product(x, self._forward, self.bias)

    def gradient(self, grad: Tensor) -> Tensor:
        """Gradient to the output (..., out) → gradient to the input (..., in)."""
        if self._backward is None:
            self._backward = _pack(self.weight.t().contiguous())
        return _product(grad, self._backward, None)


def _pack(weight: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


class _PackedLinear(torch.autograd.Function):
    """y = x Wᵀ + b with packed weights; saves nothing, since W is constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: _Packed) -> Tensor:
        ctx.packed = packed
        return packed.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.packed.gradient(grads[0]), None


class FrozenLinear(nn.Module):
    """A linear layer whose weight never trains: y = x Wᵀ + b, gradients to x only."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._packs: dict[tuple[int, int], _Packed] = {}
        self._packed_from: tuple[Tensor, int, Tensor | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the packed weights, which are made again when needed."""
        return {**self.__dict__, "_packs": {}, "_packed_from": None}

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """x (..., in) → (..., out), or of the outputs only numbers start to stop."""
        stop = self.weight.shape[0] if stop is None else stop
        if not _can_pack(x, self.weight):
            weight, bias = self._rows(start, stop)
            return F.linear(x, weight, bias)
        packed = self._packed(start, stop)
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _PackedLinear.apply(x, packed)
            return y
        return packed.forward(x)

    def _matrix(self) -> Tensor:
        return self.weight

    def _rows(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return self._matrix()[start:stop], None if self.bias is None else self.bias[start:stop]

    def _packed(self, start: int, stop: int) -> _Packed:
        """The packed weights, made again when the plain ones have been moved or written to."""
        version = 0 if self.weight.is_inference() else self.weight._version
        known = self._packed_from
        if (
            known is None
            or known[0] is not self.weight
            or known[1] != version
            or known[2] is not self.bias
        ):
            self._packs = {}
            self._packed_from = (self.weight, version, self.bias)
        packed = self._packs.get((start, stop))
        if packed is None:  # two threads may both come here, which does no harm
            packed = self._packs[start, stop] = _Packed(*self._rows(start, stop))
        return packed


def _can_pack(x: Tensor, weight: Tensor) -> bool:
    return (
        not _is_traced()
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.device == weight.device
        and x.numel() >= _MIN_ROWS * x.shape[-1]
        and packs(x.dtype)
    )


def _is_traced() -> bool:
    """Exporters and compilers see plain operators."""
    return bool(torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None)


class FrozenPatches(FrozenLinear):
    """A convolution whose stride is its kernel: one product over the patches of the pictures."""

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Pictures (B, 3, H, W) → patches (B, L, width), row by row."""
        batch, channels, height, width = x.shape
        high, wide = self.weight.shape[2:]
        grid = x.reshape(batch, channels, height // high, high, width // wide, wide)
        rows = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * high * wide)
        return super().forward(rows, start, stop)

    def _matrix(self) -> Tensor:
        return self.weight.flatten(1)


class FrozenAttention(nn.Module):
    """Self-attention with the weights of an `nn.MultiheadAttention`.

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
        x: Tensor,
        *,
        extra: Tensor | None = None,
        pick: Callable[[Tensor], Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Self-attention over x (B, L, W).

        Args:
            x: the tokens.
            extra: (P, W) tokens, the same for every row, that are looked at but don't look:
                keys and values only.
            pick: (B, L, W) → (B, Q, W), the tokens that look; default: all.
            mask: added to the scores, of a shape that broadcasts to (B, heads, Q, L + P).
        """
        width = x.shape[-1]
        if pick is None:
            query, both = self.in_proj(x).split([width, 2 * width], dim=-1)
        else:
            query, both = self.in_proj(pick(x), 0, width), self.in_proj(x, width)
        if extra is not None:
            others = self.in_proj(extra, width).expand(x.shape[0], -1, -1)
            both = torch.cat([both, others], dim=1)
        key, value = both.split(width, dim=-1)
        heads = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        out = attend(*heads, mask=mask)
        joined: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return joined


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


class _QuickGelu(torch.autograd.Function):
    """x σ(1.702 x) = silu(1.702 x) / 1.702, in a third of the passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        steep = x * QUICK_GELU_SLOPE
        ctx.save_for_backward(steep)
        y: Tensor = F.silu(steep).mul_(1 / QUICK_GELU_SLOPE)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # The slope and its inverse cancel.
        gradient: Tensor = torch.ops.aten.silu_backward(grads[0], *ctx.saved_tensors)
        return gradient


class FrozenQuickGelu(nn.Module):
    """OpenAI's activation, x σ(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        if _is_traced():
            return x * torch.sigmoid(QUICK_GELU_SLOPE * x)
        y: Tensor = _QuickGelu.apply(x)
        return y


_recompute: ContextVar[bool] = ContextVar("recompute", default=False)


@contextmanager
def recomputing() -> Iterator[None]:
    """Within it blocks keep only their inputs, and compute the rest again in the backward pass."""
    token = _recompute.set(True)
    try:
        yield
    finally:
        _recompute.reset(token)


def run_block(
    block: Any,
    x: Tensor,
    *,
    extra: Tensor | None = None,
    pick: Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One frozen residual attention block of open_clip over x (B, L, W); see also `recomputing`.

    Args:
        block: the block, gone through `freeze`.
        x: the tokens.
        extra: (P, W) tokens that the others look at and that end with this block.
        pick: (B, L, W) → (B, Q, W), the tokens whose outcome is wanted; default: all.
        mask: added to the scores.
    """
    if _recompute.get() and torch.is_grad_enabled():
        out: Tensor = checkpoint(
            _run, block, x, extra, pick, mask, use_reentrant=False, preserve_rng_state=False
        )
        return out
    return _run(block, x, extra, pick, mask)


def _run(
    block: Any,
    x: Tensor,
    extra: Tensor | None,
    pick: Callable[[Tensor], Tensor] | None,
    mask: Tensor | None,
) -> Tensor:
    shown = None if extra is None else block.ln_1(extra)
    looked = block.attn(block.ln_1(x), extra=shown, pick=pick, mask=mask)
    x = (x if pick is None else pick(x)) + block.ls_1(looked)
    out: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return out


def freeze(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A private copy of `module` in `dtype`, frozen, with our own layers in place."""
    frozen = copy.deepcopy(module).to(dtype).eval()
    frozen.requires_grad_(False)
    for parent in list(frozen.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention:
                setattr(parent, name, FrozenAttention(child))
            elif type(child) is nn.Linear:
                setattr(parent, name, FrozenLinear(child.weight, child.bias))
            elif type(child).__name__ == "QuickGELU":
                setattr(parent, name, FrozenQuickGelu())
            elif type(child) is nn.Conv2d and _cuts_patches(child):
                setattr(parent, name, FrozenPatches(child.weight, child.bias))
    return frozen


def _cuts_patches(child: nn.Conv2d) -> bool:
    return (
        child.stride == child.kernel_size
        and child.groups == 1
        and child.padding == (0, 0)
        and child.dilation == (1, 1)
    )
