"""The kernel for NVIDIA GPUs: integer products written in Triton."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

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
from masq.kernels.checks import check_gate, check_norm, check_rows
from masq.kernels.triton import layout
from masq.kernels.triton.tiles import OLDEST
from masq.numerics.packing import NIBBLE_BITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.numerics.packing import PackedWeight
    from masq.numerics.scheme import TensorFormat

MAX_INPUTS = 2**15
"""A row of so many inputs is quantized by one program."""


class TritonKernel(Kernel):
    """Exact integer products of symmetric weights with one scale a channel, on NVIDIA GPUs.

    Codes, sums and what follows in float32 equal those of ``ReferenceKernel`` on a CPU to the last bit. Low-rank
    corrections are added in float32 as tensor cores add them: within ``(2 R + 4) 2^-23 (|y| + sum_r |u_r l_r|)`` of
    their exact sum. A weight takes half a byte or a byte per element, inputs rounded up to 128, and 4 bytes a channel.
    """

    name = "triton"
    fuses = True

    def not_supported_reasons(self, spec: LinearSpec) -> list[str]:
        """See ``Kernel.not_supported_reasons``."""
        reasons = _machine_reasons(spec.device)
        weight, activation = spec.format.weight, spec.format.activation
        if activation is None:
            reasons.append("inputs that are not quantized")
        elif not activation.symmetric or activation.granularity != "per_token":
            reasons.append("inputs must be symmetric with one scale a token")
        if not weight.symmetric or weight.granularity != "per_channel":
            reasons.append("weights must be symmetric with one scale an output channel")
        if spec.in_features > MAX_INPUTS:
            reasons.append(f"more than {MAX_INPUTS} inputs: a row does not fit into the registers of a program")
        return reasons

    def prepare(self, weight: PackedWeight, activation: TensorFormat | None) -> PreparedWeight:
        """See ``Kernel.prepare`` and ``layout.prepare``."""
        return layout.prepare(weight)

    def restore(self, prepared: PreparedWeight) -> PackedWeight:
        """See ``Kernel.restore``."""
        return layout.restore(prepared)

    def quantize(
        self,
        x: torch.Tensor,
        activation: TensorFormat | None,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """See ``Kernel.quantize``; the codes are int8 [N, I rounded up to 128].

        Raises:
            NumericalError: rows or factors of another dtype, shape or layout.
        """
        from masq.kernels.triton import fused, ops

        assert activation is not None, "see not_supported_reasons"
        check_rows(x, smoothing, take)
        shared, wanted = fused.given(activation, smoothing, take)
        return fused.quantized(ops.smooth_quantize(x, *shared, **wanted), take)

    def quantize_norm(
        self,
        x: torch.Tensor,
        norm: Norm,
        activation: TensorFormat,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """See ``Kernel.quantize_norm``."""
        from masq.kernels.triton import fused

        check_rows(x, smoothing, take)
        check_norm(x, norm)
        return fused.normalize(x, norm, activation, smoothing, take)[0]

    def quantize_gate(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: TensorFormat,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """See ``Kernel.quantize_gate``."""
        from masq.kernels.triton import fused

        check_gate(gate, up, take)
        return fused.silu_times_up(gate, up, activation, smoothing, take)

    def prepare_factors(
        self, rights: Sequence[torch.Tensor | None], sizes: Sequence[int], activation: TensorFormat | None
    ) -> PreparedFactors | None:
        """See ``Kernel.prepare_factors``: factors in bfloat16, or their codes."""
        return None if activation is None else layout.prepare_factors(rights, sizes)

    def restore_factors(self, factors: PreparedFactors) -> list[torch.Tensor | None]:
        """See ``Kernel.restore_factors``."""
        return layout.restore_factors(factors)

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
        from masq.kernels.triton import ops

        assert activation.scale is not None, "see not_supported_reasons"
        if isinstance(bias, RowBias):
            given: dict[str, Any] = {"addend": addend, "dtype": torch.float32, "low_rank": low_rank}
            return bias.add(self.gemm(activation, prepared, bias=None, **given), dtype)
        added, added_place = None, None
        if addend is not None and len(addend.selected):
            added = addend.values[0] if len(addend.values) == 1 else torch.cat(addend.values, dim=1)
            added_place = addend.selected.places
        terms = [term for term in low_rank if len(term.selected)]
        return ops.multiply_codes(
            *(activation.data, activation.scale, prepared.tensors["codes"], prepared.tensors["scale"]),
            *(bias, added, added_place, [term.u for term in terms]),
            [term.selected.places for term in terms],
            [term.factors.tensors["right"] for term in terms],
            [term.factors.tensors["parts"] for term in terms],
            prepared.format.bits <= NIBBLE_BITS,
            dtype,
        )


def _machine_reasons(device: str) -> list[str]:
    reasons = [] if device == "cuda" else [f"tensors on {device}, not on an NVIDIA GPU"]
    if find_spec("triton") is None:
        reasons.append("triton is not installed")
    if device != "cuda":
        return reasons
    if torch.version.cuda is None or not torch.cuda.is_available():
        return [*reasons, "torch finds no NVIDIA GPU"]
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < OLDEST:
        reasons.append(f"compute capability {major}.{minor}, {OLDEST // 10}.{OLDEST % 10} is needed")
    return reasons
