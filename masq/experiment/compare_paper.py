"""A paper's table beside ours: what quantization changed there and here, and whether they agree.

A number of a paper is compared by its difference to the paper's own float row, ours by its difference to our float
record on the same samples: harness, prompt and subset then matter less. At the size of the embedded models benchmarks
and models are other ones, and what is compared is the claim that a method gains over rounding to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from masq.errors import ConfigError
from masq.evaluation.outcomes import Outcomes
from masq.evaluation.statistics import paired
from masq.experiment.definition import Experiment
from masq.experiment.records import RecordIndex, rows
from masq.experiment.reported import FLOAT_BITS, FLOAT_METHOD, Benchmark, Reported, names, reported
from masq.report.labels import ABSENT, is_float
from masq.report.record import RunRecord
from masq.report.table import text_table

Verdict = Literal["agrees", "differs", "not distinguishable", "float within two s.e. there", "not run"]
_NORMAL = 1.959963984540054
_RTN = "RTN"
# Scores that are shares, in percent or not, so that their mean over tasks says something; one per task.
_SHARES = ("exact_match", "acc_norm", "wer")


@dataclass(frozen=True)
class Estimate:
    """A difference and its standard error, 0 where it is not known."""

    value: float
    error: float

    def agrees(self, other: Estimate) -> bool:
        """Whether two differences lie within two standard errors of each other."""
        return abs(self.value - other.value) <= 2 * math.hypot(self.error, other.error)


def compare_paper(found: Experiment, index: RecordIndex, format: str = "markdown") -> str:  # noqa: A002
    """The table of a paper beside our records.

    Args:
        found: an experiment with a table of a paper.
        index: our records.
        format: "markdown" or "latex".

    Raises:
        ConfigError: the experiment has no table of a paper.
    """
    shown, notes = paper_rows(found, index)
    return text_table(shown, 4 if found.scale == "full" else 2, notes, format)


def paper_rows(found: Experiment, index: RecordIndex) -> tuple[list[list[str]], Sequence[str]]:
    """The cells of that table, headings first, and the notes below it.

    Raises:
        ConfigError: the experiment has no table of a paper.
    """
    if found.paper is None:
        raise ConfigError(f"experiment {found.name} has no table of a paper to be compared with")
    records = [record for record in rows(found, index) if record.status == "finished"]
    cells = reported(found.paper)
    if found.scale == "full":
        return _full(cells, records), _FULL_NOTES
    return _gains(cells, records), _GAIN_NOTES


_FULL_NOTES = (
    "difference: to the float model, there as printed, here on the same samples ± its standard error.",
    "float within two s.e. there: the paper's number is within two binomial standard errors of its float row, with the "
    "number of samples its digits speak of; it shows no loss to agree with.",
    "agrees: the differences are within two standard errors, of both, of each other.",
)
_GAIN_NOTES = (
    "gain over rtn: of the mean over tasks, in points; there over the models of the table, here on the embedded model "
    "with its standard error. Other models and other tasks: only the direction can agree.",
    "not distinguishable: our gain is within two standard errors of none.",
)


def _full(cells: Sequence[Reported], records: Sequence[RunRecord]) -> list[list[str]]:
    shown = [["model", "bits", "method", "benchmark", "reported", "ours", "difference there", "here", "verdict"]]
    base = {(cell.model, cell.benchmark): cell for cell in cells if cell.is_float}
    for cell in cells:
        benchmark, start = names().benchmarks.get(cell.benchmark), base.get((cell.model, cell.benchmark))
        if benchmark is None or cell.is_float:
            continue
        record, dense = _record(cell, records), _float(cell, records)
        there = None if start is None else Estimate(cell.value - start.value, _error(cell, benchmark))
        here = None if record is None or dense is None else _difference(dense, record, benchmark)
        shown.append(
            [cell.model, cell.bits, cell.method, cell.benchmark, f"{cell.value:g}", _ours(record, benchmark)]
            + [ABSENT if there is None else f"{there.value:+.1f}", _estimate(here), _verdict(there, here)]
        )
    return shown


def _verdict(there: Estimate | None, here: Estimate | None) -> Verdict:
    if here is None or there is None:
        return "not run"
    if there.error and abs(there.value) <= 2 * there.error:
        return "float within two s.e. there"
    return "agrees" if here.agrees(there) else "differs"


def _gains(cells: Sequence[Reported], records: Sequence[RunRecord]) -> list[list[str]]:
    shown = [["bits", "method", "gain over rtn there", "here", "verdict"]]
    rows_of_paper = dict.fromkeys((cell.bits, cell.method) for cell in cells if not cell.is_float)
    for bits, method in rows_of_paper:
        there = _reported_gain(cells, bits, method)
        if method == _RTN or there is None:
            continue
        record, start = _named(records, bits, method), _named(records, bits, _RTN)
        here = None if record is None or start is None else _mean_difference(start, record)
        verdict: Verdict = "not run"
        if here is not None:
            same = "agrees" if (here.value > 0) == (there > 0) else "differs"
            verdict = same if abs(here.value) > 2 * here.error else "not distinguishable"  # type: ignore[assignment]
        shown.append([bits, method, f"{there:+.1f}", _estimate(here), verdict])
    return shown


def _reported_gain(cells: Sequence[Reported], bits: str, method: str) -> float | None:
    """Mean over models and benchmarks of what a method gains over rounding to nearest, better being positive."""
    start = {(c.model, c.benchmark): c.value for c in cells if (c.bits, c.method) == (bits, _RTN)}
    gains = [
        (cell.value - start[cell.model, cell.benchmark]) * (1 if cell.higher_is_better else -1)
        for cell in cells
        if (cell.bits, cell.method) == (bits, method)
        and (cell.model, cell.benchmark) in start
        and cell.benchmark in names().benchmarks
    ]
    return math.fsum(gains) / len(gains) if gains else None


def _mean_difference(base: RunRecord, other: RunRecord) -> Estimate | None:
    """Mean over tasks of the difference in points, better being positive; tasks are independent samples."""
    found = []
    for task, metrics in base.scores.items():
        metric = next((name for name in _SHARES if name in metrics and name in other.scores.get(task, {})), None)
        if metric is not None:
            one = _difference(base, other, Benchmark(task, metric, 100.0, None))
            found.append(Estimate(one.value * (1 if metrics[metric]["higher_is_better"] else -1), one.error))
    if not found:
        return None
    n = len(found)
    return Estimate(math.fsum(one.value for one in found) / n, math.hypot(*(one.error for one in found)) / n)


def _difference(base: RunRecord, other: RunRecord, benchmark: Benchmark) -> Estimate:
    """Of one metric: paired where the records hold outcomes, else as if the samples were others."""
    task, metric = benchmark.task, benchmark.metric
    first, second = base.scores[task][metric], other.scores[task][metric]
    value = second["value"] - first["value"]
    error = math.hypot(first["standard_error"] or 0.0, second["standard_error"] or 0.0)
    outcomes = [record.outcomes.get(task, {}).get(metric) for record in (base, other)]
    if outcomes[0] and outcomes[1]:
        interval = paired(Outcomes.from_dict(outcomes[0]), Outcomes.from_dict(outcomes[1])).interval
        error = error if interval is None else (interval[1] - interval[0]) / (2 * _NORMAL)
    return Estimate(value * benchmark.scale, error * benchmark.scale)


def _error(cell: Reported, benchmark: Benchmark) -> float:
    """Binomial standard error of a reported accuracy in percent, 0 where its number of samples is not known."""
    if benchmark.samples is None or not 0 < cell.value < 100:
        return 0.0
    return math.sqrt(cell.value * (100 - cell.value) / benchmark.samples)


def _record(cell: Reported, records: Iterable[RunRecord]) -> RunRecord | None:
    model, benchmark = names().models.get(cell.model), names().benchmarks[cell.benchmark]
    those = [
        record
        for record in records
        if record.config["model"]["name"] == model and benchmark.metric in record.scores.get(benchmark.task, {})
    ]
    return _named(those, cell.bits, cell.method)


def _float(cell: Reported, records: Iterable[RunRecord]) -> RunRecord | None:
    return _record(replace(cell, method=FLOAT_METHOD, bits=FLOAT_BITS), records)


def _named(records: Iterable[RunRecord], bits: str, method: str) -> RunRecord | None:
    """The record of a row, by the first of our names for it that there is."""
    schemes, methods = names().bits.get(bits, []), names().methods.get(method, [])
    found = {("float" if is_float(record) else record.scheme, record.method): record for record in records}
    return next((found[key] for key in ((s, m) for m in methods for s in schemes) if key in found), None)


def _ours(record: RunRecord | None, benchmark: Benchmark) -> str:
    if record is None:
        return ABSENT
    return f"{record.scores[benchmark.task][benchmark.metric]['value'] * benchmark.scale:.1f}"


def _estimate(found: Estimate | None) -> str:
    return ABSENT if found is None else f"{found.value:+.1f} ± {found.error:.1f}"
