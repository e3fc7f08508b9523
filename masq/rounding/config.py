"""Configurations of rounding: from a float weight to integers. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class NoRounding:
    """Weights stay in float: the model as it was loaded, to the last bit."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class NearestRounding:
    """Round to the nearest level, ties to even.

    Attributes:
        per_modality: store one rounded weight Q(W s_m) per modality. An upper bound to compare with, not deployable:
            it stores the model once per modality.
    """

    kind: Literal["nearest"] = "nearest"
    per_modality: bool = False


Rounding = NoRounding | NearestRounding
