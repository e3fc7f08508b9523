"""A method as five slots, and which of their fillings exclude one another. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from masq.compensation.config import Compensation, NoCompensation
from masq.errors import ConfigError
from masq.rounding.config import NearestRounding, NoRounding, Rounding
from masq.transforms.config import LearnedSmoothing, NoSmoothing, SearchedSmoothing, Smoothing
from masq.transforms.frame import Centring, NoCentring, NoRotation, Rotation

_MODALITY_SMOOTHING = ("modality", "modality_learned")


@dataclass(frozen=True, slots=True)
class MethodConfig:
    """A method: five slots. No code asks for its name.

    Attributes:
        name: shown in tables and folder names.
        description: one line, shown by ``masq plan``.
        rotation: exact rewrite of the basis of the residual stream, of heads, and of what ``down`` reads.
        centring: exact rewrite that moves what the tokens of a modality have in common into a bias.
        smoothing: exact rewrite that moves scale from activations into weights.
        rounding: from float weights to integers; ``none`` leaves the model as it was loaded.
        compensation: correction of the error that is left.
    """

    name: str
    description: str = ""
    rotation: Rotation = field(default_factory=NoRotation)
    centring: Centring = field(default_factory=NoCentring)
    smoothing: Smoothing = field(default_factory=NoSmoothing)
    rounding: Rounding = field(default_factory=NearestRounding)
    compensation: Compensation = field(default_factory=NoCompensation)

    @property
    def is_float(self) -> bool:
        """Whether the model stays as it was loaded."""
        return isinstance(self.rounding, NoRounding)

    @property
    def stores_weight_per_modality(self) -> bool:
        """Whether every modality has a weight of its own: an upper bound, not deployable."""
        return isinstance(self.rounding, NearestRounding) and self.rounding.per_modality


def check(method: MethodConfig) -> None:
    """Refuse slots that exclude one another.

    Raises:
        ConfigError: which rule is broken, by what, and the way out.
    """
    name, smoothing, rounding = method.name, method.smoothing.kind, method.rounding
    if not name:
        raise ConfigError("method.name must not be empty", value="''")
    if isinstance(rounding, NoRounding):
        slots = ("rotation", "centring", "smoothing", "compensation")
        busy = [f"{slot}={kind}" for slot in slots if (kind := getattr(method, slot).kind) != "none"]
        if busy:
            raise ConfigError(
                f"method {name} rounds nothing, so it can neither rotate nor centre nor smooth nor compensate",
                value=", ".join(busy),
                remedy="set method.rounding=nearest, or the others to none",
            )
        return
    if method.centring.kind != "none" and isinstance(method.smoothing, LearnedSmoothing | SearchedSmoothing):
        raise ConfigError(
            "inputs are centred before factors are fitted in closed form, not where they are learned or searched",
            value=f"method.centring={method.centring.kind}, method.smoothing={smoothing}",
            remedy="set method.smoothing=modality_convex, modality, shared or none, or method.centring=none",
        )
    _check_base(method)
    if not method.stores_weight_per_modality:
        return
    if smoothing not in _MODALITY_SMOOTHING:
        raise ConfigError(
            "rounding.per_modality needs factors per modality: with one factor all its weights are equal",
            value=f"method.smoothing={smoothing}",
            remedy="set method.smoothing=modality or modality_learned, or method.rounding=nearest",
        )
    if method.compensation.kind != "none":
        raise ConfigError(
            "compensation corrects one shared weight, and rounding.per_modality has none",
            value=f"method.compensation={method.compensation.kind}",
            remedy="set method.compensation=none, or method.rounding=nearest",
        )


def _check_base(method: MethodConfig) -> None:
    rounding, base = method.rounding, method.compensation.base
    plain = isinstance(rounding, NearestRounding) and rounding.clip is None
    if base != "text" and not plain:
        raise ConfigError(
            "a stored weight with the factor of another modality than text is rounded to nearest",
            value=f"method.compensation.base={base}, method.rounding={rounding.kind}",
            remedy="set method.rounding=nearest, or method.compensation.base=text",
        )
