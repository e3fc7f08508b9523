"""The launches, each an operation of torch: opaque to ``torch.compile``, and free of anything that waits for the GPU.

Grids follow from shapes alone, so that a launch can be captured in a CUDA graph; everything they write is allocated
here, on the stream of the caller. Tensors on a CPU are for Triton's interpreter.

Shapes: N rows, I input channels, P = I rounded up to blocks of 128, O output channels, U smoothing vectors, n rows of
one modality, R rank.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from masq.kernels.triton import device_gemm, device_rows
from masq.kernels.triton.layout import RANKS
from masq.kernels.triton.tiles import BLOCK, WARP_GROUPS, Tile, choose, num_splits, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INTERPRETED = not isinstance(device_gemm.multiply, triton.JITFunction)
"""Whether the functions of this process run in Triton's interpreter."""
_ELEMENTS_PER_PROGRAM = 2048
FEW_ROWS = 64
"""Up to here a row is quantized by more warps."""
_ELEMENTS_PER_WARP, _ELEMENTS_PER_WARP_OF_FEW = 1024, 256
WIDE = 8192
"""Rows of more columns are read twice, in parts of ``_WIDE_COLUMNS``."""
_WIDE_COLUMNS = 4096
_INTERPRETED_ELEMENTS = 2**16
_INTERPRETED_GPU = (90, 8)

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


