"""Tables of sensitivity profiles in Markdown, from one record alone."""

from __future__ import annotations

import argparse
from math import isclose
from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments.sensitivity.parts import ALL, KINDS
from experiments.sensitivity.record import read_profiles
from masq.files import atomic_write_bytes

HEADINGS = {
    "kl": "KL to the float model (nats per answer token), by what a sample holds besides text",
    "nll_delta": "Increase in answer NLL (nats per answer token), by what a sample holds besides text",
    "sqnr": "SQNR after the last block (dB), by modality of tokens",
}
DIGITS = {"kl": 4, "nll_delta": 4, "sqnr": 1}
ADDITIVE = ("kl", "nll_delta")
NUM_WORST = 3
MISSING = "-"


def _cells(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["part"], one["kind"]): one for one in record["profiles"]}


def _parts(record: dict[str, Any]) -> list[str]:
    """Parts that were measured, in the order of the record."""
    return list(dict.fromkeys(one["part"] for one in record["profiles"]))


def roles_of(record: dict[str, Any]) -> list[str]:
    """Roles that were measured."""
    return [part for part in _parts(record) if part in record["scheme"]["roles"]]


def blocks_of(record: dict[str, Any]) -> list[str]:
    """Blocks that were measured."""
    return [part for part in _parts(record) if part != ALL and part not in record["scheme"]["roles"]]


def _columns(record: dict[str, Any], quantity: str) -> list[tuple[str, str]]:
    """Pairs of a modality and a kind that occur."""
    profiles = record["profiles"]
    modalities = dict.fromkeys(name for one in profiles for name in one[quantity])
    kinds = [kind for kind in KINDS if any(one["kind"] == kind for one in profiles)]
    return [(modality, kind) for modality in modalities for kind in kinds]


def part_table(record: dict[str, Any], parts: list[str], quantity: str) -> str:
    """One row per part, one column per modality and kind.

    The last row is the whole decoder. Before it comes the sum over the parts, of quantities that could add up and where
    the parts are the whole decoder.
    """
    cells, columns, shares = _cells(record), _columns(record, quantity), _shares(record)
    rows = [[part, f"{100 * shares[part]:.1f} %", *_row(cells, columns, part, quantity)] for part in parts]
    if quantity in ADDITIVE and isclose(sum(shares[part] for part in parts), 1):
        sums = [_sum(cells, parts, kind, quantity, modality) for modality, kind in columns]
        rows.append(["sum", "", *(_number(value, quantity) for value in sums)])
    rows.append([ALL, "", *_row(cells, columns, ALL, quantity)])
    headers = ["part", "weights", *(f"{modality} {kind}" for modality, kind in columns)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _row(
    cells: dict[tuple[str, str], dict[str, Any]], columns: list[tuple[str, str]], part: str, quantity: str
) -> list[str]:
    found = [cells.get((part, kind), {}).get(quantity, {}).get(modality) for modality, kind in columns]
    return [_number(value, quantity) for value in found]


def _sum(
    cells: dict[tuple[str, str], dict[str, Any]], parts: list[str], kind: str, quantity: str, modality: str
) -> float | None:
    """Sum over parts, None while one is missing."""
    values = [cells.get((part, kind), {}).get(quantity, {}).get(modality) for part in parts]
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(parts) and known else None


def _number(value: float | None, quantity: str) -> str:
    return MISSING if value is None else f"{value:.{DIGITS[quantity]}f}"


def _shares(record: dict[str, Any]) -> dict[str, float]:
    """Share of the decoder's weights by part."""
    numbers = {one["part"]: one["num_weights"] for one in record["profiles"]}
    return {part: number / numbers[ALL] for part, number in numbers.items()}


def whole_table(record: dict[str, Any]) -> str:
    """The whole decoder: one row per quantity and kind, one column per modality, with standard errors."""
    cells = _cells(record)
    modalities = list(dict.fromkeys(name for one in record["profiles"] for q in HEADINGS for name in one[q]))
    rows = []
    for quantity in HEADINGS:
        for kind in KINDS:
            one = cells.get((ALL, kind))
            if one is not None:
                rows.append([quantity, kind, *(_with_error(one, quantity, modality) for modality in modalities)])
    return tabulate(rows, ["", "rounded", *modalities], tablefmt="github", disable_numparse=True)


def _with_error(profile: dict[str, Any], quantity: str, modality: str) -> str:
    value, error = profile[quantity].get(modality), profile["standard_error"][quantity].get(modality)
    shown = _number(value, quantity)
    return shown if error is None else f"{shown} ± {_number(error, quantity)}"


def worst_table(record: dict[str, Any]) -> str:
    """For each kind of sample the roles and blocks with the largest KL, both rounded or what there is."""
    cells = _cells(record)
    kind = next(kind for kind in reversed(KINDS) if (ALL, kind) in cells)
    rows = []
    for modality in cells[ALL, kind]["kl"]:
        row = [modality]
        for parts in (roles_of(record), blocks_of(record)):
            values = {part: cells[part, kind]["kl"][modality] for part in parts if (part, kind) in cells}
            worst = sorted(values, key=lambda part: -values[part])[:NUM_WORST]
            row.append(", ".join(f"{part} {_number(values[part], 'kl')}" for part in worst) or MISSING)
        rows.append(row)
    return tabulate(rows, ["samples", "roles", "blocks"], tablefmt="github", disable_numparse=True)


def report(record: dict[str, Any]) -> str:
    """The whole report in Markdown."""
    scheme, count = record["scheme"]["name"], len(record["profiles"])
    unfinished = "" if record["provenance"]["finished"] else f" Not finished: {count} profiles so far."
    parts = [
        f"# Sensitivity of {record['model']} at {scheme}",
        f"Only the named part is rounded to nearest, the rest stays in float. {record['samples']} held-out samples."
        f"{unfinished}",
        *(f"Warning: {warning}." for warning in record["warnings"]),
        "## Where it hurts most (KL)",
        worst_table(record),
        "## The whole decoder",
        whole_table(record),
    ]
    for title, names in (("role", roles_of(record)), ("block", blocks_of(record))):
        for quantity, heading in HEADINGS.items() if names else ():
            parts += [f"## By {title}: {heading}", part_table(record, names, quantity)]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Command line: the record, the file to write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    atomic_write_bytes(options.output, report(read_profiles(options.record)).encode())


if __name__ == "__main__":
    main()
