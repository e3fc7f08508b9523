"""What a kernel is: stored weight in, rows in, rows out. One interface for every machine.

A kernel says of any linear whether it can run it and, if not, why (``not_supported_reasons``); ``select`` takes the
first that can. Nothing here reads an environment variable.

Shapes: N rows (tokens), I input channels, O output channels, U distinct smoothing vectors, n corrected rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import TypeAlias

    from masq.numerics.packing import PackedWeight
    from masq.numerics.scheme import LinearFormat, TensorFormat


@dataclass(frozen=True)
class LinearSpec:
    """What a kernel must know to say whether it can run a linear.

    Attributes:
        in_features: I.
        out_features: O.
        format: of weight and input.
        device: type of the device, "cpu" or "cuda".
    """

    in_features: int
    out_features: int
    format: LinearFormat
    device: str


@dataclass(frozen=True, eq=False)
class PreparedWeight:
    """A weight in the layout of one kernel.

    Attributes:
        tensors: by names of the kernel's own; all that stays in memory of the weight.
        format: what the codes mean.
        in_features: I.
        out_features: O.
    """

    tensors: Mapping[str, torch.Tensor]
    format: TensorFormat
    in_features: int
    out_features: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@dataclass(frozen=True, eq=False)
class RowSmoothing:
    """Run-time smoothing: row i becomes ``(x_i - centre[centre_rows[i]]) * inverse[rows[i]]``, in float32.

    Attributes:
        inverse: 1 / s, float32 [U, I], contiguous; None where nothing is multiplied.
        rows: int64 [N], None where all rows share ``inverse[0]``.
        centre: c, bfloat16 [C, I], contiguous; None where nothing is subtracted.
        centre_rows: int64 [N], None where all rows share ``centre[0]``.
    """

    inverse: torch.Tensor | None
    rows: torch.Tensor | None
    centre: torch.Tensor | None = None
    centre_rows: torch.Tensor | None = None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [N, I] in float32."""
        smoothed = x.float()
        centre, inverse = _of_rows(self.centre, self.centre_rows), _of_rows(self.inverse, self.rows)
        if centre is not None:
            smoothed = smoothed - centre.float()
        return smoothed if inverse is None else smoothed * inverse


