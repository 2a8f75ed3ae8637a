"""Pictures to pixels: the Rust decoder, with Pillow behind it for the formats it leaves out."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from promptkd import _rust
from promptkd.data.pictures import Picture, Source, fetch, name_of, renamed
from promptkd.errors import ImageError

Pixels: TypeAlias = list[NDArray[np.uint8]]
Failure: TypeAlias = tuple[int, str, str]
Box: TypeAlias = tuple[int, int, int, int]
Crop: TypeAlias = Callable[[int, tuple[int, int]], tuple[Box, bool]]
OnError: TypeAlias = Literal["raise", "skip"]

MAX_PIXELS = 178_956_970
"""The most pixels a picture may have, Pillow's own limit against decompression bombs."""

_PLUGINS = {"HEIC": "pillow-heif", "AVIF": "pillow-avif-plugin"}


def decode_images(
    pictures: Sequence[Picture],
    targets: Sequence[_rust.Target],
    *,
    boxes: NDArray[np.int64] | None = None,
    flips: NDArray[np.bool_] | None = None,
    orient: bool = False,
    threads: int = 0,
    on_error: OnError = "raise",
    max_pixels: int = MAX_PIXELS,
    scaled: bool = False,
    truncated: bool = False,
) -> tuple[Pixels, list[Failure]]:
    """Decode pictures, or a box of each, into arrays of fixed size.

    Args:
        pictures: paths, the bytes of files, parts of files as (path, offset, size), Pillow
            images, or rows of a dataset; B of them.
        targets: what is made of each picture.
        boxes: (B, 4) left, top, right, bottom in pixels (after the orientation if `orient`).
        flips: (B,) whether the result is mirrored.
        orient: apply the EXIF orientation.
        threads: how many threads decode; 0 is one for each processor.
        on_error: raise at the first picture that fails, or go on and list those that did.
        max_pixels: pictures of more pixels are refused.
        scaled: decode large JPEGs at a half, a quarter or an eighth of their size: faster, and
            no longer Pillow's exact pixels.
        truncated: decode JPEGs that were cut too, what is missing in grey, with the pixels of
            Pillow under `LOAD_TRUNCATED_IMAGES`; by default they are failures.

    Returns:
        A uint8 array (B, H, W, 3) a target, and the failures as (row, kind, message); failed
        rows are zero.

    Raises:
        ImageError: a picture can't be decoded and `on_error` is "raise".
    """
    sources, absent = fetch(pictures)
    pixels, failures = _rust.decode(
        files_of(sources),
        targets,
        boxes=boxes,
        flips=flips,
        orient=orient,
        threads=threads,
        max_pixels=max_pixels,
        scaled=scaled,
        truncated=truncated,
    )
    crop = box_crop(boxes, flips)
    failures = with_pillow(sources, targets, pixels, failures, crop, orient, max_pixels)
    return settle(pixels, renamed(pictures, failures, absent), on_error)


def decode_views(
    pictures: Sequence[Picture],
    targets: Sequence[_rust.Target],
    *,
    seed: int,
    keys: NDArray[np.uint64],
    views: NDArray[np.uint32],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    orient: bool = False,
    threads: int = 0,
    on_error: OnError = "raise",
    max_pixels: int = MAX_PIXELS,
    scaled: bool = False,
    truncated: bool = False,
) -> tuple[Pixels, list[Failure]]:
    """Decode a random view of each picture: a box and a flip from (seed, key, view) alone.

    Args:
        pictures: paths, the bytes of files, parts of files as (path, offset, size), Pillow
            images, or rows of a dataset; B of them.
        targets: what is made of each view.
        seed: of the run.
        keys: (B,) `_rust.image_key` of each picture's path relative to its root.
        views: (B,) number of the view of each picture.
        scale: the box's share of the area, lowest and highest.
        ratio: the box's width over its height, lowest and highest.
        flip: the chance of a mirrored view.
        orient: apply the EXIF orientation.
        threads: how many threads decode; 0 is one for each processor.
        on_error: raise at the first picture that fails, or go on and list those that did.
        max_pixels: pictures of more pixels are refused.
        scaled: as for `decode_images`.
        truncated: as for `decode_images`.

    Returns:
        As `decode_images`.

    Raises:
        ImageError: a picture can't be decoded and `on_error` is "raise".
    """
    sources, absent = fetch(pictures)
    pixels, failures = _rust.decode_views(
        files_of(sources),
        targets,
        seed=seed,
        keys=keys,
        views=views,
        scale=scale,
        ratio=ratio,
        flip=flip,
        orient=orient,
        threads=threads,
        max_pixels=max_pixels,
        scaled=scaled,
        truncated=truncated,
    )
    crop = view_crop(seed, keys, views, scale, ratio, flip)
    failures = with_pillow(sources, targets, pixels, failures, crop, orient, max_pixels)
    return settle(pixels, renamed(pictures, failures, absent), on_error)


