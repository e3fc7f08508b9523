"""Packed linears against bf16 on this processor: the shapes of Qwen2.5-VL 3B and 7B, from one row to many.

Every alternative is checked against the reference kernel before it is timed. ``full`` is what a layer does: smooth,
quantize, multiply, scale; ``gemm`` has its input quantized beforehand. Torch's own operations and torchao stand beside
them, multiplication alone where they offer no more. With few rows the calls go through many copies of the weight, as
a model goes through its layers, so that no cache holds them.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.nn import functional

from experiments.bench.interleaved import interleave
from masq.files import atomic_write_bytes, atomic_write_json
from masq.kernels import KERNELS
from masq.kernels.base import Kernel, LinearSpec, PreparedWeight, RowSmoothing
from masq.kernels.reference import ReferenceKernel
from masq.numerics.affine import quantize
from masq.numerics.packing import PackedWeight, pack
from masq.numerics.scheme import LinearFormat, Scheme
from masq.report.provenance import library_version, provenance

log = logging.getLogger(__name__)

# Input and output channels; q, k, v and gate, up as one, as they run.
SHAPES = {
    "3B q|k|v": (2048, 2560),
    "3B o": (2048, 2048),
    "3B gate|up": (2048, 22016),
    "3B down": (11008, 2048),
    "7B q|k|v": (3584, 4608),
    "7B o": (3584, 3584),
    "7B gate|up": (3584, 37888),
    "7B down": (18944, 3584),
}
ROWS = (1, 16, 256, 2048)
SCHEMES = ("w8a8", "w4a8", "w4a16")
BASE = "bf16 F.linear"
COPIED_BYTES = 400_000_000
"""Of bf16 copies of one weight, together: more than a last-level cache keeps for one process."""
SLOWEST = 4.0
"""Seconds of one call beyond which an alternative is not timed."""
FLOAT_BOUND = 1e-2
"""Relative Frobenius error against the reference that an alternative with bf16 products may have."""

Calls = dict[str, Callable[[], torch.Tensor]]


class Case:
    """One linear with so many rows: its input, and its weight in every layout, in several copies."""

    def __init__(self, num_rows: int, in_features: int, out_features: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(num_rows, in_features, generator=generator).bfloat16()
        weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
        self.inverse = torch.rand(3, in_features, generator=generator) + 0.5
        self.modality = torch.arange(num_rows) * 3 // max(num_rows, 1)
        self.smoothing = RowSmoothing(self.inverse, self.modality)
        few = num_rows <= 16
        self.copies = min(max(2, COPIED_BYTES // (2 * weight.numel())), 40) if few else 1
        self.dense = [weight.bfloat16().clone() for _ in range(self.copies)]
        self.packed = {name: pack(quantize(weight, _format(name).weight)) for name in SCHEMES}

    def turns(self, made: list[Any]) -> Callable[[], Any]:
        """The next copy, at every call another."""
        return itertools.cycle(made).__next__


def _format(name: str) -> LinearFormat:
    scheme = Scheme.preset(name)
    assert scheme.weight is not None
    return LinearFormat(scheme.weight, scheme.activation)


def kernel_calls(case: Case, kernel: Kernel, scheme: str) -> Calls:
    """``full`` and ``gemm`` of one kernel; nothing if it cannot run this linear here."""
    fmt, packed = _format(scheme), case.packed[scheme]
    spec = LinearSpec(packed.in_features, packed.out_features, fmt, "cpu")
    if kernel.not_supported_reasons(spec):
        return {}
    held = [kernel.prepare(_clone(packed), fmt.activation) for _ in range(case.copies)]
    following = case.turns(held)

    def multiply(activation: Any, weight: PreparedWeight) -> torch.Tensor:
        return kernel.gemm(activation, weight, bias=None, addend=None, dtype=torch.bfloat16)

    def full() -> torch.Tensor:
        return multiply(kernel.quantize(case.x, fmt.activation, case.smoothing), following())

    ready = kernel.quantize(case.x, fmt.activation, case.smoothing)
    name = f"{scheme} {kernel.name}"
    return {f"{name}, full": full, f"{name}, gemm": lambda: multiply(ready, following())}


def _clone(weight: PackedWeight) -> PackedWeight:
    zero = None if weight.zero_point is None else weight.zero_point.clone()
    return PackedWeight(weight.codes.clone(), weight.scale.clone(), zero, weight.format, weight.in_features)


def torch_calls(case: Case) -> Calls:
    """Torch's own operations on the same codes: products alone, which an int8 one leaves unscaled."""
    codes = quantize(case.x.float(), _format("w8a8").activation).codes  # type: ignore[arg-type]
    eights = case.turns([case.packed["w8a8"].codes.clone().t() for _ in range(case.copies)])
    calls: Calls = {"torch._int_mm, gemm": lambda: torch._int_mm(codes, eights())}  # pyright: ignore[reportPrivateImportUsage]
    return calls | _qlinear(case, codes) | _int4pack(case) | _torchao(case)


def _torchao(case: Case) -> Calls:
    """Its dynamic int8 layer as it is called; nothing where it is not installed (it is not a dependency)."""
    try:
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )
    except ImportError:
        return {}
    made = []
    for dense in case.dense:
        layer = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, dtype=torch.bfloat16)
        layer.weight = torch.nn.Parameter(dense.clone(), requires_grad=False)
        holder = torch.nn.Sequential(layer)
        quantize_(holder, Int8DynamicActivationInt8WeightConfig())
        made.append(holder)
    following = case.turns(made)
    return {"torchao int8 dynamic, full": lambda: following()(case.x)}


