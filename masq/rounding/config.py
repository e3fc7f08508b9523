"""Configurations of rounding: from a float weight to integers. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from masq.errors import ConfigError
from masq.numerics.scheme import ALL_ROLES, RoleName


@dataclass(frozen=True, slots=True)
class NoRounding:
    """Weights stay in float: the model as it was loaded, to the last bit."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class ClipSearch:
    """Ranges of weights shrunk by the error of outputs, row by row or group by group (AWQ, arXiv 2306.00978).

    Attributes:
        min_ratio: smallest share of a range that is kept.
        steps: shares 1, 1 - 1/steps, .. are tried as far as ``min_ratio`` (AWQ's released code: 20, to 0.55).
        moments: the second moment of the input that errors are measured by: ``full`` knows how channels go together,
            ``diagonal`` takes them as uncorrelated.
        roles: the linears that are clipped; AWQ's released code leaves out query and key.
    """

    min_ratio: float = 0.5
    steps: int = 20
    moments: Literal["full", "diagonal"] = "full"
    roles: tuple[RoleName, ...] = ALL_ROLES

    def __post_init__(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigError: ``min_ratio`` outside (0, 1], ``steps`` below 1, or roles empty or repeated.
        """
        if not 0 < self.min_ratio <= 1:
            raise ConfigError("min_ratio must lie above 0 and not above 1", value=self.min_ratio, remedy="0.5 is usual")
        if self.steps < 1:
            raise ConfigError("steps must be positive", value=self.steps, remedy="20 is the published value")
        if not self.roles or len(set(self.roles)) != len(self.roles):
            raise ConfigError(
                "roles must name at least one linear, each once", value=list(self.roles), remedy="set clip to null"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of a range that are tried, 1 first."""
        shares = (1 - step / self.steps for step in range(self.steps))
        return tuple(share for share in shares if share >= self.min_ratio - 1e-9)


@dataclass(frozen=True, slots=True)
class NearestRounding:
    """Round to the nearest level, ties to even.

    Attributes:
        per_modality: store one rounded weight Q(W s_m) per modality. An upper bound to compare with, not deployable:
            it stores the model once per modality.
        clip: shrink ranges first, by the second moment of all tokens; null for the full ranges.
        activation_clip: share of the range of a row that activations of up to four bits keep (QuaRot, arXiv 2404.00456,
            section 5: 0.9); what is beyond is cut off.
    """

    kind: Literal["nearest"] = "nearest"
    per_modality: bool = False
    clip: ClipSearch | None = None
    activation_clip: float = 1.0

    def __post_init__(self) -> None:
        """Reject a share that is none.

        Raises:
            ConfigError: ``activation_clip`` outside (0, 1].
        """
        _check_activation_clip(self.activation_clip)


@dataclass(frozen=True, slots=True)
class GptqRounding:
    """Round column by column and compensate in the columns to come (GPTQ, arXiv 2210.17323, algorithm 1).

    Attributes:
        damping: added to the diagonal of the Hessian, relative to its mean (0.01 in the original code).
        block_size: columns whose errors are spread at once; speed only, up to rounding.
        act_order: visit input channels by decreasing Hessian diagonal (the original code's option, after the paper).
        static_groups: with per-group scales, fix them before the sweep; needed with ``act_order``.
        tokens: whose second moment is the Hessian: of all tokens alike, of text tokens, or, with ``remainder``, of
            all tokens in the directions that their corrections leave (``masq.rounding.remainder``), which is then also
            what the weight is rounded towards.
        share: how much each modality counts in a ``remainder``: by the number of its ``tokens``, or so that relative
            errors of its ``signal`` count alike.
        inputs: what a ``remainder`` takes the inputs for: ``exact``, or ``rounded`` as they are going to be, a gain and
            noise in every channel (``masq.rounding.inputs``).
        clip: shrink ranges first, by the Hessian; the scales of groups are then fixed before the sweep. Null for the
            full ranges.
        activation_clip: as with rounding to nearest.
    """

    kind: Literal["gptq"] = "gptq"
    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False
    static_groups: bool = False
    tokens: Literal["all", "text", "remainder"] = "all"
    share: Literal["tokens", "signal"] = "tokens"
    inputs: Literal["exact", "rounded"] = "exact"
    clip: ClipSearch | None = None
    activation_clip: float = 1.0

    def __post_init__(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigError: damping, block size or ``activation_clip`` out of range, or a share of what is not there.
        """
        _check_activation_clip(self.activation_clip)
        if not 0 < self.damping < float("inf"):
            raise ConfigError("damping must be positive and finite", value=self.damping, remedy="0.01 is usual")
        if self.block_size < 1:
            raise ConfigError("block_size must be positive", value=self.block_size)
        if self.share != "tokens" and self.tokens != "remainder":
            raise ConfigError(
                "share weighs the modalities of a remainder",
                value=f"share={self.share}, tokens={self.tokens}",
                remedy="set method.rounding.tokens=remainder",
            )
        if self.inputs != "exact" and self.tokens != "remainder":
            raise ConfigError(
                "a remainder is what takes rounded inputs into account",
                value=f"inputs={self.inputs}, tokens={self.tokens}",
                remedy="set method.rounding.tokens=remainder",
            )


def _check_activation_clip(value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError("activation_clip must lie above 0 and not above 1", value=value, remedy="1 cuts nothing off")


Rounding = NoRounding | NearestRounding | GptqRounding
