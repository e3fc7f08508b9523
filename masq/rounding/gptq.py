"""GPTQ: round column by column, and let the columns still to come make up for the error.

GPTQ, arXiv 2210.17323, section 3 and algorithm 1 (lazy batches, Cholesky form). Shapes: O output channels, I input
channels, G groups of input channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masq.errors import ConfigError, NumericalError
from masq.numerics.affine import QuantizedTensor, encode, fit_scale, quantize
from masq.rounding.clip import round_on

if TYPE_CHECKING:
    from masq.numerics.scheme import TensorFormat
    from masq.rounding.clip import Grid
    from masq.rounding.config import GptqRounding

# A Hessian that cannot be factored at the configured damping is tried at ten and a hundred times as much.
_DAMPING_STEPS = (1.0, 10.0, 100.0)


@dataclass(frozen=True, eq=False)
class GptqOutcome:
    """A rounded weight and what it took.

    Attributes:
        weight: integer codes [O, I].
        loss: ``tr(E H E^T)`` of the kept weight, E its error and H the undamped Hessian.
        nearest_loss: the same of rounding to nearest.
        damping: relative damping that was needed; None where GPTQ was not used.
        num_dead: input channels that calibration never saw; they are rounded to nearest.
        fallback: why round-to-nearest was kept instead, or None.
    """

    weight: QuantizedTensor
    loss: float
    nearest_loss: float
    damping: float | None
    num_dead: int
    fallback: str | None


@torch.no_grad()
def round_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, fmt: TensorFormat, config: GptqRounding, grid: Grid | None = None
) -> GptqOutcome:
    """Integer codes that minimise ``tr((W - W_q) H (W - W_q)^T)`` greedily, column after column.

    Scales are those of round-to-nearest. Per group they are taken when the sweep reaches the group, from weights
    that carry the compensation so far, or with ``static_groups`` from the original weight before it starts. Everything
    is computed in float64. An input channel with a zero Hessian diagonal keeps its nearest value (the original code
    stores zeros there; a channel silent in calibration may speak later).

    Args:
        weight: [O, I].
        hessian: second moment of the input, X^T X / N, [I, I].
        fmt: bits, symmetry, ``per_channel`` or ``per_group``.
        config: damping, block size, order, groups.
        grid: scales to round on, fixed; None for those of round-to-nearest.

    Raises:
        NumericalError: weight or Hessian are not finite, or their sizes differ.
        ConfigError: ``act_order`` with moving groups, or a format that does not fit.
    """
    _check(weight, hessian)
    _check_order(config, fmt, grid)
    original, moment = weight.double(), hessian.double()
    nearest = quantize(original, fmt) if grid is None else round_on(original, grid, fmt)
    nearest_loss = _loss(original, nearest, moment)
    dead = moment.diagonal() == 0
    found = _inverse_factor(moment, dead, config)
    if found is None:
        return GptqOutcome(nearest, nearest_loss, nearest_loss, None, int(dead.sum()), "singular Hessian")
    order, factor, damping = found
    rounded = _sweep(original, order, factor, fmt, config, grid)
    loss = _loss(original, rounded, moment)
    if not loss <= nearest_loss:
        return GptqOutcome(nearest, nearest_loss, nearest_loss, None, int(dead.sum()), "worse than nearest")
    return GptqOutcome(rounded, loss, nearest_loss, damping, int(dead.sum()), None)


def _inverse_factor(
    moment: torch.Tensor, dead: torch.Tensor, config: GptqRounding
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Column order, upper Cholesky factor of the inverse of the damped, reordered Hessian, and the damping used."""
    mean = float(moment.diagonal().mean())
    if mean <= 0:
        return None
    order = torch.arange(len(moment), device=moment.device)
    if config.act_order:
        order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    filled = moment + torch.diag(dead.to(moment) * mean)
    for step in _DAMPING_STEPS:
        damping = step * config.damping
        damped = filled[order][:, order] + damping * mean * torch.eye(len(moment), dtype=torch.float64).to(moment)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return order, upper, damping
    return None


def _sweep(
    original: torch.Tensor,
    order: torch.Tensor,
    factor: torch.Tensor,
    fmt: TensorFormat,
    config: GptqRounding,
    grid: Grid | None,
) -> QuantizedTensor:
    """Algorithm 1: blocks of columns; errors spread inside a block at once, to later blocks in one product."""
    work = original[:, order].clone()
    num_rows, num_columns = work.shape
    size = fmt.group_size or num_columns
    moving = bool(fmt.group_size) and not config.static_groups and grid is None
    scale, zero_point = fit_scale(original, fmt) if grid is None else (grid.scale, grid.zero_point)
    codes = torch.empty_like(work)
    for start in range(0, num_columns, config.block_size):
        end = min(start + config.block_size, num_columns)
        errors = work.new_empty(num_rows, end - start)
        for column in range(start, end):
            group = int(order[column]) // size
            if moving and column % size == 0:
                _refit(work[:, column : column + size], group, scale, zero_point, fmt)
            zero = None if zero_point is None else zero_point[:, group : group + 1]
            part = encode(work[:, column : column + 1], scale[:, group : group + 1], zero, fmt)
            codes[:, column] = part.squeeze(1)
            value = (part if zero is None else part - zero) * scale[:, group : group + 1]
            error = (work[:, column : column + 1] - value) / factor[column, column]
            work[:, column + 1 : end] -= error * factor[column, column + 1 : end]
            errors[:, column - start] = error.squeeze(1)
        work[:, end:] -= errors @ factor[start:end, end:]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return QuantizedTensor(restored.to(torch.int8 if fmt.symmetric else torch.uint8), scale, zero_point, fmt)


def _refit(
    columns: torch.Tensor, group: int, scale: torch.Tensor, zero_point: torch.Tensor | None, fmt: TensorFormat
) -> None:
    """Scale of one group from its weights as they are now, written in place.

    Columns of the group beyond the current block have not received this block's errors yet, so block sizes that are
    multiples of the group size are the better choice.
    """
    new_scale, new_zero = fit_scale(columns, fmt)
    scale[:, group] = new_scale[:, 0]
    if zero_point is not None and new_zero is not None:
        zero_point[:, group] = new_zero[:, 0]


def _loss(original: torch.Tensor, rounded: QuantizedTensor, moment: torch.Tensor) -> float:
    error = original - rounded.dequantize(torch.float64)
    return float(((error @ moment) * error).sum())


def _check(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    if weight.dim() != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise NumericalError(
            "GPTQ needs a weight [out, in] and the second moment of its input [in, in]",
            value=(tuple(weight.shape), tuple(hessian.shape)),
            remedy="pass the statistics of the input of this linear",
        )
    if not bool(torch.isfinite(weight).all() and torch.isfinite(hessian).all()):
        raise NumericalError(
            "weight and Hessian must be finite",
            value="NaN or infinity",
            remedy="check the checkpoint and the calibration samples",
        )


def _check_order(config: GptqRounding, fmt: TensorFormat, grid: Grid | None) -> None:
    if config.act_order and fmt.group_size and not config.static_groups and grid is None:
        raise ConfigError(
            "act_order visits columns out of their groups, so the scales of groups must be fixed before",
            value="act_order=true, static_groups=false",
            remedy="set method.rounding.static_groups=true",
        )
