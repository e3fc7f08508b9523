"""Triton code of products of one to four rows: whole lines of weights go straight to registers.

Reading weights is all there is to do then, and tensor cores, which take them from shared memory in steps that wait for
one another, are in the way. Sums over codes are int32 and exact in any order; layouts, scales and the factor of 16 are
those of ``device_gemm``.

Shapes: M rows, N outputs, P inputs padded to whole blocks of 128, S slices of them.
"""

# Triton reads these functions as a language of its own: pyright sees the annotations only.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalOperand=false

from __future__ import annotations

import triton
import triton.language as tl

from masq.kernels.triton.device_gemm import scaled
from masq.kernels.triton.device_rows import rounded

_UPPER = tl.constexpr(-0x0F0F0F10)
"""The upper half of each of four bytes, 0xF0F0F0F0, as an int32."""


@triton.jit
def _dot4(a, b, total, INTERPRETED: tl.constexpr):
    """``total`` plus the products of the four signed bytes of every two words, int32."""
    if INTERPRETED:
        for byte in tl.static_range(4):
            total += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return total
    operands = [a, b, total]
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", operands, dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _row_dot(line, x_at, inside, total, FOUR: tl.constexpr, INTERPRETED: tl.constexpr):
    """``total`` [BLOCK_N, WORDS] plus lines of weights times the codes of one row, word by word."""
    codes = tl.load(x_at, mask=inside, other=0)[None, :]
    if not FOUR:
        return _dot4(line, codes, total, INTERPRETED)
    total = _dot4((line << 4) & _UPPER, codes, total, INTERPRETED)
    return _dot4(line & _UPPER, tl.load(x_at + 16, mask=inside, other=0)[None, :], total, INTERPRETED)


@triton.jit
def _few_sums(  # noqa: PLR0913
    x,
    w,
    out,
    num_words,
    first,
    last,
    FOUR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """int32 sums [BLOCK_N] of up to four rows over words ``first * WORDS`` to ``last * WORDS`` of a line."""
    zeros = tl.zeros((BLOCK_N, WORDS), tl.int32)
    a, b, c, d = zeros, zeros, zeros, zeros
    length = 2 * num_words if FOUR else num_words
    for step in range(first, last):
        word = step * WORDS + tl.arange(0, WORDS)
        inside = word < num_words
        line = tl.load(w + out[:, None] * num_words + word[None, :], mask=inside[None, :], other=0)
        # A line of 64 bytes holds 16 words of inputs in its lower halves, and the 16 behind them in its upper ones.
        at = tl.max_contiguous(tl.multiple_of(word // 16 * 32 + word % 16, 4), 4) if FOUR else word
        a = _row_dot(line, x + at, inside, a, FOUR, INTERPRETED)
        if ROWS > 1:
            b = _row_dot(line, x + (length + at), inside, b, FOUR, INTERPRETED)
        if ROWS > 2:
            c = _row_dot(line, x + (2 * length + at), inside, c, FOUR, INTERPRETED)
        if ROWS > 3:
            d = _row_dot(line, x + (3 * length + at), inside, d, FOUR, INTERPRETED)
    return tl.sum(a, axis=1), tl.sum(b, axis=1), tl.sum(c, axis=1), tl.sum(d, axis=1)


@triton.jit
def _store_few(  # noqa: PLR0913
    sums,
    row,
    x_scale,
    w_scale,
    bias,
    y,
    out,
    num_outputs,
    split,
    FOUR: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One row of sums, or of the product."""
    there = out < num_outputs
    if SPLITS > 1:
        tl.store(y + (split * ROWS + row) * num_outputs + out, sums, mask=there)
    else:
        one = row + tl.zeros((1,), tl.int32)
        values = scaled(sums[:, None], x_scale, w_scale, one, out, one >= 0, there, FOUR)
        if bias is not None:
            values += tl.load(bias + out, mask=there, other=0.0)[:, None]
        stored = rounded(values, y.dtype.element_ty, INTERPRETED)
        tl.store(y + row * num_outputs + out[:, None], stored, mask=there[:, None])


@triton.jit
def multiply_few(  # noqa: PLR0913
    x,
    x_scale,
    w,
    w_scale,
    bias,
    y,
    num_outputs,
    num_words,
    FOUR: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """As ``device_gemm.multiply``, of one to four rows, nothing added but a bias.

    ``x`` and ``w``: words of four bytes, int32 [ROWS, P / 4] and [N, num_words]. With ``SPLITS`` above one ``y`` is
    int32 sums [S, ROWS, N].
    """
    out, split = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    steps = tl.cdiv(num_words, WORDS)
    first, last = steps * split // SPLITS, steps * (split + 1) // SPLITS
    # A tail reads the last output again, which needs no mask in the loop; it is not stored.
    from_out = tl.minimum(out, num_outputs - 1).to(tl.int64)
    sums = _few_sums(x, w, from_out, num_words, first, last, FOUR, ROWS, BLOCK_N, WORDS, INTERPRETED)
    given = (x_scale, w_scale, bias, y, out, num_outputs, split.to(tl.int64))
    for row in tl.static_range(ROWS):
        _store_few(sums[row], row, *given, FOUR, ROWS, SPLITS, INTERPRETED)
