"""The kernel `triton` against cuBLAS in bf16 on this GPU: the linears of Qwen2.5-VL 3B and 7B, from one row to many.

``gemm`` has its input quantized beforehand, ``full`` smooths and quantizes it as a layer does, ``rank ratio`` adds the
corrections of two thirds of the rows to ``full``. Calls are replayed as CUDA graphs through enough copies of a weight
that no cache holds them; alternatives take turns. Every product is checked against the reference kernel first.
Quantization alone stands beside a copy of its input.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.nn import functional

from experiments.bench.interleaved import interleave
from experiments.bench.linears import SHAPES
from masq.files import atomic_write_bytes, atomic_write_json
from masq.kernels.base import LowRank, PreparedWeight, RowSmoothing, Selection
from masq.kernels.reference import ReferenceKernel
from masq.kernels.triton.kernel import TritonKernel
from masq.numerics.affine import quantize
from masq.numerics.packing import pack
from masq.numerics.scheme import Scheme
from masq.report.provenance import provenance

log = logging.getLogger(__name__)

ROWS = (1, 16, 64, 256, 2048, 8192)
SCHEMES = ("w8a8", "w4a8")
RANK_RATIOS = (0.02, 0.05)
BASE = "bf16 F.linear"
COPY, QUANTIZE = "copy", "smooth and quantize"
CACHE_BYTES = 200_000_000
"""Of weights that one graph goes through: more than the second cache of any GPU."""
CHECKED_ROWS = 64

Calls = dict[str, Callable[[int], torch.Tensor]]


class Case:
    """One linear with so many rows: input, smoothing of two modalities, and copies of its weight."""

    def __init__(self, num_rows: int, in_features: int, out_features: int) -> None:
        torch.manual_seed(0)
        self.num_rows, self.sizes = num_rows, (in_features, out_features)
        self.x = torch.randn(num_rows, in_features, device="cuda").bfloat16()
        self.weight = (torch.randn(out_features, in_features, device="cuda") / in_features**0.5).bfloat16()
        few = num_rows <= CHECKED_ROWS
        self.copies = max(2, min(2 * CACHE_BYTES // self.weight.numel(), 96)) if few else 4
        self.dense = [self.weight.clone() for _ in range(self.copies)]
        modality = (torch.arange(num_rows, device="cuda") * 3 >= num_rows).long()
        self.smoothing = RowSmoothing(torch.rand(2, in_features, device="cuda") + 0.5, modality)
        self.corrected = Selection.of(modality.nonzero().flatten(), num_rows)


def scheme_calls(case: Case, name: str) -> Calls:
    """``gemm``, ``full`` and corrected calls of one scheme, checked."""
    kernel, scheme = TritonKernel(), Scheme.preset(name)
    assert scheme.weight is not None
    packed = pack(quantize(case.weight.float(), scheme.weight))
    copies = (replace(packed, codes=packed.codes.clone()) for _ in range(case.copies))
    held = [kernel.prepare(copy, scheme.activation) for copy in copies]
    ready = kernel.quantize(case.x, scheme.activation, case.smoothing)
    plain: dict[str, Any] = {"bias": None, "addend": None, "dtype": torch.bfloat16}

    def full(at: int) -> torch.Tensor:
        return kernel.gemm(kernel.quantize(case.x, scheme.activation, case.smoothing), held[at], **plain)

    reference, few = ReferenceKernel(), min(case.num_rows, CHECKED_ROWS)
    assert case.smoothing.rows is not None
    some = RowSmoothing(case.smoothing.inverse, case.smoothing.rows[:few])
    quantized = reference.quantize(case.x[:few].contiguous(), scheme.activation, some)
    wanted = reference.gemm(quantized, reference.prepare(packed, scheme.activation), **plain)
    found = full(0)[:few]
    if not torch.equal(found, wanted):
        error = (found.float() - wanted.float()).norm() / wanted.float().norm()
        raise AssertionError((name, case.num_rows, case.sizes, float(error)))
    calls: Calls = {f"{name}, gemm": lambda at: kernel.gemm(ready, held[at], **plain), f"{name}, full": full}
    for ratio in RANK_RATIOS if len(case.corrected) >= CHECKED_ROWS else ():
        calls[f"{name}, rank ratio {ratio}"] = _corrected(case, kernel, scheme, ratio, held)
    return calls


def _corrected(
    case: Case, kernel: TritonKernel, scheme: Scheme, ratio: float, held: list[PreparedWeight]
) -> Callable[[int], torch.Tensor]:
    rank = int(ratio * min(case.sizes))
    left = torch.randn(case.sizes[0], rank, device="cuda").bfloat16() / 99
    right = torch.randn(rank, case.sizes[1], device="cuda").bfloat16() / 99
    factors = kernel.prepare_factors([right], [case.sizes[1]], scheme.activation)
    assert factors is not None
    left = factors.widened(left)

    def call(at: int) -> torch.Tensor:
        quantized = kernel.quantize(case.x, scheme.activation, case.smoothing, case.corrected)
        assert quantized.taken is not None
        term = LowRank(case.corrected, quantized.taken @ left, factors)
        return kernel.gemm(quantized, held[at], bias=None, addend=None, dtype=torch.bfloat16, low_rank=(term,))

    return call


def replayed(call: Callable[[int], torch.Tensor], copies: int) -> Callable[[], None]:
    """``copies`` calls in one CUDA graph; calling it replays and waits."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for at in range(copies):
            call(at)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


