"""A tower's forward pass while training, in the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from promptkd.blocks import recomputing
from promptkd.towers import VisionTower

if TYPE_CHECKING:
    from promptkd.stages.run import TrainConfig


class Encoder:
    """Raw features of pictures, by the means that a config asks for; the values are the tower's."""

    def __init__(self, tower: VisionTower, config: TrainConfig) -> None:
        self._tower, self._config = tower, config
        self._compiled: Callable[[Tensor, list[Tensor]], Tensor] = (
            torch.compile(tower) if config.compile else tower
        )

    def __call__(self, pixels: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """Normalised pixels (B, 3, H, W), perhaps none → raw features (B, D) of what trains' type."""
        config = self._config
        if len(pixels) == 0:
            return pixels.new_zeros(0, self._tower.output_dim, dtype=config.compute_dtype)
        rows = config.micro_batch or len(pixels)
        if rows >= len(pixels) or not torch.is_grad_enabled():
            return self._run(pixels, list(prompts)).to(config.compute_dtype)
        # Nothing but the pixels is kept; each part's graph is made and used up in its turn.
        parts = [
            checkpoint(
                self._run, part, list(prompts), use_reentrant=False, preserve_rng_state=False
            )
            for part in pixels.split(rows)
        ]
        return torch.cat(parts).to(config.compute_dtype)

    def _run(self, pixels: Tensor, prompts: list[Tensor]) -> Tensor:
        with recomputing() if self._config.recompute else nullcontext():
            return self._compiled(pixels, prompts)


def graph_bytes(run: Callable[[], object], but: Sequence[Tensor] = ()) -> int:
    """Bytes that the graph of `run` holds for the backward pass.

    Args:
        run: a forward pass.
        but: tensors that are there anyway: pixels, weights.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outcome = run()  # kept until all is counted: a freed address would be used again
    for tensor in but:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del outcome
    return sum(kept.values())
