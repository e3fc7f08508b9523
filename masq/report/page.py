"""Records as one HTML page that needs nothing else: a table that sorts and filters, figures, provenance, gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from masq.errors import ConfigError, DataError
from masq.evaluation.statistics import SIGNIFICANCE, adjust
from masq.report.compare import Row
from masq.report.compare import rows as compared
from masq.report.figures import row_names
from masq.report.labels import ABSENT, is_float, labels_of
from masq.report.table import Column, arrow, available_columns, best_value, choose_columns, footnotes, number

if TYPE_CHECKING:
    from masq.report.record import RunRecord

WORSE, BETTER = "−", "+"


@dataclass(frozen=True)
class Page:
    """What a page shows besides the records.

    Attributes:
        title: of the page.
        about: one line without a full stop.
        command: that writes the page again.
        columns: keys or prefixes of columns, None for all.
        paper: rows of a table beside a paper's, headings first, and notes below it; None without.
        reasons: of a row without a record, why: by position among the records, "not run" where there is none.
    """

    title: str
    about: str
    command: str
    columns: Sequence[str] | None = None
    paper: tuple[Sequence[Sequence[str]], Sequence[str]] | None = None
    reasons: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Cell:
    text: str
    value: float | None = None
    css: str = ""
    mark: str = ""
    hint: str = ""


@dataclass(frozen=True)
class _Line:
    labels: list[str]
    cells: list[_Cell]
    kind: str


def render_page(page: Page, records: Sequence[RunRecord], figures: Mapping[str, str]) -> str:
    """The page.

    Args:
        page: title and the rest.
        records: of all rows; those that are not finished are rows of dashes.
        figures: title to SVG.

    Returns:
        HTML without a reference to anything outside.

    Raises:
        ConfigError: jinja2 is not installed, or a column is unknown.
    """
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ConfigError("a report needs jinja2", remedy="pip install 'masq[report]'") from error
    columns = choose_columns(available_columns(records), page.columns)
    differences = against_float(records)
    template = Environment(loader=PackageLoader("masq.report", "."), autoescape=True).get_template("page.html.j2")
    return template.render(
        title=page.title,
        about=page.about,
        command=page.command,
        labels=[title for title, _ in labels_of(records)],
        columns=[column.title + arrow(column.higher_is_better) for column in columns],
        rows=_lines(records, columns, differences),
        done=sum(record.status == "finished" for record in records),
        significance=_significance(differences),
        notes=footnotes([record for record in records if record.status == "finished"]),
        paper=None if page.paper is None else {"rows": page.paper[0], "notes": page.paper[1]},
        figures=figures,
        missing=_missing(records, page.reasons),
        provenance=provenance_rows(records),
    )


def against_float(records: Sequence[RunRecord]) -> dict[tuple[int, str], Row]:
    """How each record differs from the float one of the same model, by position and key of a score column.

    Records without outcomes of samples, or of other samples, are left out.
    """
    found = {}
    floats = {_model(record): record for record in records if is_float(record) and record.outcomes}
    for position, record in enumerate(records):
        base = floats.get(_model(record))
        if base is None or is_float(record) or not record.outcomes:
            continue
        try:
            those = compared([base, record])
        except DataError:
            continue
        found |= {(position, f"{row.task}.{row.metric}"): row for row in those}
    return _adjusted(found)


def _adjusted(found: dict[tuple[int, str], Row]) -> dict[tuple[int, str], Row]:
    """The same with p-values adjusted over the whole page: each mark is read as a claim of its own."""
    adjusted = adjust([row.comparison.p_value for row in found.values()])
    return {key: replace(row, adjusted=p) for (key, row), p in zip(found.items(), adjusted, strict=True)}


def provenance_rows(records: Sequence[RunRecord]) -> list[list[str]]:
    """One row for every finished record: what made it, when and on what; headings first."""
    rows = [["cell", "identity", "commit", "device", "threads", "finished", "torch", "transformers"]]
    for record, name in zip(records, row_names(records), strict=True):
        made = record.provenance
        if record.status != "finished":
            continue
        commit = f"{str(made.get('commit'))[:10]}{' (changed)' if made.get('dirty') else ''}"
        libraries = made.get("libraries", {})
        rows.append(
            [name, record.identity[:10], commit, str(made.get("device_name", ABSENT))]
            + [str(made.get("threads", ABSENT)), str(made.get("finished", ABSENT))]
            + [str(libraries.get(name, ABSENT)) for name in ("torch", "transformers")]
        )
    return rows


def _lines(
    records: Sequence[RunRecord], columns: list[Column], differences: Mapping[tuple[int, str], Row]
) -> list[_Line]:
    labels = [values for _, values in labels_of(records)]
    best = {column.key: best_value(column, records) for column in columns}
    lines = []
    for position, record in enumerate(records):
        cells = [_cell(record, column, best[column.key], differences.get((position, column.key))) for column in columns]
        kind = "missing" if record.status != "finished" else "float" if is_float(record) else ""
        lines.append(_Line([values[position] for values in labels], cells, kind))
    return lines


def _cell(record: RunRecord, column: Column, best: float | None, difference: Row | None) -> _Cell:
    value, error = column.read(record)
    css = [] if column.valid(record) else ["invalid"]
    if value is not None and value == best and not is_float(record):
        css.append("best")
    mark = hint = ""
    if difference is not None:
        found = difference.comparison
        ends = "" if found.interval is None else " [{:+.3g}, {:+.3g}]".format(*found.interval)
        hint = f"{found.difference:+.3g}{ends} from float, adjusted p {difference.adjusted:.2g}"
        if difference.is_significant:
            mark = BETTER if (found.difference > 0) == bool(column.higher_is_better) else WORSE
    return _Cell(number(value, error, column.digits), value, " ".join(css), mark, hint)


def _significance(differences: Mapping[tuple[int, str], Row]) -> str:
    if not differences:
        return "No record holds outcomes of samples that can be paired with the float model's."
    return (
        f"{WORSE} and {BETTER}: worse or better than float on the same samples, p below {SIGNIFICANCE:g} after Holm's "
        f"correction over the {len(differences)} comparisons of this page; the cell's tooltip has the difference."
    )


def _missing(records: Sequence[RunRecord], reasons: Mapping[int, str]) -> list[str]:
    return [
        f"{name}: {reasons.get(position, 'not run')}"
        for position, (name, record) in enumerate(zip(row_names(records), records, strict=True))
        if record.status != "finished"
    ]


def _model(record: RunRecord) -> str:
    return str(record.config["model"]["name"])
