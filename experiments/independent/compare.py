"""Compare what other packages made of the slice with what masq makes of it, and write a record.

Runs in masq's own environment, on the file that ``generate.py`` wrote in the other one. Every check ends in a verdict
(``verdicts.py``).

Shapes: O output channels or tokens, I input channels, G groups of E channels, N tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tabulate import tabulate

from experiments.independent import factors, hadamards
from experiments.independent.verdicts import DIFFERENT, EQUAL, PRECISION, RULE, TIES
from masq.calibration.statistics import SecondMoment
from masq.files import atomic_write_json, sha256_file
from masq.numerics.affine import encode, fit_scale, quantize
from masq.numerics.scheme import TensorFormat
from masq.report.provenance import provenance
from masq.rounding.clip import Grid
from masq.rounding.config import GptqRounding
from masq.rounding.gptq import round_gptq

_TIE = 1e-4
"""Distance of a quotient from half-way, in steps, below which the last bits of float32 decide its code."""

Spec = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def read(path: Path) -> tuple[Spec, Tensors]:
    """What the file says of itself, and its tensors by name; inputs that linears share are found under each name."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return about, tensors | {name: tensors[other] for name, other in about["links"].items()}


def format_of(spec: Spec) -> TensorFormat:
    """masq's format of a check."""
    if spec.get("what") == "rows":
        return TensorFormat(spec["bits"], granularity="per_token")
    granularity = "per_group" if spec["group"] else "per_channel"
    return TensorFormat(spec["bits"], spec["symmetric"], granularity, spec["group"])


def same_range(spec: Spec) -> bool:
    """Whether masq has as many levels: the lowest code of a symmetric format is left out, or there is a zero point."""
    low, high = spec["codes"]
    return not spec["symmetric"] or low == -high


