"""Searched smoothing: the published factor, errors against a float64 reference, laws of the search."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from masq.calibration.replay import collect
from masq.calibration.statistics import GroupAccumulator, GroupStatistics, TokenSample
from masq.errors import ConfigError, NumericalError
from masq.models.base import Modality, Role
from masq.numerics.scheme import Scheme, TensorFormat
from masq.transforms.config import AwqSmoothing, MbqSmoothing
from masq.transforms.search import SearchedLinear, awq_factor, moment_error, pooled_abs_mean, search, token_errors
from masq.transforms.smoothing import MAX_FACTOR, MIN_FACTOR
from masq.transforms.stages import fit_searched
from tests.nano_fixtures import Nano, nano_model  # noqa: F401

W4, A6 = TensorFormat(4), TensorFormat(6, granularity="per_token")
W3_GROUPS = TensorFormat(3, symmetric=False, granularity="per_group", group_size=5)
SHAPES = ((7, 15), (3, 15), (11, 15))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linears(fmt: TensorFormat = W4, activation: TensorFormat | None = A6) -> list[SearchedLinear]:
    return [
        SearchedLinear(torch.randn(shape, generator=generator(i)), fmt, activation) for i, shape in enumerate(SHAPES)
    ]


def statistics(limit: int = 1000, kinds: tuple[int, ...] = (0, 1, 2, -1)) -> GroupStatistics:
    """Inputs with a few large channels that differ between modalities, padding among them."""
    modality = torch.tensor(kinds, dtype=torch.int8)[torch.randint(len(kinds), (6, 23), generator=generator(7))]
    x = torch.randn(6, 23, 15, generator=generator(8))
    x[..., 2] *= 30
    x[modality == 1] *= torch.linspace(0.2, 9, 15)
    sample = TokenSample.draw(list(modality.split(2)), limit, seed=0)
    accumulator = GroupAccumulator(second_moment=True, sample=sample)
    for part, kind in zip(x.split(2), modality.split(2), strict=True):
        accumulator.update(part, kind)
    return accumulator.result()


def rounded(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """Round to nearest in float64, from the definition alone."""
    parts = x.double().unflatten(-1, (-1, fmt.group_size or x.shape[-1]))
    if fmt.symmetric:
        scale = parts.abs().amax(-1, keepdim=True) / fmt.qmax
        return (torch.round(parts / scale) * scale).flatten(-2)
    low, high = parts.amin(-1, keepdim=True).clamp(max=0), parts.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / fmt.qmax
    zero = torch.round(-low / scale)
    return (((torch.round(parts / scale) + zero).clamp(0, fmt.qmax) - zero) * scale).flatten(-2)


def reference(rows: torch.Tensor, ones: list[SearchedLinear], s: torch.Tensor) -> torch.Tensor:
    """Differences of all outputs, float64 [n, sum O], biases left in to show that they do not matter."""
    outputs = []
    for one in ones:
        bias = torch.randn(one.weight.shape[0], generator=generator(5)).double()
        x = rows.double() / s.double()
        x = x if one.activation_format is None else rounded(x, one.activation_format)
        quantized = x @ rounded(one.weight.double() * s.double(), one.weight_format).t() + bias
        outputs.append(quantized - (rows.double() @ one.weight.double().t() + bias))
    return torch.cat(outputs, 1)


def test_the_factor_is_the_published_formula() -> None:
    mean = torch.rand(13, dtype=torch.float64, generator=generator()) + 0.01
    for exponent in (0.0, 0.05, 0.5, 0.95):
        power = mean**exponent
        torch.testing.assert_close(awq_factor(mean, exponent), (power / (power.max() * power.min()).sqrt()).float())
    assert (awq_factor(mean, 0.0) == 1).all()


def test_dead_channels_and_extremes() -> None:
    factor = awq_factor(torch.tensor([0.0, 4.0, 1.0]), 0.5)
    assert factor.tolist() == pytest.approx([1.0, 2**0.5, 0.5**0.5])
    assert (awq_factor(torch.zeros(3), 0.5) == 1).all()
    assert awq_factor(torch.tensor([1e-30, 1e30]), 0.95).tolist() == pytest.approx([MIN_FACTOR, MAX_FACTOR])
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(NumericalError, match="mean magnitudes"):
            awq_factor(torch.tensor([1.0, bad]), 0.5)


@pytest.mark.parametrize("kinds", [(0, 1, 2, -1), (0, 2), (1,)])
def test_the_pooled_mean_counts_every_token_once(kinds: tuple[int, ...]) -> None:
    stats = statistics(kinds=kinds)
    assert set(stats.rows) == {Modality(kind) for kind in kinds if kind >= 0}
    rows = torch.cat(list(stats.rows.values())).double()
    torch.testing.assert_close(pooled_abs_mean(stats), rows.abs().mean(0))


@pytest.mark.parametrize("fmt", [W4, W3_GROUPS])
@pytest.mark.parametrize("activation", [A6, None])
@pytest.mark.parametrize("squared", [True, False])
def test_errors_equal_a_float64_reference(fmt: TensorFormat, activation: TensorFormat | None, squared: bool) -> None:
    stats, ones = statistics(), linears(fmt, activation)
    rows = stats.rows[Modality.VISION]
    exact = [rows @ one.weight.t() for one in ones]
    for exponent in (0.0, 0.4, 0.9):
        s = awq_factor(pooled_abs_mean(stats), exponent)
        difference = reference(rows, ones, s)
        by_token = difference.square().mean(1) if squared else difference.abs().mean(1)
        found, expected = token_errors(rows, exact, ones, s, squared=squared), float(by_token.mean())
        assert found.shape == (len(rows),)
        # A code may fall on the other side of a tie in float32.
        assert float(found.mean()) == pytest.approx(expected, rel=0.02)
        assert torch.allclose(found.median(), by_token.double().median(), rtol=0.02)
        if squared and activation is None:
            moment = stats.second_moment[Modality.VISION]
            assert moment_error(moment, ones, s) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("activation", [A6, None])
@pytest.mark.parametrize("error", ["squared", "absolute"])
def test_the_best_candidate_wins_and_the_first_is_never_beaten_by_it(
    activation: TensorFormat | None, error: str
) -> None:
    stats, ones = statistics(), linears(activation=activation)
    candidates = [awq_factor(pooled_abs_mean(stats), step / 20) for step in range(20)]
    weights = {Modality.TEXT: 1.0, Modality.VISION: 0.2, Modality.AUDIO: 3.0}
    for sensitivity in ({}, weights):
        stats = replace(stats, sensitivity=sensitivity)
        total = sum(stats.num_tokens.values())
        objective = []
        for s in candidates:
            by = {m: reference(rows, ones, s) for m, rows in stats.rows.items()}
            means = {m: (d.square() if error == "squared" else d.abs()).mean() for m, d in by.items()}
            objective.append(
                float(sum(sensitivity.get(m, 1) * v * stats.num_tokens[m] / total for m, v in means.items()))
            )
        best, ratios = search(stats, ones, candidates, error)
        assert objective[best] == pytest.approx(min(objective), rel=0.02)
        assert ratios["all"] == pytest.approx(objective[best] / objective[0], rel=0.02)
        assert ratios["all"] <= 1
        assert set(ratios) == {"all", "text", "vision", "audio"}


def test_equal_sensitivities_are_none_at_all() -> None:
    stats, ones = statistics(), linears()
    candidates = [awq_factor(pooled_abs_mean(stats), step / 20) for step in range(20)]
    equal = replace(stats, sensitivity=dict.fromkeys(stats.num_tokens, 1.0))
    assert search(equal, ones, candidates, "absolute") == search(stats, ones, candidates, "absolute")


def test_ties_and_bad_candidates_keep_the_first() -> None:
    stats = statistics()
    representable = [SearchedLinear(torch.eye(15), TensorFormat(8), None)]
    assert search(stats, representable, [torch.ones(15), torch.full((15,), 2.0)], "squared")[0] == 0
    assert search(stats, representable, [torch.ones(15)], "squared")[1]["all"] == 1.0
    assert search(stats, linears(), [torch.ones(15), torch.full((15,), float("nan"))], "absolute")[0] == 0
    broken = [replace(linears()[0], weight=torch.full((7, 15), float("nan")))]
    with pytest.raises(NumericalError, match="must be finite"):
        search(stats, broken, [torch.ones(15)], "absolute")


def test_sampled_tokens_stand_for_all_of_their_modality() -> None:
    """A subsample of a modality with equal rows has the error of all of them."""
    x = torch.randn(15, generator=generator()).expand(1, 40, 15).clone()
    modality = torch.zeros(1, 40, dtype=torch.int8)
    modality[0, :30] = 1
    x[modality == 1] *= 3

    def collected(limit: int) -> GroupStatistics:
        accumulator = GroupAccumulator(second_moment=False, sample=TokenSample.draw([modality], limit, seed=3))
        accumulator.update(x, modality)
        return accumulator.result()

    few, every = collected(2), collected(100)
    assert {m: len(rows) for m, rows in few.rows.items()} == {Modality.TEXT: 2, Modality.VISION: 2}
    candidates = [awq_factor(pooled_abs_mean(every), step / 5) for step in range(5)]
    found, expected = (search(one, linears(), candidates, "squared") for one in (few, every))
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize("scheme", ["w4a6", "w4a8", "w8a8"])
@pytest.mark.parametrize("fold", [True, False])
def test_a_plan_of_a_real_block(nano_model: Nano, scheme: str, fold: bool) -> None:  # noqa: F811
    """Grouped-query attention, biases and padding: factors as they are applied, groups that gain nothing left alone."""
    block = nano_model.adapter.blocks()[0]
    for name in ("qkv", "gate_up"):
        block.norm(name).weight.data[::7] *= 8
    config = AwqSmoothing(fold=fold)
    sample = TokenSample.draw([batch.modality for batch in nano_model.replay], config.tokens, 0)
    stats = collect(block, nano_model.hidden, nano_model.replay, groups=config.groups, sample=sample)
    plan = fit_searched(block, stats, config, Scheme.preset(scheme))
    assert set(plan.note["search"]) == set(config.groups)
    smoothed = {group for group, found in plan.note["search"].items() if found["exponent"] > 0}
    assert set(plan.factors) == smoothed
    assert smoothed >= {"qkv"}
    assert plan.folded == (smoothed - {"down"} if fold else set())
    for group, by in plan.factors.items():
        assert plan.note["search"][group]["error_ratio"]["all"] < 1
        assert len({id(factor) for factor in by.values()}) == 1
        if fold and group == "output":
            heads = by[Modality.TEXT].view(block.num_kv_heads, -1, block.head_dim)
            assert torch.equal(heads, heads[:, :1].expand_as(heads))


def test_only_quantized_linears_count(nano_model: Nano) -> None:  # noqa: F811
    block, config = nano_model.adapter.blocks()[0], AwqSmoothing()
    sample = TokenSample.draw([batch.modality for batch in nano_model.replay], config.tokens, 0)
    stats = collect(block, nano_model.hidden, nano_model.replay, groups=config.groups, sample=sample)
    whole = Scheme.preset("w4a6")
    part = Scheme("part", whole.weight, whole.activation, roles=("value", "gate", "up"))
    plan = fit_searched(block, stats, config, part)
    assert set(plan.note["search"]) == {"qkv", "gate_up"}
    expected = [SearchedLinear(block.linear(Role.VALUE).weight, whole.weight, whole.activation)]
    candidates = [awq_factor(pooled_abs_mean(stats["qkv"]), step / 20) for step in range(20)]
    best, ratios = search(stats["qkv"], expected, candidates, "squared")
    assert plan.note["search"]["qkv"] == {"exponent": best / 20, "error_ratio": pytest.approx(ratios, rel=1e-3)}


@pytest.mark.parametrize("kind", [AwqSmoothing, MbqSmoothing])
def test_values_out_of_range_are_refused(kind: type) -> None:
    for key, value in {"steps": 0, "tokens": 0, "groups": ()}.items():
        with pytest.raises(ConfigError, match=key):
            kind(**{key: value})


def test_the_draw_of_tokens_is_seeded_and_spread() -> None:
    modalities = [torch.tensor([[0, 1, -1], [2, 2, 2]], dtype=torch.int8), torch.zeros(1, 50, dtype=torch.int8)]
    one, again, other = (TokenSample.draw(modalities, 5, seed) for seed in (0, 0, 1))
    assert {m: int(kept.sum()) for m, kept in one.kept.items()} == {0: 5, 1: 1, 2: 3}
    assert all(torch.equal(kept, again.kept[m]) for m, kept in one.kept.items())
    assert not torch.equal(one.kept[Modality.TEXT], other.kept[Modality.TEXT])
    assert all(int(kept.sum()) == 0 for kept in TokenSample.draw(modalities, 0, 0).kept.values())
