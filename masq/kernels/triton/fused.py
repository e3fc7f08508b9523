"""What comes before a product, in the same pass over its rows: norm and SiLU.

For models that give up their own layers for them; the rows that come out are what ``TritonKernel.gemm`` takes.

Shapes: N rows, I input channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from masq.kernels.base import QuantizedActivation, RowSmoothing, Selection

if TYPE_CHECKING:
    import torch

    from masq.kernels.base import Norm
    from masq.numerics.scheme import TensorFormat


def normalize(  # noqa: PLR0913
    x: torch.Tensor,
    norm: Norm,
    activation: TensorFormat,
    smoothing: RowSmoothing | None,
    take: Selection | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> tuple[QuantizedActivation, torch.Tensor | None]:
    """RMSNorm in float32 (arXiv 1910.07467), smoothing and quantization of x [N, I] plus a residual.

    Codes are those of the float32 rows, which a model that stores them in 16 bits in between rounds once more.

    Args:
        x: float32, bfloat16 or float16, contiguous.
        norm: gamma and epsilon.
        activation: symmetric, per token.
        smoothing: None for none.
        take: rows whose smoothed values are wanted, None for none.
        residual: as x, added and rounded to the dtype of x before anything else.

    Returns:
        The rows, and x plus the residual in the dtype of x, the next residual; None without one.
    """
    from masq.kernels.triton import ops

    shared, wanted = given(activation, smoothing, take)
    *made, summed = ops.norm_smooth_quantize(x, residual, norm.gamma, norm.eps, *shared, **wanted)
    return quantized(made, take), None if residual is None else summed


def silu_times_up(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: TensorFormat,
    smoothing: RowSmoothing | None,
    take: Selection | None = None,
) -> QuantizedActivation:
    """SiLU(gate) * up in float32, smoothed and quantized; both [N, I], parts of the columns of one matrix or not."""
    from masq.kernels.triton import ops

    shared, wanted = given(activation, smoothing, take)
    return quantized(ops.silu_mul_smooth_quantize(gate, up, *shared, **wanted), take)


def given(
    activation: TensorFormat, smoothing: RowSmoothing | None, take: Selection | None
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """What operations over rows share, as they take it: by position and by name."""
    done = smoothing or RowSmoothing(None, None)
    shared = [activation.qmax, activation.divisor, done.inverse, done.rows, done.centre, done.centre_rows]
    return shared, {} if take is None else {"rows": take.rows, "places": take.places}


def quantized(made: Any, take: Selection | None) -> QuantizedActivation:
    """Codes, scales and taken rows that an operation has made."""
    codes, scale, taken = made
    return QuantizedActivation(codes, scale, len(codes), None if take is None else taken)
