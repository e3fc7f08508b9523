"""Smoothing factors in closed form, and folding them into the module before.

A factor s > 0 rewrites ``x W^T`` as ``(x / s) (W s)^T``, which is exact; s moves the range of hard channels from the
activations into the weight. Shapes: D input channels, O output channels, H = heads * head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from masq.errors import ConfigError, ModelError, NumericalError
from masq.models.base import Modality

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from masq.calibration.statistics import GroupStatistics

# Keeps 1 / s and W s far from the limits of float32 and bfloat16 for channels that hardly occur.
MIN_FACTOR, MAX_FACTOR = 1e-5, 1e5


def smoothing_factor(abs_max_x: torch.Tensor, abs_max_w: torch.Tensor, alpha: float) -> torch.Tensor:
    """``s = max|x|^alpha / max|w|^(1 - alpha)`` by channel.

    SmoothQuant, arXiv 2211.10438, equation 4; at alpha 0.5 equation 12 of MASQuant, arXiv 2603.04800. A channel whose
    activations or weights are all zero gets factor 1: its product is zero whatever s is.

    Args:
        abs_max_x: [D], at least 0.
        abs_max_w: [D], at least 0, over all linears that read the input.
        alpha: 0 to 1; 1 moves all of the range into the weight.

    Returns:
        float32 [D] within [1e-5, 1e5], computed in float64.

    Raises:
        ConfigError: alpha is outside 0..1.
        NumericalError: a maximum is negative or not finite, or the sizes differ.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError("smoothing alpha must lie in 0..1", value=alpha, remedy="0.5 is the published value")
    x, w = _checked(abs_max_x, "activations"), _checked(abs_max_w, "weights")
    if x.shape != w.shape:
        raise NumericalError(
            "activations and weights must have the same channels",
            value=(tuple(x.shape), tuple(w.shape)),
            remedy="pass the statistics of the input that these linears read",
        )
    factor = x.pow(alpha) / w.pow(1.0 - alpha)
    factor = torch.where((x == 0) | (w == 0), torch.ones_like(factor), factor)
    return factor.clamp(MIN_FACTOR, MAX_FACTOR).float()


