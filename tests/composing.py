"""Configurations as Hydra composes them from ``conf/``, each once a process: one takes an eighth of a second."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONF = Path(__file__).parents[1] / "conf"
# The stages of a method are groups of their own, mounted inside `method`.
SLOTS = ("rotation", "centring", "smoothing", "rounding", "compensation")


def names(group: str) -> list[str]:
    """The files of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def plain(*overrides: str) -> dict[str, Any]:
    """A configuration as a plain dictionary of the caller's own; overrides are of different keys, in any order."""
    return deepcopy(_composed(frozenset(overrides)))


@cache
def _composed(overrides: frozenset[str]) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        content = OmegaConf.to_container(compose("run", overrides=sorted(overrides)), resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


@cache
def modalities_of(model: str) -> tuple[str, ...]:
    """The modalities in a model's file."""
    return tuple(yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text())["modalities"])


def overrides_for(group: str, name: str) -> list[str]:
    """The command line that brings in one file."""
    if group in SLOTS:
        # Some stages only make sense together, for example rounding per modality and smoothing per modality.
        partner = ["smoothing@method.smoothing=modality_learned"] if name == "nearest_per_modality" else []
        return ["method=rtn", *partner, f"{group}@method.{group}={name}"]
    if group == "model" and len(modalities_of(name)) < 3:
        return ["modality=dual", f"model={name}"]
    if group == "scheme":
        return ["method=none" if name == "w16a16" else "method=rtn", "model=qwen2_5_omni_3b", f"scheme={name}"]
    return [] if group == "." else [f"{group}={name}"]


def part(group: str, name: str) -> dict[str, Any]:
    """What one file makes of its group, or of its slot of the method."""
    found = plain(*overrides_for(group, name))
    return found["method"][group] if group in SLOTS else found[group]
