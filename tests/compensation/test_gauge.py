"""The searched gauge: what it contains, what it is never worse than, and that its error is the one of its formula."""

from __future__ import annotations

import pytest
import torch

from masq.compensation.gauge import GaugedLinear, PostCorrectionError, search_gauge
from masq.compensation.low_rank import fit_low_rank_from_covariance, scaled_covariance
from masq.numerics.affine import fake_quantize
from masq.numerics.hadamard import random_signs, rotate
from masq.numerics.scheme import Scheme
from masq.rounding.nearest import round_nearest

DAMPING, RANK = 1e-4, 3
FMT = Scheme.preset("w4a6").formats["query"]


def problem(
    seed: int = 0, inputs: int = 24, turned: bool = False
) -> tuple[PostCorrectionError, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(60, inputs, generator=generator) * torch.rand(inputs, generator=generator).mul(3).exp()
    text = torch.rand(inputs, generator=generator) + 0.5
    own = 3 * (torch.rand(inputs, generator=generator) + 0.5)
    weight = torch.randn(16, inputs, generator=generator).double()
    signs = random_signs(inputs, 0, "test").float() if turned else None
    turn = (lambda x: rotate(x, signs)) if turned else None
    smoothed = weight * text.double()
    stored = round_nearest(smoothed if turn is None else turn(smoothed), FMT.weight).dequantize(torch.float64)
    moment = rows.double().t() @ rows.double() / len(rows)
    linears = [GaugedLinear(weight, stored, RANK, FMT.activation)]
    error = PostCorrectionError(rows, moment, text, own, linears, DAMPING, turn)
    return error, {"rows": rows, "text": text, "own": own, "weight": weight, "stored": stored, "moment": moment}


@pytest.mark.parametrize(("strength", "log_scale"), [(1.0, 0.0), (0.0, 0.0), (0.5, 0.3), (0.75, -1.0)])
def test_the_error_is_what_a_correction_leaves_plus_the_noise_of_activations(strength: float, log_scale: float) -> None:
    error, made = problem()
    factor = error.factor(strength, log_scale).double()
    covariance = scaled_covariance(made["moment"], factor)
    residual = made["weight"] * factor - made["stored"]
    fit = fit_low_rank_from_covariance(residual, covariance, RANK, DAMPING)
    left = residual.t() - fit.left @ fit.right
    damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(24)
    rows = made["rows"] / factor.float()
    noise = (rows - fake_quantize(rows, FMT.activation)).double() @ made["stored"].t()
    signal = ((made["weight"] @ made["moment"]) * made["weight"]).sum()
    expected = float((((left.t() @ damped) * left.t()).sum() + noise.square().sum() / len(rows)) / signal)
    assert error(strength, log_scale) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("turned", [False, True])
def test_the_choice_is_never_worse_than_masquant_or_qera(seed: int, turned: bool) -> None:
    error, made = problem(seed, turned=turned)
    factor, gauge = search_gauge(error)
    assert gauge.error <= min(gauge.given_error, gauge.text_error)
    assert gauge.given_error == error(1.0, 0.0)
    assert gauge.text_error == error(0.0, 0.0)
    assert torch.equal(error.factor(0.0, 0.0), made["text"])
    assert torch.allclose(error.factor(1.0, 0.0), made["own"])
    expected = made["text"].log() * (1 - gauge.strength) + gauge.strength * (gauge.scale * made["own"]).log()
    assert torch.allclose(factor.log(), expected, atol=1e-4)


def test_a_scale_alone_is_found() -> None:
    """A factor that is text's times a constant: the search undoes the constant."""
    error, made = problem()
    shifted = PostCorrectionError(
        made["rows"], made["moment"], made["text"], 5 * made["text"],
        [GaugedLinear(made["weight"], made["stored"], RANK, FMT.activation)], DAMPING,
    )  # fmt: skip
    factor, gauge = search_gauge(shifted)
    assert gauge.error <= shifted(0.0, 0.0)
    assert gauge.given_error > 1.5 * gauge.error
    assert 0.4 < float((factor / made["text"]).mean()) < 2.5


def test_a_rotation_moves_rows_weights_and_moments_alike() -> None:
    error, made = problem(turned=True)
    factor = made["text"].double()
    signs = random_signs(24, 0, "test")
    exact = (made["rows"].double() / factor) @ (made["weight"] * factor).t()
    turned = rotate(made["rows"].double() / factor, signs) @ rotate(made["weight"] * factor, signs).t()
    assert torch.allclose(exact, turned)
    assert error(0.0, 0.0) > 0
