"""Our C++ kernels equal the reference to the last bit, with every instruction set, shape and number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from masq.errors import NumericalError
from masq.kernels.base import LinearSpec, RowSmoothing
from masq.kernels.build import BuildError
from masq.kernels.cpu import ISAS, CpuKernel, best_isa
from masq.kernels.w4a16 import VNNI
from masq.numerics.affine import quantize
from masq.numerics.packing import pack
from masq.numerics.scheme import LinearFormat, TensorFormat
from tests.kernels import cases

try:
    BEST = best_isa()
except BuildError as error:
    pytest.skip(f"no kernels here: {error}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS[: BEST + 1])
def kernel(request: pytest.FixtureRequest) -> CpuKernel:
    return CpuKernel(request.param)


BITS = [(8, 8), (4, 8), (4, 4)]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("shape", "bits", "threads"),
    # Every shape and every width with one thread and with two.
    [(shape, bits, 1 + (i + j) % 2) for i, shape in enumerate(cases.SHAPES) for j, bits in enumerate(BITS)],
    ids=str,
    indirect=["threads"],
)
def test_equals_the_reference_to_the_last_bit(kernel, threads, shape, bits):
    cases.check_equals_reference(partial(cases.run, kernel), shape, bits)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(kernel, bits):
    packed, x = cases.weight(33, 130, TensorFormat(bits)), cases.rows(9, 130, torch.float32)
    for activation_bits in range(2, 9):
        activation = cases.per_token(activation_bits)
        found = cases.run(kernel, x, packed, activation)
        assert torch.equal(found, cases.oracle(x, packed, activation))
        torch.testing.assert_close(found.double(), cases.exact(x, packed, activation), rtol=3e-7, atol=0)


@pytest.mark.parametrize("count", [1, 4, 33])
@pytest.mark.parametrize("bits", [8, 4])
def test_sums_of_extremes_do_not_overflow(kernel, count, bits):
    """The largest sums that the largest model has, of either sign, and of alternating ones."""
    inner, top = 18944, 2 ** (bits - 1) - 1
    signs = torch.tensor([1.0, -1.0])
    values = torch.stack([torch.ones(inner), -torch.ones(inner), signs.repeat(inner // 2)]) * top
    packed = pack(quantize(values, TensorFormat(bits)))
    x = torch.stack([torch.full((inner,), 127.0)] * count) * signs.repeat(count)[:count, None]
    found = cases.run(kernel, x, packed, cases.per_token(8))
    assert torch.equal(found, cases.oracle(x, packed, cases.per_token(8)))
    assert found[0, 0] == 127 * top * inner
    assert found[0, 1] == -127 * top * inner
    assert found[0, 2] == 0


def smoothed(x, smooth):
    """Float32 rows, each step written out."""
    rows = x.float()
    if smooth is not None and smooth.centre is not None:
        rows = rows - smooth.centre[smooth.centre_rows].float()
    if smooth is not None and smooth.inverse is not None:
        rows = rows * smooth.inverse[0 if smooth.rows is None else smooth.rows]
    return rows


@pytest.mark.parametrize("bits", [8, 4])
def test_many_rows_with_many_inputs(kernel, bits):
    """More codes than a cache keeps: they are multiplied part by part, rows and inputs."""
    x, packed = cases.rows(277, 8200, torch.float32), cases.weight(70, 8200, TensorFormat(bits))
    given = {"bias": cases.row_bias(277, 70), "add": cases.addend(277, 70, 0.3, torch.bfloat16)}
    found = cases.run(kernel, x, packed, cases.per_token(8), **given)
    assert torch.equal(found, cases.oracle(x, packed, cases.per_token(8), **given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "clip"), [(8, 1.0), (6, 1.0), (4, 1.0), (4, 0.85), (3, 0.1)])
def test_codes_are_those_of_the_quantizer(kernel, dtype, bits, clip):
    """Ties between two codes, which a product with a reciprocal would round the wrong way, included."""
    inner, fmt = 200, replace(cases.per_token(bits), clip=clip)
    top = fmt.qmax
    ties = torch.arange(inner) % (2 * top + 1) - top + 0.5
    x = torch.cat([ties[None] * scale for scale in (1.0, 3.0, 0.1, 1e-30, 1e30)])
    x[:, 0] = x.abs().amax(1) / (top - 0.5) * top
    x = torch.cat([x, cases.rows(400, inner, torch.float32, seed=bits)]).to(dtype)
    if dtype == torch.float16:
        x = x[x.isfinite().all(1)]
    one, four = (cases.smoothing(len(x), inner, vectors) for vectors in (1, 4))
    for smooth in (None, one, four, cases.centring(len(x), inner), cases.centring(len(x), inner, four)):
        wanted = quantize(smoothed(x, smooth), fmt)
        found = kernel.quantize(x, fmt, smooth)
        assert torch.equal(found.scale, wanted.scale)
        identity = pack(quantize(torch.eye(inner), TensorFormat(8)))
        codes = kernel.gemm(found, kernel.prepare(identity, fmt), bias=None, addend=None, dtype=torch.float32)
        # Codes times 127 times the scale of the row and 1/127.
        assert torch.equal(torch.round(codes / found.scale).to(torch.int8), wanted.codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [cases.per_token(8), None], ids=str)
def test_smoothed_rows_that_are_taken(kernel, dtype, fmt):
    """What a correction reads, rounded once; of inputs that stay float too, where the instruction set has them."""
    if fmt is None and kernel.isa < VNNI:
        pytest.skip("float inputs need AVX512")
    for sizes in ((19, 77), (1, 1), (40, 576)):
        cases.check_taken(lambda x, given, take: kernel.quantize(x, fmt, given, take).taken, sizes, dtype)


def test_numbers_that_are_none_stay_so(kernel):
    x = cases.rows(6, 40, torch.float32)
    x[3, 7], x[4, 8] = float("nan"), float("inf")
    packed = cases.weight(9, 40, TensorFormat(8))
    found = cases.run(kernel, x, packed, cases.per_token(8))
    assert not found[[3, 4]].isfinite().any()
    fine = [0, 1, 2, 5]
    assert torch.equal(found[fine], cases.oracle(x[fine], packed, cases.per_token(8)))
    tiny = torch.full((2, 40), 1e-44)
    assert torch.equal(cases.run(kernel, tiny, packed, cases.per_token(8)), torch.zeros(2, 9))


@pytest.mark.parametrize("fmt", [TensorFormat(bits) for bits in (2, 4, 5, 8)], ids=str)
@pytest.mark.parametrize(("out", "inner"), [(1, 1), (33, 65), (64, 576), (70, 7)])
def test_the_stored_weight_comes_back(kernel, fmt, out, inner):
    packed = cases.weight(out, inner, fmt)
    held = kernel.prepare(packed, cases.per_token(8))
    found = kernel.restore(held)
    assert torch.equal(found.codes, packed.codes)
    assert torch.equal(found.scale, packed.scale)
    assert (found.codes.dtype, found.format, found.in_features) == (packed.codes.dtype, fmt, inner)
    padded = -(-out // 32) * 32 * -(-inner // 64) * 64
    assert held.num_bytes == (padded // 2 if fmt.bits <= 4 else padded) + 4 * out + 4 * (-(-out // 32) * 32)


def test_rows_are_computed_alone(kernel):
    x, packed, activation = (
        cases.rows(70, 192, torch.bfloat16),
        cases.weight(40, 192, TensorFormat(4)),
        cases.per_token(8),
    )
    whole = cases.run(kernel, x, packed, activation)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cases.run(kernel, x[order].contiguous(), packed, activation), whole[order])
    parts = [cases.run(kernel, part, packed, activation) for part in x.split([1, 3, 16, 50])]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addends_of_no_row_and_of_every_row(kernel, share, dtype):
    x, packed = cases.rows(19, 64, dtype), cases.weight(21, 64, TensorFormat(8))
    add = cases.addend(19, 21, share, dtype)
    found = cases.run(kernel, x, packed, cases.per_token(8), add=add, dtype=dtype)
    assert torch.equal(found, cases.oracle(x, packed, cases.per_token(8), add=add, dtype=dtype))
    bare = cases.run(kernel, x, packed, cases.per_token(8), dtype=dtype)
    assert torch.equal(found, bare) == (share == 0)


def test_what_it_does_not_run_it_says():
    kernel = CpuKernel()
    per_channel, activation = TensorFormat(8), cases.per_token(8)

    def reasons(weight: TensorFormat, act: TensorFormat | None = activation, inner: int = 64, device: str = "cpu"):
        return " ".join(kernel.not_supported_reasons(LinearSpec(inner, 64, LinearFormat(weight, act), device)))

    assert reasons(per_channel) == ""
    assert "not on the processor" in reasons(per_channel, device="cuda")
    assert "symmetric weights" in reasons(TensorFormat(8, symmetric=False))
    assert "one scale an output channel" in reasons(TensorFormat(8, granularity="per_group", group_size=32))
    assert "overflow" in reasons(per_channel, inner=200_000)
    forced = CpuKernel("amx")
    assert bool(forced.not_supported_reasons(LinearSpec(64, 64, LinearFormat(per_channel, activation), "cpu"))) == (
        ISAS.index("amx") > BEST
    )


def test_rows_that_it_cannot_read_are_refused(kernel):
    x = cases.rows(8, 64, torch.float32)
    for wrong in (x.t(), x.double(), x[0], x[:, ::2]):
        with pytest.raises(NumericalError, match="contiguous"):
            kernel.quantize(wrong, cases.per_token(8), None)
    with pytest.raises(NumericalError, match="contiguous"):
        kernel.quantize(x, cases.per_token(8), RowSmoothing(torch.ones(1, 65), None))
