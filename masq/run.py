"""One run, one screen: load, quantize, evaluate, report."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from masq import parallel
from masq.artifacts import Artifacts
from masq.config import RunConfig, active_modalities, check_sizes, notes, to_dict
from masq.files import atomic_write_bytes, clear_scratch, exclusive, require_writable_folder
from masq.finished import finished_record, stages_of
from masq.identity import identity, run_folder
from masq.inputs import load_data
from masq.report.memory import peak_memory, reset_peak_memory
from masq.report.provenance import provenance
from masq.report.record import RunRecord, write_record
from masq.report.sessions import add_session, differences, sessions
from masq.report.sinks import WandbRun, require_wandb, shown_by

if TYPE_CHECKING:
    from collections.abc import Iterator

    from masq.models.base import ModelAdapter, Sample
    from masq.modules.modality import ModalityContext
    from masq.report.record import ScoreEntry

_LOG = logging.getLogger(__name__)
LOCK = "lock"
"""File of a run's folder that is held while a process works on it."""


def run(config: RunConfig) -> RunRecord:
    """Quantize and score one cell.

    The cell lives in ``<output.root>/<model>-<modality>-<scheme>-<method>-<identity>/``. A finished cell is returned as
    it is; an interrupted one goes on at the block or batch where it stopped, and ends bit-identical.

    Args:
        config: decoded configuration.

    Returns:
        The record, also written to ``record.json`` in the folder of the cell.

    Raises:
        MasqError: bad input, before anything heavy starts wherever that can be known, or a numerical failure. A cell
            that failed leaves a record that says so, and is tried again next time.
        BusyError: another process works on this cell.
    """
    if config.output.wandb:
        require_wandb()
    data, hashes, warnings = load_data(config)
    hashes["model"] = _checked_model(config)
    key = identity(config, hashes)
    folder = run_folder(config, key)
    finished = finished_record(folder)
    if finished is None:
        require_writable_folder(folder)
        with exclusive(folder / LOCK):
            # Another process may have finished it since.
            finished = finished_record(folder)
            if finished is None:
                return _run(config, data, hashes, warnings, key)
    _LOG.info("%s: finished before, skipped", folder.name)
    return finished


def assist(config: RunConfig) -> None:
    """Help another process to calibrate one cell: what every process but the first does under ``torchrun``.

    It takes its share of the calibration samples, and is done when the model is quantized; the process of rank 0 runs
    ``run`` on the same configuration, and is the only one that scores and writes.

    Args:
        config: decoded configuration, the same in all processes.

    Raises:
        MasqError: as ``run``.
    """
    import tempfile

    from masq.models.loading import load
    from masq.modules.modality import install

    data, hashes, _ = load_data(config)
    hashes["model"] = _checked_model(config)
    key = identity(config, hashes)
    folder = run_folder(config, key)
    if config.method.is_float or finished_record(folder) is not None:
        return
    _set_threads(config.threads)
    record = RunRecord.start(key, _public_config(config), {})
    with tempfile.TemporaryDirectory(prefix="masq-") as scratch:
        adapter = load(replace(config.model, modalities=active_modalities(config)), Path(scratch))
        context, _ = install(adapter)
        _quantize(record, config, adapter, context, data["calibration"], hashes, folder)


def _run(
    config: RunConfig, data: dict[str, list[Sample]], hashes: dict[str, str], warnings: list[str], key: str
) -> RunRecord:
    """Work on a cell that no other process works on."""
    folder = run_folder(config, key)
    clear_scratch(folder)
    _set_threads(config.threads)
    made_by = provenance(config.seed, hashes, device=config.model.device)
    made_by["earlier_sessions"] = sessions(folder)
    if parallel.size() > 1:
        made_by["processes"] = parallel.size()
    add_session(folder, made_by)
    record = RunRecord.start(key, _public_config(config), made_by)
    record.warnings.extend([*notes(config), *warnings])
    record.warnings.extend(differences(made_by["earlier_sessions"], made_by, "parts of this run"))
    reset_peak_memory(config.model.device)
    output = config.output
    shown = WandbRun.of_cell(output.wandb_project, output.wandb_group, record, folder) if output.wandb else None
    with _log_file(folder / "log"), shown_by(shown):
        try:
            _write_config(config, folder)
            _fill(record, config, data, hashes, folder)
            record.finish()
        except Exception as error:
            record.fail(error)
            _LOG.error("%s failed: %s", folder.name, error)
            raise
        finally:
            clear_scratch(folder)
            if record.status != "running":
                write_record(record, folder / "record.json")
                if shown is not None:
                    shown.finish(record, folder / "blocks" if output.wandb_checkpoint else None)
    return record


def _fill(
    record: RunRecord, config: RunConfig, data: dict[str, list[Sample]], hashes: dict[str, str], folder: Path
) -> None:
    """The stages of a run, each timed; what is finished is in the record even if a later stage fails."""
    from masq.models.loading import load
    from masq.modules.fused import deploy
    from masq.modules.modality import install

    # Only the active modalities exist for this run: a dual run of a tri-modal model never looks at audio.
    model = replace(config.model, modalities=active_modalities(config))
    with _timed(record, "load"):
        adapter = load(model, folder)
        adapter.decoding = config.evaluation.decoding
        context, handle = install(adapter)
        adapter.context = context
    if not config.method.is_float:
        _quantize(record, config, adapter, context, data["calibration"], hashes, folder)
        if config.execution != "simulated":
            with _timed(record, "pack"):
                record.provenance |= deploy(adapter, config.kernel, fused=config.execution == "fused")
            if record.provenance.get("fused") == 0:
                kernels = ", ".join(record.provenance["kernels"])
                record.warnings.append(f"execution=fused: nothing could be fused on kernel {kernels}")
    record.effective_bits = _stored_bits(adapter)
    if config.evaluation.score or config.evaluation.benchmarks:
        with _timed(record, "evaluate"):
            _score(record, config, adapter, data, folder)
    if data["evaluation"]:
        with _timed(record, "fidelity"):
            kept = Artifacts(config, hashes, record).float_outputs()
            record.fidelity = _fidelity(config, load(model, folder), adapter, data["evaluation"], folder, kept)
    handle.remove()
    record.peak_memory_bytes = peak_memory(config.model.device)


