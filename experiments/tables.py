"""The committed tables: which cells they have, what they cost, how to run them, and how they are written from records.

    python -m experiments.tables plan [TABLE ...]       cells and hours, before anything runs
    python -m experiments.tables run [TABLE ...]        `masq run -m` for each sweep; repeat the command to go on
    python -m experiments.tables write                  records and tables of results/ from finished runs

A cell without a record is a row that says so.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from masq.compose import compose_cells
from masq.config import RunConfig, decode, to_dict
from masq.errors import ConfigError, DataError, unknown_name
from masq.identity import folder_name
from masq.plan import plan
from masq.report.record import RunRecord, read_record
from masq.report.table import available_columns, table

PLAN = Path(__file__).with_name("tables.yaml")
RESULTS = Path(__file__).parent.parent / "results"
RUNS = "runs/results"
# Does not change a result.
_FREE = ("output", "threads", "preset")


@cache
def definitions() -> dict[str, Any]:
    """The content of ``tables.yaml``."""
    return yaml.safe_load(PLAN.read_text(encoding="utf-8"))


def definition(name: str) -> dict[str, Any]:
    """One table.

    Raises:
        ConfigError: no such table; near matches are listed.
    """
    tables = definitions()["tables"]
    if name not in tables:
        raise unknown_name("table", name, tables)
    return tables[name]


def sweeps(name: str) -> list[list[str]]:
    """Overrides of every sweep of a table; lists within lists are lists that sweeps have in common."""
    return [
        [one for part in sweep for one in ([part] if isinstance(part, str) else part)]
        for sweep in definition(name).get("sweeps", ())
    ]


@cache
def cells(name: str) -> tuple[RunConfig, ...]:
    """The configurations of a table's own cells."""
    return tuple(config for sweep in sweeps(name) for config in compose_cells(sweep))


def cell_name(config: RunConfig) -> str:
    """Model, modality, scheme, method, and the seed of calibration where it is not 0."""
    seed = config.calibration.seed
    return folder_name(config, "").rstrip("-") + (f"-seed{seed}" if seed and not config.method.is_float else "")


def stored(name: str) -> dict[str, RunRecord]:
    """The committed records of a table, or of those it shows, by cell; a cell that was not run is not there."""
    found = {}
    for source in definition(name).get("shows", [name]):
        for config in cells(source):
            path = RESULTS / "records" / source / f"{cell_name(config)}.json"
            if path.exists():
                found[cell_name(config)] = read_record(path)
    return found


def rows(name: str) -> list[RunRecord]:
    """A record for every cell of a table, an empty one that says so where there is none."""
    records, known = [], stored(name)
    for source in definition(name).get("shows", [name]):
        for config in cells(source):
            records.append(known.get(cell_name(config)) or _not_run(config))
    return records


def _not_run(config: RunConfig) -> RunRecord:
    record = RunRecord.start("", to_dict(config), {})
    record.failure = {"kind": "not run", "message": ""}
    return record


def render(name: str) -> str:
    """The table in Markdown.

    Raises:
        DataError: no cell of it was run.
    """
    records = rows(name)
    if not any(record.status == "finished" for record in records):
        raise DataError(f"no cell of table {name} was run", remedy=f"python -m experiments.tables run {name}")
    wanted = definition(name).get("columns")
    there = [column.key for column in available_columns(records)]
    if wanted is not None:
        wanted = [key for key in wanted if any(one == key or one.startswith(f"{key}.") for one in there)]
    return f"<!-- {definition(name)['about']} -->\n\n{table(records, wanted)}".rstrip("\n") + "\n"


