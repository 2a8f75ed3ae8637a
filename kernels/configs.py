"""The fixed table from shape to kernel and tile: no timing, so the same call gives the same bits.

Tiles were chosen by what compiles without spills for compute capability 8.0, 9.0 and 10.0;
`tests/kernels/test_compile.py` compiles every line of the table.
"""

from dataclasses import dataclass
from typing import Literal

Teacher = Literal["features", "logits", "none"]  # none: statistics, or one side alone
Design = Literal["small", "split", "hybrid"]

HYBRID_BATCH = 128
HYBRID_CLASSES = 20_000
PROGRAMS = 264  # two for each multiprocessor of an H100; more gain nothing
SCRATCH_BYTES = 32 << 20  # of p_s - p_t in the hybrid design


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows x classes of logits, columns of D a step, and how the compiler lays them out."""

    rows: int
    classes: int
    width: int
    num_warps: int
    num_stages: int


# By bytes an element, then by the largest number of classes (SMALL) or width (SPLIT).
SMALL_TILES = {
    2: {
        64: Tile(16, 64, 64, 4, 3),
        128: Tile(16, 128, 64, 8, 2),
        256: Tile(16, 256, 32, 8, 2),
        512: Tile(16, 512, 32, 8, 2),
    },
    4: {64: Tile(16, 64, 32, 4, 2), 128: Tile(16, 128, 32, 8, 2)},
}
SPLIT_TILES = {
    2: {768: Tile(16, 32, 32, 8, 2), 1024: Tile(16, 32, 32, 8, 2)},
    4: {768: Tile(16, 32, 32, 8, 2)},
}
# One tile for both kernels of the hybrid: e^(z - lse) is a probability only where z has the bits
# that lse was made of, and how a product is summed may depend on the tile's shape.
HYBRID_TILES = {2: Tile(64, 64, 32, 8, 3), 4: Tile(64, 64, 16, 8, 2)}
TOP_K_TILES = {2: Tile(16, 128, 32, 8, 2), 4: Tile(16, 64, 32, 8, 2)}
TOP_K_LARGEST = 64  # more go through plain torch, a tile of classes at a time


def choose_design(
    batch: int, num_classes: int, width: int, element_size: int, teacher: Teacher
) -> Design:
    """Return the design for a shape."""
    if num_classes <= max(SMALL_TILES[element_size]) and teacher != "none":
        return "small"
    if not fits_split(width, element_size) or (
        batch >= HYBRID_BATCH and num_classes > HYBRID_CLASSES
    ):
        return "hybrid"
    return "split"


def small_tile(num_classes: int, element_size: int) -> Tile:
    """Return the tile whose row holds all classes."""
    tile = _first_fit(SMALL_TILES[element_size], num_classes)
    classes = max(16, next_power_of_two(num_classes))
    return Tile(tile.rows, classes, tile.width, tile.num_warps, tile.num_stages)


def fits_split(width: int, element_size: int) -> bool:
    """Return whether o of 16 rows of that width fits in registers."""
    return width <= max(SPLIT_TILES[element_size])


def split_tile(width: int, element_size: int) -> Tile:
    """Return the tile beside which o of that width fits in registers."""
    return _first_fit(SPLIT_TILES[element_size], width)


def _first_fit(table: dict[int, Tile], size: int) -> Tile:
    return next(tile for limit, tile in table.items() if size <= limit)


def split_classes(batch: int, num_classes: int, tile: Tile) -> tuple[int, int]:
    """Return (splits of the classes, tiles a split) such that no split is empty."""
    tiles = -(-num_classes // tile.classes)
    row_blocks = -(-batch // tile.rows)
    tiles_per_split = -(-tiles // max(1, min(tiles, PROGRAMS // row_blocks)))
    return -(-tiles // tiles_per_split), tiles_per_split


def split_width(width: int) -> tuple[int, int]:
    """Return D <= 1024 as two powers of two that cover it, the second 0 where one is enough."""
    first = min(512, max(16, 1 << (width.bit_length() - 1)))
    rest = width - first
    return first, max(16, next_power_of_two(rest)) if rest > 0 else 0


def chunk_classes(batch: int, num_classes: int, element_size: int, tile: Tile) -> int:
    """Return how many classes the hybrid's scratch holds: whole tiles, never all classes."""
    limit = min(SCRATCH_BYTES // (element_size * batch), -(-num_classes // 2))
    return max(tile.classes, limit // tile.classes * tile.classes)


def next_power_of_two(x: int) -> int:
    """Return the smallest power of two that is at least x."""
    return 1 << max(0, x - 1).bit_length()
