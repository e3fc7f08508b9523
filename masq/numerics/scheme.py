"""Number formats as frozen data: which tensor gets how many bits, at which granularity. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from masq.errors import ConfigError, unknown_name

Granularity = Literal["per_channel", "per_group", "per_token"]
RoleName = Literal["query", "key", "value", "output", "gate", "up", "down"]
GroupName = Literal["qkv", "output", "gate_up", "down"]

GROUP_ROLES: dict[GroupName, tuple[RoleName, ...]] = {
    "qkv": ("query", "key", "value"),
    "output": ("output",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
"""Linears that read the same input, by group name, in the order in which a block computes them."""

ALL_ROLES: tuple[RoleName, ...] = tuple(role for roles in GROUP_ROLES.values() for role in roles)
_MAX_BITS = 8


@dataclass(frozen=True, slots=True)
class TensorFormat:
    """Integer format of one tensor.

    Attributes:
        bits: 2 to 8.
        symmetric: codes in [-qmax, qmax] without a zero point (restricted range: 15 levels at 4 bits);
            else codes in [0, 2^bits - 1] with one.
        granularity: what shares a scale. ``per_channel``: an output channel of a weight [out, in], scale [out, 1];
            ``per_group``: ``group_size`` consecutive input channels of one, scale [out, in / group_size];
            ``per_token``: a row of activations [..., d], scale [..., 1], computed on the fly.
        group_size: with ``per_group`` alone.
    """

    bits: int
    symmetric: bool = True
    granularity: Granularity = "per_channel"
    group_size: int | None = None

    def __post_init__(self) -> None:
        """Reject formats that mean nothing.

        Raises:
            ConfigError: bits out of range, or group size and granularity disagree.
        """
        if not 2 <= self.bits <= _MAX_BITS:
            raise ConfigError("bits must lie between 2 and 8", value=self.bits, remedy="set null to leave it in float")
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise ConfigError(
                "group_size belongs to granularity per_group, and per_group needs one",
                value=f"granularity={self.granularity}, group_size={self.group_size}",
            )
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError("group_size must be positive", value=self.group_size)

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -self.qmax if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1


@dataclass(frozen=True, slots=True)
class Scheme:
    """Formats of the decoder linears. Attention, the KV cache, the towers and the head stay in float.

    Attributes:
        name: shown in tables; the name of a preset means exactly that preset's formats.
        weight: format of weights, None for float.
        activation: format of the linears' inputs, None for float.
        roles: the linears that are quantized.
    """

    name: str
    weight: TensorFormat | None
    activation: TensorFormat | None
    roles: tuple[RoleName, ...] = ALL_ROLES

    def __post_init__(self) -> None:
        """Reject schemes that mean nothing.

        Raises:
            ConfigError: formats used for the wrong tensor, integer activations without integer weights, repeated
                roles, asymmetric activations, or a preset's name on other formats or fewer roles.
        """
        if self.weight is not None and self.weight.granularity == "per_token":
            raise ConfigError("weight.granularity must be per_channel or per_group", value=self.weight.granularity)
        if self.activation is not None and self.activation.granularity != "per_token":
            raise ConfigError("activation.granularity must be per_token", value=self.activation.granularity)
        if self.activation is not None and not self.activation.symmetric:
            raise ConfigError(
                "activations are symmetric: the integer GEMM has no zero point for them",
                value="activation.symmetric=false",
                remedy="set activation.symmetric=true",
            )
        if self.weight is None and self.activation is not None:
            raise ConfigError("activations are quantized only together with weights", value="weight=null")
        if not self.roles or len(set(self.roles)) != len(self.roles):
            raise ConfigError("roles must name at least one linear, each once", value=list(self.roles))
        formats = _PRESETS.get(self.name)
        if formats is not None and (*formats, set(ALL_ROLES)) != (self.weight, self.activation, set(self.roles)):
            raise ConfigError(
                f"the name {self.name} stands for other formats or roles",
                value=f"weight={self.weight}, activation={self.activation}, roles={', '.join(self.roles)}",
                remedy="give a changed scheme a name of its own: scheme.name=NAME",
            )

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.weight is None

    @classmethod
    def preset(cls, name: str) -> Scheme:
        """The preset called ``name``, on all seven linears.

        ``wNaM`` is symmetric: weights per output channel, activations per token and dynamic. ``w4a16`` alone is
        asymmetric with groups of 128 input channels, as in the tables of arXiv 2603.04800; ``w4a16_g64`` is the same
        for models whose sizes 128 does not divide.

        Raises:
            ConfigError: no such preset; near matches are listed.
        """
        if name not in _PRESETS:
            raise unknown_name("scheme", name, _PRESETS)
        weight, activation = _PRESETS[name]
        return cls(name, weight, activation)

    @staticmethod
    def preset_names() -> tuple[str, ...]:
        """Names that ``preset`` knows."""
        return tuple(_PRESETS)


def _per_token(bits: int) -> TensorFormat:
    return TensorFormat(bits, granularity="per_token")


_PRESETS: dict[str, tuple[TensorFormat | None, TensorFormat | None]] = {
    "w16a16": (None, None),
    "w8a8": (TensorFormat(8), _per_token(8)),
    "w4a8": (TensorFormat(4), _per_token(8)),
    "w4a6": (TensorFormat(4), _per_token(6)),
    "w4a4": (TensorFormat(4), _per_token(4)),
    "w4a16": (TensorFormat(4, symmetric=False, granularity="per_group", group_size=128), None),
    "w4a16_g64": (TensorFormat(4, symmetric=False, granularity="per_group", group_size=64), None),
}
