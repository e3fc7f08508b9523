"""Tile sizes of the products by GPU, as data: chosen by rows, outputs and inputs.

They follow from what a compute capability has. 9.0 multiplies tiles from shared memory by groups of warps: of 4-bit
codes, and of 8-bit ones up to 512 rows, 128 x 128 in half the registers, so that two programs share a multiprocessor
and one unpacks, or ends, while the other multiplies; of more rows of 8-bit codes 256 x 128. 8.9 has the smallest shared
memory, 8.0 lies between. A test compiles every line and holds it to the limits of its GPU. The last
lines of 9.0 are the fastest of those tried on an H200 with 2048 rows; no other was tuned on a GPU.

Shapes: M rows, N outputs, K inputs padded to blocks of 128.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 128
"""Inputs are padded to a multiple of it."""
SPLIT_ROWS = 64
"""Up to so many rows the inputs may be split between programs."""
MAX_SPLITS = 8
_BLOCKS_PER_SPLIT = 4
_PROGRAMS_PER_PROCESSOR = 2
_LEAST_WORK = 0.75


@dataclass(frozen=True)
class Tile:
    """One way to compute a product.

    Attributes:
        max_rows: it is for products of so many rows at most, None for all.
        rows: of a tile.
        outputs: of a tile.
        inner: inputs per step, of 8-bit weights; 4-bit ones take blocks of 128.
        warps: of a program.
        stages: of the pipeline that loads ahead.
        max_registers: of a thread, None leaves it to the compiler.
        described: 8-bit codes are fetched by descriptors (the tensor memory accelerator of 9.0), not by pointers.
        group: tiles of rows that share a column of weights while it is in the second cache.
    """

    max_rows: int | None
    rows: int
    outputs: int
    inner: int
    warps: int
    stages: int
    max_registers: int | None = None
    described: bool = False
    group: int = 8

    @property
    def options(self) -> dict[str, int]:
        """As arguments of a launch."""
        found = {"BLOCK_M": self.rows, "BLOCK_N": self.outputs, "BLOCK_K": self.inner, "GROUP": self.group}
        found |= {"DESCRIBED": self.described}
        found |= {"num_warps": self.warps, "num_stages": self.stages}
        return found if self.max_registers is None else found | {"maxnreg": self.max_registers}


_SMALL = (
    Tile(16, 16, 64, 128, 4, 5),
    Tile(32, 32, 64, 128, 4, 4),
    Tile(64, 64, 64, 128, 4, 4),
    Tile(256, 64, 128, 128, 4, 3),
    Tile(None, 128, 128, 128, 8, 3),
)
_TILES: dict[tuple[int, bool], tuple[Tile, ...]] = {
    # capability, weights of 4 bits: by rows
    (80, False): _SMALL,
    (80, True): _SMALL,
    (89, False): (
        Tile(16, 16, 64, 128, 4, 5),
        # Shared memory has room for two programs, so that registers are left: the compiler alone spills some.
        Tile(32, 32, 64, 128, 4, 4, max_registers=96),
        Tile(64, 64, 64, 128, 4, 3),
        Tile(256, 64, 128, 64, 4, 4),
        Tile(None, 128, 128, 64, 8, 4),
    ),
    (89, True): _SMALL,
    (90, False): (
        Tile(16, 16, 64, 128, 4, 6),
        Tile(32, 32, 64, 128, 4, 5),
        Tile(64, 64, 64, 128, 4, 4),
        Tile(512, 128, 128, 128, 8, 3, max_registers=128, described=True),
        Tile(None, 128, 256, 128, 8, 4, described=True),
    ),
    (90, True): (
        Tile(16, 16, 64, 128, 4, 6),
        Tile(32, 32, 64, 128, 4, 5),
        Tile(64, 64, 64, 128, 4, 4),
        Tile(None, 128, 128, 128, 4, 3),
    ),
}

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes that one program may use, by capability (CUDA C++ Programming Guide, technical specifications)."""

_TABLE_OF = {80: 80, 86: 89, 87: 80, 89: 89, 90: 90}
"""Capability to the table that fits its shared memory; newer ones take the smallest."""
OLDEST = 80
WARP_GROUPS = 90
"""The table whose tensor cores read both operands from shared memory."""


def table_of(capability: int) -> int:
    """The capability whose tiles a GPU uses, 10 * major + minor both."""
    return _TABLE_OF.get(capability, 89)


def tiles_of(table: int, four: bool) -> tuple[Tile, ...]:
    """All lines of a table."""
    return _TILES[table, four]


def num_programs(tile: Tile, num_rows: int, num_outputs: int) -> int:
    """How many tiles a product has."""
    return -(-num_rows // tile.rows) * -(-num_outputs // tile.outputs)


def choose(table: int, four: bool, num_rows: int, num_outputs: int, processors: int) -> Tile:
    """The first line of a table for a number of rows; a smaller one where that leaves processors without work."""
    tiles = _TILES[table, four]
    index = next(at for at, tile in enumerate(tiles) if tile.max_rows is None or num_rows <= tile.max_rows)
    while num_rows > SPLIT_ROWS and tiles[index].rows > SPLIT_ROWS:
        if num_programs(tiles[index], num_rows, num_outputs) >= _LEAST_WORK * processors:
            break
        index -= 1
    return tiles[index]


def num_splits(tile: Tile, num_rows: int, num_outputs: int, num_inner: int, processors: int) -> int:
    """Into how many slices to cut the inputs so that every processor has work: a power of two, 1 for many rows."""
    if num_rows > SPLIT_ROWS:
        return 1
    programs = num_programs(tile, num_rows, num_outputs)
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * _BLOCKS_PER_SPLIT <= num_inner // BLOCK:
        if splits * programs >= _PROGRAMS_PER_PROCESSOR * processors:
            break
        splits *= 2
    return splits


@dataclass(frozen=True)
class FewTile:
    """How one row or a few are multiplied, on every GPU.

    Attributes:
        outputs: of a program.
        words: of a line of weights that it reads at once, four bytes each: half a kilobyte in one piece.
        warps: of a program; one has nobody to wait for, and the codes of a row where it needs them.
    """

    outputs: int
    words: int
    warps: int


VERY_FEW_ROWS = 4
"""Up to here tensor cores are left aside; the products of more rows would outweigh the reading of weights."""
FEW = FewTile(outputs=4, words=128, warps=1)
_FEW_PROGRAMS_PER_PROCESSOR, _STEPS_PER_SPLIT = 24, 3


def num_splits_of_few(num_outputs: int, num_words: int, processors: int) -> int:
    """Into how many slices to cut a line so that enough programs read at the same time: a power of two."""
    programs, steps = -(-num_outputs // FEW.outputs), -(-num_words // FEW.words)
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * _STEPS_PER_SPLIT <= steps:
        if splits * programs >= _FEW_PROGRAMS_PER_PROCESSOR * processors:
            break
        splits *= 2
    return splits
