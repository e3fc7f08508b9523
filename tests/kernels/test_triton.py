"""Integer products in Triton against the reference.

In Triton's interpreter, or on a GPU where there is one (``-m gpu``).
Whatever the kernels allocate is filled with NaN or garbage first.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from masq.kernels.base import LinearSpec, LowRank, RowAddend, RowSmoothing, Selection
from masq.kernels.triton import kernel
from masq.kernels.triton.kernel import MAX_INPUTS
from masq.kernels.triton.tiles import choose, num_splits, num_splits_of_few, table_of, tiles_of
from masq.numerics.affine import quantize
from masq.numerics.scheme import LinearFormat, TensorFormat
from tests.kernels import cases
from tests.kernels.interpreting import (
    ACTIVATION,
    DTYPES,
    KERNEL,
    moved,
    run,
)

SIZES = [(64,), (32, 96, 17), (33,)]
RANKS = {1: [(5,), (32,), (70,)], 3: [(40, 0, 3), (1, 32, 33)]}


def ones(rows: int, columns: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((rows, columns), value)


@pytest.mark.parametrize(
    ("shape", "bits"),
    # Halves of bytes on every shape, whole bytes and the narrowest formats on every other.
    [
        *((shape, (4, 6)) for shape in cases.SHAPES),
        *((shape, (8, 8)) for shape in cases.SHAPES[::2]),
        *((shape, (3, 4)) for shape in cases.SHAPES[1::2]),
    ],
    ids=str,
)
def test_integers_equal_the_reference_to_the_last_bit(triton_device, shape, bits):
    cases.check_equals_reference(partial(run, triton_device), shape, bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", [1, 40])
def test_integers_of_the_largest_sums_do_not_overflow(triton_device, bits, count):
    inner, signs = 18944, torch.tensor([1.0, -1.0] * 5)[:9]
    fmt = TensorFormat(bits)
    packed = cases.pack(quantize(ones(9, inner) * signs[:, None], fmt))
    found = run(triton_device, ones(count, inner, 127.0), packed, ACTIVATION)  # so that the scale is one
    exact = torch.tensor(127 * fmt.qmax * inner).float() * packed.scale[:, 0] * signs
    assert torch.equal(found, exact.expand(count, 9))


@pytest.mark.parametrize(
    ("bits", "sizes"),
    [(8, [(17, 1100), (2, 1100)]), (4, [(5, 700), (17, 1100), (5, 200), (1, 2100), (3, 200), (4, 1100)])],
)
def test_integers_whatever_the_number_of_splits(triton_device, launches, monkeypatch, bits, sizes):
    """Also where slices differ in length, or some are empty."""
    for count, inner in sizes:
        x, packed = cases.rows(count, inner, torch.bfloat16), cases.weight(70, inner, TensorFormat(bits))
        bias = torch.randn(70)
        wanted = cases.oracle(x, packed, ACTIVATION, bias=bias, dtype=torch.bfloat16)
        for splits in (1, 2, 4, 8):
            for name in ("num_splits", "num_splits_of_few"):
                monkeypatch.setattr(launches, name, lambda *_, splits=splits: splits)
            assert torch.equal(run(triton_device, x, packed, ACTIVATION, bias=bias, dtype=torch.bfloat16), wanted)


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_whatever_the_tile(triton_device, launches, monkeypatch, bits):
    x, packed = cases.rows(150, 300, torch.float32), cases.weight(140, 300, TensorFormat(bits))
    wanted = cases.oracle(x, packed, ACTIVATION)
    table, _ = launches.gpu(torch.device(triton_device))
    for tile in {*tiles_of(table, bits == 4), dataclasses.replace(tiles_of(table, bits == 4)[2], inner=64, group=1)}:
        monkeypatch.setattr(launches, "choose", lambda *_, tile=tile: tile)
        assert torch.equal(run(triton_device, x, packed, ACTIVATION), wanted)


def test_integers_do_not_depend_on_the_other_rows(triton_device):
    x, packed = cases.rows(40, 192, torch.bfloat16), cases.weight(33, 192, TensorFormat(4))
    smooth = cases.smoothing(40, 192, 3)
    whole = run(triton_device, x, packed, ACTIVATION, smooth=smooth)
    order = torch.randperm(40)
    for part in (order, order[:7], order[7:8]):
        some = RowSmoothing(smooth.inverse, smooth.rows[part])
        assert torch.equal(run(triton_device, x[part].contiguous(), packed, ACTIVATION, smooth=some), whole[part])


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


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("count", "bits", "factor_dtype"),
    [
        *((count, 4, torch.bfloat16) for count in (1, 40, 300)),
        *((count, 4, torch.int8) for count in (3, 40)),
        *((count, 8, torch.bfloat16) for count in (3, 40)),
    ],
)
def test_corrected_rows_against_float64(triton_device, sizes, count, bits, factor_dtype):
    out = sum(sizes)
    x, packed = cases.rows(count, 100, torch.bfloat16), cases.weight(out, 100, TensorFormat(bits))
    bias = torch.randn(out, generator=torch.Generator().manual_seed(5))
    held = KERNEL.prepare(moved(packed, triton_device), ACTIVATION)
    quantized = KERNEL.quantize(x.to(triton_device), ACTIVATION, None)
    given = {"bias": bias.to(triton_device), "addend": None, "dtype": torch.float32}
    base = KERNEL.gemm(quantized, held, **given).cpu()
    for ranks in RANKS[len(sizes)]:
        terms, wanted, magnitude = [], base.double(), base.double().abs() + bias.abs()
        neither = torch.ones(count, dtype=torch.bool)
        for rows, u, rights in corrections(sizes, ranks, count, 6, factor_dtype):
            on_device = [None if right is None else right.to(triton_device) for right in rights]
            factors = KERNEL.prepare_factors(on_device, sizes, ACTIVATION)
            terms.append(
                LowRank(Selection.of(rows.to(triton_device), count), factors.widened(u.to(triton_device)), factors)
            )
            neither[rows] = False
            parts = zip(u.double().split(ranks, dim=1), rights, sizes, strict=True)
            dense = [(u_j, torch.zeros(0, size) if right is None else right) for u_j, right, size in parts]
            wanted[rows] += torch.cat([u_j @ right.double() for u_j, right in dense], dim=1)
            magnitude[rows] += torch.cat([u_j.abs() @ right.double().abs() for u_j, right in dense], dim=1)
        found = KERNEL.gemm(quantized, held, **given, low_rank=terms).cpu()
        assert ((found.double() - wanted).abs() <= (2 * max(ranks) + 4) * 2**-23 * magnitude + 1e-30).all()
        assert torch.equal(found[neither], base[neither])


def test_corrected_tiles_only_touch_their_factors(triton_device):
    """Of rows of text alone: they keep every bit even where the factors are not numbers."""
    x, packed = cases.rows(600, 100, torch.bfloat16), cases.weight(64, 100, TensorFormat(4))
    held, quantized = (
        KERNEL.prepare(moved(packed, triton_device), ACTIVATION),
        KERNEL.quantize(x.to(triton_device), ACTIVATION, None),
    )
    given = {"bias": None, "addend": None, "dtype": torch.bfloat16}
    factors = KERNEL.prepare_factors([ones(40, 64, float("nan")).bfloat16().to(triton_device)], [64], ACTIVATION)
    for rows in (torch.arange(9), torch.arange(0)):
        u = factors.widened(ones(len(rows), 40).bfloat16().to(triton_device))
        term = LowRank(Selection.of(rows.to(triton_device), 600), u, factors)
        found = KERNEL.gemm(quantized, held, **given, low_rank=[term])
        assert torch.equal(found[300:], KERNEL.gemm(quantized, held, **given)[300:])
        assert bool(found.isnan().any()) == bool(len(rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_added_rows_in_any_dtype_and_number(triton_device, dtype):
    packed, x = cases.weight(48, 192, TensorFormat(8)), cases.rows(70, 192, dtype)
    for share in (0.0, 0.1, 1.0):
        given = {"add": cases.addend(70, 48, share, dtype), "bias": torch.randn(48), "dtype": dtype}
        assert torch.equal(
            run(triton_device, x, packed, ACTIVATION, **given), cases.oracle(x, packed, ACTIVATION, **given)
        )
    whole = RowAddend(Selection.of(torch.arange(70), 70), (torch.randn(70, 48),))
    assert torch.equal(
        run(triton_device, x, packed, ACTIVATION, add=whole), cases.oracle(x, packed, ACTIVATION, add=whole)
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("size", [(1, 1), (48, 192), (33, 961)], ids=str)
def test_the_stored_weight_comes_back(bits, size):
    packed = cases.weight(*size, TensorFormat(bits))
    prepared = KERNEL.prepare(packed, ACTIVATION)
    found = KERNEL.restore(prepared)
    assert torch.equal(found.codes, packed.codes)
    assert found.codes.is_contiguous()
    assert torch.equal(found.scale, packed.scale)
    assert (found.format, found.in_features) == (packed.format, packed.in_features)
    blocks = -(-size[1] // 128)
    assert prepared.num_bytes == size[0] * (blocks * (64 if bits <= 4 else 128) + 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_the_stored_factors_come_back(dtype):
    for sizes in SIZES:
        for ranks in RANKS[len(sizes)]:
            for _, _, rights in corrections(sizes, ranks, 4, 0, dtype):
                factors = KERNEL.prepare_factors(rights, sizes, ACTIVATION)
                assert factors.tensors["right"].dtype == dtype
                for found, wanted in zip(KERNEL.restore_factors(factors), rights, strict=True):
                    assert (found is None) == (wanted is None)
                    assert found is None or (found.dtype == dtype and torch.equal(found, wanted))
    assert KERNEL.prepare_factors([torch.ones(3, 4)], [4], ACTIVATION) is None
    assert KERNEL.prepare_factors([None, None], [4, 4], ACTIVATION) is None
    assert KERNEL.prepare_factors([torch.ones(3, 4).bfloat16(), torch.ones(3, 4).char()], [4, 4], ACTIVATION) is None
    assert KERNEL.prepare_factors([torch.ones(3, 4).bfloat16()], [4], None) is None


def test_splits_give_every_processor_work_and_no_more():
    for outputs, inner, wanted in ((37888, 3584, 1), (3584, 3584, 4), (3584, 18944, 8), (512, 256, 1), (4608, 3584, 4)):
        assert num_splits(choose(90, True, 1, outputs, 132), 1, outputs, inner, 132) == wanted
    assert num_splits(choose(90, True, 65, 64, 132), 65, 64, 18944, 132) == 1
    # Of a row or a few: outputs, and words of a line of 4-bit weights.
    for outputs, inner, wanted in (
        (37888, 3584, 1),
        (3584, 3584, 1),
        (3584, 18944, 4),
        (4608, 3584, 1),
        (2048, 11008, 2),
    ):
        assert num_splits_of_few(outputs, inner // 8, 132) == wanted


@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize("table", [80, 89, 90])
def test_tiles_grow_with_the_product(table, four):
    tiles = tiles_of(table, four)
    for outputs in (64, 3584, 37888):
        chosen = [choose(table, four, rows, outputs, 132) for rows in (1, 16, 17, 33, 65, 500, 3000, 100_000)]
        assert chosen[:4] == [tiles[0], tiles[0], tiles[1], tiles[2]]
        sizes = [tile.rows * tile.outputs for tile in chosen]
        assert sizes == sorted(sizes)
    assert chosen[-1] == tiles[-1]
    assert choose(table, four, 129, 64, 132).rows <= 64


@pytest.mark.parametrize(("capability", "table"), [(80, 80), (86, 89), (90, 90), (100, 89), (120, 89)])
def test_a_gpu_that_the_table_does_not_name_takes_the_smallest(capability, table):
    assert table_of(capability) == table


SPEC = LinearSpec(64, 48, LinearFormat(TensorFormat(4), ACTIVATION), "cuda")
GROUPED = TensorFormat(4, granularity="per_group", group_size=32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"device": "cpu"}, "tensors on cpu"),
        ({"device": "meta"}, "tensors on meta"),
        ({"format": LinearFormat(GROUPED, ACTIVATION)}, "one scale an output channel"),
        ({"format": LinearFormat(TensorFormat(4, symmetric=False), ACTIVATION)}, "weights must be symmetric"),
        ({"format": LinearFormat(TensorFormat(4), None)}, "not quantized"),
        ({"format": LinearFormat(TensorFormat(4), TensorFormat(8, False, "per_token"))}, "inputs must be symmetric"),
        ({"in_features": MAX_INPUTS + 1}, "registers"),
    ],
)
def test_reasons(monkeypatch, changes, reason):
    monkeypatch.setattr(kernel, "find_spec", lambda _name: "there")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    reasons = KERNEL.not_supported_reasons(dataclasses.replace(SPEC, **changes))
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]


def test_reasons_of_machines(monkeypatch):
    monkeypatch.setattr(kernel, "find_spec", lambda _name: "there")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert KERNEL.not_supported_reasons(SPEC) == ["torch finds no NVIDIA GPU"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert KERNEL.not_supported_reasons(SPEC) == ["compute capability 7.5, 8.0 is needed"]
    monkeypatch.setattr(kernel, "find_spec", lambda _name: None)
    assert "triton is not installed" in KERNEL.not_supported_reasons(SPEC)


def test_wrong_rows_are_refused():
    for x in (torch.ones(4, 8, dtype=torch.float64), torch.ones(8, 4).t(), torch.ones(2, 4, 8)):
        with pytest.raises(ValueError, match="contiguous matrix"):
            KERNEL.quantize(x, ACTIVATION, None)
    with pytest.raises(ValueError, match="of their length"):
        KERNEL.quantize(torch.ones(4, 8), ACTIVATION, RowSmoothing(torch.ones(1, 9), None))
