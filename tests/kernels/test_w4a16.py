"""4-bit weights with float inputs: within a bound of float64, at any shape, and the stored weight comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from masq.kernels.base import LinearSpec, RowAddend, RowSmoothing, Selection
from masq.kernels.build import BuildError
from masq.kernels.cpu import ISAS, CpuKernel, best_isa
from masq.kernels.w4a16 import VNNI
from masq.numerics.affine import QuantizedTensor, quantize
from masq.numerics.packing import pack
from masq.numerics.scheme import LinearFormat, TensorFormat
from tests.kernels import cases

try:
    BEST = best_isa()
except BuildError as error:
    pytest.skip(f"no kernels here: {error}", allow_module_level=True)
if BEST < VNNI:
    pytest.skip(f"float inputs need AVX512, the processor offers {ISAS[BEST]}", allow_module_level=True)

FLOAT_UNIT, BFLOAT_UNIT = 2.0**-24, 2.0**-8
"""Largest relative error of one rounding."""
FORMATS = [
    TensorFormat(4),
    TensorFormat(3),
    TensorFormat(2, symmetric=False),
    TensorFormat(4, symmetric=False),
    TensorFormat(4, granularity="per_group", group_size=32),
    TensorFormat(4, symmetric=False, granularity="per_group", group_size=64),
    TensorFormat(3, symmetric=False, granularity="per_group", group_size=192),
]
ROWS = (0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 97, 200)
SIZES = ((1, 192), (33, 192), (31, 576), (288, 192))
"""Outputs and inputs: tails of panels, one strip, several spans of panels."""


@pytest.fixture(params=ISAS[VNNI : BEST + 1])
def kernel(request: pytest.FixtureRequest) -> CpuKernel:
    return CpuKernel(request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def weight(num_outputs: int, num_inputs: int, fmt: TensorFormat, shift: float = 0.0) -> QuantizedTensor:
    values = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(1)) + shift
    values[num_outputs // 2] = 0
    return quantize(values, fmt)


def check(found: torch.Tensor, x: torch.Tensor, quantized: QuantizedTensor, *, rounded: bool) -> None:
    """Compare with float64; ``rounded`` tells whether weights may have been rounded to bfloat16."""
    dense = quantized.dequantize(torch.float64)
    zero = 0 if quantized.zero_point is None else quantized.zero_point.double()
    # A group is summed before its zero point is taken away: what was summed bounds the error.
    span = quantized.scale.shape[1]
    summed = (quantized.codes.double().abs().unflatten(1, (span, -1)) + torch.as_tensor(zero).unsqueeze(-1)).mul(
        quantized.scale.double().unsqueeze(-1)
    )
    x64 = x.double()
    exact = x64 @ dense.t()
    bound = (x.shape[1] + 4) * FLOAT_UNIT * (x64.abs() @ summed.flatten(1).t())
    if rounded:
        bound += BFLOAT_UNIT * (x64.abs() @ dense.abs().t())
    error = found.double() - exact
    assert (error.abs() <= bound).all()
    if exact.norm():
        assert error.norm() <= (2.5e-3 if rounded else 3e-6) * exact.norm()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SIZES)
def test_close_to_float64(kernel, threads, fmt, dtype, num_outputs, num_inputs):
    quantized = weight(num_outputs, num_inputs, fmt)
    prepared = kernel.prepare(pack(quantized), None)
    for num_rows in ROWS:
        x = torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(num_rows)).to(dtype)
        found = kernel.gemm(kernel.quantize(x, None, None), prepared, bias=None, addend=None, dtype=torch.float32)
        assert found.shape == (num_rows, num_outputs)
        # Several groups, so many rows that dequantizing pays, and tiles of bfloat16 to multiply in.
        group = fmt.group_size or num_inputs
        many = 2 * num_rows > group and group < num_inputs
        rounded = many and dtype == torch.bfloat16 and kernel.isa >= ISAS.index("avx512_bf16")
        check(found, x, quantized, rounded=rounded)


@pytest.mark.parametrize("num_inputs", [1, 7, 31, 33, 63, 577, 1000])
@pytest.mark.parametrize("fmt", [TensorFormat(4), TensorFormat(4, symmetric=False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_inputs_per_channel(kernel, num_inputs, fmt, dtype):
    quantized = weight(17, num_inputs, fmt)
    prepared = kernel.prepare(pack(quantized), None)
    for num_rows in (1, 3, 20, 600):
        x = torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(3)).to(dtype)
        found = kernel.gemm(kernel.quantize(x, None, None), prepared, bias=None, addend=None, dtype=torch.float32)
        check(found, x, quantized, rounded=False)


@pytest.mark.parametrize("num_inputs", [192, 2304])
def test_many_rows_many_chunks_and_far_zero_points(kernel, num_inputs):
    fmt = TensorFormat(4, symmetric=False, granularity="per_group", group_size=96)
    quantized = weight(70, num_inputs, fmt, shift=3.0)  # every code far from its zero point
    prepared = kernel.prepare(pack(quantized), None)
    for num_rows in (40, 530):
        x = torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(3)).bfloat16() + 1
        found = kernel.gemm(kernel.quantize(x, None, None), prepared, bias=None, addend=None, dtype=torch.float32)
        check(found, x, quantized, rounded=num_rows > 48)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("num_rows", [2, 40, 130])
def test_one_input_at_a_time_gives_the_weights_back(kernel, fmt, num_rows):
    quantized = weight(40, 192, fmt)
    prepared = kernel.prepare(pack(quantized), None)
    dense = quantized.dequantize(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for first in range(0, 192, 37):
            chosen = torch.arange(first, first + num_rows) % 192
            x = torch.zeros(num_rows, 192, dtype=dtype)
            x[torch.arange(num_rows), chosen] = 1
            found = kernel.gemm(kernel.quantize(x, None, None), prepared, bias=None, addend=None, dtype=torch.float32)
            wanted = dense[:, chosen].t()
            if dtype == torch.float32:
                assert torch.equal(found, wanted)
            else:
                assert ((found - wanted).abs() <= BFLOAT_UNIT * wanted.abs()).all()


@pytest.mark.parametrize("num_rows", [1, 3, 40, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_added_is_added_in_float32_and_rounded_once(kernel, threads, num_rows, dtype, values_dtype):
    fmt = TensorFormat(4, symmetric=False, granularity="per_group", group_size=64)
    prepared = kernel.prepare(pack(weight(33, 192, fmt)), None)
    rows = kernel.quantize(cases.rows(num_rows, 192, dtype), None, None)
    plain = kernel.gemm(rows, prepared, bias=None, addend=None, dtype=torch.float32)
    bias = torch.randn(33, generator=torch.Generator().manual_seed(4))
    added = cases.addend(num_rows, 33, 0.6, values_dtype)
    found = kernel.gemm(rows, prepared, bias=bias, addend=added, dtype=dtype)
    wanted = plain.clone()
    wanted[added.selected.rows] += torch.cat(added.values, dim=1).float()
    assert torch.equal(found, (wanted + bias).to(dtype))
    none = RowAddend(
        Selection.of(torch.zeros(0, dtype=torch.int64), num_rows), (torch.zeros(0, 33, dtype=values_dtype),)
    )
    assert torch.equal(kernel.gemm(rows, prepared, bias=None, addend=none, dtype=torch.float32), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("num_inputs", [31, 192])
def test_smoothed_rows_keep_their_dtype(kernel, dtype, vectors, num_inputs):
    x = cases.rows(19, num_inputs, dtype)
    smoothing = cases.smoothing(19, num_inputs, vectors)
    found = kernel.quantize(x, None, smoothing)
    factors = smoothing.inverse[0] if smoothing.rows is None else smoothing.inverse[smoothing.rows]
    assert found.scale is None
    assert found.num_rows == 19
    assert found.data.dtype == dtype
    assert torch.equal(found.data, (x.float() * factors).to(dtype))
    centred = cases.centring(19, num_inputs, smoothing)
    rows = (x.float() - centred.centre[centred.centre_rows].float()) * factors
    assert torch.equal(kernel.quantize(x, None, centred).data, rows.to(dtype))
    assert torch.equal(kernel.quantize(x, None, RowSmoothing(torch.ones(1, num_inputs), None)).data, x)


def test_threads_and_batches_change_no_row(kernel):
    fmt = TensorFormat(4, symmetric=False, granularity="per_group", group_size=64)
    prepared = kernel.prepare(pack(weight(288, 576, fmt)), None)
    x = torch.randn(700, 576, generator=torch.Generator().manual_seed(5)).bfloat16()
    before = torch.get_num_threads()

    def multiply(rows: torch.Tensor, num_threads: int) -> torch.Tensor:
        torch.set_num_threads(num_threads)
        try:
            activation = kernel.quantize(rows.contiguous(), None, None)
            return kernel.gemm(activation, prepared, bias=None, addend=None, dtype=torch.bfloat16)
        finally:
            torch.set_num_threads(before)

    for num_rows in (2, 20, 700):
        alone = multiply(x[:num_rows], 1)
        assert torch.equal(alone, multiply(x[:num_rows], 2))
        assert torch.equal(alone.flip(0), multiply(x[:num_rows].flip(0), 1))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("num_outputs", [1, 31, 33])
@pytest.mark.parametrize("num_inputs", [192, 193])
def test_the_stored_weight_comes_back(fmt, num_outputs, num_inputs):
    if fmt.group_size and num_inputs % fmt.group_size:
        num_inputs = 2 * fmt.group_size
    packed = pack(weight(num_outputs, num_inputs, fmt))
    prepared = CpuKernel().prepare(packed, None)
    found = CpuKernel().restore(prepared)
    assert torch.equal(found.codes, packed.codes)
    assert torch.equal(found.scale, packed.scale)
    assert (found.zero_point is None) == (packed.zero_point is None)
    assert found.zero_point is None or torch.equal(found.zero_point, packed.zero_point)
    assert (found.format, found.in_features) == (packed.format, packed.in_features)


@pytest.mark.parametrize(("symmetric", "ratio"), [(True, 0.27), (False, 0.29)])
def test_four_bits_in_memory(symmetric, ratio):
    fmt = TensorFormat(4, symmetric=symmetric, granularity="per_group", group_size=128)
    prepared = CpuKernel().prepare(pack(weight(256, 1024, fmt)), None)
    assert prepared.num_bytes <= ratio * 2 * 256 * 1024


def test_what_cannot_run_is_refused_with_reasons():
    def reasons(fmt: TensorFormat, kernel: CpuKernel | None = None) -> str:
        spec = LinearSpec(192, 64, LinearFormat(fmt, None), "cpu")
        return "; ".join((kernel or CpuKernel()).not_supported_reasons(spec))

    assert all(reasons(fmt) == "" for fmt in FORMATS)
    assert "only up to 4" in reasons(TensorFormat(5))
    assert "not a multiple of 32" in reasons(TensorFormat(4, granularity="per_group", group_size=48))
    assert "AVX512" in reasons(TensorFormat(4), CpuKernel("avx2"))
