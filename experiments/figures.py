"""Figures 2, 4, 5 and 6 of MASQuant (arXiv 2603.04800) on ``smol_omni``, from committed measurements alone.

``experiments.misalignment`` and ``experiments.residual`` measure; the same numbers as tables are in
``results/tables/discrimination.md`` and ``results/tables/residual.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from masq.files import atomic_write_bytes, read_json
from masq.report.figures import COLOURS, MODALITIES, drawing, svg

RESULTS = Path("results")
MISALIGNMENT, RESIDUAL = "misalignment/smol_omni.json", "residual/smol_omni.json"
ACTIVATIONS = {"w4a8": "A8", "w4a6": "A6", "w4a4": "A4"}
INK = "#808080"
"""Reads on light and dark pages, which a picture by itself does not know."""
Record = dict[str, Any]


OF_MODALITY = dict(zip(MODALITIES, COLOURS, strict=False))
GAUGES = {"given": "factors as learned", "text": "at the scale of text's factor"}


def smoothing_by_layer(record: Record) -> str:
    """Figure 2: SQNR of layers under one factor for all and under the modality's own, mean over groups."""
    modalities = list(record["blocks"][0]["qkv"]["ranges"])
    with drawing(9, 3.2, len(ACTIVATIONS)) as (figure, panels):
        for axes, (scheme, label) in zip(panels, ACTIVATIONS.items(), strict=True):
            for modality in modalities:
                for kind, style in {"shared": ":", "own": "-"}.items():
                    values = [
                        mean(group["sqnr"][scheme][modality][kind] for group in block.values())
                        for block in record["blocks"]
                    ]
                    axes.plot(values, style, color=OF_MODALITY[modality], linewidth=1.3, label=f"{modality}, {kind}")
            axes.set_title(label)
            axes.set_xlabel("block")
            axes.grid(alpha=0.25)
        panels[0].set_ylabel("SQNR, dB")
        panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, INK)


def ranges_by_layer(record: Record) -> str:
    """Figure 4: median over channels of a modality's range against text's, by block and group."""
    groups = list(record["blocks"][0])
    with drawing(9, 3.0, len(groups)) as (figure, panels):
        for axes, group in zip(panels, groups, strict=True):
            for modality in record["blocks"][0][group]["ranges"]:
                values = [block[group]["ranges"][modality]["ratio_median"] for block in record["blocks"]]
                axes.plot(values, color=OF_MODALITY[modality], linewidth=1.3, label=modality)
            axes.set_title(group)
            axes.set_yscale("log")
            axes.set_xlabel("block")
            axes.grid(alpha=0.25)
        panels[0].set_ylabel("range / range of text")
        panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, INK)


def effective_ranks(record: Record) -> str:
    """Figure 5: effective rank of what a correction must make up, mean over the linears of a block."""
    keys = [key for key in next(iter(record["blocks"][0].values())) if key.startswith("given.")]
    with drawing(7, 3.0) as (figure, axes):
        for key in keys:
            modality = key.split(".")[1]
            for kind, style in {"plain": ":", "whitened": "-"}.items():
                values = [
                    100 * mean(linear[key]["effective_rank"][kind] for linear in block.values())
                    for block in record["blocks"]
                ]
                axes.plot(values, style, color=OF_MODALITY[modality], linewidth=1.3, label=f"{modality}, {kind}")
        axes.set_xlabel("block")
        axes.set_ylabel("% of full rank")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, INK)


def sqnr_over_rank(record: Record) -> str:
    """Figure 6: SQNR over the rank ratio, mean over all linears, with and without whitening."""
    modalities = [key.split(".")[1] for key in next(iter(record["blocks"][0].values())) if key.startswith("given.")]
    with drawing(8, 3.2, len(GAUGES)) as (figure, panels):
        for axes, (gauge, title) in zip(panels, GAUGES.items(), strict=True):
            for modality in modalities:
                for kind, style in {"plain": ":", "whitened": "-"}.items():
                    found = [one[f"{gauge}.{modality}"] for block in record["blocks"] for one in block.values()]
                    values = [mean(one["sqnr"][kind][at] for one in found) for at in range(len(record["ratios"]))]
                    label = f"{modality}, {kind}"
                    axes.plot(record["ratios"], values, style, color=OF_MODALITY[modality], linewidth=1.3, label=label)
            axes.set_title(title)
            axes.set_xlabel("rank ratio")
            axes.grid(alpha=0.25)
        panels[0].set_ylabel("SQNR, dB")
        panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, INK)


FIGURES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "figure2": (MISALIGNMENT, smoothing_by_layer),
    "figure4": (MISALIGNMENT, ranges_by_layer),
    "figure5": (RESIDUAL, effective_ranks),
    "figure6": (RESIDUAL, sqnr_over_rank),
}


def write(results: Path, folder: Path) -> None:
    """Draw every figure from the measurements in ``results`` into ``folder``."""
    for name, (source, draw) in FIGURES.items():
        atomic_write_bytes(folder / f"{name}.svg", (draw(read_json(results / source)) + "\n").encode())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=RESULTS / "figures")
    options = parser.parse_args()
    write(options.results, options.output)


if __name__ == "__main__":
    main()
