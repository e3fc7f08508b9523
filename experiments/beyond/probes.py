"""The probes: what the candidates could gain, before any of them is tried.

On some blocks of ``smol_omni``, on inputs that the float model gives them, for every group of linears and modality:

- ``mean_share``: ``|E x|^2 / E |x|^2``, the energy of the inputs that is their mean, which centring (C5) takes away,
  and ``range_share``, the mean ratio of a token's largest absolute value without the mean to that with it;
- ``gauge``: mean log(s_text / s_m) of the learned factors and of those of equation 12, a scale that nothing fixes (C1);
- by linear of the group, the energy of the error of rounding to nearest that is due to the weight, to the activations
  and to both at once (the cross term may be negative), as shares of the whole: which stage can help.

What whitening does to effective ranks is measured by ``experiments.residual``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tabulate import tabulate

from experiments.beyond.layer_gate import BLOCKS, FloatChains, HeldOut, learned, stages_of
from masq.calibration.cache import Request
from masq.compose import compose
from masq.files import atomic_write_json, read_json
from masq.models.base import GROUPS, BlockAdapter, Modality, Role
from masq.models.fingerprint import fingerprint
from masq.numerics.affine import fake_quantize
from masq.numerics.scheme import LinearFormat
from masq.pipeline.progress import BlockClock
from masq.report.provenance import provenance
from masq.transforms.smoothing import modality_factors

_LOG = logging.getLogger(__name__)
MODALITIES = tuple(m for m in Modality if m is not Modality.PADDING)


def rows_by_modality(held_out: HeldOut, role: Role) -> dict[Modality, torch.Tensor]:
    """What a linear reads, float64 [n, I], of the modalities that occur."""
    found: dict[Modality, list[torch.Tensor]] = {}
    for x, batch in zip(held_out.linears[role], held_out.chain.replay, strict=True):
        for modality in MODALITIES:
            rows = x[batch.modality == modality]
            if len(rows):
                found.setdefault(modality, []).append(rows.double())
    return {modality: torch.cat(parts) for modality, parts in found.items()}


def mean_share(rows: torch.Tensor) -> float:
    """``|E x|^2 / E |x|^2`` of [n, I]."""
    return float(rows.mean(0).square().sum() / rows.square().sum(1).mean())


def range_share(rows: torch.Tensor) -> float:
    """Mean over tokens of ``max |x - E x| / max |x|``."""
    with_mean = rows.abs().amax(1).clamp(min=1e-30)
    return float(((rows - rows.mean(0)).abs().amax(1) / with_mean).mean())


def error_shares(rows: torch.Tensor, weight: torch.Tensor, fmt: LinearFormat) -> dict[str, float]:
    """Of ``|Q(x) Q(W) - x W|^2``: what ``x (Q(W) - W)``, ``(Q(x) - x) W`` and the rest are of it."""
    assert fmt.activation is not None
    x_error = fake_quantize(rows.float(), fmt.activation).double() - rows
    w_error = fake_quantize(weight.float(), fmt.weight).double() - weight
    of_weight, of_activation = rows @ w_error.t(), x_error @ weight.t()
    whole = of_weight + of_activation + x_error @ w_error.t()
    total = float(whole.square().sum())
    weight_share, activation_share = (float(part.square().sum()) / total for part in (of_weight, of_activation))
    return {"weight": weight_share, "activation": activation_share, "cross": 1 - weight_share - activation_share}


def gauges(factors: Mapping[Modality, torch.Tensor]) -> dict[str, float]:
    """Mean log(s_text / s_m) by modality."""
    text = factors[Modality.TEXT].double().log().mean()
    return {m.name.lower(): float(text - factors[m].double().log().mean()) for m in factors if m is not Modality.TEXT}


def probe(block: BlockAdapter, held_out: HeldOut, formats: Mapping[str, Mapping[str, LinearFormat]]) -> dict[str, Any]:
    """Everything about one float block but the gauges; ``formats`` by scheme and role."""
    found: dict[str, Any] = {}
    for group, roles in GROUPS.items():
        reads = rows_by_modality(held_out, Role(roles[0]))
        found[group] = {
            modality.name.lower(): {
                "mean_share": mean_share(rows),
                "range_share": range_share(rows),
                "errors": {
                    scheme: {role: error_shares(rows, _weight(block, role), by_role[role]) for role in roles}
                    for scheme, by_role in formats.items()
                },
            }
            for modality, rows in reads.items()
        }
    return found


def _weight(block: BlockAdapter, role: str) -> torch.Tensor:
    linear = block.linear(Role(role))
    assert isinstance(linear, torch.nn.Linear)
    return linear.weight.detach().double()


@torch.no_grad()
def run(schemes: list[str], blocks: list[int], output: Path) -> None:
    """Probe the blocks; factors are learned at the first scheme."""
    configs = {scheme: compose([f"scheme={scheme}", "method=masquant"]) for scheme in schemes}
    config = configs[schemes[0]]
    stages = stages_of(config)
    chains = FloatChains(config, stages)
    formats = {scheme: one.scheme.formats for scheme, one in configs.items()}
    record: dict[str, Any] = {"schemes": schemes, "learned_at": schemes[0], "blocks": {}}
    clock = BlockClock("probes", len(blocks))
    for index, block, chain, held_out in chains.blocks(blocks):
        found = probe(block, held_out, formats)
        with torch.enable_grad():
            plan = learned(block, index, chain, chain.replay, stages, chains.context)
        statistics = Request(tuple(GROUPS)).collect(block, chain.hidden, chain.replay)
        for group, factors in plan.factors.items():
            closed = modality_factors(statistics[group], [_weight(block, role) for role in GROUPS[group]], 0.5)
            found[group]["gauge"] = {"learned": gauges(factors), "equation_12": gauges(closed)}
        record["blocks"][str(index)] = found
        hashes = {**chains.hashes, "model": fingerprint(config.model, None)}
        record["provenance"] = provenance(config.seed, hashes, device=config.model.device)
        atomic_write_json(output, record)
        clock.tick("")


def table(record: dict[str, Any]) -> str:
    """Markdown: means over blocks by group and modality."""
    rows, blocks, schemes = [], list(record["blocks"].values()), record["schemes"]
    for group in GROUPS:
        for name in (m.name.lower() for m in MODALITIES):
            cells = [block[group][name] for block in blocks if name in block[group]]
            known = (block[group].get("gauge", {"learned": {}}) for block in blocks)
            gauge = [one for one in known if name in one["learned"]]
            row = [group, name, f"{100 * mean(c['mean_share'] for c in cells):.0f} %"]
            row.append(f"{mean(c['range_share'] for c in cells):.2f}")
            for kind in ("learned", "equation_12"):
                row.append(f"{mean(g[kind][name] for g in gauge):+.2f}" if gauge else "")
            for scheme in schemes:
                errors = [one for cell in cells for one in cell["errors"][scheme].values()]
                shares = [mean(one[kind] for one in errors) for kind in ("weight", "activation")]
                row.append(" / ".join(f"{100 * share:.0f} %" for share in shares))
            rows.append(row)
    headers = ["group", "modality", "mean", "range left", "gauge learned", "gauge eq. 12"]
    headers += [f"error {scheme}: weight / activation" for scheme in schemes]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["w4a6", "w4a4", "w4a8"])
    parser.add_argument("--blocks", nargs="*", type=int, default=list(BLOCKS))
    parser.add_argument("--output", type=Path, default=Path("results/beyond/probes.json"))
    parser.add_argument("--report", action="store_true", help="print the table of a record that is there")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    if not options.report:
        run(options.schemes, options.blocks, options.output)
    print(table(read_json(options.output)))


if __name__ == "__main__":
    main()
