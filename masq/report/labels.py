"""What tells the rows of a table apart: model, modality, scheme, method, and whatever else varies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.report.record import RunRecord

ABSENT = "-"


def is_float(record: RunRecord) -> bool:
    """Whether nothing was rounded, whatever the method is called."""
    rounding = lookup(record.config, "method", "rounding")
    return isinstance(rounding, dict) and rounding.get("kind") == "none"


def lookup(config: dict[str, Any], group: str, key: str) -> object:
    """A value of a record's configuration, "?" where it has none."""
    section = config.get(group)
    return section.get(key, "?") if isinstance(section, dict) else "?"


def labels_of(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Leading text columns: title and text by record; all but scheme and method only when they vary."""
    schemes = ["float" if is_float(record) else record.scheme for record in records]
    labels = [
        ("model", [str(lookup(record.config, "model", "name")) for record in records]),
        ("modality", [str(lookup(record.config, "modality", "name")) for record in records]),
        ("scheme", schemes),
        ("method", [record.method for record in records]),
        ("calibration", [ABSENT if is_float(record) else calibration_of(record) for record in records]),
        ("seed", [ABSENT if is_float(r) else str(lookup(r.config, "calibration", "seed")) for r in records]),
        ("towers", [ABSENT if is_float(record) else _towers(record) for record in records]),
        ("execution", [execution_of(record) for record in records]),
    ]
    return [
        (title, values) for title, values in labels if title in ("scheme", "method") or len({*values} - {ABSENT}) > 1
    ]


def _towers(record: RunRecord) -> str:
    """Formats of the vision and audio towers."""
    weight, activation = (lookup(record.config, "towers", key) for key in ("weight", "activation"))
    if not isinstance(weight, dict):
        return "float"
    return f"w{weight['bits']}a{activation['bits'] if isinstance(activation, dict) else 16}"


def execution_of(record: RunRecord) -> str:
    """Whether the quantized linears were simulated, or which kernels ran them packed."""
    if is_float(record):
        return ABSENT
    kernels = record.provenance.get("kernels")
    how = "fused" if record.provenance.get("fused") else "packed"
    return f"{how} ({', '.join(sorted(kernels))})" if kernels else "simulated"


def calibration_of(record: RunRecord) -> str:
    """How many samples of what, drawn how, and whose activations stages looked at."""
    keys = ("samples_per_task", "samples", "mix", "chain", "source")
    found = {key: lookup(record.config, "calibration", key) for key in keys}
    text = f"{found['samples_per_task']} of each task"
    if isinstance(found["samples"], int):
        mix = found["mix"] if isinstance(found["mix"], dict) else {}
        shares = " : ".join(f"{kind} {share:g}" for kind, share in mix.items())
        text = f"{found['samples']} in all, " + (f"tasks of {shares}" if shares else "every task alike")
    elif found["samples_per_task"] is None:
        text = "all there are"
    text += ", of the evaluation split" if found["source"] == "evaluation" else ""
    return text + (", activations of the float model" if found["chain"] == "float" else "")
