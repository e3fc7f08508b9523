"""Round-to-nearest weights: exact on representable ones, nearest among all codes, refuses bad numbers."""

import pytest
import torch

from masq.errors import ConfigError, NumericalError
from masq.numerics.scheme import TensorFormat
from masq.rounding.nearest import round_nearest

GROUPED = TensorFormat(4, symmetric=False, granularity="per_group", group_size=8)


def weight(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(11, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
def test_exact_on_representable_weights(bits: int) -> None:
    fmt = TensorFormat(bits)
    first = round_nearest(weight(), fmt)
    # Scales made powers of two so that the maximum divided by qmax gives the same scale again.
    values = first.codes * 2.0 ** first.scale.log2().round()
    again = round_nearest(values, fmt)
    assert torch.equal(again.codes, first.codes)
    assert torch.equal(again.dequantize(), values)


@pytest.mark.parametrize("fmt", [TensorFormat(4), TensorFormat(8), GROUPED], ids=["w4", "w8", "w4g8"])
def test_no_other_code_is_nearer(fmt: TensorFormat) -> None:
    original = weight()
    rounded = round_nearest(original, fmt)
    error = (rounded.dequantize(torch.float64) - original).abs()
    scale = rounded.scale.double().repeat_interleave(24 // rounded.scale.shape[1], dim=1)
    for step in (-1, 1):
        moved = rounded.codes.int() + step
        legal = (moved >= fmt.qmin) & (moved <= fmt.qmax)
        other = (rounded.dequantize(torch.float64) + step * scale - original).abs()
        assert (error <= other + 1e-9)[legal].all()


def test_sixteen_bit_weights_lose_nothing() -> None:
    half = weight(dtype=torch.bfloat16)
    assert torch.equal(round_nearest(half, TensorFormat(4)).codes, round_nearest(half.float(), TensorFormat(4)).codes)


def test_rows_are_independent() -> None:
    original = weight()
    scaled = original.clone()
    scaled[3] *= 64.0
    before, after = round_nearest(original, TensorFormat(4)), round_nearest(scaled, TensorFormat(4))
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(after.scale[3], before.scale[3] * 64.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_refused(bad: float) -> None:
    broken = weight()
    broken[2, 2] = bad
    with pytest.raises(NumericalError, match="finite"):
        round_nearest(broken, TensorFormat(4))


def test_shapes_are_checked() -> None:
    with pytest.raises(NumericalError, match=r"\(2, 3, 4\)"):
        round_nearest(torch.ones(2, 3, 4), TensorFormat(4))
    with pytest.raises(ConfigError, match="divide"):
        round_nearest(torch.ones(3, 20), GROUPED)
