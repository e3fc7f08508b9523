"""Rows quantized as they come out of a norm or a gate, against float64; values that are kept; what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from masq import kernels
from masq.errors import NumericalError
from masq.kernels.base import Kernel, Norm, QuantizedActivation, RowSmoothing, Selection
from masq.kernels.build import BuildError
from masq.kernels.cpu import ISAS, CpuKernel, best_isa
from masq.kernels.reference import ReferenceKernel
from masq.numerics.affine import QuantizedTensor, quantize
from masq.numerics.packing import pack
from masq.numerics.scheme import TensorFormat
from tests.kernels import cases

try:
    KERNELS = ["reference", *ISAS[: best_isa() + 1]]
except BuildError:
    KERNELS = ["reference"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SIZES = [(1, 1), (3, 65), (5, 130), (37, 576), (16, 64), (0, 64)]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return ReferenceKernel() if request.param == "reference" else CpuKernel(request.param)


def represented(kernel: Kernel, made: QuantizedActivation, inner: int) -> torch.Tensor:
    """Codes times scales, float32 [N, I]: the product with the identity."""
    identity = torch.zeros(inner, inner, dtype=torch.int8).fill_diagonal_(1)
    packed = pack(QuantizedTensor(identity, torch.ones(inner, 1), None, TensorFormat(8)))
    return kernel.gemm(made, kernel.prepare(packed, cases.per_token(8)), bias=None, addend=None, dtype=torch.float32)


def check(kernel: Kernel, made: QuantizedActivation, exact: torch.Tensor, fmt: TensorFormat, slack: float) -> None:
    """Codes nearest to float64 rows but within ``slack`` (relative to the largest) of a tie; scales within it."""
    assert made.num_rows == len(exact)
    if not len(exact):
        return
    assert made.scale is not None
    scale, highest = made.scale.double(), exact.abs().amax(1, keepdim=True)
    assert ((scale * fmt.divisor - highest).abs() <= slack * highest)[highest > 1e-30].all()
    found = represented(kernel, made, exact.shape[1]).double() / scale
    wanted = (exact / scale).clamp(-fmt.qmax, fmt.qmax)
    assert ((found - wanted).abs() <= 0.5 + 2 * fmt.qmax * slack).all()


def check_taken(
    made: QuantizedActivation, exact: torch.Tensor, take: Selection, dtype: torch.dtype, slack: float
) -> None:
    """Rows that were asked for are float64 ones but for ``slack`` (relative to the largest) and one rounding."""
    assert made.taken is not None
    wanted = exact[take.rows]
    bound = UNITS[dtype] * wanted.abs() + slack * wanted.abs().amax(1, keepdim=True) + 2.0**-24
    assert made.taken.dtype == dtype
    assert ((made.taken.double() - wanted).abs() <= bound).all()


def smoothings(count: int, inner: int) -> list[RowSmoothing | None]:
    smooth = cases.smoothing(count, inner, 3)
    return [None, smooth, cases.centring(count, inner), cases.centring(count, inner, smooth)]


def applied(exact: torch.Tensor, given: RowSmoothing | None) -> torch.Tensor:
    if given is None:
        return exact
    if given.centre is not None:
        exact = exact - given.centre[given.centre_rows].double()
    return exact if given.inverse is None else exact * given.inverse[given.rows].double()


@pytest.mark.parametrize(("count", "inner"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_under_the_norm(kernel, dtype, count, inner):
    torch.manual_seed(count + inner)
    x, gamma = torch.randn(count, inner).to(dtype), (torch.rand(inner) + 0.5).to(dtype)
    slack, take = (inner + 32) * 2.0**-24, cases.selection(count)
    exact = functional.rms_norm(x.double(), (inner,), gamma.double(), 1e-6)
    for fmt in (cases.per_token(8), replace(cases.per_token(4), clip=0.8)):
        for given in smoothings(count, inner):
            made = kernel.quantize_norm(x, Norm(gamma, 1e-6), fmt, given, take)
            wanted = applied(exact, given)
            # A centre of a size like the rows' own may leave a small rest of two large numbers.
            worst = 1.0 if given is None or given.centre is None or not count else 8.0
            check(kernel, made, wanted, fmt, worst * slack)
            check_taken(made, wanted, take, dtype, worst * slack)
    made = kernel.quantize_norm(x, Norm(gamma, 1e-6), cases.per_token(8), None)
    assert made.taken is None
    check(kernel, made, exact, cases.per_token(8), slack)


@pytest.mark.parametrize(("count", "inner"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_silu_times_up(kernel, dtype, count, inner):
    """Both are columns of one matrix; gates of any size, where exp of them is nothing or infinite."""
    torch.manual_seed(count + inner)
    both = (torch.randn(count, 2 * inner) * 4).to(dtype)
    if count:
        both[:, 0] = torch.linspace(-1000, 1000, count).to(dtype)
    gate, up = both.split(inner, dim=1)
    exact, take = functional.silu(gate.double()) * up.double(), cases.selection(count)
    for fmt in (cases.per_token(8), cases.per_token(4)):
        for given in smoothings(count, inner):
            made = kernel.quantize_gate(gate, up, fmt, given, take)
            worst = 1.0 if given is None or given.centre is None else 8.0
            wanted = applied(exact, given)
            check(kernel, made, wanted, fmt, worst * 32 * 2.0**-24)
            check_taken(made, wanted, take, dtype, worst * 32 * 2.0**-24)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_nothing_is_rounded_to_sixteen_bits_in_between(kernel, dtype):
    """Codes are those of float32 rows but for a tie here and there; those of rounded rows are not."""
    torch.manual_seed(0)
    x, gamma, fmt = torch.randn(64, 576).to(dtype), (torch.rand(576) + 0.5).to(dtype), cases.per_token(8)
    both = torch.randn(64, 1152).to(dtype)
    gate, up = both.split(576, dim=1)
    normed = functional.rms_norm(x.float(), (576,), gamma.float(), 1e-6)
    for made, rows in (
        (kernel.quantize_norm(x, Norm(gamma, 1e-6), fmt, None), normed),
        (kernel.quantize_gate(gate, up, fmt, None), functional.silu(gate.float()) * up.float()),
    ):
        codes = represented(kernel, made, 576) / made.scale
        assert made.scale is not None

        def share_of_others(given: torch.Tensor, codes: torch.Tensor = codes) -> float:
            return float(((codes - quantize(given, fmt).codes).abs() > 0.5).float().mean())

        assert share_of_others(rows) < 5e-4
        assert share_of_others(rows.to(dtype).float()) > (1e-2 if dtype == torch.bfloat16 else 1e-3)


def test_every_exponential(kernel):
    """SiLU over a dense range, one value a row, against float64."""
    gate = torch.linspace(-90, 90, 4001)[:, None]
    made = kernel.quantize_gate(gate, torch.ones_like(gate), cases.per_token(8), None)
    exact = functional.silu(gate.double())
    assert made.scale is not None
    assert ((made.scale.double() * 127 - exact.abs()).abs() <= 32 * 2.0**-24 * exact.abs())[exact.abs() > 1e-35].all()


def test_numbers_that_are_none_stay_so(kernel):
    x, gamma = torch.randn(4, 70), torch.ones(70)
    x[1, 3], x[2, 69] = float("nan"), float("inf")
    made = [kernel.quantize_norm(x, Norm(gamma, 1e-6), cases.per_token(8), None)]
    made.append(kernel.quantize_gate(x, torch.ones(4, 70), cases.per_token(8), None))
    for one in made:
        assert one.scale.isfinite().flatten().tolist() == [True, False, False, True]


def test_those_that_fuse_say_so():
    found = {name for name in kernels.KERNELS.names() if kernels.KERNELS.get(name).fuses}
    assert found == set(kernels.FUSING)
    other = kernels.KERNELS.get("torch")()
    with pytest.raises(NotImplementedError, match="kernel torch has no norm"):
        other.quantize_norm(torch.ones(1, 4), Norm(torch.ones(4), 0.0), cases.per_token(8), None)
    with pytest.raises(NotImplementedError, match="kernel torch has no gate"):
        other.quantize_gate(torch.ones(1, 4), torch.ones(1, 4), cases.per_token(8), None)


def test_rows_that_a_kernel_would_misread_are_refused():
    try:
        kernel = CpuKernel()
        kernel.isa  # noqa: B018
    except BuildError as error:
        pytest.skip(str(error))
    x, gamma, fmt = torch.ones(3, 8), torch.ones(8), cases.per_token(8)
    bad = [gamma[:4], torch.ones(16)[::2], gamma.double()]
    for one in bad:
        with pytest.raises(NumericalError, match="a norm must have a contiguous gamma"):
            kernel.quantize_norm(x, Norm(one, 0.0), fmt, None)
    some, places = torch.arange(2), torch.zeros(3, dtype=torch.int32)
    for take in (Selection.of(some, 2), Selection(some, places.long()), Selection(some.int(), places)):
        for call, rows in ((kernel.quantize, (x,)), (kernel.quantize_norm, (x, Norm(gamma, 0.0)))):
            with pytest.raises(NumericalError, match="a selection must tell int64 numbers of rows"):
                call(*rows, fmt, None, take)
        with pytest.raises(NumericalError, match="a selection must tell int64 numbers of rows"):
            kernel.quantize_gate(x, x, fmt, None, take)
    for gate, up in ((x, x.bfloat16()), (torch.ones(8, 3).t(), x), (x, torch.ones(3, 16)), (x.double(), x.double())):
        with pytest.raises(NumericalError, match="gate and up must be matrices of one shape and dtype"):
            kernel.quantize_gate(gate, up, fmt, None)
