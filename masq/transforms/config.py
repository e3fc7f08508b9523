"""Configurations of smoothing. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from masq.errors import ConfigError, unknown_name
from masq.numerics.scheme import GroupName, TensorFormat
from masq.transforms.frame import ALL_GROUPS, INNER_GROUPS, check_groups


def _check(alpha: float, groups: tuple[str, ...]) -> None:
    if not 0 <= alpha <= 1:
        raise ConfigError("alpha must lie between 0 and 1", value=alpha)
    check_groups(groups)


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
    groups: tuple[GroupName, ...] = INNER_GROUPS
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
    groups: tuple[GroupName, ...] = INNER_GROUPS

    def __post_init__(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigError: alpha outside [0, 1], or groups empty or repeated.
        """
        _check(self.alpha, self.groups)


@dataclass(frozen=True, slots=True)
class ConvexModalitySmoothing:
    """One factor per modality, the optimum of a convex model of the quantization error.

    The uniform-noise model of per-token activations and per-channel weights is log-convex in log s, so that it has one
    optimum, found without gradients through rounding, learning rate or seed (``masq.transforms.convex``).

    Attributes:
        groups: the groups of linears that are smoothed.
        shared: those of them whose factor serves all modalities: without a correction behind it, a factor of its own
            costs a modality more than it gains, for the stored weight has that of text.
        tokens: at most so many of each modality are looked at.
        power: largest magnitudes are taken as norms of this order, which are smooth.
        steps: iterations of L-BFGS at most.
    """

    kind: Literal["modality_convex"] = "modality_convex"
    groups: tuple[GroupName, ...] = ALL_GROUPS
    shared: tuple[GroupName, ...] = ("down",)
    tokens: int = 512
    power: int = 16
    steps: int = 100

    def __post_init__(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigError: tokens, power or steps out of range, or groups empty or repeated.
        """
        _check(0.0, self.groups)
        if len(set(self.shared)) != len(self.shared):
            raise ConfigError("shared must name a group of linears once", value=list(self.shared))
        if self.tokens < 1:
            raise ConfigError("tokens must be positive", value=self.tokens, remedy="512 is the default")
        if not 2 <= self.power <= 64:
            raise ConfigError("power must lie between 2 and 64", value=self.power, remedy="16 is the default")
        if self.steps < 1:
            raise ConfigError("steps must be positive", value=self.steps, remedy="100 is the default")


@dataclass(frozen=True, slots=True)
class AwqSmoothing:
    """One searched factor for all tokens: s = mean|x|^t / sqrt(max * min) (AWQ, arXiv 2306.00978, equations 4 and 5).

    The exponent t of a group of linears is the one of a grid with the smallest error of their outputs, weights and
    activations rounded to nearest as the scheme says, on calibration tokens of the quantized chain. AWQ's released
    code looks at the output of the attention or the MLP instead, where one lies behind the group.

    Attributes:
        steps: points of the grid 0, 1/steps, .., 1 - 1/steps (20 in the released code); 0 is no smoothing.
        error: of an output, ``squared`` (AWQ) or ``absolute``.
        groups: the groups of linears that are smoothed.
        fold: absorb the factor into the norm (or the value linear) before the group, else divide at run time.
        tokens: at most so many of each modality are looked at, weighted by how many they stand for.
    """

    kind: Literal["awq"] = "awq"
    steps: int = 20
    error: Literal["squared", "absolute"] = "squared"
    groups: tuple[GroupName, ...] = ALL_GROUPS
    fold: bool = True
    tokens: int = 512

    def __post_init__(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigError: steps or tokens below 1, or groups empty or repeated.
        """
        _check_searched(self)


@dataclass(frozen=True, slots=True)
class MbqSmoothing:
    """AWQ's search, the error of each modality weighted by how sensitive the model is to it (MBQ, arXiv 2412.19509).

    Attributes:
        steps: points of the grid 0, 1/steps, .., 1 - 1/steps; 0 is no smoothing.
        error: of an output, ``absolute`` (the first-order expansion of the loss, MBQ) or ``squared``.
        groups: the groups of linears that are smoothed.
        fold: absorb the factor into the norm (or the value linear) before the group, else divide at run time.
        tokens: at most so many of each modality are looked at, weighted by how many they stand for.
        floor: smallest sensitivity of a modality relative to text's: ``median`` takes the median over blocks (MBQ's
            released code; without it the last block, where only the tokens that predict have a gradient, looks at no
            other modality), ``none`` takes it as it is.
    """

    kind: Literal["mbq"] = "mbq"
    steps: int = 20
    error: Literal["squared", "absolute"] = "absolute"
    groups: tuple[GroupName, ...] = ALL_GROUPS
    fold: bool = True
    tokens: int = 512
    floor: Literal["median", "none"] = "median"

    def __post_init__(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigError: steps or tokens below 1, or groups empty or repeated.
        """
        _check_searched(self)


def _check_searched(config: SearchedSmoothing) -> None:
    _check(0.0, config.groups)
    if config.steps < 1:
        raise ConfigError("steps must be positive", value=config.steps, remedy="20 is the published value")
    if config.tokens < 1:
        raise ConfigError("tokens must be positive", value=config.tokens, remedy="leave it at the default")


def takes_moments(error: str, activations: Collection[TensorFormat | None]) -> bool:
    """Whether an error of outputs follows from second moments of the input: squared, and with float activations."""
    return error == "squared" and all(fmt is None for fmt in activations)


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
        loss_weights: lambda of each modality, 1 where it is left out (1 for all in the paper).
        objective: error of the output of the decoder ``block`` against the float chain (the released code), or of each
            ``linear`` against the float linear on the same input (equation 14).
        mean: of the error over each ``modality``'s tokens (equation 14), or over all (the released code: ``token``).
    """

    kind: Literal["modality_learned"] = "modality_learned"
    alpha: float = 0.5
    groups: tuple[GroupName, ...] = INNER_GROUPS
    epochs: int = 2
    learning_rate: float = 0.03
    loss_weights: Mapping[LossKey, float] = field(default_factory=_unit_weights)
    objective: Literal["block", "linear"] = "block"
    mean: Literal["modality", "token"] = "modality"

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
        loss_weights: lambda of each modality, 1 where it is left out.
        objective: see ``LearnedModalitySmoothing``.
        mean: see ``LearnedModalitySmoothing``.
    """

    kind: Literal["shared_learned"] = "shared_learned"
    alpha: float = 0.5
    groups: tuple[GroupName, ...] = INNER_GROUPS
    epochs: int = 2
    learning_rate: float = 0.03
    loss_weights: Mapping[LossKey, float] = field(default_factory=_unit_weights)
    objective: Literal["block", "linear"] = "block"
    mean: Literal["modality", "token"] = "modality"

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
    unknown = sorted(set(config.loss_weights) - set(_unit_weights()))
    if unknown:
        raise unknown_name("modality of loss_weights", unknown[0], _unit_weights())
    loss_weights = {**_unit_weights(), **config.loss_weights}
    object.__setattr__(config, "loss_weights", loss_weights)  # frozen: what was left out is filled in once, here
    weights = loss_weights.values()
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise ConfigError("loss_weights must be finite, not negative, and not all zero", value=dict(loss_weights))


LearnedSmoothing = LearnedModalitySmoothing | LearnedSharedSmoothing
SearchedSmoothing = AwqSmoothing | MbqSmoothing
Smoothing = (
    NoSmoothing | SharedSmoothing | ModalitySmoothing | ConvexModalitySmoothing | LearnedSmoothing | SearchedSmoothing
)
