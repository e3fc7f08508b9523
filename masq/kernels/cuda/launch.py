"""Calls into the library: structures of ``csrc/arguments.h`` from tensors, on the current stream of torch.

A call waits for nothing and allocates through torch alone, so that it can be captured in a CUDA graph. Tensors on a
CPU are for the emulator of the tests.

Shapes: N rows, I input channels, P = I rounded up to 128, O output channels, n rows of one modality, R rank.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from masq.kernels.base import QuantizedActivation
from masq.kernels.cuda.tiles import LINE, TILES, choose, num_slices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.kernels.base import LowRank, RowAddend, RowSmoothing, Selection
    from masq.numerics.scheme import TensorFormat

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_TERMS = 4
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_EMULATED_PROCESSORS = 2


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("x", "inverse", "vectors", "centre", "centres", "places")),
        *((name, _POINTER) for name in ("codes", "scales", "taken")),
        *((name, _LONG) for name in ("rows", "inputs", "line")),
        *((name, _INT) for name in ("type", "qmax")),
        ("divisor", _FLOAT),
    )


class _Term(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("u", "places", "right", "parts")),
        *((name, _LONG) for name in ("width", "depth")),
        *((name, _INT) for name in ("num_parts", "coded")),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("x", "w", "x_scale", "w_scale", "bias", "added", "added_places", "y", "sums")),
        *((name, _LONG) for name in ("rows", "outputs", "line")),
        *((name, _INT) for name in ("added_type", "type", "slices", "num_terms")),
        ("terms", _Term * MAX_TERMS),
    )


@cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU."""
    if device.type != "cuda":
        return _EMULATED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def quantize(
    library: Any, x: torch.Tensor, fmt: TensorFormat, smoothing: RowSmoothing | None, take: Selection | None
) -> QuantizedActivation:
    """See ``Kernel.quantize``: codes uint8 [N, P / 2], the even input in the lower half of a byte."""
    if x.data_ptr() % 16:
        x = x.clone()
    num_rows, inputs = x.shape
    line = -(-inputs // (2 * LINE)) * LINE
    codes = x.new_empty(num_rows, line, dtype=torch.uint8)
    scale = x.new_empty(num_rows, 1, dtype=torch.float32)
    given = _Rows(x=x.data_ptr(), codes=codes.data_ptr(), scales=scale.data_ptr())
    given.rows, given.inputs, given.line, given.type = num_rows, inputs, line, DTYPES[x.dtype]
    given.qmax, given.divisor = fmt.qmax, fmt.divisor
    if smoothing is not None:
        given.inverse, given.vectors = _pointer(smoothing.inverse), _pointer(smoothing.rows)
        given.centre, given.centres = _pointer(smoothing.centre), _pointer(smoothing.centre_rows)
    taken = None
    if take is not None:
        taken = x.new_empty(len(take), inputs)
        given.places, given.taken = take.places.data_ptr(), taken.data_ptr()
    _call(library, library.masq_cuda_quantize, x.device, given)
    return QuantizedActivation(codes, scale, num_rows, taken)


def multiply(  # noqa: PLR0913
    library: Any,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    addend: RowAddend | None,
    low_rank: Sequence[LowRank],
    dtype: torch.dtype,
) -> torch.Tensor:
    """[N, O] in ``dtype`` of codes uint8 [N, P / 2] and [O, P / 2] and their scales [N, 1] and [O].

    See ``Kernel.gemm``; factors lie as ``masq.kernels.triton.layout.prepare_factors`` arranges them.
    """
    num_rows, outputs, line = len(x), len(w), x.shape[1]
    y = x.new_empty(num_rows, outputs, dtype=dtype)
    given = _Product(x=x.data_ptr(), w=w.data_ptr(), x_scale=x_scale.data_ptr(), w_scale=w_scale.data_ptr())
    given.bias, given.y, given.type = _pointer(bias), y.data_ptr(), DTYPES[dtype]
    given.rows, given.outputs, given.line = num_rows, outputs, line
    kept = [*_set_addend(given, addend), *_set_terms(given, low_rank)]
    tile = choose(num_rows, outputs, processors(x.device))
    given.slices = 1
    if not kept:
        given.slices = num_slices(TILES[tile], num_rows, outputs, line // LINE, processors(x.device))
    if given.slices > 1:
        sums = x.new_empty(given.slices, num_rows, outputs, dtype=torch.int32)
        given.sums = sums.data_ptr()
        kept.append(sums)
    _call(library, library.masq_cuda_multiply, x.device, given, tile)
    return y


def _set_addend(given: _Product, addend: RowAddend | None) -> list[torch.Tensor]:
    """Fill in what is added to rows; returns the tensors that must live until the call."""
    if addend is None or not len(addend.selected):
        return []
    values = addend.values[0] if len(addend.values) == 1 else torch.cat(addend.values, dim=1)
    where = addend.selected.places
    given.added, given.added_places, given.added_type = values.data_ptr(), where.data_ptr(), DTYPES[values.dtype]
    return [values, where]


def _set_terms(given: _Product, low_rank: Sequence[LowRank]) -> list[torch.Tensor]:
    """Fill in corrections; returns the tensors that must live until the call."""
    terms = [term for term in low_rank if len(term.selected)]
    assert len(terms) <= MAX_TERMS, "one for each modality"
    kept = []
    for entry, term in zip(given.terms, terms, strict=False):
        where, right, parts = term.selected.places, *(term.factors.tensors[n] for n in ("right", "parts"))
        entry.u, entry.places, entry.right, entry.parts = (one.data_ptr() for one in (term.u, where, right, parts))
        entry.width, entry.depth = term.u.shape[1], right.shape[1]
        entry.num_parts, entry.coded = len(parts), int(right.dtype == torch.int8)
        kept += [term.u, where, right, parts]
    given.num_terms = len(terms)
    return kept


def _call(library: Any, function: Any, device: torch.device, given: ctypes.Structure, *more: int) -> None:
    """Run a function of the library on a device and its current stream.

    Raises:
        RuntimeError: the launch failed.
    """
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else nullcontext():
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        index = torch.cuda.current_device() if on_gpu else 0
        failed = function(ctypes.byref(given), *more, index, _POINTER(stream))
    if failed:
        library.masq_cuda_error.restype = ctypes.c_char_p
        raise RuntimeError(
            f"a kernel of kernel=cuda must start (got: {library.masq_cuda_error(failed).decode()}). "
            "Use kernel=triton or kernel=reference, and see masq doctor"
        )


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
