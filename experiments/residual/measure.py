"""What a correction has to make up, and how much of it each rank does (MASQuant, arXiv 2603.04800, figures 5 and 6).

For every linear that is corrected and every modality m but text, with closed-form factors (equation 12) and inputs from
the float model: dW_m = W s_m - Q(W s_text), T T = C_m the second moment of the smoothed inputs. Measured are

- the effective rank of dW_m and of T dW_m^T, exp of the entropy of the normalized singular values (Roy and Vetterli,
  EUSIPCO 2007), as a share of the smaller side;
- the SQNR of the output, 10 log10(||T (W s_m)^T||^2 / ||T (dW_m^T - L_r)||^2), over the rank ratio r, for the whitened
  fit and for the plain one. Activations are not quantized: what is left is the weight's error;

each with the factors as they are (``given``) and brought to the scale of text's (``text``).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.walk import FloatWalk, float_weight
from masq.calibration.replay import ReplayBatch, collect
from masq.calibration.statistics import GroupStatistics
from masq.compensation.low_rank import scaled_covariance
from masq.config import RunConfig
from masq.files import atomic_write_json
from masq.models.base import GROUPS, BlockAdapter, Modality, Role
from masq.numerics.affine import fake_quantize
from masq.numerics.linalg import whitener
from masq.numerics.scheme import Scheme, TensorFormat
from masq.transforms.smoothing import modality_factors

ALPHA, DAMPING = 0.5, 1e-4
CORRECTED = ("qkv", "output", "gate_up")
RATIOS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
GAUGES = ("given", "text")


def effective_rank(squares: torch.Tensor) -> float:
    """Of a matrix with these squared singular values: exp of the entropy of the values' shares."""
    values = squares.clamp_min(0).sqrt()
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def spectra(error_io: torch.Tensor, root: torch.Tensor) -> dict[str, torch.Tensor]:
    """Squared singular values of an error dW^T [I, O] and of T dW^T, and what each plain direction costs under T.

    Returns:
        ``plain`` and ``whitened``, descending, and ``plain_cost``: s_i^2 ||T u_i||^2, the whitened energy that the
        plain fit leaves for every direction it does not take.
    """
    whitened = root @ error_io
    energies = torch.linalg.eigvalsh(whitened @ whitened.t()).flip(0).clamp_min(0)
    squares, u = torch.linalg.eigh(error_io @ error_io.t())
    squares, u = squares.flip(0).clamp_min(0), u.flip(1)
    return {"plain": squares, "whitened": energies, "plain_cost": squares * (root @ u).square().sum(0)}


def sqnr_by_ratio(signal: float, left: torch.Tensor, rank: int) -> list[float]:
    """dB at every ratio of ``RATIOS``: of ``left`` [I] the directions up to a rank are taken away."""
    remaining = [float(left[int(ratio * rank + 1e-9) :].sum()) for ratio in RATIOS]
    return [10 * torch.log10(torch.tensor(signal / max(one, 1e-30), dtype=torch.float64)).item() for one in remaining]


def measure_linear(
    weight: torch.Tensor, factors: dict[Modality, torch.Tensor], stats: GroupStatistics, fmt: TensorFormat
) -> dict[str, Any]:
    """Ranks and SQNR of one linear [O, I] by gauge and modality."""
    text, found = factors[Modality.TEXT], {}
    stored = fake_quantize(weight * text, fmt).double()
    side = min(weight.shape)
    for gauge in GAUGES:
        for modality in sorted(set(factors) - {Modality.TEXT}):
            own = factors[modality]
            if gauge == "text":
                own = own * (text.log().mean() - own.log().mean()).exp()
            root = whitener(scaled_covariance(stats.second_moment[modality], own), DAMPING).sqrt
            smoothed = (weight * own).double()
            made = spectra((smoothed - stored).t(), root)
            signal = float((root @ smoothed.t()).square().sum())
            found[f"{gauge}.{modality.name.lower()}"] = {
                "effective_rank": {name: effective_rank(made[name]) / side for name in ("plain", "whitened")},
                "sqnr": {
                    "plain": sqnr_by_ratio(signal, made["plain_cost"], side),
                    "whitened": sqnr_by_ratio(signal, made["whitened"], side),
                },
            }
    return found


@torch.no_grad()
def measure_block(
    block: BlockAdapter, hidden: Sequence[torch.Tensor], replay: list[ReplayBatch], scheme: Scheme
) -> dict[str, Any]:
    """Every corrected linear of one block."""
    found = {}
    for group, stats in collect(block, hidden, replay, groups=CORRECTED, second_moment=CORRECTED).items():
        roles = [Role(role) for role in GROUPS[group]]
        weights = {role: float_weight(block, role) for role in roles}
        factors = modality_factors(stats, list(weights.values()), ALPHA)
        assert scheme.weight is not None
        for role, weight in weights.items():
            found[role.value] = measure_linear(weight, factors, stats, scheme.weight)
    return found


def measure(config: RunConfig, source: Path) -> dict[str, Any]:
    """All blocks of the model of ``config`` on its calibration samples."""
    walk = FloatWalk(config, source)
    return {
        "model": config.model.name,
        "scheme": config.scheme.name,
        "ratios": list(RATIOS),
        "samples": len(walk.samples),
        "blocks": [measure_block(block, hidden, walk.replay, config.scheme) for block, hidden in walk.blocks()],
        "provenance": walk.provenance(),
    }


def main() -> None:
    """Command line: an embedded model, a scheme, samples per task, where the record goes."""
    from masq.compose import compose
    from masq.models.zoo.smol_omni import data_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol_omni")
    parser.add_argument("--modality", default="tri")
    parser.add_argument("--scheme", default="w4a6")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("results/residual/smol_omni.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    overrides = [
        f"model={options.model}",
        f"modality={options.modality}",
        f"scheme={options.scheme}",
        "method=masquant",
    ]
    config = compose([*overrides, f"calibration.samples_per_task={options.samples}"])
    atomic_write_json(options.output, measure(config, data_path("calibration")))


if __name__ == "__main__":
    main()
