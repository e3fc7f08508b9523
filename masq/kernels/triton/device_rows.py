"""Triton code over rows: smooth and quantize, alone or after what the model computes just before.

One program takes a few rows. ``SOURCE`` says what a row is before it is smoothed: an input row, an input row (plus a
residual) under RMSNorm, or SiLU(gate) * up. All arithmetic is float32. Rounding is that of
``masq.numerics.affine.quantize``: the quotient by the scale as IEEE rounds it, then half to even.

Shapes: N rows, I input channels, P = I rounded up to whole blocks, U smoothing vectors.
"""

# Triton reads these functions as a language of its own: pyright sees the annotations only.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalOperand=false

from __future__ import annotations

import triton
import triton.language as tl

ROWS, NORM, SILU_MUL = 0, 1, 2
"""What ``SOURCE`` may be."""
_NORM, _SILU_MUL = tl.constexpr(NORM), tl.constexpr(SILU_MUL)
# Added to an integer of few bits it leaves that integer, half to even, in the lowest bits of the float32.
_MAGIC = tl.constexpr(1.5 * 2.0**23)
_SMALLEST_SCALE = tl.constexpr(2.0**-126)
_SMALL, _LARGE = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def rounded(values, to: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 to another float, half to even; the interpreter would cut bfloat16 off."""
    if INTERPRETED and to == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(to)


@triton.jit
def _fma(a, b, c, INTERPRETED: tl.constexpr):
    """The sum a b + c rounded once; the interpreter would round the product too, which float64 holds."""
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def _quotient(values, scale, INTERPRETED: tl.constexpr):
    """``values / scale`` as IEEE rounds it, without the branches of a division for every value.

    With the rounded reciprocal the first product is within two units in the last place, one correction brings that
    below one, and from there on a correction rounds as IEEE does (Markstein, IBM J. Res. Dev. 34(1), 1990). Scales
    far from one are brought near it, so that no remainder underflows but where the code is zero anyway.
    """
    turn = tl.where(scale < _SMALL, _LARGE, tl.where(scale > _LARGE, _SMALL, 1.0))
    divisor = scale * turn
    inverse, values = tl.div_rn(1.0, divisor), values * turn
    quotient = values * inverse
    quotient = _fma(_fma(-quotient, divisor, values, INTERPRETED), inverse, quotient, INTERPRETED)
    return _fma(_fma(-quotient, divisor, values, INTERPRETED), inverse, quotient, INTERPRETED)


@triton.jit
def _codes(values, scale, QMAX: tl.constexpr, DIVISOR: tl.constexpr, INTERPRETED: tl.constexpr):
    """Nearest codes, int8: the lowest byte of a float32 in which one unit is the last place."""
    quotient = _quotient(values, scale, INTERPRETED)
    if DIVISOR > QMAX:
        quotient = tl.minimum(tl.maximum(quotient, -QMAX * 1.0), QMAX * 1.0)
    return (quotient + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _highest(values):
    """Bits of the largest magnitude of each row: in their order as integers NaN is above all, so that it survives."""
    return tl.max(values.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS, axis=1)


@triton.jit
def _scale(bits, DIVISOR: tl.constexpr):
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), DIVISOR * 1.0)
    return tl.where(scale < _SMALLEST_SCALE, 1.0, scale)


@triton.jit
def _of_rows(table, which, row, alive, column, num_inner):
    """The line of a table, a smoothing vector or a centre, that each row has, in float32."""
    line = tl.zeros_like(row)
    if which is not None:
        line = tl.load(which + row, mask=alive, other=0)
    at = table + line[:, None] * num_inner + column[None, :]
    return tl.load(at, mask=(column < num_inner)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _normalized(values, gamma, column, num_inner, eps):
    """Rows under RMSNorm (arXiv 1910.07467), eps inside the root."""
    mean = tl.div_rn(tl.sum(values * values, axis=1), num_inner * 1.0)
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    return values * factor[:, None] * tl.load(gamma + column, mask=column < num_inner, other=0.0).to(tl.float32)


@triton.jit
def _silu(gate, INTERPRETED: tl.constexpr):
    """SiLU, gate / (1 + exp(-gate)), of exponentials that are never above one; its divisor is between one and two."""
    small = tl.exp(-tl.abs(gate))
    divisor = 1.0 + small
    if INTERPRETED:
        inverse = 1.0 / divisor
    else:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [divisor], dtype=tl.float32, is_pure=True, pack=1
        )
    return gate * tl.where(gate >= 0, 1.0, small) * inverse


@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows(  # noqa: PLR0913
    x,
    other,
    gamma,
    inverse,
    vectors,
    centre,
    centres,
    places,
    codes,
    scales,
    summed,
    taken,
    num_rows,
    num_inner,
    num_padded,
    x_stride,
    other_stride,
    eps,
    SOURCE: tl.constexpr,
    QMAX: tl.constexpr,
    DIVISOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Codes int8 [N, P], zero from I on, and scales float32 [N] of x [N, I]; one program takes ``ROWS`` rows.

    ``other``: residual or up, [N, I]; ``vectors``: int64 [N] into ``inverse`` float32 [U, I]; ``centres``: int64 [N]
    into ``centre`` bfloat16 [C, I]; ``summed``: where x plus the residual goes; ``taken``: where smoothed rows go, each
    to its place of ``places`` (int32 [N], -1 for nowhere).
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    alive = row < num_rows
    inside = alive[:, None] & (column < num_inner)[None, :]
    at = row[:, None] * num_inner + column[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if other is not None:
        second = tl.load(other + row[:, None] * other_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if SOURCE == _SILU_MUL:
            values = _silu(values, INTERPRETED) * second
        else:
            # The sum as it is stored: what the model itself would normalize.
            stored = rounded(values + second, summed.dtype.element_ty, INTERPRETED)
            tl.store(summed + at, stored, mask=inside)
            values = stored.to(tl.float32)
    if SOURCE == _NORM:
        values = _normalized(values, gamma, column, num_inner, eps)
    if centre is not None:
        values -= _of_rows(centre, centres, row, alive, column, num_inner)
    if inverse is not None:
        values *= _of_rows(inverse, vectors, row, alive, column, num_inner)
    if places is not None:
        place = tl.load(places + row, mask=alive, other=-1).to(tl.int64)
        to = taken + place[:, None] * num_inner + column[None, :]
        tl.store(to, rounded(values, taken.dtype.element_ty, INTERPRETED), mask=inside & (place >= 0)[:, None])
    scale = _scale(_highest(values), DIVISOR)
    padded = alive[:, None] & (column < num_padded)[None, :]
    nearest = _codes(values, scale[:, None], QMAX, DIVISOR, INTERPRETED)
    tl.store(codes + row[:, None] * num_padded + column[None, :], nearest, mask=padded)
    tl.store(scales + row, scale, mask=alive)


@triton.jit
def _part(x_at, other_at, inverse_at, centre_at, inside, SOURCE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Smoothed values of some columns of one row, float32."""
    values = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if SOURCE == _SILU_MUL:
        values = _silu(values, INTERPRETED) * tl.load(other_at, mask=inside, other=0.0).to(tl.float32)
    if centre_at is not None:
        values = values - tl.load(centre_at, mask=inside, other=0.0).to(tl.float32)
    if inverse_at is not None:
        values = values * tl.load(inverse_at, mask=inside, other=0.0)
    return values


@triton.jit
def quantize_wide_rows(  # noqa: PLR0913
    x,
    other,
    inverse,
    vectors,
    centre,
    centres,
    places,
    codes,
    scales,
    taken,
    num_inner,
    num_padded,
    x_stride,
    other_stride,
    SOURCE: tl.constexpr,
    QMAX: tl.constexpr,
    DIVISOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """As ``quantize_rows``, one program a row that registers do not hold: read twice, the second time from a cache."""
    row = tl.program_id(0).to(tl.int64)
    inverse_row = inverse
    if vectors is not None:
        inverse_row = inverse + tl.load(vectors + row) * num_inner
    centre_row = centre
    if centres is not None:
        centre_row = centre + tl.load(centres + row) * num_inner
    place = tl.full((), -1, tl.int64)
    if places is not None:
        place = tl.load(places + row).to(tl.int64)
    largest = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, num_inner, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        other_at = x if other is None else other + row * other_stride + column
        inverse_at = None if inverse is None else inverse_row + column
        centre_at = None if centre is None else centre_row + column
        values = _part(
            x + row * x_stride + column, other_at, inverse_at, centre_at, column < num_inner, SOURCE, INTERPRETED
        )
        largest = tl.maximum(largest, values.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS)
    scale = _scale(tl.max(largest, axis=0), DIVISOR)
    for start in range(0, num_padded, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        other_at = x if other is None else other + row * other_stride + column
        inverse_at = None if inverse is None else inverse_row + column
        centre_at = None if centre is None else centre_row + column
        values = _part(
            x + row * x_stride + column, other_at, inverse_at, centre_at, column < num_inner, SOURCE, INTERPRETED
        )
        if places is not None:
            own = rounded(values, taken.dtype.element_ty, INTERPRETED)
            tl.store(taken + place * num_inner + column, own, mask=(column < num_inner) & (place >= 0))
        nearest = _codes(values, scale, QMAX, DIVISOR, INTERPRETED)
        tl.store(codes + row * num_padded + column, nearest, mask=column < num_padded)
    tl.store(scales + row, scale)
