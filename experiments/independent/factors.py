"""Smoothing factors of other packages against masq's: SmoothQuant in closed form, AWQ by its search."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from experiments.independent.verdicts import DIFFERENT, EQUAL, RULE
from masq.calibration.statistics import GroupAccumulator, GroupStatistics, TokenSample
from masq.numerics.affine import fake_quantize
from masq.numerics.scheme import TensorFormat
from masq.transforms.search import SearchedLinear, awq_factor, pooled_abs_mean, search, token_errors
from masq.transforms.smoothing import shared_factor, smoothing_factor, weight_abs_max

Spec = dict[str, Any]
Tensors = dict[str, torch.Tensor]
TOLERANCE = 2e-6
"""Relative difference of a factor that float32 powers and quotients explain."""
_EPSILON = torch.finfo(torch.float32).eps


def members(spec: Spec, module: str) -> list[str]:
    """The linears that read the input of a module, itself first."""
    first, *rest = spec.get("members", [module.rpartition(".")[2]])
    return [module, *(module.removesuffix(first) + one for one in rest)]


def statistics(rows: torch.Tensor) -> GroupStatistics:
    """masq's statistics of text tokens [N, I]."""
    modality = torch.zeros(1, len(rows), dtype=torch.int8)
    accumulator = GroupAccumulator(True, TokenSample.draw([modality], len(rows), 0))
    accumulator.update(rows[None], modality)
    return accumulator.result()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest relative difference of two factors [I]."""
    return float((theirs.double() / ours.double() - 1).abs().max())


def smooth_figures(spec: Spec, module: str, tensors: Tensors, theirs: Tensors) -> Spec:
    """The factor of a group under masq, and under the package's rule computed with masq's function."""
    rows, alpha = tensors[f"rows/{module}"], spec["alpha"]
    weights = [tensors[f"weight/{name}"] for name in members(spec, module)]
    ours, largest = shared_factor(statistics(rows), weights, alpha), weight_abs_max(weights)
    if spec["range"] == "absmax":
        ruled = smoothing_factor(rows.abs().amax(0) + _EPSILON, largest + _EPSILON, alpha)
    else:
        # ((max - min) ^ a) / ((2 w) ^ (1 - a)) is masq's factor of half the range, times 2 ^ (2 a - 1).
        ruled = smoothing_factor((rows.amax(0) - rows.amin(0)) / 2, largest, alpha) * 2 ** (2 * alpha - 1)
    return {
        "factor_difference": relative(ours, theirs["factor"]),
        "rule_difference": relative(ruled, theirs["factor"]),
    }


def awq_figures(spec: Spec, module: str, tensors: Tensors, theirs: Tensors) -> Spec:
    """Exponents, factors and, where the package gave them, errors of the whole grid."""
    fmt = TensorFormat(spec["bits"], spec["symmetric"], "per_group", spec["group"])
    stats = statistics(tensors[f"rows/{module}"])
    linears = [SearchedLinear(tensors[f"weight/{name}"], fmt, None) for name in members(spec, module)]
    candidates = [awq_factor(pooled_abs_mean(stats), step / spec["steps"]) for step in range(spec["last"] + 1)]
    chosen = search(stats, linears, candidates, "squared")[0]
    distances = [relative(candidate, theirs["factor"]) for candidate in candidates]
    their_choice = min(range(len(distances)), key=distances.__getitem__)
    found: Spec = {
        "exponent": chosen / spec["steps"],
        "their_exponent": their_choice / spec["steps"],
        "other_choices": int(chosen != their_choice),
        "factor_difference": relative(candidates[chosen], theirs["factor"]),
        "rule_difference": distances[their_choice],
    }
    if "losses" not in theirs:
        return found
    rows, own = tensors[f"rows/{module}"], [one.weight for one in linears]
    exact = [F.linear(rows, weight) for weight in own]
    # On tokens and in float32, as the package: exact ties may fall the other way in float64.
    measured = [
        float(token_errors(rows, exact, linears, candidate, squared=True).mean())
        if spec["objective"] == "linear"
        else mlp_error(module, tensors, candidate, fmt)
        for candidate in candidates
    ]
    errors = torch.tensor(measured, dtype=torch.float64)
    return found | {
        "error_difference": relative(errors, theirs["losses"]),
        "other_choices_by_their_objective": int(int(errors.argmin()) != their_choice),
    }


def mlp_error(gate: str, tensors: Tensors, factor: torch.Tensor, fmt: TensorFormat) -> float:
    """Mean squared error of the output of an MLP whose gate and up are rounded after smoothing with ``factor`` [I]."""
    up, down = (gate.replace("gate_proj", f"{name}_proj") for name in ("up", "down"))
    rows = tensors[f"rows/{gate}"]

    def output(rounded: bool) -> torch.Tensor:
        halves = []
        for name in (gate, up):
            weight = tensors[f"weight/{name}"]
            used = fake_quantize(weight * factor, fmt) / factor if rounded else weight
            halves.append(F.linear(rows, used, tensors[f"bias/{name}"]))
        return F.linear(F.silu(halves[0]) * halves[1], tensors[f"weight/{down}"])

    return float((output(True) - output(False)).square().mean(dtype=torch.float64))


FIGURES = {"smooth": smooth_figures, "awq": awq_figures}


def verdict(spec: Spec, found: Spec) -> tuple[str, str]:
    """Verdict and explanation of factors."""
    if found["rule_difference"] > TOLERANCE or found.get("error_difference", 0.0) > 1e-3:
        return DIFFERENT, ""
    if found["factor_difference"] <= TOLERANCE:
        return EQUAL, ""
    if spec["kind"] == "smooth" and spec["range"] != "absmax":
        text = (
            "the package takes max - min of the activations and twice the largest weight, masq the largest "
            "magnitudes; masq's function of half the range gives the package's factor"
        )
        return RULE, text
    if spec["kind"] == "awq" and spec.get("objective") == "mlp" and not found["other_choices_by_their_objective"]:
        text = (
            "the package compares outputs of the MLP, masq those of gate and up; by the package's measure the errors "
            "of all candidates and the choice are the package's"
        )
        return RULE, text
    return DIFFERENT, ""