def plan_text(names: Sequence[str]) -> str:
    """Cells and hours of each table."""
    lines, total = [], 0.0
    for name in names:
        seconds = sum(sum(plan(config).seconds.values()) for config in cells(name))
        total += seconds
        if cells(name):
            lines.append(
                [name, len(cells(name)), len(stored(name)), f"{seconds / 3600:.1f}", definition(name)["about"]]
            )
    lines.append(["all", "", "", f"{total / 3600:.1f}", ""])
    return tabulate(lines, ["table", "cells", "recorded", "hours", "about"], tablefmt="github", disable_numparse=True)


def finished_runs(root: Path) -> Iterator[tuple[Path, RunRecord]]:
    """Finished records under ``root``, the latest last: of two runs of one cell, on other weights say, it counts."""
    found = [(path, read_record(path)) for path in root.glob("*/record.json")]
    finished = [(path, record) for path, record in found if record.status == "finished"]
    yield from sorted(finished, key=lambda pair: str(pair[1].provenance["finished"]))


def collect(root: Path) -> dict[str, int]:
    """Copy records of finished runs into ``results/records``, and drop those of cells that no table has any more.

    Returns:
        How many cells of each table have no record.
    """
    by_config = {key(record.config): path for path, record in finished_runs(root)}
    missing = {}
    for name in definitions()["tables"]:
        folder = RESULTS / "records" / name
        wanted = {cell_name(config): config for config in cells(name)}
        for path in folder.glob("*.json"):
            if path.stem not in wanted:
                path.unlink()
        for cell, config in wanted.items():
            found = by_config.get(key(to_dict(config)))
            if found is not None:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found, folder / f"{cell}.json")
        missing[name] = sum(not (folder / f"{cell}.json").exists() for cell in wanted)
    return missing


def key(config: dict[str, Any]) -> str:
    """What two configurations of one cell have in common: a float run serves every scheme and calibration."""
    # Options that came after a record was written have their defaults.
    kept = {name: value for name, value in to_dict(decode({**config, "output": {}})).items() if name not in _FREE}
    # Where things lie, and names that change nothing.
    free = {
        "model": ("source", "architecture"),
        "method": ("description",),
        "calibration": ("source", "cache"),
        "evaluation": ("source", "name"),
    }
    for group, names in free.items():
        kept[group] = {name: value for name, value in kept[group].items() if name not in names}
    if kept["method"]["rounding"]["kind"] == "none":
        kept = {key: value for key, value in kept.items() if key not in ("scheme", "calibration", "seed")}
    return yaml.safe_dump(kept, sort_keys=True)


def write() -> list[str]:
    """Write every table that has a record.

    Returns:
        Their names.
    """
    (RESULTS / "tables").mkdir(parents=True, exist_ok=True)
    written = [name for name in definitions()["tables"] if stored(name)]
    for name in written:
        (RESULTS / "tables" / f"{name}.md").write_text(render(name), encoding="utf-8")
    return written


def run(names: Sequence[str], root: str, extra: Sequence[str]) -> int:
    """Run the sweeps of tables one after the other; finished cells are skipped.

    Returns:
        The worst exit status.
    """
    worst = 0
    for name in names:
        for sweep in sweeps(name):
            command = [sys.executable, "-m", "masq", "run", "-m", *sweep, f"output.root={root}", *extra]
            worst = max(worst, subprocess.run(command, check=False).returncode)
    return worst


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["plan", "run", "write"])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="all by default")
    parser.add_argument("--root", default=RUNS, help="folder of the runs")
    parser.add_argument("--threads", type=int, help="CPU threads of a run")
    options = parser.parse_args()
    names = options.tables or list(definitions()["tables"])
    try:
        if options.action == "plan":
            print(plan_text(names))
        elif options.action == "run":
            extra = [] if options.threads is None else [f"threads={options.threads}"]
            raise SystemExit(run(names, options.root, extra))
        else:
            missing = collect(Path(options.root))
            print(f"written: {', '.join(write()) or 'nothing'}")
            left = [f"{count} of {len(cells(name))} cells of {name}" for name, count in missing.items() if count]
            print(f"not run: {', '.join(left) or 'nothing'}")
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
