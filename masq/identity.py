"""What makes a run this run: the hash of everything its results depend on, and the folder that carries it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masq.config import RunConfig, to_dict
from masq.files import canonical_hash
from masq.numerics.scheme import CLIPPED_BITS


def to_hashed_dict(config: RunConfig) -> dict[str, Any]:
    """``to_dict`` for hashes: without what changes no result, and without later options where they say "not there"."""
    plain = to_dict(config)
    for group, key, not_there in (
        (plain["method"]["rounding"], "clip", None),
        (plain["method"]["rounding"], "share", "tokens"),
        (plain["method"]["rounding"], "inputs", "exact"),
        (plain["method"]["rounding"], "activation_clip", _clip_without_effect(config)),
        *((format_, "clip", 1.0) for format_ in _formats(plain)),
        (plain["method"]["compensation"], "ranks", "equal"),
        (plain["method"]["compensation"], "base", "text"),
        (plain["scheme"], "overrides", []),
        (plain["evaluation"], "score", True),
        (plain["evaluation"], "benchmarks", None),
        (plain["evaluation"], "batch_seconds", None),
        (plain["evaluation"], "decoding", "eager"),
        (plain["evaluation"], "allow_overlap", False),
        (plain["calibration"], "samples", None),
        (plain["calibration"], "mix", None),
        (plain["calibration"], "chain", "quantized"),
        (plain["method"], "centring", {"kind": "none"}),
        (plain, "towers", {"kind": "none"}),
    ):
        if group.get(key) == not_there:
            group.pop(key, None)
    if plain["execution"] == "simulated" or config.method.is_float:
        del plain["execution"], plain["kernel"]
    del plain["model"]["weights"]
    del plain["calibration"]["cache"], plain["evaluation"]["keep_float"], plain["evaluation"]["records"]
    return plain


def _clip_without_effect(config: RunConfig) -> float:
    """The share that changes nothing: every one, where no activation has few enough bits."""
    clip = getattr(config.method.rounding, "activation_clip", 1.0)
    bits = [config.scheme.activation.bits] if config.scheme.activation else []
    bits += [one.activation_bits for one in config.scheme.overrides if one.activation_bits]
    return 1.0 if any(one <= CLIPPED_BITS for one in bits) else clip


def _formats(plain: dict[str, Any]) -> list[dict[str, Any]]:
    """Every number format in a configuration."""
    found = [plain[group].get(part) for group in ("scheme", "towers") for part in ("weight", "activation")]
    return [one for one in found if one is not None]


def identity(config: RunConfig, hashes: Mapping[str, Any]) -> str:
    """SHA-256 of what the results depend on: the configuration, the data and the weights.

    Left out: where data and weights lie and results go, the thread count, names of presets, descriptions, and the
    sizes that only ``masq plan`` reads.

    Args:
        config: the configuration.
        hashes: content hash of every data set used, and of the float model.
    """
    plain = to_hashed_dict(config)
    for key in ("output", "threads", "preset"):
        del plain[key]
    del plain["evaluation"]["name"], plain["method"]["description"], plain["model"]["architecture"]
    for group in ("model", "calibration", "evaluation"):
        del plain[group]["source"]
    if config.method.is_float:
        # Nothing is calibrated, learned or rounded: one float run serves every scheme of a sweep.
        for key in ("scheme", "calibration", "seed"):
            del plain[key]
    return canonical_hash({"config": plain, "data": dict(hashes)})


def folder_name(config: RunConfig, key: str) -> str:
    """Name of the run's folder: what a human looks for, then enough of the identity ``key`` to be unique."""
    scheme = "float" if config.method.is_float else config.scheme.name
    if config.towers.kind != "none":
        scheme += f"+towers={config.towers.name}"
    names = (config.model.name, config.modality.name, scheme, config.method.name)
    return "-".join([*(re.sub(r"[^\w.+=-]+", "_", name) for name in names), key[:10]])


def run_folder(config: RunConfig, key: str) -> Path:
    """Folder of the run with identity ``key``."""
    return Path(config.output.root) / folder_name(config, key)
