"""A decoder block of the size of Qwen2.5-VL 3B, and the embedded tri-modal model end to end: packed against bf16.

The block has random weights, smoothing for every modality, and corrections of three ranks; its tokens are one part
text and two parts vision. The model is quantized in closed form (what its weights say changes no time), answers real
questions of the evaluation split, and its memory is what its linears hold.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from experiments.bench.interleaved import interleave
from masq.calibration.data import load_samples
from masq.compose import compose
from masq.files import atomic_write_bytes, atomic_write_json
from masq.finished import load_finished
from masq.models.base import GROUPS, BlockAdapter, EncodedBatch, Modality, ModelAdapter, Role
from masq.models.decoder import LlamaBlock
from masq.models.zoo.smol_omni import data_path
from masq.modules.centres import STORED, Centres
from masq.modules.fused import fuse_blocks
from masq.modules.modality import ModalityContext
from masq.modules.packed_linear import PackedLinear, pack_blocks
from masq.modules.quant_linear import QuantLinear
from masq.numerics.affine import quantize
from masq.numerics.low_rank import Factors, encode
from masq.numerics.scheme import Scheme
from masq.report.provenance import provenance
from masq.run import run

log = logging.getLogger(__name__)

BASE = "bf16"
RANK_RATIOS = (0.0, 0.02, 0.05)
CODED_RATIO = 0.085
"""Of corrections in int8 with the bytes of a ratio of 0.05 in 16 bits, centres and scales included (``masq``)."""
PREFILL = 256
NEW_TOKENS = 32
FUSED_BLOCKS = ("w8a8", "w4a8", "w4a8, rank ratio 0.05")
TEXT_SHARE = 1 / 3
# Decoders of Qwen2.5-VL; vocabulary and vision tower play no part in a block.
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
SHAPES: dict[str, dict[str, Any]] = {
    "3B": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "rope_parameters": ROPE,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 128,
        "rope_parameters": ROPE,
    },
}


def random_decoder(shape: str, num_blocks: int = 1) -> Any:
    """A text model with the blocks of a model of ``SHAPES``, random weights in bf16."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    torch.manual_seed(0)
    config = Qwen2_5_VLTextConfig(**SHAPES[shape], num_hidden_layers=num_blocks)
    return Qwen2_5_VLTextModel(config).bfloat16().eval()


def packed_decoder(
    decoder: Any,
    scheme_name: str,
    rank_ratio: float,
    context: ModalityContext,
    *,
    by_modality: bool = True,
    coded: bool = False,
    centred: bool = False,
) -> Any:
    """The same with packed linears: smoothing of two modalities, and corrections of vision but for ``down``.

    Args:
        decoder: in bf16.
        scheme_name: of weights and inputs.
        rank_ratio: of the corrections, 0 for none.
        context: modality of every token.
        by_modality: False for one factor for all, which norms absorb: nothing is smoothed at run time.
        coded: whether corrections are stored in int8.
        centred: whether the inputs but those of ``down`` are centred by modality.
    """
    scheme = Scheme.preset(scheme_name)
    assert scheme.weight is not None
    model = copy.deepcopy(decoder)
    blocks = [LlamaBlock(layer, model.config) for layer in model.layers]
    for block, (group, roles) in itertools.product(blocks, GROUPS.items()):
        smoothing = {m: torch.rand(block.linear(roles[0]).in_features) + 0.5 for m in (Modality.TEXT, Modality.VISION)}  # type: ignore[operator]
        for role in roles:
            linear: Any = block.linear(role)
            rank = int(rank_ratio * min(linear.weight.shape)) if group != "down" else 0
            layer = QuantLinear(
                weights={Modality.TEXT: quantize(linear.weight.detach().float(), scheme.weight)},
                bias=_centres(linear) if centred and role is not Role.DOWN else linear.bias,
                activation=scheme.activation,
                context=context,
                smoothing=smoothing if by_modality and role is not Role.DOWN else None,
                corrections={Modality.VISION: _factors(linear, rank, coded)} if rank else None,
                dtype=torch.bfloat16,
            )
            block.set_linear(role, layer.to(linear.weight.device))
    model.kernels = pack_blocks(blocks, "auto")  # what ran, for the record
    return model


