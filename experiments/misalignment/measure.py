"""Range ratios and the cost of a shared factor, layer by layer, on the float model's calibration activations.

For every group of linears that read one input, and every modality m:

- the range ratio of a channel, max |x_m| / max |x_text| (MASQuant, arXiv 2603.04800, figure 4), its median and its
  90th percentile over channels;
- the dictated share: channels whose maximum over all tokens, which sets SmoothQuant's factor, belongs to m;
- the SQNR of the group's quantized outputs on m's tokens, in dB, under no smoothing, under one factor from all tokens,
  and under m's own factor with its own weight (equation 12). The difference of the last two is the misalignment cost.

Layers are measured alone: inputs come from the float model.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from experiments.walk import FloatWalk, float_weight
from masq.calibration.replay import ReplayBatch, collect
from masq.calibration.statistics import GroupStatistics, TokenSample
from masq.config import RunConfig
from masq.files import atomic_write_json
from masq.models.base import GROUPS, BlockAdapter, Modality, Role
from masq.numerics.affine import fake_quantize
from masq.numerics.scheme import Scheme
from masq.numerics.sqnr import token_sqnr
from masq.transforms.smoothing import modality_factors, shared_factor

ALPHA = 0.5
SCHEMES = ("w8a8", "w4a8", "w4a6", "w4a4")
TOKENS = 256


def _quantized(rows: torch.Tensor, weights: list[torch.Tensor], factor: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Outputs [n, sum of O] of the linears of a group, input and weight quantized after smoothing with ``factor``."""
    assert scheme.activation is not None
    assert scheme.weight is not None
    x = fake_quantize(rows / factor, scheme.activation)
    return torch.cat([F.linear(x, fake_quantize(weight * factor, scheme.weight)) for weight in weights], dim=1)


def group_costs(stats: GroupStatistics, weights: list[torch.Tensor], scheme: Scheme) -> dict[str, dict[str, float]]:
    """Mean SQNR in dB by modality and kind of smoothing: ``none``, ``shared``, ``own``."""
    shared, own = shared_factor(stats, weights, ALPHA), modality_factors(stats, weights, ALPHA)
    costs = {}
    for modality, rows in stats.rows.items():
        exact = torch.cat([F.linear(rows, weight) for weight in weights], dim=1)
        factors = {"none": torch.ones_like(shared), "shared": shared, "own": own[modality]}
        costs[modality.name.lower()] = {
            kind: float(token_sqnr(exact, _quantized(rows, weights, factor, scheme)).mean())
            for kind, factor in factors.items()
        }
    return costs


def group_ranges(stats: GroupStatistics) -> dict[str, dict[str, float]]:
    """Median and 90th percentile of the range ratio to text over channels, and the dictated share, by modality."""
    text = stats.abs_max[Modality.TEXT]
    alive = text > 0
    names = sorted(stats.abs_max)
    dictator = torch.stack([stats.abs_max[m] for m in names]).argmax(0)
    found = {}
    for at, modality in enumerate(names):
        ratio = (stats.abs_max[modality] / text)[alive].double()
        quantiles = torch.quantile(ratio, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        found[modality.name.lower()] = {
            "ratio_p10": quantiles[0],
            "ratio_median": quantiles[1],
            "ratio_p90": quantiles[2],
            "dictated": float((dictator == at).double().mean()),
        }
    return found


@torch.no_grad()
def measure_block(
    block: BlockAdapter, hidden: Sequence[torch.Tensor], replay: list[ReplayBatch], sample: TokenSample
) -> dict[str, Any]:
    """Ranges and costs of every group of one block."""
    found = {}
    for group, stats in collect(block, hidden, replay, sample=sample).items():
        weights = [float_weight(block, Role(role)) for role in GROUPS[group]]
        found[group] = {
            "ranges": group_ranges(stats),
            "sqnr": {name: group_costs(stats, weights, Scheme.preset(name)) for name in SCHEMES},
        }
    return found


def measure(config: RunConfig, source: Path) -> dict[str, Any]:
    """All blocks of the model of ``config`` on its calibration samples."""
    walk = FloatWalk(config, source)
    sample = TokenSample.draw((batch.modality for batch in walk.replay), TOKENS, config.seed)
    return {
        "model": config.model.name,
        "alpha": ALPHA,
        "tokens_per_modality": TOKENS,
        "samples": len(walk.samples),
        "blocks": [measure_block(block, hidden, walk.replay, sample) for block, hidden in walk.blocks()],
        "provenance": walk.provenance(),
    }


def main() -> None:
    """Command line: an embedded model, samples per task, where the record goes."""
    from masq.compose import compose
    from masq.models.zoo.smol_omni import data_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol_omni")
    parser.add_argument("--modality", default="tri")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    overrides = [f"model={options.model}", f"modality={options.modality}", "scheme=w16a16", "method=none"]
    config = compose([*overrides, f"calibration.samples_per_task={options.samples}"])
    record = measure(config, data_path("calibration"))
    atomic_write_json(options.output, record)


if __name__ == "__main__":
    main()
