"""The record of one run: what was run, on what, and what came out.

``record.json`` is one JSON object whose keys are the fields of `RunRecord`, documented there. It holds no user name,
no host name and no folder of the machine it was made on. JSON has no NaN and no infinities: in the measured sections
they are written as the strings "nan", "inf" and "-inf", and read back as numbers.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from masq.errors import DataError
from masq.files import atomic_write_json, read_json
from masq.report.provenance import utc_now

SCHEMA_VERSION = 1
STATUSES = ("running", "finished", "failed")

_MEASURED = ("scores", "health", "fidelity", "effective_bits", "timings", "blocks")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Records written before these fields came lack them, and are read as if they were empty.
_ADDED_SINCE = frozenset({"outcomes"})
_SCORE_KEYS = {"value", "n", "standard_error", "higher_is_better"}
# What two runs with the same result may differ in: when, how fast and with how much memory.
_VOLATILE_FIELDS = ("timings", "peak_memory_bytes")
_VOLATILE_KEYS = frozenset({"started", "finished", "seconds", "memory_bytes", "peak_memory_bytes", "earlier_sessions"})


class ScoreEntry(TypedDict):
    """One score, of ``n`` samples. ``standard_error`` is null where none is defined (one sample).

    Besides these a record holds ``metric``, its name, and ``valid``, false if too many answers failed.
    """

    value: float
    n: int
    standard_error: float | None
    higher_is_better: bool


@dataclass
class RunRecord:
    """One run; also the schema of ``record.json``, version 1.

    Attributes:
        identity: SHA-256 of the resolved configuration, the data and the weights; equal identities mean the same
            experiment.
        config: the resolved configuration; ``config["method"]["name"]`` and ``config["scheme"]["name"]`` name the cell.
        provenance: where the numbers come from, see `masq.report.provenance`; ``earlier_sessions`` lists the programs
            that worked on the run before it was resumed.
        status: ``finished`` or ``failed`` (``running`` only in memory, before the end is known).
        scores: task -> metric -> `ScoreEntry`.
        health: task -> counts of answers that are ``empty``, ``truncated``, ``repeating`` or any of it (``failed``),
            and ``n``.
        fidelity: what needs no labels: ``sqnr`` (text, vision, audio; dB against the float model, capped at 200),
            ``kl`` and ``nll`` (nats per answer token, by the non-text modality of the sample: text, vision, audio,
            joint), ``sqnr_towers`` of quantized towers, and details.
        effective_bits: stored bits per weight of the decoder linears: ``total`` and its parts ``codes``, ``scales``,
            ``smoothing`` and ``adapters``; ``towers``, total of the tower linears, where those are quantized.
        timings: seconds by stage.
        peak_memory_bytes: largest resident memory (and, on a GPU, the largest allocation) of the process.
        warnings: typed fallbacks, one sentence each; tables show them.
        blocks: per decoder block: ``index``, SQNR on calibration tokens of one batch per mix of modalities, losses,
            captured error, what a rounding stage gained or could not do (``rounding``, by linear), and what a search of
            smoothing found (``search``, by group: exponent, error relative to none) and weighted by (``sensitivity``).
        failure: null, or ``kind`` and ``message`` of the error that ended the run.
        outcomes: task -> metric -> what it made of every sample, see `masq.evaluation.outcomes`; what `masq compare`
            reads. Empty in records of earlier releases.
        schema_version: version of this schema.
    """

    identity: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    status: str = "running"
    scores: dict[str, dict[str, ScoreEntry]] = field(default_factory=dict)
    health: dict[str, dict[str, Any]] = field(default_factory=dict)
    fidelity: dict[str, Any] = field(default_factory=dict)
    effective_bits: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    failure: dict[str, str] | None = None
    outcomes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def start(cls, identity: str, config: dict[str, Any], provenance: dict[str, Any]) -> RunRecord:
        """An empty record of a run that begins now."""
        return cls(identity=identity, config=config, provenance=provenance)

    @property
    def method(self) -> str:
        """Name of the method, "?" when the configuration has none."""
        return str(self.config.get("method", {}).get("name", "?"))

    @property
    def scheme(self) -> str:
        """Name of the scheme, "?" when the configuration has none."""
        return str(self.config.get("scheme", {}).get("name", "?"))

    def finish(self) -> None:
        """Mark the run as finished now."""
        self.status, self.failure = "finished", None
        self.provenance["finished"] = utc_now()

    def fail(self, error: BaseException) -> None:
        """Mark the run as failed; what was measured so far stays."""
        self.status = "failed"
        self.provenance["finished"] = utc_now()
        self.failure = {"kind": type(error).__name__, "message": _without_folders(str(error))}

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, keys in the order of the schema with ``schema_version`` first."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        encoded = {name: _encode(value) if name in _MEASURED else value for name, value in values.items()}
        return {"schema_version": encoded.pop("schema_version"), **encoded}


def write_record(record: RunRecord, path: Path | str) -> None:
    """Write ``record`` as JSON, atomically.

    Raises:
        OutputError: the file cannot be written.
        DataError: the record breaks its own schema.
    """
    content = record.to_dict()
    _validate(content, str(path))
    atomic_write_json(path, content)


def read_record(path: Path | str) -> RunRecord:
    """Read a record and check it against the schema.

    Args:
        path: a ``record.json``, or the folder of a run.

    Raises:
        DataError: the file is missing, truncated, or not a record of a version this release knows.
    """
    source = Path(path)
    if source.is_dir():
        source = source / "record.json"
    content = read_json(source)
    _validate(content, str(source))
    return RunRecord(**{name: _decode(value) if name in _MEASURED else value for name, value in content.items()})


def comparable(record: RunRecord) -> dict[str, Any]:
    """The part of a record that is identical whether or not the run was interrupted and resumed.

    Everything but clock times, durations and memory.
    """
    content = record.to_dict()
    return {name: _without_volatile(value) for name, value in content.items() if name not in _VOLATILE_FIELDS}


def _validate(content: object, source: str) -> None:
    """Check keys and types of the JSON object ``content``; ``source`` names it in the error."""
    if not isinstance(content, dict) or "schema_version" not in content:
        raise DataError(f"{source} is not a masq record", remedy="give record.json files or the folders of runs")
    version = content["schema_version"]
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{source} must have record schema version {SCHEMA_VERSION}",
            value=version,
            remedy="run the cell again with this version of masq",
        )
    known = {item.name for item in dataclasses.fields(RunRecord)}
    if not known - _ADDED_SINCE <= set(content) <= known:
        different = ", ".join(sorted((set(content) ^ known) - (_ADDED_SINCE - set(content))))
        raise DataError(f"{source} must have exactly the keys of a record", value=f"missing or unknown: {different}")
    for item in dataclasses.fields(RunRecord):
        if item.name in content:
            _validate_type(item.name, str(item.type), content[item.name], source)
    if content["status"] not in STATUSES:
        raise DataError(f"{source}: status must be one of {', '.join(STATUSES)}", value=content["status"])
    _validate_scores(content["scores"], source)
    _validate_outcomes(content.get("outcomes", {}), source)


def _validate_type(name: str, annotation: str, value: object, source: str) -> None:
    if annotation.endswith("| None") and value is None:
        return
    kinds: dict[str, type] = {"str": str, "int": int, "dict": dict, "list": list}
    wanted = kinds[annotation.split("[")[0]]
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise DataError(f"{source}: {name} must be {wanted.__name__}", value=type(value).__name__)


def _validate_scores(scores: dict[str, Any], source: str) -> None:
    for task, metrics in scores.items():
        if not isinstance(metrics, dict):
            raise DataError(f"{source}: scores.{task} must map metrics to scores", value=type(metrics).__name__)
        for metric, score in metrics.items():
            missing = _SCORE_KEYS - set(score if isinstance(score, dict) else ())
            if missing:
                raise DataError(
                    f"{source}: scores.{task}.{metric} must hold {', '.join(sorted(_SCORE_KEYS))}",
                    value=f"missing {', '.join(sorted(missing))}",
                )


def _validate_outcomes(outcomes: dict[str, Any], source: str) -> None:
    """Only that they go by task and metric: what they hold is checked where they are used."""
    for task, metrics in outcomes.items():
        if not isinstance(metrics, dict):
            raise DataError(f"{source}: outcomes.{task} must map metrics to outcomes", value=type(metrics).__name__)


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        kept = cast("dict[str, Any]", value)
        return {key: _without_volatile(item) for key, item in kept.items() if key not in _VOLATILE_KEYS}
    if isinstance(value, list):
        return [_without_volatile(item) for item in value]
    return value


def _without_folders(text: str) -> str:
    """Shorten the working folder and the home folder: where a run lived is nobody's business."""
    for folder, short in ((Path.cwd(), "."), (Path.home(), "~")):
        if folder != folder.parent:
            text = text.replace(str(folder), short)
    return text
