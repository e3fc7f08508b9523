"""The kernel for the int4 tensor cores of NVIDIA GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from masq.kernels.base import (
    Bias,
    Kernel,
    LinearSpec,
    LowRank,
    PreparedFactors,
    PreparedWeight,
    QuantizedActivation,
    RowAddend,
    RowBias,
    RowSmoothing,
    Selection,
)
from masq.kernels.build import BuildError
from masq.kernels.checks import check_rows
from masq.kernels.cuda import build, launch
from masq.kernels.cuda.tiles import LINE
from masq.kernels.triton import layout
from masq.numerics.packing import NIBBLE_BITS, PackedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.numerics.scheme import LinearFormat, TensorFormat

MAX_INPUTS = 2**24
"""Sums of so many products of 4-bit codes fit into int32."""


class CudaKernel(Kernel):
    """Exact products of 4-bit symmetric weights with one scale a channel and 4-bit inputs, on NVIDIA GPUs.

    Codes, sums and what follows in float32 equal those of ``ReferenceKernel`` on a CPU to the last bit. Low-rank
    corrections are added in float32 as tensor cores add them: within ``(2 R + 4) 2^-23 (|y| + sum_r |u_r l_r|)`` of
    their exact sum. A weight takes half a byte per element, inputs rounded up to 128, and 4 bytes a channel: the bytes
    in which it is stored, which are also the operands of a tensor core.

    Args:
        library: built elsewhere by ``python -m masq.kernels.cuda.build``, instead of what is built or found here.
    """

    name = "cuda"

    def __init__(self, library: Path | None = None) -> None:
        self._path = library
        self._given: Any = None

    def not_supported_reasons(self, spec: LinearSpec) -> list[str]:
        """See ``Kernel.not_supported_reasons``."""
        reasons = _format_reasons(spec.format)
        if spec.in_features > MAX_INPUTS:
            reasons.append(f"more than {MAX_INPUTS} inputs: int32 sums could overflow")
        if spec.device != "cuda":
            reasons.insert(0, f"tensors on {spec.device}, not on an NVIDIA GPU")
            if build.find_compiler() is None and self._path is None:
                reasons.append(f"no {build.COMPILER} on the path, which builds it when a GPU needs it")
            return reasons
        if torch.version.cuda is None or not torch.cuda.is_available():
            return [*reasons, "torch finds no NVIDIA GPU"]
        major, minor = torch.cuda.get_device_capability()
        if 10 * major + minor < build.OLDEST:
            reasons.append(f"compute capability {major}.{minor}, {build.OLDEST // 10}.{build.OLDEST % 10} is needed")
        if not reasons:
            try:
                self._library(torch.device("cuda", torch.cuda.current_device()))
            except BuildError as error:
                reasons.append(str(error))
        return reasons

    def prepare(self, weight: PackedWeight, activation: TensorFormat | None) -> PreparedWeight:
        """See ``Kernel.prepare``: the stored bytes, each line padded with zeros to a multiple of 64; scales [O]."""
        codes = functional.pad(weight.codes, (0, -weight.codes.shape[1] % LINE)).contiguous()
        tensors = {"codes": codes, "scale": weight.scale.flatten().clone()}
        return PreparedWeight(tensors, weight.format, weight.in_features, weight.out_features)

    def restore(self, prepared: PreparedWeight) -> PackedWeight:
        """See ``Kernel.restore``."""
        codes = prepared.tensors["codes"][:, : (prepared.in_features + 1) // 2]
        return PackedWeight(
            codes.clone(memory_format=torch.contiguous_format),
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
        """See ``Kernel.quantize``; the codes are uint8 [N, I rounded up to 128, by 2].

        Raises:
            NumericalError: rows or factors of another dtype, shape or layout.
        """
        assert activation is not None, "see not_supported_reasons"
        check_rows(x, smoothing, take)
        return launch.quantize(self._library(x.device), x, activation, smoothing, take)

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
        assert activation.scale is not None, "see not_supported_reasons"
        if isinstance(bias, RowBias):
            given: dict[str, Any] = {"addend": addend, "dtype": torch.float32, "low_rank": low_rank}
            return bias.add(self.gemm(activation, prepared, bias=None, **given), dtype)
        codes, scale = prepared.tensors["codes"], prepared.tensors["scale"]
        return launch.multiply(
            *(self._library(codes.device), activation.data, activation.scale, codes, scale),
            bias=bias,
            addend=addend,
            low_rank=low_rank,
            dtype=dtype,
        )

    def _library(self, device: torch.device) -> Any:
        """The library that was given, or that for a GPU.

        Raises:
            BuildError: there is none.
        """
        if self._path is not None:
            self._given = self._given or build.load(self._path)
            return self._given
        major, minor = torch.cuda.get_device_capability(device)
        return build.library(10 * major + minor)


def _format_reasons(fmt: LinearFormat) -> list[str]:
    weight, activation, reasons = fmt.weight, fmt.activation, []
    if weight.bits > NIBBLE_BITS:
        reasons.append(f"weights of {weight.bits} bits: int4 tensor cores multiply {NIBBLE_BITS} by {NIBBLE_BITS}")
    if not weight.symmetric or weight.granularity != "per_channel":
        reasons.append("weights must be symmetric with one scale an output channel")
    if activation is None:
        reasons.append("inputs that are not quantized")
        return reasons
    if activation.bits > NIBBLE_BITS:
        reasons.append(f"inputs of {activation.bits} bits: int4 tensor cores multiply {NIBBLE_BITS} by {NIBBLE_BITS}")
    if not activation.symmetric or activation.granularity != "per_token":
        reasons.append("inputs must be symmetric with one scale a token")
    return reasons
