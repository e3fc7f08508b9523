"""Rows in Triton, as they are, under a norm and gated, against the reference and float64.

In Triton's interpreter, or on a GPU where there is one (``-m gpu``).
Whatever the kernels allocate is filled with NaN or garbage first.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from masq.kernels.base import Norm, RowSmoothing
from masq.kernels.triton import fused
from masq.numerics.affine import quantize
from masq.numerics.scheme import TensorFormat
from tests.kernels import cases
from tests.kernels.interpreting import (
    ACTIVATION,
    DTYPES,
    KERNEL,
    moved,
    run,
)

UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def read_twice(launches, monkeypatch, wide):
    """Rows in parts, as those that registers do not hold."""
    if wide:
        monkeypatch.setattr(launches, "WIDE", 0)
        monkeypatch.setattr(launches, "_WIDE_COLUMNS", 256)


@pytest.mark.parametrize(
    ("dtype", "bits", "wide", "clip"),
    [
        *((torch.float32, bits, False, 1.0) for bits in (8, 6, 4, 2)),
        *((dtype, 8, wide, 1.0) for dtype in (torch.bfloat16, torch.float16) for wide in (False, True)),
        *((torch.float32, bits, True, 1.0) for bits in (8, 2)),
        *((torch.float32, 4, wide, 0.8) for wide in (False, True)),
    ],
)
def test_rows_have_the_codes_of_the_reference(triton_device, launches, monkeypatch, wide, dtype, bits, clip):
    fmt = replace(cases.per_token(bits), clip=clip)
    read_twice(launches, monkeypatch, wide)
    # Every row is a program of its own: many of them once.
    for count, inner in ((1, 1), (5, 130), (70 if (bits, wide) == (8, False) else 7, 128), (3, 2100)):
        x, smooth = cases.rows(count, inner, dtype), cases.smoothing(count, inner, 3)
        # Every value halfway between two codes of a row whose scale is one.
        x[0] = (torch.arange(inner) % (2 * fmt.qmax) - fmt.qmax + 0.5).to(dtype)
        x[0, 0] = fmt.qmax
        one_centre = RowSmoothing(None, None, cases.centring(count, inner).centre[:1].contiguous(), None)
        centred = cases.centring(count, inner), cases.centring(count, inner, smooth), one_centre
        for given in (None, smooth, RowSmoothing(smooth.inverse[:1].contiguous(), None), *centred):
            found = KERNEL.quantize(x.to(triton_device), fmt, moved(given, triton_device))
            wanted = cases.ReferenceKernel().quantize(x, fmt, given)
            codes = found.data.cpu()
            assert torch.equal(codes[:, :inner], wanted.data)
            assert not codes[:, inner:].any()
            assert torch.equal(found.scale.cpu(), wanted.scale)


def test_rows_at_the_ends_of_the_range(triton_device):
    tiny, top = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    x = torch.ones(7, 130) * torch.tensor([tiny, tiny * 127, tiny * 126, top, 2.0**-149, 0, -0.0])[:, None]
    found, wanted = KERNEL.quantize(x.to(triton_device), ACTIVATION, None), quantize(x, ACTIVATION)
    assert torch.equal(found.data.cpu()[:, :130], wanted.codes)
    assert torch.equal(found.scale.cpu(), wanted.scale)


@pytest.mark.parametrize("bits", [8, 2])
def test_rows_of_any_scale_round_as_ieee_divides(triton_device, bits):
    """Values at the middle of two codes and a unit in the last place beside it, scales over the whole range."""
    fmt, generator = cases.per_token(bits), torch.Generator().manual_seed(0)
    powers = torch.linspace(-126, 120, 120).round()
    scale = (1 + torch.rand(120, 1, generator=generator)) * torch.exp2(powers)[:, None]
    middle = (torch.arange(129) % (2 * fmt.qmax) - fmt.qmax + 0.5) * scale
    beside = torch.stack([middle, *(torch.nextafter(middle, to * middle) for to in (2, 0))]).flatten(0, 1)
    x = torch.cat([fmt.qmax * scale.repeat(3, 1), beside], dim=1)
    found, wanted = KERNEL.quantize(x.to(triton_device), fmt, None), quantize(x, fmt)
    assert torch.equal(found.scale.cpu(), wanted.scale)
    assert torch.equal(found.data.cpu()[:, :130], wanted.codes)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_rows_that_are_not_finite_do_not_pass_for_numbers(triton_device):
    x = cases.rows(8, 300, torch.float32)
    x[2, 7], x[4, 299], x[6, 0] = float("nan"), float("inf"), -float("inf")
    packed = cases.weight(33, 300, TensorFormat(4))
    found = run(triton_device, x, packed, ACTIVATION)
    finite = torch.tensor([0, 1, 3, 5, 7])
    assert torch.equal(found[finite], cases.oracle(x[finite], packed, ACTIVATION))
    assert not found[[2, 4, 6]].isfinite().all(1).any()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_taken(triton_device, launches, monkeypatch, wide, dtype):
    read_twice(launches, monkeypatch, wide)

    def taken(x, given, take):
        return KERNEL.quantize(*moved((x, ACTIVATION, given, take), triton_device)).taken.cpu()

    for sizes in ((1, 1), (7 if wide else 37, 300)):
        cases.check_taken(taken, sizes, dtype)


def check_near(found, exact, dtype, slack):
    """Rows known in float64, but for ``slack`` (relative to the largest) and one rounding."""
    bound = UNITS[dtype] * exact.abs() + slack * exact.abs().amax(1, keepdim=True) + 2.0**-24
    assert found.dtype == dtype
    assert ((found.cpu().double() - exact).abs() <= bound).all()


def check_codes(quantized, exact, slack):
    """Codes of rows known in float64: nearest but within ``slack`` (relative to the row's largest) of a tie."""
    inner, highest = exact.shape[1], exact.abs().amax(1, keepdim=True)
    codes, scale = quantized.data.cpu(), quantized.scale.cpu().double()
    assert ((scale * ACTIVATION.qmax - highest).abs() <= slack * highest)[highest > 1e-30].all()
    error = (codes[:, :inner].double() - exact / scale).abs()
    assert (error <= 0.5 + 2 * ACTIVATION.qmax * slack).all()
    assert not codes[:, inner:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_rows_under_the_norm(triton_device, dtype, residual):
    for count, inner in ((1, 1), (5, 130), (37, 576)):
        x, other, gamma = (part.to(dtype) for part in (*torch.randn(2, count, inner), torch.rand(inner) + 0.5))
        smooth, take = cases.smoothing(count, inner, 3), cases.selection(count)
        norm, on_device = Norm(gamma, 1e-6), moved(other if residual else None, triton_device)
        found, summed = fused.normalize(*moved((x, norm, ACTIVATION, smooth, take), triton_device), residual=on_device)
        total = x + other if residual else x
        assert torch.equal(summed.cpu(), total) if residual else summed is None
        exact = torch.nn.functional.rms_norm(total.double(), (inner,), gamma.double(), 1e-6)
        inverse = smooth.inverse[smooth.rows].double()
        check_codes(found, exact * inverse, (inner + 16) * 2.0**-24)
        check_near(found.taken, (exact * inverse)[take.rows], dtype, (inner + 16) * 2.0**-24)
        centred = cases.centring(count, inner, smooth)
        made = KERNEL.quantize_norm(*moved((total, norm, ACTIVATION, centred), triton_device))
        assert made.taken is None
        rows = (exact - centred.centre[centred.centre_rows].double()) * inverse
        check_codes(made, rows, 8 * (inner + 16) * 2.0**-24)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_silu_times_up(triton_device, launches, monkeypatch, wide, dtype):
    read_twice(launches, monkeypatch, wide)
    for count, inner in ((1, 1), (5, 130), (7 if wide else 37, 576)):
        both = (torch.randn(count, 2 * inner) * 4).to(dtype)
        both[:, 0] = torch.linspace(-1000, 1000, count)
        parts = both.to(triton_device).split(inner, dim=1)
        smooth = cases.smoothing(count, inner, 3)
        exact = torch.nn.functional.silu(both[:, :inner].double()) * both[:, inner:].double()
        for given, factor in ((smooth, smooth.inverse[smooth.rows].double()), (None, 1.0)):
            found = fused.silu_times_up(*parts, ACTIVATION, moved(given, triton_device))
            check_codes(found, exact * factor, 16 * 2.0**-24)
        centred = cases.centring(count, inner, smooth)
        take = cases.selection(count)
        found = KERNEL.quantize_gate(*parts, ACTIVATION, *moved((centred, take), triton_device))
        rows = (exact - centred.centre[centred.centre_rows].double()) * smooth.inverse[smooth.rows].double()
        check_codes(found, rows, 8 * 16 * 2.0**-24)
        check_near(found.taken, rows[take.rows], dtype, 8 * 16 * 2.0**-24)


def test_rows_normalized_and_multiplied(triton_device):
    """What comes out of the norm is what a product takes."""
    x, gamma, packed = torch.randn(9, 130), torch.ones(130), cases.weight(33, 130, TensorFormat(4))
    found, summed = fused.normalize(x.to(triton_device), Norm(gamma.to(triton_device), 1e-6), ACTIVATION, None)
    assert summed is None
    assert found.taken is None
    held = KERNEL.prepare(moved(packed, triton_device), ACTIVATION)
    y = KERNEL.gemm(found, held, bias=None, addend=None, dtype=torch.float32).cpu()
    wanted = cases.oracle(torch.nn.functional.rms_norm(x, (130,), gamma, 1e-6), packed, ACTIVATION)
    assert float((y - wanted).norm() / wanted.norm()) < 1e-2
