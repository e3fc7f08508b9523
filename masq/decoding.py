"""From plain dictionaries, as YAML gives them, to typed frozen dataclasses, and back.

Every value is checked against its annotation: a dataclass by itself checks neither ``Literal`` nor ``float``. Unions of
dataclasses are told apart by their field ``kind``. Errors carry the dotted path of the value they are about.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, cast

from masq.errors import ConfigError, near_matches, suggestion

T = TypeVar("T")


def decode_dataclass(kind: type[T], plain: object, path: str = "") -> T:
    """Build ``kind`` from a mapping of its fields.

    Args:
        kind: a dataclass.
        plain: mapping of field names to plain values.
        path: dotted path of ``plain`` in the whole configuration, for messages.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type or out of range.
    """
    if not isinstance(plain, Mapping):
        raise _wrong(path, "a group of keys", plain)
    hints = _hints(kind)
    for key in plain:
        if key not in hints:
            raise _unknown_key(path, str(key), hints)
    for field in dataclasses.fields(cast("Any", kind)):
        if field.name not in plain and _is_required(field):
            raise ConfigError(f"{_join(path, field.name)} must be given", remedy="add it to the configuration")
    values = {key: decode_value(hints[key], value, _join(path, key)) for key, value in plain.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        where = f"{path}: " if path else ""
        raise ConfigError(f"{where}{error.rule}", value=error.value, remedy=error.remedy) from None


def decode_value(hint: Any, plain: object, path: str) -> Any:
    """Check ``plain`` against the annotation ``hint`` and convert it.

    Raises:
        ConfigError: the value does not fit.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(hint), plain, path)
    if origin is Literal:
        return _decode_literal(typing.get_args(hint), plain, path)
    if origin is tuple:
        return _decode_tuple(typing.get_args(hint)[0], plain, path)
    if origin is Mapping:
        return _decode_mapping(typing.get_args(hint), plain, path)
    if dataclasses.is_dataclass(hint):
        return decode_dataclass(cast("type", hint), plain, path)
    return _decode_scalar(hint, plain, path)


def to_plain(value: Any) -> Any:
    """The inverse of decoding: dataclasses and mappings become dictionaries, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def _decode_union(options: tuple[Any, ...], plain: object, path: str) -> Any:
    if type(None) in options:
        if plain is None:
            return None
        options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return decode_value(options[0], plain, path)
    kinds = {typing.get_args(_hints(option)["kind"])[0]: option for option in options}
    if not isinstance(plain, Mapping) or "kind" not in plain:
        raise _wrong(path, f"a group of keys with a kind, one of {', '.join(kinds)}", plain)
    kind = _decode_literal(tuple(kinds), plain["kind"], _join(path, "kind"))
    return decode_dataclass(kinds[kind], plain, path)


def _decode_literal(options: tuple[Any, ...], plain: object, path: str) -> Any:
    # True == 1, so equality alone would let a boolean through where an integer is listed.
    if any(plain == option and type(plain) is type(option) for option in options):
        return plain
    names = [str(option) for option in options]
    raise ConfigError(f"{path} has an unknown value", value=plain, remedy=suggestion(str(plain), names))


def _decode_tuple(hint: Any, plain: object, path: str) -> tuple[Any, ...]:
    if not isinstance(plain, list | tuple):
        raise _wrong(path, "a list", plain)
    return tuple(decode_value(hint, item, f"{path}[{index}]") for index, item in enumerate(plain))


def _decode_mapping(hints: tuple[Any, ...], plain: object, path: str) -> dict[Any, Any]:
    if not isinstance(plain, Mapping):
        raise _wrong(path, "a group of keys", plain)
    return {
        decode_value(hints[0], key, f"a key of {path}"): decode_value(hints[1], value, _join(path, key))
        for key, value in plain.items()
    }


def _decode_scalar(hint: Any, plain: object, path: str) -> Any:
    if hint is float:
        if isinstance(plain, bool) or not isinstance(plain, int | float) or not math.isfinite(plain):
            raise _wrong(path, "a finite number (YAML wants 1.0e-4, not 1e-4)", plain)
        return float(plain)
    if not isinstance(plain, hint) or (hint is int and isinstance(plain, bool)):
        names = {int: "a whole number", str: "text", bool: "true or false"}
        raise _wrong(path, names.get(hint, str(hint)), plain)
    return plain


def _wrong(path: str, expected: str, plain: object) -> ConfigError:
    return ConfigError(f"{path or 'the configuration'} must be {expected}", value=f"{plain!r}")


def _unknown_key(path: str, key: str, known: Mapping[str, Any]) -> ConfigError:
    # Matched without the path: sharing a long one would make every key a near match.
    near = near_matches(key, known)
    remedy = suggestion("", [_join(path, name) for name in known])
    if near:
        remedy = f"Did you mean {' or '.join(_join(path, name) for name in near)}?"
    return ConfigError("unknown configuration key", value=_join(path, key), remedy=remedy)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Resolved annotations of the fields, in order."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(cast("Any", kind))}
