"""The command line: ``masq run|table|plan|doctor``. The only file that knows Hydra.

Hydra composes YAML files and overrides; what leaves this file is a typed ``RunConfig``. Everything heavy is imported
when it is needed, so that help and configuration errors answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from masq import __version__
from masq.config import RunConfig, decode, load, run_folder
from masq.errors import ConfigError, MasqError, suggestion
from masq.files import atomic_write_bytes, find_files, require_writable_folder
from masq.sweep import Outcome, attempt, read_outcome, write_outcome

_CONFIG_NAME = "run"
_SLOTS = ("rotation", "smoothing", "rounding", "compensation")
_OVERRIDE = re.compile(r"^(?P<prefix>\+{1,2}|~|)(?P<key>[^=]+)(?:=(?P<value>.*))?$", re.DOTALL)
_OVERRIDE_HELP = """\
Overrides are KEY=VALUE. A group takes one of its files (conf/<group>/), any other key a value:
  masq run model=smol_omni modality=tri scheme=w4a8 method=masquant
  masq run method=masquant method.compensation.rank_ratio=0.1 output.root=/data/runs
  masq run method=masquant method.smoothing=modality        one slot of a method
With -m, every combination of comma-separated values runs; a failing one does not stop the others:
  masq run -m method=rtn,smoothquant,masquant scheme=w8a8,w4a8,w4a6
Without Hydra, from the config.yaml of an earlier run; overrides are then plain keys:
  masq run --config runs/.../config.yaml output.root=elsewhere
