"""Values from a file that may be damaged: taken only where they are of the type and in the range that is said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from masq.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping


def check_keys(content: Mapping[str, Any], keys: set[str], place: str) -> None:
    """Refuse keys that are missing or unknown."""
    for kind, names in (("lacks", keys - content.keys()), ("has an unknown", content.keys() - keys)):
        if names:
            raise error_of(f"{place} {kind} key", shown(sorted(names)[0]))


def object_of(content: Any, place: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(content, dict):
        raise error_of(f"{place} must be an object", type(content).__name__)
    return content


def list_of(content: Any) -> list[Any]:
    """A JSON list."""
    if not isinstance(content, list):
        raise error_of("a list is needed", type(content).__name__)
    return content


def text_of(content: Any, place: str) -> str:
    """A JSON string."""
    if not isinstance(content, str):
        raise error_of(f"{place} must be text", type(content).__name__)
    return content


def boolean_of(content: Any, place: str) -> bool:
    """True or false."""
    if type(content) is not bool:
        raise error_of(f"{place} must be true or false", type(content).__name__)
    return content


def integer_of(content: Any, place: str, low: int, high: int) -> int:
    """An integer in its range."""
    if type(content) is not int or not low <= content <= high:
        raise error_of(f"{place} must be an integer between {low} and {high}", shown(content))
    return content


def dtype_of(content: Any, place: str, known: Mapping[str, str]) -> str | None:
    """Name of a known dtype, or null."""
    if content is not None and content not in known:
        raise error_of(f"{place} must be one of {', '.join(known)}, or null", shown(content))
    return content


def shown(value: object) -> str:
    """A value from a file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def error_of(rule: str, value: object) -> ModelError:
    """What is wrong with a description."""
    return ModelError(rule, value=value, remedy="the checkpoint is damaged: copy it again, or export the run again")
