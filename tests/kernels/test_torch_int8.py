"""Torch's own operations: exact integers with any instruction set, float products within a bound, nothing slow."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from masq.kernels import torch_int8
from masq.kernels.base import LinearSpec
from masq.kernels.torch_int8 import FEW_ROWS, TorchKernel, has_fast_qlinear
from masq.numerics import integer_gemm
from masq.numerics.affine import quantize
from masq.numerics.integer_gemm import MAX_INNER, has_exact_int_mm
from masq.numerics.packing import unpack
from masq.numerics.scheme import LinearFormat, TensorFormat
from tests.kernels import cases

KERNEL = TorchKernel()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNITS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
GROUPED = [
    TensorFormat(4, granularity="per_group", group_size=32),
    TensorFormat(4, symmetric=False, granularity="per_group", group_size=64),
    TensorFormat(3, symmetric=False, granularity="per_group", group_size=32),
    TensorFormat(4, symmetric=False, granularity="per_group", group_size=24),
    TensorFormat(8, symmetric=False, granularity="per_group", group_size=64),
]
FLOATS = [*(TensorFormat(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)), *GROUPED]


def forget() -> None:
    has_exact_int_mm.cache_clear()
    has_fast_qlinear.cache_clear()


@pytest.fixture(params=["amx", "vnni", "neither"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A processor that offers this much and no more, as torch would describe it; the real one must have it."""
    probes = {"_is_amx_tile_supported": request.param == "amx", "_is_vnni_supported": request.param != "neither"}
    for probe, wanted in probes.items():
        if wanted and not getattr(torch.cpu, probe)():
            pytest.skip(f"this processor has no {request.param}")
        monkeypatch.setattr(torch.cpu, probe, lambda wanted=wanted: wanted)
    forget()
    yield request.param
    forget()


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (3, 6), (2, 4)], ids=str)
def test_integers_equal_the_reference_to_the_last_bit(processor, shape, bits):
    cases.check_equals_reference(partial(cases.run, KERNEL), shape, bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", [1, 40])
def test_the_largest_sums_neither_overflow_nor_saturate(processor, bits, count):
    inner = 18944
    fmt = TensorFormat(bits)
    packed = cases.pack(quantize(torch.ones(9, inner) * torch.tensor([1.0, -1.0] * 5)[:9, None], fmt))
    x = torch.full((count, inner), 127.0)  # so that the scale is one
    found = cases.run(KERNEL, x, packed, cases.per_token(8))
    exact = torch.tensor(127 * fmt.qmax * inner).float() * packed.scale[:, 0] * torch.tensor([1.0, -1.0] * 5)[:9]
    assert torch.equal(found, exact.expand(count, 9))


def test_each_processor_takes_its_own_product(processor, monkeypatch):
    """Without AMX oneDNN multiplies signed codes in a plain loop; without VNNI torch's own product may saturate."""
    calls = []
    for module, name in ((torch_int8, "_qlinear"), (integer_gemm, "_int_mm"), (integer_gemm, "float_matmul")):
        before = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, before=before, name=name: (calls.append(name), before(*a))[1])
    packed = cases.weight(33, 64, TensorFormat(8))
    prepared = KERNEL.prepare(packed, cases.per_token(8))
    calls.clear()  # of the probes
    activation = KERNEL.quantize(cases.rows(5, 64, torch.float32), cases.per_token(8), None)
    KERNEL.gemm(activation, prepared, bias=None, addend=None, dtype=torch.float32)
    used = set(calls)
    assert used - {"_int_mm" if processor == "vnni" else ""} <= {"_qlinear", "float_matmul"}
    wanted = {"amx": "_qlinear", "vnni": "_int_mm", "neither": "float_matmul"}[processor]
    assert wanted in used
    assert (processor == "amx") == ("_qlinear" in used)
    assert prepared.num_bytes == 33 * 64 + 33 * 4


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_a_library_that_ignores_its_processor_is_found_out(isa):
    """Told to stay below AMX, oneDNN needs half a minute for this product of signed codes, or saturates."""
    program = (
        "import torch, time\n"
        "from tests.kernels import cases\n"
        "from masq.kernels.torch_int8 import TorchKernel\n"
        "from masq.numerics.scheme import TensorFormat\n"
        "packed, x = cases.weight(2048, 2048, TensorFormat(8)), cases.rows(64, 2048, torch.float32)\n"
        "x[5:] = x.abs().amax(1, keepdim=True)[5:]\n"
        "start = time.perf_counter()\n"
        "found = cases.run(TorchKernel(), x, packed, cases.per_token(8))\n"
        "seconds = time.perf_counter() - start\n"
        "exact = cases.exact(x, packed, cases.per_token(8))\n"
        "assert ((found - exact).abs() <= 3.001 * 2.0**-24 * exact.abs()).all()\n"
        "assert seconds < 4, seconds\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def bound_of(x: torch.Tensor, packed, few: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and how far from it the kernel may be before the last rounding."""
    plain = unpack(packed)
    dense, x64 = plain.dequantize(torch.float64), x.double()
    exact = x64 @ dense.t()
    unit = UNITS[x.dtype]
    size = unit * dense.abs()
    if few:
        middle = 0 if packed.zero_point is None else 8
        codes = (plain.codes.double() - middle).abs().unflatten(1, (plain.scale.shape[1], -1))
        zero = torch.zeros_like(plain.scale) if plain.zero_point is None else (plain.zero_point - 8).abs()
        size = unit * ((codes + zero.unsqueeze(-1)) * plain.scale.double().unsqueeze(-1)).flatten(1)
        size += 16 * 2.0**-24 * plain.scale.double().repeat_interleave(codes.shape[2], dim=1)
    bound = x64.abs() @ (size + (x.shape[1] + 4) * 2.0**-24 * dense.abs()).t()
    return exact, bound + unit * (exact.abs() + bound)


@pytest.mark.parametrize("fmt", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "inner"), [(48, 192), (33, 960), (1, 192)])
def test_float_rows_are_close_to_float64(fmt, dtype, out, inner):
    packed = cases.weight(out, inner, fmt)
    prepared = KERNEL.prepare(packed, None)
    for count in (0, 1, 5, FEW_ROWS, FEW_ROWS + 1):
        x = cases.rows(count, inner, dtype) if dtype != torch.float16 else cases.rows(count, inner, dtype) / 100
        few = "int4" in prepared.tensors and dtype == torch.bfloat16 and count <= FEW_ROWS
        exact, bound = bound_of(x, packed, few)
        found = KERNEL.gemm(KERNEL.quantize(x, None, None), prepared, bias=None, addend=None, dtype=torch.float32)
        assert found.shape == (count, out)
        assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("fmt", GROUPED, ids=str)
