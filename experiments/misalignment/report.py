"""The discrimination report: what each task loses under two baselines, and how misaligned the modalities are.

Reads records alone, so that every number in the report is one of theirs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, median
from typing import Any

from tabulate import tabulate

from experiments.tables import stored
from masq.files import read_json
from masq.report.record import RunRecord

SCHEMES = ("w8a8", "w4a8", "w4a6", "w4a4")
METHODS = ("rtn", "smoothquant")
TABLES = {"smol_omni": ("smol_omni", "smol_omni_widths"), "smol_vl": ("smol_vl", "smol_vl_widths")}
"""Tables (``conf/experiment/``) that hold the cells, by model."""
MAIN = {"speech": "wer", "manual": "perplexity", "tale": "perplexity", "choice": "acc_norm"}


def _score(record: RunRecord, task: str) -> dict[str, Any]:
    return dict(record.scores[task][MAIN.get(task, "exact_match")])


def _shown(record: RunRecord | None, task: str, start: float | None = None) -> str:
    """A score, or its change from ``start``: points, or for perplexity the factor."""
    if record is None:
        return "not run"
    score = _score(record, task)
    value, mark = score["value"], "" if score["valid"] else " (!)"
    if start is None:
        return (
            f"{value:.1f}" if task in ("manual", "tale") else f"{100 * value:.1f} ± {100 * score['standard_error']:.1f}"
        )
    if task in ("manual", "tale"):
        return f"x {value / start:.2f}{mark}"
    return f"{100 * (value - start):+.1f}{mark}"


def cells(model: str) -> dict[tuple[str, str], RunRecord]:
    """Committed records of a model with scores, by scheme (``float`` where nothing is rounded) and method."""
    records = [record for name in TABLES[model] for record in stored(name)]
    return {("float" if record.method == "none" else record.scheme, record.method): record for record in records}


def task_table(records: dict[tuple[str, str], RunRecord]) -> str:
    """One row per task: metric, n, float score and the change under every scheme and method."""
    start = records["float", "none"]
    columns = [(scheme, method) for scheme in SCHEMES for method in METHODS]
    rows = []
    for task in start.scores:
        first = _score(start, task)
        changes = [_shown(records.get(cell), task, first["value"]) for cell in columns]
        rows.append([task, first["metric"], first["n"], _shown(start, task), *changes])
    headers = ["task", "metric", "n", "float", *(f"{scheme} {method}" for scheme, method in columns)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _groups(record: dict[str, Any]) -> list[str]:
    return list(record["blocks"][0])


def range_table(record: dict[str, Any]) -> str:
    """Ratios of channel ranges to text's and the share of channels that a modality dictates, over all blocks."""
    rows = []
    for group in _groups(record):
        for modality in record["blocks"][0][group]["ranges"]:
            found = [block[group]["ranges"][modality] for block in record["blocks"]]
            middles = [one["ratio_median"] for one in found]
            highest = max(range(len(found)), key=lambda i: middles[i])
            rows.append(
                [
                    group,
                    modality,
                    f"{median(middles):.2f}",
                    f"{min(middles):.2f} to {max(middles):.2f} (block {highest})",
                    f"{mean(one['ratio_p10'] for one in found):.2f} to {mean(one['ratio_p90'] for one in found):.2f}",
                    f"{100 * mean(one['dictated'] for one in found):.0f} %",
                ]
            )
    headers = ["group", "modality", "median ratio", "lowest to highest block", "10th to 90th percentile", "dictates"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def cost_table(record: dict[str, Any], scheme: str) -> str:
    """SQNR of a layer's outputs without smoothing, with one factor and with the modality's own, mean over blocks."""
    rows = []
    for group in _groups(record):
        for modality in record["blocks"][0][group]["sqnr"][scheme]:
            found = [block[group]["sqnr"][scheme][modality] for block in record["blocks"]]
            costs = [one["own"] - one["shared"] for one in found]
            rows.append(
                [group, modality, *(f"{mean(one[kind] for one in found):.1f}" for kind in ("none", "shared", "own"))]
                + [f"{mean(costs):+.2f}", f"{min(costs):+.2f} to {max(costs):+.2f}"]
            )
    headers = ["group", "modality", "none", "shared", "own", "own - shared", "over blocks"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def layer_table(record: dict[str, Any], group: str) -> str:
    """Figure 4 as numbers: the median range ratio to text of every block."""
    names = [name for name in record["blocks"][0][group]["ranges"] if name != "text"]
    rows = [
        [index, *(f"{block[group]['ranges'][name]['ratio_median']:.2f}" for name in names)]
        for index, block in enumerate(record["blocks"])
    ]
    return tabulate(rows, ["block", *(f"{name} / text" for name in names)], tablefmt="github", disable_numparse=True)


def report(measurements: Path) -> str:
    """The whole report in Markdown; a model without a float record is left out.

    Args:
        measurements: folder with what ``measure`` wrote.
    """
    found = {model: cells(model) for model in TABLES}
    parts = [
        "# Discrimination report",
        "Made by `make table`. Changes are in points (perplexity: factor) from the float score of the same "
        "samples; `(!)` marks scores of models whose answers mostly failed.",
    ]
    for model, runs in found.items():
        if ("float", "none") not in runs:
            continue
        measured = read_json(measurements / f"{model}.json")
        parts += [f"## {model}: tasks", task_table(runs)]
        parts += [
            f"## {model}: activation ranges",
            f"Range of a channel on a modality's tokens over its range on text tokens, on {measured['samples']} "
            "calibration samples of the float model. A modality dictates a channel if the largest value is its own.",
            range_table(measured),
        ]
        for scheme in ("w4a8", "w4a6"):
            parts += [
                f"## {model}: what one shared factor costs at {scheme}",
                "SQNR in dB of the outputs of single layers on each modality's tokens, inputs from the float model: "
                f"without smoothing, with SmoothQuant's factor from all tokens (alpha {measured['alpha']}), and with "
                "the modality's own factor and weight.",
                cost_table(measured, scheme),
            ]
        parts += [f"## {model}: median range ratio by block (inputs of q, k, v)", layer_table(measured, "qkv")]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Command line: the folder of measurements, the file to write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measurements", type=Path, default=Path("results/misalignment"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.write_text(report(options.measurements))


if __name__ == "__main__":
    main()
