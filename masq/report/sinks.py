"""Where a run is shown while it goes on, and where its record goes besides its own folder: Weights & Biases.

One wandb run for each cell, one for each experiment. Online, offline and disabled are the same to the code. The record
on disk is the result: a sink that fails costs a warning that says how to send what it kept, never the run.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from masq.errors import ConfigError
from masq.files import canonical_hash
from masq.report.figures import row_names
from masq.report.labels import labels_of
from masq.report.table import available_columns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from masq.report.record import RunRecord

_LOG = logging.getLogger(__name__)
# What W&B takes as an id: at most 128 characters of these; 16 of a hash are enough to be unique.
_ID_LENGTH = 16
_SECTIONS = ("scores", "health", "fidelity", "effective_bits", "timings")


def require_wandb() -> None:
    """Fail before a run starts when its configuration asks for wandb and it is not installed.

    Raises:
        ConfigError: the package is absent.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "output.wandb=true needs the wandb package", remedy="pip install 'masq[log]', or set output.wandb=false"
        )


class WandbRun:
    """A wandb run under an id of ours, so that a repeated one goes on instead of appearing twice.

    Without credentials it is kept offline below its folder. After the first thing that fails nothing more is tried.

    Args:
        project: of W&B.
        group: of runs that belong together, None for none.
        identity: what makes the run this run.
        folder: where wandb keeps its files.
        options: more of ``wandb.init``.
    """

    def __init__(self, project: str, group: str | None, identity: str, folder: Path, **options: Any) -> None:
        self._folder = folder
        self._run: Any = None

        def start() -> None:
            import wandb

            self._run = wandb.init(
                project=project,
                group=group,
                id=identity[:_ID_LENGTH],
                resume="allow",
                dir=str(folder),
                mode=_mode(),
                **options,
            )

        self._safely(start)

    @classmethod
    def of_cell(cls, project: str, group: str | None, record: RunRecord, folder: Path) -> WandbRun:
        """The run of a cell that begins: its configuration, and tags by which the web interface sorts."""
        config = record.config
        tags = [config.get(group, {}).get("name") for group in ("model", "modality", "scheme", "method")]
        tags = [*dict.fromkeys(str(tag) for tag in tags if tag), str(config.get("execution", "simulated"))]
        return cls(
            project,
            group,
            record.identity,
            folder,
            name=f"{record.method}-{record.scheme}",
            config=config,
            # W&B refuses tags of more than 64 characters, which names of changed methods may have.
            tags=[tag[:64] for tag in tags],
            job_type="cell",
        )

    def log(self, stage: str, index: int, numbers: Mapping[str, float]) -> None:
        """Numbers of one block, against the block's own number."""
        if self._run is not None and numbers:
            values = {f"{stage}/{key}": value for key, value in numbers.items()}
            self._safely(lambda: self._run.log({f"{stage}/block": index, **values}))

    def finish(self, record: RunRecord, checkpoint: Path | None = None) -> None:
        """Final numbers, and the stored blocks where they are asked for."""
        if self._run is None:
            return

        def end() -> None:
            if checkpoint is not None:
                self._add_artifact(f"blocks-{record.identity[:_ID_LENGTH]}", "model", [checkpoint])
            self._run.summary.update(flat_numbers(record))
            self._run.finish(exit_code=0 if record.status == "finished" else 1)

        self._safely(end)

    def finish_experiment(self, records: Sequence[RunRecord], paths: Sequence[Path]) -> None:
        """The table of an experiment, its bars, and its records as an artifact."""
        if self._run is None:
            return

        def end() -> None:
            import wandb

            header, rows = plain_table(records)
            shown = wandb.Table(columns=[*header], data=[*rows])
            bars = {
                f"bars/{title}": wandb.plot.bar(wandb.Table(columns=["cell", title], data=[*values]), "cell", title)
                for title, values in _bars(records).items()
            }
            self._run.log({"table": shown, **bars})
            self._run.summary.update({"cells": len(records)})
            self._add_artifact("records", "records", paths)
            self._run.finish()

        self._safely(end)

    def _add_artifact(self, name: str, kind: str, paths: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(name, type=kind)
        for path in paths:
            if path.is_dir():
                artifact.add_dir(str(path))
            else:
                artifact.add_file(str(path), name=f"{path.parent.name}.json" if path.stem == "record" else path.name)
        self._run.log_artifact(artifact)

    def _safely(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - wandb raises what its service, network and disk raise
            kept = f"{self._folder}/wandb"
            _LOG.warning(
                "wandb failed and is left alone; the run goes on (%s). To send later: wandb sync %s/*", error, kept
            )
            self._run = None


@contextmanager
def shown_by(run: WandbRun | None) -> Iterator[None]:
    """Send what blocks report to a wandb run while the context lasts."""
    from masq.pipeline.progress import listening

    if run is None:
        yield
        return
    with listening(run.log):
        yield


def experiment_id(title: str, root: str) -> str:
    """Id of the summary run of an experiment in one folder of results."""
    return canonical_hash({"experiment": title, "root": root})


def plain_table(records: Sequence[RunRecord]) -> tuple[list[str], list[list[Any]]]:
    """The table of records as headings and plain values, with standard errors in columns of their own."""
    labels, columns = labels_of(records), available_columns(records)
    header = [title for title, _ in labels]
    for column in columns:
        header += [column.key, f"{column.key}.standard_error"]
    rows = [
        [values[position] for _, values in labels] + [number for column in columns for number in column.read(record)]
        for position, record in enumerate(records)
    ]
    return header, rows


def flat_numbers(record: RunRecord) -> dict[str, float]:
    """The numbers of a record under dotted names such as ``scores.digits.exact_match.value``."""
    flat: dict[str, float] = {}
    for section in _SECTIONS:
        _flatten(section, getattr(record, section), flat)
    flat["peak_memory_bytes"] = record.peak_memory_bytes
    return flat


def _bars(records: Sequence[RunRecord]) -> dict[str, list[list[Any]]]:
    """What a first look wants: KL by modality, each cell a bar."""
    names = row_names(records)
    found: dict[str, list[list[Any]]] = {}
    for column in available_columns(records):
        if column.key.startswith("kl."):
            pairs = [[name, column.read(record)[0]] for name, record in zip(names, records, strict=True)]
            found[column.key] = [pair for pair in pairs if pair[1] is not None]
    return found


def _flatten(prefix: str, value: Any, flat: dict[str, float]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{prefix}.{key}", item, flat)
    elif isinstance(value, int | float):
        flat[prefix] = float(value)


def _mode() -> Any:
    """An explicit WANDB_MODE wins; else online only with credentials, so that nothing waits for a login."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"
