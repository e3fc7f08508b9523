"""The oracle: every format on any device, in plain torch, the same arithmetic as the simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from masq.kernels.base import (
    Bias,
    Kernel,
    LinearSpec,
    LowRank,
    Norm,
    PreparedWeight,
    QuantizedActivation,
    RowAddend,
    RowBias,
    RowSmoothing,
    Selection,
)
from masq.numerics.affine import quantize
from masq.numerics.integer_gemm import scaled_matmul
from masq.numerics.packing import PackedWeight, unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.numerics.scheme import TensorFormat


def smooth(x: torch.Tensor, smoothing: RowSmoothing | None) -> torch.Tensor:
    """Rows [N, I], centred and smoothed, float32."""
    return x.float() if smoothing is None else smoothing.apply(x)


def taken(smoothed: torch.Tensor, take: Selection | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Those of smoothed rows [N, I] that are asked for, [n, I] in ``dtype``."""
    return None if take is None else smoothed[take.rows].to(dtype)


def finish(y_no: torch.Tensor, bias: Bias, addend: RowAddend | None, dtype: torch.dtype) -> torch.Tensor:
    """Add what comes after the product to float32 [N, O], in place, and round once to ``dtype``."""
    if addend is not None:
        y_no[addend.selected.rows] += torch.cat(addend.values, dim=1).float()
    if isinstance(bias, RowBias):
        return bias.add(y_no, dtype)
    if bias is not None:
        y_no += bias
    return y_no.to(dtype)


class ReferenceKernel(Kernel):
    """Exact integer accumulation for symmetric weights with one scale a channel; float32 products for all others.

    The weight stays in its stored layout and is unpacked in every call: small, and slow.
    """

    name = "reference"
    fuses = True

    def not_supported_reasons(self, spec: LinearSpec) -> list[str]:
        """Never any."""
        return []

    def prepare(self, weight: PackedWeight, activation: TensorFormat | None) -> PreparedWeight:
        """The stored tensors themselves."""
        tensors = {"codes": weight.codes, "scale": weight.scale}
        if weight.zero_point is not None:
            tensors["zero_point"] = weight.zero_point
        return PreparedWeight(tensors, weight.format, weight.in_features, weight.out_features)

    def restore(self, prepared: PreparedWeight) -> PackedWeight:
        """The stored tensors themselves."""
        tensors = prepared.tensors
        return PackedWeight(
            tensors["codes"], tensors["scale"], tensors.get("zero_point"), prepared.format, prepared.in_features
        )

    def quantize(
        self,
        x: torch.Tensor,
        activation: TensorFormat | None,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """As ``masq.numerics.affine.quantize``, by calling it."""
        return _quantized(smooth(x, smoothing), activation, take, x.dtype)

    def quantize_norm(
        self,
        x: torch.Tensor,
        norm: Norm,
        activation: TensorFormat,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """See ``Kernel.quantize_norm``."""
        rows = functional.rms_norm(x.float(), x.shape[1:], norm.gamma.float(), norm.eps)
        return _quantized(smooth(rows, smoothing), activation, take, x.dtype)

    def quantize_gate(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: TensorFormat,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """See ``Kernel.quantize_gate``."""
        rows = functional.silu(gate.float()) * up.float()
        return _quantized(smooth(rows, smoothing), activation, take, gate.dtype)

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
        """As ``QuantLinear`` computes it, bit for bit."""
        assert not low_rank, "it prepares no factors"
        weight = unpack(self.restore(prepared))
        scale = activation.scale
        if scale is not None and weight.format.symmetric and weight.scale.shape[1] == 1:
            y_no = scaled_matmul(activation.data, scale, weight.codes, weight.scale)
        else:
            y_no = functional.linear(activation.data.float(), weight.dequantize(torch.float32))
            if scale is not None:
                y_no *= scale
        return finish(y_no, bias, addend, dtype)


def _quantized(
    smoothed: torch.Tensor, activation: TensorFormat | None, take: Selection | None, dtype: torch.dtype
) -> QuantizedActivation:
    """Smoothed rows [N, I] in float32, which came in ``dtype``, as the kernel multiplies them."""
    own = taken(smoothed, take, dtype)
    if activation is None:
        return QuantizedActivation(smoothed, None, len(smoothed), own)
    quantized = quantize(smoothed, activation)
    return QuantizedActivation(quantized.codes, quantized.scale, len(smoothed), own)
