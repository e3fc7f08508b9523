"""Who worked on a folder: a result that was resumed, or built on shared artifacts, tells every program that made it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from masq.files import atomic_write_json, read_json

if TYPE_CHECKING:
    from pathlib import Path

_FILE = "sessions.json"
_KEPT = ("masq", "commit", "dirty", "libraries", "python", "device", "device_name", "threads", "started")
# What may change a result: not when it was computed.
_COMPARED = ("masq", "commit", "dirty", "libraries", "python", "device_name", "threads")


def sessions(folder: Path) -> list[dict[str, Any]]:
    """The sessions noted in ``folder``, oldest first.

    Raises:
        DataError: the list is damaged.
    """
    return read_json(folder / _FILE) if (folder / _FILE).exists() else []


def add_session(folder: Path, provenance: dict[str, Any]) -> None:
    """Note that the program described by ``provenance`` works on ``folder`` from now on."""
    session = {key: provenance[key] for key in _KEPT}
    atomic_write_json(folder / _FILE, [*sessions(folder), session])


def differences(earlier: list[dict[str, Any]], provenance: dict[str, Any], what: str) -> list[str]:
    """One warning for each thing that may change results and that was different in an earlier session.

    Args:
        earlier: sessions of other processes.
        provenance: of this one.
        what: what they made, for example "blocks".
    """
    found: dict[str, None] = {}
    for session in earlier:
        for key in _COMPARED:
            if session[key] != provenance[key]:
                old, new = _shown(key, session, provenance)
                found[f"{what} were made in part with {key} {old}, the rest with {new}"] = None
    return list(found)


def _shown(key: str, session: dict[str, Any], provenance: dict[str, Any]) -> tuple[str, str]:
    old, new = session[key], provenance[key]
    if key != "libraries":
        return str(old), str(new)
    changed = [name for name in new if old.get(name) != new[name]]
    return tuple(", ".join(f"{name} {versions.get(name)}" for name in changed) for versions in (old, new))  # type: ignore[return-value]