def fused_decoder(decoder: Any) -> Any:
    """A packed decoder, reading the same modalities, with norms and gates in the pass that quantizes what they feed."""
    context = decoder.layers[0].mlp.down_proj.context
    model = copy.deepcopy(decoder, {id(context): context})
    assert fuse_blocks([LlamaBlock(layer, model.config) for layer in model.layers]) == 3 * len(model.layers)
    return model


def _factors(linear: Any, rank: int, coded: bool) -> Factors:
    left, right = torch.randn(linear.in_features, rank) / 99, torch.randn(rank, linear.out_features) / 99
    return encode(left, right) if coded else Factors(left.bfloat16(), right.bfloat16())


def _centres(linear: Any) -> Centres:
    modalities = (Modality.TEXT, Modality.VISION)
    centres = {m: torch.randn(linear.in_features).to(STORED) for m in modalities}
    return Centres.of(centres, {m: torch.randn(linear.out_features) for m in modalities})


@torch.inference_mode()
def measure_block(budget: float) -> list[dict[str, Any]]:
    """Prefill of one block in bf16, packed, and packed with corrections."""
    decoder, context = random_decoder("3B"), ModalityContext()
    ids = torch.zeros(1, PREFILL, dtype=torch.int8)
    ids[:, int(TEXT_SHARE * PREFILL) :] = int(Modality.VISION)
    context.set(ids)
    hidden = torch.randn(1, PREFILL, SHAPES["3B"]["hidden_size"]).bfloat16()
    models = {BASE: decoder}
    for scheme in ("w8a8", "w4a8"):
        for ratio in RANK_RATIOS:
            name = scheme if not ratio else f"{scheme}, rank ratio {ratio}"
            models[name] = packed_decoder(decoder, scheme, ratio, context)
    for name, centred in {"int8 corrections": False, "int8 corrections, centred": True}.items():
        models[f"w4a8, {name}, rank ratio {CODED_RATIO}"] = packed_decoder(
            decoder, "w4a8", CODED_RATIO, context, coded=True, centred=centred
        )
    for name in FUSED_BLOCKS:
        models[f"{name}, fused"] = fused_decoder(models[name])
    calls = {name: _forward(model, hidden) for name, model in models.items()}
    return [
        {"part": f"3B block, prefill {PREFILL}", "name": n, **asdict(t)}
        for n, t in interleave(calls, BASE, budget).items()
    ]