def weight_abs_max(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Largest |w| by input channel over linears [O_i, D] that read the same input: float32 [D].

    Raises:
        ModelError: no linear was given, or their input channels differ.
    """
    if len({weight.shape[1] for weight in weights}) != 1:
        raise ModelError(
            "smoothing needs linears with the same input channels",
            value=[tuple(weight.shape) for weight in weights],
            remedy="pass the linears of one group",
        )
    return torch.stack([torch.maximum(weight.amax(0), -weight.amin(0)).float() for weight in weights]).amax(0)


def shared_factor(
    stats: GroupStatistics, weights: Sequence[torch.Tensor], alpha: float, source: str = "all"
) -> torch.Tensor:
    """One factor for every token (SmoothQuant).

    Args:
        stats: statistics of the input of the group.
        weights: the linears [O_i, D] that read it.
        alpha: see ``smoothing_factor``.
        source: ``all`` takes the maximum over modalities, ``text`` looks at text tokens alone.

    Returns:
        float32 [D].

    Raises:
        ConfigError: an unknown source, or no calibration token of it.
    """
    if source not in ("all", "text"):
        raise ConfigError("the source of a shared factor must be known", value=source, remedy="use all or text")
    wanted = [Modality.TEXT] if source == "text" else sorted(stats.abs_max)
    maxima = [stats.abs_max[which] for which in wanted if which in stats.abs_max]
    if not maxima:
        raise ConfigError(
            "a shared factor needs calibration tokens of its source",
            value=f"source {source}, calibrated on {[which.name.lower() for which in stats.abs_max]}",
            remedy="add calibration samples, or set method.smoothing.source=all",
        )
    return smoothing_factor(torch.stack(maxima).amax(0), weight_abs_max(weights), alpha)


def modality_factors(
    stats: GroupStatistics, weights: Sequence[torch.Tensor], alpha: float
) -> dict[Modality, torch.Tensor]:
    """One factor per modality that occurred (MASQuant, arXiv 2603.04800, equation 12).

    Args:
        stats: statistics of the input of the group.
        weights: the linears [O_i, D] that read it.
        alpha: see ``smoothing_factor``.

    Returns:
        float32 [D] by modality.
    """
    abs_max_w = weight_abs_max(weights)
    return {which: smoothing_factor(abs_max_x, abs_max_w, alpha) for which, abs_max_x in stats.abs_max.items()}


def match_scale(factors: Mapping[Modality, torch.Tensor]) -> dict[Modality, torch.Tensor]:
    """Multiply each modality's factor by a constant so that its geometric mean is that of text's factor.

    A constant cancels in per-token quantized activations, so modality-aware smoothing leaves it open; a correction of
    one shared weight does not: it would have to spend its rank on the difference.

    Args:
        factors: s_m float32 [D] by modality, text among them (or none at all).

    Returns:
        The same keys; text's factor is untouched.
    """
    if not factors:
        return {}
    text = factors[Modality.TEXT].double().log().mean()
    return {
        modality: factor
        if modality is Modality.TEXT
        else (factor.double() * (text - factor.double().log().mean()).exp()).float()
        for modality, factor in factors.items()
    }


def tie_to_kv_heads(factor: torch.Tensor, num_heads: int, num_kv_heads: int) -> torch.Tensor:
    """Make a factor of the output linear one that the value linear can absorb.

    Query head h reads KV head ``h // (num_heads / num_kv_heads)``, so all query heads of a KV head need the same
    factor: the maximum over them.

    Args:
        factor: [H].
        num_heads: query heads.
        num_kv_heads: KV heads, a divisor of ``num_heads``.

    Returns:
        [H], equal over the query heads of each KV head.

    Raises:
        ModelError: the sizes do not divide.
    """
    by_head = _by_kv_head(factor, num_heads, num_kv_heads)
    return by_head.amax(1, keepdim=True).expand_as(by_head).reshape(-1)


@torch.no_grad()
def foldable_factor(norm: nn.Module, factor: torch.Tensor) -> torch.Tensor:
    """The factor nearest to ``factor`` [D] by which the norm's weight can be divided exactly in its own dtype.

    In 16 bits the quotient is rounded; the linears must then be multiplied by what was really divided out, else
    folding would not be an exact rewrite. Channels whose weight is zero keep their factor. Float32 [D].
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.shape != factor.shape:
        return factor
    exact = weight.double() / factor.to(weight.device).double()
    stored = exact.to(weight.dtype).double()
    effective = torch.where(stored == 0, factor.to(weight.device).double(), weight.double() / stored)
    return effective.float().to(factor.device)


@torch.no_grad()
def fold_into_norm(norm: nn.Module, factor: torch.Tensor) -> None:
    """Divide weight and bias of a norm by ``factor`` [D] in place: its output becomes x / s.

    Computed in float64 and stored in the dtype of the norm.

    Raises:
        ModelError: the norm has no weight, or another size.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.shape != factor.shape:
        raise ModelError(
            "a factor folds into a norm with one weight per channel",
            value=f"{type(norm).__name__}, factor {tuple(factor.shape)}",
            remedy="set method.smoothing.fold=false",
        )
    _divide(weight, factor)
    bias = getattr(norm, "bias", None)
    if isinstance(bias, torch.Tensor):
        _divide(bias, factor)


@torch.no_grad()
def fold_into_value(value_linear: nn.Linear, factor: torch.Tensor, num_heads: int, num_kv_heads: int) -> None:
    """Divide the rows and the bias of the value linear in place: the input of the output linear becomes x / s.

    Attention weights sum over tokens within one channel, so a factor per channel passes through them unchanged.

    Args:
        value_linear: weight [num_kv_heads * head_dim, D].
        factor: [H], tied by ``tie_to_kv_heads``.
        num_heads: query heads.
        num_kv_heads: KV heads.

    Raises:
        ModelError: the factor differs between query heads of a KV head, or the sizes do not fit.
    """
    by_head = _by_kv_head(factor, num_heads, num_kv_heads)
    rows = by_head[:, 0].reshape(-1)
    if not torch.equal(by_head, by_head[:, :1].expand_as(by_head)) or rows.shape[0] != value_linear.weight.shape[0]:
        raise ModelError(
            "a factor folds into the value linear if all query heads of a KV head share it",
            value=f"factor {tuple(factor.shape)}, value linear {tuple(value_linear.weight.shape)}",
            remedy="call tie_to_kv_heads first",
        )
    _divide(value_linear.weight, rows.unsqueeze(1))
    if value_linear.bias is not None:
        _divide(value_linear.bias, rows)


def _by_kv_head(factor: torch.Tensor, num_heads: int, num_kv_heads: int) -> torch.Tensor:
    """View [H] as [num_kv_heads, query heads per KV head, head_dim]."""
    if num_kv_heads < 1 or num_heads % num_kv_heads or factor.dim() != 1 or factor.shape[0] % num_heads:
        raise ModelError(
            "a factor of the output linear must split into query heads, and those into KV heads",
            value=f"factor {tuple(factor.shape)}, {num_heads} heads, {num_kv_heads} KV heads",
            remedy="check the head counts of the model adapter",
        )
    return factor.reshape(num_kv_heads, num_heads // num_kv_heads, -1)


def _divide(parameter: torch.Tensor, factor: torch.Tensor) -> None:
    parameter.copy_(parameter.double() / factor.to(parameter.device).double())


def _checked(abs_max: torch.Tensor, what: str) -> torch.Tensor:
    value = abs_max.double()
    if not bool(((value >= 0) & torch.isfinite(value)).all()):
        raise NumericalError(
            f"the absolute maxima of {what} must be finite and not negative",
            value="NaN, infinity or a negative number",
            remedy="check the layer and the calibration samples",
        )
    return value
