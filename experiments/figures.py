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


OF_MODALITY: dict[str, str] = dict(zip(MODALITIES, COLOURS, strict=False))
FITS = {"plain": ":", "whitened": "-"}
GAUGES = {"given": "factors as learned", "text": "at the scale of text's factor"}


Curve = tuple[str, str, list[float]]
"""Modality, style of the line, values."""


def curves(panels: dict[str, dict[str, Curve]], axes_names: tuple[str, str], at: list[float], log: bool = False) -> str:
    """Panels side by side, by title; in each the same curves by label, over ``at``, with one legend for all."""
    with drawing(1.5 + 2.5 * max(len(panels), 2), 3.2, len(panels)) as (figure, found):
        every = [found] if len(panels) == 1 else list(found)
        for axes, (title, lines) in zip(every, panels.items(), strict=True):
            for label, (modality, style, values) in lines.items():
                axes.plot(at, values, style, color=OF_MODALITY[modality], linewidth=1.3, label=label)
            axes.set_title(title)
            axes.set_yscale("log" if log else "linear")
            axes.set_xlabel(axes_names[0])
            axes.grid(alpha=0.25)
        every[0].set_ylabel(axes_names[1])
        every[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure, INK)


def _blocks(record: Record) -> list[float]:
    return [float(index) for index in range(len(record["blocks"]))]


def _modalities(record: Record) -> list[str]:
    """Those that are corrected, in the measurement of residuals."""
    return [key.split(".")[1] for key in next(iter(record["blocks"][0].values())) if key.startswith("given.")]


def smoothing_by_layer(record: Record) -> str:
    """Figure 2: SQNR of layers under one factor for all and under the modality's own, mean over groups."""

    def values(scheme: str, modality: str, kind: str) -> list[float]:
        return [mean(group["sqnr"][scheme][modality][kind] for group in block.values()) for block in record["blocks"]]

    panels = {
        label: {
            f"{modality}, {kind}": (modality, style, values(scheme, modality, kind))
            for modality in record["blocks"][0]["qkv"]["ranges"]
            for kind, style in {"shared": ":", "own": "-"}.items()
        }
        for scheme, label in ACTIVATIONS.items()
    }
    return curves(panels, ("block", "SQNR, dB"), _blocks(record))


def ranges_by_layer(record: Record) -> str:
    """Figure 4: median over channels of a modality's range against text's, by block and group."""
    panels = {
        group: {
            modality: (modality, "-", [block[group]["ranges"][modality]["ratio_median"] for block in record["blocks"]])
            for modality in ranges["ranges"]
        }
        for group, ranges in record["blocks"][0].items()
    }
    return curves(panels, ("block", "range / range of text"), _blocks(record), log=True)


def effective_ranks(record: Record) -> str:
    """Figure 5: effective rank of what a correction must make up, mean over the linears of a block."""

    def values(modality: str, kind: str) -> list[float]:
        key = f"given.{modality}"
        return [100 * mean(one[key]["effective_rank"][kind] for one in block.values()) for block in record["blocks"]]

    lines = {f"{m}, {kind}": (m, style, values(m, kind)) for m in _modalities(record) for kind, style in FITS.items()}
    return curves({"": lines}, ("block", "% of full rank"), _blocks(record))


def sqnr_over_rank(record: Record) -> str:
    """Figure 6: SQNR over the rank ratio, mean over all linears, with and without whitening."""

    def values(gauge: str, modality: str, kind: str) -> list[float]:
        found = [one[f"{gauge}.{modality}"]["sqnr"][kind] for block in record["blocks"] for one in block.values()]
        return [mean(one[at] for one in found) for at in range(len(record["ratios"]))]

    panels = {
        title: {
            f"{m}, {kind}": (m, style, values(gauge, m, kind))
            for m in _modalities(record)
            for kind, style in FITS.items()
        }
        for gauge, title in GAUGES.items()
    }
    return curves(panels, ("rank ratio", "SQNR, dB"), record["ratios"])


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
