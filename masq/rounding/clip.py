"""Clip search: grids of a weight that leave out its largest values where finer steps are worth more.

As in the released code of AWQ (arXiv 2306.00978), with second moments of the input in the place of its rows. Shapes:
O output channels, I input channels, G groups of E input channels (one group for a scale per channel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masq.errors import NumericalError
from masq.numerics.affine import QuantizedTensor, encode, fit_scale

if TYPE_CHECKING:
    from masq.numerics.scheme import TensorFormat
    from masq.rounding.config import ClipSearch


@dataclass(frozen=True, eq=False)
class Grid:
    """What the codes of a weight stand for, fixed before they are chosen.

    Attributes:
        scale: float32 [O, G].
        zero_point: float32 [O, G] holding integers, None if the format is symmetric.
        ratio: share of the full range that is kept, float64 [O, G].
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    ratio: torch.Tensor


@torch.no_grad()
def search_clip(weight: torch.Tensor, moment: torch.Tensor, fmt: TensorFormat, config: ClipSearch) -> Grid:
    """The share of its range that each row (or group of one) keeps, by the error of outputs.

    Minimises ``E |(w - Q(w)) x|^2 = e H e^T`` over the shares 1, 1 - 1/steps, .. >= ``min_ratio``, e being the error of
    a row and H the second moment of the input; of equal errors the larger share wins. Groups of a row are searched
    apart, each with its own block of H. Shares are compared in float32; a row that is not better than with its full
    range in the whole of H, in float64, keeps that. So no row is worse than without clipping. A range shrinks towards
    zero, whose code stays where it is.

    Args:
        weight: [O, I].
        moment: H = E x x^T, [I, I].
        fmt: bits, symmetry, ``per_channel`` or ``per_group``.
        config: the shares; whether H counts as a whole or by its diagonal.

    Raises:
        NumericalError: weight or moment are not finite, or their sizes differ.
    """
    _check(weight, moment)
    original = weight.double()
    measure = moment.double().diagonal() if config.moments == "diagonal" else moment.double()
    scale, zero_point = fit_scale(original, fmt)
    ratio = torch.ones(scale.shape, dtype=torch.float64, device=scale.device)
    least: torch.Tensor | None = None
    quick, quick_measure = original.float(), measure.float()
    for share in config.shares:
        errors = _group_errors(quick, _at(scale, zero_point, torch.full_like(ratio, share)), quick_measure, fmt)
        least = errors if least is None else least
        better = errors < least
        ratio, least = torch.where(better, share, ratio), torch.where(better, errors, least)
    full = _row_errors(original, _at(scale, zero_point, torch.ones_like(ratio)), measure, fmt)
    kept = _row_errors(original, _at(scale, zero_point, ratio), measure, fmt) < full
    ratio = torch.where(kept.unsqueeze(1), ratio, 1.0)
    return _at(scale, zero_point, ratio)


def round_on(weight: torch.Tensor, grid: Grid, fmt: TensorFormat) -> QuantizedTensor:
    """Nearest codes of a weight [O, I] on a grid; values beyond its ends take the last code."""
    groups = weight.unflatten(-1, (grid.scale.shape[1], -1))
    zero_point = None if grid.zero_point is None else grid.zero_point.unsqueeze(-1)
    codes = encode(groups, grid.scale.unsqueeze(-1), zero_point, fmt).flatten(-2)
    return QuantizedTensor(codes.to(torch.int8 if fmt.symmetric else torch.uint8), grid.scale, grid.zero_point, fmt)


def output_error(weight: torch.Tensor, rounded: QuantizedTensor, moment: torch.Tensor) -> torch.Tensor:
    """``e H e^T`` of every output channel: float64 [O]."""
    return _quadratic(weight.double() - rounded.dequantize(torch.float64), moment.double())


def _quadratic(error: torch.Tensor, measure: torch.Tensor) -> torch.Tensor:
    """``e H e^T`` by row of [O, I], H given as [I, I] or by its diagonal [I]."""
    return ((error * measure if measure.dim() == 1 else error @ measure) * error).sum(-1)


def _at(scale: torch.Tensor, zero_point: torch.Tensor | None, ratio: torch.Tensor) -> Grid:
    """Scales shrink with the range; minimum and maximum shrink alike, so zero keeps its code."""
    shrunk = (scale.double() * ratio).float()
    smallest = torch.finfo(torch.float32).tiny
    return Grid(torch.where(shrunk < smallest, scale, shrunk), zero_point, ratio)


def _row_errors(original: torch.Tensor, grid: Grid, measure: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    return _quadratic(original - round_on(original, grid, fmt).dequantize(original.dtype), measure)


def _group_errors(original: torch.Tensor, grid: Grid, measure: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """The error of each group as if it were alone: [O, G] in the dtype of ``original``."""
    num_groups = grid.scale.shape[1]
    if num_groups == 1:
        return _row_errors(original, grid, measure, fmt).unsqueeze(1)
    error = original - round_on(original, grid, fmt).dequantize(original.dtype)
    parts = error.unflatten(1, (num_groups, -1)).unbind(1)
    size = parts[0].shape[1]
    blocks = [measure[(slice(g * size, (g + 1) * size),) * measure.dim()] for g in range(num_groups)]
    return torch.stack([_quadratic(part, block) for part, block in zip(parts, blocks, strict=True)], 1)


def _check(weight: torch.Tensor, moment: torch.Tensor) -> None:
    if weight.dim() != 2 or moment.shape != (weight.shape[1], weight.shape[1]):
        raise NumericalError(
            "a clip search needs a weight [out, in] and the second moment of its input [in, in]",
            value=(tuple(weight.shape), tuple(moment.shape)),
            remedy="pass the statistics of the input of this linear",
        )
    if not bool(torch.isfinite(weight).all() and torch.isfinite(moment).all()):
        raise NumericalError(
            "weight and second moment must be finite",
            value="NaN or infinity",
            remedy="check the checkpoint and the calibration samples",
        )