def _quantize(x: torch.Tensor, ends: tuple[int, float], source: int, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, num_inner = x.shape
    num_padded = _padded(num_inner)
    codes = x.new_empty(num_rows, num_padded, dtype=torch.int8)
    scale = x.new_empty(num_rows, 1, dtype=torch.float32)
    names = ("other", "gamma", "inverse", "vectors", "centre", "centres", "keep")
    other = given.get("other")
    shape = _row_shape(num_rows, num_padded)
    if num_padded > WIDE and source != device_rows.NORM:
        if num_rows:
            _launch(
                *(device_rows.quantize_wide_rows, (num_rows,), x.device, x),
                *(given.get(name) for name in ("other", "inverse", "vectors", "centre", "centres")),
                *(codes, scale, num_inner, num_padded, x.stride(0), 0 if other is None else other.stride(0)),
                SOURCE=source,
                QMAX=ends[0],
                DIVISOR=ends[1],
                COLUMNS=_WIDE_COLUMNS,
                num_warps=8,
            )
    elif num_rows:
        _launch(
            *(device_rows.quantize_rows, (triton.cdiv(num_rows, shape["ROWS"]),), x.device, x),
            *(*(given.get(name) for name in names), codes, scale, given.get("summed"), given.get("normed")),
            *(num_rows, num_inner, num_padded, x.stride(0), 0 if other is None else other.stride(0)),
            given.get("eps", 0.0),
            SOURCE=source,
            QMAX=ends[0],
            DIVISOR=ends[1],
            **shape,
        )
    return codes, scale


def _empty_codes(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(len(x), _padded(x.shape[1]), dtype=torch.int8), x.new_empty(len(x), 1, dtype=torch.float32)


@_operation(
    "smooth_quantize(Tensor x, Tensor? inverse, Tensor? vectors, int qmax, float divisor, Tensor? centre=None, "
    "Tensor? centres=None) -> (Tensor, Tensor)",
    fake=_empty_codes,
)
def smooth_quantize(
    x: torch.Tensor,
    inverse: torch.Tensor | None,
    vectors: torch.Tensor | None,
    qmax: int,
    divisor: float,
    centre: torch.Tensor | None = None,
    centres: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [N, P] and scales float32 [N, 1] of ``(x[i] - centre[centres[i]]) * inverse[vectors[i]]``.

    x [N, I], rows in one piece.
    """
    given = {"inverse": inverse, "vectors": vectors, "centre": centre, "centres": centres}
    return _quantize(x, (qmax, divisor), device_rows.ROWS, **given)


@_operation(
    "silu_mul_smooth_quantize(Tensor gate, Tensor up, Tensor? inverse, Tensor? vectors, int qmax, float divisor, "
    "Tensor? centre=None, Tensor? centres=None) -> (Tensor, Tensor)",
    fake=_empty_codes,
)
def silu_mul_smooth_quantize(  # noqa: PLR0913
    gate: torch.Tensor,
    up: torch.Tensor,
    inverse: torch.Tensor | None,
    vectors: torch.Tensor | None,
    qmax: int,
    divisor: float,
    centre: torch.Tensor | None = None,
    centres: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``smooth_quantize``, of SiLU(gate) * up in float32; both [N, I], views of one matrix or not."""
    given = {"inverse": inverse, "vectors": vectors, "centre": centre, "centres": centres}
    return _quantize(gate, (qmax, divisor), device_rows.SILU_MUL, other=up, **given)


def _empty_norm(x: torch.Tensor, residual: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor, ...]:
    keep = _[4]
    nothing = x.new_empty(0)
    return (
        *_empty_codes(x),
        nothing if residual is None else torch.empty_like(x),
        nothing.clone() if keep is None else torch.empty_like(x),
    )


@_operation(
    "norm_smooth_quantize(Tensor x, Tensor? residual, Tensor gamma, float eps, Tensor? inverse, Tensor? vectors, "
    "Tensor? keep, int qmax, float divisor, Tensor? centre=None, Tensor? centres=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_norm,
)
def norm_smooth_quantize(  # noqa: PLR0913
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gamma: torch.Tensor,
    eps: float,
    inverse: torch.Tensor | None,
    vectors: torch.Tensor | None,
    keep: torch.Tensor | None,
    qmax: int,
    divisor: float,
    centre: torch.Tensor | None = None,
    centres: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """As ``smooth_quantize``, of x [N, I], plus a residual, under RMSNorm with ``gamma`` [I] in float32.

    Returns:
        Codes and scales; x + residual in the dtype of x, which is what was normalized; and the normalized rows that
        ``keep`` (int8 or bool [N]) names in the dtype of x, the others undefined. Empty where not asked for.
    """
    summed = None if residual is None else torch.empty_like(x)
    normed = None if keep is None else torch.empty_like(x)
    given = {"inverse": inverse, "vectors": vectors, "centre": centre, "centres": centres}
    given |= {"summed": summed, "normed": normed, "gamma": gamma, "eps": eps}
    kept = None if keep is None else keep.view(torch.int8)
    codes, scale = _quantize(x, (qmax, divisor), device_rows.NORM, other=residual, keep=kept, **given)
    return codes, scale, x.new_empty(0) if summed is None else summed, x.new_empty(0) if normed is None else normed


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
        SPLITS=splits,
        DIRECT=INTERPRETED or table == WARP_GROUPS,
        **tile.options,
    )
    if splits > 1:
        _combine(sums, x_scale, w_scale, bias, y, four)
    return y


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


def _empty_projection(x: torch.Tensor, rows: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(len(rows), rest[-1].shape[1])


@_operation(
    "low_rank_down(Tensor x, Tensor rows, Tensor? inverse, Tensor? vectors, Tensor left) -> Tensor",
    fake=_empty_projection,
)
def low_rank_down(
    x: torch.Tensor,
    rows: torch.Tensor,
    inverse: torch.Tensor | None,
    vectors: torch.Tensor | None,
    left: torch.Tensor,
) -> torch.Tensor:
    """U [n, R] = smoothed ``x[rows]`` times L1 [I, R], all in the dtype of x [N, I], sums in float32."""
    u = x.new_empty(len(rows), left.shape[1])
    if u.numel():
        block_m, block_k = 64, 64
        block_r = min(max(triton.next_power_of_2(u.shape[1]), 16), 64)
        _launch(
            *(device_gemm.project, (triton.cdiv(len(u), block_m), triton.cdiv(u.shape[1], block_r)), x.device, x),
            *(rows, inverse, vectors, left, u, len(u), x.shape[1], u.shape[1]),
            BLOCK_M=block_m,
            BLOCK_R=block_r,
            BLOCK_K=block_k,
            num_warps=4,
            num_stages=3,
        )
    return u
