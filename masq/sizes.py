"""Whether a scheme and the stages of a method fit the sizes of a model. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence

from masq.compensation.config import Compensation
from masq.errors import ConfigError
from masq.models.architecture import input_sizes, linear_shapes
from masq.models.config import Architecture
from masq.numerics.paley import factor
from masq.numerics.scheme import GROUP_ROLES, GroupName, Scheme
from masq.transforms.frame import Rotation


def check(
    scheme: Scheme, rotation: Rotation, compensation: Compensation, architecture: Architecture, model: str
) -> None:
    """Check blocks, groups, rotations and ranks against the sizes of a model.

    Args:
        scheme: number formats.
        rotation: of the method.
        compensation: of the method.
        architecture: the sizes.
        model: its name, for messages.

    Raises:
        ConfigError: an override of a block that is not there or of all there is, a group size that does not divide, a
            rotation of a size that has no Hadamard matrix, or a rank above what a linear has.
    """
    _check_blocks(scheme, architecture.num_layers, model)
    _check_group_size(scheme, architecture, model)
    _check_rotation(rotation, architecture)
    _check_rank(compensation, scheme, architecture, model)


def roles_in(groups: Sequence[GroupName], roles: Sequence[str]) -> list[str]:
    """The roles of ``groups`` that are among ``roles``, in order."""
    return [role for group in groups for role in GROUP_ROLES[group] if role in roles]


def _check_blocks(scheme: Scheme, num_blocks: int, model: str) -> None:
    named = {block for one in scheme.overrides for block in one.blocks or ()}
    absent = sorted(block for block in named if not -num_blocks <= block < num_blocks)
    if absent:
        raise ConfigError(
            f"overrides name blocks of {model} from 0 to {num_blocks - 1}, or from -1 back to -{num_blocks}",
            value=f"scheme.overrides name {', '.join(map(str, absent))}",
            remedy="leave them out",
        )
    if scheme.weight is not None and not any(
        scheme.for_block(index, num_blocks).formats for index in range(num_blocks)
    ):
        raise ConfigError(
            "overrides must leave a linear to quantize",
            value=f"scheme {scheme.name} skips every one",
            remedy="skip fewer, or use method=none for the float model",
        )


def _check_group_size(scheme: Scheme, architecture: Architecture, model: str) -> None:
    weight = scheme.weight
    if weight is None or weight.group_size is None:
        return
    sizes = input_sizes(architecture, scheme.quantized_roles)
    common = math.gcd(*sizes)
    if common % weight.group_size:
        remedy = f"Name a scheme of your own: scheme.name=NAME scheme.weight.group_size=N, with N a divisor of {common}"
        if common % 64 == 0:
            remedy = f"Use scheme=w4a16_g64, or another divisor of {common}"
        raise ConfigError(
            f"the group size must divide the input channels of every quantized linear of {model}",
            value=f"scheme {scheme.name} has groups of {weight.group_size}, inputs have {sizes} channels",
            remedy=remedy,
        )


def _check_rotation(rotation: Rotation, architecture: Architecture) -> None:
    if rotation.kind == "none":
        return
    if rotation.kind == "hadamard_smoothed":
        shapes = linear_shapes(architecture)
        sizes = {f"groups, {group}": shapes[GROUP_ROLES[group][0]][1] for group in rotation.groups}
    else:
        head_dim = architecture.head_dim or architecture.hidden_size // architecture.num_heads
        sizes = {
            "residual": architecture.hidden_size if rotation.residual else 1,
            "heads": head_dim if rotation.heads else 1,
            "down": architecture.intermediate_size if rotation.down else 1,
        }
    for name, size in sizes.items():
        try:
            factor(size)
        except ConfigError as error:
            remedy = f"set method.rotation.{name}=false"
            if rotation.kind == "hadamard_smoothed":
                remedy = "leave the group out of method.rotation.groups"
            raise ConfigError(f"method.rotation.{name}: {error.rule}", value=error.value, remedy=remedy) from None


def _check_rank(compensation: Compensation, scheme: Scheme, architecture: Architecture, model: str) -> None:
    if compensation.kind == "none" or not compensation.rank:
        return
    shapes = linear_shapes(architecture)
    full = {role: min(shapes[role]) for role in roles_in(compensation.groups, scheme.quantized_roles)}
    role = min(full, key=lambda one: full[one], default=None)
    if role is not None and compensation.rank > full[role]:
        raise ConfigError(
            f"the rank of a correction is at most the smaller side of its linear, {full[role]} for {role} of {model}",
            value=f"method.compensation.rank={compensation.rank}",
            remedy="lower it, leave the group out, or set rank_ratio and rank=null",
        )
