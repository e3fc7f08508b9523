"""Triton kernels against the reference: in Triton's interpreter, or on a GPU where there is one (``-m gpu``).

Triton decides when it is imported whether it interprets, so without a GPU the tests run in a process of their own.
Whatever the kernels allocate is filled with NaN or garbage first.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from masq.kernels.base import LinearSpec, LowRank, RowAddend, RowSmoothing
from masq.kernels.triton.kernel import MAX_INPUTS, TritonKernel
from masq.kernels.triton.tiles import choose, num_splits, table_of, tiles_of
from masq.numerics.affine import quantize
from masq.numerics.scheme import LinearFormat, TensorFormat
from tests.kernels import cases

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL = TritonKernel()
ACTIVATION = cases.per_token(8)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SIZES = [(64,), (32, 96, 17), (33,)]
RANKS = {1: [(5,), (32,), (70,)], 3: [(40, 0, 3), (1, 32, 33)]}
GARBAGE = 0x55


def pytest_generate_tests(metafunc):
    """Tests of kernels run where they can: in this process if it interprets, else on the GPU if there is one."""
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    if "device" in metafunc.fixturenames:
        on_gpu = pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])
        metafunc.parametrize("device", ["cpu" if INTERPRETED else on_gpu])


@pytest.mark.skipif(INTERPRETED, reason="this is what it runs")
@pytest.mark.parametrize("kind", ["integers", "corrected or added", "rows"])
def test_everything_in_the_interpreter(kind):
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", kind]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch):
    def filled(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else GARBAGE)

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, make=make, **k: filled(make(*a, **k)))


@pytest.fixture
def ops():
    from masq.kernels.triton import ops

    return ops


def moved(given, device):
    """Tensors, and all that hold them, on a device."""
    if isinstance(given, torch.Tensor):
        return given.to(device)
    if isinstance(given, tuple):
        return tuple(moved(one, device) for one in given)
    if dataclasses.is_dataclass(given) and not isinstance(given, TensorFormat):
        values = {field.name: moved(getattr(given, field.name), device) for field in dataclasses.fields(given)}
        return type(given)(**values)
    return given


def run(device, x, packed, activation, **given):
    on_device = {name: moved(value, device) for name, value in given.items()}
    return cases.run(KERNEL, x.to(device), moved(packed, device), activation, **on_device).cpu()


def ones(rows: int, columns: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((rows, columns), value)


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
@pytest.mark.parametrize("bits", [(8, 8), (4, 6), (3, 4)], ids=str)
def test_integers_equal_the_reference_to_the_last_bit(device, shape, bits):
    count, inner, out = shape
    packed, activation = cases.weight(out, inner, TensorFormat(bits[0])), cases.per_token(bits[1])
    dtype = DTYPES[(count + inner) % 3]
    x = cases.rows(count, inner, dtype)
    more = {
        "smooth": cases.smoothing(count, inner, 3),
        "bias": torch.randn(out, generator=torch.Generator().manual_seed(4)),
        "add": cases.addend(count, out, 0.6, torch.bfloat16),
    }
    for given in ({}, more):
        for output in (torch.float32, dtype):
            found = run(device, x, packed, activation, dtype=output, **given)
            assert found.dtype == output
            assert torch.equal(found, cases.oracle(x, packed, activation, dtype=output, **given))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", [1, 40])
def test_integers_of_the_largest_sums_do_not_overflow(device, bits, count):
    inner, signs = 18944, torch.tensor([1.0, -1.0] * 5)[:9]
    fmt = TensorFormat(bits)
    packed = cases.pack(quantize(ones(9, inner) * signs[:, None], fmt))
    found = run(device, ones(count, inner, 127.0), packed, ACTIVATION)  # so that the scale is one
    exact = torch.tensor(127 * fmt.qmax * inner).float() * packed.scale[:, 0] * signs
    assert torch.equal(found, exact.expand(count, 9))


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_whatever_the_number_of_splits(device, ops, monkeypatch, bits):
    """Also where slices differ in length, or some are empty."""
    for count, inner in ((3, 700), (17, 1100), (1, 200)):
        x, packed = cases.rows(count, inner, torch.bfloat16), cases.weight(70, inner, TensorFormat(bits))
        bias = torch.randn(70)
        wanted = cases.oracle(x, packed, ACTIVATION, bias=bias, dtype=torch.bfloat16)
        for splits in (1, 2, 4, 8):
            monkeypatch.setattr(ops, "num_splits", lambda *_, splits=splits: splits)
            assert torch.equal(run(device, x, packed, ACTIVATION, bias=bias, dtype=torch.bfloat16), wanted)


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_whatever_the_tile(device, ops, monkeypatch, bits):
    x, packed = cases.rows(150, 300, torch.float32), cases.weight(140, 300, TensorFormat(bits))
    wanted = cases.oracle(x, packed, ACTIVATION)
    table = table_of(10 * torch.cuda.get_device_capability()[0]) if device == "cuda" else 90
    for tile in {*tiles_of(table, bits == 4), dataclasses.replace(choose(table, bits == 4, 64), inner=64, group=1)}:
        monkeypatch.setattr(ops, "choose", lambda *_, tile=tile: tile)
        assert torch.equal(run(device, x, packed, ACTIVATION), wanted)


def test_integers_do_not_depend_on_the_other_rows(device):
    x, packed = cases.rows(40, 192, torch.bfloat16), cases.weight(33, 192, TensorFormat(4))
    smooth = cases.smoothing(40, 192, 3)
    whole = run(device, x, packed, ACTIVATION, smooth=smooth)
    order = torch.randperm(40)
    for part in (order, order[:7], order[7:8]):
        some = RowSmoothing(smooth.inverse, smooth.rows[part])
        assert torch.equal(run(device, x[part].contiguous(), packed, ACTIVATION, smooth=some), whole[part])


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_codes_of_the_reference(device, dtype, bits):
    fmt = cases.per_token(bits)
    for count, inner in ((1, 1), (5, 130), (70, 128), (3, 2100)):
        x, smooth = cases.rows(count, inner, dtype), cases.smoothing(count, inner, 3)
        # Every value halfway between two codes of a row whose scale is one.
        x[0] = (torch.arange(inner) % (2 * fmt.qmax) - fmt.qmax + 0.5).to(dtype)
        x[0, 0] = fmt.qmax
        for given in (None, smooth, RowSmoothing(smooth.inverse[:1].contiguous(), None)):
            found = KERNEL.quantize(x.to(device), fmt, moved(given, device))
            wanted = cases.ReferenceKernel().quantize(x, fmt, given)
            codes = found.data.cpu()
            assert torch.equal(codes[:, :inner], wanted.data)
            assert not codes[:, inner:].any()
            assert torch.equal(found.scale.cpu(), wanted.scale)


def test_rows_at_the_ends_of_the_range(device):
    tiny, top = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    x = ones(7, 130) * torch.tensor([tiny, tiny * 127, tiny * 126, top, 2.0**-149, 0, -0.0])[:, None]
    found, wanted = KERNEL.quantize(x.to(device), ACTIVATION, None), quantize(x, ACTIVATION)
    assert torch.equal(found.data.cpu()[:, :130], wanted.codes)
    assert torch.equal(found.scale.cpu(), wanted.scale)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_rows_that_are_not_finite_do_not_pass_for_numbers(device):
    x = cases.rows(8, 300, torch.float32)
    x[2, 7], x[4, 299], x[6, 0] = float("nan"), float("inf"), -float("inf")
    packed = cases.weight(33, 300, TensorFormat(4))
    found = run(device, x, packed, ACTIVATION)
    finite = torch.tensor([0, 1, 3, 5, 7])
    assert torch.equal(found[finite], cases.oracle(x[finite], packed, ACTIVATION))
    assert not found[[2, 4, 6]].isfinite().all(1).any()


def corrections(sizes, ranks, count, seed):
    """Two modalities whose rows meet within a tile, and rows of neither."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    for rows in (order[: count // 2], order[count // 2 : count - count // 4]):
        rights = [
            torch.randn(rank, size, generator=generator).bfloat16() if rank else None
            for rank, size in zip(ranks, sizes, strict=True)
        ]
        yield rows, torch.randn(len(rows), sum(ranks), generator=generator).bfloat16(), rights


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 40, 300])
@pytest.mark.parametrize("bits", [4, 8])
def test_corrected_rows_against_float64(device, sizes, count, bits):
    out = sum(sizes)
    x, packed = cases.rows(count, 100, torch.bfloat16), cases.weight(out, 100, TensorFormat(bits))
    bias = torch.randn(out, generator=torch.Generator().manual_seed(5))
    held = KERNEL.prepare(moved(packed, device), ACTIVATION)
    quantized = KERNEL.quantize(x.to(device), ACTIVATION, None)
    given = {"bias": bias.to(device), "addend": None, "dtype": torch.float32}
    base = KERNEL.gemm(quantized, held, **given).cpu()
    for ranks in RANKS[len(sizes)]:
        terms, wanted, magnitude = [], base.double(), base.double().abs() + bias.abs()
        neither = torch.ones(count, dtype=torch.bool)
        for rows, u, rights in corrections(sizes, ranks, count, 6):
            on_device = [None if right is None else right.to(device) for right in rights]
            factors = KERNEL.prepare_factors(on_device, sizes, ACTIVATION)
            terms.append(LowRank(rows.to(device), u.to(device), factors))
            neither[rows] = False
            parts = zip(u.double().split(ranks, dim=1), rights, sizes, strict=True)
            dense = [(u_j, torch.zeros(0, size) if right is None else right) for u_j, right, size in parts]
            wanted[rows] += torch.cat([u_j @ right.double() for u_j, right in dense], dim=1)
            magnitude[rows] += torch.cat([u_j.abs() @ right.double().abs() for u_j, right in dense], dim=1)
        found = KERNEL.gemm(quantized, held, **given, low_rank=terms).cpu()
        assert ((found.double() - wanted).abs() <= (2 * max(ranks) + 4) * 2**-23 * magnitude + 1e-30).all()
        assert torch.equal(found[neither], base[neither])


