"""The committed records and tables of ``results/``, from finished runs.

    python -m experiments.tables plan                   cells, those with a record, and hours of every table
    python -m experiments.tables run [TABLE ...]        `masq run experiment=TABLE`; repeat the command to go on
    python -m experiments.tables write                  records of finished runs into results/, tables written again

The tables are the experiments (``conf/experiment/``) that are run on the embedded models. A cell without a record is a
row that says so.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tabulate import tabulate

from masq.config import to_dict
from masq.errors import MasqError
from masq.experiment import definition
from masq.experiment.compare_paper import compare_paper
from masq.experiment.definition import Experiment, changed, experiment
from masq.experiment.records import RecordIndex, cell_key, is_not_run, missing, render, rows, stored_name
from masq.experiment.running import distinct, run_experiment
from masq.plan import plan
from masq.report.labels import is_float
from masq.report.record import RunRecord
from masq.sweep import show_progress

RESULTS = Path(__file__).parent.parent / "results"
RUNS = "runs/results"
SCALE = "smol"


def names() -> list[str]:
    """The committed tables, those that show others last."""
    found = [name for name in definition.names() if SCALE in definition.scales(name)]
    return sorted(found, key=lambda name: bool(table(name).shows))


def table(name: str) -> Experiment:
    """One table.

    Raises:
        ConfigError: no such table; near matches are listed.
    """
    return experiment(name, SCALE)


@cache
def index() -> RecordIndex:
    """The committed records."""
    return RecordIndex.of_folders(RESULTS / "records")


def stored(name: str) -> list[RunRecord]:
    """The committed records of a table."""
    return [record for record in rows(table(name), index()) if not is_not_run(record)]


def cell(name: str, scheme: str, method: str) -> RunRecord:
    """The committed record of one cell of a table; the float model's scheme is ``float``.

    Raises:
        KeyError: it was not run.
    """
    for record in stored(name):
        if (record.method, "float" if is_float(record) else record.scheme) == (method, scheme):
            return record
    raise KeyError(f"{name}: {method} at {scheme}")


def collect(root: Path) -> None:
    """Copy records of finished runs that belong to a table into ``results/records``, and drop those of none."""
    wanted = {cell_key(to_dict(config)): config for name in names() for config in distinct(table(name))}
    folder = RESULTS / "records"
    folder.mkdir(parents=True, exist_ok=True)
    found = RecordIndex.of_folders(folder, root)
    kept = set()
    for config in wanted.values():
        record, path = found.find(config), found.path(config)
        if record is not None and path is not None:
            target = folder / stored_name(record)
            kept.add(target)
            if path != target:
                shutil.copyfile(path, target)
    for path in folder.glob("*.json"):
        if path not in kept:
            path.unlink()
    index.cache_clear()


def write() -> list[str]:
    """Write every table that has a record, and beside it what a paper reports.

    Returns:
        Their names.
    """
    folder = RESULTS / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    written = [name for name in names() if stored(name)]
    for name in written:
        (folder / f"{name}.md").write_text(text(name), encoding="utf-8")
    return written


def text(name: str) -> str:
    """A table in Markdown, with the paper's beside it where scores of both can be compared."""
    found = table(name)
    parts = [f"<!-- {found.about} -->", render(found, index()).rstrip("\n")]
    if found.paper is not None and any(record.scores for record in stored(name)):
        parts += ["## The paper's table", compare_paper(found, index()).rstrip("\n")]
    return "\n\n".join(parts) + "\n"


def plan_text() -> str:
    """Cells and hours of each table; a cell of several counts for the first."""
    lines, seen, total = [], set(), 0.0
    for name in names():
        cells = distinct(table(name))
        keys = {cell_key(to_dict(config)): config for config in cells}
        seconds = sum(sum(plan(config).seconds.values()) for key, config in keys.items() if key not in seen)
        seen |= set(keys)
        total += seconds
        recorded = len(cells) - missing(table(name), index())
        lines.append([name, len(cells), recorded, f"{seconds / 3600:.1f}", table(name).about])
    lines.append(["all", "", "", f"{total / 3600:.1f}", ""])
    headings = ["table", "cells", "recorded", "hours", "about"]
    return tabulate(lines, headings, tablefmt="github", disable_numparse=True)


def run(wanted: Sequence[str], root: str, extra: Sequence[str]) -> int:
    """Run the cells of tables one after the other; finished ones are skipped.

    Returns:
        The exit status: 1 if a cell failed.
    """
    show_progress()
    outcomes = [one for name in wanted for one in run_experiment(changed(table(name), [f"output.root={root}", *extra]))]
    return int(any(outcome.failed for outcome in outcomes))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["plan", "run", "write"])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="all by default")
    parser.add_argument("--root", default=RUNS, help="folder of the runs")
    parser.add_argument("--threads", type=int, help="CPU threads of a run")
    options = parser.parse_args()
    try:
        if options.action == "plan":
            print(plan_text())
        elif options.action == "run":
            extra = [] if options.threads is None else [f"threads={options.threads}"]
            raise SystemExit(run(options.tables or names(), options.root, extra))
        else:
            collect(Path(options.root))
            print(f"written: {', '.join(write()) or 'nothing'}")
            left = [
                f"{missing(table(name), index())} of {len(distinct(table(name)))} cells of {name}" for name in names()
            ]
            print(f"not run: {', '.join(text for text in left if not text.startswith('0 ')) or 'nothing'}")
    except MasqError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
