"""The Rust extension: decodes pictures, cuts and resizes them, on all cores."""

import os
from collections.abc import Sequence
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Target",
    "configure",
    "decode",
    "decode_views",
    "image_key",
    "image_sizes",
    "random_views",
    "resize",
    "version",
]

@final
class Target:
    """One output of a decode: its size, and how a picture of another shape is fitted to it.

    "squash" stretches; "shortest" makes the shortest side fill the output and cuts the rest off
    around the centre; "longest" makes the longest side fill it and pads with `fill` around the
    centre. All are antialiased, with Pillow 12.1.1's own arithmetic, and round as open_clip does.

    Raises:
        ValueError: a side is not in 1 to 16384, or a name is unknown.
    """

    def __new__(
        cls,
        height: int,
        width: int,
        resize_mode: Literal["squash", "shortest", "longest"] = "squash",
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        fill: int = 0,
    ) -> Target: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def resize_mode(self) -> Literal["squash", "shortest", "longest"]: ...
    @property
    def interpolation(self) -> Literal["bicubic", "bilinear"]: ...
    @property
    def fill(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __getnewargs__(self) -> tuple[int, int, str, str, int]: ...

def decode(
    sources: Sequence[str | bytes | os.PathLike[str]],
    targets: Sequence[Target],
    *,
    boxes: NDArray[np.int64] | None = None,
    flips: NDArray[np.bool_] | None = None,
    orient: bool = False,
    threads: int = 0,
    max_pixels: int = 178_956_970,
    scaled: bool = False,
) -> tuple[list[NDArray[np.uint8]], list[tuple[int, str, str]]]:
    """Decode JPEG, PNG and WebP files (paths or their bytes), or a box of each.

    Args:
        sources: B paths or files in memory.
        targets: what is made of each picture.
        boxes: (B, 4) left, top, right, bottom in pixels (after the orientation if `orient`);
            no pixel outside the box is used.
        flips: (B,) whether the result is mirrored.
        orient: apply the EXIF orientation.
        threads: 0 is one for each processor.
        max_pixels: pictures of more pixels are refused.
        scaled: decode large JPEGs at a half, a quarter or an eighth of their size.

    Returns:
        A (B, H, W, 3) array a target, and the failures as (row, kind, message), where kind is
        missing, unreadable, empty, not_an_image, corrupt, truncated, unsupported or too_large
        and the message names the file. Failed rows are zero.

    Raises:
        ValueError: an array has not B rows.
    """

def decode_views(
    sources: Sequence[str | bytes | os.PathLike[str]],
    targets: Sequence[Target],
    *,
    seed: int,
    keys: NDArray[np.uint64],
    views: NDArray[np.uint32],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (0.75, 1.3333333333333333),
    flip: float = 0.5,
    orient: bool = False,
    threads: int = 0,
    max_pixels: int = 178_956_970,
    scaled: bool = False,
) -> tuple[list[NDArray[np.uint8]], list[tuple[int, str, str]]]:
    """Decode the view of each picture that `random_views` gives, reading each file once.

    Args:
        sources: B paths or files in memory.
        targets: what is made of each view.
        seed: of the run, below 2^64.
        keys: (B,) `image_key` of each picture.
        views: (B,) number of the view.
        scale: the box's share of the area.
        ratio: the box's width over its height, 3/4 to 4/3 unless told.
        flip: the chance of a mirrored view.
        orient: apply the EXIF orientation.
        threads: 0 is one for each processor.
        max_pixels: pictures of more pixels are refused.
        scaled: decode large JPEGs at a half, a quarter or an eighth of their size.

    Returns:
        As `decode`.

    Raises:
        ValueError: an array has not B rows, or a bound is no bound.
    """

def image_sizes(
    sources: Sequence[str | bytes | os.PathLike[str]],
    *,
    orient: bool = False,
    threads: int = 0,
) -> tuple[NDArray[np.int64], list[tuple[int, str, str]]]:
    """Width and height of pictures, from their headers.

    Returns:
        (B, 2) width and height (after the orientation if `orient`; 0 where it failed), and the
        failures as of `decode`.
    """

def random_views(
    seed: int,
    keys: NDArray[np.uint64],
    views: NDArray[np.uint32],
    sizes: NDArray[np.int64],
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (0.75, 1.3333333333333333),
    flip: float = 0.5,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Random crops and flips, a pure function of (seed, key, view), the same on every machine.

    The algorithm is torchvision's RandomResizedCrop; rust/src/view.rs defines the random numbers.

    Args:
        seed: of the run, below 2^64.
        keys: (B,) `image_key` of each picture.
        views: (B,) number of the view.
        sizes: (B, 2) width and height in pixels.
        scale: the box's share of the area.
        ratio: the box's width over its height, 3/4 to 4/3 unless told.
        flip: the chance of a mirrored view.

    Returns:
        (B, 4) left, top, right, bottom in pixels, and (B,) whether the view is mirrored.

    Raises:
        ValueError: the arrays disagree, a size is not positive, or a bound is no bound.
    """

def image_key(relative_path: str) -> int:
    """The key of a picture, below 2^64: from the BLAKE3 hash of its path relative to its root.

    The path is written with `/`; the key is the hash's first eight bytes, little endian.
    """

def resize(
    pixels: NDArray[np.uint8],
    targets: Sequence[Target],
    *,
    box: Sequence[int] | None = None,
    flip: bool = False,
) -> list[NDArray[np.uint8]]:
    """Cut and resize a picture that is already decoded.

    Args:
        pixels: (H, W, 3).
        targets: what is made of it.
        box: left, top, right, bottom in pixels.
        flip: whether the result is mirrored.

    Returns:
        An (H, W, 3) array a target.

    Raises:
        ValueError: `pixels` is not (H, W, 3), or the box does not lie in it.
    """

def configure(
    *,
    jpeg: Literal["auto", "libjpeg"] = "auto",
    simd: Literal["auto", "portable", "avx2", "avx512"] = "auto",
) -> None:
    """Choose the code that decodes, for tests and benchmarks: the pixels are the same.

    Args:
        jpeg: "libjpeg" leaves every JPEG file to libjpeg-turbo.
        simd: the instructions of the resize.

    Raises:
        ValueError: this processor has not these instructions.
    """

def version() -> str:
    """The version of the extension."""
