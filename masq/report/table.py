"""Ablation tables from run records: one row per record, the same columns for every row, honest footnotes.

Markdown and LaTeX round for reading and carry the footnotes; CSV keeps full precision, gives every standard error a
column of its own and has no footnotes, so that any program reads it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tabulate import tabulate

from masq.errors import ConfigError, DataError, suggestion, unknown_name
from masq.models.zoo import is_trained
from masq.report.labels import ABSENT, calibration_of, execution_of, is_float, labels_of, lookup
from masq.report.record import RunRecord, ScoreEntry

FORMATS = ("markdown", "csv", "latex")
INVALID = " (!)"
_MODALITIES = ("text", "vision", "audio", "joint")
_FIDELITY = (
    ("sqnr_towers", "SQNR {} from towers (dB)", True),
    ("sqnr", "SQNR {} (dB)", True),
    ("nll", "NLL {}", False),
    ("kl", "KL {}", False),
)


@dataclass(frozen=True)
class Column:
    """One column of numbers.

    Attributes:
        key: name for ``columns=`` and CSV, for example ``digits.exact_match`` or ``sqnr.vision``.
        title: heading for people.
        read: record -> (value, standard error); value None where the record has none.
        digits: decimals shown.
        higher_is_better: direction for bold; None when there is no best.
        valid: False for a record in which too many answers failed for the value to mean what its title says.
    """

    key: str
    title: str
    read: Callable[[RunRecord], tuple[float | None, float | None]]
    digits: int = 2
    higher_is_better: bool | None = None
    valid: Callable[[RunRecord], bool] = lambda _record: True


def table(
    records: Sequence[RunRecord],
    columns: Sequence[str] | None = None,
    format: str = "markdown",  # noqa: A002
    *,
    bold: bool = False,
) -> str:
    """One row per record, in the order given.

    Args:
        records: runs; failed ones get a row of dashes and a footnote.
        columns: keys of `Column` or prefixes of them such as ``sqnr`` or ``digits``; None shows all there are.
        format: "markdown", "csv" or "latex".
        bold: mark the best value of every column that has a direction (Markdown and LaTeX).

    Returns:
        The table as text without a final newline.

    Raises:
        ConfigError: unknown format or column.
        DataError: no record at all.
    """
    if format not in FORMATS:
        raise unknown_name("table format", format, FORMATS)
    if not records:
        raise DataError("a table needs at least one record", remedy="give record.json files or the folders of runs")
    chosen = choose_columns(available_columns(records), columns)
    labels = labels_of(records)
    if format == "csv":
        return _csv(records, labels, chosen)
    rows = _text_rows(records, labels, chosen, "**{}**" if format == "markdown" else r"\textbf{{{}}}", bold=bold)
    return text_table(rows, len(labels), footnotes(records), format)


def text_table(rows: Sequence[Sequence[str]], num_labels: int, notes: Sequence[str], format: str) -> str:  # noqa: A002
    """Lay cells out for reading.

    Args:
        rows: the headings, then one list of cells per row.
        num_labels: leading columns of text; the others are aligned as numbers.
        notes: sentences below the table.
        format: "markdown" or "latex".
    """
    alignment = ("left",) * num_labels + ("right",) * (len(rows[0]) - num_labels)
    if format == "markdown":
        body = tabulate(rows, headers="firstrow", tablefmt="pipe", disable_numparse=True, colalign=alignment)
        return "\n".join([body, "", *(f"- {note}" for note in notes)])
    escaped = [[_latex(cell) for cell in row] for row in rows]
    body = tabulate(escaped, headers="firstrow", tablefmt="latex_raw", disable_numparse=True, colalign=alignment)
    return "\n".join([body, *(f"% {note}" for note in notes)])


def available_columns(records: Sequence[RunRecord]) -> list[Column]:
    """Columns for which at least one record has a number: scores, SQNR, NLL, KL, stored bits."""
    columns = [_score_column(task, metric, records) for task, metric in _scores_of(records)]
    for name, title, better in _FIDELITY:
        present = {key for record in records for key in _numbers(record.fidelity.get(name))}
        ordered = [key for key in _MODALITIES if key in present]
        columns += [_fidelity_column(name, key, title.format(key), better) for key in ordered]
    if any(record.effective_bits for record in records):
        columns += [_bits_column("total", "bits / weight"), _adapter_share_column()]
    return columns


def footnotes(records: Sequence[RunRecord]) -> list[str]:
    """What a reader must know to read the numbers: sample counts, the float model, failures and fallbacks."""
    notes = [*_sample_notes(records), *_model_notes(records)]
    by_text: dict[str, dict[str, None]] = {}
    for record in records:
        texts = list(record.warnings)
        if record.status != "finished":
            failure = record.failure or {"kind": "not finished", "message": ""}
            texts.insert(0, f"{failure['kind']}: {failure['message']}".rstrip(": "))
        for text in texts:
            by_text.setdefault(text, {})[f"{record.method} at {record.scheme}"] = None
    notes += [f"{', '.join(names)}: {text}" for text, names in by_text.items()]
    if any(not s.get("valid", True) for r in records for metrics in r.scores.values() for s in metrics.values()):
        notes.append("(!): too many answers failed for this score to be valid.")
    return list(dict.fromkeys(notes))


def _sample_notes(records: Sequence[RunRecord]) -> list[str]:
    counts: dict[str, set[int]] = {}
    for record in records:
        for task, metrics in record.scores.items():
            counts.setdefault(task, set()).update(int(score["n"]) for score in metrics.values())
    sizes = [f"{task} {'/'.join(str(n) for n in sorted(values))}" for task, values in counts.items()]
    calibration = list(dict.fromkeys(calibration_of(record) for record in records if not is_float(record)))
    presets = sorted({str(r.config["preset"]) for r in records if r.config.get("preset")})
    notes = [f"Evaluation samples: {', '.join(sizes)}. ± is one standard error."] if sizes else []
    notes += _split_notes(records)
    notes += [f"Calibration samples: {'; '.join(calibration)}."] if calibration else []
    notes += [f"Preset: {', '.join(presets)}."] if presets else []
    packed = sorted({execution_of(record) for record in records if record.provenance.get("kernels")})
    return notes + ([f"Stored bits, multiplied by kernels: {', '.join(packed)}."] if packed else [])


def _split_notes(records: Sequence[RunRecord]) -> list[str]:
    """Which rows, if any, come from the split that is kept for final tables."""
    final = [record for record in records if lookup(record.config, "evaluation", "split") == "final"]
    if not final:
        return []
    if len(final) == len(records):
        return ["Scores come from the final split, on which nothing was chosen."]
    rows = dict.fromkeys(f"{record.method} at {record.scheme}" for record in final)
    return [f"Scores of {', '.join(rows)} come from the final split, the others do not: rows cannot be compared."]


def _model_notes(records: Sequence[RunRecord]) -> list[str]:
    notes = []
    if any(is_trained(str(lookup(r.config, "model", "source"))) for r in records):
        notes.append(
            "The float model is the dequantized Q4_1 SmolLM2-135M-Instruct with our towers: asymmetric 4-bit weights "
            "in groups of 32 would be lossless on it and are not ranked."
        )
    if any(is_float(r) for r in records):
        notes.append("float is the model as it was loaded.")
    return notes


def choose_columns(available: list[Column], wanted: Sequence[str] | None) -> list[Column]:
    """Those that keys or prefixes name, all for None."""
    if wanted is None:
        return available
    chosen = []
    for name in wanted:
        matches = [column for column in available if column.key == name or column.key.startswith(f"{name}.")]
        if not matches:
            raise ConfigError("unknown column", value=name, remedy=suggestion(name, [c.key for c in available]))
        chosen += matches
    return list({column.key: column for column in chosen}.values())


def _scores_of(records: Iterable[RunRecord]) -> list[tuple[str, str]]:
    pairs = [(task, metric) for record in records for task, metrics in record.scores.items() for metric in metrics]
    order = {task: position for position, task in enumerate(dict.fromkeys(task for task, _ in pairs))}
    return sorted(dict.fromkeys(pairs), key=lambda pair: order[pair[0]])


def _score_column(task: str, metric: str, records: Sequence[RunRecord]) -> Column:
    def read(record: RunRecord) -> tuple[float | None, float | None]:
        score = record.scores.get(task, {}).get(metric)
        return (None, None) if score is None else (score["value"], score["standard_error"])

    def valid(record: RunRecord) -> bool:
        return bool(record.scores.get(task, {}).get(metric, {}).get("valid", True))

    known: list[ScoreEntry] = [r.scores[task][metric] for r in records if metric in r.scores.get(task, {})]
    better = known[0]["higher_is_better"]
    return Column(f"{task}.{metric}", f"{task} {metric.replace('_', ' ')}", read, digits_of(metric), better, valid)


def _fidelity_column(name: str, key: str, title: str, better: bool) -> Column:
    def read(record: RunRecord) -> tuple[float | None, float | None]:
        return _numbers(record.fidelity.get(name)).get(key), None

    return Column(f"{name}.{key}", title, read, 1 if name.startswith("sqnr") else 3, better)


def _bits_column(part: str, title: str) -> Column:
    return Column(f"bits.{part}", title, lambda record: (record.effective_bits.get(part), None), 2)


def _adapter_share_column() -> Column:
    """Share of the stored bits that low-rank corrections take, in percent."""

    def read(record: RunRecord) -> tuple[float | None, float | None]:
        total, adapters = record.effective_bits.get("total"), record.effective_bits.get("adapters")
        return (100 * adapters / total if total and adapters is not None else None), None

    return Column("bits.adapter_share", "adapters (% of bits)", read, 1)


def _numbers(section: object) -> dict[str, float]:
    """The number-valued entries of a section, {} for anything that is no section."""
    entries = cast("dict[str, Any]", section) if isinstance(section, dict) else {}
    return {key: value for key, value in entries.items() if isinstance(value, int | float)}


def _text_rows(
    records: Sequence[RunRecord], labels: list[tuple[str, list[str]]], columns: list[Column], mark: str, *, bold: bool
) -> list[list[str]]:
    rows = [[title for title, _ in labels] + [column.title + arrow(column.higher_is_better) for column in columns]]
    best = {column.key: best_value(column, records) for column in columns} if bold else {}
    for position, record in enumerate(records):
        cells = [values[position] for _, values in labels]
        for column in columns:
            value, error = column.read(record)
            text = number(value, error, column.digits) + ("" if column.valid(record) else INVALID)
            is_best = value is not None and column.valid(record) and value == best.get(column.key)
            cells.append(mark.format(text) if is_best and not is_float(record) else text)
        rows.append(cells)
    return rows


def best_value(column: Column, records: Sequence[RunRecord]) -> float | None:
    """Best value among quantized rows: the float model and scores that are not valid compete with nobody."""
    values = [column.read(r)[0] for r in records if not is_float(r) and column.valid(r)]
    finite = [value for value in values if value is not None and not math.isnan(value)]
    if column.higher_is_better is None or not finite:
        return None
    return max(finite) if column.higher_is_better else min(finite)


def digits_of(metric: str) -> int:
    """Decimals of a metric: shares need three, perplexities are large."""
    return 2 if "perplexity" in metric else 3


def arrow(higher_is_better: bool | None) -> str:
    """What follows a heading: the direction in which its numbers are better."""
    return {True: " ↑", False: " ↓", None: ""}[higher_is_better]


def number(value: float | None, error: float | None, digits: int) -> str:
    """A cell: the value with its standard error where there is one; a dash where there is no value."""
    if value is None:
        return ABSENT
    shown = f"{value:.{digits}f}"
    return shown if error is None else f"{shown} ± {error:.{digits}f}"


def _latex(text: str) -> str:
    for character, replacement in (
        ("%", r"\%"),
        ("_", r"\_"),
        ("&", r"\&"),
        ("±", r"$\pm$"),
        ("↑", r"$\uparrow$"),
        ("↓", r"$\downarrow$"),
    ):
        text = text.replace(character, replacement)
    return text


def _csv(records: Sequence[RunRecord], labels: list[tuple[str, list[str]]], columns: list[Column]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    has_error = {column.key: any(column.read(r)[1] is not None for r in records) for column in columns}
    header = [title for title, _ in labels]
    for column in columns:
        header += [column.key, f"{column.key}.standard_error"] if has_error[column.key] else [column.key]
    writer.writerow([*header, "status", "identity"])
    for position, record in enumerate(records):
        cells: list[object] = [values[position] for _, values in labels]
        for column in columns:
            pair = column.read(record)
            cells += ["" if item is None else repr(float(item)) for item in pair[: 2 if has_error[column.key] else 1]]
        writer.writerow([*cells, record.status, record.identity])
    return buffer.getvalue().rstrip("\n")
