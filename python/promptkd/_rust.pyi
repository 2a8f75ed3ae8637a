"""The Rust extension: decodes pictures, cuts and resizes them, on all cores."""

import os
from collections.abc import Sequence
from typing import Literal, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BatchStream",
    "CacheReader",
    "Index",
    "IndexWriter",
    "Target",
    "configure",
    "decode",
    "decode_views",
    "epoch_rows",
    "image_key",
    "image_sizes",
    "inspect_shard",
    "normalize",
    "random_views",
    "read_files",
    "read_tensor",
    "resize",
    "tar_members",
    "verify_shard",
    "version",
    "write_shard",
]

_Source: TypeAlias = str | bytes | os.PathLike[str] | tuple[str, int, int]

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
    sources: Sequence[_Source],
    targets: Sequence[Target],
    *,
    boxes: NDArray[np.int64] | None = None,
    flips: NDArray[np.bool_] | None = None,
    orient: bool = False,
    threads: int = 0,
    max_pixels: int = 178_956_970,
    scaled: bool = False,
    truncated: bool = False,
) -> tuple[list[NDArray[np.uint8]], list[tuple[int, str, str]]]:
    """Decode JPEG, PNG and WebP files (paths or their bytes), or a box of each.

    Args:
        sources: B paths, files in memory, or parts of files as (path, offset, size).
        targets: what is made of each picture.
        boxes: (B, 4) left, top, right, bottom in pixels (after the orientation if `orient`);
            no pixel outside the box is used.
        flips: (B,) whether the result is mirrored.
        orient: apply the EXIF orientation.
        threads: 0 is one for each processor.
        max_pixels: pictures of more pixels are refused.
        scaled: decode large JPEGs at a half, a quarter or an eighth of their size.
        truncated: decode JPEGs that were cut too, as Pillow does under LOAD_TRUNCATED_IMAGES.

    Returns:
        A (B, H, W, 3) array a target, and the failures as (row, kind, message), where kind is
        missing, unreadable, empty, not_an_image, corrupt, truncated, unsupported or too_large
        and the message names the file. Failed rows are zero.

    Raises:
        ValueError: an array has not B rows.
    """

def decode_views(
    sources: Sequence[_Source],
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
    truncated: bool = False,
) -> tuple[list[NDArray[np.uint8]], list[tuple[int, str, str]]]:
    """Decode the view of each picture that `random_views` gives, reading each file once.

    Args:
        sources: B paths, files in memory, or parts of files as (path, offset, size).
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
        truncated: decode JPEGs that were cut too, as Pillow does under LOAD_TRUNCATED_IMAGES.

    Returns:
        As `decode`.

    Raises:
        ValueError: an array has not B rows, or a bound is no bound.
    """

def image_sizes(
    sources: Sequence[_Source],
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
    jpeg: Literal["auto", "libjpeg", "entropy"] = "auto",
    simd: Literal["auto", "portable", "avx2", "avx512"] = "auto",
) -> None:
    """Choose the code that decodes, for tests and benchmarks: the pixels are the same.

    Args:
        jpeg: "libjpeg" leaves every JPEG file to libjpeg-turbo; "entropy" only reads plain files,
            and their pixels mean nothing: it tells how fast decoding could be at most.
        simd: the instructions of the resize, and AVX-512 of the transform and the colours too.

    Raises:
        ValueError: this processor has not these instructions.
    """

def version() -> str:
    """The version of the extension."""

@final
class CacheReader:
    """Rows of one view of a teacher cache, gathered from its shards; files are mapped when read.

    Args:
        paths: the shards.
        starts: first row of each shard, then the number of rows.
        expected: what every shard's metadata must hold.
        checks: compare each block of data with its checksum when it is first read.

    Raises:
        OSError: a shard is missing or can't be read.
        ValueError: a shard is damaged or belongs elsewhere, or the arguments don't fit.
    """

    def __new__(
        cls,
        paths: Sequence[str | os.PathLike[str]],
        starts: Sequence[int],
        expected: dict[str, str],
        *,
        checks: bool = True,
    ) -> CacheReader: ...
    def __len__(self) -> int: ...
    def describe(self, name: str) -> tuple[str, list[int]]:
        """Type (as safetensors names it) and shape of a row of a tensor."""

    def gather(
        self,
        name: str,
        rows: NDArray[np.int64],
        out: NDArray[np.uint8],
        *,
        threads: int = 0,
    ) -> None:
        """Copy rows (B,) of a tensor into `out`, the bytes of a buffer of B rows.

        `threads` 0 is one for each processor; small copies take one.
        """

    def advise(self, start: int, stop: int, *, wanted: bool = True) -> None:
        """Have the shards of these rows read ahead, or (not wanted) let their pages go."""

def write_shard(
    path: str | os.PathLike[str],
    temporary: str | os.PathLike[str],
    metadata: Sequence[tuple[str, str]],
    tensors: Sequence[tuple[str, str, Sequence[int], NDArray[np.uint8]]],
) -> None:
    """Write a safetensors file with checksums: to a temporary name, synced, then renamed.

    Args:
        path: the file.
        temporary: where it is written first, in the same folder.
        metadata: texts by name, in this order.
        tensors: (name, type as safetensors names it, shape, bytes) each.

    Raises:
        OSError: it can't be written; what was at `path` stays.
        ValueError: a tensor's bytes don't fit its shape.
    """

