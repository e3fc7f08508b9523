"""Low-rank factors in the layout of our own kernels, and the rows that they correct as arguments.

Shapes: n rows of one modality, R_j rank and O_j outputs of part j, S_j = ceil(R_j / 32) slices of ranks.
"""

from __future__ import annotations

import ctypes
import itertools
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from masq.kernels.base import LowRank, PreparedFactors

if TYPE_CHECKING:
    from collections.abc import Sequence

SLICE, PANEL = 32, 32
MAX_MODALITIES = 4
FUSED = ({torch.bfloat16}, {torch.int8})


class _LowRank(ctypes.Structure):
    """``LowRank`` of ``csrc/linear.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("u", "rows")),
        *((name, ctypes.c_int64) for name in ("count", "width")),
        *((name, ctypes.c_void_p) for name in ("tiles", "starts", "part_of", "columns", "firsts")),
        ("parts", ctypes.c_int64),
    )


def prepare(rights: Sequence[torch.Tensor | None], sizes: Sequence[int]) -> PreparedFactors | None:
    """L2 of every part [R_j, O_j] in tiles; None where they are neither all bfloat16 nor all int8, or share a panel.

    Tiles of int8 codes stay so between calls, each of which makes bfloat16 of them.
    """
    there = [right for right in rights if right is not None]
    aligned = all(size % PANEL == 0 for size in sizes[:-1])
    if not there or not aligned or {right.dtype for right in there} not in FUSED:
        return None
    ranks = tuple(0 if right is None else len(right) for right in rights)
    tiles = [_tiles(right) for right in there]
    return PreparedFactors({"tiles": torch.cat(tiles)}, ranks, tuple(sizes), ranks)


def restore(factors: PreparedFactors) -> list[torch.Tensor | None]:
    """The inverse of ``prepare``: copies."""
    found: list[torch.Tensor | None] = []
    start = 0
    for rank, size in zip(factors.ranks, factors.sizes, strict=True):
        slices, panels = -(-rank // SLICE), -(-size // PANEL)
        tiles = factors.tensors["tiles"][start : start + slices * panels]
        start += slices * panels
        found.append(_from_tiles(tiles, rank, size) if rank else None)
    return found


class Arguments:
    """The low-rank terms of one product as ``masq_gemm`` takes them; it keeps alive what they point to."""

    def __init__(self, terms: Sequence[LowRank]) -> None:
        self.count = len(terms)
        self._terms = terms
        self._tiles: list[torch.Tensor] = []
        self._array = (_LowRank * max(len(terms), 1))()
        for entry, term in zip(self._array, terms, strict=False):
            starts, part_of, columns, firsts = _places(term.factors.ranks, term.factors.sizes)
            entry.u, entry.rows = term.u.data_ptr(), term.selected.rows.data_ptr()
            entry.count, entry.width = term.u.shape
            tiles = term.factors.tensors["tiles"].bfloat16()
            self._tiles.append(tiles)
            entry.tiles, entry.starts = tiles.data_ptr(), starts.data_ptr()
            entry.part_of, entry.columns, entry.firsts = part_of.data_ptr(), columns.data_ptr(), firsts.data_ptr()
            entry.parts = len(term.factors.sizes)
        self.pointer = ctypes.addressof(self._array) if terms else None


@cache
def _places(ranks: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """By panel its first slice (int64) and its part, by part its first column and its first slice (int32)."""
    slices = [-(-rank // SLICE) for rank in ranks]
    panels = [-(-size // PANEL) for size in sizes]
    by_panel = [(part, slices[part]) for part, count in enumerate(panels) for _ in range(count)]
    starts = list(itertools.accumulate((count for _, count in by_panel[:-1]), initial=0))
    return (
        torch.tensor(starts, dtype=torch.int64),
        torch.tensor([part for part, _ in by_panel], dtype=torch.int32),
        torch.tensor(list(itertools.accumulate(ranks, initial=0)), dtype=torch.int32),
        torch.tensor(list(itertools.accumulate(slices, initial=0)), dtype=torch.int32),
    )


def _tiles(right: torch.Tensor) -> torch.Tensor:
    """[R, O] to [panels * slices, 2, 16, 16, 2]: line r of a tile holds ranks 2r and 2r + 1 of each output."""
    padded = functional.pad(right, (0, -right.shape[1] % PANEL, 0, -len(right) % SLICE))
    parts = padded.view(len(padded) // SLICE, 16, 2, padded.shape[1] // PANEL, 2, 16)
    return parts.permute(3, 0, 4, 1, 5, 2).reshape(-1, 2, 16, 16, 2)


def _from_tiles(tiles: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    parts = tiles.view(-(-size // PANEL), -(-rank // SLICE), 2, 16, 16, 2)
    whole = parts.permute(1, 3, 5, 0, 2, 4).reshape(parts.shape[1] * SLICE, parts.shape[0] * PANEL)
    return whole[:rank, :size].contiguous()
