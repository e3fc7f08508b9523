"""An experiment: the cells of a table, at the size of its paper or of the embedded models.

``conf/experiment/<name>.yaml`` holds

- ``about``: one line,
- ``paper``: the table of ``results/paper`` that its cells are compared with, if any,
- ``full`` and ``smol``: the sizes it can be run at, each with ``sweeps`` (the overrides of one ``masq run -m`` each, in
  one line) or ``shows`` (other experiments whose cells it shows), and ``columns`` of its table (all by default).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from masq.config import RunConfig
from masq.errors import ConfigError, unknown_name

SCALES = ("full", "smol")
"""The size of the paper, and the embedded models."""
_KEYS = {"about", "paper", *SCALES}
_SCALE_KEYS = {"sweeps", "shows", "columns"}


@dataclass(frozen=True)
class Experiment:
    """An experiment at one size.

    Attributes:
        name: of its file.
        scale: one of ``SCALES``.
        about: one line.
        sweeps: overrides of a sweep each.
        shows: experiments of the same size whose cells it shows before its own.
        columns: keys or prefixes of columns, None for all.
        paper: name of a table that a paper reports, None without.
    """

    name: str
    scale: str
    about: str
    sweeps: tuple[tuple[str, ...], ...]
    shows: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None
    paper: str | None = None

    @property
    def title(self) -> str:
        """Name and size as files are called: ``table1``, ``table1-smol``; a thing of one size has its name alone."""
        return self.name if len(scales(self.name)) == 1 else f"{self.name}-{self.scale}"


def names() -> list[str]:
    """All experiments."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def scales(name: str) -> tuple[str, ...]:
    """The sizes an experiment can be run at.

    Raises:
        ConfigError: no such experiment; near matches are listed.
    """
    content = _content(name)
    return tuple(scale for scale in SCALES if scale in content)


def experiment(name: str, scale: str | None = None) -> Experiment:
    """One experiment.

    Args:
        name: of its file.
        scale: one of its sizes; None for the first it has, in the order of ``SCALES``.

    Raises:
        ConfigError: no such experiment or size, or its file is wrong.
    """
    content = _content(name)
    there = scales(name)
    chosen = there[0] if scale is None else scale
    if chosen not in there:
        raise unknown_name(f"scale of experiment {name}", chosen, there)
    part = content[chosen]
    _check_keys(f"{name}.{chosen}", part, _SCALE_KEYS)
    columns = part.get("columns")
    return Experiment(
        name=name,
        scale=chosen,
        about=content["about"],
        sweeps=tuple(tuple(shlex.split(sweep)) for sweep in part.get("sweeps", ())),
        shows=tuple(part.get("shows", ())),
        columns=None if columns is None else tuple(columns),
        paper=content.get("paper"),
    )


def changed(found: Experiment, overrides: Sequence[str]) -> Experiment:
    """An experiment whose sweeps, with those of the experiments that it shows, take overrides in place of their own."""
    shown = [sweep for name in found.shows for sweep in experiment(name, found.scale).sweeps]
    sweeps = tuple(tuple(_replaced(sweep, overrides)) for sweep in (*shown, *found.sweeps))
    return replace(found, sweeps=sweeps, shows=())


def cells_of_sweeps(found: Experiment) -> tuple[tuple[RunConfig, ...], ...]:
    """The cells of every sweep, those of the experiments it shows first.

    Raises:
        ConfigError: a sweep cannot be composed.
    """
    return tuple(_cells_of(sweep) for sweep in changed(found, ()).sweeps)


@cache
def _cells_of(sweep: tuple[str, ...]) -> tuple[RunConfig, ...]:
    """Composed once, however many experiments show them: a cell takes a tenth of a second."""
    from masq.compose import compose_cells

    return tuple(compose_cells(sweep))


def cells(found: Experiment) -> list[RunConfig]:
    """All cells of an experiment's table, in order.

    Raises:
        ConfigError: a sweep cannot be composed.
    """
    return [config for sweep in cells_of_sweeps(found) for config in sweep]


def split(overrides: Sequence[str]) -> tuple[str | None, str | None, list[str]]:
    """Take ``experiment=`` and ``scale=`` out of overrides.

    Returns:
        Name of the experiment, size, and the other overrides.

    Raises:
        ConfigError: ``scale`` without an experiment, or one of them twice.
    """
    found: dict[str, str] = {}
    rest = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in ("experiment", "scale"):
            rest.append(override)
        elif key in found:
            raise ConfigError(f"{key} is given twice", value=override, remedy="leave one of them out")
        else:
            found[key] = value
    if "scale" in found and "experiment" not in found:
        raise ConfigError(
            "scale is a size of an experiment", value=f"scale={found['scale']}", remedy="add experiment=NAME"
        )
    return found.get("experiment"), found.get("scale"), rest


def _replaced(sweep: Sequence[str], more: Sequence[str]) -> list[str]:
    """The overrides of a sweep with others in place of those for the same key, or behind them."""
    keys = {override_key(override) for override in more}
    return [one for one in sweep if override_key(one) not in keys] + list(more)


def override_key(override: str) -> str:
    """What an override is for."""
    return override.partition("=")[0].lstrip("+~")


@cache
def _content(name: str) -> Mapping[str, Any]:
    path = _folder() / f"{name}.yaml"
    if not path.is_file():
        raise unknown_name("experiment", name, names())
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check_keys(name, content, _KEYS)
    if "about" not in content or not any(scale in content for scale in SCALES):
        raise ConfigError(f"experiment {name} must have about, and at least one of {', '.join(SCALES)}")
    return content


def _check_keys(place: str, content: Any, known: set[str]) -> None:
    if not isinstance(content, dict):
        raise ConfigError(f"experiment {place} must be a mapping", value=type(content).__name__)
    for key in content:
        if key not in known:
            raise unknown_name(f"key of experiment {place}", str(key), known)


def _folder() -> Path:
    from masq.compose import config_folder

    return config_folder() / "experiment"
