"""Packed weights on torch's own operations: for processors or machines without a compiler where ours do not run.

Shapes: N rows, I input channels, O output channels, G groups of input channels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from masq.kernels.base import (
    Bias,
    Kernel,
    LinearSpec,
    LowRank,
    PreparedWeight,
    QuantizedActivation,
    RowAddend,
    RowSmoothing,
    Selection,
)
from masq.kernels.reference import finish, smooth, taken
from masq.numerics.affine import QuantizedTensor, quantize
from masq.numerics.integer_gemm import MAX_INNER, float_matmul, integer_matmul
from masq.numerics.packing import NIBBLE_BITS, PackedWeight, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.numerics.scheme import TensorFormat

FEW_ROWS = 32
"""Up to here torch's product with packed 4-bit weights is faster than to dequantize them."""
_INT4_GROUPS = (32, 64, 128, 256)
_INT4_MULTIPLE = 16
_BLOCK = 2**18
"""Weights that are dequantized at a time on a CPU: a megabyte in float32, which the second cache holds."""
_TYPICAL_ROWS = 256
_TRIES, _SLOW_SECONDS = 5, 0.02


class TorchKernel(Kernel):
    """Products of torch's own operations, for any format on any device.

    Integer inputs and symmetric weights with one scale a channel: equal to ``ReferenceKernel`` to the last bit. The
    weight takes a byte per element, with AMX in the layout of oneDNN, whose int8 product is fastest there; elsewhere
    ``masq.numerics.integer_gemm`` multiplies, exact on every processor.

    All others: a weight in its stored layout is dequantized in float32 in every call, block by block, and rounded to
    the dtype in which the processor multiplies: float32 for integer inputs, else that of the rows. Within
    ``u sum_k |x_k w_k| + u |y|`` of float64 plus the float32 sum's own error, where u is 2^-8 in bfloat16, 2^-11 in
    float16 and nothing in float32. Up to 32 rows in bfloat16 on a CPU, if the weight has up to 4 bits and groups
    that torch knows, are multiplied by its packed weights, another half byte per element: scales and zero points are
    then rounded to bfloat16, and an error of up to ``2^-8 sum_k |x_k| (|code_k - 8| + |zero - 8|) scale`` takes the
    place of the first term, codes and zero point counted from 0 to 15.
    """

    name = "torch"

    def not_supported_reasons(self, spec: LinearSpec) -> list[str]:
        """Never any."""
        return []

    def prepare(self, weight: PackedWeight, activation: TensorFormat | None) -> PreparedWeight:
        """Codes of a byte each where the product is an integer one, else the stored tensors and what few rows need."""
        rest = (weight.format, weight.in_features, weight.out_features)
        on_cpu = weight.codes.device.type == "cpu"
        if activation is not None and weight.format.symmetric and weight.scale.shape[1] == 1:
            codes = unpack(weight).codes
            if on_cpu and weight.in_features <= MAX_INNER and has_fast_qlinear():
                prepacked = torch.ops.onednn.qlinear_prepack(codes, [_TYPICAL_ROWS, weight.in_features])
                return _Prepacked({"prepacked": prepacked, "scale": weight.scale}, *rest)
            return PreparedWeight({"bytes": codes.contiguous(), "scale": weight.scale}, *rest)
        tensors = {"codes": weight.codes, "scale": weight.scale}
        if weight.zero_point is not None:
            tensors["zero_point"] = weight.zero_point
        if activation is None and on_cpu and _has_int4_product(weight):
            tensors |= _int4(unpack(weight))
        return PreparedWeight(tensors, *rest)

    def restore(self, prepared: PreparedWeight) -> PackedWeight:
        """See ``Kernel.restore``."""
        tensors, fmt = prepared.tensors, prepared.format
        if "codes" in tensors:
            return PackedWeight(
                tensors["codes"], tensors["scale"], tensors.get("zero_point"), fmt, prepared.in_features
            )
        codes = tensors["bytes"] if "bytes" in tensors else tensors["prepacked"].to_dense().t()
        return pack(QuantizedTensor(codes.contiguous(), tensors["scale"], None, fmt))

    def quantize(
        self,
        x: torch.Tensor,
        activation: TensorFormat | None,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """As ``masq.numerics.affine.quantize``; rows that stay float keep their dtype."""
        rows = smooth(x, smoothing)
        own = taken(rows, take, x.dtype)
        if activation is None:
            return QuantizedActivation(rows.to(x.dtype), None, len(rows), own)
        quantized = quantize(rows, activation)
        return QuantizedActivation(quantized.codes, quantized.scale, len(rows), own)

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
        rows, tensors = activation.data, prepared.tensors
        if "codes" not in tensors:
            assert activation.scale is not None
            y_no = _integer_product(rows, tensors).mul_(activation.scale).mul_(tensors["scale"].view(1, -1))
        elif "int4" in tensors and len(rows) <= FEW_ROWS and rows.dtype == torch.bfloat16:
            y_no = _int4_product(rows, prepared)
        else:
            y_no = _blockwise_product(rows, self.restore(prepared))
            if activation.scale is not None:
                y_no *= activation.scale
        return finish(y_no, bias, addend, dtype)


@dataclass(frozen=True, eq=False)
class _Prepacked(PreparedWeight):
    """A weight in the layout of oneDNN, which torch can clone but not copy deeply."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Prepacked:
        return replace(self, tensors={name: tensor.clone() for name, tensor in self.tensors.items()})


@lru_cache(maxsize=1)
def has_fast_qlinear() -> bool:
    """Whether oneDNN multiplies int8 codes by AMX here, exactly; asked once per process.

    Where it lacks AMX, or was told to ignore it, its product of signed codes is a plain loop, ten thousand times
    slower: it is tried on a small product before it is trusted.
    """
    if not getattr(torch.cpu, "_is_amx_tile_supported", bool)() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    num_inner = 256
    # Where pairs of products are added in 16 bits, those of the largest codes saturate.
    signs = torch.tensor([1, -1], dtype=torch.int8).repeat(16).unsqueeze(1)
    a, b = (127 * signs.repeat(times, num_inner) for times in (1, 8))
    prepacked = torch.ops.onednn.qlinear_prepack(b, [_TYPICAL_ROWS, num_inner])
    product = _qlinear(a, prepacked)
    start = time.perf_counter()
    for _ in range(_TRIES):
        _qlinear(a, prepacked)
    fast = time.perf_counter() - start < _TRIES * _SLOW_SECONDS
    return fast and torch.equal(product, float_matmul(a, b).float())


def _qlinear(rows: torch.Tensor, prepacked: torch.Tensor) -> torch.Tensor:
    """Sums over int8 codes [N, I], exact until they are rounded once to float32 [N, O]."""
    num_outputs = prepacked.shape[1]
    ones, zeros = torch.ones(num_outputs), torch.zeros(num_outputs, dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        *(rows, 1.0, 0, prepacked, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    )


def _integer_product(rows: torch.Tensor, tensors: Any) -> torch.Tensor:
    if "prepacked" in tensors:
        return _qlinear(rows, tensors["prepacked"])
    return integer_matmul(rows, tensors["bytes"]).float()


def _has_int4_product(weight: PackedWeight) -> bool:
    fits = weight.format.group_size in _INT4_GROUPS and weight.out_features % _INT4_MULTIPLE == 0
    return fits and weight.format.bits <= NIBBLE_BITS


def _int4(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """Codes [O, I] in torch's layout, and bfloat16 [G, O, 2]: a weight is ``(code - 8) * [..., 0] + [..., 1]``."""
    signed = weight.zero_point is None
    codes = weight.codes.int() + 8 if signed else weight.codes.int()
    shift = torch.zeros_like(weight.scale) if weight.zero_point is None else (8 - weight.zero_point) * weight.scale
    return {
        "int4": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
        "int4_scale": torch.stack((weight.scale.t(), shift.t()), dim=-1).bfloat16().contiguous(),
    }


def _int4_product(rows: torch.Tensor, prepared: PreparedWeight) -> torch.Tensor:
    int4, scale = prepared.tensors["int4"], prepared.tensors["int4_scale"]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, int4, prepared.format.group_size, scale).float()


def _blockwise_product(rows: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Rows [N, I] times the dequantized weight, in the dtype in which they are multiplied: float32 [N, O]."""
    size = weight.out_features if rows.is_cuda else max(_BLOCK // weight.in_features, 1)
    rows = rows.to(_product_dtype(rows))
    y_no = torch.empty(len(rows), weight.out_features, device=rows.device)
    for first in range(0, weight.out_features, size):
        part = slice(first, first + size)
        zero_point = None if weight.zero_point is None else weight.zero_point[part]
        block = PackedWeight(weight.codes[part], weight.scale[part], zero_point, weight.format, weight.in_features)
        y_no[:, part] = functional.linear(rows, unpack(block).dequantize(rows.dtype))
    return y_no


def _product_dtype(rows: torch.Tensor) -> torch.dtype:
    """That of the rows if their device multiplies in it, else float32: on a CPU without bfloat16 it is a plain loop."""
    if rows.is_cuda and rows.is_floating_point():
        return rows.dtype
    fast = rows.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