def _forward(model: Any, hidden: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(inputs_embeds=hidden, use_cache=False)


def quantized(folder: Path, scheme: str, method: list[str]) -> ModelAdapter:
    """The embedded model in bf16 with packed linears."""
    cell = [
        *("model=smol_omni", "model.dtype=bfloat16", "modality=tri", f"scheme={scheme}"),
        *("evaluation=fidelity", "evaluation.samples_per_task=1", "calibration.samples_per_task=4"),
        *(*method, f"output.root={folder}"),
    ]
    record = run(compose(cell))
    return load_finished(next(folder.glob(f"*-{record.identity[:10]}")))


def linear_bytes(blocks: Sequence[BlockAdapter]) -> int:
    """Memory of the linears of all blocks, with everything that they hold."""
    total, seen = 0, set()
    for block in blocks:
        for role in (role for roles in GROUPS.values() for role in roles):
            linear: Any = block.linear(role)
            if isinstance(linear, PackedLinear):
                if id(linear.stack) not in seen:
                    seen.add(id(linear.stack))
                    total += linear.stack.num_bytes
            else:
                total += sum(p.numel() * p.element_size() for p in linear.parameters())
    return total


PACKED, FUSED = "execution=packed", "execution=fused"
_MASQUANT = ["method=masquant", "method.smoothing=modality"]
_MASQ = ["method=masq", "method.rounding=nearest", "method.compensation=whitened_low_rank_int8"]
CELLS = {
    BASE: ("w16a16", ["method=none"]),
    "w8a8 smoothquant": ("w8a8", ["method=smoothquant", PACKED]),
    "w4a8 smoothquant": ("w4a8", ["method=smoothquant", PACKED]),
    "w4a8 smoothquant, fused": ("w4a8", ["method=smoothquant", FUSED]),
    "w4a8 masquant, rank ratio 0.05": ("w4a8", [*_MASQUANT, PACKED]),
    "w4a8 masquant, rank ratio 0.05, fused": ("w4a8", [*_MASQUANT, FUSED]),
    "w4a8 masq, rank ratio 0.085 in int8": ("w4a8", [*_MASQ, PACKED]),
    "w4a8 masq, rank ratio 0.085 in int8, fused": ("w4a8", [*_MASQ, FUSED]),
    "w4a16 rtn (g64)": ("w4a16_g64", ["method=rtn", PACKED]),
}


def measure_model(budget: float) -> list[dict[str, Any]]:
    """Prefill of questions, tokens of one answer after another, and memory."""
    with tempfile.TemporaryDirectory() as root:
        models = {name: quantized(Path(root) / str(i), *cell) for i, (name, cell) in enumerate(CELLS.items())}
    return [*_times_of(models, budget), *_memory_of(models)]


@torch.inference_mode()
def _times_of(models: dict[str, ModelAdapter], budget: float) -> list[dict[str, Any]]:
    samples = load_samples(data_path("evaluation"), ("read", "speech", "same"), 2, 0, ("text", "vision", "audio"))
    single = models[BASE].encode(samples[:1], with_answer=False)
    several = models[BASE].encode(samples, with_answer=False)
    prompt = several.inputs["input_ids"].numel()
    parts: dict[str, Callable[[ModelAdapter], Callable[[], Any]]] = {
        f"smol_omni, prefill {len(samples)} questions ({prompt} tokens)": lambda a: lambda: a.model(**several.inputs),
        f"smol_omni, {NEW_TOKENS} tokens of one answer": lambda a: lambda: _answer(a, single),
    }
    cells: list[dict[str, Any]] = []
    for part, make in parts.items():
        found = interleave({name: make(adapter) for name, adapter in models.items()}, BASE, budget)
        cells += [{"part": part, "name": name, **asdict(timing)} for name, timing in found.items()]
    return cells


def _memory_of(models: dict[str, ModelAdapter]) -> list[dict[str, Any]]:
    size = {name: linear_bytes(adapter.blocks()) for name, adapter in models.items()}
    part = {"part": "memory of the linears"}
    return [{**part, "name": name, "bytes": one, "share": one / size[BASE]} for name, one in size.items()]


def _answer(adapter: ModelAdapter, batch: EncodedBatch) -> Any:
    limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return adapter.model.generate(**batch.inputs, **limits, do_sample=False)


def render(found: dict[str, Any]) -> str:
    """A Markdown table for every part."""
    parts = []
    for part in dict.fromkeys(cell["part"] for cell in found["cells"]):
        own = [cell for cell in found["cells"] if cell["part"] == part]
        if "bytes" in own[0]:
            rows = [[c["name"], f"{c['bytes'] / 2**20:.1f}", f"{c['share']:.3f}"] for c in own]
            heads = [part, "MiB", "of bf16"]
        else:
            rows = [
                [c["name"], f"{1e3 * c['seconds']:.4g}", f"{c['ratio']:.2f} ({c['low']:.2f}-{c['high']:.2f})"]
                for c in own
            ]
            heads = [part, "ms", "times faster than bf16"]
        parts.append(tabulate(rows, heads, tablefmt="github", disable_numparse=True))
    made = found["provenance"]
    about = (
        "Medians of rounds in which all take turns (20th-80th percentile of the ratio). Packed linears run on kernel "
        f"`{found['kernel']}`. {made['threads']} threads on {made['device_name']}, torch {made['libraries']['torch']}; "
        "`python -m experiments.bench.packed_model`."
    )
    return "\n\n".join([*parts, about]) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each part")
    parser.add_argument("--output", type=Path, default=Path("results/bench/packed_model.json"))
    parser.add_argument("--table", type=Path, default=Path("results/tables/packed_model.md"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    kernels = packed_decoder(random_decoder("3B"), "w4a8", 0.0, ModalityContext()).kernels
    found: dict[str, Any] = {
        "provenance": provenance(0, {}, device="cpu"),
        "kernel": ", ".join(sorted(set(kernels))),
        "cells": [],
    }
    for measured in (measure_block, measure_model):
        found["cells"] += measured(options.budget)
        atomic_write_json(options.output, found)
        atomic_write_bytes(options.table, render(found).encode())
    print(render(found))


if __name__ == "__main__":
    main()
