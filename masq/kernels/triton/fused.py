"""What surrounds a product, in the same pass over its rows: norm, SiLU, and the first factor of corrections.

For models that give up their own layers for them; the rows that come out are what ``TritonKernel.gemm`` takes.

Shapes: N rows, I input channels, n rows of one modality, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from masq.kernels.base import QuantizedActivation, RowSmoothing

if TYPE_CHECKING:
    import torch

    from masq.numerics.scheme import TensorFormat


@dataclass(frozen=True, eq=False)
class NormalizedRows:
    """Rows under RMSNorm, quantized, and what else their model needs of them.

    Attributes:
        activation: the smoothed and quantized rows.
        summed: [N, I], rows plus residual in their own dtype, None without one: the next residual.
        normalized: [N, I], rows that corrections read, unsmoothed and in the dtype of the input, undefined where not
            asked for; None if none were.
    """

    activation: QuantizedActivation
    summed: torch.Tensor | None
    normalized: torch.Tensor | None


def normalize(  # noqa: PLR0913
    x: torch.Tensor,
    gamma: torch.Tensor,
    eps: float,
    activation: TensorFormat,
    smoothing: RowSmoothing | None,
    *,
    residual: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> NormalizedRows:
    """RMSNorm in float32 (arXiv 1910.07467), smoothing and quantization of x [N, I] plus a residual.

    Codes are those of the float32 rows, which a model that stores them in 16 bits in between rounds once more.

    Args:
        x: float32, bfloat16 or float16, contiguous.
        gamma: [I].
        eps: added to the mean of squares.
        activation: symmetric, per token.
        smoothing: None for none.
        residual: as x, added and rounded to the dtype of x before anything else.
        keep: bool or int8 [N], the rows whose normalized values are wanted, None for none.
    """
    from masq.kernels.triton import ops

    inverse, vectors, *centres = _tables(smoothing)
    codes, scale, summed, normed = ops.norm_smooth_quantize(
        x, residual, gamma, eps, inverse, vectors, keep, activation.qmax, activation.divisor, *centres
    )
    quantized = QuantizedActivation(codes, scale, len(x))
    return NormalizedRows(quantized, None if residual is None else summed, None if keep is None else normed)


def silu_times_up(
    gate: torch.Tensor, up: torch.Tensor, activation: TensorFormat, smoothing: RowSmoothing | None
) -> QuantizedActivation:
    """SiLU(gate) * up in float32, smoothed and quantized; both [N, I], parts of the columns of one matrix or not."""
    from masq.kernels.triton import ops

    inverse, vectors, *centres = _tables(smoothing)
    ends = activation.qmax, activation.divisor
    codes, scale = ops.silu_mul_smooth_quantize(gate, up, inverse, vectors, *ends, *centres)
    return QuantizedActivation(codes, scale, len(gate))


def project(
    x: torch.Tensor, rows: torch.Tensor, smoothing: RowSmoothing | None, left: torch.Tensor
) -> torch.Tensor:  # [n, R]
    """What ``LowRank.u`` holds: smoothed ``x[rows]`` (x [N, I], rows int64 [n]) times L1 [I, R], all of one dtype.

    Smoothed rows are rounded to that dtype, as ``Kernel.smooth`` does, but never stored; sums are float32.
    """
    from masq.kernels.triton import ops

    inverse, vectors, centre, _ = _tables(smoothing)
    assert centre is None, "rows to be projected have no centres left"
    return ops.low_rank_down(x, rows, inverse, vectors, left)


def _tables(smoothing: RowSmoothing | None) -> tuple[torch.Tensor | None, ...]:
    if smoothing is None:
        return None, None, None, None
    return smoothing.inverse, smoothing.rows, smoothing.centre, smoothing.centre_rows
