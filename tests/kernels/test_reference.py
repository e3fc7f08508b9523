"""The oracle: the arithmetic of the simulation to the last bit, and within a bound of float64."""

from __future__ import annotations

import pytest
import torch

from masq.kernels.base import RowAddend, RowSmoothing, Selection
from masq.kernels.reference import ReferenceKernel
from masq.kernels.torch_int8 import TorchKernel
from masq.models.base import Modality
from masq.modules.modality import ModalityContext
from masq.modules.quant_linear import QuantLinear
from masq.numerics.affine import quantize
from masq.numerics.packing import pack
from masq.numerics.scheme import TensorFormat
from tests.kernels import cases

KERNEL = ReferenceKernel()
UNIT = 2.0**-24
"""Relative error of one float32 rounding."""
ACTIVATIONS = [None, *(TensorFormat(bits, granularity="per_token") for bits in (8, 6, 4))]
WEIGHTS = [
    TensorFormat(8),
    TensorFormat(4),
    TensorFormat(3),
    TensorFormat(2),
    TensorFormat(4, symmetric=False),
    TensorFormat(8, symmetric=False),
    TensorFormat(4, granularity="per_group", group_size=7),
    TensorFormat(4, symmetric=False, granularity="per_group", group_size=21),
    TensorFormat(8, symmetric=False, granularity="per_group", group_size=1),
]
SHAPES = [(0, 5, 21), (1, 1, 21), (2, 33, 63), (17, 5, 105), (40, 64, 1302)]
"""N, O, I."""


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(num_outputs: int, num_inputs: int, fmt: TensorFormat):
    values = rand(num_outputs, num_inputs, seed=1)
    values[-1] = 0
    values[0, 0] = 40  # a channel that one weight dominates
    return quantize(values, fmt)


def rows_of(num_rows: int, num_inputs: int, dtype: torch.dtype) -> torch.Tensor:
    rows = rand(num_rows, num_inputs, seed=2) * 3
    if num_rows > 1:
        rows[0] = 0
        rows[1] = 0
        rows[1, -1] = -5
    return rows.to(dtype)


def is_integer(weight: TensorFormat, activation: TensorFormat | None) -> bool:
    return activation is not None and weight.symmetric and weight.granularity == "per_channel"


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_smoothings", [0, 1, 3])
def test_equals_the_simulated_linear_bit_for_bit(weight, activation, dtype, num_smoothings):
    num_outputs, num_inputs = 33, 63
    quantized = weight_of(num_outputs, num_inputs, weight)
    modalities = (Modality.TEXT, Modality.VISION, Modality.AUDIO)
    ids = torch.tensor([[0, 1, 1, 2, 0, 0, 2, 1, 0]], dtype=torch.int8)
    context = ModalityContext()
    context.set(ids)
    factors = {m: rand(num_inputs, seed=50 + int(m)).exp() for m in modalities[:num_smoothings]}
    layer = QuantLinear(
        weights={Modality.TEXT: quantized},
        bias=rand(num_outputs, seed=3),
        activation=activation,
        context=context,
        smoothing=factors or None,
        dtype=dtype,
    )
    x = rows_of(9, num_inputs, dtype)
    smoothing = None
    if factors:
        rows = None if num_smoothings == 1 else layer.smoothing_rows[ids[0].long()]
        smoothing = RowSmoothing(layer.inverse_smoothing, rows)
    found = KERNEL.gemm(
        KERNEL.quantize(x, activation, smoothing),
        KERNEL.prepare(pack(quantized), activation),
        bias=layer.bias.float(),
        addend=None,
        dtype=dtype,
    )
    assert torch.equal(found, layer(x.unsqueeze(0))[0])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize(("num_rows", "num_outputs", "num_inputs"), SHAPES)
