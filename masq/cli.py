"""The command line: ``masq run|plan|sweep-status|table|compare|compare-paper|report|export|audit|doctor``.

Everything heavy is imported when it is needed, so that help and configuration errors answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from masq import __version__
from masq.config import RunConfig, load
from masq.errors import ConfigError, MasqError, suggestion
from masq.experiment import commands
from masq.files import find_files, require_writable_folder
from masq.identity import run_folder
from masq.sweep import Outcome, read_outcome, show_progress

_OVERRIDE_HELP = """\
Overrides are KEY=VALUE. A group takes one of its files (conf/<group>/), any other key a value:
  masq run model=smol_omni modality=tri scheme=w4a8 method=masquant
  masq run method=masquant method.compensation.rank_ratio=0.1 output.root=/data/runs
  masq run method=masquant method.smoothing=modality        one slot of a method
With -m, every combination of comma-separated values runs; a failing one does not stop the others:
  masq run -m method=rtn,smoothquant,masquant scheme=w8a8,w4a8,w4a6
An experiment is a table with all its sweeps (conf/experiment/); scale=smol takes the embedded models:
  masq run experiment=table1 scale=smol threads=1 hydra/launcher=local
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
    # Read by torch when it first allocates: tensors of megabytes lie on huge pages, of which there are few to fault in.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
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
    entries = {
        "run": (_run_parser, _run, "quantize and score a model"),
        "sweep-status": (_plan_parser, commands.sweep_status, "how far the cells of an experiment have come"),
        "table": (_table_parser, _table, "one row for each finished run"),
        "compare": (
            _compare_parser,
            _compare,
            "what differs between runs on the same samples, and whether it is chance",
        ),
        "compare-paper": (
            commands.compare_paper_parser,
            commands.compare_paper,
            "the table of a paper beside ours",
        ),
        "report": (commands.report_parser, commands.report, "an experiment as a page, and its table for a paper"),
        "export": (_export_parser, _export, "a finished run as a checkpoint that transformers loads"),
        "plan": (_plan_parser, _plan, "what a run would do and need, before anything is loaded"),
        "audit": (_plan_parser, _audit, "every hyper-parameter of a method, with its source"),
        "doctor": (_doctor_parser, _doctor, "versions, device, and what is available"),
    }
    top = argparse.ArgumentParser(
        prog="masq",
        description="Post-training quantization of multimodal language models.",
        epilog="commands:\n"
        + "\n".join(f"  {name:13} {text}" for name, (_, _, text) in entries.items())
        + "\n\nmasq COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"masq {__version__}")
    top.add_argument("command", metavar="COMMAND")
    if not arguments:
        top.print_help()
        raise SystemExit(2)
    name = top.parse_args(arguments[:1]).command
    if name not in entries:
        raise ConfigError("unknown command", value=name, remedy=suggestion(name, entries))
    build, command, text = entries[name]
    parser = argparse.ArgumentParser(
        prog=f"masq {name}",
        description=text[0].upper() + text[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_OVERRIDE_HELP if build in (_run_parser, _plan_parser) else None,
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


def _compare_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "records", nargs="+", metavar="RECORD", help="record.json files, folders or patterns; the first is the base"
    )
    parser.add_argument("--format", choices=("markdown", "csv", "latex"), default="markdown")
    parser.add_argument("--output", metavar="FILE", help="write here instead of to the terminal")


def _export_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN_FOLDER", help="<output.root>/<model>-<modality>-<scheme>-<method>-<identity>"
    )
    parser.add_argument("folder", metavar="OUT_FOLDER", help="to be made; what is there is never overwritten")
    parser.add_argument(
        "--format",
        choices=("masq", "compressed-tensors"),
        default="masq",
        help="masq: every method, loaded by transformers after `import masq`. compressed-tensors: W8A8 and W4A16 for "
        "other engines, without run-time smoothing, corrections or rotations",
    )


def _doctor_parser(_parser: argparse.ArgumentParser) -> None:
    pass


def _run(options: argparse.Namespace) -> int:
    from masq import parallel

    found = commands.named(options)
    if parallel.expected() > 1 and (found is not None or options.multirun):
        raise ConfigError(
            "several processes calibrate one cell together",
            value=f"{parallel.expected()} processes and a sweep",
            remedy="give torchrun one cell at a time, or start the sweep without it",
        )
    if found is not None:
        return commands.run(found)
    configs = _configs(options)
    for root in {config.output.root for config in configs}:
        require_writable_folder(root)
    if options.multirun:
        from masq.compose import launch

        folder = launch(options.overrides, configs[0].output.root)
        return _show_outcomes([read_outcome(folder, index, config) for index, config in enumerate(configs)])
    from masq.report.table import table
    from masq.run import run

    with parallel.joined():
        if parallel.rank():
            from masq.run import assist

            assist(configs[0])
            return 0
        show_progress()
        record = run(configs[0])
    print(table([record]))
    print(f"\nRecord: {run_folder(configs[0], record.identity) / 'record.json'}")
    return 0 if record.status == "finished" else 1


def _plan(options: argparse.Namespace) -> int:
    from masq.plan import plan, render

    found = commands.named(options)
    if found is not None:
        return commands.plan(found)
    print("\n\n".join(render(plan(config)) for config in _configs(options)))
    return 0


def _audit(options: argparse.Namespace) -> int:
    from masq.audit import render

    print("\n\n".join(render(config) for config in _configs(options)))
    return 0


def _table(options: argparse.Namespace) -> int:
    paths = find_files(options.records, "record.json")
    from masq.report.record import read_record
    from masq.report.table import table

    columns = options.columns.split(",") if options.columns else None
    return commands.show(table([read_record(path) for path in paths], columns, format=options.format), options.output)


def _compare(options: argparse.Namespace) -> int:
    paths = find_files(options.records, "record.json")
    from masq.report.compare import compare
    from masq.report.record import read_record

    return commands.show(compare([read_record(path) for path in paths], options.format), options.output)


def _export(options: argparse.Namespace) -> int:
    from masq.export import checkpoint, compressed_tensors
    from masq.finished import load_finished
    from masq.report.record import read_record

    run, folder = Path(options.run), Path(options.folder)
    checkpoint.require_new(folder)
    record = read_record(run / "record.json")
    config = load(run / "config.yaml", [])
    made_by = {
        "run": record.identity,
        "model": config.model.name,
        "method": config.method.name,
        "scheme": config.scheme.name,
        "commit": record.provenance.get("commit"),
    }
    save = {"masq": checkpoint.save, "compressed-tensors": compressed_tensors.save}[options.format]
    save(load_finished(run, pack=False), folder, made_by)
    print(f"Checkpoint: {folder}")
    return 0


def _doctor(_options: argparse.Namespace) -> int:
    from masq.doctor import report

    print(report())
    return 0


def _configs(options: argparse.Namespace) -> list[RunConfig]:
    """The typed configuration of every cell; nothing heavy has run when one of them is wrong."""
    if options.config:
        if options.multirun:
            raise ConfigError("--config runs one cell", value="--multirun", remedy="leave one of them out")
        return [load(options.config, options.overrides)]
    from masq.compose import compose, compose_cells

    return compose_cells(options.overrides) if options.multirun else [compose(options.overrides)]


def _show_outcomes(outcomes: Sequence[Outcome]) -> int:
    """Print the table of what finished and the failures; exit status 1 if there are any."""
    from masq.report.record import read_record
    from masq.report.table import table

    paths = [outcome.record for outcome in outcomes if outcome.record is not None]
    if paths:
        # Cells with the same identity (the float model under several schemes) share one record.
        print(table([read_record(Path(path)) for path in dict.fromkeys(paths)]))
    return commands.show_ends(outcomes)
