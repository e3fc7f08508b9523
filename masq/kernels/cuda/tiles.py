"""Which tile multiplies what, as data: the shapes that ``csrc/entry.h`` compiles, by their index there.

They follow from what the compiler reports and from the shared memory of compute capabilities 8.6 and 8.9 (99 KiB a
program, 100 KiB a multiprocessor): two programs of 128 x 128 or one of 128 x 256 fit. None was tuned on a GPU.

Shapes: N rows, O outputs, K inputs padded to lines of 128.
"""

from __future__ import annotations

from dataclasses import dataclass

LINE = 64
"""Bytes of 128 codes: lines of codes are padded to a multiple of it."""
SPLIT_ROWS = 64
"""Up to so many rows the inputs may be split between programs."""
MAX_SLICES = 8
_LINES_PER_SLICE = 4
_PROGRAMS_PER_PROCESSOR = 2
_LEAST_WORK = 0.75


@dataclass(frozen=True)
class Tile:
    """One way to compute a product.

    Attributes:
        rows: of a tile.
        outputs: of a tile.
        max_rows: it is for products of so many rows at most, None for all.
    """

    rows: int
    outputs: int
    max_rows: int | None


TILES = (Tile(16, 64, 16), Tile(64, 64, 128), Tile(128, 128, 1024), Tile(128, 256, None))
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes that one program may use, by capability (CUDA C++ Programming Guide, technical specifications)."""


def num_programs(tile: Tile, num_rows: int, num_outputs: int) -> int:
    """How many tiles a product has."""
    return -(-num_rows // tile.rows) * -(-num_outputs // tile.outputs)


def choose(num_rows: int, num_outputs: int, processors: int) -> int:
    """Index of the first tile for a number of rows; of a smaller one where that leaves processors without work."""
    index = next(at for at, tile in enumerate(TILES) if tile.max_rows is None or num_rows <= tile.max_rows)
    while index > 1 and num_programs(TILES[index], num_rows, num_outputs) < _LEAST_WORK * processors:
        index -= 1
    return index


def num_slices(tile: Tile, num_rows: int, num_outputs: int, num_lines: int, processors: int) -> int:
    """Into how many slices to cut the inputs so that every processor has work: a power of two, 1 for many rows."""
    if num_rows > SPLIT_ROWS:
        return 1
    programs, slices = num_programs(tile, num_rows, num_outputs), 1
    while slices < MAX_SLICES and 2 * slices * _LINES_PER_SLICE <= num_lines:
        if slices * programs >= _PROGRAMS_PER_PROCESSOR * processors:
            break
        slices *= 2
    return slices