Exit status: 0 all finished, 1 a run failed, 2 a wrong argument or configuration.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments, those of the process if None.

    Returns:
        Exit status: 0, 1 when a run failed, 2 for what the user can correct, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command, options = _parse(arguments)
        return command(options)
    except MasqError as error:
        print(f"masq: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has seen enough; nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("masq: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> tuple[Callable[[argparse.Namespace], int], argparse.Namespace]:
    """The command and its options; argparse itself answers ``--help``."""
    commands = {
        "run": (_run_parser, _run, "quantize and score a model"),
        "table": (_table_parser, _table, "compare finished runs"),
        "plan": (_plan_parser, _plan, "what a run would do and need, before anything is loaded"),
        "doctor": (_doctor_parser, _doctor, "versions, device, and what is available"),
    }
    top = argparse.ArgumentParser(
        prog="masq",
        description="Post-training quantization of multimodal language models.",
        epilog="commands:\n"
        + "\n".join(f"  {name:8} {text}" for name, (_, _, text) in commands.items())
        + "\n\nmasq COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"masq {__version__}")
    top.add_argument("command", metavar="COMMAND")
    if not arguments:
        top.print_help()
        raise SystemExit(2)
    name = top.parse_args(arguments[:1]).command
    if name not in commands:
        raise ConfigError("unknown command", value=name, remedy=suggestion(name, commands))
    build, command, text = commands[name]
    parser = argparse.ArgumentParser(
        prog=f"masq {name}",
        description=text[0].upper() + text[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_OVERRIDE_HELP if name in ("run", "plan") else None,
    )
    build(parser)
    return command, parser.parse_intermixed_args(arguments[1:])


def _run_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination")
    parser.add_argument("--config", metavar="FILE", help="a resolved config.yaml; needs no Hydra")


def _plan_parser(parser: argparse.ArgumentParser) -> None:
    _run_parser(parser)


def _table_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="+", metavar="RECORD", help="record.json files, folders or patterns")
    parser.add_argument("--format", choices=("markdown", "csv", "latex"), default="markdown")
    parser.add_argument("--columns", metavar="KEYS", help="columns or prefixes: read,sqnr,nll.vision,bits")
    parser.add_argument("--output", metavar="FILE", help="write here instead of to the terminal")


def _doctor_parser(_parser: argparse.ArgumentParser) -> None:
    pass


def _run(options: argparse.Namespace) -> int:
    configs = _configs(options)
    for root in {config.output.root for config in configs}:
        require_writable_folder(root)
    if options.multirun:
        return _sweep(options.overrides, configs)
    _set_up_logging()
    from masq.report.table import table
    from masq.run import run

    record = run(configs[0])
    print(table([record]))
    print(f"\nRecord: {run_folder(configs[0], record.identity) / 'record.json'}")
    return 0 if record.status == "finished" else 1


def _plan(options: argparse.Namespace) -> int:
    from masq.plan import plan, render

    print("\n\n".join(render(plan(config)) for config in _configs(options)))
    return 0


def _table(options: argparse.Namespace) -> int:
    paths = find_files(options.records, "record.json")
    from masq.report.record import read_record
    from masq.report.table import table

    columns = options.columns.split(",") if options.columns else None
    text = table([read_record(path) for path in paths], columns, format=options.format)
    if options.output:
        atomic_write_bytes(options.output, (text.rstrip("\n") + "\n").encode())
    else:
        print(text)
    return 0


def _doctor(_options: argparse.Namespace) -> int:
    from masq.doctor import report

    print(report())
    return 0


def _configs(options: argparse.Namespace) -> list[RunConfig]:
    """The typed configuration of every cell; nothing heavy has run when one of them is wrong.

    Raises:
        ConfigError: the first thing that is wrong, with the cell it is wrong in.
    """
    if options.config:
        if options.multirun:
            raise ConfigError("--config runs one cell", value="--multirun", remedy="leave one of them out")
        return [load(options.config, options.overrides)]
    with _composer() as compose:
        overrides = _for_hydra(options.overrides)
        cells = _cells(overrides) if options.multirun else [overrides]
        if not options.multirun:
            _refuse_sweeps(overrides)
        configs = []
        for cell in cells:
            try:
                configs.append(decode(_named(compose(cell), cell)))
            except ConfigError as error:
                if len(cells) == 1:
                    raise
                rule = f"in {' '.join(_for_humans(cell))}: {error.rule}"
                raise ConfigError(rule, value=error.value, remedy=error.remedy) from None
        return configs


def _set_up_logging() -> None:
    """Progress goes to standard error, one readable line each; results alone go to standard output."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("masq").setLevel(logging.INFO)


def _config_folder() -> Path:
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
        with initialize_config_dir(str(_config_folder()), version_base="1.3"):
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
        known = options or [path.stem for path in (_config_folder() / group).glob("*.yaml")]
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
    if match["prefix"] == "~" or key.startswith("hydra") or (_config_folder() / key.split("@")[0]).is_dir():
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


def _sweep(overrides: Sequence[str], configs: Sequence[RunConfig]) -> int:
    """Run all cells through Hydra's launcher, then tell how each ended."""
    import hydra

    folder = Path(configs[0].output.root).resolve() / ".sweeps" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    arguments = ["masq", "--multirun", *_for_hydra(overrides), f"hydra.sweep.dir='{folder}'"]
    main_function = hydra.main(version_base="1.3", config_path=str(_config_folder()), config_name=_CONFIG_NAME)(_cell)
    before, sys.argv = sys.argv, arguments
    try:
        main_function()
    finally:
        sys.argv = before
    return _show_outcomes([read_outcome(folder, index, config) for index, config in enumerate(configs)])


def _show_outcomes(outcomes: Sequence[Outcome]) -> int:
    """Print the table of what finished and the failures; exit status 1 if there are any."""
    from masq.report.record import read_record
    from masq.report.table import table

    paths = [outcome.record for outcome in outcomes if outcome.record is not None]
    if paths:
        # Cells with the same identity (the float model under several schemes) share one record.
        print(table([read_record(Path(path)) for path in dict.fromkeys(paths)]))
    print(f"\n{len(paths)} of {len(outcomes)} runs finished")
    for outcome in outcomes:
        if outcome.error is not None:
            print(f"failed: {outcome.cell}: {outcome.error}", file=sys.stderr)
    return 0 if len(paths) == len(outcomes) else 1


def _cell(composed: Any) -> None:
    """One cell of a sweep, possibly in a process of its own: its outcome goes to a file."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    _set_up_logging()
    settings = HydraConfig.get()
    plain: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    config = decode(_named(plain, list(settings.overrides.task)))
    write_outcome(Path(settings.sweep.dir), int(settings.job.num), attempt(config))
