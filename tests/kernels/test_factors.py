"""Low-rank corrections inside the kernel: against float64, on rows of several modalities, and back to plain tensors."""

from __future__ import annotations

import pytest
import torch

from masq.kernels.base import LowRank, Selection
from masq.kernels.build import BuildError
from masq.kernels.cpu import ISAS, CpuKernel, best_isa
from masq.numerics.scheme import TensorFormat
from tests.kernels import cases

try:
    BEST = best_isa()
except BuildError as error:
    pytest.skip(f"no kernels here: {error}", allow_module_level=True)

FUSING = ISAS[ISAS.index("avx512_bf16") : BEST + 1]
needs_bf16 = pytest.mark.skipif(not FUSING, reason="corrections are fused where there is bfloat16")
ACTIVATION = cases.per_token(8)
SIZES = [(64,), (32, 96, 17), (33,)]
RANKS = {1: [(5,), (32,), (70,)], 3: [(40, 0, 3), (1, 32, 33)]}


def rights(
    ranks: tuple[int, ...], sizes: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor | None]:
    """Factors as they are, or codes."""
    generator = torch.Generator().manual_seed(seed)
    scale = 40 if dtype == torch.int8 else 1
    return [
        (torch.randn(rank, size, generator=generator) * scale).clamp(-127, 127).to(dtype) if rank else None
        for rank, size in zip(ranks, sizes, strict=True)
    ]


@needs_bf16
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 17, 40, 300])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("isa", FUSING)
@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.int8])
def test_corrected_rows_against_float64(factor_dtype, isa, sizes, count, bits):
    kernel, out = CpuKernel(isa), sum(sizes)
    x, packed = cases.rows(count, 100, torch.bfloat16), cases.weight(out, 100, TensorFormat(bits))
    bias = torch.randn(out, generator=torch.Generator().manual_seed(5))
    held = kernel.prepare(packed, ACTIVATION)
    quantized = kernel.quantize(x, ACTIVATION, None)
    base = kernel.gemm(quantized, held, bias=bias, addend=None, dtype=torch.float32).double()
    generator = torch.Generator().manual_seed(6)
    order = torch.randperm(count, generator=generator)
    for ranks in RANKS[len(sizes)]:
        # Two modalities whose rows meet within a tile, and rows of neither.
        terms, wanted, magnitude = [], base.clone(), base.abs()
        for seed, rows in enumerate((order[: count // 2], order[count // 2 : count - count // 4])):
            own = rights(ranks, sizes, seed, factor_dtype)
            u = torch.randn(len(rows), sum(ranks), generator=generator).bfloat16()
            factors = kernel.prepare_factors(own, sizes, ACTIVATION)
            terms.append(LowRank(Selection.of(rows, count), u, factors))
            column = start = 0
            for right, size, rank in zip(own, sizes, ranks, strict=True):
                if right is not None:
                    part = u[:, column : column + rank].double()
                    wanted[rows, start : start + size] += part @ right.double()
                    magnitude[rows, start : start + size] += part.abs() @ right.double().abs()
                column, start = column + rank, start + size
        found = kernel.gemm(quantized, held, bias=bias, addend=None, dtype=torch.float32, low_rank=terms)
        assert ((found.double() - wanted).abs() <= (2 * max(ranks) + 4) * 2**-24 * magnitude + 1e-30).all()
        neither = torch.ones(count, dtype=torch.bool)
        neither[order[: count - count // 4]] = False
        assert torch.equal(found[neither], base[neither].float())


@needs_bf16
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_the_stored_factors_come_back(dtype):
    kernel = CpuKernel()
    for sizes in SIZES:
        for ranks in RANKS[len(sizes)]:
            own = rights(ranks, sizes, 0, dtype)
            factors = kernel.prepare_factors(own, sizes, ACTIVATION)
            assert {tensor.dtype for tensor in factors.tensors.values()} == {dtype}
            for found, wanted in zip(kernel.restore_factors(factors), own, strict=True):
                assert (found is None) == (wanted is None)
                assert found is None or (found.dtype == dtype and torch.equal(found, wanted))


@needs_bf16
@pytest.mark.parametrize("isa", FUSING)
def test_codes_are_multiplied_as_the_numbers_that_they_are(isa):
    kernel, sizes, count = CpuKernel(isa), (32, 96, 17), 40
    held = kernel.prepare(cases.weight(sum(sizes), 100, TensorFormat(4)), ACTIVATION)
    quantized = kernel.quantize(cases.rows(count, 100, torch.bfloat16), ACTIVATION, None)
    codes, found = rights((40, 0, 3), sizes, 0, torch.int8), []
    u = torch.randn(count, 43, generator=torch.Generator().manual_seed(1)).bfloat16()
    for own in (codes, [None if one is None else one.bfloat16() for one in codes]):
        term = LowRank(Selection.of(torch.arange(count), count), u, kernel.prepare_factors(own, sizes, ACTIVATION))
        found.append(kernel.gemm(quantized, held, bias=None, addend=None, dtype=torch.bfloat16, low_rank=[term]))
    assert torch.equal(*found)


def test_what_is_not_fused():
    kernel, sizes = CpuKernel(), (32, 32)
    own = rights((4, 4), sizes, 0)
    assert kernel.prepare_factors(own, sizes, None) is None
    assert kernel.prepare_factors([None, None], sizes, ACTIVATION) is None
    assert kernel.prepare_factors([own[0].float(), own[1]], sizes, ACTIVATION) is None
    assert kernel.prepare_factors([own[0].char(), own[1]], sizes, ACTIVATION) is None
    assert kernel.prepare_factors(rights((4, 4), (33, 32), 0), (33, 32), ACTIVATION) is None
    if BEST >= 2:
        assert CpuKernel("avx512_vnni").prepare_factors(own, sizes, ACTIVATION) is None
