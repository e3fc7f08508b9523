"""Numbers that papers report, as data, and how their words translate into ours (``results/paper``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from masq.errors import ConfigError, unknown_name

FLOAT_BITS, FLOAT_METHOD = "FP16", "Dense"


@dataclass(frozen=True)
class Reported:
    """One number of a table.

    Attributes:
        table: its name, ``table1`` for example.
        model: as printed, like ``method``, ``bits`` and ``benchmark``.
        method: see ``model``.
        bits: see ``model``.
        benchmark: see ``model``.
        metric: accuracy, WER, prefill_ms, ...
        value: as printed.
        higher_is_better: its direction.
    """

    table: str
    model: str
    method: str
    bits: str
    benchmark: str
    metric: str
    value: float
    higher_is_better: bool

    @property
    def is_float(self) -> bool:
        """Whether it is of the model before quantization."""
        return self.bits == FLOAT_BITS


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark of a paper is called here.

    Attributes:
        task: task of our records.
        metric: metric of the task.
        scale: from our unit to the paper's.
        samples: that the paper seems to have used, None where nothing tells.
    """

    task: str
    metric: str
    scale: float
    samples: int | None


@dataclass(frozen=True)
class Names:
    """From the paper's words to ours; several of ours for one of its, best first.

    Attributes:
        models: names of configurations.
        bits: names of schemes, ``float`` before quantization.
        methods: names of methods.
        benchmarks: tasks and metrics.
    """

    models: Mapping[str, str]
    bits: Mapping[str, list[str]]
    methods: Mapping[str, list[str]]
    benchmarks: Mapping[str, Benchmark]


@cache
def reported(table: str) -> tuple[Reported, ...]:
    """The numbers of a table that a method, bits and a benchmark belong to, in the order of the paper.

    Raises:
        ConfigError: no such table; near matches are listed.
    """
    found = tuple(_row(row) for row in _tables() if row["table"] == table and isinstance(row["value"], int | float))
    if not found:
        raise unknown_name("table of the paper", table, tables())
    return found


def tables() -> list[str]:
    """Names of the paper's tables."""
    return list(dict.fromkeys(row["table"] for row in _tables()))


@cache
def names() -> Names:
    """How the paper's words translate."""
    content = _read("names.yaml")
    return Names(
        content["table_models"],
        content["bits"],
        content["methods"],
        {name: Benchmark(**entry) for name, entry in content["benchmarks"].items()},
    )


def _row(row: Mapping[str, Any]) -> Reported:
    keys = ("table", "model", "method", "bits", "benchmark", "metric", "higher_is_better")
    return Reported(**{key: row[key] for key in keys}, value=float(row["value"]))


@cache
def _tables() -> list[dict[str, Any]]:
    return _read("masquant_tables.yaml")["rows"]


def _read(name: str) -> Any:
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "results" / "paper", package / "paper"):
        if (folder / name).is_file():
            return yaml.load((folder / name).read_text(encoding="utf-8"), Loader=_LOADER)
    raise ConfigError("the reported numbers are missing", value=name, remedy="install masq again")


# The same safe language, read by libyaml where it is there: a thousand rows take a second otherwise.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
