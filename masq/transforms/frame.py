"""Configurations of the frame that linears read their inputs in: its basis and its origin. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from masq.errors import ConfigError
from masq.numerics.scheme import GroupName

INNER_GROUPS: tuple[GroupName, ...] = ("qkv", "output", "gate_up")
ALL_GROUPS: tuple[GroupName, ...] = (*INNER_GROUPS, "down")


def check_groups(groups: tuple[str, ...]) -> None:
    """Refuse a choice of groups that names none, or one twice.

    Raises:
        ConfigError: it does.
    """
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
class SmoothedHadamardRotation:
    """Randomized Hadamard rotation at run time of what linears read, after it was smoothed.

    A rotation of the residual stream (``HadamardRotation``) lies before smoothing and costs nothing at run time; here
    each modality's channels are brought to one size first and mixed then, at the cost of a fast transform per input.

    Attributes:
        groups: the groups of linears whose input is rotated.
    """

    kind: Literal["hadamard_smoothed"] = "hadamard_smoothed"
    groups: tuple[GroupName, ...] = ALL_GROUPS

    def __post_init__(self) -> None:
        """Reject a rotation of nothing.

        Raises:
            ConfigError: groups empty or repeated.
        """
        check_groups(self.groups)


@dataclass(frozen=True, slots=True)
class NoCentring:
    """Linears read their inputs as they are."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class ModalityCentring:
    """Take the centre of its modality from every input, and add what the float weight makes of it to the output.

    Exact in float: ``x W^T = (x - c_m) W^T + c_m W^T``, and the last term is a bias by modality. What is quantized, of
    weights and of activations, no longer has to carry it (``masq.transforms.centring``).

    Attributes:
        groups: the groups of linears whose inputs are centred.
        modalities: whose inputs. Without text, decoding has nothing to subtract.
    """

    kind: Literal["modality"] = "modality"
    groups: tuple[GroupName, ...] = ALL_GROUPS
    modalities: tuple[Literal["text", "vision", "audio"], ...] = ("text", "vision", "audio")

    def __post_init__(self) -> None:
        """Reject a centring of nothing.

        Raises:
            ConfigError: groups empty or repeated.
        """
        check_groups(self.groups)
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ConfigError(
                "centring needs at least one modality, each once",
                value=list(self.modalities),
                remedy="use method.centring=none",
            )


Rotation = NoRotation | HadamardRotation | SmoothedHadamardRotation
Centring = NoCentring | ModalityCentring