def test_close_to_float64(weight, activation, num_rows, num_outputs, num_inputs):
    quantized = weight_of(num_outputs, num_inputs, weight)
    x = rows_of(num_rows, num_inputs, torch.bfloat16)
    rows = KERNEL.quantize(x, activation, None)
    found = KERNEL.gemm(rows, KERNEL.prepare(pack(quantized), activation), bias=None, addend=None, dtype=torch.float32)
    assert found.shape == (num_rows, num_outputs)
    assert found.dtype == torch.float32
    codes = rows.data.double() * (1 if rows.scale is None else rows.scale.double())
    dense = quantized.dequantize(torch.float64)
    exact = codes @ dense.t()
    if is_integer(weight, activation):
        total = rows.data.long() @ quantized.codes.long().t()
        exact = total.double() * rows.scale.double() * quantized.scale.double().t()
        # Rounded when the sum becomes a float, and by each of two scales.
        bound = 3.001 * UNIT * exact.abs()
    else:
        # Every sum in float32, in whatever order; two roundings of each weight and one of the row's scale.
        bound = (num_inputs + 3) * UNIT * (codes.abs() @ dense.abs().t())
    assert ((found.double() - exact).abs() <= bound).all()
    error = (found.double() - exact).norm()
    assert error <= 2e-6 * exact.norm()


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(bits, sign):
    num_inputs = 18944
    activation = TensorFormat(bits, granularity="per_token")
    quantized = quantize(torch.full((3, num_inputs), 1.0), TensorFormat(8))
    x = torch.full((2, num_inputs), float(sign * activation.qmax))  # so that the scale is one
    found = KERNEL.gemm(
        KERNEL.quantize(x, activation, None),
        KERNEL.prepare(pack(quantized), activation),
        bias=None,
        addend=None,
        dtype=torch.float32,
    )
    total = torch.tensor(sign * activation.qmax * 127 * num_inputs).float()
    assert torch.equal(found, (total * quantized.scale[0]).expand(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, TensorFormat(8, granularity="per_token")], ids=str)
def test_what_is_added_is_added_in_float32_and_rounded_once(dtype, values_dtype, activation):
    quantized = weight_of(5, 21, TensorFormat(4))
    rows = KERNEL.quantize(rows_of(6, 21, torch.bfloat16), activation, None)
    prepared = KERNEL.prepare(pack(quantized), activation)
    plain = KERNEL.gemm(rows, prepared, bias=None, addend=None, dtype=torch.float32)
    bias = rand(5, seed=4)
    addend = RowAddend(Selection.of(torch.tensor([4, 0]), 6), (rand(2, 5, seed=5).to(values_dtype),))
    found = KERNEL.gemm(rows, prepared, bias=bias, addend=addend, dtype=dtype)
    wanted = plain.clone()
    for place, row in enumerate((4, 0)):
        wanted[row] = wanted[row] + addend.values[0][place].float()
    assert found.dtype == dtype
    assert torch.equal(found, (wanted + bias).to(dtype))
    empty = RowAddend(Selection.of(torch.zeros(0, dtype=torch.int64), 6), (torch.zeros(0, 5, dtype=values_dtype),))
    assert torch.equal(KERNEL.gemm(rows, prepared, bias=None, addend=empty, dtype=torch.float32), plain)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_the_stored_weight_comes_back(weight):
    packed = pack(weight_of(33, 63, weight))
    prepared = KERNEL.prepare(packed, None)
    assert prepared.num_bytes == packed.num_bytes
    found = KERNEL.restore(prepared)
    assert torch.equal(found.codes, packed.codes)
    assert torch.equal(found.scale, packed.scale)
    assert (found.zero_point is None) == (packed.zero_point is None)
    assert found.zero_point is None or torch.equal(found.zero_point, packed.zero_point)
    assert (found.format, found.in_features) == (packed.format, packed.in_features)


def test_smoothing_is_chosen_by_row():
    x = rows_of(4, 21, torch.bfloat16)
    inverse = rand(3, 21, seed=6).exp()
    which = torch.tensor([2, 0, 1, 0])
    found = KERNEL.quantize(x, None, RowSmoothing(inverse, which))
    assert found.scale is None
    for row, factor in enumerate(which):
        assert torch.equal(found.data[row], x[row].float() * inverse[factor])


@pytest.mark.parametrize("kernel", [KERNEL, TorchKernel()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, TensorFormat(8, granularity="per_token")], ids=str)
def test_smoothed_rows_that_are_taken(kernel, dtype, activation):
    cases.check_taken(lambda x, given, take: kernel.quantize(x, activation, given, take).taken, (9, 21), dtype)
