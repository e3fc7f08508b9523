"""Clip search: exhaustive search as reference, never worse row by row, the same grid for nearest and GPTQ."""

from __future__ import annotations

import pytest
import torch

from masq.errors import ConfigError, NumericalError
from masq.numerics.affine import quantize
from masq.numerics.scheme import TensorFormat
from masq.rounding.clip import output_error, round_on, search_clip
from masq.rounding.config import ClipSearch, GptqRounding, NearestRounding
from masq.rounding.gptq import round_gptq
from masq.rounding.stages import ROUNDING

W3, W3_ASYMMETRIC = TensorFormat(3), TensorFormat(3, symmetric=False)
GROUPS = TensorFormat(3, symmetric=False, granularity="per_group", group_size=7)
FORMATS = [W3, W3_ASYMMETRIC, GROUPS, TensorFormat(3, granularity="per_group", group_size=5), TensorFormat(8)]


def problem(rows: int = 9, columns: int = 35, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Heavy-tailed weights, of both signs and lopsided, and the moment of correlated inputs with loud channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator) ** 3
    weight[1] = weight[1].abs()
    weight[2] = 0
    mix = torch.randn(columns, columns, dtype=torch.float64, generator=generator) / columns**0.5
    x = torch.randn(200, columns, dtype=torch.float64, generator=generator) @ mix
    x[:, 3] *= 8
    return weight, x.t() @ x / len(x)


def clipped(weight: torch.Tensor, share: float, fmt: TensorFormat) -> torch.Tensor:
    """Rounding of a range shrunk to ``share``, from the definition, by group."""
    parts = weight.unflatten(1, (-1, fmt.group_size or weight.shape[1]))
    if fmt.symmetric:
        scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30) * share / fmt.qmax
        return (torch.round(parts / scale).clamp(-fmt.qmax, fmt.qmax) * scale).flatten(1)
    low, high = parts.amin(-1, keepdim=True).clamp(max=0), parts.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-30) * share / fmt.qmax
    zero = torch.round(-low * share / scale)
    return (((torch.round(parts / scale) + zero).clamp(0, fmt.qmax) - zero) * scale).flatten(1)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("moments", ["full", "diagonal"])
@pytest.mark.parametrize("seed", range(3))
def test_no_row_is_worse_and_every_group_is_searched_exhaustively(fmt: TensorFormat, moments: str, seed: int) -> None:
    weight, moment = problem(seed=seed)
    config = ClipSearch(moments=moments)
    measure = torch.diag(moment.diagonal()) if moments == "diagonal" else moment
    grid = search_clip(weight, moment, fmt, config)
    found = output_error(weight, round_on(weight, grid, fmt), measure)
    plain = output_error(weight, quantize(weight, fmt), measure)
    assert (found <= plain).all()
    size = fmt.group_size or weight.shape[1]
    for group in range(weight.shape[1] // size):
        block = slice(group * size, (group + 1) * size)
        errors = []
        for share in config.shares:
            error = (weight - clipped(weight, share, fmt))[:, block]
            errors.append(((error @ measure[block, block]) * error).sum(1))
        best = torch.stack(errors)
        kept = grid.ratio[:, group] < 1
        chosen = torch.tensor([config.shares.index(ratio) for ratio in grid.ratio[:, group].tolist()])
        rows = torch.arange(len(weight))
        torch.testing.assert_close(best[chosen, rows][kept], best.amin(0)[kept], rtol=1e-4, atol=1e-12)
    if fmt.bits == 3:
        assert float(found.sum()) < float(plain.sum())


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_range_of_one_share_is_rounding_to_nearest(fmt: TensorFormat) -> None:
    weight, moment = problem()
    grid = search_clip(weight, moment, fmt, ClipSearch(min_ratio=1.0))
    plain = quantize(weight, fmt)
    assert torch.equal(grid.scale, plain.scale)
    assert torch.equal(round_on(weight, grid, fmt).codes, plain.codes)
    assert (grid.ratio == 1).all()


def test_representable_and_silent_rows_keep_their_range() -> None:
    weight = torch.randint(-3, 4, (6, 20), generator=torch.Generator().manual_seed(0)).double()
    weight[:, 0] = 3
    assert (search_clip(weight, torch.eye(20), W3, ClipSearch()).ratio == 1).all()
    noisy, _ = problem(columns=20)
    assert (search_clip(noisy, torch.zeros(20, 20), W3, ClipSearch()).ratio == 1).all()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("config", [GptqRounding(), GptqRounding(act_order=True), GptqRounding(static_groups=True)])
def test_gptq_rounds_on_the_grid_that_was_chosen_before(fmt: TensorFormat, config: GptqRounding) -> None:
    weight, moment = problem()
    grid = search_clip(weight, moment, fmt, ClipSearch())
    outcome = round_gptq(weight, moment, fmt, config, grid)
    assert torch.equal(outcome.weight.scale, grid.scale)
    nearest = float(output_error(weight, round_on(weight, grid, fmt), moment).sum())
    assert outcome.nearest_loss == pytest.approx(nearest)
    assert outcome.loss <= outcome.nearest_loss
    codes = outcome.weight.codes.int()
    assert codes.min() >= fmt.qmin
    assert codes.max() <= fmt.qmax


@pytest.mark.parametrize("fmt", FORMATS)
def test_stages_report_what_clipping_gained(fmt: TensorFormat) -> None:
    weight, moment = problem()
    plain = float(output_error(weight, quantize(weight, fmt), moment).sum())
    for name, config in {
        "nearest": NearestRounding(clip=ClipSearch()),
        "gptq": GptqRounding(clip=ClipSearch()),
    }.items():
        rounded = ROUNDING.get(name)(weight, fmt, config, moment)
        assert rounded.gain == pytest.approx(float(output_error(weight, rounded.weight, moment).sum()) / plain)
        assert rounded.gain <= 1
        assert rounded.clip_ratio is not None
        assert 0.5 <= rounded.clip_ratio <= 1
        assert rounded.fallback is None


def test_no_token_to_look_at_is_a_typed_result() -> None:
    weight, _ = problem()
    rounded = ROUNDING.get("nearest")(weight, W3, NearestRounding(clip=ClipSearch()), None)
    assert rounded.fallback == "not clipped, no calibration token to look at"
    assert torch.equal(rounded.weight.codes, quantize(weight, W3).codes)


def test_shares_and_bad_values() -> None:
    assert ClipSearch(steps=4).shares == (1.0, 0.75, 0.5)
    assert len(ClipSearch().shares) == 11
    for key, value in {"min_ratio": 0.0, "steps": 0, "roles": ()}.items():
        with pytest.raises(ConfigError, match=key):
            ClipSearch(**{key: value})
    weight, moment = problem()
    with pytest.raises(NumericalError, match="second moment"):
        search_clip(weight, moment[:4, :4], W3, ClipSearch())
    with pytest.raises(NumericalError, match="finite"):
        search_clip(weight * float("inf"), moment, W3, ClipSearch())
