"""Triton kernels where they are used: in layers, in compiled and in captured graphs; in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from masq.finished import load_finished
from masq.models.zoo import nano
from masq.modules import stack as modules
from masq.modules.fused import fuse_blocks
from masq.numerics.scheme import TensorFormat
from tests.kernels import cases
from tests.kernels.interpreting import (
    ACTIVATION,
    KERNEL,
    moved,
)
from tests.kernels.layers import check_layers_behind_a_norm_and_a_gate, check_layers_that_share_an_input
from tests.models.test_step_graph import NEW_TOKENS, answers
from tests.modules.test_fused import packed, splits  # noqa: F401

OPERATIONS = [
    "smooth_quantize",
    "silu_mul_smooth_quantize",
    "norm_smooth_quantize",
    "multiply_codes",
]


def test_layers_in_a_compiled_graph(triton_device, launches):
    """One graph without a break, and shapes that need no data."""
    packed = moved(cases.weight(48, 192, TensorFormat(4)), triton_device)
    held = KERNEL.prepare(packed, ACTIVATION)

    def layer(x):
        codes, scale = launches.smooth_quantize(x, 127, 127.0)[:2]
        rest = (held.tensors["codes"], held.tensors["scale"], None, None, None, [], [], [], [], True, x.dtype)
        return launches.multiply_codes(codes, scale, *rest)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (5, 9):
        x = cases.rows(count, 192, torch.bfloat16).to(triton_device)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("name", OPERATIONS)
def test_layers_of_operations_that_torch_checks(triton_device, launches, name):
    """Schema, what is returned without data, and dynamic shapes, by torch's own test of operations."""
    x, smooth = cases.rows(5, 192, torch.bfloat16).to(triton_device), moved(cases.smoothing(5, 192, 3), triton_device)
    held = KERNEL.prepare(moved(cases.weight(48, 192, TensorFormat(4)), triton_device), ACTIVATION)
    ends, take = (127, 127.0), moved(cases.selection(5), triton_device)
    codes, scale, _ = launches.smooth_quantize(x, *ends, smooth.inverse, smooth.rows)
    wanted = {"rows": take.rows, "places": take.places}
    weight = (held.tensors["codes"], held.tensors["scale"], None, None, None)
    arguments = {
        "smooth_quantize": ((x, *ends, smooth.inverse, smooth.rows), wanted),
        "multiply_codes": ((codes, scale, *weight, [], [], [], [], True, torch.float32), {}),
        "silu_mul_smooth_quantize": ((x, x, *ends, smooth.inverse), {}),
        "norm_smooth_quantize": ((x, x, x[0], 1e-6, *ends, smooth.inverse, smooth.rows, x[:2], None), wanted),
    }
    assert sorted(arguments) == sorted(OPERATIONS)
    torch.library.opcheck(getattr(launches, name), *arguments[name])


@pytest.mark.parametrize("coded", [False, True])
def test_layers_that_share_an_input(triton_device, monkeypatch, coded):
    check_layers_that_share_an_input(KERNEL, triton_device, ACTIVATION, coded, monkeypatch)


def test_layers_behind_a_norm_and_a_gate(triton_device, monkeypatch):
    check_layers_behind_a_norm_and_a_gate(KERNEL, triton_device, ACTIVATION, monkeypatch)


def test_layers_of_a_model_that_decodes_by_graphs(triton_device, splits, tmp_path, monkeypatch):  # noqa: F811
    """Norms, gates and corrections fused: a step asks nothing of the processor, and says what the reference says."""
    samples = nano.random_samples(("vision", "audio"), 1)
    wanted = packed(splits, tmp_path, "reference")
    batch = wanted.encode(samples, with_answer=False)
    monkeypatch.setattr(modules, "select", lambda *_: KERNEL)
    adapter = load_finished(next(tmp_path.glob("*/record.json")).parent, device=triton_device)
    assert fuse_blocks(adapter.blocks())
    found, replay = answers(adapter, adapter.encode(samples, with_answer=False))
    assert replay.num_replayed > 0
    assert found == wanted.generate(batch, NEW_TOKENS)


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