def test_packed_weights_of_torch_where_it_has_them(fmt):
    known = fmt.bits <= 4 and fmt.group_size in (32, 64)
    assert ("int4" in KERNEL.prepare(cases.weight(48, 192, fmt), None).tensors) == known
    assert "int4" not in KERNEL.prepare(cases.weight(40, 192, fmt), None).tensors
    assert "int4" not in KERNEL.prepare(cases.weight(48, 192, fmt), cases.per_token(8)).tensors
    packed = cases.weight(48, 1536, fmt)
    kept = KERNEL.prepare(packed, None).num_bytes
    assert kept == packed.num_bytes + (48 * 768 + 48 * 1536 // fmt.group_size * 4 if known else 0)


@pytest.mark.parametrize("fmt", [one for one in FLOATS if one in GROUPED or not one.symmetric], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_rows_of_other_weights_are_multiplied_in_float32(fmt, bits):
    packed, activation = cases.weight(33, 960, fmt), cases.per_token(bits)
    x = cases.rows(19, 960, torch.bfloat16)
    quantized = quantize(x.float(), activation)
    exact, bound = bound_of(quantized.codes.float(), packed, few=False)
    scale = quantized.scale.double()
    found = cases.run(KERNEL, x, packed, activation)
    assert ((found - exact * scale).abs() <= (bound + 2.0**-24 * exact.abs()) * scale).all()
    rms = (found - cases.oracle(x, packed, activation)).norm() / found.norm()
    assert rms < 1e-6


def test_a_processor_without_bfloat16_multiplies_in_float32(monkeypatch):
    fmt = TensorFormat(4, symmetric=False, granularity="per_group", group_size=24)
    packed, x = cases.weight(33, 192, fmt), cases.rows(9, 192, torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert torch.allclose(cases.run(KERNEL, x, packed, None), cases.oracle(x, packed, None), rtol=1e-5, atol=0)


def test_blocks_change_nothing(monkeypatch):
    packed = cases.weight(48, 192, TensorFormat(4, symmetric=False))
    x = cases.rows(9, 192, torch.float32)
    whole = cases.run(KERNEL, x, packed, None)
    monkeypatch.setattr(torch_int8, "_BLOCK", 7 * 192)
    # Blocks of another shape may add in another order: twice the bound of a float32 sum of this many terms.
    bound = 2 * (192 + 4) * 2**-24 * (x.abs() @ unpack(packed).dequantize().abs().t())
    assert ((cases.run(KERNEL, x, packed, None) - whole).abs() <= bound).all()


@pytest.mark.parametrize("activation", [None, cases.per_token(8)], ids=str)
@pytest.mark.parametrize("fmt", [*FLOATS, TensorFormat(3), TensorFormat(7, symmetric=False)], ids=str)
@pytest.mark.parametrize("size", [(48, 192), (33, 960)], ids=str)
def test_the_stored_weight_comes_back(processor, fmt, activation, size):
    packed = cases.weight(*size, fmt)
    prepared = KERNEL.prepare(packed, activation)
    for held in (prepared, copy.deepcopy(prepared)):
        found = KERNEL.restore(held)
        assert torch.equal(found.codes, packed.codes)
        assert found.codes.is_contiguous()
        assert torch.equal(found.scale, packed.scale)
        assert (found.zero_point is None) == (packed.zero_point is None)
        assert found.zero_point is None or torch.equal(found.zero_point, packed.zero_point)
        assert (found.format, found.in_features) == (packed.format, packed.in_features)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_added_is_added_in_float32(dtype):
    fmt = TensorFormat(4, symmetric=False, granularity="per_group", group_size=64)
    packed = cases.weight(48, 192, fmt)
    for count in (3, FEW_ROWS + 8):
        x = cases.rows(count, 192, dtype)
        bias, added = torch.randn(48), cases.addend(count, 48, 0.6, torch.bfloat16)
        wanted = cases.run(KERNEL, x, packed, None)
        wanted[added.selected.rows] += torch.cat(added.values, dim=1).float()
        assert torch.equal(
            cases.run(KERNEL, x, packed, None, bias=bias, add=added, dtype=dtype), (wanted + bias).to(dtype)
        )


def test_more_inputs_than_int32_sums_allow_are_refused(processor):
    packed = cases.weight(1, MAX_INNER + 1, TensorFormat(8))
    with pytest.raises(integer_gemm.NumericalError):
        cases.run(KERNEL, torch.ones(1, MAX_INNER + 1), packed, cases.per_token(8))


@pytest.mark.parametrize("fmt", FLOATS, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_runs_everything(fmt, device):
    for activation in (None, cases.per_token(8)):
        assert not KERNEL.not_supported_reasons(LinearSpec(21, 5, LinearFormat(fmt, activation), device))