def box_crop(boxes: NDArray[np.int64] | None, flips: NDArray[np.bool_] | None) -> Crop:
    """The box and flip of a row of a given size, for pictures that Pillow decodes."""

    def crop(row: int, size: tuple[int, int]) -> tuple[Box, bool]:
        left, top, right, bottom = (0, 0, *size) if boxes is None else boxes[row].tolist()
        return (left, top, right, bottom), flips is not None and bool(flips[row])

    return crop


def view_crop(
    seed: int,
    keys: NDArray[np.uint64],
    views: NDArray[np.uint32],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
) -> Crop:
    """As `box_crop`, for random views."""

    def crop(row: int, size: tuple[int, int]) -> tuple[Box, bool]:
        one = slice(row, row + 1)
        sizes = np.array([size], dtype=np.int64)
        boxes, flips = _rust.random_views(
            seed, keys[one], views[one], sizes, scale=scale, ratio=ratio, flip=flip
        )
        left, top, right, bottom = boxes[0].tolist()
        return (left, top, right, bottom), bool(flips[0])

    return crop


def files_of(sources: Sequence[Source]) -> list[str | bytes | tuple[str, int, int]]:
    """What Rust gets to see: nothing of a Pillow image."""
    return [
        b"" if isinstance(s, Image.Image) else s if isinstance(s, (bytes, tuple)) else os.fspath(s)
        for s in sources
    ]


def settle(
    pixels: Pixels, failures: list[Failure], on_error: OnError
) -> tuple[Pixels, list[Failure]]:
    """Raise for the first failure unless they are skipped."""
    if failures and on_error == "raise":
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise ImageError(failures[0][2] + more)
    return pixels, failures


def with_pillow(
    sources: Sequence[Source],
    targets: Sequence[_rust.Target],
    pixels: Pixels,
    failures: list[Failure],
    crop: Crop,
    orient: bool,
    max_pixels: int,
) -> list[Failure]:
    """Fill the rows that Rust leaves to Pillow; return the failures that stay."""
    left = []
    for failure in failures:
        row, kind, message = failure
        source = sources[row]
        if kind not in ("unsupported", "not_an_image") and not isinstance(source, Image.Image):
            left.append(failure)
            continue
        name = name_of(source, row)
        try:
            image = _open(source, orient, max_pixels)
            box, flip = crop(row, (image.shape[1], image.shape[0]))
            made = _rust.resize(image, targets, box=box, flip=flip)
        except UnidentifiedImageError:
            left.append((row, kind, message + _plugin(message)))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            left.append((row, "too_large", f"{name}: it is too large: {error}"))
        except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
            what = "truncated" if "truncated" in str(error) else "corrupt"
            left.append((row, what, f"{name}: Pillow can't decode it: {error}"))
        else:
            for array, result in zip(pixels, made, strict=True):
                array[row] = result
    return left


def _open(source: Source, orient: bool, max_pixels: int) -> NDArray[np.uint8]:
    """A picture as RGB (H, W, 3), through Pillow."""
    if isinstance(source, Image.Image):
        return _rgb(source, orient)
    if isinstance(source, tuple):
        path, offset, size = source
        with open(path, "rb") as file:
            file.seek(offset)
            source = file.read(size)
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise Image.DecompressionBombError(
                f"{width} x {height} pixels, more than the limit of {max_pixels}"
            )
        return _rgb(image, orient)


def _rgb(image: Image.Image, orient: bool) -> NDArray[np.uint8]:
    upright = ImageOps.exif_transpose(image) if orient else image
    return np.asarray(upright.convert("RGB"))


def _plugin(message: str) -> str:
    """The way out for a format that Pillow reads with a plug-in only."""
    for name, plugin in _PLUGINS.items():
        if f"a {name} file" in message or f"an {name} file" in message:
            return f" (to read {name}, install and register the Pillow plug-in {plugin})"
    return ""