@torch.inference_mode()
def measure(shape: str, num_rows: int, budget: float) -> list[dict[str, Any]]:
    """Time every alternative on one linear."""
    case = Case(num_rows, *SHAPES[shape])
    calls: Calls = {BASE: lambda at: functional.linear(case.x, case.dense[at])}
    for name in SCHEMES:
        calls |= scheme_calls(case, name)
    kernel, activation = TritonKernel(), Scheme.preset("w8a8").activation
    calls[COPY] = lambda _: case.x.clone()
    calls[QUANTIZE] = lambda _: kernel.quantize(case.x, activation, case.smoothing).data
    found = interleave({name: replayed(call, case.copies) for name, call in calls.items()}, BASE, budget)
    operations = 2 * num_rows * SHAPES[shape][0] * SHAPES[shape][1]
    return [
        {"shape": shape, "rows": num_rows, "name": name, **asdict(one)}
        | {"seconds": one.seconds / case.copies, "tops": operations * case.copies / one.seconds / 1e12}
        for name, one in found.items()
    ]


def render(found: dict[str, Any]) -> str:
    """A Markdown table for every number of rows: alternatives down, shapes across, ratios to bf16."""
    parts = []
    shapes = list(dict.fromkeys(cell["shape"] for cell in found["cells"]))
    for rows in dict.fromkeys(cell["rows"] for cell in found["cells"]):
        cells = {(c["name"], c["shape"]): c for c in found["cells"] if c["rows"] == rows}
        names = dict.fromkeys(name for name, _ in cells)
        body = [[name, *(_entry(cells.get((name, shape))) for shape in shapes)] for name in names]
        title = f"**{rows} row{'s' if rows > 1 else ''}**"
        parts.append(f"{title}\n\n{tabulate(body, ['', *shapes], tablefmt='github', disable_numparse=True)}")
    made = found["provenance"]
    about = (
        f"Times faster than bf16 `F.linear` in the same round (20th-80th percentile); `{BASE}`, `{COPY}` and "
        f"`{QUANTIZE}` in microseconds. {made['device_name']}, torch {made['libraries']['torch']}, Triton "
        f"{made['libraries']['triton']}; `python -m experiments.bench.gpu_linears`."
    )
    return "\n\n".join([*parts, about]) + "\n"


def _entry(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if cell["name"] in (BASE, COPY, QUANTIZE):
        return f"{1e6 * cell['seconds']:.3g} us"
    return f"{cell['ratio']:.2f} ({cell['low']:.2f}-{cell['high']:.2f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for one linear with one number of rows")
    parser.add_argument("--output", type=Path, default=Path("results/bench/gpu_linears.json"))
    parser.add_argument("--table", type=Path, default=Path("results/tables/gpu_linears.md"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    found: dict[str, Any] = {"provenance": provenance(0, {}, device="cuda"), "cells": []}
    for shape, rows in itertools.product(options.shapes, options.rows):
        cells = measure(shape, rows, options.budget)
        found["cells"] += cells
        atomic_write_json(options.output, found)
        atomic_write_bytes(options.table, render(found).encode())
        log.info("%s, %d rows: %s", shape, rows, {c["name"]: round(c["ratio"], 2) for c in cells})
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
