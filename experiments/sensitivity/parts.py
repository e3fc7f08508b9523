"""The parts of a decoder that are rounded alone, and what of them is rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from masq.errors import ConfigError
from masq.models.base import Role
from masq.numerics.scheme import LinearFormat, Scheme

Kind = Literal["weights", "activations", "both"]

ALL = "all"
KINDS: tuple[Kind, ...] = ("weights", "activations", "both")


@dataclass(frozen=True)
class Part:
    """Some linears of a decoder.

    Attributes:
        name: ``all``, a role, or ``block N``, N counted from 0.
        roles: the linears of each block.
        blocks: numbers of the blocks, ascending.
    """

    name: str
    roles: tuple[Role, ...]
    blocks: tuple[int, ...]

    @property
    def first(self) -> int:
        """The first block that is not as in the float model."""
        return self.blocks[0]


def block_name(index: int) -> str:
    """Name of the part that is all roles of block ``index``."""
    return f"block {index}"


def parts_of(scheme: Scheme, num_blocks: int) -> list[Part]:
    """The whole decoder, every role over all blocks, every block over all roles, ascending in their first block.

    Args:
        scheme: its roles are the ones there are.
        num_blocks: decoder blocks.
    """
    roles, blocks = tuple(Role(role) for role in scheme.roles), tuple(range(num_blocks))
    return [
        Part(ALL, roles, blocks),
        *(Part(role.value, (role,), blocks) for role in roles),
        *(Part(block_name(index), roles, (index,)) for index in blocks),
    ]


def kinds_of(fmt: LinearFormat) -> tuple[Kind, ...]:
    """What can be rounded: weights alone where activations stay in float."""
    return KINDS if fmt.activation is not None else ("weights",)


def bits_of(fmt: LinearFormat, kind: Kind) -> dict[str, int | None]:
    """Bits of ``weight`` and ``activation`` codes in a profile of ``kind``, None for what stays in float."""
    activation = None if fmt.activation is None or kind == "weights" else fmt.activation.bits
    return {"weight": None if kind == "activations" else fmt.weight.bits, "activation": activation}


def format_of(scheme: Scheme) -> LinearFormat:
    """The one format of all linears of ``scheme``.

    Raises:
        ConfigError: the scheme is float, or treats some linears otherwise.
    """
    if scheme.weight is None:
        raise ConfigError(
            "a profile needs something to round", value=f"scheme={scheme.name}", remedy="choose fewer bits"
        )
    if scheme.overrides:
        raise ConfigError(
            "parts are compared at one format, and overrides give some linears another",
            value=f"{len(scheme.overrides)} overrides in scheme {scheme.name}",
            remedy="leave scheme.overrides out",
        )
    return LinearFormat(scheme.weight, scheme.activation)
