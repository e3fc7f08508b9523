"""Which kernel runs a linear: the first that can, or the one asked for, with reasons where it cannot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from masq import kernels
from masq.errors import ConfigError
from masq.kernels import AUTO, KERNELS, PREFERENCE, select
from masq.kernels.base import LinearSpec
from masq.numerics.scheme import LinearFormat, TensorFormat
from masq.registry import Registry

INT8 = TensorFormat(8, granularity="per_token")
SPEC = LinearSpec(64, 48, LinearFormat(TensorFormat(4), INT8), "cpu")
FORMATS = [
    LinearFormat(weight, activation)
    for weight in (
        TensorFormat(8),
        TensorFormat(3),
        TensorFormat(4, symmetric=False),
        TensorFormat(4, symmetric=False, granularity="per_group", group_size=7),
    )
    for activation in (INT8, None)
]


@pytest.fixture
def refusals(monkeypatch):
    """Reasons by kernel, to be filled by a test; the kernels themselves do nothing else."""
    reasons: dict[str, list[str]] = {name: [] for name in PREFERENCE}
    registry: Registry = Registry("kernel")
    for name in PREFERENCE:
        made = SimpleNamespace(name=name, not_supported_reasons=lambda _spec, name=name: reasons[name])
        registry.register(name, lambda made=made: made)
    monkeypatch.setattr(kernels, "KERNELS", registry)
    return reasons


def test_every_kernel_has_the_name_under_which_it_is_registered():
    assert sorted(PREFERENCE) == KERNELS.names()
    assert {name: KERNELS.get(name).name for name in PREFERENCE} == {name: name for name in PREFERENCE}


@pytest.mark.parametrize("num_refused", range(len(PREFERENCE)))
def test_auto_takes_the_first_that_can(refusals, num_refused):
    for name in PREFERENCE[:num_refused]:
        refusals[name].append("not today")
    assert select(AUTO, SPEC).name == PREFERENCE[num_refused]


@pytest.mark.parametrize("name", PREFERENCE)
def test_a_kernel_that_is_asked_for_is_taken(refusals, name):
    assert select(name, SPEC).name == name


def test_a_kernel_that_is_asked_for_is_not_replaced(refusals):
    refusals["cpu"] += ["no compiler", "no luck"]
    with pytest.raises(ConfigError, match="64 inputs and 48 outputs") as caught:
        select("cpu", SPEC)
    message = str(caught.value)
    assert "cpu: no compiler; no luck" in message
    assert "torch:" not in message
    assert f"kernel={AUTO}" in message
    assert all(name in message for name in PREFERENCE)


def test_where_none_can_every_reason_is_told(refusals):
    for name in PREFERENCE:
        refusals[name].append(f"why not {name}")
    with pytest.raises(ConfigError) as caught:
        select(AUTO, SPEC)
    assert ", ".join(f"{name}: why not {name}" for name in PREFERENCE) in str(caught.value)


@pytest.mark.parametrize(("given", "meant"), [("torhc", "torch"), ("refrence", "reference"), ("cpus", "cpu")])
def test_a_name_that_nearly_matches(given, meant):
    with pytest.raises(ConfigError, match="unknown kernel") as caught:
        select(given, SPEC)
    assert given in str(caught.value)
    assert meant in str(caught.value)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_some_kernel_runs_every_format_everywhere(fmt, device):
    spec = LinearSpec(21, 5, fmt, device)
    assert not KERNELS.get(PREFERENCE[-1])().not_supported_reasons(spec)
    assert select(AUTO, spec).name in PREFERENCE


def test_our_own_kernels_say_that_they_need_a_processor():
    spec = LinearSpec(64, 48, SPEC.format, "cuda")
    with pytest.raises(ConfigError, match="tensors on cuda"):
        select("cpu", spec)
