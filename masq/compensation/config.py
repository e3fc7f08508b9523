"""Configurations of error correction after rounding. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from masq.errors import ConfigError
from masq.numerics.scheme import GroupName


@dataclass(frozen=True, slots=True)
class NoCompensation:
    """The rounded weight is used as it is."""

    kind: Literal["none"] = "none"

    @property
    def base(self) -> Literal["text"]:
        """The stored weight has the factor of text, as it has by default where something is corrected."""
        return "text"


@dataclass(frozen=True, slots=True)
class WhitenedLowRank:
    """A low-rank correction per non-text modality, optimal in the norm of its activations.

    CMC of MASQuant (arXiv 2603.04800, section 3.3 and theorem 2); with equal factors it is QERA-exact
    (arXiv 2410.06040) per modality.

    Attributes:
        rank_ratio: rank as a share of min(d_in, d_out), rounded down; exactly one of it and ``rank`` is set.
        rank: absolute rank; 0 is legal and means no correction.
        damping: added to the eigenvalues of C_m, relative to their mean.
        whiten: False fits the plain weight error (ordinary SVD), as an ablation.
        activations: which chain's activations are behind the second moments: C_m, and a rounding stage's Hessian.
        groups: the groups of linears that are corrected.
        gauge: the scale of each modality's smoothing factor, which the activations' per-token scales hide but the
            weight error W s_m - Q(W s_text) does not: ``given`` keeps what smoothing found (the paper), ``text``
            gives it the geometric mean of text's factor, ``searched`` takes scale and strength of the factor, between
            text's and its own, by the error that is left after correction (``masq.compensation.gauge``).
        ranks: ``equal`` by the ratio or number above for every linear; ``filled`` spends the same bytes where they
            pay most among the linears and modalities of a block (``masq.compensation.ranks``).
        base: the modality whose factor the stored weight has; all others are corrected. Text (MASQuant, section 3.3),
            so that no generated token meets a correction; another one is an ablation, and simulated alone.
        dtype: in which the factors are stored, whatever the model's own is; they are multiplied in the model's.
            ``int8`` means codes with a float32 scale for each component (``masq.numerics.low_rank``): twice the rank
            in the bytes of sixteen bits.
    """

    kind: Literal["whitened_low_rank"] = "whitened_low_rank"
    rank_ratio: float | None = 0.05
    rank: int | None = None
    damping: float = 1e-4
    whiten: bool = True
    activations: Literal["quantized", "float"] = "quantized"
    groups: tuple[GroupName, ...] = ("qkv", "output", "gate_up")
    gauge: Literal["given", "text", "searched"] = "given"
    ranks: Literal["equal", "filled"] = "equal"
    dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    base: Literal["text", "vision", "audio"] = "text"

    def __post_init__(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigError: not exactly one rank given, or a value out of range.
        """
        if (self.rank_ratio is None) == (self.rank is None):
            raise ConfigError(
                "exactly one of rank_ratio and rank must be set",
                value=f"rank_ratio={self.rank_ratio}, rank={self.rank}",
                remedy="set the other one to null",
            )
        if self.rank_ratio is not None and not 0 <= self.rank_ratio <= 1:
            raise ConfigError("rank_ratio must lie between 0 and 1", value=self.rank_ratio)
        if self.rank is not None and self.rank < 0:
            raise ConfigError("rank must not be negative", value=self.rank)
        if not 0 < self.damping < float("inf"):
            raise ConfigError("damping must be positive and finite", value=self.damping)
        if self.base != "text" and self.gauge == "searched":
            raise ConfigError(
                "the scale of a factor is searched where text is the base",
                value=f"base={self.base}, gauge={self.gauge}",
                remedy="set base=text, or gauge=given",
            )
        if not self.groups or len(set(self.groups)) != len(self.groups):
            raise ConfigError(
                "groups must name at least one group of linears, each once",
                value=list(self.groups),
                remedy="use kind: none",
            )


Compensation = NoCompensation | WhitenedLowRank
