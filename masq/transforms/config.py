"""Configurations of the exact rewrites: rotation and smoothing. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from masq.errors import ConfigError
from masq.numerics.scheme import GroupName

_GROUPS: tuple[GroupName, ...] = ("qkv", "output", "gate_up")


def _check(alpha: float, groups: tuple[str, ...]) -> None:
    if not 0 <= alpha <= 1:
        raise ConfigError("alpha must lie between 0 and 1", value=alpha)
    if not groups or len(set(groups)) != len(groups):
        raise ConfigError(
            "groups must name at least one group of linears, each once", value=list(groups), remedy="use kind: none"
        )


@dataclass(frozen=True, slots=True)
class NoRotation:
    """The residual stream keeps its basis."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class HadamardRotation:
    """Randomized Hadamard rotation (QuaRot, arXiv 2404.00456); the signs come from the seed of the run.

    Attributes:
        residual: rotate the residual stream, offline: embeddings and projectors of the towers included.
        heads: rotate each head between values and output linear, offline.
        down: rotate the input of ``down`` at run time.
    """

    kind: Literal["hadamard"] = "hadamard"
    residual: bool = True
    heads: bool = True
    down: bool = True

    def __post_init__(self) -> None:
        """Reject a rotation of nothing.

        Raises:
            ConfigError: all three are off.
        """
        if not (self.residual or self.heads or self.down):
            raise ConfigError("a rotation must rotate something", value="all off", remedy="use kind: none")


@dataclass(frozen=True, slots=True)
class NoSmoothing:
    """Activations and weights keep their scales."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class SharedSmoothing:
    """One factor per channel for all tokens: s = max|x|^alpha / max|w|^(1 - alpha) (SmoothQuant, arXiv 2211.10438).

    Attributes:
        alpha: how much of the difficulty moves from activations into weights.
        groups: the groups of linears that are smoothed; ``down`` is not, by default, as in the original.
        fold: absorb the factor into the norm (or the value linear) before the group, else divide at run time.
        source: tokens whose maximum counts.
    """

    kind: Literal["shared"] = "shared"
    alpha: float = 0.5
    groups: tuple[GroupName, ...] = _GROUPS
    fold: bool = True
    source: Literal["all", "text"] = "all"

    def __post_init__(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigError: alpha outside [0, 1], or groups empty or repeated.
        """
        _check(self.alpha, self.groups)


@dataclass(frozen=True, slots=True)
class ModalitySmoothing:
    """One closed-form factor per channel and modality (MASQuant, arXiv 2603.04800, equation 12); never folded.

    Attributes:
        alpha: how much of the difficulty moves from activations into weights.
        groups: the groups of linears that are smoothed.
    """

    kind: Literal["modality"] = "modality"
    alpha: float = 0.5
    groups: tuple[GroupName, ...] = _GROUPS

    def __post_init__(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigError: alpha outside [0, 1], or groups empty or repeated.
        """
        _check(self.alpha, self.groups)


LossKey = Literal["text", "vision", "audio"]


def _unit_weights() -> Mapping[LossKey, float]:
    return {"text": 1.0, "vision": 1.0, "audio": 1.0}


@dataclass(frozen=True, slots=True)
class LearnedModalitySmoothing:
    """Modality factors trained from equation 12 on (MASQuant, arXiv 2603.04800, equations 12 to 14).

    Attributes:
        alpha: of the starting factors.
        groups: the groups of linears that are smoothed.
        epochs: passes over the calibration batches; 0 keeps the starting factors.
        learning_rate: of Adam on log s.
        loss_weights: lambda of each modality (1 in the paper); all three must be given.
    """

    kind: Literal["modality_learned"] = "modality_learned"
    alpha: float = 0.5
    groups: tuple[GroupName, ...] = _GROUPS
    epochs: int = 2
    learning_rate: float = 0.03
    loss_weights: Mapping[LossKey, float] = field(default_factory=_unit_weights)

    def __post_init__(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigError: alpha, epochs, learning rate or loss weights out of range; all loss weights zero.
        """
        _check_learned(self)


@dataclass(frozen=True, slots=True)
class LearnedSharedSmoothing:
    """One factor for all tokens, trained like those of ``LearnedModalitySmoothing`` on the same loss; never folded.

    The row "uniform, optimized" of MASQuant's ablation (arXiv 2603.04800): what learning gives without modalities.

    Attributes:
        alpha: of the starting factor.
        groups: the groups of linears that are smoothed.
        epochs: passes over the calibration batches; 0 keeps the starting factor.
        learning_rate: of Adam on log s.
        loss_weights: lambda of each modality; all three must be given.
    """

    kind: Literal["shared_learned"] = "shared_learned"
    alpha: float = 0.5
    groups: tuple[GroupName, ...] = _GROUPS
    epochs: int = 2
    learning_rate: float = 0.03
    loss_weights: Mapping[LossKey, float] = field(default_factory=_unit_weights)

    def __post_init__(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigError: alpha, epochs, learning rate or loss weights out of range; all loss weights zero.
        """
        _check_learned(self)


def _check_learned(config: LearnedSmoothing) -> None:
    _check(config.alpha, config.groups)
    if config.epochs < 0:
        raise ConfigError("epochs must not be negative", value=config.epochs)
    if not 0 < config.learning_rate < float("inf"):
        raise ConfigError("learning_rate must be positive and finite", value=config.learning_rate)
    loss_weights = config.loss_weights
    weights = loss_weights.values()
    if set(loss_weights) != set(_unit_weights()):
        raise ConfigError("loss_weights must give text, vision and audio", value=dict(loss_weights))
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise ConfigError("loss_weights must be finite, not negative, and not all zero", value=dict(loss_weights))


Rotation = NoRotation | HadamardRotation
LearnedSmoothing = LearnedModalitySmoothing | LearnedSharedSmoothing
Smoothing = NoSmoothing | SharedSmoothing | ModalitySmoothing | LearnedSmoothing
