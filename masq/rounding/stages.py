"""Rounding stages: from a float weight and what its input looks like to integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masq.models.base import Modality
from masq.registry import Registry
from masq.rounding.gptq import round_gptq
from masq.rounding.nearest import round_nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from masq.calibration.statistics import GroupStatistics
    from masq.numerics.affine import QuantizedTensor
    from masq.numerics.scheme import TensorFormat
    from masq.rounding.config import GptqRounding, NearestRounding


@dataclass(frozen=True, eq=False)
class Rounded:
    """A rounded weight.

    Attributes:
        weight: codes [O, I].
        gain: its error in the norm of the activations relative to that of rounding to nearest, 1 for that itself.
        fallback: what was not done as configured (rounded to nearest instead, more damping, channels never seen), or
            None.
    """

    weight: QuantizedTensor
    gain: float = 1.0
    fallback: str | None = None


def nearest(weight: torch.Tensor, fmt: TensorFormat, _config: NearestRounding, _moment: torch.Tensor | None) -> Rounded:
    """Round to nearest."""
    return Rounded(round_nearest(weight, fmt))


def gptq(weight: torch.Tensor, fmt: TensorFormat, config: GptqRounding, moment: torch.Tensor | None) -> Rounded:
    """GPTQ against the second moment of the smoothed input."""
    if moment is None:
        return Rounded(round_nearest(weight, fmt), fallback="rounded to nearest, no calibration token to round against")
    outcome = round_gptq(weight, moment, fmt, config)
    gain = outcome.loss / outcome.nearest_loss if outcome.nearest_loss > 0 else 1.0
    if outcome.fallback:
        return Rounded(outcome.weight, gain, f"rounded to nearest, {outcome.fallback}")
    notes = [f"damping raised to {outcome.damping:g}"] if outcome.damping != config.damping else []
    notes += [f"{outcome.num_dead} input channels never active, rounded to nearest"] if outcome.num_dead else []
    return Rounded(outcome.weight, gain, ", ".join(notes) or None)


ROUNDING: Registry[Callable[..., Rounded]] = Registry("rounding stage")
ROUNDING.register("nearest", nearest)
ROUNDING.register("gptq", gptq)


def pooled_moment(
    statistics: GroupStatistics, factors: Mapping[Modality, torch.Tensor], tokens: str
) -> torch.Tensor | None:
    """Second moment of the smoothed rows x / s_m of the tokens that count, each token alike: float64 [I, I].

    Args:
        statistics: second moments and numbers of tokens by modality.
        factors: s_m by modality; a modality without one takes that of text, no factor is one.
        tokens: ``all``, or ``text`` for the tokens that a text-only model would see.

    Returns:
        None if no such token occurred.
    """
    total, count = None, 0
    for modality, moment in statistics.second_moment.items():
        if tokens == "text" and modality is not Modality.TEXT:
            continue
        number = statistics.num_tokens[modality]
        factor = factors.get(modality, factors.get(Modality.TEXT))
        scaled = moment * number
        if factor is not None:
            inverse = factor.double().reciprocal().to(moment.device)
            scaled = scaled * torch.outer(inverse, inverse)
        total, count = (scaled if total is None else total + scaled), count + number
    return None if total is None else total / count
