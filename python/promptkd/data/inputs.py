"""What a student takes for a picture: a path, a Pillow image, an array, a tensor, or many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from promptkd.data.pictures import Picture
from promptkd.data.sources import ImageList, pictures_in, stands_for_many
from promptkd.errors import DataError

ImageLike: TypeAlias = "Picture | NDArray[np.uint8] | Tensor"


def is_many(images: Any) -> bool:
    """Whether it is several pictures: a folder, shards, a list or a stack."""
    if isinstance(images, str | os.PathLike):
        return stands_for_many(images)
    if isinstance(images, ImageList):
        return True
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
    return with_names(images)[0]


def with_names(images: Any) -> tuple[list[Any], list[str | None]]:
    """The pictures one by one, and what each is called: its path, or its shard and its name there.

    Raises:
        DataError: as `as_list`.
    """
    if isinstance(images, str | os.PathLike) and stands_for_many(images):
        images = pictures_in(images)
    if isinstance(images, ImageList):
        pairs = zip(images.paths, images.names, strict=True)
        return list(images.paths), [_called(picture, name) for picture, name in pairs]
    items = [_as_source(item) for item in (images if is_many(images) else [images])]
    return items, [_path_of(item) for item in items]


def together(places: Sequence[str]) -> ImageList:
    """The pictures of several paths, in their order: folders, lists, shards and single pictures."""
    found = [
        pictures_in(place) if stands_for_many(place) else ImageList((place,), (place,))
        for place in places
    ]
    paths = tuple(path for images in found for path in images.paths)
    return ImageList(paths, tuple(name for images in found for name in images.names))


def _called(picture: Any, name: str) -> str:
    """A file's path; in a shard the shard's path and the picture's name there; else `name`."""
    if not _is_slice(picture):
        return _path_of(picture) or name
    inside = name.partition(f"{os.path.basename(picture[0])}/")[2]
    return f"{picture[0]}/{inside or name}"


def _path_of(picture: Any) -> str | None:
    return str(os.fspath(picture)) if isinstance(picture, str | os.PathLike) else None


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
