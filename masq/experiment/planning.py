"""What an experiment would take, from configuration alone."""

from __future__ import annotations

from tabulate import tabulate

from masq.experiment.definition import Experiment
from masq.experiment.running import distinct
from masq.plan import Plan, plan, size_text
from masq.sweep import cell_name


def render_experiment(found: Experiment) -> str:
    """One row for each cell, those that share a record once, and the sum; reads no weights.

    Raises:
        ConfigError: a cell cannot be composed.
    """
    planned = [(cell_name(config), plan(config)) for config in distinct(found)]
    rows = [_row(name, one) for name, one in planned]
    plans = [one for _, one in planned]
    total = ["all", size_text(max(p.peak_memory_bytes for p in plans)), size_text(sum(p.disk_bytes for p in plans))]
    rows.append([*total, f"{sum(_hours(p) for p in plans):.2f}", ""])
    notes = dict.fromkeys(note for one in plans for note in one.notes if "no effect" not in note)
    table = tabulate(
        rows,
        ["cell", "memory", "disk", "hours", "folders there"],
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", "right", "right", "right", "right"),
    )
    title = f"{found.name}, scale {found.scale}: {found.about}; {len(plans)} cells"
    return "\n".join([title, "", table, "", *(f"Note: {note}" for note in notes)])


def _row(name: str, planned: Plan) -> list[str]:
    memory, disk = size_text(planned.peak_memory_bytes), size_text(planned.disk_bytes)
    return [name, memory, disk, f"{_hours(planned):.2f}", str(len(planned.existing))]


def _hours(planned: Plan) -> float:
    return sum(planned.seconds.values()) / 3600
