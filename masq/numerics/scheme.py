"""Number formats as frozen data: which tensor gets how many bits, at which granularity. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
CLIPPED_BITS = 4
"""Activations of more bits have levels enough for the whole range of a row."""


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
        clip: share of the largest magnitude of a row that the largest code stands for; what is beyond is cut off. Below
            1 for symmetric activations alone.
    """

    bits: int
    symmetric: bool = True
    granularity: Granularity = "per_channel"
    group_size: int | None = None
    clip: float = 1.0

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
        if not 0 < self.clip <= 1 or (self.clip < 1 and (self.granularity != "per_token" or not self.symmetric)):
            raise ConfigError(
                "clip must lie above 0 and not above 1, with symmetric activations alone below it",
                value=self.clip,
                remedy="set clip=1",
            )

    @property
    def divisor(self) -> float:
        """The largest magnitude of a row over its scale: ``qmax`` where nothing is cut off."""
        return self.qmax / self.clip

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -self.qmax if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """Formats of one linear: of its weight, and of its input (None for float)."""

    weight: TensorFormat
    activation: TensorFormat | None


@dataclass(frozen=True, slots=True)
class NoTowers:
    """The vision and audio towers stay in float."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class RoundedTowers:
    """The linears of the vision and audio towers, and of what projects their outputs, are rounded to nearest.

    A tower sees one modality, so there is nothing to smooth or to correct by modality. Convolutions and embeddings stay
    in float.

    Attributes:
        weight: format of weights.
        activation: format of the linears' inputs, None for float.
    """

    weight: TensorFormat
    activation: TensorFormat | None = None
    kind: Literal["nearest"] = "nearest"

    def __post_init__(self) -> None:
        """Reject formats used for the wrong tensor.

        Raises:
            ConfigError: weights per token, groups of input channels, or activations that are not symmetric per token.
        """
        _check_weight(self.weight)
        if self.weight.granularity == "per_group":
            raise ConfigError(
                "weights of towers have one scale per output channel: groups divide few of their sizes",
                value="weight.granularity=per_group",
                remedy="set weight.granularity=per_channel",
            )
        _check_activation(self.activation)

    @property
    def name(self) -> str:
        """For folders and tables: bits of weights and activations, as presets of schemes are called."""
        return f"w{self.weight.bits}a{self.activation.bits if self.activation else 16}"


Towers = NoTowers | RoundedTowers


@dataclass(frozen=True, slots=True)
class Override:
    """Another treatment of some linears; of several that fit one linear ``skip`` wins, then the last.

    Attributes:
        roles: the linears it is about, None for all.
        blocks: the decoder blocks it is about by number, negative ones counted from the last; None for all.
        skip: leave them in float.
        weight_bits: bits of their weights, None for those of the scheme.
        activation_bits: bits of their inputs, None for those of the scheme.
    """

    roles: tuple[RoleName, ...] | None = None
    blocks: tuple[int, ...] | None = None
    skip: bool = False
    weight_bits: int | None = None
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        """Reject overrides that mean nothing.

        Raises:
            ConfigError: nothing or two things asked for, bits out of range, or roles or blocks empty or repeated.
        """
        bits = [one for one in (self.weight_bits, self.activation_bits) if one is not None]
        if self.skip == bool(bits):
            raise ConfigError(
                "an override must either skip its linears or give them other bits",
                value=f"skip={self.skip}, weight_bits={self.weight_bits}, activation_bits={self.activation_bits}",
            )
        if not all(2 <= one <= _MAX_BITS for one in bits):
            raise ConfigError("bits must lie between 2 and 8", value=bits, remedy="set skip: true to leave it in float")
        for name, values in (("roles", self.roles), ("blocks", self.blocks)):
            if values is not None and (not values or len(set(values)) != len(values)):
                raise ConfigError(
                    f"{name} must name at least one, each once", value=list(values), remedy="set null for all"
                )


@dataclass(frozen=True, slots=True)
class Scheme:
    """Formats of the decoder linears. Attention, the KV cache and the head stay in float, towers have their own.

    Attributes:
        name: shown in tables; the name of a preset means exactly that preset's formats.
        weight: format of weights, None for float.
        activation: format of the linears' inputs, None for float.
        roles: the linears that are quantized.
        overrides: linears or blocks that are treated otherwise.
    """

    name: str
    weight: TensorFormat | None
    activation: TensorFormat | None
    roles: tuple[RoleName, ...] = ALL_ROLES
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        """Reject schemes that mean nothing.

        Raises:
            ConfigError: formats used for the wrong tensor, integer activations without integer weights, repeated
                roles, asymmetric activations, overrides of what is not quantized, or a preset's name on other formats,
                fewer roles or overrides.
        """
        _check_weight(self.weight)
        _check_activation(self.activation)
        if self.weight is None and self.activation is not None:
            raise ConfigError("activations are quantized only together with weights", value="weight=null")
        if not self.roles or len(set(self.roles)) != len(self.roles):
            raise ConfigError("roles must name at least one linear, each once", value=list(self.roles))
        for override in self.overrides:
            self._check_override(override)
        formats = _PRESETS.get(self.name)
        given = (self.weight, self.activation, set(self.roles), ())
        if formats is not None and (*formats, set(ALL_ROLES), self.overrides) != given:
            raise ConfigError(
                f"the name {self.name} stands for other formats or roles",
                value=f"weight={self.weight}, activation={self.activation}, roles={', '.join(self.roles)}, "
                f"{len(self.overrides)} overrides",
                remedy="give a changed scheme a name of its own: scheme.name=NAME",
            )

    def _check_override(self, override: Override) -> None:
        foreign = [role for role in override.roles or () if role not in self.roles]
        if foreign or self.weight is None:
            raise ConfigError(
                "an override must be about linears that the scheme quantizes",
                value=", ".join(foreign) or "scheme.weight=null",
                remedy="add them to scheme.roles, or leave them out",
            )
        if override.activation_bits is not None and self.activation is None:
            raise ConfigError(
                "activation_bits overrides the bits of quantized activations",
                value=f"activation_bits={override.activation_bits}, scheme.activation=null",
                remedy="leave it out, or take a scheme that quantizes activations",
            )

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.weight is None

    @property
    def quantized_roles(self) -> tuple[RoleName, ...]:
        """The linears that are quantized in some block, as far as overrides of all blocks tell."""
        everywhere = [one for one in self.overrides if one.skip and one.blocks is None]
        return tuple(role for role in self.roles if not any(role in (one.roles or self.roles) for one in everywhere))

    def for_block(self, index: int, num_blocks: int) -> Scheme:
        """The scheme of one decoder block: overrides of other blocks are gone, the others are about every block.

        Args:
            index: number of the block, from 0.
            num_blocks: how many there are, at least as many as the overrides name.
        """
        kept = [
            replace(one, blocks=None)
            for one in self.overrides
            if one.blocks is None or index in {block % num_blocks for block in one.blocks}
        ]
        return replace(self, overrides=tuple(kept))

    def clipped(self, clip: float) -> Scheme:
        """The scheme with activations of up to ``CLIPPED_BITS`` cut off at a share of the range of their rows."""
        if self.activation is None or clip == 1:
            return self
        return replace(self, name=f"{self.name}, clipped", activation=replace(self.activation, clip=clip))

    @property
    def formats(self) -> dict[str, LinearFormat]:
        """Formats of the linears that are quantized, by role; of a scheme ``for_block`` if its overrides name any."""
        assert all(one.blocks is None for one in self.overrides), "ask the scheme of a block"
        found: dict[str, LinearFormat] = {}
        for role in self.roles if self.weight is not None else ():
            overrides = [one for one in self.overrides if one.roles is None or role in one.roles]
            if not any(one.skip for one in overrides):
                assert self.weight is not None
                found[role] = _overridden(self.weight, self.activation, overrides)
        return found

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


def _check_weight(weight: TensorFormat | None) -> None:
    if weight is not None and weight.granularity == "per_token":
        raise ConfigError("weight.granularity must be per_channel or per_group", value=weight.granularity)


def _check_activation(activation: TensorFormat | None) -> None:
    if activation is not None and activation.granularity != "per_token":
        raise ConfigError("activation.granularity must be per_token", value=activation.granularity)
    if activation is not None and not activation.symmetric:
        raise ConfigError(
            "activations are symmetric: the integer GEMM has no zero point for them",
            value="activation.symmetric=false",
            remedy="set activation.symmetric=true",
        )


def _overridden(weight: TensorFormat, activation: TensorFormat | None, overrides: Sequence[Override]) -> LinearFormat:
    for one in overrides:
        if one.weight_bits is not None:
            weight = replace(weight, bits=one.weight_bits)
        if one.activation_bits is not None and activation is not None:
            activation = replace(activation, bits=one.activation_bits)
    if activation is not None and activation.bits > CLIPPED_BITS:
        activation = replace(activation, clip=1.0)
    return LinearFormat(weight, activation)


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
