"""Table 7 of MASQuant (arXiv 2603.04800): prefill of 2048 tokens with the blocks of Qwen2.5-VL 7B, and their memory.

bf16, one smoothing factor for all (which norms absorb), and one for each modality with corrections of three ranks, in
turn in one process. Weights are random; two thirds of the tokens are vision. On a GPU the whole decoder runs, batches
of 1 and 8; on a processor one block and a batch of 1. The paper's numbers are of an RTX 4090 at W4A4, whole model.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from experiments.bench.interleaved import interleave
from experiments.bench.packed_model import (
    BASE,
    SHAPES,
    TEXT_SHARE,
    fused_decoder,
    linear_bytes,
    packed_decoder,
    random_decoder,
)
from masq.experiment.reported import reported
from masq.files import atomic_write_bytes, atomic_write_json
from masq.models.base import Modality
from masq.models.decoder import LlamaBlock
from masq.modules.modality import ModalityContext
from masq.report.provenance import provenance

log = logging.getLogger(__name__)

SHAPE, PREFILL, LAYERS = "7B", 2048, 28
RANK_RATIOS = (0.01, 0.02, 0.05)
SHARED, FUSED = "shared factor", ", fused"
FUSED_ROWS = (SHARED, "rank ratio 0.02")
"""Rows that there are once more with norms and gates fused."""


def names(scheme: str) -> dict[str, tuple[float, bool]]:
    """Rows of a scheme: rank ratio, and whether factors go by modality."""
    return {f"{scheme}, {SHARED}": (0.0, False)} | {f"{scheme}, rank ratio {r}": (r, True) for r in RANK_RATIOS}


@torch.inference_mode()
def measure(schemes: list[str], device: str, num_blocks: int, batch: int, budget: float) -> list[dict[str, Any]]:
    """Time and memory of every row.

    Args:
        schemes: of the packed rows.
        device: of all tensors.
        num_blocks: of the decoder.
        batch: sequences of ``PREFILL`` tokens.
        budget: seconds of timing.
    """
    context = ModalityContext()
    decoder = random_decoder(SHAPE, num_blocks).to(device)
    ids = torch.zeros(batch, PREFILL, dtype=torch.int8, device=device)
    ids[:, int(TEXT_SHARE * PREFILL) :] = int(Modality.VISION)
    context.set(ids)
    hidden = torch.randn(batch, PREFILL, SHAPES[SHAPE]["hidden_size"], device=device).bfloat16()
    models = {BASE: decoder}
    for scheme in schemes:
        for name, (ratio, by_modality) in names(scheme).items():
            models[name] = packed_decoder(decoder, scheme, ratio, context, by_modality=by_modality)
        for name in [f"{scheme}, {row}" for row in FUSED_ROWS]:
            models[name + FUSED] = fused_decoder(models[name])
    found = interleave({name: _prefill(model, hidden) for name, model in models.items()}, BASE, budget)
    cells = []
    for name, timing in found.items():
        blocks = [LlamaBlock(layer, models[name].config) for layer in models[name].layers]
        memory = linear_bytes(blocks)
        kernels = sorted(getattr(models[name], "kernels", ()))
        cell = {"batch": batch, "blocks": num_blocks, "name": name, "kernels": kernels}
        cells.append({**cell, **asdict(timing), "bytes": memory})
    return cells


def _prefill(model: Any, hidden: torch.Tensor) -> Callable[[], Any]:
    """One prefill; on a GPU a CUDA graph of it, so that what is timed is the GPU and not Python's launches."""

    def call() -> None:
        model(inputs_embeds=hidden, use_cache=False)

    if not hidden.is_cuda:
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def render(found: dict[str, Any]) -> str:
    """A Markdown table, the paper's speed-up and memory saving beside ours."""
    rows = []
    for cell in found["cells"]:
        base = next(c for c in found["cells"] if c["name"] == BASE and c["batch"] == cell["batch"])
        rows.append(
            [cell["batch"], cell["name"], f"{1e3 * cell['seconds']:.4g}"]
            + [f"{cell['ratio']:.2f} ({cell['low']:.2f}-{cell['high']:.2f})"]
            + [f"{cell['bytes'] / 2**20 / cell['blocks']:.1f}", f"{base['bytes'] / cell['bytes']:.2f}"]
            + _paper(cell["batch"], cell["name"])
        )
    headings = ["batch", "", "ms", "times faster", "MiB of a block", "times smaller"]
    headings += ["paper: times faster", "times smaller"]
    body = tabulate(rows, headings, tablefmt="github", disable_numparse=True)
    made = found["provenance"]
    about = (
        f"Prefill of {PREFILL} tokens, {found['cells'][0]['blocks']} of {LAYERS} blocks of the 7B shape on "
        f"{made['device_name']}, {made['threads']} threads, torch {made['libraries']['torch']}, kernel "
        f"`{'`, `'.join(dict.fromkeys(k for cell in found['cells'] for k in cell['kernels']))}`; "
        "`python -m experiments.bench.table7`. The paper: whole model at W4A4 on an RTX 4090."
    )
    return f"{body}\n\n{about}\n"


def _paper(batch: int, name: str) -> list[str]:
    """What the paper reports for a row: speed-up over FP16 and memory saving."""
    if name == BASE:
        return ["1", "1"]
    name = name.removesuffix(FUSED)
    method = "MBQ" if name.endswith(SHARED) else f"MASQuant rank_ratio={name.rsplit(' ', 1)[-1]}"
    benchmark = f"prefill seq{PREFILL} batch{batch} RTX4090"
    found = [c.value for c in reported("table7") if (c.method, c.benchmark) == (method, benchmark)]
    metrics = [c.metric for c in reported("table7") if (c.method, c.benchmark) == (method, benchmark)]
    by_metric = dict(zip(metrics, found, strict=True))
    return [f"{by_metric[key]:g}" if key in by_metric else "-" for key in ("speedup_x", "memory_saving_x")]


def main() -> None:
    """Command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w4a8", "w4a4"])
    parser.add_argument("--blocks", type=int, default=LAYERS if on_gpu else 1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8] if on_gpu else [1])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for one batch size")
    parser.add_argument("--output", type=Path, default=Path("results/bench/table7.json"))
    parser.add_argument("--table", type=Path, default=Path("results/tables/table7.md"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    found: dict[str, Any] = {"provenance": provenance(0, {}, device=options.device), "cells": []}
    for batch in options.batches:
        found["cells"] += measure(options.schemes, options.device, options.blocks, batch, options.budget)
        atomic_write_json(options.output, found)
        atomic_write_bytes(options.table, render(found).encode())
    print(render(found))


if __name__ == "__main__":
    main()
