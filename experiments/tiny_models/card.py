"""Put the float scores of a record into the model card, between its two markers."""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from masq.models.zoo import smol_omni
from masq.report.record import RunRecord, read_record

BEGIN, END = "<!-- scores -->", "<!-- end of scores -->"


def scores(record: RunRecord) -> str:
    """One row per task and metric: n, score and its standard error."""
    rows = [
        [task, name, entry["n"], f"{entry['value']:.3f}", f"{entry['standard_error']:.3f}"]
        for task, metrics in record.scores.items()
        for name, entry in metrics.items()
    ]
    return tabulate(rows, ["task", "metric", "n", "score", "standard error"], tablefmt="github", disable_numparse=True)


def fill(card: str, record: RunRecord) -> str:
    """The card with the scores of ``record``; the markers must be there once."""
    head, rest = card.split(BEGIN)
    return f"{head}{BEGIN}\n{scores(record)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Command line: the folder under which the float run wrote its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    options = parser.parse_args()
    records = [read_record(path) for path in options.runs.rglob("record.json")]
    record = max((r for r in records if r.status == "finished"), key=lambda r: r.provenance["finished"])
    path = smol_omni.FOLDER / "CARD.md"
    path.write_text(fill(path.read_text(), record))


if __name__ == "__main__":
    main()
