"""Configurations of rounding: from a float weight to integers. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from masq.errors import ConfigError


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


@dataclass(frozen=True, slots=True)
class GptqRounding:
    """Round column by column and compensate in the columns to come (GPTQ, arXiv 2210.17323, algorithm 1).

    Attributes:
        damping: added to the diagonal of the Hessian, relative to its mean (0.01 in the original code).
        block_size: columns whose errors are spread at once; speed only, up to rounding.
        act_order: visit input channels by decreasing Hessian diagonal (the original code's option, after the paper).
        static_groups: with per-group scales, fix them before the sweep; needed with ``act_order``.
        tokens: whose second moment is the Hessian: of all tokens alike, or of text tokens.
    """

    kind: Literal["gptq"] = "gptq"
    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False
    static_groups: bool = False
    tokens: Literal["all", "text"] = "all"

    def __post_init__(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigError: damping or block size out of range.
        """
        if not 0 < self.damping < float("inf"):
            raise ConfigError("damping must be positive and finite", value=self.damping, remedy="0.01 is usual")
        if self.block_size < 1:
            raise ConfigError("block_size must be positive", value=self.block_size)


Rounding = NoRounding | NearestRounding | GptqRounding
