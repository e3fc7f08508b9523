"""Errors a user can act on: each states the rule, the value that broke it, and the remedy."""

from __future__ import annotations

import difflib
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class MasqError(ValueError):
    """A rule of masq was broken by its user or by the data, not by a defect of masq.

    Args:
        rule: what must hold, as a clause without a final stop.
        value: what was found; None when there is nothing to show.
        remedy: what to do about it.
    """

    def __init__(self, rule: str, *, value: object = None, remedy: str = "") -> None:
        self.rule = rule
        self.value = value
        self.remedy = remedy
        shown = "" if value is None else f" (got: {value})"
        super().__init__(f"{rule}{shown}" + (f". {remedy[0].upper()}{remedy[1:]}" if remedy else ""))

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild from the three parts when an error crosses a process boundary."""
        return (_rebuild, (type(self), self.rule, self.value, self.remedy))


def _rebuild(kind: type[MasqError], rule: str, value: object, remedy: str) -> MasqError:
    return kind(rule, value=value, remedy=remedy)


class ConfigError(MasqError):
    """A configuration that cannot be run."""


class ModelError(MasqError):
    """A model that cannot be loaded or is used against its contract."""


class DataError(MasqError):
    """Data or a file of a run that is missing, truncated or wrong."""


class OutputError(MasqError):
    """An output folder or file that cannot be written."""


class BusyError(MasqError):
    """A run that another process is working on."""


class ShortOfMemoryError(MasqError):
    """A step that did not fit into the memory of the machine or of its accelerator."""


class NumericalError(MasqError):
    """A computation that left the finite numbers or diverged."""


@contextmanager
def numerical_errors_of(place: str) -> Iterator[None]:
    """Have every ``NumericalError`` raised inside name ``place`` (a block, a linear) in its rule."""
    try:
        yield
    except NumericalError as error:
        if place in error.rule:
            raise
        raise NumericalError(f"{place}: {error.rule}", value=error.value, remedy=error.remedy) from error


@contextmanager
def memory_errors_of(place: str) -> Iterator[None]:
    """Have a failed allocation inside become a ``ShortOfMemoryError`` that names ``place`` (a block).

    Torch's allocator of the CPU raises a plain ``RuntimeError``, known by its words, that of an accelerator a class of
    its own, known by its name: nothing is imported for it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError")
        if not known and "allocate memory" not in str(error):
            raise
        said = (str(error).strip().splitlines() or ["no memory left"])[0]
        raise ShortOfMemoryError(
            f"{place} and what is computed for it must fit into memory",
            value=said,
            remedy="set model.weights=streamed, lower calibration.batch_size, or take a larger machine, and run again: "
            "finished blocks are kept",
        ) from error


@contextmanager
def errors_of(place: str) -> Iterator[None]:
    """Have numerical errors and failed allocations inside name ``place``."""
    with numerical_errors_of(place), memory_errors_of(place):
        yield


def near_matches(name: str, options: Iterable[str], n: int = 3) -> list[str]:
    """Up to ``n`` of ``options`` that look like ``name``, best first; case is ignored."""
    by_lower = {option.lower(): option for option in options}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), list(by_lower), n=n, cutoff=0.6)]


def suggestion(name: str, options: Iterable[str]) -> str:
    """A remedy sentence for an unknown name: near matches when there are any, else every option."""
    listed = sorted(options)
    near = near_matches(name, listed)
    if near:
        *others, last = near
        return f"Did you mean {', '.join(others)} or {last}?" if others else f"Did you mean {last}?"
    return f"Known: {', '.join(listed) or 'none'}"


def unknown_name(kind: str, name: str, options: Iterable[str]) -> ConfigError:
    """The error for a name that is not among ``options``.

    Args:
        kind: what the name stands for, for example "method".
        name: the name that was asked for.
        options: the names that exist.

    Returns:
        An error to raise; it lists near matches, or all options when none is near.
    """
    return ConfigError(f"unknown {kind}", value=name, remedy=suggestion(name, options))
