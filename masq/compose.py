"""Composing configurations with Hydra and launching sweeps through it. The only file that knows Hydra.

What leaves this file are typed ``RunConfig``s: Hydra composes YAML files and overrides, the dataclasses check them.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from masq.config import RunConfig, decode
from masq.errors import ConfigError, MasqError, suggestion
from masq.sweep import attempt, show_progress, write_outcome

_CONFIG_NAME = "run"
_SLOTS = ("rotation", "centring", "smoothing", "rounding", "compensation")
_OVERRIDE = re.compile(r"^(?P<prefix>\+{1,2}|~|)(?P<key>[^=]+)(?:=(?P<value>.*))?$", re.DOTALL)


def compose(overrides: Sequence[str]) -> RunConfig:
    """The typed configuration of one run.

    Args:
        overrides: ``KEY=VALUE``; a group takes one of its files, any other key a value.

    Raises:
        ConfigError: what is wrong, before anything heavy runs.
    """
    return _composed(overrides, several=False)[0]


def compose_cells(overrides: Sequence[str]) -> list[RunConfig]:
    """The typed configuration of every cell of a sweep; commas separate values.

    Raises:
        ConfigError: the first thing that is wrong, with the cell it is wrong in.
    """
    return _composed(overrides, several=True)


def _composed(overrides: Sequence[str], *, several: bool) -> list[RunConfig]:
    with _composer() as plain:
        passed = _for_hydra(overrides)
        cells = _cells(passed) if several else [passed]
        if not several:
            _refuse_sweeps(passed)
        configs = []
        for cell in cells:
            try:
                configs.append(decode(_named(plain(cell), cell)))
            except ConfigError as error:
                if len(cells) == 1:
                    raise
                rule = f"in {' '.join(_for_humans(cell))}: {error.rule}"
                raise ConfigError(rule, value=error.value, remedy=error.remedy) from None
        return configs


def launch(overrides: Sequence[str], root: str) -> Path:
    """Run every cell of a sweep through Hydra's launcher.

    Args:
        overrides: as for ``compose_cells``, which has accepted them.
        root: folder of the runs.

    Returns:
        The folder with the outcome of every cell (``masq.sweep.read_outcome``).
    """
    import hydra

    folder = Path(root).resolve() / ".sweeps" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    arguments = ["masq", "--multirun", *_for_hydra(overrides), f"hydra.sweep.dir='{folder}'"]
    main_function = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=_CONFIG_NAME)(_cell)
    before, sys.argv = sys.argv, arguments
    try:
        main_function()
    finally:
        sys.argv = before
    return folder


def _cell(composed: Any) -> None:
    """One cell of a sweep, possibly in a process of its own: its outcome goes to a file."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    show_progress()
    settings = HydraConfig.get()
    plain: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    config = decode(_named(plain, list(settings.overrides.task)))
    write_outcome(Path(settings.sweep.dir), int(settings.job.num), attempt(config))


def config_folder() -> Path:
    """``conf/`` beside the package in a checkout, inside it when installed.

    Raises:
        ConfigError: neither exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / f"{_CONFIG_NAME}.yaml").is_file():
            return folder
    raise ConfigError("masq's configuration files are missing", value=package / "conf", remedy="install masq again")


@contextlib.contextmanager
def _composer() -> Iterator[Callable[[Sequence[str]], dict[str, Any]]]:
    """Yield a function from Hydra overrides to a plain dictionary; Hydra's errors become ours."""
    try:
        from hydra import compose, initialize_config_dir
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ImportError as error:
        remedy = 'Run pip install "masq[cli]", or start from a resolved file: masq run --config FILE'
        raise ConfigError("composing a configuration needs Hydra", value=error, remedy=remedy) from error

    def plain(overrides: Sequence[str]) -> dict[str, Any]:
        composed = compose(_CONFIG_NAME, overrides=list(overrides))
        return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]

    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            yield plain
    except (HydraException, OmegaConfBaseException) as error:
        raise _translated(error) from error
    except ValueError as error:
        if isinstance(error, MasqError):
            raise
        # Hydra's own complaint about a group that was set to null.
        raise _translated(error) from error


def _translated(error: Exception) -> ConfigError:
    """One of Hydra's errors in our words."""
    missing, options = getattr(error, "missing_cfg_file", None), getattr(error, "options", None)
    if missing is not None:
        group, _, name = str(missing).rpartition("/")
        known = options or [path.stem for path in (config_folder() / group).glob("*.yaml")]
        return ConfigError(f"unknown {group or 'configuration file'}", value=name, remedy=suggestion(name, known))
    override = getattr(error, "override", None)
    text = " ".join(str(error).split("\n")[0].split())
    if override is not None:
        remedy = "Write KEY=VALUE; quote a value with special characters: 'KEY=\"VALUE\"'"
        return ConfigError("an override cannot be read", value=override.removeprefix("++"), remedy=remedy)
    return ConfigError("the configuration cannot be composed", value=text, remedy="see masq run --help")


def _for_hydra(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra wants them.

    A key that the YAML files leave at its default is not "in struct" for Hydra; whether it exists is decided by the
    dataclasses, which also know what it may have meant. So plain keys are passed as ``++key=value``.
    """
    return [_one_for_hydra(override) for override in overrides]


def _one_for_hydra(override: str) -> str:
    match = _OVERRIDE.match(override)
    if match is None or (match["value"] is None and match["prefix"] != "~"):
        raise ConfigError("an override must be KEY=VALUE", value=override, remedy="see masq run --help")
    key, value = match["key"], match["value"]
    if key in _SLOTS:
        raise ConfigError(f"{key} is a slot of the method", value=override, remedy=f"write method.{key}={value}")
    if match["prefix"] == "~" or key.startswith("hydra") or (config_folder() / key.split("@")[0]).is_dir():
        return override
    section, _, slot = key.partition(".")
    if section == "method" and slot in _SLOTS and not value.lstrip().startswith(("{", "null")):
        return f"{slot}@{key}={value}"
    return f"++{key}={value}"


def _named(plain: dict[str, Any], cell: Sequence[str]) -> dict[str, Any]:
    """The composed configuration, a changed method's name telling the change, unless the user gave it a name.

    Else two variants of one method would look alike in tables.
    """
    changes = [override for override in _for_humans(cell) if override.startswith("method.")]
    changed = [
        c.removeprefix("method.") for c in changes if c.partition("=")[0] not in ("method.name", "method.description")
    ]
    method = plain.get("method")
    if changed and isinstance(method, dict) and not any(c.startswith("method.name=") for c in changes):
        method["name"] = "+".join([str(method.get("name")), *changed])
    return plain


def _for_humans(cell: Sequence[str]) -> list[str]:
    return [override.removeprefix("++").rpartition("@")[2] for override in cell]


def _parsed(overrides: Sequence[str]) -> list[Any]:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(list(overrides))


def _refuse_sweeps(overrides: Sequence[str]) -> None:
    several = [item.input_line.removeprefix("++") for item in _parsed(overrides) if item.is_sweep_override()]
    if several:
        raise ConfigError("one run takes one value for each key", value=several[0], remedy="add -m to run each of them")


def _cells(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every cell of a sweep, in the order in which Hydra's own sweeper runs them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed = _parsed(overrides)
    if any(item.key_or_group == "hydra/sweeper" for item in parsed):
        # Another sweeper chooses its cells as it goes; what all cells share is still checked.
        return [[item.input_line for item in parsed if not item.is_sweep_override()]]
    return BasicSweeper.split_arguments(parsed, None)[0]