def _qlinear(case: Case, codes: torch.Tensor) -> Calls:
    # Signed codes without AMX run in a loop of the reference implementation: half a minute a call.
    if not torch.cpu._is_amx_tile_supported():
        return {}
    scale = case.packed["w8a8"].scale.flatten()
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    prepack, linear = torch.ops.onednn.qlinear_prepack, torch.ops.onednn.qlinear_pointwise
    weights = [prepack(case.packed["w8a8"].codes.clone(), list(codes.shape)) for _ in range(case.copies)]
    following = case.turns(weights)
    rest = (scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return {"onednn.qlinear, gemm": lambda: linear(codes, 1.0, 0, following(), *rest)}


def _int4pack(case: Case) -> Calls:
    group = 128
    generator = torch.Generator().manual_seed(1)
    out, inner = case.packed["w4a16"].out_features, case.packed["w4a16"].in_features
    codes = torch.randint(0, 16, (out, inner), dtype=torch.int32, generator=generator)
    scales = torch.rand(inner // group, out, 2, generator=generator).bfloat16()
    pack_op = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    following = case.turns([pack_op(codes, 1) for _ in range(case.copies)])
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return {"torch int4pack (g128), full": lambda: multiply(case.x, following(), group, scales)}


def check(case: Case, calls: Calls, scheme: str) -> None:
    """Compare the whole layer with the reference kernel before anything is timed.

    Raises:
        AssertionError: integer products that are not the reference's to the last bit, or float ones beyond the bound.
    """
    reference, fmt = ReferenceKernel(), _format(scheme)
    activation = reference.quantize(case.x, fmt.activation, case.smoothing)
    held = reference.prepare(case.packed[scheme], fmt.activation)
    wanted = reference.gemm(activation, held, bias=None, addend=None, dtype=torch.bfloat16)
    for name, call in calls.items():
        found = call()
        if fmt.activation is not None:
            assert torch.equal(found, wanted), name
        else:
            error = (found.float() - wanted.float()).norm() / wanted.float().norm()
            assert error < FLOAT_BOUND, (name, float(error))


@torch.inference_mode()
def measure(shape: str, num_rows: int, budget: float) -> list[dict[str, Any]]:
    """Time every alternative on one linear."""
    case = Case(num_rows, *SHAPES[shape])
    dense = case.turns(case.dense)
    calls: Calls = {BASE: lambda: functional.linear(case.x, dense())}
    for scheme, kernel in itertools.product(SCHEMES, ("cpu", "torch")):
        own = kernel_calls(case, KERNELS.get(kernel)(), scheme)
        check(case, own, scheme)
        calls |= own
    calls |= torch_calls(case)
    found = interleave(_without_slow(calls), BASE, budget)
    operations = 2 * num_rows * SHAPES[shape][0] * SHAPES[shape][1]
    return [
        {"shape": shape, "rows": num_rows, "name": name, **asdict(one), "gops": operations / one.seconds / 1e9}
        for name, one in found.items()
    ]


def _without_slow(calls: Calls) -> Calls:
    """Leave out what takes longer than ``SLOWEST`` for one call."""
    kept = {}
    for name, call in calls.items():
        started = time.perf_counter()
        call()
        if time.perf_counter() - started <= SLOWEST:
            kept[name] = call
    return kept


def render(found: dict[str, Any]) -> str:
    """A Markdown table for every number of rows: alternatives down, shapes across, ratios to bf16."""
    parts = []
    shapes = list(dict.fromkeys(cell["shape"] for cell in found["cells"]))
    for rows in dict.fromkeys(cell["rows"] for cell in found["cells"]):
        cells = {(c["name"], c["shape"]): c for c in found["cells"] if c["rows"] == rows}
        body = [
            [name, *(_entry(cells.get((name, shape))) for shape in shapes)]
            for name in dict.fromkeys(n for n, _ in cells)
        ]
        title = f"**{rows} row{'s' if rows > 1 else ''}**"
        parts.append(f"{title}\n\n{tabulate(body, ['', *shapes], tablefmt='github', disable_numparse=True)}")
    made = found["provenance"]
    about = (
        "Times faster than bf16 `F.linear` in the same round: median (20th-80th percentile); for bf16 itself "
        f"milliseconds. {made['threads']} threads on {made['device_name']}, torch {made['libraries']['torch']}; "
        "`python -m experiments.bench.linears`."
    )
    return "\n\n".join([*parts, about]) + "\n"


def _entry(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if cell["name"] == BASE:
        return f"{1e3 * cell['seconds']:.3g} ms"
    return f"{cell['ratio']:.2f} ({cell['low']:.2f}-{cell['high']:.2f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for one linear with one number of rows")
    parser.add_argument("--output", type=Path, default=Path("results/bench/linears.json"))
    parser.add_argument("--table", type=Path, default=Path("results/tables/linears.md"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    made = provenance(0, {}, device="cpu")
    made["libraries"]["torchao"] = library_version("torchao")
    found: dict[str, Any] = {"provenance": made, "cells": []}
    for shape, rows in itertools.product(options.shapes, options.rows):
        cells = measure(shape, rows, options.budget)
        found["cells"] += cells
        atomic_write_json(options.output, found)
        atomic_write_bytes(options.table, render(found).encode())
        log.info("%s, %d rows: %s", shape, rows, {c["name"]: round(c["ratio"], 2) for c in cells if c["name"] != BASE})


if __name__ == "__main__":
    main()
