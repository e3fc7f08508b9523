"""What rounding does to inputs, and a stored weight that takes it into account."""

from __future__ import annotations

import pytest
import torch

from masq.errors import ConfigError
from masq.models.base import Modality
from masq.numerics.affine import fake_quantize
from masq.numerics.linalg import Spectrum
from masq.numerics.scheme import TensorFormat
from masq.rounding.config import GptqRounding
from masq.rounding.inputs import InputRounding
from masq.rounding.remainder import remainder

TEXT, VISION, AUDIO = Modality.TEXT, Modality.VISION, Modality.AUDIO
TOKENS = {TEXT: 300, VISION: 500, AUDIO: 200}


def per_token(bits: int) -> TensorFormat:
    return TensorFormat(bits, granularity="per_token")


def rows(count: int, inputs: int = 20, seed: int = 0) -> torch.Tensor:
    """Correlated channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    x = mixed @ torch.randn(6, inputs, generator=generator, dtype=torch.float64)
    return x * torch.logspace(0, -2, inputs, dtype=torch.float64)


def moments() -> dict[Modality, torch.Tensor]:
    return {m: (x := rows(count, seed=int(m))).t() @ x / count for m, count in TOKENS.items()}


def given(bits: int) -> dict[Modality, InputRounding]:
    return {m: InputRounding.of(rows(count, seed=int(m)), per_token(bits)) for m, count in TOKENS.items()}


def weights() -> dict[Modality, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    base = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    return {m: base * torch.rand(20, generator=generator, dtype=torch.float64).add(0.5) for m in TOKENS}


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_noise_is_what_the_gain_leaves_and_unrelated_to_the_row(bits: int) -> None:
    x = rows(400)
    found, q = InputRounding.of(x, per_token(bits)), fake_quantize(x.float(), per_token(bits)).double()
    weight = 1 / x.abs().amax(1).square()
    noise = q - x * found.gain
    assert torch.allclose(weight @ (noise * x), torch.zeros(20, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(weight @ noise.square() / weight.sum(), found.variance, rtol=1e-6, atol=1e-15)
    assert (found.variance >= 0).all()
    assert torch.allclose(found.gain[0], torch.ones(1, dtype=torch.float64), atol=0.05)


def test_small_channels_are_rounded_away_with_few_bits_alone() -> None:
    few, many = (InputRounding.of(rows(400), per_token(bits)).gain[-1] for bits in (3, 8))
    assert few < 0.2
    assert many > 0.9


@pytest.mark.parametrize("x", [rows(0), torch.zeros(3, 20, dtype=torch.float64)], ids=["none", "zeros"])
def test_nothing_is_known_of_nothing(x: torch.Tensor) -> None:
    found = InputRounding.of(x, per_token(4))
    assert torch.equal(found.gain, torch.ones(20, dtype=torch.float64))
    assert not found.variance.any()


def test_tokens_with_massive_activations_have_no_say() -> None:
    x = rows(400)
    massive = x[:4].clone()
    massive[:, 0] *= 1e4
    few, all_of_them = (InputRounding.of(one, per_token(4)) for one in (x, torch.cat([x, massive])))
    assert torch.allclose(few.variance[1:], all_of_them.variance[1:], rtol=0.02)
    assert torch.allclose(few.gain, all_of_them.gain, atol=0.02)


def test_float_inputs_change_nothing() -> None:
    exact = {m: InputRounding.of(rows(50), None) for m in TOKENS}
    spectra = {m: Spectrum(moment) for m, moment in moments().items()}
    arguments = (weights(), spectra, {VISION: 3}, TOKENS, "signal")
    plain, same = remainder(*arguments), remainder(*arguments, exact)
    assert plain is not None
    assert same is not None
    assert torch.allclose(plain.weight, same.weight, rtol=1e-9)
    assert torch.allclose(plain.moment, same.moment, rtol=1e-9)


@pytest.mark.parametrize("share", ["tokens", "signal"])
def test_the_goal_minimises_the_sum_it_stands_for(share: str) -> None:
    """No step from the weight that is returned lowers the sum: small ones would, half of them, from anywhere else."""
    own, ranks, inputs = weights(), {VISION: 3, AUDIO: 2}, given(4)
    spectra = {m: Spectrum(moment) for m, moment in moments().items()}
    goal = remainder(own, spectra, ranks, TOKENS, share, inputs)  # type: ignore[arg-type]
    assert goal is not None

    def total(found: torch.Tensor) -> float:
        result = 0.0
        for modality, spectrum in spectra.items():
            left, rounding = spectrum.tail(ranks.get(modality, 0)), inputs[modality]
            error = own[modality] - found * rounding.gain
            energy = float(((own[modality] @ spectrum.matrix) * own[modality]).sum())
            weight = TOKENS[modality] if share == "tokens" else 1 / energy
            noise = float((found.square() * rounding.variance).sum())
            result += weight * (float(((error @ left) * error).sum()) + noise)
        return result

    lowest = total(goal.weight)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-2, 0.1):
        for _ in range(20):
            step = size * torch.randn(12, 20, generator=generator, dtype=torch.float64)
            assert lowest <= total(goal.weight + step) * (1 + 1e-6)
    exact = remainder(own, spectra, ranks, TOKENS, share)  # type: ignore[arg-type]
    assert exact is not None
    assert lowest < total(exact.weight)


def test_less_error_on_rounded_rows() -> None:
    """On other rows of the same kind, with float weights: what is regained is due to the inputs alone."""
    own, x = weights()[TEXT], rows(1000)
    seen, others = x.split(500)
    inputs = {TEXT: InputRounding.of(seen, per_token(4))}
    goal = remainder({TEXT: own}, {TEXT: Spectrum(seen.t() @ seen / 500)}, {}, {TEXT: 500}, "tokens", inputs)
    assert goal is not None
    q, wanted = fake_quantize(others.float(), per_token(4)).double(), others @ own.t()
    before, after = ((q @ one.t() - wanted).square().sum() for one in (own, goal.weight))
    assert after < 0.95 * before


def test_only_a_remainder_takes_rounded_inputs() -> None:
    with pytest.raises(ConfigError, match="Set method.rounding.tokens=remainder"):
        GptqRounding(inputs="rounded")