@dataclass(frozen=True, eq=False)
class RowBias:
    """A bias by row: ``values[rows[i]]`` is added to row i.

    Attributes:
        values: float32 [C, O], contiguous.
        rows: int64 [N].
    """

    values: torch.Tensor
    rows: torch.Tensor

    def add(self, y_no: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What is added to float32 [N, O], in place, rounded once to ``dtype``."""
        return y_no.add_(self.values[self.rows]).to(dtype)


@dataclass(frozen=True, eq=False)
class Selection:
    """Some of N rows, in an order.

    Attributes:
        rows: their numbers, int64 [n], each at most once.
        places: int32 [N], where in ``rows`` a row is, -1 where it is not.
    """

    rows: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, num_rows: int) -> Selection:
        """These of ``num_rows``; no value is read back from a GPU."""
        places = torch.full((num_rows,), -1, dtype=torch.int32, device=rows.device)
        places[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        return cls(rows, places)

    def __len__(self) -> int:
        """How many rows are selected."""
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class RowAddend:
    """What is added to some rows of the product in float32, before bias and final rounding.

    Attributes:
        selected: n rows.
        values: [n, O_j], float32 or bfloat16 or float16, contiguous, for consecutive parts of the O outputs.
    """

    selected: Selection
    values: tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class PreparedFactors:
    """The second factors of low-rank corrections of one modality in the layout of one kernel.

    Attributes:
        tensors: by names of the kernel's own.
        ranks: R_j of each part of the outputs, 0 where it has no correction.
        sizes: O_j of each part.
        widths: W_j, how many columns of U each part takes; those behind its rank are zero.
    """

    tensors: Mapping[str, torch.Tensor]
    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    widths: tuple[int, ...]

    def widened(self, columns: torch.Tensor) -> torch.Tensor:
        """[.., sum of R_j] to [.., sum of W_j], zeros behind those of each part."""
        if self.widths == self.ranks:
            return columns
        parts = zip(columns.split(list(self.ranks), dim=-1), self.ranks, self.widths, strict=True)
        return torch.cat([functional.pad(part, (0, width - rank)) for part, rank, width in parts], dim=-1)

    def narrowed(self, columns: torch.Tensor) -> torch.Tensor:
        """The inverse of ``widened``."""
        if self.widths == self.ranks:
            return columns
        parts = zip(columns.split(list(self.widths), dim=-1), self.ranks, strict=True)
        return torch.cat([part[..., :rank] for part, rank in parts], dim=-1)


@dataclass(frozen=True, eq=False)
class LowRank:
    """Rows of one modality and what corrects them: ``U_j L2_j`` is added to part j of the outputs.

    Attributes:
        selected: n rows.
        u: bfloat16 [n, sum of W_j], contiguous.
        factors: of ``Kernel.prepare_factors``.
    """

    selected: Selection
    u: torch.Tensor
    factors: PreparedFactors


@dataclass(frozen=True, eq=False)
class QuantizedActivation:
    """Rows ready to be multiplied: made by one kernel, read by the same.

    Attributes:
        data: codes, or smoothed rows where the input is not quantized, in the layout of the kernel.
        scale: float32 [N, 1], None where the input is not quantized.
        num_rows: N.
        taken: smoothed rows [n, I] for low-rank corrections, rounded once to the dtype of the rows that came, or None.
    """

    data: torch.Tensor
    scale: torch.Tensor | None
    num_rows: int
    taken: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm (arXiv 1910.07467): ``x / sqrt(mean(x^2) + eps) * gamma``, in float32.

    Attributes:
        gamma: [I], float32 or bfloat16 or float16, contiguous.
        eps: added to the mean of squares.
    """

    gamma: torch.Tensor
    eps: float


Bias: TypeAlias = "torch.Tensor | RowBias | None"


class Kernel(ABC):
    """Arithmetic of quantized linears on one kind of machine.

    Every kernel computes, for row i and output o,
    ``((sum_k a_ik w_ok) * scale_i * scale_o) + addend_io + bias_o``, the sum over integer codes exact, what follows in
    float32 in this order, and rounds once to the output dtype. Where the input is not quantized or the weight has
    groups or zero points, the sum is a float one over dequantized values; each kernel's docstring states its bound.

    Attributes:
        name: by which configuration asks for it, and which records carry.
        fuses: whether it quantizes rows as they come out of the layer before: ``quantize_norm``, ``quantize_gate``.
    """

    name: str
    fuses = False

    @abstractmethod
    def not_supported_reasons(self, spec: LinearSpec) -> list[str]:
        """Why this kernel cannot run a linear here: machine, compiler, format or shape; empty if it can."""

    @abstractmethod
    def prepare(self, weight: PackedWeight, activation: TensorFormat | None) -> PreparedWeight:
        """The stored weight in the layout of this kernel for inputs of one format, on the same device."""

    @abstractmethod
    def restore(self, prepared: PreparedWeight) -> PackedWeight:
        """The inverse of ``prepare``, bit for bit."""

    @abstractmethod
    def quantize(
        self,
        x: torch.Tensor,
        activation: TensorFormat | None,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """Centre, smooth and round rows to integer codes in one pass, as ``masq.numerics.affine.quantize`` does.

        Args:
            x: [N, I], float32 or bfloat16 or float16, contiguous; N may be 0.
            activation: per-token format, None leaves the rows unquantized.
            smoothing: None for no run-time smoothing.
            take: rows whose smoothed values are wanted as well, None for none.
        """

    def quantize_norm(
        self,
        x: torch.Tensor,
        norm: Norm,
        activation: TensorFormat,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """``quantize`` of rows under RMSNorm, which are not rounded to the dtype of ``x`` in between.

        Values are float32, within ``(I + 32) 2^-24`` of the largest of their row.

        Args:
            x: as for ``quantize``.
            norm: gamma and epsilon.
            activation: symmetric, per token.
            smoothing: of the normalized rows.
            take: as for ``quantize``.
        """
        raise NotImplementedError(f"kernel {self.name} has no norm")

    def quantize_gate(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: TensorFormat,
        smoothing: RowSmoothing | None,
        take: Selection | None = None,
    ) -> QuantizedActivation:
        """``quantize`` of SiLU(gate) * up, float32 within ``32 * 2^-24`` of the largest of a row, not rounded before.

        Args:
            gate: [N, I], of one dtype with ``up``; rows in one piece, any distance apart.
            up: likewise.
            activation: symmetric, per token.
            smoothing: of the products.
            take: as for ``quantize``.
        """
        raise NotImplementedError(f"kernel {self.name} has no gate")

    def prepare_factors(
        self, rights: Sequence[torch.Tensor | None], sizes: Sequence[int], activation: TensorFormat | None
    ) -> PreparedFactors | None:
        """Second factors that ``gemm`` itself multiplies, rows being bfloat16; None where it cannot.

        Args:
            rights: L2 [R_j, O_j] of each part of the outputs, or its codes in int8, None where it has none.
            sizes: O_j.
            activation: format of the input.
        """
        return None

    def restore_factors(self, factors: PreparedFactors) -> list[torch.Tensor | None]:
        """The inverse of ``prepare_factors``."""
        raise NotImplementedError(f"kernel {self.name} has prepared none")

    @abstractmethod
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
        """The product, scaled and added to: [N, O] in ``dtype``.

        Args:
            activation: of ``quantize`` of this kernel.
            prepared: of ``prepare`` of this kernel.
            bias: [O], float32, or by row, or None.
            addend: None for none.
            dtype: float32, bfloat16 or float16.
            low_rank: corrections whose factors this kernel has prepared, in float32 like an addend.
        """


def _of_rows(values: torch.Tensor | None, which: torch.Tensor | None) -> torch.Tensor | None:
    if values is None or which is None:
        return None if values is None else values[:1]
    return values[which]
