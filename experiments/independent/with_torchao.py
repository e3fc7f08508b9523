"""What torchao makes of the slice. Runs in the other environment only."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchao.prototype.awq.core import AWQObserver
from torchao.prototype.smoothquant import SmoothQuantObserver
from torchao.prototype.spinquant.hadamard_utils import hadamard_matrix
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup
from torchao.quantization.granularity import PerRow
from torchao.quantization.quant_primitives import choose_qparams_affine, quantize_affine
from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

if TYPE_CHECKING:
    from experiments.independent.generate import Collected, Slice

ALPHAS = (0.5, 0.75)
Range = tuple[int, int]


def full_range(bits: int) -> Range:
    """The codes of a signed integer of so many bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def restricted_range(bits: int) -> Range:
    """The same without the lowest code."""
    return -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1


def affine(x: torch.Tensor, symmetric: bool, group: int | None, codes: Range) -> dict[str, torch.Tensor]:
    """Scales and zero points [rows, groups] and codes [rows, I] from torchao's primitives."""
    block = (1, group or x.shape[1])
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    scale, zero = choose_qparams_affine(
        x, mapping, block, torch.int8, *codes, eps=torch.finfo(torch.float32).eps, keepdim=True
    )
    found = quantize_affine(x, block, scale, zero, torch.int8, *codes)
    return {"scale": scale, "zero_point": zero.to(torch.int8), "codes": found}


def grids(piece: Slice, found: Collected) -> None:
    """Rounding to nearest: the primitives on the restricted range, and the configurations as they are shipped."""
    for bits in (4, 8):
        for symmetric in (True, False):
            for group in (None, *piece.size.groups) if bits == 4 else (None,):
                codes = restricted_range(bits) if symmetric else full_range(bits)
                spec = {"kind": "grid", "package": "torchao", "call": "choose_qparams_affine, quantize_affine"}
                spec |= {"bits": bits, "symmetric": symmetric, "group": group, "codes": codes, "reciprocal": True}
                made = {n: affine(piece.weight(n), symmetric, group, codes) for n in piece.dividing(group)}
                name = f"torchao/w{bits}_{'sym' if symmetric else 'asym'}_{group or 'channel'}"
                found.add(name, spec, made)
    for group in (None, piece.size.groups[0]):
        granularity = PerAxis(0) if group is None else PerGroup(group)
        config = IntxWeightOnlyConfig(torch.int4, granularity, MappingType.SYMMETRIC)
        made = {}
        for name in piece.dividing(group):
            tensor = quantized(piece.weight(name), config)
            made[name] = {"scale": tensor.scale, "zero_point": tensor.zero_point, "codes": tensor.qdata}
        spec = {"kind": "grid", "package": "torchao", "call": "quantize_ with IntxWeightOnlyConfig, as shipped"}
        spec |= {"bits": 4, "symmetric": True, "group": group, "codes": full_range(4), "reciprocal": True}
        found.add(f"torchao/w4_sym_{group or 'channel'}_shipped", spec, made)


def quantized(weight: torch.Tensor, config: IntxWeightOnlyConfig) -> torch.Tensor:
    """The weight of a linear after ``quantize_``."""
    from torchao.quantization import quantize_

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(linear, config)
    return linear.weight


def tokens(piece: Slice, found: Collected) -> None:
    """Dynamic activations, a scale per token."""
    names = [piece.kept[0], *piece.kept[-1:]] if piece.whole else piece.kept[:1]
    for bits in (8, 6, 4):
        spec = {"kind": "grid", "package": "torchao", "call": "choose_qparams_affine, quantize_affine", "bits": bits}
        spec |= {"symmetric": True, "group": None, "codes": restricted_range(bits), "what": "rows", "reciprocal": True}
        made = {name: affine(piece.rows[name], True, None, restricted_range(bits)) for name in names}
        found.add(f"torchao/a{bits}_token", spec, made)
    made = {}
    for name in names:
        tensor = Int8Tensor.from_hp(piece.rows[name], PerRow())
        made[name] = {"scale": tensor.scale, "zero_point": tensor.zero_point, "codes": tensor.qdata}
    spec = {"kind": "grid", "package": "torchao", "call": "Int8Tensor.from_hp(PerRow), as shipped", "bits": 8}
    spec |= {"symmetric": True, "group": None, "codes": full_range(8), "what": "rows", "reciprocal": True}
    found.add("torchao/a8_token_shipped", spec, made)


def smoothing(piece: Slice, found: Collected) -> None:
    """SmoothQuant's factor of q, k, v together: the observer sees their stacked weight."""
    for alpha in ALPHAS:
        made = {}
        for name in (name for name in piece.rows if name.endswith("q_proj")):
            members = [name.replace("q_proj", f"{one}_proj") for one in "qkv"]
            observer = SmoothQuantObserver(torch.cat([piece.weight(one) for one in members]), alpha)
            observer(piece.rows[name])
            made[name] = {"factor": observer.calculate_qparams()[0]}
        spec = {"kind": "smooth", "package": "torchao", "call": "SmoothQuantObserver", "alpha": alpha}
        found.add(f"torchao/smoothquant_{alpha}", spec | group_of(made, ("q", "k", "v")) | {"range": "absmax"}, made)


def group_of(made: dict[str, dict[str, torch.Tensor]], letters: tuple[str, ...]) -> dict[str, list[str]]:
    """The linears that the comparison needs: those that read one input, named after the first of them."""
    first = f"{letters[0]}_proj"
    return {"members": [f"{one}_proj" for one in letters]} | {
        "inputs": [name.replace(first, f"{one}_proj") for name in made for one in letters]
    }


def awq(piece: Slice, found: Collected) -> None:
    """AWQ's search on the output of one linear: 20 exponents, 4 bits, asymmetric groups."""
    group = piece.size.groups[0]
    config = IntxWeightOnlyConfig(torch.int4, PerGroup(group), MappingType.ASYMMETRIC)
    made = {}
    for name in (name for name in piece.rows if name.endswith(("q_proj", "down_proj") if piece.whole else "down_proj")):
        observer = AWQObserver(piece.weight(name), None, config, 20)
        observer(piece.rows[name], piece.rows[name])
        made[name] = {"factor": observer.calculate_qparams()}
    spec = {"kind": "awq", "package": "torchao", "call": "AWQObserver", "bits": 4, "symmetric": False, "group": group}
    spec |= {"objective": "linear", "steps": 20, "last": 19}
    found.add("torchao/awq", spec, made)


def hadamards(piece: Slice, found: Collected) -> None:
    """Unnormalised matrices, from a fast transform of the identity."""
    made = {}
    for order in (one for one in piece.size.hadamard if one != 148):
        exact = hadamard_matrix(order, "cpu") * order**0.5
        made[str(order)] = {"matrix": exact.round().to(torch.int8)}
        assert torch.allclose(exact, exact.round(), atol=1e-4)
    found.add("torchao/hadamard", {"kind": "hadamard", "package": "torchao", "call": "spinquant hadamard_matrix"}, made)


@torch.no_grad()
def run(piece: Slice, found: Collected) -> None:
    """Every check that torchao offers on a processor (its GPTQ asks for CUDA)."""
    for part in (grids, tokens, smoothing, awq, hadamards):
        part(piece, found)