def _stored_bits(adapter: ModelAdapter) -> dict[str, float]:
    """The `effective_bits` of a record: of the decoder, and of towers that are quantized."""
    from masq.modules.footprint import footprint, footprint_of
    from masq.modules.packed_linear import tower_linears

    towers = {"towers": footprint_of(found).effective_bits} if (found := tower_linears(adapter)) else {}
    return {**footprint(adapter.blocks()).to_dict(), **towers}


def _score(
    record: RunRecord, config: RunConfig, adapter: ModelAdapter, data: dict[str, list[Sample]], folder: Path
) -> None:
    """Scores of tasks or benchmarks, and what they made of every sample."""
    from masq.evaluation.batch_store import ProgressLog
    from masq.evaluation.evaluate import evaluate
    from masq.evaluation.suite import run_benchmarks

    if config.evaluation.benchmarks:
        result = run_benchmarks(adapter, config.evaluation, folder, ProgressLog())
    else:
        result = evaluate(adapter, data["evaluation"], config.evaluation, folder)
    record.scores = {
        task: {metric: cast("ScoreEntry", score.to_dict()) for metric, score in by.items()}
        for task, by in result.scores.items()
    }
    record.outcomes = {
        task: {metric: outcomes.to_dict() for metric, outcomes in by.items()} for task, by in result.outcomes.items()
    }
    record.health = result.health
    record.warnings.extend(result.warnings)
    record.provenance |= {"harnesses": result.versions, "tasks": result.tasks}


def _quantize(
    record: RunRecord,
    config: RunConfig,
    adapter: ModelAdapter,
    context: ModalityContext,
    samples: list[Sample],
    hashes: dict[str, str],
    folder: Path,
) -> None:
    """Quantize the model in place and note every block."""
    from masq.calibration.data import batches
    from masq.calibration.replay import EncodedBatches
    from masq.pipeline.loop import quantize
    from masq.pipeline.store import BlockStore

    stages = stages_of(config)
    artifacts = Artifacts(config, hashes, record)
    factors = BlockStore(artifacts.factors())
    if stages.learns:
        artifacts.note("learned factors", factors.folder, factors.has_all(len(adapter.blocks())))
    # A cache is read where one process knows the answer and another does not: they would wait for each other.
    cached = stages.moments_on_float and parallel.size() == 1
    report = quantize(
        adapter,
        EncodedBatches(adapter, batches(samples, config.calibration.batch_size)),
        stages,
        context,
        blocks=BlockStore(folder / "blocks"),
        factors=factors,
        gradients=BlockStore(artifacts.gradients(folder)) if stages.sensitivity_floor else None,
        cache=artifacts.statistics() if cached else None,
    )
    record.blocks = report.blocks
    record.warnings.extend(report.warnings)
    record.timings.update(report.seconds)


def _fidelity(
    config: RunConfig,
    reference: ModelAdapter,
    adapter: ModelAdapter,
    samples: list[Sample],
    folder: Path,
    kept: Path | None,
) -> dict[str, Any]:
    """SQNR, NLL and KL against the float model on held-out samples."""
    from masq.calibration.data import batches, limit_per_task
    from masq.evaluation.fidelity import fidelity

    samples = limit_per_task(samples, config.evaluation.fidelity_samples_per_task)
    groups = batches(samples, config.evaluation.batch_size)
    towers = config.towers.kind != "none"
    return fidelity(reference, adapter, groups, folder / "fidelity", keep=kept, towers=towers)


def _checked_model(config: RunConfig) -> str:
    """What tells these weights from others that go by the same name, after a look at files and sizes."""
    from masq.models.architecture import architecture
    from masq.models.fingerprint import fingerprint
    from masq.models.loading import source_folder

    folder = source_folder(config.model)
    if folder is not None:
        check_sizes(config, architecture(replace(config.model, source=str(folder))))
    return fingerprint(config.model, folder)


def _public_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as records hold it: of a file or folder its name, for where it lay is nobody's business.

    The data hashes in the provenance tell which data they were.
    """
    plain = to_dict(config)
    places = (("model", "source"), ("calibration", "source"), ("evaluation", "source"), ("evaluation", "records"))
    for group, key in (*places, ("output", "root")):
        if plain[group][key] is not None and Path(plain[group][key]).is_absolute():
            plain[group][key] = Path(plain[group][key]).name
    return plain


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _write_config(config: RunConfig, folder: Path) -> None:
    """The resolved configuration, from which ``masq run --config`` starts without Hydra."""
    import yaml

    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    atomic_write_bytes(folder / "config.yaml", text.encode())


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Append what masq logs to ``path`` while the context lasts."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("masq")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


@contextmanager
def _timed(record: RunRecord, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    _LOG.info("%s ...", stage)
    yield
    record.timings[stage] = time.perf_counter() - started
