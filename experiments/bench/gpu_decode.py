"""One step of decoding behind a long prompt, 7B shapes: bf16 and packed, launched one by one and as a CUDA graph.

The whole decoder with random weights and a cache of fixed size, one sequence; a step is put back by a position when it
ends, so that all of them are alike. For a GPU; elsewhere nothing is captured and steps are only run.
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
from experiments.bench.packed_model import BASE, SHAPES, fused_decoder, packed_decoder, random_decoder
from masq.files import atomic_write_bytes, atomic_write_json
from masq.models.base import Modality
from masq.models.step_graph import Step, cuda_graph
from masq.modules.modality import ModalityContext
from masq.modules.packed_linear import PackedLinear
from masq.report.provenance import provenance

log = logging.getLogger(__name__)

SHAPE, PROMPT, LAYERS = "7B", 2048, 28
SCHEMES, RANK_RATIO = ("w8a8", "w4a8"), 0.05
EAGER, GRAPHED = ", eager", ", graph"


def step_of(decoder: Any, context: ModalityContext, device: str) -> Step:
    """A step behind a prompt that is in the cache, to be called as often as one likes."""
    from transformers import StaticCache

    cache = StaticCache(config=decoder.config, max_cache_len=PROMPT + 1)
    context.set(torch.full((1, PROMPT), int(Modality.TEXT), dtype=torch.int8, device=device))
    hidden = torch.randn(1, PROMPT, SHAPES[SHAPE]["hidden_size"], device=device).bfloat16()
    decoder(inputs_embeds=hidden, past_key_values=cache)
    context.set(torch.full((1, 1), int(Modality.TEXT), dtype=torch.int8, device=device))
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    position = torch.full((3, 1, 1), PROMPT, dtype=torch.int64, device=device)
    seen = torch.ones(1, 1, 1, PROMPT + 1, dtype=torch.bool, device=device)
    layers: list[Any] = list(cache.layers)
    lengths: list[Any] = [layer.cumulative_length for layer in layers]

    def step() -> Any:
        masks = {"full_attention": seen}
        found = decoder(input_ids=token, position_ids=position, attention_mask=masks, past_key_values=cache)
        for one in lengths:
            one.sub_(1)
        return found

    return step


@torch.inference_mode()
def measure(device: str, num_blocks: int, budget: float) -> list[dict[str, Any]]:
    """Time and memory of every row.

    Args:
        device: of all tensors.
        num_blocks: of the decoder.
        budget: seconds of timing.
    """
    context = ModalityContext()
    decoder = random_decoder(SHAPE, num_blocks).to(device)
    models = {BASE: decoder}
    for scheme in SCHEMES:
        # Text alone: corrections cost a step nothing but the memory that they take.
        models[scheme] = packed_decoder(decoder, scheme, RANK_RATIO, context)
        models[f"{scheme}, fused"] = fused_decoder(models[scheme])
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        step = step_of(model, context, device)
        calls[name + EAGER] = _waiting(step, device)
        if device != "cpu":
            step()
            calls[name + GRAPHED] = _waiting(cuda_graph(step, torch.device(device)), device)
    found = interleave(calls, BASE + EAGER, budget)
    cells = []
    for name, timing in found.items():
        model = models[name.removesuffix(EAGER).removesuffix(GRAPHED)]
        size = sum(map(weight_bytes, model.layers))
        kernels = sorted(getattr(model, "kernels", ()))
        cells.append({"blocks": num_blocks, "name": name, "kernels": kernels, **asdict(timing), "bytes": size})
    return cells


def weight_bytes(layer: torch.nn.Module) -> int:
    """What a step of text reads of the linears of a block: weights and their scales, no corrections."""
    packed = {one.stack for one in layer.modules() if isinstance(one, PackedLinear)}
    dense = [one.weight for one in layer.modules() if isinstance(one, torch.nn.Linear)]
    return sum(one.prepare().weight.num_bytes for one in packed) + sum(one.nbytes for one in dense)


def _waiting(step: Step, device: str) -> Step:
    def call() -> None:
        step()
        if device != "cpu":
            torch.cuda.synchronize(device)

    return call


def render(found: dict[str, Any]) -> str:
    """A Markdown table; the last column tells how fast weights are read."""
    rows = [
        [cell["name"], f"{1e3 * cell['seconds']:.4g}", f"{cell['ratio']:.2f} ({cell['low']:.2f}-{cell['high']:.2f})"]
        + [f"{cell['bytes'] / 2**20:.0f}", f"{cell['bytes'] / cell['seconds'] / 1e9:.0f}"]
        for cell in found["cells"]
    ]
    headings = ["", "ms a token", f"times faster than {BASE}{EAGER}", "MiB of weights", "GB of them a second"]
    made = found["provenance"]
    about = (
        f"One step behind {PROMPT} tokens, {found['cells'][0]['blocks']} of {LAYERS} blocks of the {SHAPE} shape on "
        f"{made['device_name']}, torch {made['libraries']['torch']}; `python -m experiments.bench.gpu_decode`."
    )
    return f"{tabulate(rows, headings, tablefmt='github', disable_numparse=True)}\n\n{about}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=LAYERS)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds")
    parser.add_argument("--output", type=Path, default=Path("results/bench/gpu_decode.json"))
    parser.add_argument("--table", type=Path, default=Path("results/tables/gpu_decode.md"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    found = {
        "provenance": provenance(0, {}, device=options.device),
        "cells": measure(options.device, options.blocks, options.budget),
    }
    atomic_write_json(options.output, found)
    atomic_write_bytes(options.table, render(found).encode())
    print(render(found))


if __name__ == "__main__":
    main()
