"""What llm-compressor and compressed-tensors make of the slice. Runs in the other environment only."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, quantize
from compressed_tensors.quantization.utils import helpers as ct_helpers
from compressed_tensors.transform.utils import hadamard as ct_hadamard
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier, gptq_quantize
from llmcompressor.modifiers.gptq import helpers as gptq_helpers
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from experiments.independent.with_torchao import ALPHAS, full_range, group_of, restricted_range

if TYPE_CHECKING:
    from experiments.independent.generate import Collected, Slice

NORMS = {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm"}
MEMBERS = {"q_proj": ("q", "k", "v"), "gate_proj": ("gate", "up"), "down_proj": ("down",)}


def oneshot_on(piece: Slice, recipe: list[Any], pipeline: str = "basic") -> torch.nn.Module:
    """A copy of the slice after a recipe; with the pipeline ``basic`` every linear is calibrated on the float model."""
    model = copy.deepcopy(piece.model)
    loader = torch.utils.data.DataLoader(piece.batches, batch_size=None)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    # No text is tokenized and no checkpoint is read, but oneshot asks for a tokenizer and for a configuration file.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.config._name_or_path = folder
        oneshot(model=model, processor=tokenizer, dataset=loader, recipe=recipe, pipeline=pipeline)
    return model


def scheme(bits: int, symmetric: bool, group: int | None, targets: list[str]) -> dict[str, QuantizationScheme]:
    """Weights alone, min-max ranges."""
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, observer="memoryless_minmax", **strategy)
    return {"group_0": QuantizationScheme(targets=targets, weights=weights)}


@contextmanager
def restricted() -> Iterator[None]:
    """Let compressed-tensors leave out the lowest code of every integer range."""

    def bounds(_kind: str, bits: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = restricted_range(bits)
        return torch.tensor(float(low), device=device), torch.tensor(float(high), device=device)

    with mock.patch.object(ct_helpers, "_calculate_range", bounds):
        yield


@contextmanager
def in_float64() -> Iterator[None]:
    """Let GPTQ accumulate, factor and sweep in float64."""
    with (
        mock.patch.object(gptq_helpers, "GPTQ_PRECISION", torch.float64),
        mock.patch.object(gptq_quantize, "GPTQ_PRECISION", torch.float64),
    ):
        yield


def outputs(model: torch.nn.Module, names: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Scales, zero points and codes by linear; the codes are those of the weights as the recipe left them."""
    found = {}
    for name in names:
        linear = model.get_submodule(name)
        args, scale, zero = linear.quantization_scheme.weights, linear.weight_scale, linear.weight_zero_point
        codes = quantize(linear.weight.detach(), scale.detach(), zero.detach(), args)  # pyright: ignore[reportCallIssue, reportArgumentType]
        assert torch.equal(codes, codes.round())
        found[name] = {"scale": scale, "zero_point": zero.to(torch.int8), "codes": codes.to(torch.int8)}  # pyright: ignore[reportCallIssue]
    return found


def grids(piece: Slice, found: Collected) -> None:
    """Rounding to nearest with ``QuantizationModifier``, as shipped and without the lowest code."""
    cases = [(4, True, None), (8, True, None), (4, False, None)]
    cases += [(4, symmetric, group) for symmetric in (True, False) for group in piece.size.groups]
    for bits, symmetric, group in cases:
        names = piece.dividing(group)
        for narrow in (False, True) if symmetric else (False,):
            with restricted() if narrow else nullcontext():
                recipe = QuantizationModifier(config_groups=scheme(bits, symmetric, group, names))
                made = outputs(oneshot_on(piece, [recipe]), names)
            spec = {"kind": "grid", "package": "llmcompressor", "bits": bits, "symmetric": symmetric, "group": group}
            spec |= {"call": "QuantizationModifier" + (", lowest code left out" if narrow else ", as shipped")}
            label = "" if narrow or not symmetric else "_shipped"
            codes = restricted_range(bits) if narrow else full_range(bits)
            name = f"llmcompressor/w{bits}_{'sym' if symmetric else 'asym'}_{group or 'channel'}{label}"
            found.add(name, spec | {"codes": codes, "added_first": not symmetric}, made)


def gptq(piece: Slice, found: Collected) -> None:
    """``GPTQModifier``: a grid that both have, in its own precision and in float64; then the symmetric range."""
    group = piece.size.groups[0]
    cases: list[tuple[bool, int | None, bool, str, bool]] = []
    for width, order in ((None, False), (None, True), (group, False), (group, True)):
        cases += [(False, width, order, "float32", False), (False, width, order, "float64", False)]
    cases += [(True, None, False, "float64", True), (True, None, False, "float32", False)]
    for symmetric, width, order, precision, narrow in cases:
        names = piece.dividing(width)
        with (
            restricted() if narrow else nullcontext(),
            in_float64() if precision == "float64" else nullcontext(),
        ):
            recipe = GPTQModifier(
                config_groups=scheme(4, symmetric, width, names), block_size=128, dampening_frac=0.01,
                actorder="static" if order else None,
            )  # fmt: skip
            made = outputs(oneshot_on(piece, [recipe]), names)
        spec = {"kind": "gptq", "package": "llmcompressor", "bits": 4, "symmetric": symmetric, "group": width}
        spec |= {"call": "GPTQModifier", "codes": restricted_range(4) if narrow else full_range(4), "order": order}
        spec |= {"damping": 0.01, "block": 128, "precision": precision}
        label = f"{'sym' if symmetric else 'asym'}_{width or 'channel'}{'_order' if order else ''}_{precision}"
        shipped = "_shipped" if symmetric and not narrow else ""
        found.add(f"llmcompressor/gptq_w4_{label}{shipped}", spec, made)