def test_corrected_tiles_only_touch_their_factors(device):
    """Of rows of text alone: they keep every bit even where the factors are not numbers."""
    x, packed = cases.rows(600, 100, torch.bfloat16), cases.weight(64, 100, TensorFormat(4))
    held, quantized = KERNEL.prepare(moved(packed, device), ACTIVATION), KERNEL.quantize(x.to(device), ACTIVATION, None)
    given = {"bias": None, "addend": None, "dtype": torch.bfloat16}
    factors = KERNEL.prepare_factors([ones(40, 64, float("nan")).bfloat16().to(device)], [64], ACTIVATION)
    for rows in (torch.arange(9), torch.arange(0)):
        term = LowRank(rows.to(device), ones(len(rows), 40).bfloat16().to(device), factors)
        found = KERNEL.gemm(quantized, held, **given, low_rank=[term])
        assert torch.equal(found[300:], KERNEL.gemm(quantized, held, **given)[300:])
        assert bool(found.isnan().any()) == bool(len(rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_added_rows_in_any_dtype_and_number(device, dtype):
    packed, x = cases.weight(48, 192, TensorFormat(8)), cases.rows(70, 192, dtype)
    for share in (0.0, 0.1, 1.0):
        given = {"add": cases.addend(70, 48, share, dtype), "bias": torch.randn(48), "dtype": dtype}
        assert torch.equal(run(device, x, packed, ACTIVATION, **given), cases.oracle(x, packed, ACTIVATION, **given))
    whole = RowAddend(torch.arange(70), (torch.randn(70, 48),))
    assert torch.equal(run(device, x, packed, ACTIVATION, add=whole), cases.oracle(x, packed, ACTIVATION, add=whole))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_projected_on_the_first_factor(device, ops, dtype):
    x, left = cases.rows(90, 300, dtype) / 100, torch.randn(300, 37).to(dtype)
    smooth, rows = cases.smoothing(90, 300, 3), torch.randperm(90)[:70]
    for given in (smooth, None):
        vectors = (None, None) if given is None else (given.inverse.to(device), given.rows.to(device))
        u = ops.low_rank_down(x.to(device), rows.to(device), *vectors, left.to(device)).cpu()
        smoothed = cases.ReferenceKernel().smooth(x, rows, given).double()
        exact, magnitude = smoothed @ left.double(), smoothed.abs() @ left.double().abs()
        assert u.dtype == dtype
        assert ((u.double() - exact).abs() <= 304 * 2.0**-23 * magnitude + UNITS[dtype] * exact.abs() + 2.0**-25).all()
    assert ops.low_rank_down(x.to(device), rows[:0].to(device), None, None, left.to(device)).shape == (0, 37)


def check_codes(codes, scale, exact, slack):
    """Codes of rows known in float64: nearest but within ``slack`` (relative to the largest value of a row) of a tie."""
    inner, highest = exact.shape[1], exact.abs().amax(1, keepdim=True)
    scale = scale.cpu().double()
    assert ((scale * ACTIVATION.qmax - highest).abs() <= slack * highest)[highest > 1e-30].all()
    error = (codes.cpu()[:, :inner].double() - exact / scale).abs()
    assert (error <= 0.5 + 2 * ACTIVATION.qmax * slack).all()
    assert not codes[:, inner:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_rows_under_the_norm(device, ops, dtype, residual):
    for count, inner in ((1, 1), (5, 130), (37, 576)):
        x, other, gamma = (part.to(dtype) for part in (*torch.randn(2, count, inner), torch.rand(inner) + 0.5))
        smooth, keep = cases.smoothing(count, inner, 3), torch.arange(count) % 3 == 0
        inverse = smooth.inverse[smooth.rows].double()
        arguments = (x, other if residual else None, gamma, 1e-6, smooth.inverse, smooth.rows, keep, 127)
        codes, scale, summed, normed = ops.norm_smooth_quantize(*(moved(one, device) for one in arguments))
        total = x + other if residual else x
        assert torch.equal(summed.cpu(), total) if residual else not summed.numel()
        exact = torch.nn.functional.rms_norm(total.double(), (inner,), gamma.double(), 1e-6)
        check_codes(codes, scale, exact * inverse, (inner + 16) * 2.0**-24)
        bound = (UNITS[dtype] + (inner + 16) * 2.0**-24) * exact.abs()
        assert ((normed.cpu().double() - exact).abs() <= bound)[keep].all()
        assert normed.cpu()[~keep].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_silu_times_up(device, ops, dtype):
    for count, inner in ((1, 1), (5, 130), (37, 576)):
        both = (torch.randn(count, 2 * inner) * 4).to(dtype)
        gate, up = both.to(device).split(inner, dim=1)
        smooth = cases.smoothing(count, inner, 3)
        codes, scale = ops.silu_mul_smooth_quantize(gate, up, smooth.inverse.to(device), smooth.rows.to(device), 127)
        exact = torch.nn.functional.silu(both[:, :inner].double()) * both[:, inner:].double()
        check_codes(codes, scale, exact * smooth.inverse[smooth.rows].double(), 16 * 2.0**-24)
        bare, _ = ops.silu_mul_smooth_quantize(gate, up, None, None, 127)
        check_codes(bare, _, exact, 16 * 2.0**-24)


def test_integers_in_a_compiled_graph(device, ops):
    """One graph without a break, and shapes that need no data."""
    packed = moved(cases.weight(48, 192, TensorFormat(4)), device)
    held = KERNEL.prepare(packed, ACTIVATION)

    def layer(x):
        codes, scale = ops.smooth_quantize(x, None, None, 127)
        rest = (held.tensors["codes"], held.tensors["scale"], None, None, None, [], [], [], [], True, x.dtype)
        return ops.multiply_codes(codes, scale, *rest)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (5, 9):
        x = cases.rows(count, 192, torch.bfloat16).to(device)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("count", [1, 300])
def test_a_captured_graph_reads_what_is_new(count):
    packed, held = cases.weight(48, 1024, TensorFormat(4)), None
    x, smooth = cases.rows(count, 1024, torch.bfloat16).cuda(), moved(cases.smoothing(count, 1024, 3), "cuda")
    added = moved(cases.addend(count, 48, 0.5, torch.bfloat16), "cuda")
    held = KERNEL.prepare(moved(packed, "cuda"), ACTIVATION)

    def layer():
        quantized = KERNEL.quantize(x, ACTIVATION, smooth)
        return KERNEL.gemm(quantized, held, bias=None, addend=added, dtype=torch.bfloat16)

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer()
    for seed in (5, 6):
        x.copy_(cases.rows(count, 1024, torch.bfloat16, seed))
        graph.replay()
        assert torch.equal(found, layer())


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


def test_the_stored_factors_come_back():
    for sizes in SIZES:
        for ranks in RANKS[len(sizes)]:
            for _, _, rights in corrections(sizes, ranks, 4, 0):
                factors = KERNEL.prepare_factors(rights, sizes, ACTIVATION)
                for found, wanted in zip(KERNEL.restore_factors(factors), rights, strict=True):
                    assert (found is None) == (wanted is None)
                    assert found is None or torch.equal(found, wanted)
    assert KERNEL.prepare_factors([torch.ones(3, 4)], [4], ACTIVATION) is None
    assert KERNEL.prepare_factors([None, None], [4, 4], ACTIVATION) is None
    assert KERNEL.prepare_factors([torch.ones(3, 4).bfloat16()], [4], None) is None


def test_splits_give_every_processor_work_and_no_more():
    tile = choose(90, True, 1)
    for outputs, inner, wanted in ((37888, 3584, 1), (3584, 3584, 4), (3584, 18944, 8), (512, 256, 1), (4608, 3584, 4)):
        assert num_splits(tile, 1, outputs, inner, 132) == wanted
    assert num_splits(choose(90, True, 65), 65, 64, 18944, 132) == 1


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    reasons = KERNEL.not_supported_reasons(dataclasses.replace(SPEC, **changes))
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]


def test_reasons_of_machines(monkeypatch):
    from masq.kernels.triton import kernel

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
