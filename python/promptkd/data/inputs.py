"""What a student takes for a picture: a path, a Pillow image, an array, a tensor, or many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from promptkd.data.pictures import Picture
from promptkd.data.sources import pictures_in
from promptkd.errors import DataError

ImageLike: TypeAlias = "Picture | NDArray[np.uint8] | Tensor"


def is_many(images: Any) -> bool:
    """Whether it is several pictures: a folder, a list or a stack."""
    if isinstance(images, str | os.PathLike):
        return Path(images).is_dir()
    if isinstance(images, bytes) or _is_slice(images):
        return False
    return isinstance(images, Sequence) or (
        isinstance(images, Tensor | np.ndarray) and images.ndim == 4
    )


def _is_slice(item: Any) -> bool:
    return isinstance(item, tuple) and [type(part) for part in item] == [str, int, int]


def as_list(images: Any) -> list[Any]:
    """The pictures one by one; those of a folder as paths, sorted by name.

    Raises:
        DataError: no pictures in the folder, or an array of another kind.
    """
    if isinstance(images, str | os.PathLike) and Path(images).is_dir():
        return list(pictures_in(Path(images)).paths)
    return [_as_source(item) for item in (images if is_many(images) else [images])]


def _as_source(item: Any) -> Any:
    """A path or Pillow image as it is; arrays (H, W, 3) and tensors (3, H, W) of uint8 as an image."""
    from PIL import Image

    if isinstance(item, Tensor):
        item = item.permute(1, 2, 0).cpu().numpy() if item.ndim == 3 else item.numpy()
    if not isinstance(item, np.ndarray):
        return item
    if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3:
        raise DataError(
            f"a picture of type {item.dtype} and shape {item.shape} is neither a uint8 array (H, W, 3), "
            "a uint8 tensor (3, H, W) nor a normalised float tensor (B, 3, H, W)"
        )
    return Image.fromarray(np.ascontiguousarray(item))
