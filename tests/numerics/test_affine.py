"""Quantizers: representable values are exact, codes stay in range, the gradient equals a derivation by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masq.errors import ConfigError
from masq.numerics.affine import QuantizedTensor, fake_quantize, quantize
from masq.numerics.scheme import TensorFormat

FORMATS = {
    **{f"symmetric{bits}": TensorFormat(bits, granularity="per_token") for bits in (2, 3, 4, 6, 8)},
    "clipped4": TensorFormat(4, granularity="per_token", clip=0.7),
    "channel4": TensorFormat(4),
    "channel8_asymmetric": TensorFormat(8, symmetric=False),
    "group4": TensorFormat(4, granularity="per_group", group_size=8),
    "group4_asymmetric": TensorFormat(4, symmetric=False, granularity="per_group", group_size=8),
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact_codes(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """The definition, element by element in Python, for a [rows, channels] input."""
    size = fmt.group_size or x.shape[1]
    out = torch.empty_like(x, dtype=torch.int64)
    for r, row in enumerate(x.tolist()):
        for start in range(0, len(row), size):
            group = row[start : start + size]
            if fmt.symmetric:
                scale, zero = fmt.clip * max(abs(v) for v in group) / fmt.qmax, 0
            else:
                low, high = min(0.0, *group), max(0.0, *group)
                scale = (high - low) / fmt.qmax
                zero = round(-low / scale)
            for c, v in enumerate(group):
                out[r, start + c] = min(max(round(v / scale) + zero, fmt.qmin), fmt.qmax)
    return out


@every_format
def test_codes_follow_the_definition(fmt: TensorFormat) -> None:
    x = normal(13, 24, dtype=torch.float64)
    assert torch.equal(quantize(x, fmt).codes.long(), exact_codes(x, fmt))


@every_format
def test_shapes_and_dtypes(fmt: TensorFormat) -> None:
    quantized = quantize(normal(2, 5, 24), fmt)
    groups = 24 // fmt.group_size if fmt.group_size else 1
    assert quantized.codes.shape == (2, 5, 24)
    assert quantized.codes.dtype == (torch.int8 if fmt.symmetric else torch.uint8)
    assert quantized.scale.shape == (2, 5, groups)
    assert quantized.scale.dtype == torch.float32
    assert (quantized.zero_point is None) == fmt.symmetric
    if quantized.zero_point is not None:
        assert quantized.zero_point.shape == quantized.scale.shape
        assert torch.equal(quantized.zero_point, quantized.zero_point.round())


@every_format
def test_error_is_at_most_half_a_step(fmt: TensorFormat) -> None:
    """Of what is not cut off."""
    x = normal(40, 24, dtype=torch.float64) * 10.0
    quantized = quantize(x, fmt)
    error = (quantized.dequantize(torch.float64) - x).abs().unflatten(-1, (quantized.scale.shape[-1], -1))
    # The float32 scale, and a rounded zero point, may each cost a sliver (asymmetric: up to half a step at an end).
    allowed = 0.5 if fmt.symmetric else 1.0
    if fmt.clip < 1:
        error = error.where(x.abs().unsqueeze(1) <= fmt.clip * x.abs().amax(1)[:, None, None], 0.0)
    assert (error <= (allowed + 1e-4) * quantized.scale.double().unsqueeze(-1)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_representable_values_come_back_exactly(bits: int) -> None:
    fmt = TensorFormat(bits)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(fmt.qmin, fmt.qmax + 1, (9, 24), generator=generator)
    codes[:, 3] = fmt.qmax  # the largest code must occur for the scale to be found again
    codes[::2, 3] = fmt.qmin
    scale = 2.0 ** torch.arange(-4, 5).unsqueeze(1)
    quantized = quantize(codes * scale, fmt)
    assert torch.equal(quantized.codes.long(), codes)
    assert torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.dequantize(), codes * scale)


def test_asymmetric_representable_values_come_back_exactly() -> None:
    fmt = TensorFormat(4, symmetric=False, granularity="per_group", group_size=8)
    codes = torch.randint(0, 16, (5, 24), generator=torch.Generator().manual_seed(1))
    codes[:, 0::8], codes[:, 1::8] = 0, 15
    values = (codes - 6) * 0.25
    quantized = quantize(values, fmt)
    assert torch.equal(quantized.codes.long(), codes)
    assert quantized.zero_point is not None
    assert (quantized.zero_point == 6).all()
    assert torch.equal(quantized.dequantize(), values)


def test_rounds_half_to_even() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7.0]])
    assert quantize(x, TensorFormat(4)).codes.tolist() == [[0, 2, 2, 0, -2, -2, 7]]


@every_format
def test_all_zero_rows_are_legal(fmt: TensorFormat) -> None:
    x = normal(3, 24)
    x[1] = 0.0
    quantized = quantize(x, fmt)
    assert (quantized.scale[1] == 1).all()
    assert (quantized.codes[1] == 0).all()
    assert torch.equal(quantized.dequantize()[1], torch.zeros(24))


@pytest.mark.parametrize("symmetric", [True, False])
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), exponent=st.integers(-44, 37))
@settings(max_examples=60, deadline=None)
def test_codes_stay_in_range_at_any_magnitude(symmetric: bool, seed: int, bits: int, exponent: int) -> None:
    fmt = TensorFormat(bits, symmetric=symmetric)
    x = (normal(8, 5, seed=seed, dtype=torch.float64) * 10.0**exponent).float()
    quantized = quantize(x, fmt)
    codes = quantized.codes.int()
    assert int(codes.min()) >= fmt.qmin
    assert int(codes.max()) <= fmt.qmax
    assert torch.isfinite(quantized.dequantize()).all()
    bound = x.abs().amax(1, keepdim=True) * (1 + 1e-5)
    assert (quantized.dequantize().abs() <= bound * (1 if symmetric else 2)).all()


def test_subnormal_rows_are_stored_as_zero() -> None:
    x = torch.tensor([[1e-43, -2e-43], [1e-39, 2e-39]])
    quantized = quantize(x, TensorFormat(8))
    assert (quantized.codes == 0).all()
    assert (quantized.scale == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bad_numbers_are_not_laundered_into_finite_ones(bad: float, symmetric: bool) -> None:
    x = normal(3, 6)
    x[1, 2] = bad
    out = quantize(x, TensorFormat(8, symmetric=symmetric)).dequantize()
    assert not torch.isfinite(out[1, 2])
    assert torch.isfinite(out[[0, 2]]).all()


def test_empty_batch_and_strided_input() -> None:
    fmt = TensorFormat(8, granularity="per_token")
    assert quantize(torch.empty(0, 6), fmt).codes.shape == (0, 6)
    base = normal(12, 10)
    view = base.t()[::2, 1:11:2]
    assert not view.is_contiguous()
    assert torch.equal(quantize(view, fmt).codes, quantize(view.contiguous(), fmt).codes)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fake_quantize_equals_quantize_dequantize(fmt: TensorFormat, dtype: torch.dtype) -> None:
    x = normal(4, 7, 24, dtype=dtype)
    x[0, 0] = 0.0
    expected = quantize(x, fmt).dequantize(dtype)
    assert torch.equal(fake_quantize(x, fmt), expected)
    assert fake_quantize(x, fmt).dtype == dtype


def test_sixteen_bit_input_is_quantized_at_float32_precision() -> None:
    x = normal(6, 32, dtype=torch.bfloat16)
    assert torch.equal(quantize(x, TensorFormat(8)).codes, quantize(x.float(), TensorFormat(8)).codes)


def test_input_is_not_mutated() -> None:
    for fmt in FORMATS.values():
        x = normal(3, 24)
        kept = x.clone()
        quantized = quantize(x, fmt)
        codes = quantized.codes.clone()
        quantized.dequantize(torch.float32)
        quantized.dequantize(torch.float64)
        fake_quantize(x, fmt)
        assert torch.equal(x, kept)
        assert torch.equal(quantized.codes, codes)


def symmetric_gradient(x: torch.Tensor, grad: torch.Tensor, qmax: int) -> torch.Tensor:
    """By hand, float64: dy_j = dx_j + (q_j - z_j) sign(x_k) dx_k / qmax, k the largest |x|."""
    out = grad.clone()
    for row in range(x.shape[0]):
        k = int(x[row].abs().argmax())
        # The quantizer divides by the float32 value of the scale.
        scale = float((x[row, k].abs() / qmax).float())
        z = x[row] / scale
        pull = sum(float(g) * (round(float(v)) - float(v)) for g, v in zip(grad[row], z, strict=True))
        out[row, k] += pull * float(x[row, k].sign()) / qmax
    return out


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_gradient_matches_the_hand_derivation(bits: int) -> None:
    fmt = TensorFormat(bits, granularity="per_token")
    x = normal(9, 17, dtype=torch.float64).requires_grad_()
    grad = normal(9, 17, seed=1, dtype=torch.float64)
    fake_quantize(x, fmt).backward(grad)
    expected = symmetric_gradient(x.detach(), grad, fmt.qmax)
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected, grad)


def composed(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """The same function from differentiable pieces, straight-through by detaching the rounding error."""
    groups = x.unflatten(-1, (-1, fmt.group_size or x.shape[-1]))
    high, low = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    symmetric, asymmetric = torch.maximum(high, -low), high.clamp(min=0) - low.clamp(max=0)
    scale = fmt.clip * (symmetric if fmt.symmetric else asymmetric) / fmt.qmax
    scale = scale + (scale.float().double() - scale).detach()
    zero = 0.0 if fmt.symmetric else torch.round(-low.clamp(max=0) / scale).detach()
    z = groups / scale
    hard = (z.round() + zero).detach().clamp(fmt.qmin, fmt.qmax)
    codes = hard + (hard == (z.round() + zero)) * (z - z.detach())
    return ((codes - zero) * scale).flatten(-2)


@every_format
def test_gradient_matches_autograd_of_the_composed_function(fmt: TensorFormat) -> None:
    x = normal(11, 24, dtype=torch.float64)
    x[3] = x[3].abs() + 0.1  # only positive: the minimum does not set the range
    x[4] = -x[4].abs() - 0.1
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = normal(11, 24, seed=2, dtype=torch.float64)
    fake_quantize(mine, fmt).backward(grad)
    composed(theirs, fmt).backward(grad)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_asymmetric_codes_beyond_the_range_are_clamped() -> None:
    """Scale 1, zero point round(1.5) = 2, so 13.5 would get code 14 + 2 = 16; its gradient reaches the scale alone."""
    fmt = TensorFormat(4, symmetric=False)
    x = torch.tensor([[-1.5, 13.5, 3.25]], dtype=torch.float64, requires_grad=True)
    quantized = quantize(x.detach(), fmt)
    assert quantized.codes.tolist() == [[0, 15, 5]]
    assert quantized.dequantize().tolist() == [[-2.0, 13.0, 3.0]]
    fake_quantize(x, fmt).sum().backward()
    # dscale = (dx_1 - dx_0) / 15; pulls: -2 + 1.5 at element 0, 15 - 2 at the clamped one, 3 - 3.25 at the last.
    pull = (-0.5 + 13.0 - 0.25) / 15
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[1 - pull, pull, 1.0]], dtype=torch.float64))


def test_gradient_of_a_zero_row_passes_straight_through() -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    grad = normal(2, 5)
    fake_quantize(x, TensorFormat(8)).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


def test_gradient_keeps_the_dtype_of_the_input() -> None:
    x = normal(3, 24, dtype=torch.bfloat16).requires_grad_()
    fake_quantize(x, TensorFormat(4)).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_group_size_must_divide_and_the_message_lists_divisors() -> None:
    fmt = TensorFormat(4, symmetric=False, granularity="per_group", group_size=128)
    with pytest.raises(ConfigError, match=r"576.*128.*64") as caught:
        quantize(torch.ones(2, 576), fmt)
    assert "96" in str(caught.value)
    with pytest.raises(ConfigError):
        fake_quantize(torch.ones(2, 7), TensorFormat(4, granularity="per_group", group_size=2))


def test_dequantize_rounds_once_to_sixteen_bits() -> None:
    quantized = quantize(normal(5, 24), TensorFormat(8))
    exact = quantized.codes.double() * quantized.scale.double()
    assert isinstance(quantized, QuantizedTensor)
    assert torch.equal(quantized.dequantize(torch.float64), exact)
    assert torch.equal(quantized.dequantize(torch.bfloat16), quantized.dequantize(torch.float32).bfloat16())


@pytest.mark.parametrize(
    "changes",
    [{"clip": 0.0}, {"clip": 1.1}, {"clip": 0.9, "granularity": "per_channel"}, {"clip": 0.9, "symmetric": False}],
)
def test_only_ranges_of_symmetric_tokens_are_clipped(changes: dict) -> None:
    with pytest.raises(ConfigError, match="clip must lie above 0"):
        TensorFormat(**{"bits": 4, "granularity": "per_token", **changes})


def test_clipping_pays_at_four_bits_of_gaussian_rows_and_at_no_eight() -> None:
    x = normal(64, 576, dtype=torch.float64)

    def error(bits: int, clip: float) -> float:
        return float((fake_quantize(x, TensorFormat(bits, granularity="per_token", clip=clip)) - x).square().mean())

    assert error(4, 0.8) < 0.75 * error(4, 1.0)
    assert error(8, 0.8) > error(8, 1.0)
