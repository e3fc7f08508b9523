"""The table of the layer gate: means over blocks and seeds, differences to masquant on the same blocks and seeds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from tabulate import tabulate

BASE = "masquant"
MODALITIES = ("text", "vision", "audio")


def cells(arm: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What was measured by (seed, block)."""
    return {(seed, block): found for seed, by in arm.items() for block, found in by.items()}


def table(record: dict[str, Any]) -> str:
    """Markdown: SQNR of the block output in dB, gains over masquant, bytes of corrections, seconds."""
    base, lines = cells(record["arms"][BASE]), []
    for name, arm in record["arms"].items():
        found = cells(arm)
        shared = sorted(set(found) & set(base))
        values = [mean(found[key]["block"][m] for key in found) for m in MODALITIES]
        gains = [mean(found[key]["block"][m] - base[key]["block"][m] for key in shared) for m in MODALITIES]
        size = mean(one["bits"]["adapter_bytes"] for one in found.values()) / 1024
        seconds = mean(one["seconds"] for one in found.values())
        lines.append(
            [
                name,
                len(found),
                *(f"{v:.1f}" for v in values),
                *(f"{v:+.1f}" for v in gains),
                f"{size:.0f}",
                f"{seconds:.0f}",
            ]
        )
    headers = ["arm", "cells", *MODALITIES, *(f"gain {m}" for m in MODALITIES), "adapters KiB", "seconds"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Print the table of one record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path, nargs="?", default=Path("results/beyond/layers-w4a6.json"))
    print(table(json.loads(parser.parse_args().record.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
