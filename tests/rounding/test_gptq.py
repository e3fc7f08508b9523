from __future__ import annotations

import pytest
import torch

from masq.errors import ConfigError, NumericalError
from masq.numerics.affine import quantize
from masq.numerics.scheme import TensorFormat
from masq.rounding.config import GptqRounding
from masq.rounding.gptq import round_gptq

W4 = TensorFormat(4)
W4_ASYMMETRIC = TensorFormat(4, symmetric=False)
W3_GROUPS = TensorFormat(3, symmetric=False, granularity="per_group", group_size=8)
FORMATS = [W4, W4_ASYMMETRIC, W3_GROUPS, TensorFormat(8)]


def problem(rows: int = 7, columns: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moment of correlated inputs with two large channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    mix = torch.randn(columns, columns, dtype=torch.float64, generator=generator) / columns**0.5
    x = torch.randn(300, columns, dtype=torch.float64, generator=generator) @ mix
    x[:, :2] *= 10
    return weight, x.t() @ x / len(x)


def reference(weight: torch.Tensor, hessian: torch.Tensor, fmt: TensorFormat, damping: float) -> torch.Tensor:
    """Optimal brain quantization, one column at a time with the inverse Hessian downdated: no Cholesky, no blocks."""
    count = weight.shape[1]
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(count, dtype=torch.float64))
    scale, work = quantize(weight, fmt).scale.double(), weight.clone()
    result = torch.empty_like(weight)
    for column in range(count):
        codes = torch.round(work[:, column] / scale[:, 0]).clamp(fmt.qmin, fmt.qmax)
        result[:, column] = codes
        error = (work[:, column] - codes * scale[:, 0]) / inverse[column, column]
        work -= torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result


@pytest.mark.parametrize("seed", range(4))
def test_equals_brain_quantization_with_a_downdated_inverse(seed: int) -> None:
    weight, hessian = problem(seed=seed)
    outcome = round_gptq(weight, hessian, W4, GptqRounding(block_size=16))
    assert outcome.fallback is None
    assert torch.equal(outcome.weight.codes.double(), reference(weight, hessian, W4, 0.01))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_nearest_on_its_own_loss(fmt: TensorFormat, seed: int) -> None:
    weight, hessian = problem(seed=seed)
    outcome = round_gptq(weight, hessian, fmt, GptqRounding(block_size=16))
    error = weight - outcome.weight.dequantize(torch.float64)
    assert outcome.loss == pytest.approx(float((error @ hessian @ error.t()).trace()), rel=1e-9)
    assert outcome.loss < 0.9 * outcome.nearest_loss


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_diagonal_hessian_leaves_nothing_to_compensate(fmt: TensorFormat) -> None:
    weight, _ = problem()
    outcome = round_gptq(weight, torch.diag(torch.rand(40, dtype=torch.float64) + 0.1), fmt, GptqRounding())
    nearest = quantize(weight, fmt)
    assert torch.equal(outcome.weight.codes, nearest.codes)
    assert torch.equal(outcome.weight.scale, nearest.scale)
    assert outcome.loss == outcome.nearest_loss


@pytest.mark.parametrize("act_order", [False, True])
def test_block_size_changes_nothing(act_order: bool) -> None:
    weight, hessian = problem()
    codes = [
        round_gptq(weight, hessian, W4, GptqRounding(block_size=size, act_order=act_order)).weight.codes
        for size in (1, 8, 13, 128)
    ]
    assert all(torch.equal(one, codes[0]) for one in codes)


def test_act_order_is_gptq_on_permuted_columns() -> None:
    weight, hessian = problem()
    order = torch.argsort(hessian.diagonal(), descending=True)
    ordered = round_gptq(weight, hessian, W4, GptqRounding(act_order=True)).weight.codes
    permuted = round_gptq(weight[:, order], hessian[order][:, order], W4, GptqRounding()).weight.codes
    assert torch.equal(ordered[:, order], permuted)


def test_one_group_equals_per_channel() -> None:
    weight, hessian = problem()
    grouped = TensorFormat(4, symmetric=False, granularity="per_group", group_size=40)
    one = round_gptq(weight, hessian, grouped, GptqRounding(static_groups=True)).weight
    assert torch.equal(one.codes, round_gptq(weight, hessian, W4_ASYMMETRIC, GptqRounding()).weight.codes)


