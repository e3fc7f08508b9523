"""The cells of a sweep: each leaves its outcome in a small file, so that cells may run in other processes."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from masq.config import RunConfig
from masq.decoding import decode_dataclass
from masq.errors import BusyError, MasqError
from masq.files import atomic_write_json, read_json
from masq.identity import folder_name, run_folder

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: with a record, with an error, or left to another process.

    Attributes:
        cell: name of the cell.
        record: path of its record.json when it finished.
        error: what went wrong when it did not.
        busy: another process is working on it.
    """

    cell: str
    record: str | None = None
    error: str | None = None
    busy: bool = False

    @property
    def failed(self) -> bool:
        """Whether it has to be tried again."""
        return self.error is not None


def show_progress() -> None:
    """Progress goes to standard error, one readable line each; results alone go to standard output."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("masq").setLevel(logging.INFO)


def attempt(config: RunConfig) -> Outcome:
    """Run one cell; whatever goes wrong in it becomes its outcome, so that the other cells go on."""
    cell = cell_name(config)
    try:
        from masq.run import run

        _LOG.info("%s: starting", cell)
        record = run(config)
    except BusyError:
        _LOG.info("%s: another process works on it, passed over", cell)
        return Outcome(cell, busy=True)
    except MasqError as error:
        _LOG.error("%s: %s", cell, error)
        return Outcome(cell, error=str(error))
    except Exception as error:  # noqa: BLE001 - logged in full and reported; it must not end the sweep
        _LOG.exception("%s: failed", cell)
        return Outcome(cell, error=f"{type(error).__name__}: {error}")
    if record.status != "finished":
        return Outcome(cell, error=f"the record says {record.status}")
    return Outcome(cell, record=str(run_folder(config, record.identity).resolve() / "record.json"))


def write_outcome(folder: Path, index: int, outcome: Outcome) -> None:
    """Keep the outcome of cell ``index``.

    Raises:
        OutputError: the folder cannot be written.
    """
    atomic_write_json(_path(folder, index), asdict(outcome))


def read_outcome(folder: Path, index: int, config: RunConfig) -> Outcome:
    """The outcome of cell ``index``; a cell whose process died has left none, which is a failure."""
    path = _path(folder, index)
    if not path.exists():
        return Outcome(
            cell_name(config),
            error="ended without a result: its process was killed, by hand or for memory; run it again",
        )
    return decode_dataclass(Outcome, read_json(path))


def cell_name(config: RunConfig) -> str:
    """Model, modalities, scheme and method."""
    return folder_name(config, "").rstrip("-")


def _path(folder: Path, index: int) -> Path:
    return folder / f"cell-{index:04}.json"
