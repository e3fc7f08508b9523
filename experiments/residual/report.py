"""Effective ranks and SQNR over the rank ratio as tables, from the record of ``measure`` alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from tabulate import tabulate

from masq.files import atomic_write_bytes, read_json

RECORD = Path("results/residual/smol_omni.json")


def linears(record: dict[str, Any], key: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Block, role and what was measured under a gauge and modality."""
    for index, block in enumerate(record["blocks"]):
        for role, found in block.items():
            yield index, role, found[key]


def rank_table(record: dict[str, Any]) -> str:
    """Mean and extremes of the effective rank over blocks, by role, gauge and modality."""
    rows = []
    for key in next(iter(record["blocks"][0].values())):
        gauge, modality = key.split(".")
        for role in record["blocks"][0]:
            found = [one["effective_rank"] for _, name, one in linears(record, key) if name == role]
            cells = []
            for kind in ("plain", "whitened"):
                values = [100 * one[kind] for one in found]
                cells.append(f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})")
            lower = sum(one["whitened"] < one["plain"] for one in found)
            rows.append([gauge, modality, role, *cells, f"{lower} of {len(found)}"])
    headers = ["gauge", "modality", "linear", "plain, % of full", "whitened, % of full", "whitened is lower in"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def sqnr_table(record: dict[str, Any]) -> str:
    """Mean SQNR over all linears by rank ratio."""
    rows = []
    for key in next(iter(record["blocks"][0].values())):
        gauge, modality = key.split(".")
        for kind in ("whitened", "plain"):
            curves = [one["sqnr"][kind] for _, _, one in linears(record, key)]
            means = [mean(curve[at] for curve in curves) for at in range(len(record["ratios"]))]
            rows.append([gauge, modality, kind, *(f"{value:.1f}" for value in means)])
    headers = ["gauge", "modality", "fit", *(f"{ratio:g}" for ratio in record["ratios"])]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def report(record: dict[str, Any]) -> str:
    """The whole report in Markdown."""
    made = record["provenance"]
    return (
        "\n\n".join(
            [
                f"# What a correction has to make up: {record['model']}, weights of {record['scheme']}",
                "Made by `python -m experiments.residual.report` from "
                f"`results/residual/{record['model']}.json` (`measure.py` says what is measured; {record['samples']} "
                f"calibration samples, {len(record['blocks'])} blocks, commit {str(made['commit'])[:10]}).",
                "## Effective rank of the error (figure 5 of arXiv 2603.04800)",
                "Mean over blocks, smallest and largest in brackets.",
                rank_table(record),
                "## SQNR of outputs over the rank ratio, dB (figure 6)",
                "Mean over all linears; activations are not quantized. Ratio 0 is without a correction.",
                sqnr_table(record),
            ]
        )
        + "\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--output", type=Path, default=Path("results/tables/residual.md"))
    options = parser.parse_args()
    atomic_write_bytes(options.output, report(read_json(options.record)).encode())


if __name__ == "__main__":
    main()
