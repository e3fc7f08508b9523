"""Hard cases that every kernel must get right, and the oracle they are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from masq.kernels.base import Bias, Kernel, RowAddend, RowBias, RowSmoothing, Selection
from masq.kernels.reference import ReferenceKernel
from masq.numerics.affine import quantize
from masq.numerics.packing import PackedWeight, pack
from masq.numerics.scheme import TensorFormat

SHAPES = [
    *((1, 1, 1), (1, 65, 33), (2, 7, 15), (3, 64, 32), (4, 576, 192), (5, 63, 31), (15, 130, 17), (16, 64, 16)),
    *((17, 65, 47), (33, 1536, 70), (127, 100, 33), (129, 576, 64), (300, 192, 40), (0, 64, 32)),
]
"""Rows, inputs, outputs: tails of tiles, blocks and panels, one of each, and nothing at all."""


def per_token(bits: int) -> TensorFormat:
    return TensorFormat(bits, granularity="per_token")


def weight(out: int, inner: int, fmt: TensorFormat, seed: int = 0) -> PackedWeight:
    values = torch.randn(out, inner, generator=torch.Generator().manual_seed(seed))
    values[out // 2] = 0
    return pack(quantize(values, fmt))


def rows(count: int, inner: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Of very different sizes; one all zero, one with a single value."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inner, generator=generator) * torch.logspace(-3, 3, max(count, 1))[:count, None]
    if count > 2:
        x[1] = 0
        x[2] = 0
        x[2, inner // 2] = -5
    return x.to(dtype)


def smoothing(count: int, inner: int, vectors: int, seed: int = 2) -> RowSmoothing:
    generator = torch.Generator().manual_seed(seed)
    inverse = torch.rand(vectors, inner, generator=generator) + 0.5
    return RowSmoothing(inverse, torch.randint(0, vectors, (count,), generator=generator) if vectors > 1 else None)


def centring(count: int, inner: int, smooth: RowSmoothing | None = None, seed: int = 5) -> RowSmoothing:
    """Two centres by row, before the factors of ``smooth``."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(2, inner, generator=generator).bfloat16()
    inverse, which = (None, None) if smooth is None else (smooth.inverse, smooth.rows)
    return RowSmoothing(inverse, which, centre, torch.randint(0, 2, (count,), generator=generator))


def selection(count: int, seed: int = 7) -> Selection:
    """About a third of so many rows, in any order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return Selection.of(order[: -(-count // 3)], count)


def row_bias(count: int, out: int, seed: int = 6) -> RowBias:
    generator = torch.Generator().manual_seed(seed)
    return RowBias(torch.randn(2, out, generator=generator), torch.randint(0, 2, (count,), generator=generator))


def addend(count: int, out: int, share: float, dtype: torch.dtype, seed: int = 3) -> RowAddend:
    """In two parts that meet within a vector of sixteen, where there are so many outputs."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[: int(share * count)]
    values = torch.randn(len(chosen), out, generator=generator).to(dtype)
    sizes = [out // 3, out - out // 3] if out > 2 else [out]
    return RowAddend(Selection.of(chosen, count), tuple(part.contiguous() for part in values.split(sizes, dim=1)))


def run(
    kernel: Kernel,
    x: torch.Tensor,
    packed: PackedWeight,
    activation: TensorFormat | None,
    *,
    smooth: RowSmoothing | None = None,
    bias: Bias = None,
    add: RowAddend | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """A whole layer."""
    quantized = kernel.quantize(x, activation, smooth)
    return kernel.gemm(quantized, kernel.prepare(packed, activation), bias=bias, addend=add, dtype=dtype)


def oracle(*args, **kwargs) -> torch.Tensor:
    return run(ReferenceKernel(), *args, **kwargs)


def check_equals_reference(run_kernel: Callable[..., torch.Tensor], shape: tuple[int, int, int], bits: tuple[int, int]):
    """A product of integer codes, plain and with all that can be added, is the oracle's to the last bit.

    Args:
        run_kernel: ``run`` with the kernel given.
        shape: one of ``SHAPES``.
        bits: of weight and input.
    """
    count, inner, out = shape
    packed, activation = weight(out, inner, TensorFormat(bits[0])), per_token(bits[1])
    dtype = (torch.float32, torch.bfloat16, torch.float16)[(count + inner) % 3]
    x = rows(count, inner, dtype)
    more = {
        "smooth": smoothing(count, inner, 3),
        "bias": torch.randn(out, generator=torch.Generator().manual_seed(4)),
        "add": addend(count, out, 0.6, torch.bfloat16),
    }
    if inner % 2:
        more |= {"smooth": centring(count, inner, more["smooth"]), "bias": row_bias(count, out)}
    for given in ({}, more):
        for output in (torch.float32, dtype):
            found = run_kernel(x, packed, activation, dtype=output, **given)
            assert found.dtype == output
            assert found.shape == (count, out)
            assert torch.equal(found, oracle(x, packed, activation, dtype=output, **given))


def check_taken(run_kernel: Callable[..., torch.Tensor], sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """Smoothed rows that corrections read are those of the reference to the last bit, all of them and no others.

    Args:
        run_kernel: ``quantize(...).taken`` with the kernel given.
        sizes: rows and inputs.
        dtype: of the rows.
    """
    x, smooth = rows(*sizes, dtype), smoothing(*sizes, 3)
    one = RowSmoothing(smooth.inverse[:1], None)  # type: ignore[index]
    whole = Selection.of(torch.arange(sizes[0]), sizes[0])
    for given in (None, one, smooth, centring(*sizes), centring(*sizes, smooth)):
        smoothed = x.float() if given is None else given.apply(x)
        for take in (selection(sizes[0]), whole, Selection.of(torch.zeros(0, dtype=torch.int64), sizes[0])):
            found = run_kernel(x, given, take)
            assert found.dtype == dtype
            assert torch.equal(found, smoothed[take.rows].to(dtype))


def exact(x: torch.Tensor, packed: PackedWeight, activation: TensorFormat) -> torch.Tensor:
    """Scaled products in int64 and float64, from the codes that masq.numerics.affine gives."""
    from masq.numerics.packing import unpack

    plain, quantized = unpack(packed), quantize(x.float(), activation)
    sums = quantized.codes.long() @ plain.codes.long().t()
    return sums.double() * quantized.scale.double() * plain.scale.double().t()