def smoothing(piece: Slice, found: Collected) -> None:
    """``SmoothQuantModifier``: the factors it computes, in the order of the decoder blocks."""
    for alpha in ALPHAS:
        for first, norm in NORMS.items() if piece.whole else list(NORMS.items())[:1]:
            factors: list[torch.Tensor] = []
            own = SmoothQuantModifier._calculate_smoothing_scales

            def recorded(self: Any, *args: Any, _own: Any = own, _into: Any = factors) -> torch.Tensor:
                _into.append(_own(self, *args))
                return _into[-1]

            balanced = [f"re:.*{one}_proj" for one in MEMBERS[first]]
            recipe = SmoothQuantModifier(smoothing_strength=alpha, mappings=[[balanced, f"re:.*{norm}"]])
            with mock.patch.object(SmoothQuantModifier, "_calculate_smoothing_scales", recorded):
                oneshot_on(piece, [recipe])
            names = [name for name in piece.rows if name.endswith(first)]
            made = {name: {"factor": factor} for name, factor in zip(names, factors, strict=True)}
            spec = {"kind": "smooth", "package": "llmcompressor", "call": "SmoothQuantModifier", "alpha": alpha}
            spec |= group_of(made, MEMBERS[first]) | {"range": "max - min"}
            found.add(f"llmcompressor/smoothquant_{alpha}_{first.removesuffix('_proj')}", spec, made)


def awq(piece: Slice, found: Collected) -> None:
    """``AWQModifier`` without weights in the factor, one group of linears at a time: factors, and all errors."""
    group, smooth = piece.size.groups[0], NORMS | {"down_proj": "up_proj"}
    for first in ("gate_proj", "down_proj") if piece.whole else ("down_proj",):
        losses: list[float] = []
        factors: list[torch.Tensor] = []
        own_loss, own_best = AWQModifier._compute_loss, AWQModifier._compute_best_scale

        def loss(self: Any, *args: Any, _own: Any = own_loss, _into: Any = losses) -> float:
            _into.append(_own(self, *args))
            return _into[-1]

        def best(self: Any, *args: Any, _own: Any = own_best, _into: Any = factors) -> torch.Tensor:
            _into.append(_own(self, *args))
            return _into[-1]

        balanced = [f"re:.*{one}_proj" for one in MEMBERS[first]]
        names = [name for name in piece.rows if name.endswith(tuple(f"{one}_proj" for one in MEMBERS[first]))]
        recipe = [
            AWQModifier(mappings=[AWQMapping(f"re:.*{smooth[first]}", balanced)], duo_scaling=False, n_grid=21),
            QuantizationModifier(config_groups=scheme(4, False, group, names)),
        ]
        with (
            # There is no accelerator to pin memory for.
            mock.patch.object(IntermediatesCache, "pin_memory"),
            mock.patch.object(AWQModifier, "_compute_loss", loss),
            mock.patch.object(AWQModifier, "_compute_best_scale", best),
        ):
            # With ``basic`` the search runs while weights are fake quantized on scales of another factor.
            oneshot_on(piece, recipe, "sequential")
        leaders = [name for name in piece.rows if name.endswith(first)]
        by_block = torch.tensor(losses, dtype=torch.float64).view(len(leaders), 21)
        made = {n: {"factor": f, "losses": e} for n, f, e in zip(leaders, factors, by_block, strict=True)}
        spec = {
            "kind": "awq",
            "package": "llmcompressor",
            "call": "AWQModifier, duo_scaling off, sequential",
            "bits": 4,
        }
        spec |= {"symmetric": False, "group": group, "steps": 20, "last": 20}
        spec |= {"objective": "linear" if first == "down_proj" else "mlp"} | group_of(made, MEMBERS[first])
        if first == "gate_proj":
            spec["inputs"] = [*spec["inputs"], *(name.replace("gate", "down") for name in leaders)]
        found.add(f"llmcompressor/awq_{first.removesuffix('_proj')}", spec, made)


def hadamards(piece: Slice, found: Collected) -> None:
    """Sylvester's matrices where the order is a power of two, the package's table elsewhere; and the table's orders."""
    made = {}
    for order in piece.size.hadamard:
        if order & (order - 1) == 0:
            matrix = ct_hadamard.deterministic_hadamard_matrix(order, torch.float64)
        else:
            matrix = ct_hadamard._fetch_hadamard_divisor(order, torch.float64)
        assert matrix is not None and len(matrix) == order
        made[str(order)] = {"matrix": matrix.to(torch.int8)}
    possible = []
    for order in range(1, 513):
        matrix = ct_hadamard._fetch_hadamard_divisor(order, torch.float64)
        possible += [order] if matrix is not None else []
    spec = {"kind": "hadamard", "package": "compressed-tensors", "orders_to_512": possible}
    found.add("compressed-tensors/hadamard", spec | {"call": "deterministic_hadamard_matrix, and its table"}, made)


def run(piece: Slice, found: Collected) -> None:
    """Every check that llm-compressor offers on a processor."""
    for part in (grids, gptq, smoothing, awq, hadamards):
        part(piece, found)
