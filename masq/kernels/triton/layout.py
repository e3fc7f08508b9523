"""How weights and second factors lie in the memory of a GPU: plain tensors of torch, there and back.

Shapes: O output channels, I input channels, P = I rounded up to blocks of 128, R_j rank, W_j columns of U and O_j
outputs of part j.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from masq.kernels.base import PreparedFactors, PreparedWeight
from masq.kernels.triton.tiles import BLOCK
from masq.numerics.packing import NIBBLE_BITS, PackedWeight, pack_nibbles, unpack_nibbles

if TYPE_CHECKING:
    from collections.abc import Sequence

RANKS = 32
"""Ranks are padded to a multiple of it, and so are the columns of U: all loads are of 16 bytes, and none are masked."""


def prepare(weight: PackedWeight) -> PreparedWeight:
    """Codes int8 [O, P], or at up to 4 bits uint8 [O, P / 2]; scales float32 [O].

    Byte j of a line of 64 has input j of a block of 128 in its lower half and input 64 + j in its upper one: both
    halves are then consecutive inputs, and nothing is interleaved when they are multiplied.
    """
    four = weight.format.bits <= NIBBLE_BITS
    codes = unpack_nibbles(weight.codes, weight.in_features, signed=True) if four else weight.codes
    codes = functional.pad(codes, (0, -weight.in_features % BLOCK))
    tensors = {"codes": _pack_blocks(codes) if four else codes.contiguous(), "scale": weight.scale.flatten().clone()}
    return PreparedWeight(tensors, weight.format, weight.in_features, weight.out_features)


def restore(prepared: PreparedWeight) -> PackedWeight:
    """The inverse of ``prepare``, bit for bit."""
    four = prepared.format.bits <= NIBBLE_BITS
    codes = prepared.tensors["codes"]
    codes = (_unpack_blocks(codes) if four else codes)[:, : prepared.in_features]
    return PackedWeight(
        pack_nibbles(codes.contiguous()) if four else codes.clone(memory_format=torch.contiguous_format),
        prepared.tensors["scale"].view(-1, 1).clone(),
        None,
        prepared.format,
        prepared.in_features,
    )


def _pack_blocks(codes: torch.Tensor) -> torch.Tensor:
    """int8 [O, P] to uint8 [O, P / 2]."""
    halves = codes.view(torch.uint8).view(len(codes), -1, 2, BLOCK // 2)
    return ((halves[:, :, 0] & 0xF) | (halves[:, :, 1] << 4)).flatten(1)


def _unpack_blocks(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_pack_blocks`` but for signs: four bits of each code, uint8 [O, P]."""
    lines = packed.view(len(packed), -1, BLOCK // 2)
    return torch.stack((lines & 0xF, lines >> 4), dim=2).flatten(1)


def prepare_factors(rights: Sequence[torch.Tensor | None], sizes: Sequence[int]) -> PreparedFactors | None:
    """L2 of all parts in one matrix, None where they are neither all bfloat16 nor all int8.

    ``right``: bfloat16 or int8 [sum of O_j, D], the ranks of an output side by side, zero from its rank on, D the
    largest W_j. ``parts``: int32 [parts, 4], first output, end, first column of U and W_j of each, which is its rank
    rounded up to ``RANKS``.
    """
    there = [right for right in rights if right is not None]
    if not there or {right.dtype for right in there} not in ({torch.bfloat16}, {torch.int8}):
        return None
    ranks = tuple(0 if right is None else len(right) for right in rights)
    widths = tuple(-(-rank // RANKS) * RANKS for rank in ranks)
    depth = max(widths)
    like = there[0]
    blocks = [
        like.new_zeros(size, depth) if right is None else functional.pad(right.t(), (0, depth - len(right)))
        for right, size in zip(rights, sizes, strict=True)
    ]
    ends = list(itertools.accumulate(sizes, initial=0))
    columns = list(itertools.accumulate(widths, initial=0))
    rows = list(zip(ends[:-1], ends[1:], columns[:-1], widths, strict=True))
    parts = torch.tensor(rows, dtype=torch.int32, device=like.device)
    return PreparedFactors({"right": torch.cat(blocks).contiguous(), "parts": parts}, ranks, tuple(sizes), widths)


def restore_factors(factors: PreparedFactors) -> list[torch.Tensor | None]:
    """The inverse of ``prepare_factors``: copies."""
    blocks = factors.tensors["right"].split(list(factors.sizes))
    pairs = zip(blocks, factors.ranks, strict=True)
    return [block[:, :rank].t().clone(memory_format=torch.contiguous_format) if rank else None for block, rank in pairs]
