"""Packed weights on torch's own operations: for processors or machines without a compiler where ours do not run.

Shapes: N rows, I input channels, O output channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from masq.kernels.base import Kernel, LinearSpec, PreparedWeight, QuantizedActivation, RowAddend, RowSmoothing
from masq.kernels.reference import finish, smooth
from masq.numerics.affine import QuantizedTensor, quantize
from masq.numerics.integer_gemm import scaled_matmul
from masq.numerics.packing import PackedWeight, pack, unpack

if TYPE_CHECKING:
    from masq.numerics.scheme import TensorFormat


class TorchKernel(Kernel):
    """Integer products by ``masq.numerics.integer_gemm``, exact on every processor; the others by float products.

    A weight is unpacked once to a byte per element: twice the stored size at 4 bits, half that of a 16-bit float.
    Integer products equal those of ``ReferenceKernel`` to the last bit. With float inputs a weight is dequantized in
    every call in float32 and rounded to the dtype of the rows, which are multiplied in it.
    """

    name = "torch"

    def not_supported_reasons(self, spec: LinearSpec) -> list[str]:
        """Never any."""
        return []

    def prepare(self, weight: PackedWeight, activation: TensorFormat | None) -> PreparedWeight:
        """Codes of a byte each."""
        plain = unpack(weight)
        tensors = {"codes": plain.codes.contiguous(), "scale": plain.scale}
        if plain.zero_point is not None:
            tensors["zero_point"] = plain.zero_point
        return PreparedWeight(tensors, weight.format, weight.in_features, weight.out_features)

    def restore(self, prepared: PreparedWeight) -> PackedWeight:
        """Packed again."""
        return pack(_plain(prepared))

    def quantize(
        self, x: torch.Tensor, activation: TensorFormat | None, smoothing: RowSmoothing | None
    ) -> QuantizedActivation:
        """As ``masq.numerics.affine.quantize``; rows that stay float keep their dtype."""
        rows = smooth(x, smoothing)
        if activation is None:
            return QuantizedActivation(rows.to(x.dtype), None, len(rows))
        quantized = quantize(rows, activation)
        return QuantizedActivation(quantized.codes, quantized.scale, len(rows))

    def gemm(
        self,
        activation: QuantizedActivation,
        prepared: PreparedWeight,
        *,
        bias: torch.Tensor | None,
        addend: RowAddend | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """See ``Kernel.gemm``."""
        weight, scale = _plain(prepared), activation.scale
        if scale is None:
            y_no = functional.linear(activation.data, weight.dequantize(activation.data.dtype)).float()
        elif weight.format.symmetric and weight.scale.shape[1] == 1:
            y_no = scaled_matmul(activation.data, scale, weight.codes, weight.scale)
        else:
            y_no = functional.linear(activation.data.float(), weight.dequantize(torch.float32)) * scale
        return finish(y_no, bias, addend, dtype)


def _plain(prepared: PreparedWeight) -> QuantizedTensor:
    tensors = prepared.tensors
    return QuantizedTensor(tensors["codes"], tensors["scale"], tensors.get("zero_point"), prepared.format)
