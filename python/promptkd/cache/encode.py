"""The teacher's features of views, always in batches of one size, so that bits repeat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from promptkd import _rust
from promptkd.cache.layout import WHOLE
from promptkd.cache.recipe import BATCH_ROWS
from promptkd.data.decode import decode_images, decode_views
from promptkd.data.loader import CropRecipe, prefetch, squashed, target
from promptkd.data.pictures import named, read_pictures
from promptkd.data.sources import ImageList
from promptkd.teacher import Teacher


@dataclass(frozen=True, slots=True)
class Pictures:
    """Decoded pictures of some rows.

    Attributes:
        pixels: (n, H, W, 3) uint8; failed rows are zero.
        hashes: (n,) checksum of each file's bytes.
        reasons: why pictures failed, by place.
    """

    pixels: NDArray[np.uint8]
    hashes: NDArray[np.uint64]
    reasons: dict[int, str]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The teacher's answer on up to `BATCH_ROWS` rows.

    Attributes:
        features: (n, D) unit rows on the teacher's device, padded to `BATCH_ROWS`.
        hashes: (n,) checksum of each file's bytes.
        reasons: why pictures failed, by place; their features mean nothing.
    """

    features: Tensor
    hashes: NDArray[np.uint64]
    reasons: dict[int, str]


class ViewEncoder:
    """Unit teacher features of any view of a list of pictures."""

    def __init__(
        self, teacher: Teacher, images: ImageList, crop: CropRecipe, *, seed: int, orient: bool
    ) -> None:
        self._teacher, self._images, self._crop = teacher, images, crop
        self._seed, self._orient = seed, orient
        self._keys = np.array([_rust.image_key(n) for n in images.names], dtype=np.uint64)
        wide = teacher.vision.dtype == torch.float64
        self.dtype = torch.float64 if wide else torch.float32

    def encode(self, view: int, start: int, stop: int) -> Iterator[Encoded]:
        """Rows `start` (a multiple of `BATCH_ROWS`) to `stop` of a view, batch by batch."""
        runs = [(view, i, min(i + BATCH_ROWS, stop)) for i in range(start, stop, BATCH_ROWS)]
        for pictures in prefetch(self._load, runs):
            yield Encoded(self._features(pictures.pixels), pictures.hashes, pictures.reasons)

    def _features(self, pixels: NDArray[np.uint8]) -> Tensor:
        padded = np.zeros((BATCH_ROWS, *pixels.shape[1:]), dtype=np.uint8)
        padded[: len(pixels)] = pixels
        clip = self._teacher.clip
        batch = torch.from_numpy(padded).to(clip.device)
        return self._teacher.encode_image(clip.preprocess.normalize(batch, self.dtype))

    def _load(self, view: int, start: int, stop: int) -> Pictures:
        paths = self._images.paths[start:stop]
        files, hashes, unreadable = read_pictures(paths)
        preprocess = self._teacher.preprocess
        if view == WHOLE:
            pixels, failed = decode_images(
                files, [target(preprocess)], orient=self._orient, on_error="skip"
            )
        else:
            pixels, failed = decode_views(
                files,
                [squashed(preprocess)],
                seed=self._seed,
                keys=self._keys[start:stop],
                views=np.full(len(files), view, dtype=np.uint32),
                scale=self._crop.scale,
                ratio=self._crop.ratio,
                flip=self._crop.flip,
                orient=self._orient,
                on_error="skip",
            )
        reasons = {row: named(paths[row], reason) for row, _, reason in failed}
        return Pictures(pixels[0], hashes, {**reasons, **unreadable})
