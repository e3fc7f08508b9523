"""Paired comparisons of runs from the outcomes in their records: the first is the base of all others.

One row per task, metric and compared run. Markdown and LaTeX round for reading and carry the notes; CSV keeps full
precision and has none.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from masq.errors import DataError, unknown_name
from masq.evaluation.outcomes import Outcomes
from masq.evaluation.statistics import LEVEL, SIGNIFICANCE, Comparison, adjust, paired, standard_error, value
from masq.report.labels import ABSENT, labels_of
from masq.report.record import RunRecord
from masq.report.table import FORMATS, INVALID, arrow, digits_of, footnotes, number, text_table

# What outcomes are kept by: task and metric.
Key = tuple[str, str]


@dataclass(frozen=True)
class Row:
    """One metric of one task, compared between the base and one other record.

    Attributes:
        task: its name.
        metric: its name.
        position: of the other record among those compared, from 1; 0 is the base.
        base: outcomes of the base.
        other: outcomes of the other record.
        comparison: how they differ.
        adjusted: p-value after Holm's correction over all rows.
    """

    task: str
    metric: str
    position: int
    base: Outcomes
    other: Outcomes
    comparison: Comparison
    adjusted: float

    @property
    def is_significant(self) -> bool:
        """Whether the difference stands out among all that are shown."""
        return self.adjusted < SIGNIFICANCE


def compare(records: Sequence[RunRecord], format: str = "markdown") -> str:  # noqa: A002
    """Compare every record with the first.

    Args:
        records: two or more, evaluated on the same samples.
        format: "markdown", "csv" or "latex".

    Returns:
        The table as text without a final newline.

    Raises:
        ConfigError: unknown format.
        DataError: fewer than two records, records without outcomes, of other samples, or without a task in common.
    """
    if format not in FORMATS:
        raise unknown_name("format of comparisons", format, FORMATS)
    found = rows(records)
    if format == "csv":
        return _csv(records, found)
    return text_table(_text_rows(records, found), 2 + len(labels_of(records)), _notes(records, found), format)


def rows(records: Sequence[RunRecord]) -> list[Row]:
    """Compare every record with the first: tasks and metrics in the order of the base, then records as given.

    Raises:
        DataError: fewer than two records, records without outcomes, of other samples, or without a task in common.
    """
    if len(records) < 2:
        raise DataError(
            "a comparison needs at least two records", value=len(records), remedy="name the base, then the others"
        )
    names = _names(records)
    base, *others = [_outcomes(record, name) for record, name in zip(records, names, strict=True)]
    pairs = [
        (key, position, base[key], other[key])
        for key in base
        for position, other in enumerate(others, start=1)
        if key in other
    ]
    if not pairs:
        tasks = "; ".join(f"{name}: {_listed(found)}" for name, found in zip(names, [base, *others], strict=True))
        raise DataError("records must have a task and metric in common", value=tasks)
    for position, other in enumerate(others, start=1):
        _check_samples(records, names, position, base, other)
    comparisons = [paired(first, second) for _, _, first, second in pairs]
    adjusted = adjust([found.p_value for found in comparisons])
    return [
        Row(*key, position, first, second, found, p)
        for (key, position, first, second), found, p in zip(pairs, comparisons, adjusted, strict=True)
    ]


def _outcomes(record: RunRecord, name: str) -> dict[Key, Outcomes]:
    """Outcomes by task and metric."""
    if not record.outcomes:
        raise DataError(
            "a comparison needs records that hold the outcome of every sample",
            value=f"{name}, identity {record.identity[:16]}, has none",
            remedy="run it again with this version of masq and another output.root: where it finished it is skipped",
        )
    found = {}
    for task, metrics in record.outcomes.items():
        for metric, plain in metrics.items():
            try:
                found[task, metric] = Outcomes.from_dict(plain)
            except DataError as error:
                raise DataError(f"{name}, {task} {metric}: {error.rule}", value=error.value) from error
    return found


def _check_samples(
    records: Sequence[RunRecord],
    names: Sequence[str],
    position: int,
    base: dict[Key, Outcomes],
    other: dict[Key, Outcomes],
) -> None:
    """Refuse records of other samples: other ids, or other contents under the same ids."""
    remedy = "evaluate both on the same data: evaluation.source, split and samples_per_task"
    different = [
        key for key in base if key in other and (base[key].samples, base[key].n) != (other[key].samples, other[key].n)
    ]
    if different:
        sizes = {f"{task} {base[task, metric].n} and {other[task, metric].n} samples" for task, metric in different}
        raise DataError(
            "records can be compared only on the same samples",
            value=f"{names[0]} and {names[position]} have others: {', '.join(sorted(sizes))}",
            remedy=remedy,
        )
    hashes = [_data_hash(records[index]) for index in (0, position)]
    # Of other tasks the hash must differ; of the same ones it tells what ids do not.
    if {task for task, _ in base} == {task for task, _ in other} and hashes[0] != hashes[1]:
        raise DataError(
            "records can be compared only on the same data",
            value=f"samples of the same ids differ: {names[0]} {hashes[0][:16]}, {names[position]} {hashes[1][:16]}",
            remedy=remedy,
        )


def _data_hash(record: RunRecord) -> str:
    data = record.provenance.get("data")
    return str(data.get("evaluation", "?")) if isinstance(data, dict) else "?"


def _names(records: Sequence[RunRecord]) -> list[str]:
    """What tells each record from the others in a sentence; records that nothing tells apart are numbered."""
    titles = dict(labels_of(records))
    names = []
    for index in range(len(records)):
        texts = {title: values[index] for title, values in titles.items() if values[index] != ABSENT}
        scheme, method = texts.pop("scheme"), texts.pop("method")
        first = scheme if scheme == "float" else f"{method} at {scheme}"
        names.append(", ".join([first, *(f"{title} {text}" for title, text in texts.items())]))
    return [f"{name} (record {index + 1})" if names.count(name) > 1 else name for index, name in enumerate(names)]


def _text_rows(records: Sequence[RunRecord], found: Sequence[Row]) -> list[list[str]]:
    labels = labels_of(records)
    level = f"difference [{100 * LEVEL:g} %]"
    shown = [
        ["task", "metric", *(title for title, _ in labels), "n", "base", "compared", level]
        + ["p", "p (Holm)", "lost", "gained", "changed"]
    ]
    for row in found:
        metric = row.metric.replace("_", " ") + arrow(row.base.higher_is_better)
        scored = ((records[0], row.base), (records[row.position], row.other))
        flips = row.comparison.flips
        counts = (None, None, None) if flips is None else (flips.lost, flips.gained, flips.changed)
        shown.append(
            [row.task, metric, *(values[row.position] for _, values in labels), str(row.comparison.n)]
            + [_score(record, row, outcomes) for record, outcomes in scored]
            + [_difference(row), _p(row.comparison.p_value)]
            + [_p(row.adjusted) + ("" if row.is_significant else " n.s.")]
            + [ABSENT if count is None else str(count) for count in counts]
        )
    return shown


def _score(record: RunRecord, row: Row, outcomes: Outcomes) -> str:
    shown = number(value(outcomes), standard_error(outcomes), digits_of(row.metric))
    return shown + ("" if _is_valid(record, row) else INVALID)


def _is_valid(record: RunRecord, row: Row) -> bool:
    return bool(record.scores.get(row.task, {}).get(row.metric, {}).get("valid", True))


def _difference(row: Row) -> str:
    digits, found = digits_of(row.metric), row.comparison
    ends = ABSENT if found.interval is None else ", ".join(f"{end:+.{digits}f}" for end in found.interval)
    return f"{found.difference:+.{digits}f} [{ends}]"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def _notes(records: Sequence[RunRecord], found: Sequence[Row]) -> list[str]:
    """How to read the columns, what could not be compared, and the notes of any table."""
    names = _names(records)
    per_cent = f"{100 * LEVEL:g} %"
    notes = [
        f"base is {names[0]}; difference is compared - base on the same samples, with its {per_cent} interval.",
        f"p is two-sided: exact McNemar test where answers are right or wrong, else a permutation test; p (Holm) is "
        f"adjusted over the {len(found)} comparisons shown; n.s.: not significant, p (Holm) is not below "
        f"{SIGNIFICANCE:g}.",
        "lost: right in the base, wrong in the compared run; gained: the reverse; changed: other answer, same score.",
    ]
    for position, record in enumerate(records[1:], start=1):
        for holder, lacks in ((0, position), (position, 0)):
            alone = {(task, metric): None for task, by in records[holder].outcomes.items() for metric in by}
            missing = [key for key in alone if key[1] not in records[lacks].outcomes.get(key[0], {})]
            if missing:
                notes.append(f"Not compared, for {names[lacks]} lacks what {names[holder]} has: {_listed(missing)}.")
        if _data_hash(records[0]) != _data_hash(record):
            notes.append(
                f"Samples of {names[0]} and {names[position]} are paired by their ids: other tasks, other hash."
            )
    return notes + footnotes(records)


def _listed(keys: Sequence[Key] | dict[Key, Outcomes]) -> str:
    """Tasks with their metrics."""
    return ", ".join(f"{task} {metric.replace('_', ' ')}" for task, metric in keys)


def _csv(records: Sequence[RunRecord], found: Sequence[Row]) -> str:
    labels = labels_of(records)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["task", "metric", *(title for title, _ in labels), "n", "base", "base.standard_error", "compared"]
        + ["compared.standard_error", "difference", "low", "high", "test", "p", "p_holm", "significant"]
        + ["lost", "gained", "changed", "base.identity", "compared.identity"]
    )
    for row in found:
        result, flips = row.comparison, row.comparison.flips
        scores = [value(row.base), standard_error(row.base), value(row.other), standard_error(row.other)]
        counts = (None, None, None) if flips is None else (flips.lost, flips.gained, flips.changed)
        cells: list[object] = [row.task, row.metric, *(values[row.position] for _, values in labels), result.n]
        cells += [*scores, result.difference, *(result.interval or (None, None)), result.test, result.p_value]
        cells += [row.adjusted, row.is_significant, *counts]
        cells += [records[0].identity, records[row.position].identity]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return buffer.getvalue().rstrip("\n")
