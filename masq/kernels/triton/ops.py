"""The launches, each an operation of torch: opaque to ``torch.compile``, and free of anything that waits for the GPU.

Grids follow from shapes alone, so that a launch can be captured in a CUDA graph; everything they write is allocated
here, on the stream of the caller. Tensors on a CPU are for Triton's interpreter.

Shapes: N rows, I input channels, P = I rounded up to blocks of 128, O output channels, n rows of one modality, R rank.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from masq.kernels.triton import device_few, device_gemm, device_rows
from masq.kernels.triton.layout import RANKS
from masq.kernels.triton.tiles import (
    BLOCK,
    FEW,
    VERY_FEW_ROWS,
    WARP_GROUPS,
    Tile,
    choose,
    num_splits,
    num_splits_of_few,
    table_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INTERPRETED = not isinstance(device_gemm.multiply, triton.JITFunction)
"""Whether the functions of this process run in Triton's interpreter."""
_RANK_STAGES = 2
_ELEMENTS_PER_PROGRAM = 2048
FEW_ROWS = 64
"""Up to here a row is quantized by more warps."""
_ELEMENTS_PER_WARP, _ELEMENTS_PER_WARP_OF_FEW = 1024, 256
WIDE = 8192
"""Rows of more columns are read twice, in parts of ``_WIDE_COLUMNS``."""
_WIDE_COLUMNS = 4096
_INTERPRETED_ELEMENTS = 2**16
_INTERPRETED_GPU = (90, 8)
_INTERPRETED_OUTPUTS = 64

_LIBRARY = torch.library.Library("masq", "FRAGMENT")


