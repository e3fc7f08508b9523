"""Finished batches of an evaluation on disk, so that an interrupted one goes on where it stopped.

Batches are a fixed function of sample order and batch size, and a file counts only if it was made from the same
samples with the same settings. JSON keeps float64 values exactly, so a resumed run ends bit-identical.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from masq.errors import DataError
from masq.files import atomic_write_json, canonical_hash, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from masq.models.base import Sample

_LOG = logging.getLogger(__name__)


class Identified(Protocol):
    """Whatever is evaluated in batches: a sample, a request of a harness."""

    @property
    def id(self) -> str:
        """Unique in the data set."""
        ...


Item = TypeVar("Item", bound=Identified)

Progress = Callable[[str, int, int], None]
"""Called after every batch with the stage, the number of batches done, and their total."""


class ProgressLog:
    """Logs one plain line per batch with the time left; lines, so that a log file reads well."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """See ``Progress``; with ``done`` 0 the stage begins."""
        now = time.perf_counter()
        if done == 0 or stage not in self._started:
            self._started[stage] = now
            return
        left = (now - self._started[stage]) / done * (total - done)
        _LOG.info("%s %d/%d | %.0f s left", stage, done, total, left)


class BatchStore:
    """One JSON file per finished batch: a list with one JSON object per sample.

    Args:
        folder: created when the first batch is written.
        settings: everything besides the samples that the results depend on and the folder does not say.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self._settings = dict(settings or {})

    def path(self, name: str) -> Path:
        """File of the batch ``name``."""
        return self.folder / f"{name}.json"

    def save(self, name: str, samples: Sequence[Identified], results: list[dict[str, Any]]) -> None:
        """Write a batch whole, with a checksum.

        Raises:
            ValueError: a result holds NaN or an infinity.
        """
        body = {"key": self._key(samples), "results": results}
        atomic_write_json(self.path(name), {**body, "sha256": canonical_hash(body)})

    def load(self, name: str, samples: Sequence[Identified]) -> list[dict[str, Any]] | None:
        """Results of a finished batch by sample; None, with a warning, for a damaged or foreign file."""
        path = self.path(name)
        if not path.exists():
            return None
        try:
            content = read_json(path)
        except DataError as error:
            _LOG.warning("%s is damaged and is computed again: %s", path.name, error)
            return None
        if not isinstance(content, dict):
            content = {}
        checksum = content.pop("sha256", None)
        if checksum != canonical_hash(content):
            _LOG.warning("%s is damaged and is computed again: its checksum does not fit", path.name)
            return None
        if content["key"] != self._key(samples):
            _LOG.warning("%s belongs to other samples or settings and is computed again", path.name)
            return None
        return content["results"]

    def _key(self, samples: Sequence[Identified]) -> dict[str, Any]:
        return {"ids": [sample.id for sample in samples], **self._settings}


def run_batches(
    stage: str,
    batches: Iterable[tuple[str, Sequence[Item]]],
    compute: Callable[[Sequence[Item]], list[dict[str, Any]]],
    store: BatchStore,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Results of all batches in order; those that the store has are not computed again.

    Args:
        stage: name for ``progress``.
        batches: file name and samples of each batch.
        compute: one JSON object per sample of a batch.
        store: where finished batches are kept.
        progress: told after every batch; what it raises ends the run and leaves finished batches on disk.
    """
    listed = list(batches)
    results: list[dict[str, Any]] = []
    progress(stage, 0, len(listed))
    for done, (name, samples) in enumerate(listed, start=1):
        found = store.load(name, samples)
        if found is None:
            found = compute(samples)
            store.save(name, samples, found)
        results += found
        progress(stage, done, len(listed))
    return results


def named_batches(batches: Sequence[Sequence[Sample]]) -> list[tuple[str, Sequence[Sample]]]:
    """Give each batch the name ``<task of its first sample>-<number within that task>``."""
    counts: dict[str, int] = {}
    named = []
    for samples in batches:
        task = samples[0].task
        named.append((f"{task}-{counts.get(task, 0):04d}", samples))
        counts[task] = counts.get(task, 0) + 1
    return named