def spread(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value per group [O, G] at each of its channels, [O, I]."""
    return values.repeat_interleave(like.shape[1] // values.shape[1], dim=1)


def rule_of(spec: Spec, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [O, G] and signed levels [O, I] (code minus zero point) by the package's documented rule, in float32.

    The range of a symmetric format is that of the codes about their middle: max|x| over half of (highest - lowest).
    torchao multiplies by 1 / scale; compressed-tensors adds the zero point before it rounds.
    """
    low, high = spec["codes"]
    groups = x.unflatten(1, (-1, spec["group"] or x.shape[1]))
    top, bottom = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
    scale = torch.maximum(top, -bottom) / ((high - low) / 2) if spec["symmetric"] else (top - bottom) / (high - low)
    alive = torch.where(scale > 0, scale, 1.0)
    zero = torch.zeros_like(scale) if spec["symmetric"] else low - torch.round(bottom / alive)
    wide, offset = spread(alive, x), spread(zero, x)
    if spec.get("added_first"):
        return scale, (x / wide + offset).clamp(low, high).round() - offset
    quotient = x * (1.0 / wide) if spec.get("reciprocal") else x / wide
    return scale, (quotient.round() + offset).clamp(low, high) - offset


def grid_figures(spec: Spec, x: torch.Tensor, theirs: Tensors) -> Spec:
    """Scales, zero points and levels of one tensor [O, I] under masq and under the package."""
    fmt, low = format_of(spec), spec["codes"][0]
    ours = quantize(x, fmt)
    scale = theirs["scale"].reshape(ours.scale.shape)
    zero = theirs.get("zero_point", torch.zeros_like(scale)).reshape(scale.shape)
    alive = spread((x.unflatten(1, (scale.shape[1], -1)) != 0).any(-1), x)
    level = theirs["codes"].int() - spread(zero, x).int()
    own_zero = torch.zeros_like(zero) if ours.zero_point is None else ours.zero_point + low
    own = ours.codes.int() - (0 if ours.zero_point is None else spread(ours.zero_point, x).int())
    rule_scale, rule_level = rule_of(spec, x)
    quotient = (x.double() / spread(scale, x)).abs()
    tie = ((quotient - quotient.floor()) - 0.5).abs() < _TIE
    # On the package's scales masq's own encoder must give its codes, but for the lowest code and for ties.
    given = encode(x, spread(scale, x), None, fmt) if spec["symmetric"] else own
    within = level.clamp(fmt.qmin, fmt.qmax) if spec["symmetric"] else level
    mask = alive[:, :: x.shape[1] // scale.shape[1]]
    return {
        "codes": int(alive.sum()),
        "scale_difference": _largest((ours.scale - scale).abs()[mask]),
        "scale_ratio": _largest((scale / ours.scale)[mask]),
        "other_zero_points": int((own_zero != zero)[mask].sum()),
        "other_codes": int((own != level)[alive].sum()),
        "other_codes_off_ties": int(((own != level) & ~tie)[alive].sum()),
        "other_codes_on_their_scales": int(((given != within) & ~tie)[alive].sum()),
        "rule_other_codes": int((rule_level != level)[alive].sum()),
        "rule_scale_difference": _largest((rule_scale - scale).abs()[mask]),
        "zero_rows_other_than_zero": int(level[~alive].count_nonzero()),
    }


def grid_verdict(spec: Spec, found: Spec) -> tuple[str, str]:
    """Verdict and explanation of a grid."""
    exact = found["rule_other_codes"] == 0 and found["rule_scale_difference"] == 0
    if found["scale_difference"] == 0 and found["other_zero_points"] == 0:
        if found["other_codes"] == 0:
            return EQUAL, ""
        if found["other_codes_off_ties"] == 0 and exact:
            order = "multiplies by 1 / scale" if spec.get("reciprocal") else "adds the zero point before it rounds"
            return TIES, f"the package {order}; doing the same gives all its codes"
    if not same_range(spec) and exact and found["other_codes_on_their_scales"] == 0:
        low, high = spec["codes"]
        text = (
            f"the package uses codes {low} to {high} with max|x| / {(high - low) / 2:g}, masq leaves out the lowest "
            f"with max|x| / {high}: its rule gives all its scales and codes, and on its scales masq's encoder gives "
            "all its codes but the lowest"
        )
        return RULE, text
    return DIFFERENT, ""


def gptq_figures(spec: Spec, weight: torch.Tensor, rows: torch.Tensor, theirs: Tensors) -> Spec:
    """Codes and losses of one weight [O, I] under both on the package's scales, and masq's own scales beside them.

    masq fits the scales of GPTQ in float64, the package in float32: the last bit may differ, and the package's rule in
    float32 must give its scales exactly.
    """
    fmt, low = format_of(spec), spec["codes"][0]
    moment = SecondMoment(rows.shape[1], rows.device)
    moment.update(rows)
    hessian = moment.result()
    scale = theirs["scale"].reshape(len(weight), -1)
    zero = theirs.get("zero_point", torch.zeros_like(scale)).reshape(scale.shape)
    grid = Grid(scale, None if spec["symmetric"] else zero.float() - low, torch.ones_like(scale).double())
    config = GptqRounding(
        damping=spec["damping"], block_size=spec["block"], act_order=spec["order"], static_groups=True
    )
    outcome = round_gptq(weight, hessian, fmt, config, grid)
    level = theirs["codes"].int() - spread(zero, weight).int()
    own = outcome.weight.codes.int() - (0 if spec["symmetric"] else spread(zero.int() - low, weight))
    mask = (weight.unflatten(1, (scale.shape[1], -1)) != 0).any(-1)
    error = weight.double() - level.double() * spread(scale, weight).double()
    fitted = fit_scale(weight.double(), fmt)[0]
    # The same with masq's own scales: what their last bit, or another range, is worth.
    alone = round_gptq(weight, hessian, fmt, config)
    alone_level = alone.weight.dequantize(torch.float64) / spread(alone.weight.scale, weight).double()
    return {
        "codes": int(spread(mask, weight).sum()),
        "scale_difference": _largest((fitted - scale).abs()[mask]),
        "scale_ratio": _largest((scale / fitted)[mask]),
        "rule_scale_difference": _largest((rule_of(spec, weight)[0] - scale).abs()[mask]),
        "other_codes": int((own != level)[spread(mask, weight)].sum()),
        "lowest_codes": int((theirs["codes"] == low)[spread(mask, weight)].sum()) if spec["symmetric"] else 0,
        "other_codes_on_masqs_scales": int((alone_level.round() != level)[spread(mask, weight)].sum()),
        "masqs_scales_loss": alone.loss,
        "loss": outcome.loss,
        "their_loss": float(((error @ hessian) * error).sum()),
        "nearest_loss": outcome.nearest_loss,
        "fallbacks": int(outcome.fallback is not None),
    }


def gptq_verdict(spec: Spec, found: Spec, partners: dict[str, Spec]) -> tuple[str, str]:
    """Verdict and explanation; ``partners`` are the checks that were judged before, by name."""
    last_bit = abs(found["scale_ratio"] - 1) < 2e-7
    if found["rule_scale_difference"] or found["fallbacks"] or (same_range(spec) and not last_bit):
        return DIFFERENT, ""
    fits = "on the package's scales, which differ from masq's by the last bit of float32 (masq fits them in float64)"
    if found["other_codes"] == 0:
        return EQUAL, fits if found["scale_difference"] else ""
    partner = partners.get(spec["name"].removesuffix("_shipped").replace("float32", "float64"), {})
    known = partner.get("verdict") == EQUAL and spec["precision"] == "float32"
    if known and same_range(spec):
        return PRECISION, f"the package sweeps in float32 and masq in float64; in float64 it gives masq's codes, {fits}"
    if known:
        text = (
            "the package uses the lowest code too, with max|x| over half of 15, and sweeps in float32; without that "
            "code, in float64, it gives masq's scales and codes"
        )
        return RULE, text
    return DIFFERENT, ""


def _largest(values: torch.Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _total(figures: list[Spec]) -> Spec:
    """Counts and losses add up over modules, differences and ratios take the largest."""
    added = {key for key in figures[0] if isinstance(figures[0][key], int) or key.endswith("loss")}
    return {key: (sum if key in added else max)(one[key] for one in figures) for key in figures[0]}


def figures_of(spec: Spec, module: str, tensors: Tensors, theirs: Tensors) -> Spec:
    """Figures of one module of a check."""
    match spec["kind"]:
        case "grid":
            return grid_figures(spec, tensors[f"{spec.get('what', 'weight')}/{module}"], theirs)
        case "gptq":
            return gptq_figures(spec, tensors[f"weight/{module}"], tensors[f"rows/{module}"], theirs)
        case "hadamard":
            return hadamards.figures(theirs["matrix"])
        case kind:
            return factors.FIGURES[kind](spec, module, tensors, theirs)


def verdict_of(spec: Spec, found: Spec, partners: dict[str, Spec]) -> tuple[str, str]:
    """Verdict and explanation of a check from its figures over all modules."""
    match spec["kind"]:
        case "grid":
            return grid_verdict(spec, found)
        case "gptq":
            return gptq_verdict(spec, found, partners)
        case "hadamard":
            return hadamards.verdict(found)
        case _:
            return factors.verdict(spec, found)


def check(spec: Spec, tensors: Tensors, partners: dict[str, Spec]) -> Spec:
    """One check: figures, verdict, explanation.

    Args:
        spec: of the check, from the file.
        tensors: of the file.
        partners: results so far, by name.
    """
    theirs = {module: _fields(tensors, f"{spec['name']}/{module}/") for module in spec["modules"]}
    by_module = {module: figures_of(spec, module, tensors, own) for module, own in theirs.items()}
    found = by_module if spec["kind"] == "hadamard" else _total(list(by_module.values()))
    verdict, explanation = verdict_of(spec, found, partners)
    what = {key: spec[key] for key in spec if key not in ("modules", "inputs", "added_first", "reciprocal")}
    if "orders_to_512" in what:
        orders = what.pop("orders_to_512")
        what["orders_to_512_of_the_package_alone"] = hadamards.without_matrix(orders)
        what["orders_to_512_of_masq_alone"] = [
            n for n in range(1, 513) if n not in orders and not hadamards.without_matrix([n])
        ]
    shapes = {module: list(own.get("codes", next(iter(own.values()))).shape) for module, own in theirs.items()}
    return what | {"shapes": shapes, "figures": found, "verdict": verdict, "explanation": explanation}


def _fields(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def checks(about: Spec, tensors: Tensors) -> Iterator[Spec]:
    """Every check of a file, in its order; those in float64 first, as others are explained by them."""
    partners: dict[str, Spec] = {}
    for spec in sorted(about["checks"], key=lambda one: one.get("precision") != "float64"):
        partners[spec["name"]] = check(spec, tensors, partners)
    yield from (partners[spec["name"]] for spec in about["checks"])


def share(found: Spec) -> float:
    """Share of equal codes."""
    return 1 - found["other_codes"] / found["codes"]


def table(results: list[Spec]) -> str:
    """One row per check."""
    rows = []
    for one in results:
        found, kind = one["figures"], one["kind"]
        scale = equal = loss = "-"
        if kind in ("grid", "gptq"):
            scale, equal = f"{found['scale_difference']:.2g}", f"{100 * share(found):.4f} %"
        if kind == "gptq":
            loss = f"{found['their_loss'] / found['loss']:.6f}"
        if kind in ("smooth", "awq"):
            scale = f"{found['factor_difference']:.2g} (relative)"
        rows.append([one["name"], scale, equal, loss, one["verdict"]])
    headers = ["check", "scales: largest difference", "equal codes", "loss, theirs / masq's", "verdict"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Command line: the file of the other environment, where the record goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("results/independent/checks.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    about, tensors = read(options.input)
    results = list(checks(about, tensors))
    record = {
        "packages": about["packages"],
        "python": about["python"],
        "size": about["size"],
        "checks": results,
        "provenance": provenance(about["seed"], {"slice": sha256_file(options.input)}),
    }
    atomic_write_json(options.output, record)
    print(table(results))


if __name__ == "__main__":
    main()
