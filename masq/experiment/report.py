"""An experiment's report: a page to look at, and its table as a paper prints it."""

from __future__ import annotations

from pathlib import Path

from masq.experiment.compare_paper import paper_rows
from masq.experiment.definition import Experiment
from masq.experiment.records import RecordIndex, columns_of, is_not_run, render, rows
from masq.experiment.running import CellStatus
from masq.files import atomic_write_bytes
from masq.report.figures import figures
from masq.report.page import Page, render_page

FORMATS = {"markdown": "md", "latex": "tex"}


def write_report(found: Experiment, index: RecordIndex, folder: Path, statuses: list[CellStatus]) -> list[Path]:
    """Write ``<folder>/<title>.html``, and the table in Markdown and LaTeX where any cell was run.

    Args:
        found: the experiment.
        index: its records.
        folder: made where it is not there.
        statuses: how far its cells have come, in the order of its rows; empty where nobody knows.

    Returns:
        The files.

    Raises:
        ConfigError: jinja2 or matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    records = rows(found, index)
    finished = [record for record in records if not is_not_run(record)]
    page = Page(
        title=found.title,
        about=found.about,
        command=f"masq report {found.name} --scale {found.scale}",
        columns=columns_of(records, found.columns),
        paper=None if found.paper is None else paper_rows(found, index),
        reasons={position: _reason(one) for position, one in enumerate(statuses)},
    )
    texts = {folder / f"{found.title}.html": render_page(page, records, figures(finished))}
    if finished:
        texts |= {folder / f"{found.title}.{end}": render(found, index, name) for name, end in FORMATS.items()}
    for path, text in texts.items():
        atomic_write_bytes(path, (text.rstrip("\n") + "\n").encode())
    return list(texts)


def _reason(status: CellStatus) -> str:
    """Why a cell has no record."""
    words = {"left": "not run", "running": "running now", "interrupted": "interrupted, goes on when run again"}
    return words.get(status.state, f"failed: {status.error}")
