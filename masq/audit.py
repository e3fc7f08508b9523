"""Where every hyper-parameter of a method comes from, and where the sources contradict each other. No torch here.

The claims are data (``audit_claims.yaml``): by slot, kind and field of a method what the paper says, what its released
code does, what the field usually takes, and what masq chose where nobody says. A value that no claim names was set by
the user. Sources by arXiv id: ``MASQuant`` is 2603.04800.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from masq.config import RunConfig, to_dict

CLAIMS = Path(__file__).with_name("audit_claims.yaml")
ORIGINS = ("paper", "reference code", "reference scripts", "published", "assumed", "ours")
"""Strongest first: the method's paper, its code, the scripts with it, a usual value, our reading, our choice."""
SLOTS = ("rotation", "centring", "smoothing", "rounding", "compensation")


@dataclass(frozen=True, slots=True)
class Finding:
    """One hyper-parameter of a composed method.

    Attributes:
        key: path in the configuration, for example ``method.smoothing.alpha``.
        value: what this run takes.
        origin: the strongest origin that claims this value, ``set here`` if none does.
        where: its citation.
        others: what other origins claim instead, a sentence each.
    """

    key: str
    value: Any
    origin: str
    where: str
    others: tuple[str, ...]


@lru_cache(maxsize=1)
def claims() -> dict[str, Any]:
    """The claims file: ``fields`` by slot, kind and field; ``contradictions`` beyond single values."""
    return yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))


def audit(config: RunConfig) -> list[Finding]:
    """Every hyper-parameter of the method of ``config``, slot by slot, then those of its grids and its calibration."""
    plain = to_dict(config)
    found = []
    for slot in SLOTS:
        values = plain["method"][slot]
        found += [
            _finding(f"method.{slot}.{name}", value, claims()["fields"][slot].get(values["kind"], {}).get(name))
            for name, value in _leaves(values)
        ]
    found += [_finding(f"scheme.{name}", value, claims()["fields"]["scheme"].get(name)) for name, value in _grid(plain)]
    names = ("samples_per_task", "samples", "mix", "tasks", "source", "seed", "chain")
    known = claims()["fields"]["calibration"]
    return found + [_finding(f"calibration.{name}", plain["calibration"][name], known.get(name)) for name in names]


def _grid(plain: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Conventions of the number formats; how many bits there are is what a run is about."""
    for tensor in ("weight", "activation"):
        for name, value in (plain["scheme"][tensor] or {}).items():
            # Groups are those of weights: activations have one scale per token. How they are clipped is the method's.
            if name not in ("bits", "clip") and (tensor, name) != ("activation", "group_size"):
                yield f"{tensor}.{name}", value
    for name in ("roles", "overrides"):
        yield name, plain["scheme"][name]


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields of a slot but its kind; a nested option (the clip search of a rounding) gives its fields, dotted."""
    for name, value in values.items():
        if name == "kind":
            continue
        nested = isinstance(value, Mapping) and name != "loss_weights"
        yield from ((f"{name}.{inner}", leaf) for inner, leaf in value.items()) if nested else [(name, value)]


def _finding(key: str, value: Any, known: Mapping[str, Any] | None) -> Finding:
    stated = [(origin, known[origin]) for origin in ORIGINS if known and origin in known]
    agreeing = [(origin, claim) for origin, claim in stated if "value" in claim and _same(claim["value"], value)]
    others = tuple(
        f"{origin}: {claim.get('says') or _shown(claim['value'])} ({claim['where']})"
        for origin, claim in stated
        if (origin, claim) not in agreeing
    )
    if not agreeing:
        return Finding(key, value, "set here", "", others)
    origin, claim = agreeing[0]
    return Finding(key, value, origin, claim["where"], others)


def _same(first: Any, second: Any) -> bool:
    listed = (list(one) if isinstance(one, (list, tuple)) else one for one in (first, second))
    a, b = listed
    return a == b


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(_shown, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def render(config: RunConfig) -> str:
    """The audit as text: hyper-parameters with their sources, then what the sources contradict each other in."""
    rows = [[f.key, _shown(f.value), f.origin, f.where, "; ".join(f.others)] for f in audit(config)]
    headers = ["hyper-parameter", "value", "origin", "source", "other claims"]
    parts = [
        f"method {config.method.name}: {config.method.description}",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
    ]
    kinds = {f"{slot}.{getattr(config.method, slot).kind}" for slot in SLOTS}
    gaps = [one for one in claims()["contradictions"] if kinds & set(one["concerns"])]
    if gaps:
        rows = [[one["topic"], one["paper"], one["code"], one["masq"]] for one in gaps]
        parts.append("Where MASQuant's paper and its released code differ, beyond single values:")
        parts.append(tabulate(rows, ["topic", "paper", "code", "masq"], tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts)
