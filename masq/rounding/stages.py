"""Rounding stages: from a float weight and what its input looks like to integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from masq.models.base import Modality
from masq.registry import Registry
from masq.rounding.clip import output_error, round_on, search_clip
from masq.rounding.gptq import round_gptq
from masq.rounding.nearest import round_nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from masq.calibration.statistics import GroupStatistics
    from masq.numerics.affine import QuantizedTensor
    from masq.numerics.scheme import TensorFormat
    from masq.rounding.config import GptqRounding, NearestRounding


@dataclass(frozen=True, eq=False)
class Rounded:
    """A rounded weight.

    Attributes:
        weight: codes [O, I].
        gain: its error in the norm of the activations relative to that of rounding to nearest on the full ranges, 1
            for that itself.
        fallback: what was not done as configured (rounded to nearest instead, more damping, channels never seen), or
            None.
        clip_ratio: mean share of the ranges that was kept, None where none was searched for.
        damping: relative damping of the Hessian that was needed, None where none was factored.
        num_dead: input channels that calibration never saw.
    """

    weight: QuantizedTensor
    gain: float = 1.0
    fallback: str | None = None
    clip_ratio: float | None = None
    damping: float | None = None
    num_dead: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What the record of a block says of the linear: everything but the weight, and nothing that is not there."""
        values = {
            "gain": self.gain,
            "clip_ratio": self.clip_ratio,
            "damping": self.damping,
            "dead_channels": self.num_dead or None,
            "fallback": self.fallback,
        }
        return {key: value for key, value in values.items() if value is not None}


def nearest(weight: torch.Tensor, fmt: TensorFormat, config: NearestRounding, moment: torch.Tensor | None) -> Rounded:
    """Round to nearest, on ranges shrunk by the second moment of the smoothed input if ``clip`` asks for it."""
    plain = round_nearest(weight, fmt)
    if config.clip is None:
        return Rounded(plain)
    if moment is None:
        return Rounded(plain, fallback="not clipped, no calibration token to look at")
    grid = search_clip(weight, moment, fmt, config.clip)
    rounded = round_on(weight.double(), grid, fmt)
    gain = _ratio(float(output_error(weight, rounded, moment).sum()), float(output_error(weight, plain, moment).sum()))
    return Rounded(rounded, gain, clip_ratio=float(grid.ratio.mean()))


def gptq(weight: torch.Tensor, fmt: TensorFormat, config: GptqRounding, moment: torch.Tensor | None) -> Rounded:
    """GPTQ against the second moment of the smoothed input, on ranges shrunk first if ``clip`` asks for it."""
    if moment is None:
        return Rounded(round_nearest(weight, fmt), fallback="rounded to nearest, no calibration token to round against")
    grid = None if config.clip is None else search_clip(weight, moment, fmt, config.clip)
    outcome = round_gptq(weight, moment, fmt, config, grid)
    plain_loss = outcome.nearest_loss
    if grid is not None:
        plain_loss = float(output_error(weight, round_nearest(weight, fmt), moment).sum())
    gain = _ratio(outcome.loss, plain_loss)
    ratio = None if grid is None else float(grid.ratio.mean())
    notes = [f"damping raised to {outcome.damping:g}"] if outcome.damping not in (None, config.damping) else []
    notes += [f"{outcome.num_dead} input channels never active, rounded to nearest"] if outcome.num_dead else []
    fallback = f"rounded to nearest, {outcome.fallback}" if outcome.fallback else ", ".join(notes) or None
    return Rounded(outcome.weight, gain, fallback, ratio, outcome.damping, outcome.num_dead)


def _ratio(error: float, plain: float) -> float:
    return error / plain if plain > 0 else 1.0


ROUNDING: Registry[Callable[..., Rounded]] = Registry("rounding stage")
ROUNDING.register("nearest", nearest)
ROUNDING.register("gptq", gptq)


def pooled_moment(
    statistics: GroupStatistics,
    factors: Mapping[Modality, torch.Tensor],
    modalities: Collection[Modality] = tuple(Modality),
) -> torch.Tensor | None:
    """Second moment of the smoothed rows x / s_m of the tokens that count, each token alike: float64 [I, I].

    Args:
        statistics: second moments and numbers of tokens by modality.
        factors: s_m by modality; a modality without one takes that of text, no factor is one.
        modalities: whose tokens count.

    Returns:
        None if no such token occurred.
    """
    total, count = None, 0
    for modality, moment in statistics.second_moment.items():
        if modality not in modalities:
            continue
        number = statistics.num_tokens[modality]
        factor = factors.get(modality, factors.get(Modality.TEXT))
        scaled = moment * number
        if factor is not None:
            inverse = factor.double().reciprocal().to(moment.device)
            scaled = scaled * torch.outer(inverse, inverse)
        total, count = (scaled if total is None else total + scaled), count + number
    return None if total is None else total / count
