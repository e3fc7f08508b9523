"""The samples of a run: calibration and evaluation, kept apart by content."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from masq.config import RunConfig, active_modalities
from masq.errors import ConfigError, DataError
from masq.models.zoo import SPLITS, is_trained

if TYPE_CHECKING:
    from masq.models.base import Sample


def load_data(config: RunConfig) -> tuple[dict[str, list[Sample]], dict[str, str], list[str]]:
    """Everything a run looks at but its weights, checked before anything long begins.

    Args:
        config: of the run.

    Returns:
        Samples of the active modalities by split (``calibration`` where the method calibrates; ``evaluation``, empty
        where benchmarks bring their own and there are none to compare with the float model on), content hashes by
        split, and a warning for everything that calibration shares with evaluation.

    Raises:
        ConfigError: a task or benchmark that cannot be scored here, or a model without data of its own.
        DataError: unreadable data, or, unless ``evaluation.allow_overlap`` is on, shared content.
    """
    from masq.calibration.data import check_disjoint, content_hashes, dataset_hash, load_samples
    from masq.evaluation.suite import prepare_benchmarks, records_hash
    from masq.evaluation.tasks import check_tasks

    active = active_modalities(config)
    calibration, evaluation = config.calibration, config.evaluation
    data: dict[str, list[Sample]] = {"evaluation": []}
    # Benchmarks bring their own data; samples to compare with the float model on are welcome, but need not be there.
    if not evaluation.benchmarks or evaluation.source != "auto" or is_trained(config.model.source):
        source = _source(config, "evaluation")
        data["evaluation"] = load_samples(source, evaluation.tasks, evaluation.samples_per_task, 0, active)
    check_tasks(data["evaluation"])
    warnings = []
    if not config.method.is_float:
        data["calibration"] = load_samples(
            _source(config, "calibration"),
            calibration.tasks,
            calibration.samples_per_task,
            calibration.seed,
            active,
            total=calibration.samples,
            mix=calibration.mix,
        )
        try:
            check_disjoint(data["calibration"], data["evaluation"])
        except DataError as error:
            if not evaluation.allow_overlap:
                raise
            warnings.append(f"contaminated: calibration and evaluation share samples ({error.value})")
    hashes = {split: dataset_hash(samples) for split, samples in data.items()}
    if evaluation.benchmarks:
        shown = {part for sample in data.get("calibration", ()) for part in content_hashes(sample).values()}
        warnings += prepare_benchmarks(evaluation, active, shown)
        hashes["benchmarks"] = records_hash(evaluation)
    return data, hashes, warnings


def _source(config: RunConfig, split: str) -> Path:
    """The Parquet file to calibrate on or to evaluate on: a given one, or a split of the embedded data."""
    from masq.models.zoo.smol_omni import data_path

    source = config.calibration.source if split == "calibration" else config.evaluation.source
    if split == "calibration" and source in SPLITS and is_trained(config.model.source):
        return data_path(source)
    if source != "auto":
        return Path(source)
    if not is_trained(config.model.source):
        raise ConfigError(
            f"{config.model.name} comes without {split} data",
            value=f"{split}.source=auto",
            remedy=f"set {split}.source to a Parquet file with the columns id, task, question, answer, image, audio "
            "and, where a task chooses, choices",
        )
    return data_path(config.evaluation.split if split == "evaluation" else split)
