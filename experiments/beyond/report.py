"""The table of the layer gate: means over blocks and seeds, gains over masquant on the same blocks and seeds.

An interval takes blocks as what is drawn: seeds of one block are averaged first, then Student's t over the blocks. An
arm passes the gate of a scheme if text loses less than 0.1 dB on average and vision and audio each gain at least 0.5 dB
on 70 % of the cells.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from scipy.stats import t as student
from tabulate import tabulate

from masq.files import atomic_write_bytes, read_json

BASE = "masquant"
MODALITIES = ("text", "vision", "audio")
SCHEMES = ("w4a8", "w4a6", "w4a4")
LEVEL = 0.95
LEAST_TEXT, LEAST_OTHER, SHARE = -0.1, 0.5, 0.7
_FOLDER = Path("results/beyond")


def cells(arm: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What was measured by (seed, block)."""
    return {(seed, block): found for seed, by in arm.items() for block, found in by.items()}


def gains(arm: dict[str, Any], base: dict[str, Any], modality: str) -> dict[tuple[str, str], float]:
    """SQNR of the block output over that of the base in dB, where both were measured."""
    found, other = cells(arm), cells(base)
    return {
        key: found[key]["block"][modality] - other[key]["block"][modality]
        for key in sorted(found.keys() & other.keys())
    }


def interval(differences: dict[tuple[str, str], float]) -> tuple[float, float]:
    """Mean over blocks of the means over seeds, and half the width of its interval; infinite for a single block."""
    blocks = sorted({block for _, block in differences})
    means = [mean(value for (_, block), value in differences.items() if block == one) for one in blocks]
    if len(means) < 2:
        return mean(means), float("inf")
    return mean(means), float(student.ppf((1 + LEVEL) / 2, len(means) - 1)) * stdev(means) / len(means) ** 0.5


def time_ratio(arm: dict[str, Any], base: dict[str, Any]) -> float:
    """Median over cells of the seconds, as a share of the base's on the same block and seed."""
    found, other = cells(arm), cells(base)
    return median(found[key]["seconds"] / other[key]["seconds"] for key in found.keys() & other.keys())


def passes(arm: dict[str, Any], base: dict[str, Any]) -> bool:
    """The gate of ``SHARE`` and the two limits."""
    text = gains(arm, base, "text")
    others = [gains(arm, base, modality).values() for modality in MODALITIES[1:]]
    enough = [mean(value >= LEAST_OTHER for value in values) >= SHARE for values in others]
    return mean(text.values()) >= LEAST_TEXT and all(enough)


def table(record: dict[str, Any]) -> str:
    """Markdown: SQNR of the block output, gains with intervals, bits, seconds and their ratio to the base, verdict."""
    base, lines = record["arms"][BASE], []
    for name, arm in record["arms"].items():
        found = cells(arm)
        line: list[Any] = [name, len(found)]
        line += [f"{mean(one['block'][m] for one in found.values()):.1f}" for m in MODALITIES]
        for modality in MODALITIES:
            middle, half = interval(gains(arm, base, modality))
            line.append("" if name == BASE else f"{middle:+.1f} ± {half:.1f}")
        line.append(f"{mean(one['bits']['total'] for one in found.values()):.2f}")
        line.append(f"{mean(one['seconds'] for one in found.values()):.0f}")
        line.append(f"{time_ratio(arm, base):.2f}")
        lines.append([*line, "" if name == BASE else "yes" if passes(arm, base) else "no"])
    headers = [
        "arm",
        "cells",
        *MODALITIES,
        *(f"{m} gain" for m in MODALITIES),
        "bits / weight",
        "seconds",
        "time",
        "passes",
    ]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def page(records: dict[str, dict[str, Any]]) -> str:
    """All schemes below each other."""
    parts = ["<!-- python -m experiments.beyond.report -->", ""]
    for scheme, record in records.items():
        seeds = ", ".join(sorted({seed for arm in record["arms"].values() for seed in arm}))
        devices = " and ".join(sorted({one["device_name"] for runs in record["provenance"].values() for one in runs}))
        parts += [f"**{scheme}**, seeds {seeds}, one thread on {devices}", "", table(record), ""]
    return "\n".join(parts)


def main() -> None:
    """Write the table of all records that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/tables/beyond_layers.md"))
    options = parser.parse_args()
    paths = {scheme: _FOLDER / f"layers-{scheme}.json" for scheme in SCHEMES}
    text = page({scheme: read_json(path) for scheme, path in paths.items() if path.exists()})
    atomic_write_bytes(options.output, text.encode())
    print(text)


if __name__ == "__main__":
    main()
