"""Samples from Parquet files: drawn by seed and task, hashed by content, batched in a fixed way.

A file has the columns ``id``, ``task``, ``question``, ``answer`` (text), ``image`` and ``audio`` (encoded bytes or
null), and may have ``choices`` (a list of texts or null).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from masq.errors import DataError, suggestion
from masq.models.sample import Modality, Sample, combined_hash

if TYPE_CHECKING:
    import pyarrow

    from masq.calibration.config import Kind

TEXT_COLUMNS = ("id", "task", "question", "answer")
MEDIA_COLUMNS = ("image", "audio")
CHOICES = "choices"

# Decoding every image and waveform again for each cell of a sweep would cost seconds; keys hold no media.
_CONTENT_HASHES: dict[tuple[bytes, ...], dict[str, str]] = {}


def load_samples(
    source: Path | str,
    tasks: Sequence[str] | None = None,
    samples_per_task: int | None = None,
    seed: int = 0,
    modalities: Collection[str] = ("text", "vision", "audio"),
    *,
    total: int | None = None,
    mix: Mapping[Kind, float] | None = None,
) -> list[Sample]:
    """Read samples and draw a seeded choice of each task.

    The choice of one task depends on the seed and that task's name alone, and a larger choice holds every smaller one.
    Chosen samples keep the order of the file, tasks that of ``tasks`` (or of their first sample).

    Args:
        source: a Parquet file.
        tasks: the tasks to read, None for all that the modalities allow.
        samples_per_task: how many samples of each, None for all.
        seed: of the choice.
        modalities: active modalities; samples with another one are left out.
        total: how many samples of all tasks together, instead of ``samples_per_task``.
        mix: how ``total`` is shared out, see ``share_out``.

    Raises:
        DataError: a missing or damaged file, a missing or wrong column, an empty field, a repeated id, an unknown task
            or one without samples, fewer samples than asked for, a share for a kind of task that is not there.
    """
    path = Path(source)
    by_task: dict[str, list[Sample]] = {}
    for sample in _read(path):
        by_task.setdefault(sample.task, []).append(sample)
    unknown = next((task for task in tasks or () if task not in by_task), None)
    if unknown is not None:
        raise DataError(f"{path} must hold samples of every task", value=unknown, remedy=suggestion(unknown, by_task))
    fitting = {task: [s for s in by_task[task] if fits(s, modalities)] for task in tasks or by_task}
    if tasks is None:
        fitting = {task: samples for task, samples in fitting.items() if samples}
    if not fitting:
        raise DataError(
            f"{path} must hold samples of the active modalities",
            value=f"none of {len(by_task)} tasks has any with {', '.join(modalities)} only",
            remedy="choose another file or more modalities",
        )
    counts: Mapping[str, int | None] = dict.fromkeys(fitting, samples_per_task)
    if total is not None:
        counts = share_out(total, mix, {task: _kind(samples) for task, samples in fitting.items()})
    chosen = [_choose(path, task, samples, counts[task], seed) for task, samples in fitting.items()]
    return [sample for samples in chosen for sample in samples]


def share_out(total: int, mix: Mapping[Kind, float] | None, kinds: Mapping[str, Kind]) -> dict[str, int]:
    """How many samples each task gives, by largest remainders (of equal ones the first), so that they sum to ``total``.

    Args:
        total: samples in all.
        mix: shares of the kinds of tasks, each then shared out evenly among the tasks of its kind; None for all tasks
            alike.
        kinds: kind of each task.

    Raises:
        DataError: a kind has a share and no task.
    """
    if mix is None:
        return _apportioned(total, dict.fromkeys(kinds, 1.0))
    without = next((kind for kind, share in mix.items() if share and kind not in kinds.values()), None)
    if without is not None:
        raise DataError(
            "every kind of task with a share in the mix must have tasks",
            value=f"{without}; there are {', '.join(sorted(set(kinds.values())))}",
            remedy="take it out of calibration.mix, or choose tasks or modalities that have it",
        )
    counts = dict.fromkeys(kinds, 0)
    by_kind = _apportioned(total, {kind: mix.get(kind, 0.0) for kind in dict.fromkeys(kinds.values())})
    for kind, count in by_kind.items():
        counts |= _apportioned(count, {task: 1.0 for task, own in kinds.items() if own == kind})
    return counts


def _apportioned(total: int, shares: Mapping[Any, float]) -> dict[Any, int]:
    """Whole numbers in proportion to ``shares``, by largest remainders."""
    exact = {key: total * share / sum(shares.values()) for key, share in shares.items()}
    counts = {key: int(value) for key, value in exact.items()}
    by_remainder = sorted(exact, key=lambda key: counts[key] - exact[key])
    for key in by_remainder[: total - sum(counts.values())]:
        counts[key] += 1
    return counts


def _kind(samples: Sequence[Sample]) -> Kind:
    """Of a task: what its samples hold besides text."""
    held = {modality for sample in samples for modality in sample.modalities}
    if {Modality.VISION, Modality.AUDIO} <= held:
        return "joint"
    return "vision" if Modality.VISION in held else "audio" if Modality.AUDIO in held else "text"


def _choose(path: Path, task: str, samples: list[Sample], count: int | None, seed: int) -> list[Sample]:
    if not samples:
        raise DataError(
            f"task {task} must have samples of the active modalities",
            value=0,
            remedy="leave the task out, or choose more modalities",
        )
    if count is None:
        return samples
    if count > len(samples):
        raise DataError(
            f"{path} must hold samples_per_task samples of task {task}",
            value=f"{count} asked for, {len(samples)} available",
            remedy=f"ask for at most {len(samples)}, or for all with null",
        )
    key = hashlib.sha256(f"{seed}:{task}".encode()).digest()
    order = np.random.default_rng(int.from_bytes(key, "big")).permutation(len(samples))
    return [samples[index] for index in sorted(order[:count].tolist())]


def fits(sample: Sample, modalities: Collection[str]) -> bool:
    """Whether ``sample`` holds nothing but ``modalities`` (names as in the configuration; text is always active)."""
    return all(modality.name.lower() in modalities for modality in sample.modalities - {Modality.TEXT})


def batches(samples: Sequence[Sample], batch_size: int) -> list[list[Sample]]:
    """Cut samples into batches of one task each: a fixed function of their order, never of what is left to do.

    Args:
        samples: in any order; tasks follow in the order of their first sample.
        batch_size: the last batch of a task may be smaller.
    """
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    return [
        group[start : start + batch_size] for group in by_task.values() for start in range(0, len(group), batch_size)
    ]


def limit_per_task(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """The first ``count`` samples of each task (all if there are fewer, or for None), order kept."""
    seen: dict[str, int] = {}
    kept = []
    for sample in samples:
        seen[sample.task] = seen.get(sample.task, 0) + 1
        if count is None or seen[sample.task] <= count:
            kept.append(sample)
    return kept


def content_hashes(sample: Sample) -> dict[str, str]:
    """``Sample.content_hashes``, computed once per process for the same bytes and texts.

    Raises:
        DataError: the image or the audio cannot be decoded.
    """
    media = (b"-" if one is None else hashlib.sha256(one).digest() for one in (sample.image, sample.audio))
    texts = (sample.question, sample.answer, *sample.choices)
    key = (*media, *(text.encode() for text in texts))
    if key not in _CONTENT_HASHES:
        _CONTENT_HASHES[key] = sample.content_hashes()
    return _CONTENT_HASHES[key]


def dataset_hash(samples: Iterable[Sample]) -> str:
    """Hexadecimal SHA-256 of ids, tasks and contents, in order.

    Raises:
        DataError: an image or audio cannot be decoded.
    """
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.id}\0{sample.task}\0{combined_hash(content_hashes(sample))}\n".encode())
    return digest.hexdigest()


def check_disjoint(calibration: Iterable[Sample], evaluation: Iterable[Sample]) -> None:
    """Check that no evaluation sample is shown in calibration, whatever its id, container format or question.

    An image or a sound counts by itself: asking about it in other words does not make it unseen. Samples without
    media are compared by question and answer; a context counts by itself, whatever choices follow it.

    Raises:
        DataError: which ones are.
    """
    shown: dict[str, str] = {}
    for sample in calibration:
        for part in _guarded(sample):
            shown.setdefault(part, sample.id)
    overlap = [
        f"{sample.id} = {shown[part]}"
        for sample in evaluation
        if (part := next((one for one in _guarded(sample) if one in shown), None)) is not None
    ]
    if overlap:
        more = "" if len(overlap) <= 5 else f" and {len(overlap) - 5} more"
        raise DataError(
            "calibration and evaluation must not share samples",
            value=", ".join(overlap[:5]) + more,
            remedy="calibrate on another split",
        )


def _guarded(sample: Sample) -> list[str]:
    """Hashes that must not occur in another split: of media and contexts, or of the text where there are none."""
    hashes = dict(content_hashes(sample))
    text = hashes.pop("text")
    return list(hashes.values()) or [text]


def _read(path: Path) -> list[Sample]:
    columns = _read_columns(path)
    samples = [Sample(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise DataError(f"{path}: every id must occur once", value=sample.id, remedy="write the file again")
        seen.add(sample.id)
    return samples


def _read_columns(path: Path) -> dict[str, list[Any]]:
    from pyarrow import ArrowException, parquet

    names = [*TEXT_COLUMNS, *MEDIA_COLUMNS]
    if not path.is_file():
        value = "a folder" if path.exists() else "no such file"
        raise DataError(f"cannot read {path}", value=value, remedy="give the path of a Parquet file")
    try:
        # A file handle of its own: given a path, Arrow would look for a data set of several files around it.
        with path.open("rb") as file, parquet.ParquetFile(file) as opened:
            _require_columns(path, opened.schema_arrow)
            names += [CHOICES] if CHOICES in opened.schema_arrow.names else []
            table = opened.read(columns=names)
    except (ArrowException, OSError) as error:
        raise DataError(
            f"{path} must be a complete Parquet file",
            value=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy="copy or write the file again",
        ) from error
    columns = {name: table.column(name).to_pylist() for name in names}
    for name in TEXT_COLUMNS:
        if None in columns[name]:
            row = columns[name].index(None)
            raise DataError(
                f"{path}: column {name} must have no null", value=f"row {row}", remedy="write the file again"
            )
    if CHOICES in columns:
        columns[CHOICES] = _choices(path, columns[CHOICES])
    return columns


def _choices(path: Path, lists: Sequence[list[str | None] | None]) -> list[tuple[str, ...]]:
    """Choices by row, none where the column is null or empty."""
    row = next((row for row, choices in enumerate(lists) if None in (choices or ())), None)
    if row is not None:
        raise DataError(f"{path}: no choice may be null", value=f"row {row}", remedy="write the file again")
    return [tuple(choice for choice in choices or () if choice is not None) for choices in lists]


def _require_columns(path: Path, schema: pyarrow.Schema) -> None:
    """Check that every column is there, but for choices, and holds text, bytes or lists of texts."""
    required = (*TEXT_COLUMNS, *MEDIA_COLUMNS)
    for name in (*required, CHOICES):
        if name in schema.names:
            wanted, fitting = _column_type(name, schema.field(name).type)
            if not fitting:
                raise DataError(
                    f"{path}: column {name} must be {wanted}",
                    value=schema.field(name).type,
                    remedy="write the file again",
                )
        elif name in required:
            raise DataError(
                f"{path} must have the column {name}",
                value=f"columns {', '.join(schema.names)}",
                remedy=f"write it with {', '.join(required)}",
            )


def _column_type(name: str, kind: pyarrow.DataType) -> tuple[str, bool]:
    """What the column ``name`` must hold, and whether ``kind`` is that. A column that may be null may be all null."""
    from pyarrow import types

    def is_text(kind: pyarrow.DataType) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    if name in TEXT_COLUMNS:
        return "string", is_text(kind)
    if name in MEDIA_COLUMNS:
        return "binary", types.is_binary(kind) or types.is_large_binary(kind) or types.is_null(kind)
    is_list = types.is_list(kind) or types.is_large_list(kind)
    return "a list of strings", types.is_null(kind) or (is_list and is_text(kind.value_type))