def _operation(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a launch under a schema, with what it returns of tensors without data."""
    name = schema.split("(", 1)[0]

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CUDA", "CPU"):
            _LIBRARY.impl(name, launch, key)
        torch.library.register_fake(f"masq::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.masq, name).default

    return register


@cache
def gpu(device: torch.device) -> tuple[int, int]:
    """Table of tiles for a GPU, and its number of multiprocessors."""
    if device.type != "cuda":
        return _INTERPRETED_GPU
    found = torch.cuda.get_device_properties(device)
    return table_of(10 * found.major + found.minor), found.multi_processor_count


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Run a kernel on a GPU and its current stream."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Products and sums are rounded one by one, as everywhere else: fused ones would differ in the last bit.
        kernel[grid](*arguments, **options, INTERPRETED=INTERPRETED, enable_fp_fusion=False)


def _padded(num_inner: int) -> int:
    return -(-num_inner // BLOCK) * BLOCK


def _row_shape(num_rows: int, num_padded: int) -> dict[str, int]:
    """How many rows a program takes, and by how many warps: few rows leave processors idle, and get more of them."""
    columns = triton.next_power_of_2(num_padded)
    elements = _INTERPRETED_ELEMENTS if INTERPRETED else _ELEMENTS_PER_PROGRAM
    rows = max(elements // columns, 1) if num_rows > FEW_ROWS or INTERPRETED else 1
    warps = rows * columns // (_ELEMENTS_PER_WARP if num_rows > FEW_ROWS else _ELEMENTS_PER_WARP_OF_FEW)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(max(triton.next_power_of_2(warps), 4), 32)}


def _room(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """For the rows of x [N, I] that are taken, in its dtype; empty where none are."""
    return x.new_empty(0) if rows is None else x.new_empty(len(rows), x.shape[1])


def _empty_codes(x: torch.Tensor, *_: Any, rows: torch.Tensor | None = None, **__: Any) -> tuple[torch.Tensor, ...]:
    codes = x.new_empty(len(x), _padded(x.shape[1]), dtype=torch.int8)
    return codes, x.new_empty(len(x), 1, dtype=torch.float32), _room(x, rows)


def _quantize(x: torch.Tensor, source: int, given: dict[str, Any], **more: Any) -> tuple[torch.Tensor, ...]:
    """Codes, scales and taken rows of x [N, I]; ``given``: what every operation over rows is, ``more``: this one."""
    num_rows, num_inner = x.shape
    num_padded, other = _padded(num_inner), more.get("other")
    codes, scale, taken = _empty_codes(x, rows=given.get("rows"))
    tables = [given.get(name) for name in ("inverse", "vectors", "centre", "centres", "places")]
    strides = x.stride(0), 0 if other is None else other.stride(0)
    constants = {"SOURCE": source, "QMAX": given["qmax"], "DIVISOR": given["divisor"]}
    shape = _row_shape(num_rows, num_padded)
    if not num_rows:
        return codes, scale, taken
    if num_padded > WIDE and source != device_rows.NORM:
        _launch(
            *(device_rows.quantize_wide_rows, (num_rows,), x.device, x, other, *tables, codes, scale, taken),
            *(num_inner, num_padded, *strides),
            **constants,
            COLUMNS=_WIDE_COLUMNS,
            num_warps=8,
        )
    else:
        _launch(
            *(device_rows.quantize_rows, (triton.cdiv(num_rows, shape["ROWS"]),), x.device, x, other),
            *(more.get("gamma"), *tables, codes, scale, more.get("summed"), taken),
            *(num_rows, num_inner, num_padded, *strides, more.get("eps", 0.0)),
            **constants,
            **shape,
        )
    return codes, scale, taken


_SHARED = ("qmax", "divisor", "inverse", "vectors", "centre", "centres")
_SHARED_SCHEMA = (
    "int qmax, float divisor, Tensor? inverse=None, Tensor? vectors=None, Tensor? centre=None, Tensor? centres=None, "
    "*, Tensor? rows=None, Tensor? places=None"
)
"""What every operation over rows is given: ends of the codes, a ``RowSmoothing``, a ``Selection`` of rows to take."""


def _named(shared: Sequence[Any], take: dict[str, Any]) -> dict[str, Any]:
    # torch leaves out trailing arguments that are as the schema has them.
    return dict(zip(_SHARED, shared, strict=False)) | take


@_operation(f"smooth_quantize(Tensor x, {_SHARED_SCHEMA}) -> (Tensor, Tensor, Tensor)", fake=_empty_codes)
def smooth_quantize(x: torch.Tensor, *shared: Any, **take: Any) -> tuple[torch.Tensor, ...]:
    """Of ``(x[i] - centre[centres[i]]) * inverse[vectors[i]]``, x [N, I] with rows in one piece.

    Returns:
        Codes int8 [N, P], scales float32 [N, 1], and the smoothed rows [n, I] to be taken, in the dtype of x.
    """
    return _quantize(x, device_rows.ROWS, _named(shared, take))


@_operation(
    f"silu_mul_smooth_quantize(Tensor gate, Tensor up, {_SHARED_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    fake=_empty_codes,
)
def silu_mul_smooth_quantize(
    gate: torch.Tensor, up: torch.Tensor, *shared: Any, **take: Any
) -> tuple[torch.Tensor, ...]:
    """As ``smooth_quantize``, of SiLU(gate) * up in float32; both [N, I], views of one matrix or not."""
    return _quantize(gate, device_rows.SILU_MUL, _named(shared, take), other=up)


def _empty_norm(x: torch.Tensor, residual: torch.Tensor | None, *_: Any, **take: Any) -> tuple[torch.Tensor, ...]:
    return *_empty_codes(x, **take), x.new_empty(0) if residual is None else torch.empty_like(x)


@_operation(
    f"norm_smooth_quantize(Tensor x, Tensor? residual, Tensor gamma, float eps, {_SHARED_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_norm,
)
def norm_smooth_quantize(
    x: torch.Tensor, residual: torch.Tensor | None, gamma: torch.Tensor, eps: float, *shared: Any, **take: Any
) -> tuple[torch.Tensor, ...]:
    """As ``smooth_quantize``, of x [N, I], plus a residual, under RMSNorm with ``gamma`` [I] in float32.

    Returns:
        Also x + residual in the dtype of x, which is what was normalized; empty without a residual.
    """
    summed = None if residual is None else torch.empty_like(x)
    more = {"other": residual, "gamma": gamma, "eps": eps, "summed": summed}
    made = _quantize(x, device_rows.NORM, _named(shared, take), **more)
    return *made, x.new_empty(0) if summed is None else summed


def _empty_product(x: torch.Tensor, _scale: torch.Tensor, w: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(len(x), len(w), dtype=rest[-1])


@_operation(
    "multiply_codes(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor? bias, Tensor? added, "
    "Tensor? added_place, Tensor[] u, Tensor[] place, Tensor[] right, Tensor[] parts, bool four, ScalarType dtype) "
    "-> Tensor",
    fake=_empty_product,
)
def multiply_codes(  # noqa: PLR0913
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    added: torch.Tensor | None,
    added_place: torch.Tensor | None,
    u: Sequence[torch.Tensor],
    place: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    parts: Sequence[torch.Tensor],
    four: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[N, O] in ``dtype`` of codes [N, P] and a weight in the layout of ``layout.prepare``; see ``Kernel.gemm``.

    ``added`` [n, O] and ``u`` [n, R] belong to the rows of the product whose int32 ``place`` is their own number; it is
    -1 for rows that nothing is added to.
    """
    y = x.new_empty(len(x), len(w), dtype=dtype)
    if y.numel() == 0:
        return y
    if len(x) <= VERY_FEW_ROWS and added is None and not u:
        _multiply_few(x, x_scale, w, w_scale, bias, y, four)
        return y
    table, processors = gpu(x.device)
    tile = choose(table, four, len(x), len(w), processors)
    plain = added is None and not u
    splits = num_splits(tile, len(x), len(w), x.shape[1], processors) if plain else 1
    sums = y if splits == 1 else x.new_empty(splits, len(x), len(w), dtype=torch.int32)
    widths, depths = [one.shape[1] for one in u], [one.shape[1] for one in right]
    terms = tuple(zip(u, place, widths, right, depths, parts, strict=True)) or None
    programs = triton.cdiv(len(x), tile.rows) * triton.cdiv(len(w), tile.outputs)
    codes, weight = (_described(x, tile.rows, tile), _described(w, tile.outputs, tile)) if tile.described else (x, w)
    _launch(
        *(device_gemm.multiply, (programs, splits), x.device, codes, x_scale, weight, w_scale),
        *(bias, added, added_place, terms),
        *(sums, len(x), len(w), x.shape[1]),
        FOUR=four,
        NUM_TERMS=len(u),
        NUM_PARTS=len(parts[0]) if u else 0,
        RANKS=RANKS,
        STAGES=_RANK_STAGES,
        SPLITS=splits,
        DIRECT=INTERPRETED or table == WARP_GROUPS,
        **tile.options,
    )
    if splits > 1:
        _combine(sums, x_scale, w_scale, bias, y, four)
    return y


def _multiply_few(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    four: bool,
) -> None:
    num_rows, num_outputs = y.shape
    num_words = w.shape[1] // 4
    splits = num_splits_of_few(num_outputs, num_words, gpu(x.device)[1])
    sums = y if splits == 1 else x.new_empty(splits, num_rows, num_outputs, dtype=torch.int32)
    outputs = _INTERPRETED_OUTPUTS if INTERPRETED else FEW.outputs
    _launch(
        *(device_few.multiply_few, (triton.cdiv(num_outputs, outputs), splits), x.device, x.view(torch.int32)),
        *(x_scale, w.view(torch.int32), w_scale, bias, sums, num_outputs, num_words),
        FOUR=four,
        ROWS=num_rows,
        SPLITS=splits,
        BLOCK_N=outputs,
        WORDS=FEW.words,
        num_warps=FEW.warps,
    )
    if splits > 1:
        _combine(sums, x_scale, w_scale, bias, y, four)


def _described(codes: torch.Tensor, lines: int, tile: Tile) -> TensorDescriptor:
    """Codes [.., P] to be fetched in tiles of so many lines."""
    return TensorDescriptor.from_tensor(codes, [lines, tile.inner])


def _combine(
    sums: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    four: bool,
) -> None:
    num_rows, num_outputs = y.shape
    rows, outputs = min(triton.next_power_of_2(num_rows), 4), 256
    _launch(
        *(device_gemm.combine, (triton.cdiv(num_rows, rows), triton.cdiv(num_outputs, outputs)), y.device, sums),
        *(x_scale, w_scale, bias, y, num_rows, num_outputs),
        FOUR=four,
        SPLITS=len(sums),
        BLOCK_M=rows,
        BLOCK_N=outputs,
        num_warps=4,
    )
