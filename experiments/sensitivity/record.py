"""The record of sensitivity profiles: what it is about, the profiles so far, where they come from.

JSON: ``model``, ``dtype``, ``modality``, ``scheme`` (formats), ``batch_size`` and ``data`` (hashes of samples and float
weights) say what it is about; ``samples`` counts them; ``nll_float`` and ``counts`` (of samples, answer tokens, tokens)
belong to all profiles; ``profiles`` is a list (see ``experiments.sensitivity.measure``); ``warnings``; ``provenance``,
whose ``finished`` is null while profiles are missing, and whose ``earlier_sessions`` lists who made some of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from masq.decoding import to_plain
from masq.errors import DataError
from masq.files import read_json
from masq.report.provenance import provenance, utc_now
from masq.report.sessions import differences

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from masq.config import RunConfig
    from masq.models.base import Sample

_SUBJECT = ("model", "dtype", "modality", "scheme", "batch_size", "data")
_NOT_OF_A_SESSION = ("data", "finished", "earlier_sessions")


def begin(config: RunConfig, samples: Sequence[Sample], hashes: Mapping[str, str]) -> dict[str, Any]:
    """A record without profiles.

    Args:
        config: model, modality set, scheme, batch size, seed.
        samples: what is measured on.
        hashes: of the samples, and of the float weights.
    """
    return {
        "model": config.model.name,
        "dtype": config.model.dtype,
        "modality": config.modality.name,
        "scheme": to_plain(config.scheme),
        "batch_size": config.evaluation.batch_size,
        "data": dict(hashes),
        "samples": len(samples),
        "nll_float": {},
        "counts": {},
        "profiles": [],
        "warnings": [],
        "provenance": {**provenance(config.seed, hashes, device=config.model.device), "earlier_sessions": []},
    }


def resume(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The record in ``path`` to go on with, or ``fresh`` where there is none.

    Raises:
        DataError: the file is something else, or about another model, data or scheme.
    """
    if not path.exists():
        return fresh
    found = read_profiles(path)
    other = [key for key in _SUBJECT if found.get(key) != fresh[key]]
    if other:
        raise DataError(
            f"{path.name} must be about the same model, data and scheme to go on with it",
            value=f"another {', another '.join(_described(key, found, fresh) for key in other)}",
            remedy="name another --output, or remove the file",
        )
    made_by = found["provenance"]
    if made_by["finished"] is not None:
        return found
    last = {key: value for key, value in made_by.items() if key not in _NOT_OF_A_SESSION}
    fresh["provenance"]["earlier_sessions"] = [*made_by["earlier_sessions"], last]
    kept = {key: found[key] for key in ("nll_float", "counts", "profiles")}
    warnings = differences(fresh["provenance"]["earlier_sessions"], fresh["provenance"], "profiles")
    return {**fresh, **kept, "warnings": warnings}


def finish(record: dict[str, Any]) -> None:
    """Note that no profile is missing any longer."""
    record["provenance"]["finished"] = utc_now()


def read_profiles(path: Path) -> dict[str, Any]:
    """The record in ``path``, finished or not.

    Raises:
        DataError: the file cannot be read, or is not such a record.
    """
    found = read_json(path)
    if not isinstance(found, dict) or not {"profiles", "provenance", *_SUBJECT} <= found.keys():
        raise DataError(
            f"{path.name} must be a record of sensitivity profiles",
            value="other JSON",
            remedy="name a file that experiments.sensitivity.measure wrote",
        )
    return found


def _described(key: str, found: dict[str, Any], fresh: dict[str, Any]) -> str:
    old, new = found[key], fresh[key]
    if key == "data":
        return "hash of " + " and ".join(name for name in new if old.get(name) != new[name])
    if key == "scheme":
        old, new = old["name"], new["name"]
    if old == new:
        return f"{key} under the name {new}"
    return f"{key} ({old}, not {new})"
