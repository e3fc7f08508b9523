"""The goal of rounding before corrections: the plain sum without them, and less error with them."""

from __future__ import annotations

import math

import pytest
import torch

from masq.calibration.statistics import GroupStatistics
from masq.compensation.low_rank import fit_low_rank_from_covariance
from masq.models.base import Modality
from masq.numerics.linalg import Spectrum
from masq.numerics.scheme import Scheme
from masq.rounding.config import GptqRounding
from masq.rounding.gptq import round_gptq
from masq.rounding.remainder import remainder
from masq.rounding.stages import pooled_moment

TEXT, VISION, AUDIO = Modality.TEXT, Modality.VISION, Modality.AUDIO
FMT = Scheme.preset("w4a8").formats["query"].weight
TOKENS = {TEXT: 300, VISION: 500, AUDIO: 200}


def covariances(seed: int, inputs: int = 20) -> dict[Modality, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for modality, count in TOKENS.items():
        rows = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
        rows = rows * torch.rand(inputs, generator=generator, dtype=torch.float64).mul(3).exp()
        found[modality] = rows.t() @ rows / count
    return found


def shared(moments: dict[Modality, torch.Tensor]) -> dict[Modality, Spectrum]:
    return {m: Spectrum(moment) for m, moment in moments.items()}


def weight(seed: int = 0, inputs: int = 20) -> torch.Tensor:
    return torch.randn(12, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_without_corrections_and_with_one_factor_it_is_gptq_on_the_summed_hessian() -> None:
    moments, smoothed = covariances(0), weight()
    goal = remainder(dict.fromkeys(TOKENS, smoothed), shared(moments), {}, TOKENS, "tokens")
    assert goal is not None
    pooled = pooled_moment(GroupStatistics(second_moment=moments, num_tokens=TOKENS), {})
    assert pooled is not None
    assert torch.allclose(goal.weight, smoothed)
    assert torch.allclose(goal.moment / goal.moment.trace(), pooled / pooled.trace())
    config = GptqRounding()
    ours, plain = (round_gptq(smoothed, moment, FMT, config).weight.codes for moment in (goal.moment, pooled))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("rank", [0, 1, 5, 20])
def test_the_tail_loses_the_strongest_directions(rank: int) -> None:
    matrix = covariances(1)[VISION]
    values = torch.linalg.eigvalsh(matrix)
    left = torch.linalg.eigvalsh(Spectrum(matrix).tail(rank))
    expected = torch.cat([torch.zeros(rank, dtype=torch.float64), values[: 20 - rank]]).sort().values
    assert torch.allclose(left.sort().values, expected, atol=1e-9 * float(values[-1]))


@pytest.mark.parametrize("share", ["tokens", "signal"])
def test_the_goal_minimises_the_sum_it_stands_for(share: str) -> None:
    moments, base = covariances(2), weight()
    generator = torch.Generator().manual_seed(5)
    smoothed = {m: base * torch.rand(20, generator=generator, dtype=torch.float64).add(0.5) for m in TOKENS}
    goal = remainder(smoothed, shared(moments), {VISION: 3, AUDIO: 2}, TOKENS, share)  # type: ignore[arg-type]
    assert goal is not None

    def total(found: torch.Tensor) -> float:
        result = 0.0
        for modality, moment in moments.items():
            left = Spectrum(moment).tail({VISION: 3, AUDIO: 2}.get(modality, 0))
            error = smoothed[modality] - found
            energy = float(((smoothed[modality] @ moment) * smoothed[modality]).sum())
            weight_of = TOKENS[modality] if share == "tokens" else 1 / energy
            result += weight_of * float(((error @ left) * error).sum())
        return result

    for size in (1e-2, 0.1):
        step = size * torch.randn(base.shape, generator=generator, dtype=torch.float64)
        assert total(goal.weight) <= total(goal.weight + step) * (1 + 1e-6)


def left_after_corrections(
    goal: torch.Tensor,
    moment: torch.Tensor,
    smoothed: dict[Modality, torch.Tensor],
    moments: dict[Modality, torch.Tensor],
    ranks: dict[Modality, int],
) -> float:
    """Relative error of the outputs, summed over modalities, of a weight rounded towards ``goal`` and corrected."""
    stored = round_gptq(goal, moment, FMT, GptqRounding()).weight.dequantize(torch.float64)
    result = 0.0
    for modality, covariance in moments.items():
        error = (smoothed[modality] - stored).t()
        if modality in ranks:
            fit = fit_low_rank_from_covariance(error.t(), covariance, ranks[modality], 1e-6)
            error = error - fit.left @ fit.right
        energy = float(((smoothed[modality] @ covariance) * smoothed[modality]).sum())
        result += float(((covariance @ error) * error).sum()) / energy
    return result


def test_on_average_less_is_left_after_corrections_than_behind_a_plain_sum() -> None:
    """To first order only: single problems may go the other way, the mean may not."""
    ranks, gains = {VISION: 2, AUDIO: 2}, []
    for seed in range(12):
        moments, base = covariances(seed), weight(seed)
        generator = torch.Generator().manual_seed(seed)
        smoothed = {m: base * torch.rand(20, generator=generator, dtype=torch.float64).add(2) for m in TOKENS}
        plain = pooled_moment(GroupStatistics(second_moment=moments, num_tokens=TOKENS), {})
        goal = remainder(smoothed, shared(moments), ranks, TOKENS, "signal")
        assert plain is not None
        assert goal is not None
        pairs = ((goal.weight, goal.moment), (smoothed[TEXT], plain))
        ours, naive = (left_after_corrections(*pair, smoothed, moments, ranks) for pair in pairs)
        gains.append(math.log(naive / ours))
    assert sum(gains) / len(gains) > 0.1, gains


def test_no_token_no_goal() -> None:
    assert remainder({TEXT: weight()}, {}, {}, {}, "tokens") is None
    nothing = {TEXT: torch.zeros(20, 20, dtype=torch.float64)}
    assert remainder({TEXT: weight()}, shared(nothing), {}, {TEXT: 3}, "signal") is None
