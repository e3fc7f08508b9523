"""Round-to-nearest weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from masq.errors import NumericalError
from masq.numerics.affine import QuantizedTensor, quantize
from masq.numerics.finite import is_finite

if TYPE_CHECKING:
    from masq.numerics.scheme import TensorFormat


def round_nearest(weight: torch.Tensor, fmt: TensorFormat) -> QuantizedTensor:
    """Integer codes of a weight, a scale per output channel or per group of input channels.

    Args:
        weight: floating point [O, D]; 16-bit weights are computed in float32, float64 in float64.
        fmt: bits, symmetry, ``per_channel`` or ``per_group``.

    Returns:
        Codes [O, D], scales float32 [O, G].

    Raises:
        NumericalError: the weight is not a finite matrix.
        ConfigError: the format does not fit (see ``quantize``).
    """
    if weight.dim() != 2 or not is_finite(weight):
        raise NumericalError(
            "a weight to round must be a finite matrix [out, in]",
            value=f"shape {tuple(weight.shape)}, smallest {weight.min().item()}, largest {weight.max().item()}",
            remedy="check the checkpoint and the smoothing factors",
        )
    return quantize(weight, fmt)
