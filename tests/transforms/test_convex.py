"""Convex smoothing: convexity, the optimum, the closed form behind a rotation, dead channels, odd formats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from masq.calibration.cache import Request
from masq.calibration.statistics import TokenSample
from masq.errors import ConfigError, NumericalError
from masq.models.base import Modality
from masq.numerics.scheme import Scheme
from masq.transforms.config import ConvexModalitySmoothing
from masq.transforms.convex import ErrorModel, convex_factor
from masq.transforms.search import SearchedLinear
from masq.transforms.stages import fit_convex
from tests.nano_fixtures import Nano, nano_model  # noqa: F401


def problem(seed: int = 0, scheme: str = "w4a6", inputs: int = 24) -> tuple[torch.Tensor, list[SearchedLinear]]:
    """Rows with planted outlier channels, and two linears that read them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(40, inputs, generator=generator)
    rows[:, :3] *= torch.tensor([30.0, 12.0, 8.0])
    fmt = Scheme.preset(scheme).formats["query"]
    weights = [torch.randn(size, inputs, generator=generator) for size in (16, 9)]
    return rows, [SearchedLinear(weight, fmt.weight, fmt.activation) for weight in weights]


@pytest.mark.parametrize("scheme", ["w4a6", "w4a16", "w8a8"])
@pytest.mark.parametrize("power", [2, 16])
def test_the_logarithm_of_the_error_is_convex_along_random_lines(scheme: str, power: int) -> None:
    rows, linears = problem(scheme=scheme)
    model, generator = ErrorModel(rows, linears, power), torch.Generator().manual_seed(1)
    for _ in range(20):
        a, b = (3 * torch.randn(24, generator=generator, dtype=torch.float64) for _ in range(2))
        ends = (float(model(a).log()), float(model(b).log()))
        for share in (0.2, 0.5, 0.8):
            between = float(model((1 - share) * a + share * b).log())
            assert between <= (1 - share) * ends[0] + share * ends[1] + 1e-9


def test_the_error_is_the_model_of_the_docstring() -> None:
    rows, linears = problem()
    v = torch.randn(24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    s2, x2, expected = v.exp(), rows.double().square(), 0.0
    for one in linears:
        w2 = one.weight.double().square()
        norm = lambda t: t.pow(8).sum(1).pow(1 / 8)  # noqa: E731
        noise_a = norm(x2 / s2).mean() * (s2 * w2.sum(0)).sum() / (12 * 31**2)
        noise_w = norm(w2 * s2).sum() * (x2.mean(0) / s2).sum() / (12 * 7**2)
        expected += float(noise_a + noise_w)
    assert float(ErrorModel(rows, linears, 16)(v)) == pytest.approx(expected, rel=1e-10)


def test_the_factor_is_the_optimum_from_wherever_one_looks() -> None:
    rows, linears = problem()
    factor = convex_factor(rows, linears, power=16, steps=200)
    model, best = ErrorModel(rows, linears, 16), 2 * factor.double().log()
    generator = torch.Generator().manual_seed(3)
    for size in (1e-2, 0.1, 1.0):
        for _ in range(20):
            step = size * torch.randn(24, generator=generator, dtype=torch.float64)
            assert float(model(best)) <= float(model(best + step)) * (1 + 1e-6)
    assert float(factor.double().log().mean()) == pytest.approx(0, abs=1e-6)
    assert float(model(best)) < 0.8 * float(model(torch.zeros_like(best)))


def test_norms_of_order_two_have_a_closed_form() -> None:
    rows, linears = problem()
    energy_x = rows.double().square().mean(0)
    energy_w = torch.cat([one.weight for one in linears]).double().square().sum(0)
    expected = (energy_x / energy_w).pow(0.25)
    expected = expected / expected.log().mean().exp()
    factor = convex_factor(rows, linears[:], power=2, steps=50)
    assert torch.allclose(factor.double(), expected, rtol=2e-2)


def test_dead_channels_keep_the_factor_one_and_the_rest_is_finite() -> None:
    rows, linears = problem()
    rows[:, 5] = 0
    for one in linears:
        one.weight[:, 7] = 0
    factor = convex_factor(rows, linears, power=16, steps=100)
    assert factor[5] == factor[7] == 1
    assert bool(torch.isfinite(factor).all())
    assert bool((convex_factor(torch.zeros_like(rows), linears, 16, 10) == 1).all())


def test_groups_of_weights_have_a_step_each() -> None:
    fmt = Scheme.preset("w4a16_g64").formats["query"]
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(20, 128, generator=generator), torch.randn(8, 128, generator=generator)
    linears = [SearchedLinear(weight, fmt.weight, fmt.activation)]
    factor = convex_factor(rows, linears, power=16, steps=100)
    model = ErrorModel(rows, linears, 16)
    assert float(model(2 * factor.double().log())) <= float(model(torch.zeros(128, dtype=torch.float64)))


def test_rows_that_are_not_finite_are_refused() -> None:
    rows, linears = problem()
    rows[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="finite"):
        convex_factor(rows, linears, 16, 10)


def test_a_shared_group_has_one_factor_and_weighs_modalities_alike(nano_model: Nano) -> None:  # noqa: F811
    block = nano_model.adapter.blocks()[0]
    sample = TokenSample.draw([batch.modality for batch in nano_model.replay], 40, 0)
    statistics = Request(("qkv", "down"), sample=sample).collect(block, nano_model.hidden, nano_model.replay)
    scheme = Scheme.preset("w4a6")
    config = ConvexModalitySmoothing(groups=("qkv", "down"), steps=30)
    found = fit_convex(block, statistics, config, scheme).factors
    own, shared = (list(found[group].values()) for group in ("qkv", "down"))
    assert all(torch.equal(shared[0], one) for one in shared)
    assert not any(torch.equal(own[0], one) for one in own[1:])
    loud = {m: rows * (1000 if m is Modality.VISION else 1) for m, rows in statistics["down"].rows.items()}
    scaled = {**statistics, "down": replace(statistics["down"], rows=loud)}
    again = fit_convex(block, scaled, config, scheme).factors
    assert torch.allclose(again["down"][Modality.TEXT], found["down"][Modality.TEXT], rtol=1e-3)
    alone = fit_convex(block, statistics, replace(config, shared=()), scheme).factors["down"]
    assert not torch.equal(alone[Modality.TEXT], alone[Modality.VISION])


def test_a_shared_group_is_named_once() -> None:
    with pytest.raises(ConfigError, match="once"):
        ConvexModalitySmoothing(shared=("down", "down"))