def inspect_shard(
    path: str | os.PathLike[str],
) -> tuple[dict[str, str], list[tuple[str, str, list[int]]]]:
    """The metadata of a shard, and (name, type, shape) of its tensors; the header is checked.

    Raises:
        OSError: it is missing or can't be read.
        ValueError: it is damaged.
    """

def read_tensor(path: str | os.PathLike[str], name: str) -> bytes:
    """The bytes of one tensor of a shard; their checksums are compared.

    Raises:
        OSError: it is missing or can't be read.
        ValueError: it is damaged, or holds no such tensor.
    """

def verify_shard(path: str | os.PathLike[str]) -> list[str]:
    """The damaged blocks of a shard, in words: where they lie and what they hold.

    Raises:
        OSError: it is missing or can't be read.
        ValueError: its header or its length is damaged.
    """

def read_files(
    sources: Sequence[_Source], *, threads: int = 0
) -> tuple[list[bytes], NDArray[np.uint64], list[tuple[int, str]]]:
    """Read files whole, or parts of them as (path, offset, size).

    Returns:
        Their bytes, the first eight bytes of the BLAKE3 hash of each, little endian, and
        (row, message) of those that can't be read, whose bytes are empty.
    """

@final
class BatchStream:
    """Decodes batches in the background, in order, a bounded number of them ahead.

    It belongs to the process that made it. Dropping it stops the batch in progress.

    Raises:
        ValueError: `depth` is not in 1 to 1024.
    """

    def __new__(
        cls,
        targets: Sequence[Target],
        *,
        depth: int = 2,
        orient: bool = False,
        threads: int = 0,
        max_pixels: int = 178_956_970,
        scaled: bool = False,
        truncated: bool = False,
    ) -> BatchStream: ...
    @property
    def pending(self) -> int:
        """Batches whose results have not been taken."""

    def submit(
        self,
        sources: Sequence[_Source],
        *,
        boxes: NDArray[np.int64] | None = None,
        flips: NDArray[np.bool_] | None = None,
    ) -> None:
        """Hand in a batch, as to `decode`.

        Raises:
            ValueError: `depth` batches are pending, or an array has not B rows.
            RuntimeError: the stream was made in another process.
        """

    def submit_views(
        self,
        sources: Sequence[_Source],
        *,
        seed: int,
        keys: NDArray[np.uint64],
        views: NDArray[np.uint32],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (0.75, 1.3333333333333333),
        flip: float = 0.5,
    ) -> None:
        """Hand in a batch, as to `decode_views`.

        Raises:
            ValueError: `depth` batches are pending, or an array has not B rows.
            RuntimeError: the stream was made in another process.
        """

    def take(self) -> tuple[list[NDArray[np.uint8]], list[tuple[int, str, str]]]:
        """Wait for the oldest batch; Ctrl-C ends the wait.

        Returns:
            As `decode`.

        Raises:
            ValueError: no batch is pending.
            RuntimeError: the stream was made in another process.
        """

@final
class Index:
    """A list of names on disk, opened in no time and read where asked.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no index, or it was cut.
    """

    def __new__(cls, path: str | os.PathLike[str]) -> Index: ...
    def __len__(self) -> int: ...
    def names(self, rows: NDArray[np.uint64]) -> list[str]:
        """The names of these rows.

        Raises:
            ValueError: there is no such row, or the file is damaged.
        """

    def keys(self, rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The keys of these rows: `image_key` of their names, (B,).

        Raises:
            ValueError: there is no such row, or the file is damaged.
        """

@final
class IndexWriter:
    """Writes an index; the file appears under its name when it is complete.

    Raises:
        OSError: the file can't be written.
    """

    def __new__(cls, path: str | os.PathLike[str]) -> IndexWriter: ...
    def add(self, names: Sequence[str]) -> None:
        """Append names."""

    def finish(self) -> int:
        """Complete the file; return the number of names."""

def epoch_rows(
    num_rows: int,
    *,
    seed: int,
    epoch: int,
    start: int,
    count: int,
    rank: int = 0,
    world: int = 1,
) -> NDArray[np.uint64]:
    """The rows at some places of an epoch's order, for any number of rows, in no memory.

    The order is a keyed permutation (rust/src/order.rs). Rank r takes every `world`-th place from
    r on, so each row falls to one rank.

    Args:
        num_rows: rows in all.
        seed: of the run.
        epoch: number of the epoch.
        start: the rank's first place, to resume from.
        count: places wanted; fewer come at the end of the epoch.
        rank: of this process.
        world: number of processes.

    Returns:
        (count,) rows.

    Raises:
        ValueError: the rank is not below `world`.
    """

def tar_members(
    path: str | os.PathLike[str],
) -> tuple[list[tuple[str, int, int]], tuple[int, str, str] | None]:
    """The files in a tar archive as (name, offset, size), or a failure as of `decode`."""

def normalize(
    pixels: NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    threads: int = 0,
) -> NDArray[np.float32]:
    """Pixels to normalised planes, bit-equal to torchvision's ToTensor and Normalize.

    Args:
        pixels: (B, H, W, 3).
        mean: of each channel, in 0 to 1.
        std: of each channel.
        threads: 0 is one for each processor.

    Returns:
        (B, 3, H, W) of (pixels / 255 - mean) / std.

    Raises:
        ValueError: `pixels` is not (B, H, W, 3).
    """
