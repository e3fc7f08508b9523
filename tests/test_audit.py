"""The audit knows every hyper-parameter of every method, and says whose value each is."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import get_args

import pytest

from masq.audit import ORIGINS, SLOTS, audit, claims
from masq.cli import main
from masq.compensation.config import Compensation
from masq.compose import compose
from masq.config import CalibrationConfig, decode
from masq.rounding.config import ClipSearch, Rounding
from masq.transforms.config import Smoothing
from masq.transforms.frame import Centring, Rotation
from tests.composing import names, overrides_for, plain

KINDS = {
    "rotation": Rotation,
    "centring": Centring,
    "smoothing": Smoothing,
    "rounding": Rounding,
    "compensation": Compensation,
}
METHODS = names("method")


def expected(kind: type) -> set[str]:
    names = {field.name for field in fields(kind)} - {"kind"}
    return names | {f"clip.{field.name}" for field in fields(ClipSearch) if "clip" in names}


@pytest.mark.parametrize("slot", SLOTS)
def test_every_field_of_every_kind_has_claims_and_no_other(slot: str) -> None:
    known = claims()["fields"][slot]
    kinds = {_kind(kind): kind for kind in get_args(KINDS[slot])}
    assert set(known) == set(kinds)
    for name, kind in kinds.items():
        assert set(known[name]) == expected(kind), (slot, name)


def _kind(kind: type) -> str:
    default = next(field for field in fields(kind) if field.name == "kind").default
    assert default is not MISSING
    return default


def test_claims_are_well_formed() -> None:
    for slot, kinds in claims()["fields"].items():
        groups = kinds.values() if slot in SLOTS else [kinds]
        for known in groups:
            for name, origins in known.items():
                assert set(origins) <= set(ORIGINS), (slot, name)
                assert all(claim["where"] and ("value" in claim) != ("says" in claim) for claim in origins.values())
    names = {f"{slot}.{kind}" for slot in SLOTS for kind in claims()["fields"][slot]}
    assert all(set(one["concerns"]) <= names for one in claims()["contradictions"])


@pytest.mark.parametrize("method", METHODS)
def test_no_value_of_a_listed_method_is_without_a_source(method: str) -> None:
    findings = audit(decode(plain(f"method={method}")))
    assert [found.key for found in findings if found.origin == "set here"] == []
    assert {f"calibration.{field.name}" for field in fields(CalibrationConfig)} - {found.key for found in findings} == {
        "calibration.batch_size",
        "calibration.cache",
    }


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a6", "w4a4", "w4a16", "w4a16_g64"])
def test_the_grids_of_every_preset_have_sources(scheme: str) -> None:
    told = plain(*overrides_for("scheme", scheme))
    found = {one.key: one for one in audit(decode(told)) if one.key.startswith("scheme.")}
    assert {"scheme.weight.symmetric", "scheme.weight.group_size", "scheme.roles", "scheme.overrides"} <= set(found)
    assert ("scheme.activation.granularity" in found) == ("a16" not in scheme)
    assert [key for key, one in found.items() if one.origin == "set here"] == []
    told["scheme"] |= {"name": "mixed", "overrides": [{"roles": ["down"], "skip": True}]}
    mixed = audit(decode(told))
    assert next(one for one in mixed if one.key == "scheme.overrides").origin == "set here"


def test_the_sources_of_masquant_contradict_each_other_visibly() -> None:
    by_key = {found.key: found for found in audit(decode(plain("method=masquant")))}
    weights = by_key["method.smoothing.loss_weights"]
    assert (weights.origin, weights.where) == ("paper", "MASQuant, equation 14")
    assert any(other.startswith("reference code: text 1.0, vision 0.5") for other in weights.others)
    assert by_key["method.compensation.rank_ratio"].origin == "reference code"
    assert any("not given" in other for other in by_key["method.compensation.rank_ratio"].others)


def test_a_changed_value_is_named_as_such() -> None:
    by_key = {f.key: f for f in audit(compose(["method=masquant", "method.compensation.rank_ratio=0.3"]))}
    assert by_key["method.compensation.rank_ratio"].origin == "set here"
    assert any("0.05" in other for other in by_key["method.compensation.rank_ratio"].others)


def test_the_command_prints_sources_and_contradictions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "method=masquant"]) == 0
    shown = capsys.readouterr().out
    assert "| method.smoothing.learning_rate" in shown
    assert "weight during learning" in shown
    assert main(["audit", "method=rtn"]) == 0
    assert "Where MASQuant's paper" not in capsys.readouterr().out
