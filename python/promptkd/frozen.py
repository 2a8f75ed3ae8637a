"""Frozen layers: the same numbers as the library's, at less cost, with gradients to inputs only.

A weight that never trains can be laid out once for the processor, for y = x Wᵀ and, transposed,
for the gradient g W; oneDNN does so through operators that torch keeps private. They are used
where they pay (`packs`) and where they exist; `F.linear` does the rest.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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
        rows, columns = height // high, width // wide
        if rows * high < height or columns * wide < width:
            x = x[:, :, : rows * high, : columns * wide]  # as a convolution leaves out the rest
        grid = x.reshape(batch, channels, rows, high, columns, wide)
        flat = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * high * wide)
        return super().forward(flat, start, stop)

    def _matrix(self) -> Tensor:
        return self.weight.flatten(1)


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
