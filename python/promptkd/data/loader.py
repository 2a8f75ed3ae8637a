"""Pixels for the towers: seeded views of pictures, decoded ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from promptkd import _rust
from promptkd.clip import Preprocess
from promptkd.data.decode import decode_images, decode_views
from promptkd.data.sources import ImageList
from promptkd.errors import DataError

T = TypeVar("T")

MAX_FAILED_FRACTION = 0.05
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class CropRecipe:
    """Which boxes the training views are: share of the area, aspect ratio, chance of a flip."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5


class Failures:
    """Pictures that could not be read, by row, with the reason; too many end the run."""

    def __init__(self, images: ImageList) -> None:
        self.reasons: dict[int, str] = {}
        self._images = images

    def add(self, row: int, reason: str) -> None:
        """Record one; raise DataError above 5 % of the list."""
        self.join([{row: reason}])

    def join(self, found: Sequence[dict[int, str]]) -> None:
        """Record what others met with; raise DataError above 5 % of the list."""
        for reasons in found:
            self.reasons.update(reasons)
        if not self.reasons:
            return
        reason = next(reversed(self.reasons.values()))
        limit = max(1, int(MAX_FAILED_FRACTION * len(self._images)))
        if len(self.reasons) > limit:
            raise DataError(
                f"{len(self.reasons)} of {len(self._images)} pictures can't be read, more than "
                f"{limit}; the last: {reason}"
            )


class ViewLoader:
    """Decodes views of an `ImageList` for one or several towers.

    A view is a box and a flip in the picture's own pixels, a pure function of (seed, name of the
    picture, view number): every tower sees the same one, in every process.
    """

    def __init__(
        self,
        images: ImageList,
        preprocess: Sequence[Preprocess],
        crop: CropRecipe,
        *,
        seed: int,
        orient: bool,
    ) -> None:
        self.images = images
        self.failures = Failures(images)
        self._preprocess = preprocess
        self._targets, self._slots = _distinct([squashed(p) for p in preprocess])
        self._keys = np.array([_rust.image_key(n) for n in images.names], dtype=np.uint64)
        self._crop, self._seed, self._orient = crop, seed, orient

    def load(self, rows: Sequence[int], view: int) -> tuple[list[Tensor], list[int]]:
        """View number `view` of these rows.

        Returns:
            One uint8 tensor (B, H, W, 3) a tower, and the rows that could be read, in order.
        """
        good = [r for r in rows if r not in self.failures.reasons]
        keys = self._keys[good]
        pixels, failed = decode_views(
            [self.images.paths[r] for r in good],
            self._targets,
            seed=self._seed,
            keys=keys,
            views=np.full(len(good), view, dtype=np.uint32),
            scale=self._crop.scale,
            ratio=self._crop.ratio,
            flip=self._crop.flip,
            orient=self._orient,
            on_error="skip",
        )
        for place, _, reason in failed:
            self.failures.add(good[place], reason)
        tensors, kept = _without(pixels, {place for place, _, _ in failed})
        return [tensors[slot] for slot in self._slots], [good[place] for place in kept]


def load_whole(
    sources: Sequence[Any],
    preprocess: Sequence[Preprocess],
    *,
    orient: bool,
    on_error: Literal["raise", "skip"] = "raise",
) -> tuple[list[Tensor], list[int]]:
    """Whole pictures as each tower's own resize mode wants them (the test view).

    Returns:
        One uint8 tensor (B, H, W, 3) a tower, and the rows that could be read.

    Raises:
        ImageError: a picture that can't be read, unless `on_error` is "skip".
    """
    targets, slots = _distinct([target(p) for p in preprocess])
    pixels, failed = decode_images(sources, targets, orient=orient, on_error=on_error)
    tensors, kept = _without(pixels, {row for row, _, _ in failed})
    return [tensors[slot] for slot in slots], kept


def _without(pixels: Sequence[NDArray[np.uint8]], bad: set[int]) -> tuple[list[Tensor], list[int]]:
    """The arrays as tensors without the bad rows, and the rows that stay."""
    kept = [row for row in range(len(pixels[0])) if row not in bad]
    tensors = [torch.from_numpy(p) for p in pixels]
    return [t[kept] for t in tensors] if bad else tensors, kept


def target(preprocess: Preprocess) -> _rust.Target:
    """What the decoder is to make for a tower from a whole picture."""
    height, width = preprocess.size
    return _rust.Target(
        height, width, preprocess.resize_mode, preprocess.interpolation, preprocess.fill
    )


def squashed(preprocess: Preprocess) -> _rust.Target:
    """What the decoder is to make for a tower from a box: all of it, resized to the tower's size."""
    height, width = preprocess.size
    return _rust.Target(height, width, "squash", preprocess.interpolation, preprocess.fill)


def _distinct(targets: Sequence[_rust.Target]) -> tuple[list[_rust.Target], list[int]]:
    """The different targets, and for each of `targets` its place among them."""
    kept: list[_rust.Target] = []
    slots = []
    for wanted in targets:
        if wanted not in kept:
            kept.append(wanted)
        slots.append(kept.index(wanted))
    return kept, slots


def epoch_order(num_images: int, seed: int, epoch: int) -> list[int]:
    """A permutation of all rows, a pure function of (seed, epoch)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_images, generator=generator).tolist()


def split_batches(order: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Full batches; the last, partial one is dropped unless it is the only one."""
    full = [order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
    return full or [order]


def prefetch(
    function: Callable[..., T], arguments: Iterable[tuple[Any, ...]], depth: int = 2
) -> Iterator[T]:
    """Call `function` on each tuple of arguments, in order, at most `depth` results ahead."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="promptkd-loader")
    waiting = iter(arguments)
    try:
        queue = [pool.submit(function, *args) for args in islice(waiting, depth)]
        while queue:
            result = queue.pop(0).result()
            for args in islice(waiting, 1):
                queue.append(pool.submit(function, *args))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def chunks(num_rows: int, size: int = _CHUNK) -> list[list[int]]:
    """Rows 0..num_rows-1 in runs of `size`."""
    return [list(range(i, min(i + size, num_rows))) for i in range(0, num_rows, size)]
