"""A table of named plug-ins. Registration is explicit: one line in the room that owns the table."""

from __future__ import annotations

import importlib
from typing import Generic, TypeVar, cast

from masq.errors import unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to objects; an object may be given as "package.module:attribute" and is then imported on first use.

    Args:
        kind: what is registered, for messages, for example "model family".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._targets: dict[str, T | str] = {}

    def register(self, name: str, target: T | str) -> None:
        """Add ``target`` under ``name``.

        Raises:
            KeyError: the name is taken; this is a defect of the program, not of its user.
        """
        if name in self._targets:
            raise KeyError(f"{self.kind} {name!r} is registered twice")
        self._targets[name] = target

    def get(self, name: str) -> T:
        """The object called ``name``, imported if need be.

        Raises:
            ConfigError: no such name; near matches are listed.
        """
        if name not in self._targets:
            raise unknown_name(self.kind, name, self._targets)
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = cast("T", getattr(importlib.import_module(module), attribute))
            self._targets[name] = target
        return target

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._targets)

    def __contains__(self, name: object) -> bool:
        """Whether ``name`` is registered."""
        return name in self._targets
