"""Our own kernels for x86 processors: AMX, AVX512 with VNNI or more, AVX2, or plain C++; the same integers on each.

Shapes: N rows, I input channels, O output channels, U smoothing vectors.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from masq.kernels import factors as low_rank_factors
from masq.kernels import w4a16
from masq.kernels.base import (
    Bias,
    Kernel,
    LinearSpec,
    LowRank,
    Norm,
    PreparedFactors,
    PreparedWeight,
    QuantizedActivation,
    RowAddend,
    RowBias,
    RowSmoothing,
    Selection,
)
from masq.kernels.build import BuildError, library
from masq.kernels.checks import check_gate, check_norm, check_rows
from masq.numerics.integer_gemm import MAX_INNER
from masq.numerics.packing import NIBBLE_BITS, PackedWeight, pack_nibbles, unpack_nibbles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.numerics.scheme import TensorFormat

ISAS = ("scalar", "avx2", "avx512_vnni", "avx512_bf16", "amx")
"""Instruction sets by their number in ``csrc/common.h``."""
_BF16 = ISAS.index("avx512_bf16")
BLOCK, PANEL, TILE = 64, 32, 16
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class CpuKernel(Kernel):
    """Exact integer products of symmetric weights with one scale a channel; see ``masq.kernels.w4a16`` for the others.

    Results equal those of ``ReferenceKernel`` to the last bit: the codes, the int32 sums, and what follows in float32.
    A weight takes half a byte or a byte per element, sizes rounded up to 64 inputs and 32 outputs, and 8 bytes a
    channel; the same bytes serve one row and many.

    Args:
        isa: one of ``ISAS`` instead of the best that the processor offers.
    """

    name = "cpu"
    fuses = True

    def __init__(self, isa: str | None = None) -> None:
        self._isa = None if isa is None else ISAS.index(isa)

    @property
    def isa(self) -> int:
        """Number of the instruction set in use.

        Raises:
            BuildError: there is no library.
        """
        best = best_isa()  # asks the system for the tiles of AMX, whatever is used in the end
        return best if self._isa is None else self._isa

    def not_supported_reasons(self, spec: LinearSpec) -> list[str]:
        """See ``Kernel.not_supported_reasons``."""
        reasons = [] if spec.device == "cpu" else [f"tensors on {spec.device}, not on the processor"]
        if platform.machine() not in ("x86_64", "AMD64"):
            reasons.append(f"processor {platform.machine()}, not x86-64")
        weight = spec.format.weight
        if spec.format.activation is None:
            reasons += [] if reasons else w4a16.not_supported_reasons(spec, lambda: self.isa)
        elif not weight.symmetric or weight.granularity != "per_channel":
            reasons.append("integer activations need symmetric weights with one scale an output channel")
        elif spec.in_features > MAX_INNER:
            reasons.append(f"more than {MAX_INNER} inputs: int32 sums could overflow")
        if not reasons:
            try:
                if self.isa > best_isa():
                    reasons.append(f"instruction set {ISAS[self.isa]}, the processor offers {ISAS[best_isa()]}")
            except BuildError as error:
                reasons.append(str(error))
        return reasons

    def prepare(self, weight: PackedWeight, activation: TensorFormat | None) -> PreparedWeight:
        """See ``Kernel.prepare``."""
        if activation is None:
            return w4a16.prepare(weight)
        four = weight.format.bits <= NIBBLE_BITS
        codes = unpack_nibbles(weight.codes, weight.in_features, signed=True) if four else weight.codes
        panels = _to_panels(codes)
        tensors = {
            "codes": pack_tiles(panels) if four else panels,
            "scale": weight.scale.flatten().clone(),
            "offset": _offsets(codes, 16 * 128 if four else 128),
        }
        return PreparedWeight(tensors, weight.format, weight.in_features, weight.out_features)

    def restore(self, prepared: PreparedWeight) -> PackedWeight:
        """See ``Kernel.restore``."""
        if "offset" not in prepared.tensors:
            return w4a16.restore(prepared)
        four = prepared.format.bits <= NIBBLE_BITS
        panels = prepared.tensors["codes"]
        codes = _from_panels(unpack_tiles(panels) if four else panels)
        codes = codes[: prepared.out_features, : prepared.in_features]
        return PackedWeight(
            pack_nibbles(codes) if four else codes.contiguous(),
            prepared.tensors["scale"].view(-1, 1).clone(),
            None,
            prepared.format,
            prepared.in_features,
        )

    def quantize(
        self,
        x: torch.Tensor,
        activation: TensorFormat | None,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """See ``Kernel.quantize``."""
        check_rows(x, smoothing, take)
        if activation is None:
            rows = x if smoothing is None else self._smooth(x, smoothing)
            return QuantizedActivation(rows, None, len(x), None if take is None else rows[take.rows])
        made, rest = self._codes(x, activation, smoothing, take)
        _functions().masq_quantize(x.data_ptr(), _DTYPES[x.dtype], *rest)
        return made

    def quantize_norm(
        self,
        x: torch.Tensor,
        norm: Norm,
        activation: TensorFormat,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """See ``Kernel.quantize_norm``."""
        check_rows(x, smoothing, take)
        check_norm(x, norm)
        given = norm.gamma.data_ptr(), _DTYPES[norm.gamma.dtype], norm.eps
        made, rest = self._codes(x, activation, smoothing, take)
        _functions().masq_quantize_norm(x.data_ptr(), _DTYPES[x.dtype], *given, *rest)
        return made

    def quantize_gate(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: TensorFormat,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """See ``Kernel.quantize_gate``."""
        check_gate(gate, up, take)
        made, rest = self._codes(gate, activation, smoothing, take)
        given = gate.data_ptr(), up.data_ptr(), _DTYPES[gate.dtype], gate.stride(0), up.stride(0)
        _functions().masq_quantize_gate(*given, *rest)
        return made

    def _codes(
        self, rows: torch.Tensor, activation: TensorFormat, smoothing: RowSmoothing | None, take: Selection | None
    ) -> tuple[QuantizedActivation, tuple[Any, ...]]:
        """Room for codes, scales and taken rows of rows [N, I], and what every function that fills it is told."""
        num_rows, num_inner = rows.shape
        codes = torch.empty(_code_bytes(num_rows, num_inner), dtype=torch.int8)
        scale = torch.empty(num_rows, 1)
        taken = None if take is None else rows.new_empty(len(take), num_inner)
        rest = (
            *(*_smoothing_pointers(smoothing), num_rows, num_inner, activation.qmax, activation.divisor),
            *(codes.data_ptr(), scale.data_ptr(), None if take is None else take.places.data_ptr(), _pointer(taken)),
            *(self.isa, torch.get_num_threads()),
        )
        return QuantizedActivation(codes, scale, num_rows, taken), rest

    def _smooth(self, x: torch.Tensor, smoothing: RowSmoothing) -> torch.Tensor:
        """Rows [N, I], centred and smoothed, rounded to their own dtype."""
        rows = torch.empty_like(x)
        given = x.data_ptr(), _DTYPES[x.dtype], *_smoothing_pointers(smoothing)
        _functions().masq_smooth(*given, *rows.shape, rows.data_ptr(), torch.get_num_threads())
        return rows

    def prepare_factors(
        self, rights: Sequence[torch.Tensor | None], sizes: Sequence[int], activation: TensorFormat | None
    ) -> PreparedFactors | None:
        """See ``Kernel.prepare_factors``: where there is bfloat16, for integer inputs; factors in it, or codes."""
        if activation is None or self.isa < _BF16:
            return None
        return low_rank_factors.prepare(rights, sizes)

    def restore_factors(self, factors: PreparedFactors) -> list[torch.Tensor | None]:
        """See ``Kernel.restore_factors``."""
        return low_rank_factors.restore(factors)

    def gemm(
        self,
        activation: QuantizedActivation,
        prepared: PreparedWeight,
        *,
        bias: Bias,
        addend: RowAddend | None,
        dtype: torch.dtype,
        low_rank: Sequence[LowRank] = (),
    ) -> torch.Tensor:
        """See ``Kernel.gemm``."""
        num_rows = activation.num_rows
        y_no = torch.empty(num_rows, prepared.out_features, dtype=dtype)
        added = _Addend(addend)
        biases, which = (bias.values, bias.rows) if isinstance(bias, RowBias) else (bias, None)
        rest = [
            *(_pointer(biases), _pointer(which), *added.arguments, y_no.data_ptr(), _DTYPES[dtype]),
            *(num_rows, prepared.out_features, prepared.in_features),
        ]
        where = (self.isa, torch.get_num_threads())
        if activation.scale is None:
            given = w4a16.arguments(activation, prepared, _DTYPES)
            _functions().masq_gemm_w4a16(*given, *rest, int(prepared.format.symmetric), *where)
            return y_no
        tensors, terms = prepared.tensors, low_rank_factors.Arguments(low_rank)
        _functions().masq_gemm(
            *(activation.data.data_ptr(), activation.scale.data_ptr(), tensors["codes"].data_ptr()),
            *(tensors["scale"].data_ptr(), tensors["offset"].data_ptr(), *rest),
            *(int(prepared.format.bits <= NIBBLE_BITS), *where, terms.pointer, terms.count),
        )
        return y_no


@cache
def best_isa() -> int:
    """The best of ``ISAS`` that processor and system offer, as a number.

    Raises:
        BuildError: there is no library.
    """
    return int(_functions().masq_best_isa())


@cache
def _functions() -> Any:
    found = library()
    found.masq_best_isa.restype = _INT
    codes = (*[_POINTER] * 4, _LONG, _LONG, _INT, _FLOAT, *[_POINTER] * 4, _INT, _INT)
    found.masq_quantize.argtypes = [_POINTER, _INT, *codes]
    found.masq_quantize_norm.argtypes = [_POINTER, _INT, _POINTER, _INT, _FLOAT, *codes]
    found.masq_quantize_gate.argtypes = [_POINTER, _POINTER, _INT, _LONG, _LONG, *codes]
    rest = [*[_POINTER] * 5, _INT, _INT, _POINTER, _INT, _LONG, _LONG, _LONG, _INT, _INT, _INT]
    found.masq_gemm.argtypes = [*[_POINTER] * 5, *rest, _POINTER, _INT]
    found.masq_gemm_w4a16.argtypes = [_POINTER, _INT, _POINTER, _POINTER, _POINTER, _LONG, _LONG, *rest]
    found.masq_smooth.argtypes = [_POINTER, _INT, *[_POINTER] * 4, _LONG, _LONG, _POINTER, _INT]
    names = "masq_quantize", "masq_quantize_norm", "masq_quantize_gate"
    for name in (*names, "masq_smooth", "masq_gemm", "masq_gemm_w4a16"):
        getattr(found, name).restype = None
    return found


class _Addend:
    """What ``csrc/common.h`` calls so, as arguments; it keeps alive what they point to."""

    def __init__(self, addend: RowAddend | None) -> None:
        self.arguments: tuple[Any, ...] = (None, None, None, 0, 0)
        if addend is None:
            return
        self._values = [part.contiguous() for part in addend.values]
        self._places = addend.selected.places
        count = len(self._values)
        pointers = (_POINTER * count)(*(part.data_ptr() for part in self._values))
        starts = (_LONG * (count + 1))(*itertools.accumulate((part.shape[1] for part in self._values), initial=0))
        self.arguments = (self._places.data_ptr(), pointers, starts, count, _DTYPES[self._values[0].dtype])


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _smoothing_pointers(smoothing: RowSmoothing | None) -> tuple[int | None, ...]:
    if smoothing is None:
        return None, None, None, None
    given = (smoothing.inverse, smoothing.rows, smoothing.centre, smoothing.centre_rows)
    return tuple(map(_pointer, given))


def _code_bytes(num_rows: int, num_inner: int) -> int:
    return -(-num_rows // TILE) * -(-num_inner // BLOCK) * TILE * BLOCK


def _to_panels(codes: torch.Tensor) -> torch.Tensor:
    """int8 [O, I] to [panels, blocks, 2, 16, 16, 4], see ``csrc/linear.cpp``."""
    padded = functional.pad(codes, (0, -codes.shape[1] % BLOCK, 0, -codes.shape[0] % PANEL))
    parts = padded.view(padded.shape[0] // PANEL, 2, TILE, padded.shape[1] // BLOCK, TILE, 4)
    return parts.permute(0, 3, 1, 4, 2, 5).contiguous()


def _from_panels(panels: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_to_panels``, padding included."""
    num_panels, num_blocks = panels.shape[:2]
    return panels.permute(0, 2, 4, 1, 3, 5).reshape(num_panels * PANEL, num_blocks * BLOCK)


def pack_tiles(panels: torch.Tensor) -> torch.Tensor:
    """Two tiles [.., 2, 16, 16, 4] of 4-bit codes in one, uint8: the first in the low halves."""
    halves = panels.view(torch.uint8)
    return (halves[:, :, 0] & 0xF) | (halves[:, :, 1] << 4)


def unpack_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_tiles``: signed codes, int8."""
    halves = torch.stack((tiles & 0xF, tiles >> 4), dim=2)
    return (halves ^ 8).view(torch.int8) - 8


def _offsets(codes: torch.Tensor, factor: int) -> torch.Tensor:
    """``factor`` times the sum of each output's codes, int32, padded to whole panels.

    Sums that do not fit wrap around, as those do that they are taken from.
    """
    sums = factor * codes.sum(1, dtype=torch.int64)
    wrapped = (sums + 2**31) % 2**32 - 2**31
    return functional.pad(wrapped.to(torch.int32), (0, -len(codes) % PANEL))
