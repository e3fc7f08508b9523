"""Smoothing factors: the published formula, and exact rewrites in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from masq.calibration.statistics import GroupAccumulator, GroupStatistics
from masq.errors import ConfigError, ModelError, NumericalError
from masq.models.base import Modality
from masq.transforms.smoothing import (
    MAX_FACTOR,
    MIN_FACTOR,
    fold_into_norm,
    fold_into_value,
    foldable_factor,
    match_scale,
    modality_factors,
    shared_factor,
    smoothing_factor,
    tie_to_kv_heads,
    weight_abs_max,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(size: int, seed: int = 0) -> torch.Tensor:
    return normal(size, seed=seed).abs() + 0.1


def statistics(num_channels: int = 6) -> GroupStatistics:
    accumulator = GroupAccumulator(second_moment=False)
    modality = torch.tensor([0, 0, 1, 1, 2, -1], dtype=torch.int8)
    scale = torch.tensor([1.0, 1.0, 9.0, 2.0, 0.3, 1e6]).unsqueeze(1)
    accumulator.update(normal(6, num_channels).float() * scale, modality)
    return accumulator.result()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factor_is_the_published_formula(alpha: float) -> None:
    x, w = positive(9), positive(9, seed=1)
    expected = torch.tensor([a**alpha / b ** (1 - alpha) for a, b in zip(x.tolist(), w.tolist(), strict=True)])
    torch.testing.assert_close(smoothing_factor(x, w, alpha), expected.float(), rtol=1e-6, atol=0)


def test_alpha_half_balances_activations_and_weights() -> None:
    """Equation 12: after the rewrite both sides have the same range in every channel."""
    x, w = positive(20), positive(20, seed=1)
    factor = smoothing_factor(x, w, 0.5).double()
    torch.testing.assert_close(x / factor, w * factor, rtol=1e-6, atol=0)


def test_dead_channels_get_factor_one() -> None:
    factor = smoothing_factor(torch.tensor([0.0, 4.0, 0.0, 4.0]), torch.tensor([2.0, 0.0, 0.0, 1.0]), 0.5)
    assert factor.tolist() == [1.0, 1.0, 1.0, 2.0]
    assert (smoothing_factor(torch.zeros(3), torch.ones(3), 0.0) == 1).all()


def test_factor_is_bounded() -> None:
    factor = smoothing_factor(torch.tensor([1e-30, 1e30]), torch.tensor([1e30, 1e-30]), 0.5)
    assert factor.tolist() == pytest.approx([MIN_FACTOR, MAX_FACTOR])
    assert torch.isfinite(1 / factor).all()


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        smoothing_factor(torch.ones(2), torch.ones(2), alpha)


@pytest.mark.parametrize("bad", [torch.tensor([1.0, float("nan")]), torch.tensor([-1.0, 1.0]), torch.ones(3)])
def test_bad_maxima(bad: torch.Tensor) -> None:
    with pytest.raises(NumericalError):
        smoothing_factor(bad, torch.ones(2), 0.5)


def test_weight_abs_max_covers_all_linears_of_the_group() -> None:
    first, second = torch.tensor([[1.0, -5.0], [2.0, 3.0]]), torch.tensor([[-4.0, 1.0]])
    assert weight_abs_max([first, second]).tolist() == [4.0, 5.0]
    with pytest.raises(ModelError):
        weight_abs_max([first, torch.ones(2, 3)])
    with pytest.raises(ModelError):
        weight_abs_max([])


def test_shared_factor_takes_the_maximum_over_modalities() -> None:
    stats, weights = statistics(), [normal(5, 6).float(), normal(3, 6, seed=1).float()]
    joint = torch.stack(list(stats.abs_max.values())).amax(0)
    expected = smoothing_factor(joint, weight_abs_max(weights), 0.5)
    assert torch.equal(shared_factor(stats, weights, 0.5), expected)
    own = smoothing_factor(stats.abs_max[Modality.TEXT], weight_abs_max(weights), 0.5)
    assert torch.equal(shared_factor(stats, weights, 0.5, "text"), own)
    assert not torch.equal(own, expected)


def test_shared_factor_without_tokens_of_its_source() -> None:
    stats = GroupStatistics(abs_max={Modality.VISION: torch.ones(6)}, num_tokens={Modality.VISION: 3})
    with pytest.raises(ConfigError, match="vision"):
        shared_factor(stats, [torch.ones(2, 6)], 0.5, "text")
    with pytest.raises(ConfigError, match="audio"):
        shared_factor(stats, [torch.ones(2, 6)], 0.5, "audio")


def test_modality_factors_follow_equation_12_for_each_modality() -> None:
    stats, weights = statistics(), [normal(5, 6).float()]
    factors = modality_factors(stats, weights, 0.5)
    assert set(factors) == {Modality.TEXT, Modality.VISION, Modality.AUDIO}
    for which, factor in factors.items():
        expected = (stats.abs_max[which].double() / weights[0].double().abs().amax(0)).sqrt()
        torch.testing.assert_close(factor, expected.float(), rtol=1e-6, atol=0)


def test_one_modality_alone_equals_smoothquant() -> None:
    stats = GroupStatistics(abs_max={Modality.TEXT: positive(6).float()}, num_tokens={Modality.TEXT: 2})
    weights = [normal(5, 6).float()]
    assert torch.equal(modality_factors(stats, weights, 0.5)[Modality.TEXT], shared_factor(stats, weights, 0.5))


def test_tie_takes_the_maximum_over_the_query_heads_of_a_kv_head() -> None:
    factor = torch.tensor([1.0, 8.0, 3.0, 2.0, 5.0, 6.0, 7.0, 4.0])  # four heads of two channels, two KV heads
    assert tie_to_kv_heads(factor, 4, 2).tolist() == [3.0, 8.0, 3.0, 8.0, 7.0, 6.0, 7.0, 6.0]
    assert torch.equal(tie_to_kv_heads(factor, 4, 4), factor)
    tied = tie_to_kv_heads(factor, 4, 2)
    assert torch.equal(tie_to_kv_heads(tied, 4, 2), tied)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 3, 8), (3, 1, 8), (4, 0, 8)])
def test_tie_refuses_sizes_that_do_not_divide(heads: int, kv_heads: int, size: int) -> None:
    with pytest.raises(ModelError):
        tie_to_kv_heads(torch.ones(size), heads, kv_heads)


class BiasedNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(positive(size, seed=5))
        self.bias = nn.Parameter(normal(size, seed=6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias)


@pytest.mark.parametrize("norm", [nn.RMSNorm(6, dtype=torch.float64), BiasedNorm(6)], ids=["rms", "layer_norm"])
def test_folding_into_a_norm_is_exact(norm: nn.Module) -> None:
    x, weight, factor = normal(11, 6), normal(4, 6, seed=1), positive(6, seed=2)
    with torch.no_grad():
        before = functional.linear(norm(x), weight)
        fold_into_norm(norm, factor)
        after = functional.linear(norm(x), weight * factor)
    torch.testing.assert_close(after, before, rtol=1e-13, atol=1e-13)


def attention(x: torch.Tensor, v: nn.Linear, o: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Grouped-query attention with given probabilities: enough to see that folding passes through them."""
    tokens = x.shape[0]
    values = v(x).view(tokens, kv_heads, -1).repeat_interleave(heads // kv_heads, dim=1)
    probabilities = torch.softmax(normal(heads, tokens, tokens, seed=9), -1)
    mixed = torch.einsum("hqk,khd->qhd", probabilities, values)
    return functional.linear(mixed.reshape(tokens, -1), o)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_folding_into_the_value_linear_is_exact(heads: int, kv_heads: int, bias: bool) -> None:
    x, head_dim = normal(7, 10), 5
    v = nn.Linear(10, kv_heads * head_dim, bias=bias, dtype=torch.float64)
    o = normal(8, heads * head_dim, seed=3)
    factor = tie_to_kv_heads(positive(heads * head_dim, seed=4), heads, kv_heads)
    with torch.no_grad():
        before = attention(x, v, o, heads, kv_heads)
        fold_into_value(v, factor, heads, kv_heads)
        after = attention(x, v, o * factor, heads, kv_heads)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_untied_factor_is_refused_and_nothing_changes() -> None:
    v = nn.Linear(10, 10)
    kept = v.weight.detach().clone()
    with pytest.raises(ModelError, match="tie_to_kv_heads"):
        fold_into_value(v, positive(30), 6, 2)
    with pytest.raises(ModelError):
        fold_into_value(nn.Linear(10, 9), tie_to_kv_heads(positive(30), 6, 2), 6, 2)
    assert torch.equal(v.weight, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_foldable_factor_is_divided_out_exactly_in_16_bits(dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(64).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(normal(64))
        norm.weight[3] = 0
    before, wanted = norm.weight.detach().double(), positive(64).float()
    factor = foldable_factor(norm, wanted)
    torch.testing.assert_close(factor, wanted, rtol=2**-8, atol=0)
    fold_into_norm(norm, factor)
    torch.testing.assert_close(norm.weight.detach().double() * factor.double(), before, rtol=2**-23, atol=0)
    fresh = nn.RMSNorm(64).to(dtype)
    with torch.no_grad():
        fresh.weight.copy_(before)
    fold_into_norm(fresh, wanted)
    assert not torch.allclose(fresh.weight.detach().double() * wanted.double(), before, rtol=2**-15, atol=0)


def test_fold_refuses_a_norm_of_another_size() -> None:
    with pytest.raises(ModelError, match="fold"):
        fold_into_norm(nn.RMSNorm(6), torch.ones(5))
    with pytest.raises(ModelError, match="Identity"):
        fold_into_norm(nn.Identity(), torch.ones(5))


def test_fold_keeps_the_dtype_and_the_parameter_object() -> None:
    norm = nn.RMSNorm(6, dtype=torch.bfloat16)
    parameter = norm.weight
    fold_into_norm(norm, torch.full((6,), 4.0))
    assert norm.weight is parameter
    assert norm.weight.dtype == torch.bfloat16
    assert norm.weight.tolist() == [0.25] * 6


def test_matched_scales_differ_by_one_constant_and_have_the_geometric_mean_of_text() -> None:
    factors = {m: positive(9, seed=int(m)).float() * 4.0**m for m in (Modality.TEXT, Modality.VISION, Modality.AUDIO)}
    matched = match_scale(factors)
    assert torch.equal(matched[Modality.TEXT], factors[Modality.TEXT])
    for which in (Modality.VISION, Modality.AUDIO):
        ratio = matched[which] / factors[which]
        torch.testing.assert_close(ratio, ratio[:1].expand(9), rtol=1e-6, atol=0)
        torch.testing.assert_close(matched[which].log().mean(), factors[Modality.TEXT].log().mean())
    assert match_scale({}) == {}