def test_static_groups_keep_the_scales_of_nearest_and_moving_ones_do_not() -> None:
    weight, hessian = problem()
    nearest = quantize(weight, W3_GROUPS)
    static = round_gptq(weight, hessian, W3_GROUPS, GptqRounding(static_groups=True, act_order=True))
    moving = round_gptq(weight, hessian, W3_GROUPS, GptqRounding(block_size=8))
    assert torch.equal(static.weight.scale, nearest.scale)
    assert torch.equal(moving.weight.scale[:, 0], nearest.scale[:, 0])
    assert not torch.equal(moving.weight.scale[:, 1:], nearest.scale[:, 1:])


def test_representable_weights_stay_exact() -> None:
    _, hessian = problem()
    weight = torch.randint(-7, 8, (7, 40), generator=torch.Generator().manual_seed(0)).double() / 8
    weight[:, 0] = 7 / 8
    outcome = round_gptq(weight, hessian, W4, GptqRounding())
    assert torch.equal(outcome.weight.dequantize(torch.float64), weight)
    assert outcome.loss == 0


def test_dead_channels_keep_their_nearest_value() -> None:
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    outcome = round_gptq(weight, hessian, W4, GptqRounding())
    assert (outcome.num_dead, outcome.fallback) == (1, None)
    assert torch.equal(outcome.weight.codes[:, 5], quantize(weight, W4).codes[:, 5])


def test_rank_deficient_hessian_is_damped() -> None:
    weight, _ = problem()
    x = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outcome = round_gptq(weight, x.t() @ x / 3, W4, GptqRounding())
    assert outcome.damping == 0.01
    assert outcome.loss < outcome.nearest_loss


@pytest.mark.parametrize("hessian", [torch.zeros(40, 40), -torch.eye(40)])
def test_hopeless_hessian_is_a_typed_result(hessian: torch.Tensor) -> None:
    weight, _ = problem()
    outcome = round_gptq(weight, hessian, W4, GptqRounding())
    assert outcome.fallback == "singular Hessian"
    assert outcome.damping is None
    assert torch.equal(outcome.weight.codes, quantize(weight, W4).codes)


@pytest.mark.parametrize("size", [1e-300, 1e-150, 1e150, 1e300])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_size_of_the_hessian_changes_nothing(size: float, act_order: bool) -> None:
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    config = GptqRounding(act_order=act_order)
    expected, found = (round_gptq(weight, one, W4, config) for one in (hessian, hessian * size))
    assert torch.equal(found.weight.codes, expected.weight.codes)
    assert (found.damping, found.num_dead, found.fallback) == (0.01, 1, None)


@pytest.mark.parametrize("size", [1e-310, 1e-320])
def test_a_hessian_below_all_normal_numbers_is_a_typed_result(size: float) -> None:
    weight, hessian = problem()
    outcome = round_gptq(weight, hessian * size, W4, GptqRounding())
    assert outcome.fallback == "singular Hessian" or outcome.damping is not None
    assert outcome.loss <= outcome.nearest_loss


def test_a_sweep_that_ends_above_nearest_is_dropped() -> None:
    """Undamped, greedy rounding of two strongly coupled channels can lose; what is kept is rounding to nearest."""
    generator, dropped = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        weight = torch.randn(1, 4, dtype=torch.float64, generator=generator)
        x = torch.randn(4, 4, dtype=torch.float64, generator=generator)
        outcome = round_gptq(weight, x.t() @ x, TensorFormat(2), GptqRounding(damping=1e-9))
        error = weight - outcome.weight.dequantize(torch.float64)
        assert float((error @ (x.t() @ x) @ error.t()).trace()) == pytest.approx(outcome.loss)
        assert outcome.loss <= outcome.nearest_loss
        if outcome.fallback is not None:
            dropped += 1
            assert outcome.fallback == "worse than nearest"
            assert torch.equal(outcome.weight.codes, quantize(weight, TensorFormat(2)).codes)
    assert dropped


def test_bad_input_is_refused() -> None:
    weight, hessian = problem()
    with pytest.raises(NumericalError, match="second moment"):
        round_gptq(weight, hessian[:8, :8], W4, GptqRounding())
    with pytest.raises(NumericalError, match="finite"):
        round_gptq(weight * float("nan"), hessian, W4, GptqRounding())
    with pytest.raises(ConfigError, match="static_groups"):
        round_gptq(weight, hessian, W3_GROUPS, GptqRounding(act_order=True))
    with pytest.raises(ConfigError, match="damping"):
        GptqRounding(damping=0)
