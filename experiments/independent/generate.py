"""Quantize a small text-only slice with torchao and llm-compressor, and write inputs and outputs to one file.

Runs in an environment of its own (``requirements.txt``) and needs nothing of masq. The slice is a Llama decoder of
random weights with biases, grouped-query attention, odd widths and planted outliers, read by random token sequences.

The safetensors file holds ``weight/MODULE`` [O, I], ``bias/MODULE`` [O] and ``rows/MODULE`` [N, I] (the inputs of the
linear, all calibration tokens), float32, and what each check gave under ``CHECK/MODULE/..``. Its metadata hold the
package versions, the seed, the sizes and a list of what every check is.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

PACKAGES = ("torch", "torchao", "llmcompressor", "compressed-tensors", "transformers", "safetensors")
SEED = 20260304
VOCABULARY = 96


@dataclass(frozen=True)
class Size:
    """Shapes of the slice, and what of it is written.

    Attributes:
        modules: linears that are quantized and written, by the end of their name.
        groups: group sizes; a linear whose width one does not divide is left out of its checks.
        hadamard: orders of Hadamard matrices to write.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: int
    sequences: int
    tokens: int
    modules: tuple[str, ...]
    groups: tuple[int, ...]
    hadamard: tuple[int, ...]


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {
    "full": Size(256, 8, 2, 36, 352, 1, 8, 64, LINEARS, (32, 128), (12, 20, 28, 36, 60, 108, 140, 148, 64, 128, 256)),
    "fixture": Size(48, 4, 2, 12, 64, 1, 3, 24, ("k_proj", "o_proj"), (16, 24), (12, 16, 20)),
}


@dataclass
class Collected:
    """What goes into the file."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, spec: dict[str, Any], modules: dict[str, dict[str, torch.Tensor]]) -> None:
        """One check: what it is, and its tensors by module and field."""
        self.checks.append({"name": name, **spec, "modules": sorted(modules)})
        for module, tensors in modules.items():
            if spec.get("symmetric"):
                assert not tensors.pop("zero_point").any()
            for key, tensor in tensors.items():
                self.tensors[f"{name}/{module}/{key}"] = tensor.detach().clone().contiguous()


@dataclass
class Slice:
    """The float model, its calibration batches, and the inputs of its linears [N, I] by module."""

    size: Size
    model: LlamaForCausalLM
    batches: list[dict[str, torch.Tensor]]
    rows: dict[str, torch.Tensor]

    @property
    def kept(self) -> list[str]:
        """Names of the linears that are quantized and written."""
        return [name for name in self.rows if name.endswith(self.size.modules)]

    def weight(self, name: str) -> torch.Tensor:
        """Float weight [O, I] of a linear."""
        return self.model.get_submodule(name).weight.detach()  # pyright: ignore[reportReturnType, reportCallIssue]

    @property
    def whole(self) -> bool:
        """Whether all seven linears are written, and so the checks of all groups."""
        return self.size.modules == LINEARS

    def dividing(self, group: int | None) -> list[str]:
        """Kept linears whose width a group size divides."""
        return [name for name in self.kept if group is None or self.weight(name).shape[1] % group == 0]


def build(size: Size) -> Slice:
    """The slice of a size; the same bits for the same library versions."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
        max_position_embeddings=size.tokens,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                plant(module)
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                # Few loud channels, as real language models have them behind their norms.
                parameter.mul_(0.5 + torch.rand(size.hidden))
                parameter[torch.randperm(size.hidden)[:4]] *= torch.tensor([8.0, 12.0, 20.0, 30.0])
    ids = torch.randint(0, VOCABULARY, (size.sequences, size.tokens))
    batches = [{"input_ids": row[None], "attention_mask": torch.ones(1, size.tokens).long()} for row in ids]
    return Slice(size, model, batches, inputs(model, batches))


def plant(linear: nn.Linear) -> None:
    """Weights with heavy tails, a bias, a row of exact ties and a row of zeros, in place."""
    weight = torch.randn_like(linear.weight) / linear.in_features**0.5
    weight *= torch.where(torch.rand_like(weight) < 0.01, 6.0, 1.0)
    # Scale 1/8 at 4 bits in the restricted range: every other value lies half-way between two levels.
    weight[1] = torch.randint(-7, 7, (linear.in_features,)) / 8 + 1 / 16
    weight[1, 0] = 7 / 8
    weight[2] = 0.0
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.normal_(0, 0.02)


@torch.no_grad()
def inputs(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Inputs [N, I] of the decoder linears over all batches, by name."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _m, args, _y, name=name: found.setdefault(name, []).append(args[0][0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(LINEARS)
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def write(path: Path, piece: Slice, found: Collected) -> None:
    """The file; everything a comparison needs is in it."""
    used = sorted({module for check in found.checks for module in check.get("inputs", check["modules"])})
    for name in (name for name in used if name in piece.rows):
        found.tensors[f"weight/{name}"] = piece.weight(name).clone()
        found.tensors[f"rows/{name}"] = piece.rows[name].clone()
        found.tensors[f"bias/{name}"] = piece.model.get_submodule(name).bias.detach().clone()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    shared: dict[tuple[int, ...], str] = {}
    links = {}
    for name in [key for key in found.tensors if key.startswith("rows/")]:
        key = tuple(found.tensors[name].reshape(-1)[:16].view(torch.int32).tolist())
        if key in shared and torch.equal(found.tensors[shared[key]], found.tensors[name]):
            links[name] = shared[key]
            del found.tensors[name]
        else:
            shared[key] = name
    about = {
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "seed": SEED,
        "size": asdict(piece.size),
        "links": links,
        "checks": found.checks,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(found.tensors, path, {"about": json.dumps(about, sort_keys=True)})
    print(f"{len(found.checks)} checks, {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Command line: where the file goes, which size."""
    from experiments.independent import with_llmcompressor, with_torchao

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="full")
    options = parser.parse_args()
    torch.set_num_threads(1)
    piece, found = build(SIZES[options.size]), Collected()
    with_torchao.run(piece, found)
    with_llmcompressor.run(piece, found)
    write(options.output, piece, found)


if __name__ == "__main__":
    main()
