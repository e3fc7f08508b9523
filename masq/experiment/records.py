"""The records that fill the cells of an experiment, found by what they say they did."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from masq.config import RunConfig, decode, to_dict
from masq.errors import DataError
from masq.experiment.definition import Experiment, cells
from masq.identity import folder_name
from masq.report.record import RunRecord, read_record
from masq.report.table import available_columns, table

_LOG = logging.getLogger(__name__)
NOT_RUN = "not run"
# Does not change a result.
_FREE = ("output", "threads", "preset")
# Where things lie, and names that change nothing.
_FREE_IN = {
    "model": ("source", "architecture", "weights"),
    "method": ("description",),
    "calibration": ("source", "cache"),
    "evaluation": ("source", "name", "records", "keep_float"),
}


def cell_key(config: dict[str, Any]) -> str:
    """What the configurations of one cell have in common: a float run serves every scheme and calibration.

    Args:
        config: a resolved configuration, of this release or an earlier one.
    """
    # Options that came after a record was written have their defaults.
    plain = to_dict(decode({**config, "output": {}}))
    kept = {name: value for name, value in plain.items() if name not in _FREE}
    for group, names in _FREE_IN.items():
        kept[group] = {name: value for name, value in kept[group].items() if name not in names}
    if kept["method"]["rounding"]["kind"] == "none":
        kept = {name: value for name, value in kept.items() if name not in ("scheme", "calibration", "seed")}
    return json.dumps(kept, sort_keys=True)


class RecordIndex:
    """Finished records by cell; of two of one cell, on other weights say, the latest counts."""

    def __init__(self, records: Iterable[tuple[Path, RunRecord]]) -> None:
        finished = [(path, record) for path, record in records if record.status == "finished"]
        in_time = sorted(finished, key=lambda pair: str(pair[1].provenance.get("finished")))
        self._by_key = {cell_key(record.config): (path, record) for path, record in in_time}

    @classmethod
    def of_folders(cls, *folders: Path) -> RecordIndex:
        """Of ``<folder>/*.json`` (collected) and ``<folder>/*/record.json`` (runs); unreadable ones are left out."""
        paths = [path for folder in folders for pattern in ("*.json", "*/record.json") for path in folder.glob(pattern)]
        return cls(found for path in sorted(paths) if (found := _read(path)) is not None)

    def find(self, config: RunConfig) -> RunRecord | None:
        """The record of a cell."""
        found = self._by_key.get(cell_key(to_dict(config)))
        return None if found is None else found[1]

    def path(self, config: RunConfig) -> Path | None:
        """The file of the record of a cell."""
        found = self._by_key.get(cell_key(to_dict(config)))
        return None if found is None else found[0]


def rows(found: Experiment, index: RecordIndex) -> list[RunRecord]:
    """A record for every cell, in order, each once; an empty one that says so where there is none."""
    wanted = {cell_key(to_dict(config)): config for config in cells(found)}
    return [index.find(config) or _not_run(config) for config in wanted.values()]


def missing(found: Experiment, index: RecordIndex) -> int:
    """How many cells have no record."""
    return sum(is_not_run(record) for record in rows(found, index))


def is_not_run(record: RunRecord) -> bool:
    """Whether a row stands for a cell without a record."""
    return record.status != "finished"


def render(found: Experiment, index: RecordIndex, format: str = "markdown") -> str:  # noqa: A002
    """The table of an experiment.

    Raises:
        DataError: no cell of it was run.
    """
    records = rows(found, index)
    if all(is_not_run(record) for record in records):
        raise DataError(
            f"no cell of {found.title} was run", remedy=f"masq run experiment={found.name} scale={found.scale}"
        )
    return table(records, columns_of(records, found.columns), format)


def stored_name(record: RunRecord) -> str:
    """File name of a collected record: that of the run's folder."""
    return f"{folder_name(decode({**record.config, 'output': {}}), record.identity)}.json"


def columns_of(records: Sequence[RunRecord], wanted: Sequence[str] | None) -> list[str] | None:
    """Those of the wanted columns that any record has."""
    if wanted is None:
        return None
    there = [column.key for column in available_columns(records)]
    return [key for key in wanted if any(one == key or one.startswith(f"{key}.") for one in there)]


def _not_run(config: RunConfig) -> RunRecord:
    record = RunRecord.start("", to_dict(config), {})
    record.failure = {"kind": NOT_RUN, "message": ""}
    return record


def _read(path: Path) -> tuple[Path, RunRecord] | None:
    try:
        return path, read_record(path)
    except DataError as error:
        _LOG.warning("left out: %s", error)
        return None
