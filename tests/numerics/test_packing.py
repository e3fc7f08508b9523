"""Packing is exact both ways, at every width, for odd sizes and extremes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masq.errors import NumericalError
from masq.numerics.affine import quantize
from masq.numerics.packing import PackedWeight, concatenate, pack, pack_nibbles, split, unpack, unpack_nibbles
from masq.numerics.scheme import TensorFormat

FORMATS = [
    *(TensorFormat(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)),
    *(TensorFormat(bits, symmetric, "per_group", 8) for bits in (4, 8) for symmetric in (True, False)),
]


def assert_same(found, wanted):
    assert torch.equal(found.codes, wanted.codes)
    assert found.codes.dtype == wanted.codes.dtype
    assert torch.equal(found.scale, wanted.scale)
    assert (found.zero_point is None) == (wanted.zero_point is None)
    if found.zero_point is not None:
        assert torch.equal(found.zero_point, wanted.zero_point)
    assert found.format == wanted.format


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("num_inputs", [8, 24, 40])
def test_unpack_is_the_inverse_of_pack(fmt, num_inputs):
    weight = torch.randn(7, num_inputs, generator=torch.Generator().manual_seed(num_inputs))
    weight[0] = 0
    weight[1, 0], weight[2, 0] = 1e4, -1e4
    quantized = quantize(weight, fmt)
    packed = pack(quantized)
    assert_same(unpack(packed), quantized)
    bits = 4 if fmt.bits <= 4 else 8
    assert packed.codes.numel() == 7 * num_inputs * bits // 8


@settings(max_examples=50, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 33), signed=st.booleans())
def test_nibbles_of_any_size(data, rows, columns, signed):
    low, high = (-8, 7) if signed else (0, 15)
    values = data.draw(st.lists(st.integers(low, high), min_size=rows * columns, max_size=rows * columns))
    codes = torch.tensor(values, dtype=torch.int8 if signed else torch.uint8).view(rows, columns)
    packed = pack_nibbles(codes)
    assert packed.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, columns, signed=signed), codes)


def test_which_half_a_column_lies_in():
    assert pack_nibbles(torch.tensor([[1, -2, 7]], dtype=torch.int8)).tolist() == [[0xE1, 0x07]]


@pytest.mark.parametrize(
    "fmt", [TensorFormat(4), TensorFormat(8, False), TensorFormat(4, False, "per_group", 8)], ids=str
)
def test_stacked_weights_come_apart_again(fmt):
    parts = [pack(quantize(torch.randn(rows, 24), fmt)) for rows in (3, 1, 8)]
    whole = concatenate(parts)
    assert whole.out_features == 12
    assert whole.num_bytes == sum(part.num_bytes for part in parts)
    for found, wanted in zip(split(whole, [3, 1, 8]), parts, strict=True):
        assert_same(unpack(found), unpack(wanted))


def test_what_does_not_belong_together_is_refused():
    packed = pack(quantize(torch.randn(4, 24), TensorFormat(4)))
    with pytest.raises(NumericalError, match="packed weight of 25 inputs"):
        PackedWeight(packed.codes, packed.scale, None, packed.format, 25)
    with pytest.raises(NumericalError):
        PackedWeight(packed.codes.view(torch.int8), packed.scale, None, packed.format, 24)
    with pytest.raises(NumericalError):
        PackedWeight(packed.codes, packed.scale.double(), None, packed.format, 24)
    with pytest.raises(NumericalError):
        PackedWeight(packed.codes, packed.scale, torch.zeros(4, 1, dtype=torch.uint8), packed.format, 24)
    with pytest.raises(NumericalError, match="can be stacked"):
        concatenate([packed, pack(quantize(torch.randn(4, 24), TensorFormat(8)))])
