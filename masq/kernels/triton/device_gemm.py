"""Triton code of products: int8 rows times int8 or int4 weights, and the second factor of low-rank corrections.

A tile is computed transposed, outputs by rows, ``acc[BLOCK_N, BLOCK_M] = W X^T``: 4-bit weights are then unpacked in
the registers from which tensor cores take their first operand (the arrangement of LiquidGEMM, arXiv 2509.01229), and
few rows are the flexible side of an instruction. Sums over codes are int32 and exact in any order. Two 4-bit codes a
byte stay multiplied by 16 (the upper half of a byte as it is, the lower one shifted), which the epilogue takes back.

Shapes: M rows, N outputs, K inputs padded to whole blocks of 128, S slices of K; n corrected rows and R ranks.
"""

# Triton reads these functions as a language of its own: pyright sees the annotations only.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalOperand=false

from __future__ import annotations

import triton
import triton.language as tl

from masq.kernels.triton.device_rows import rounded

BLOCK = 128
"""Inputs that one line of 4-bit weights holds: byte j has input j in its lower half and input 64 + j in its upper."""
_BLOCK, _HALF = tl.constexpr(BLOCK), tl.constexpr(BLOCK // 2)


@triton.jit
def _lower(packed, INTERPRETED: tl.constexpr):
    """Bytes to 16 times their lower codes, int8; four bytes at a time on a GPU.

    An operation of its own: of one with both results the compiler would take the second through shared memory.
    """
    if INTERPRETED:
        return (packed << 4).to(tl.int8, bitcast=True)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 up; shl.b32 up, $1, 4; and.b32 $0, up, 0xF0F0F0F0; }",
        "=r,r",
        [packed],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _upper(packed, INTERPRETED: tl.constexpr):
    """Bytes to 16 times their upper codes, int8."""
    if INTERPRETED:
        return (packed & 0xF0).to(tl.int8, bitcast=True)
    return tl.inline_asm_elementwise(
        "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def _held_back(weights):
    """The same bytes, four at a time, by an operation of two operands: so the compiler does not load them a step ahead.

    It would carry the operands of ``mma.sync`` from step to step byte by byte: half as many registers again, and
    hundreds of permutations of bytes a step.
    """
    operands = [weights, tl.zeros_like(weights)]
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", operands, dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _sums4(  # noqa: PLR0913
    x,
    w,
    row,
    out,
    num_inner,
    first,
    last,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """16 times the int32 sums over blocks ``first`` to ``last`` of 4-bit weights uint8 [N, K / 2]."""
    byte = tl.arange(0, _HALF)
    x_at = x + row[None, :] * num_inner + byte[:, None]
    w_at = w + out[:, None] * (num_inner // 2) + byte[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for block in range(first, last):
        packed = tl.load(w_at + block * _HALF)
        lower, upper = _lower(packed, INTERPRETED), _upper(packed, INTERPRETED)
        sums = tl.dot(lower, tl.load(x_at + block * _BLOCK), sums, out_dtype=tl.int32)
        sums = tl.dot(upper, tl.load(x_at + block * _BLOCK + _HALF), sums, out_dtype=tl.int32)
    return sums


@triton.jit
def _sums8(  # noqa: PLR0913
    x,
    w,
    row,
    out,
    num_inner,
    first,
    last,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """int32 sums over inputs ``first * 128`` to ``last * 128`` of 8-bit weights int8 [N, K]."""
    inner = tl.arange(0, BLOCK_K)
    x_at = x + row[None, :] * num_inner + inner[:, None]
    w_at = w + out[:, None] * num_inner + inner[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for start in range(first * _BLOCK, last * _BLOCK, BLOCK_K):
        weights = tl.load(w_at + start)
        if not DIRECT:
            weights = _held_back(weights)
        sums = tl.dot(weights, tl.load(x_at + start), sums, out_dtype=tl.int32)
    return sums


@triton.jit
def _described_sums8(  # noqa: PLR0913
    x,
    w,
    first_row,
    first_out,
    first,
    last,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As ``_sums8``, of matrices that the GPU knows by descriptors: one thread fetches whole tiles, tails as zeros."""
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for start in range(first * _BLOCK, last * _BLOCK, BLOCK_K):
        sums = tl.dot(w.load([first_out, start]), x.load([first_row, start]).T, sums, out_dtype=tl.int32)
    return sums


@triton.jit
def scaled(sums, x_scale, w_scale, row, out, there_m, there_n, FOUR: tl.constexpr):
    """Sums rounded once to float32, times the scale of their row, times that of their output."""
    y = sums.to(tl.float32)
    if FOUR:
        y *= 0.0625
    y *= tl.load(x_scale + row, mask=there_m, other=0.0)[None, :]
    return y * tl.load(w_scale + out, mask=there_n, other=0.0)[:, None]


@triton.jit
def _plus_rows(y, added, places, row, out, there_m, there_n, num_outputs):
    """A tile plus those rows of ``added`` [n, N] that its rows have, in float32."""
    place = tl.load(places + row, mask=there_m, other=-1)
    if tl.max(place) >= 0:
        at = added + place[None, :].to(tl.int64) * num_outputs + out[:, None]
        y += tl.load(at, mask=(place >= 0)[None, :] & there_n[:, None], other=0.0).to(tl.float32)
    return y


@triton.jit
def _corrected(  # noqa: PLR0913
    y,
    term,
    row,
    out,
    there_m,
    NUM_PARTS: tl.constexpr,
    RANKS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A tile plus U L2 of one modality, part by part; one without a row of the modality does not touch its factors.

    ``term``: u [n, width]; places int32 [M], the row of u that corrects a row, -1 for none; width; L2^T [N, depth], or
    its codes, which are exact in the dtype of u; depth; parts int32 [NUM_PARTS, 4], first output, end, first column of
    U and count of each part. Widths, depths, columns and counts are multiples of ``RANKS``.
    """
    u, places, width, right, depth, parts = term
    place = tl.load(places + row, mask=there_m, other=-1)
    if tl.max(place) >= 0:
        rank = tl.arange(0, RANKS)
        width, depth = tl.multiple_of(width, RANKS), tl.multiple_of(depth, RANKS)
        u_at, right_at = place[None, :] * width + rank[:, None], out[:, None] * depth + rank[None, :]
        for part in range(NUM_PARTS):
            begins, ends = tl.load(parts + part * 4), tl.load(parts + part * 4 + 1)
            column = tl.multiple_of(tl.load(parts + part * 4 + 2), RANKS)
            if (begins <= tl.max(out)) & (ends > tl.min(out)):
                own = (out >= begins) & (out < ends)
                for start in tl.range(0, tl.load(parts + part * 4 + 3), RANKS, num_stages=STAGES):
                    a = tl.load(right + (right_at + start), mask=own[:, None], other=0.0)
                    b = tl.load(u + (u_at + (column + start)), mask=(place >= 0)[None, :], other=0.0)
                    if INTERPRETED:
                        a, b = a.to(tl.float32), b.to(tl.float32)
                    y = tl.dot(a.to(b.dtype), b, y)
    return y


@triton.jit
def _anew(number, INTERPRETED: tl.constexpr):
    """The same number, of which the compiler does not know that: what follows from it is not kept, but made again."""
    if INTERPRETED:
        return number
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _tile(program, num_rows, num_outputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and output of a program: ``GROUP`` tiles of rows share a column of weights while it is hot."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N)
    group = program // (GROUP * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = program % (GROUP * tiles_n)
    return (group * GROUP + within % size) * BLOCK_M, (within // size) * BLOCK_N


@triton.jit(do_not_specialize=["num_rows"])
def multiply(  # noqa: PLR0913
    x,
    x_scale,
    w,
    w_scale,
    bias,
    added,
    added_place,
    terms,
    y,
    num_rows,
    num_outputs,
    num_inner,
    FOUR: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    RANKS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DIRECT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Y [M, N] of x int8 [M, K] and w int8 [N, K] or, if ``FOUR``, uint8 [N, K / 2]; or int32 sums y [S, M, N].

    With ``SPLITS`` above one a program sums over one slice of K and stores it; ``combine`` does the rest. ``added``:
    [n, N], row ``added_place`` (int32 [M], -1 for none) of it is added. ``terms``: ``NUM_TERMS`` tuples (u, place,
    width, right, depth, parts), one a modality, see ``_corrected``. ``DIRECT``: tensor cores read weights from shared
    memory; ``DESCRIBED``: x and w are descriptors of their tensors.
    """
    first_row, first_out = _tile(tl.program_id(0), num_rows, num_outputs, BLOCK_M, BLOCK_N, GROUP)
    # Tails read the last row or output again, which needs no mask in the loop; they are not stored.
    from_row = tl.minimum(first_row + tl.arange(0, BLOCK_M), num_rows - 1).to(tl.int64)
    from_out = tl.minimum(first_out + tl.arange(0, BLOCK_N), num_outputs - 1).to(tl.int64)
    blocks, split = num_inner // _BLOCK, tl.program_id(1)
    first, last = blocks * split // SPLITS, blocks * (split + 1) // SPLITS
    if FOUR:
        sums = _sums4(x, w, from_row, from_out, num_inner, first, last, BLOCK_M, BLOCK_N, INTERPRETED)
    elif DESCRIBED:
        sums = _described_sums8(x, w, first_row, first_out, first, last, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        sums = _sums8(x, w, from_row, from_out, num_inner, first, last, BLOCK_M, BLOCK_N, BLOCK_K, DIRECT)
    program = _anew(tl.program_id(0), INTERPRETED)
    first_row, first_out = _tile(program, num_rows, num_outputs, BLOCK_M, BLOCK_N, GROUP)
    row, out = first_row + tl.arange(0, BLOCK_M), first_out + tl.arange(0, BLOCK_N)
    there_m, there_n = row < num_rows, out < num_outputs
    if SPLITS > 1:
        to = y + (split.to(tl.int64) * num_rows + row[None, :]) * num_outputs + out[:, None]
        tl.store(to, sums, mask=there_m[None, :] & there_n[:, None])
    else:
        values = scaled(sums, x_scale, w_scale, row, out, there_m, there_n, FOUR)
        if added is not None:
            values = _plus_rows(values, added, added_place, row, out, there_m, there_n, num_outputs)
        for term in tl.static_range(NUM_TERMS):
            values = _corrected(values, terms[term], row, out, there_m, NUM_PARTS, RANKS, STAGES, INTERPRETED)
        if bias is not None:
            values += tl.load(bias + out, mask=there_n, other=0.0)[:, None]
        to = y + row[None, :].to(tl.int64) * num_outputs + out[:, None]
        stored = rounded(values, y.dtype.element_ty, INTERPRETED)
        tl.store(to, stored, mask=there_m[None, :] & there_n[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def combine(  # noqa: PLR0913
    sums,
    x_scale,
    w_scale,
    bias,
    y,
    num_rows,
    num_outputs,
    FOUR: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Y [M, N] of the int32 sums [S, M, N] over slices of the inputs: the same integers, so the same floats."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there_m, there_n = row < num_rows, out < num_outputs
    there = there_n[:, None] & there_m[None, :]
    at = row[None, :].to(tl.int64) * num_outputs + out[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + at + split * num_rows.to(tl.int64) * num_outputs, mask=there, other=0)
    values = scaled(total, x_scale, w_scale, row, out, there_m, there_n, FOUR)
    if bias is not None:
        values += tl.load(bias + out, mask=there_n, other=0.0)[:, None]
    tl.store(y + at, rounded(values, y.dtype.element_ty, INTERPRETED), mask=there)
