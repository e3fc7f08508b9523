"""W4A4 on int4 tensor cores against the reference: in the emulator, and on a GPU where there is one (``-m gpu``).

Whatever the kernels allocate is filled with NaN or garbage first.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from masq.errors import NumericalError
from masq.kernels.base import LowRank, RowAddend, RowSmoothing, Selection
from masq.kernels.cuda import build, launch
from masq.kernels.cuda.kernel import CudaKernel
from masq.kernels.cuda.tiles import LINE, TILES, choose, num_programs, num_slices
from masq.numerics.affine import quantize
from masq.numerics.packing import unpack_nibbles
from masq.numerics.scheme import TensorFormat
from tests.kernels import cases
from tests.kernels.emulating import functions
from tests.kernels.interpreting import DTYPES, moved
from tests.kernels.layers import check_layers_that_share_an_input

FOUR, ACTIVATION = TensorFormat(4), cases.per_token(4)
SIZES = [(64,), (32, 96, 17), (33,)]
RANKS = {1: [(5,), (32,), (70,)], 3: [(40, 0, 3), (1, 32, 33)]}


def run(target, x, packed, activation=ACTIVATION, **given):
    on_device = {name: moved(value, target.device) for name, value in given.items()}
    return cases.run(target.kernel, x.to(target.device), moved(packed, target.device), activation, **on_device).cpu()


def ones(rows: int, columns: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((rows, columns), value)


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
@pytest.mark.parametrize("bits", [(4, 4), (3, 4), (4, 2)], ids=str)
def test_integers_equal_the_reference_to_the_last_bit(target, shape, bits):
    cases.check_equals_reference(lambda *args, **given: run(target, *args, **given), shape, bits)


@pytest.mark.parametrize("count", [1, 40])
def test_integers_of_the_largest_sums_do_not_overflow(target, count):
    inner, signs = 18944, torch.tensor([1.0, -1.0] * 5)[:9]
    packed = cases.pack(quantize(ones(9, inner) * signs[:, None], FOUR))
    found = run(target, ones(count, inner, 7.0), packed)  # so that the scale is one
    exact = torch.tensor(49 * inner).float() * packed.scale[:, 0] * signs
    assert torch.equal(found, exact.expand(count, 9))


@pytest.mark.parametrize(("count", "inner", "out"), [(3, 1100, 70), (17, 700, 33), (1, 200, 5)])
def test_integers_whatever_the_number_of_slices(target, monkeypatch, count, inner, out):
    """Also where slices differ in length, or some are empty."""
    x, packed = cases.rows(count, inner, torch.bfloat16), cases.weight(out, inner, FOUR)
    bias = torch.randn(out)
    wanted = cases.oracle(x, packed, ACTIVATION, bias=bias, dtype=torch.bfloat16)
    for slices in (1, 2, 4, 8):
        monkeypatch.setattr(launch, "num_slices", lambda *_, slices=slices: slices)
        assert torch.equal(run(target, x, packed, bias=bias, dtype=torch.bfloat16), wanted)


@pytest.mark.parametrize("tile", range(len(TILES)))
def test_integers_whatever_the_tile(target, monkeypatch, tile):
    """Several tiles each way, the last ones with tails; also with everything that can be added."""
    x, packed = cases.rows(150, 300, torch.float32), cases.weight(301, 300, FOUR)
    add = cases.addend(150, 301, 0.5, torch.float16)
    monkeypatch.setattr(launch, "choose", lambda *_: tile)
    assert torch.equal(run(target, x, packed, add=add), cases.oracle(x, packed, ACTIVATION, add=add))


def test_integers_do_not_depend_on_the_other_rows(target):
    x, packed = cases.rows(40, 192, torch.bfloat16), cases.weight(33, 192, FOUR)
    smooth = cases.smoothing(40, 192, 3)
    whole = run(target, x, packed, smooth=smooth)
    order = torch.randperm(40)
    for part in (order, order[:7], order[7:8]):
        some = RowSmoothing(smooth.inverse, smooth.rows[part])
        assert torch.equal(run(target, x[part].contiguous(), packed, smooth=some), whole[part])


@pytest.mark.parametrize("inner", [1, 8, 63, 128, 130, 4104])
@pytest.mark.parametrize(("dtype", "clip"), [*((dtype, 1.0) for dtype in DTYPES), (torch.float32, 0.8)])
def test_codes_and_scales_are_those_of_affine(target, inner, dtype, clip):
    """By bit, whatever the alignment of rows: ``x`` begins where 16 bytes do, or one row later."""
    x, smooth = cases.rows(9, inner, dtype), cases.smoothing(9, inner, 4)
    fmt = dataclasses.replace(ACTIVATION, clip=clip)
    for given, part in itertools.product((None, smooth), (slice(0, 9), slice(1, 9))):
        own = given and RowSmoothing(given.inverse, given.rows[part])
        on_device = (x.to(target.device)[part], fmt, moved(own, target.device))
        found = target.kernel.quantize(*on_device)
        smoothed = x[part].float() * (own.inverse[own.rows] if own else 1)
        wanted = quantize(smoothed, fmt)
        assert found.data.shape == (len(x[part]), -(-inner // 128) * 64)
        codes = unpack_nibbles(found.data.cpu(), found.data.shape[1] * 2, signed=True)
        assert torch.equal(codes[:, :inner], wanted.codes)
        assert not codes[:, inner:].any()
        assert torch.equal(found.scale.cpu(), wanted.scale)


def test_rows_that_are_not_numbers_stay_so_and_alone(target):
    x, packed = torch.randn(5, 200), cases.weight(40, 200, FOUR)
    x[1, 7], x[3, 199] = float("nan"), float("inf")
    found = run(target, x, packed)
    assert not found[[1, 3]].isfinite().all(1).any()
    assert torch.equal(found[[0, 2, 4]], cases.oracle(x[[0, 2, 4]], packed, ACTIVATION))


def corrections(sizes, ranks, count, seed, dtype=torch.bfloat16):
    """Two modalities whose rows meet within a tile, and rows of neither; factors as they are, or codes."""
    generator, scale = torch.Generator().manual_seed(seed), 40 if dtype == torch.int8 else 1
    order = torch.randperm(count, generator=generator)
    for rows in (order[: count // 2], order[count // 2 : count - count // 4]):
        rights = [
            (torch.randn(rank, size, generator=generator) * scale).clamp(-127, 127).to(dtype) if rank else None
            for rank, size in zip(ranks, sizes, strict=True)
        ]
        yield rows, torch.randn(len(rows), sum(ranks), generator=generator).bfloat16(), rights


def check_corrected(target, sizes, ranks, count, dtype):
    out = sum(sizes)
    x, packed = cases.rows(count, 100, torch.bfloat16), cases.weight(out, 100, FOUR)
    bias = torch.randn(out, generator=torch.Generator().manual_seed(5))
    kernel, device = target
    held = kernel.prepare(moved(packed, device), ACTIVATION)
    quantized = kernel.quantize(x.to(device), ACTIVATION, None)
    given = {"bias": bias.to(device), "addend": None, "dtype": torch.float32}
    base = kernel.gemm(quantized, held, **given).cpu()
    terms, wanted, magnitude = [], base.double(), base.double().abs() + bias.abs()
    neither = torch.ones(count, dtype=torch.bool)
    for rows, u, rights in corrections(sizes, ranks, count, 6, dtype):
        factors = kernel.prepare_factors([None if r is None else r.to(device) for r in rights], sizes, ACTIVATION)
        terms.append(LowRank(Selection.of(rows.to(device), count), factors.widened(u.to(device)), factors))
        neither[rows] = False
        parts = zip(u.double().split(ranks, dim=1), rights, sizes, strict=True)
        dense = [(u_j, torch.zeros(0, size) if right is None else right) for u_j, right, size in parts]
        wanted[rows] += torch.cat([u_j @ right.double() for u_j, right in dense], dim=1)
        magnitude[rows] += torch.cat([u_j.abs() @ right.double().abs() for u_j, right in dense], dim=1)
    found = kernel.gemm(quantized, held, **given, low_rank=terms).cpu()
    assert ((found.double() - wanted).abs() <= (2 * max(ranks) + 4) * 2**-23 * magnitude + 1e-30).all()
    assert torch.equal(found[neither], base[neither])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 40, 300])
@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.int8])
def test_corrected_rows_against_float64(target, sizes, count, factor_dtype):
    for ranks in RANKS[len(sizes)]:
        check_corrected(target, sizes, ranks, count, factor_dtype)


@pytest.mark.parametrize("tile", range(len(TILES)))
def test_corrected_rows_whatever_the_tile(target, monkeypatch, tile):
    monkeypatch.setattr(launch, "choose", lambda *_: tile)
    check_corrected(target, (32, 96, 200), (40, 8, 33), 150, torch.bfloat16)


def test_corrected_tiles_only_touch_their_factors(target):
    """Of rows of text alone: they keep every bit even where the factors are not numbers."""
    kernel, device = target
    x, packed = cases.rows(600, 100, torch.bfloat16), cases.weight(64, 100, FOUR)
    held, quantized = (
        kernel.prepare(moved(packed, device), ACTIVATION),
        kernel.quantize(x.to(device), ACTIVATION, None),
    )
    given = {"bias": None, "addend": None, "dtype": torch.bfloat16}
    factors = kernel.prepare_factors([ones(40, 64, float("nan")).bfloat16().to(device)], [64], ACTIVATION)
    for rows in (torch.arange(9), torch.arange(0)):
        u = factors.widened(ones(len(rows), 40).bfloat16().to(device))
        term = LowRank(Selection.of(rows.to(device), 600), u, factors)
        found = kernel.gemm(quantized, held, **given, low_rank=[term])
        assert torch.equal(found[300:], kernel.gemm(quantized, held, **given)[300:])
        assert bool(found.isnan().any()) == bool(len(rows))


@pytest.mark.parametrize("coded", [False, True])
def test_layers_that_share_an_input(target, monkeypatch, request, coded):
    if target.device == "cuda" and request.config.getoption("--cuda-library"):
        monkeypatch.setattr(build, "library", lambda _: target.kernel._library(torch.device("cuda")))
    check_layers_that_share_an_input(*target, ACTIVATION, coded, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("count", [1, 300])
def test_a_captured_graph_reads_what_is_new(target, count):
    if target.device == "cpu":
        pytest.skip("the emulator has no streams")
    kernel = target.kernel
    x, smooth = cases.rows(count, 1024, torch.bfloat16).cuda(), moved(cases.smoothing(count, 1024, 3), "cuda")
    added = moved(cases.addend(count, 48, 0.5, torch.bfloat16), "cuda")
    held = kernel.prepare(moved(cases.weight(48, 1024, FOUR), "cuda"), ACTIVATION)

    def layer():
        return kernel.gemm(kernel.quantize(x, ACTIVATION, smooth), held, bias=None, addend=added, dtype=torch.bfloat16)

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer()
    for seed in (5, 6):
        x.copy_(cases.rows(count, 1024, torch.bfloat16, seed))
        graph.replay()
        assert torch.equal(found, layer())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_taken(target, dtype):
    def taken(x, given, take):
        return target.kernel.quantize(*moved((x, ACTIVATION, given, take), target.device)).taken.cpu()

    for sizes in ((1, 1), (9, 130), (37, 576)):
        cases.check_taken(taken, sizes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_added_rows_in_any_dtype_and_number(target, dtype):
    packed, x = cases.weight(48, 192, FOUR), cases.rows(70, 192, dtype)
    for share in (0.0, 0.1, 1.0):
        given = {"add": cases.addend(70, 48, share, dtype), "bias": torch.randn(48), "dtype": dtype}
        assert torch.equal(run(target, x, packed, **given), cases.oracle(x, packed, ACTIVATION, **given))
    whole = RowAddend(Selection.of(torch.arange(70), 70), (torch.randn(70, 48),))
    assert torch.equal(run(target, x, packed, add=whole), cases.oracle(x, packed, ACTIVATION, add=whole))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (48, 192), (33, 961), (7, 256)], ids=str)
def test_the_stored_weight_comes_back(bits, size):
    packed, kernel = cases.weight(*size, TensorFormat(bits)), CudaKernel()
    prepared = kernel.prepare(packed, ACTIVATION)
    found = kernel.restore(prepared)
    assert torch.equal(found.codes, packed.codes)
    assert found.codes.is_contiguous()
    assert torch.equal(found.scale, packed.scale)
    assert (found.format, found.in_features) == (packed.format, packed.in_features)
    assert prepared.num_bytes == size[0] * (-(-size[1] // 128) * LINE + 4)


def test_the_stored_factors_come_back():
    for dtype, ranks in itertools.product((torch.bfloat16, torch.int8), RANKS[3]):
        for _, _, rights in corrections((32, 96, 17), ranks, 4, 0, dtype):
            factors = CudaKernel().prepare_factors(rights, (32, 96, 17), ACTIVATION)
            for found, wanted in zip(CudaKernel().restore_factors(factors), rights, strict=True):
                assert (found is None) == (wanted is None)
                assert found is None or torch.equal(found, wanted)
    assert CudaKernel().prepare_factors([torch.ones(3, 4).bfloat16()], [4], None) is None


def test_the_table_of_tiles_is_that_of_the_sources(target):
    import ctypes

    four = (ctypes.c_int32 * 4)()
    library = functions(target.kernel) if target.device == "cpu" else target.kernel._library(torch.device("cuda"))
    for index, tile in enumerate(TILES):
        assert library.masq_cuda_tile(index, four) == 0
        assert (four[0], four[1]) == (tile.rows, tile.outputs)
    assert library.masq_cuda_tile(len(TILES), four)


def test_tiles_grow_with_the_product():
    for outputs in (64, 3584, 37888):
        chosen = [choose(rows, outputs, 108) for rows in (1, 16, 17, 64, 129, 2000, 100_000)]
        assert chosen == sorted(chosen)
        assert chosen[:3] == [0, 0, 1]
    assert chosen[-1] == len(TILES) - 1
    assert choose(2048, 64, 108) == 1
    assert num_programs(TILES[choose(2048, 3584, 108)], 2048, 3584) >= 108 * 3 / 4


def test_slices_give_every_processor_work_and_no_more():
    for outputs, inner, wanted in ((37888, 3584, 1), (3584, 3584, 4), (3584, 18944, 4), (512, 256, 1), (64, 18944, 8)):
        assert num_slices(TILES[0], 1, outputs, inner // 128, 108) == wanted
    assert num_slices(TILES[1], 65, 64, 148, 108) == 1


def test_wrong_rows_are_refused(target):
    for x in (torch.ones(4, 8, dtype=torch.float64), torch.ones(8, 4).t(), torch.ones(2, 4, 8)):
        with pytest.raises(NumericalError, match="contiguous matrix"):
            target.kernel.quantize(x, ACTIVATION, None)


def test_a_launch_that_fails_says_why_and_what_to_use(target, monkeypatch):
    monkeypatch.setattr(launch, "TILES", [*TILES, TILES[0]])
    monkeypatch.setattr(launch, "choose", lambda *_: len(TILES))
    with pytest.raises(RuntimeError, match=r"no tile has this number.*kernel=triton"):
        run(target, cases.rows(70, 64, torch.float32), cases.weight(32, 64, FOUR))
