"""Searched smoothing: the error of a group's outputs under quantization, and the candidate factor that makes it least.

AWQ, arXiv 2306.00978, equation 4: ``L(s) = || Q(W s) Q(x / s) - W x ||``, taken here over the outputs of all linears
that read x and, with MBQ (arXiv 2412.19509), with a weight per modality. Biases cancel in the difference.
Shapes: n tokens, I input channels, O output channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from masq.errors import NumericalError
from masq.numerics.affine import QuantizedTensor, fake_quantize, quantize
from masq.numerics.integer_gemm import scaled_matmul
from masq.transforms.config import takes_moments
from masq.transforms.smoothing import MAX_FACTOR, MIN_FACTOR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from masq.calibration.statistics import GroupStatistics
    from masq.models.base import Modality
    from masq.numerics.scheme import TensorFormat

# Few enough that what lies between a product and its error stays in the cache of a core.
_ROWS_PER_CHUNK = 512


@dataclass(frozen=True, eq=False)
class SearchedLinear:
    """A linear that is going to be quantized.

    Attributes:
        weight: [O, I].
        weight_format: of its weight.
        activation_format: of its input, None for float.
    """

    weight: torch.Tensor
    weight_format: TensorFormat
    activation_format: TensorFormat | None


def pooled_abs_mean(statistics: GroupStatistics) -> torch.Tensor:
    """Mean |x_i| over the tokens of all modalities, each token alike: float64 [I]."""
    total = sum(statistics.num_tokens.values())
    parts = [mean * (statistics.num_tokens[which] / total) for which, mean in statistics.abs_mean.items()]
    return torch.stack(parts).sum(0)


def awq_factor(abs_mean: torch.Tensor, exponent: float) -> torch.Tensor:
    """``s = mean|x|^t / sqrt(max * min)`` (AWQ, equation 5, normalised as in its released code).

    A channel without activations gets factor 1; maximum and minimum run over the others.

    Args:
        abs_mean: mean |x_i|, [I], at least 0.
        exponent: t; 0 gives exactly 1 everywhere.

    Returns:
        float32 [I] within [1e-5, 1e5], computed in float64.

    Raises:
        NumericalError: a mean is negative or not finite.
    """
    mean = abs_mean.double()
    if not bool(((mean >= 0) & torch.isfinite(mean)).all()):
        raise NumericalError(
            "the mean magnitudes of activations must be finite and not negative",
            value="NaN, infinity or a negative number",
            remedy="check the layer and the calibration samples",
        )
    active = mean > 0
    if not bool(active.any()):
        return torch.ones_like(mean).float()
    power = mean.pow(exponent)
    centre = (power[active].max() * power[active].min()).sqrt()
    return torch.where(active, power / centre, 1.0).clamp(MIN_FACTOR, MAX_FACTOR).float()


@torch.no_grad()
def search(
    statistics: GroupStatistics, linears: Sequence[SearchedLinear], candidates: Sequence[torch.Tensor], error: str
) -> tuple[int, dict[str, float]]:
    """The candidate with the smallest error, the first of equals.

    The objective is ``sum_m w_m N_m / N mean_m``: the mean error of an output over all tokens, those of modality m
    counting w_m (``statistics.sensitivity``) and estimated from the sampled ones.

    Args:
        statistics: rows of the group's input; with float activations and squared errors the second moments instead,
            which are exact over all tokens.
        linears: the quantized linears of the group.
        candidates: factors float32 [I], the one to fall back on first.
        error: ``squared`` or ``absolute``.

    Returns:
        Index of the best candidate, and its error relative to that of the first: ``all`` for the objective and each
        modality by name (1 where the first has no error).

    Raises:
        NumericalError: the error of the first candidate is not finite.
    """
    errors = _errors_by_modality(statistics, linears, candidates, error)
    objective = [
        _weighted({which: own[index] for which, own in errors.items()}, statistics) for index in range(len(candidates))
    ]
    if not objective[0] < float("inf"):
        raise NumericalError(
            "the quantization error that smoothing is searched by must be finite",
            value=objective[0],
            remedy="check the checkpoint and the calibration samples",
        )
    best = min(range(len(candidates)), key=lambda index: (not objective[index] < float("inf"), objective[index]))
    ratios = {which.name.lower(): _ratio(own[best], own[0]) for which, own in errors.items()}
    return best, {"all": _ratio(objective[best], objective[0]), **ratios}


def _errors_by_modality(
    statistics: GroupStatistics, linears: Sequence[SearchedLinear], candidates: Sequence[torch.Tensor], error: str
) -> dict[Modality, list[float]]:
    """The error of every candidate on the tokens of each modality."""
    if takes_moments(error, [one.activation_format for one in linears]):
        return {
            which: [moment_error(moment, linears, candidate) for candidate in candidates]
            for which, moment in statistics.second_moment.items()
        }
    rows = torch.cat(list(statistics.rows.values()))
    exact = [functional.linear(rows, one.weight.float()) for one in linears]
    sizes = [len(own) for own in statistics.rows.values()]
    found: dict[Modality, list[float]] = {which: [] for which in statistics.rows}
    for candidate in candidates:
        errors = token_errors(rows, exact, linears, candidate, squared=error == "squared")
        for which, own in zip(statistics.rows, errors.split(sizes), strict=True):
            found[which].append(float(own.mean()))
    return found


def token_errors(
    rows: torch.Tensor,
    exact: Sequence[torch.Tensor],
    linears: Sequence[SearchedLinear],
    factor: torch.Tensor,
    *,
    squared: bool,
) -> torch.Tensor:
    """Mean error of an output element on each sampled token: float64 [n].

    Products and sums over outputs in float32, the products of integer codes exactly.

    Args:
        rows: inputs float32 [n, I].
        exact: ``x W^T`` of each linear, [n, O].
        linears: the linears.
        factor: float32 [I].
        squared: squared errors, else absolute ones.
    """
    smoothed = rows / factor
    inputs: dict[TensorFormat, QuantizedTensor] = {}
    total, count = torch.zeros(len(rows), dtype=torch.float64, device=rows.device), 0
    for one, target in zip(linears, exact, strict=True):
        fmt = one.activation_format
        if fmt is not None and fmt not in inputs:
            inputs[fmt] = quantize(smoothed, fmt)
        weight = quantize(one.weight.float() * factor, one.weight_format)
        for chunk in range(0, len(rows), _ROWS_PER_CHUNK):
            part = slice(chunk, chunk + _ROWS_PER_CHUNK)
            difference = _product(smoothed, None if fmt is None else inputs[fmt], weight, part).sub_(target[part])
            difference = difference.square_() if squared else difference.abs_()
            total[part] += difference.sum(1)
        count += target.shape[1]
    return total / count


def _product(
    smoothed: torch.Tensor, codes: QuantizedTensor | None, weight: QuantizedTensor, part: slice
) -> torch.Tensor:
    """The output of some rows as ``QuantLinear`` computes it, without bias."""
    if codes is None:
        return functional.linear(smoothed[part], weight.dequantize())
    if codes.zero_point is None and weight.zero_point is None and codes.scale.shape[1] == weight.scale.shape[1] == 1:
        return scaled_matmul(codes.codes[part], codes.scale[part], weight.codes, weight.scale)
    return functional.linear(codes.dequantize()[part], weight.dequantize())


def moment_error(moment: torch.Tensor, linears: Sequence[SearchedLinear], factor: torch.Tensor) -> float:
    """Mean squared error of an output element over all tokens: ``tr(E H E^T) / O`` with ``E = Q(W s) / s - W``.

    Args:
        moment: H, float64 [I, I].
        linears: linears with float activations.
        factor: float32 [I].
    """
    s = factor.double()
    total, count = 0.0, 0
    for one in linears:
        weight = one.weight.double()
        error = fake_quantize(weight * s, one.weight_format) / s - weight
        total += float(((error @ moment) * error).sum())
        count += weight.shape[0]
    return total / count


def _weighted(errors: Mapping[Modality, float], statistics: GroupStatistics) -> float:
    total = sum(statistics.num_tokens[which] for which in errors)
    return sum(
        statistics.sensitivity.get(which, 1.0) * error * statistics.num_tokens[which] / total
        for which, error in errors.items()
    )


def _ratio(error: float, start: float) -> float:
    return error / start if start > 0 else 1.0
