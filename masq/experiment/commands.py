"""The commands that are about experiments: what ``masq.cli`` hands over."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from masq.errors import ConfigError
from masq.experiment.definition import Experiment, cells, changed, experiment, split
from masq.files import atomic_write_bytes, require_writable_folder
from masq.sweep import Outcome, show_progress


def named(options: argparse.Namespace) -> Experiment | None:
    """The experiment that the overrides name, if any, changed by the other overrides.

    Raises:
        ConfigError: no such experiment, or an option that one has no use for.
    """
    name, scale, overrides = split(options.overrides)
    if name is None:
        return None
    if options.config or options.multirun:
        raise ConfigError("an experiment has its own sweeps", value=name, remedy="leave out -m and --config")
    return changed(experiment(name, scale), overrides)


def run(found: Experiment) -> int:
    """Run what is left of an experiment and print its table."""
    from masq.experiment.records import RecordIndex, render
    from masq.experiment.running import run_experiment, show_in_wandb

    show_progress()
    roots = {Path(config.output.root): None for config in cells(found)}
    for root in roots:
        require_writable_folder(root)
    outcomes = run_experiment(found)
    if any(outcome.record for outcome in outcomes):
        index = RecordIndex.of_folders(*roots)
        print(render(found, index))
        show_in_wandb(found, index)
    return show_ends(outcomes)


def show_ends(outcomes: Sequence[Outcome]) -> int:
    """Print how many cells finished, and the others.

    Returns:
        Exit status: 1 if any failed.
    """
    print(f"\n{sum(outcome.record is not None for outcome in outcomes)} of {len(outcomes)} runs finished")
    busy = sum(outcome.busy for outcome in outcomes)
    if busy:
        print(f"{busy} left to another process that works on them; the same command shows them when it is done")
    for outcome in outcomes:
        if outcome.error is not None:
            print(f"failed: {outcome.cell}: {outcome.error}", file=sys.stderr)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def plan(found: Experiment) -> int:
    """Print what an experiment would take."""
    from masq.experiment.planning import render_experiment

    print(render_experiment(found))
    return 0


def sweep_status(options: argparse.Namespace) -> int:
    """Print how far the cells of an experiment have come."""
    from masq.experiment.running import render_status, status

    found = named(options)
    if found is None:
        raise ConfigError("sweep-status needs an experiment", remedy="write experiment=NAME; see conf/experiment/")
    print(render_status(status(found)))
    return 0


def compare_paper_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``compare_paper``."""
    _experiment_parser(parser)
    parser.add_argument("--format", choices=("markdown", "latex"), default="markdown")
    parser.add_argument("--output", metavar="FILE", help="write here instead of to the terminal")


def compare_paper(options: argparse.Namespace) -> int:
    """Show a paper's table beside ours."""
    from masq.experiment.compare_paper import compare_paper as beside
    from masq.experiment.records import RecordIndex

    index = RecordIndex.of_folders(*(Path(folder) for folder in options.records))
    return show(beside(experiment(options.experiment, options.scale), index, options.format), options.output)


def show(text: str, output: str | None) -> int:
    """Print ``text``, or write it to the file ``output``."""
    if output:
        atomic_write_bytes(output, (text.rstrip("\n") + "\n").encode())
    else:
        print(text)
    return 0


def report_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``report``."""
    _experiment_parser(parser)
    parser.add_argument("--output", metavar="FOLDER", default="reports", help="folder of the files")


def report(options: argparse.Namespace) -> int:
    """Write an experiment's page and tables, and print where."""
    from masq.experiment.records import RecordIndex
    from masq.experiment.report import write_report
    from masq.experiment.running import status

    found = experiment(options.experiment, options.scale)
    statuses = status(changed(found, [f"output.root='{options.records[0]}'"]))
    index = RecordIndex.of_folders(*(Path(folder) for folder in options.records))
    for path in write_report(found, index, Path(options.output), statuses):
        print(path)
    return 0


def _experiment_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", help="a file of conf/experiment/")
    parser.add_argument("--scale", help="full (the paper's models) or smol (the embedded ones); full where there is it")
    parser.add_argument("--records", metavar="FOLDER", nargs="+", default=["runs"], help="of runs, or of their records")
