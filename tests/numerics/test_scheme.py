"""Overrides of a scheme: what every linear of every block gets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from masq.errors import ConfigError
from masq.numerics.scheme import ALL_ROLES, LinearFormat, Override, Scheme

W4A6 = replace(Scheme.preset("w4a6"), name="mixed")


def bits(scheme: Scheme) -> dict[str, tuple[int, int | None]]:
    return {
        role: (fmt.weight.bits, None if fmt.activation is None else fmt.activation.bits)
        for role, fmt in scheme.formats.items()
    }


def test_without_overrides_every_linear_has_the_formats_of_the_scheme() -> None:
    expected = LinearFormat(W4A6.weight, W4A6.activation)
    assert W4A6.formats == dict.fromkeys(ALL_ROLES, expected)
    assert W4A6.for_block(3, 5) == W4A6
    assert Scheme.preset("w16a16").formats == {}
    assert bits(Scheme.preset("w4a16")) == dict.fromkeys(ALL_ROLES, (4, None))


def test_the_last_override_wins_and_skip_wins_over_all() -> None:
    scheme = replace(
        W4A6,
        overrides=(
            Override(roles=("down", "output"), weight_bits=8),
            Override(roles=("output",), skip=True),
            Override(roles=("down", "output", "up"), activation_bits=8),
            Override(roles=("up",), weight_bits=3),
        ),
    )
    found = bits(scheme.for_block(0, 1))
    assert "output" not in found
    assert (found["down"], found["up"], found["gate"]) == ((8, 8), (3, 8), (4, 6))
    assert scheme.quantized_roles == tuple(role for role in ALL_ROLES if role != "output")


def test_blocks_count_from_either_end() -> None:
    scheme = replace(W4A6, overrides=(Override(blocks=(0, -1), skip=True), Override(blocks=(1,), weight_bits=8)))
    found = [bits(scheme.for_block(index, 4)) for index in range(4)]
    assert found[0] == found[3] == {}
    assert set(found[1].values()) == {(8, 6)}
    assert set(found[2].values()) == {(4, 6)}
    assert scheme.quantized_roles == ALL_ROLES
    with pytest.raises(AssertionError, match="of a block"):
        _ = scheme.formats


def test_a_preset_keeps_its_name_for_itself() -> None:
    with pytest.raises(ConfigError, match="name of its own"):
        replace(Scheme.preset("w4a6"), overrides=(Override(blocks=(0,), skip=True),))
