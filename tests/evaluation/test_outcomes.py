from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masq.errors import DataError
from masq.evaluation.outcomes import Outcomes, digests, hash_samples, number_groups

SAMPLES = hash_samples(["a", "b", "c"])


def exact_match(**changes: Any) -> Outcomes:
    fields: dict[str, Any] = {"metric": "exact_match", "higher_is_better": True, "samples": SAMPLES}
    return Outcomes(**{**fields, "numerators": [True, 0, 1.0], **changes})


def test_fields_become_tuples_of_numbers_whatever_they_came_as() -> None:
    outcomes = exact_match(denominators=np.array([1, 1, 1]), groups=[0, 0, 1])
    assert outcomes.numerators == (1.0, 0.0, 1.0)
    assert outcomes.counts == outcomes.denominators == (1.0, 1.0, 1.0) == exact_match().counts
    assert {type(value) for value in outcomes.numerators + outcomes.counts} == {float}
    assert outcomes.n == 3
    assert exact_match(denominators=[1, 1, 1]) == exact_match()


def test_accuracy_is_stored_as_one_string() -> None:
    outcomes = exact_match(answers=digests(["yes", "no", "yes"]), groups=(0, 0, 1))
    plain = outcomes.to_dict()
    assert (plain["numerators"], plain["denominators"], plain["groups"]) == ("101", None, [0, 0, 1])
    first, second, third = plain["answers"].split(" ")
    assert first == third != second and len(first) == 8
    assert set(plain) == set(Outcomes.__dataclass_fields__)
    assert Outcomes.from_dict(json.loads(json.dumps(plain))) == outcomes


def test_whole_numbers_are_stored_without_decimals_and_others_exactly() -> None:
    errors = Outcomes("wer", False, SAMPLES, (0, 1, 7), (3, 2, 5))
    assert json.dumps(errors.to_dict()["numerators"]) == "[0, 1, 7]"
    assert json.dumps(errors.to_dict()["denominators"]) == "[3, 2, 5]"
    nll = Outcomes("perplexity", False, SAMPLES, (0.1, 1 / 3, 7e-300), (1, 1, 1), transform="exp")
    assert nll.to_dict()["denominators"] is None
    for outcomes in (errors, nll):
        again = Outcomes.from_dict(json.loads(json.dumps(outcomes.to_dict())))
        assert again == outcomes and {type(value) for value in again.numerators} == {float}


@given(
    st.lists(st.tuples(st.floats(-1e9, 1e9), st.integers(1, 99), st.integers(0, 3)), min_size=1, max_size=9),
    st.sampled_from(["identity", "exp"]),
    st.booleans(),
)
def test_round_trip(rows: list[tuple[float, int, int]], transform: Any, better: bool) -> None:
    numerators, counts, groups = zip(*rows, strict=True)
    outcomes = Outcomes("m", better, SAMPLES, numerators, counts, transform, groups, digests(map(str, counts)))
    assert Outcomes.from_dict(json.loads(json.dumps(outcomes.to_dict()))) == outcomes


@pytest.mark.parametrize(
    ("outcomes", "binary"),
    [
        (exact_match(), True),
        (exact_match(numerators=[0.5, 0, 1]), False),
        (exact_match(denominators=[1, 2, 1]), False),
        (exact_match(transform="exp"), False),
    ],
)
def test_binary_means_right_or_wrong_and_alike(outcomes: Outcomes, binary: bool) -> None:
    assert outcomes.is_binary is binary
    assert isinstance(outcomes.to_dict()["numerators"], str) is binary


def test_clusters_of_one_are_none() -> None:
    assert not exact_match().is_clustered
    assert not exact_match(groups=(4, 2, 9)).is_clustered
    assert exact_match(groups=(4, 2, 4)).is_clustered


def test_sample_hash_depends_on_ids_and_their_order() -> None:
    hashes = [hash_samples(ids) for ids in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], [])]
    assert len(set(hashes)) == 5
    assert hash_samples(iter(["a", "b"])) == hashes[0]


def test_groups_are_numbered_as_they_appear() -> None:
    assert number_groups(["x", "y", "x", ("z", 1), "y"]) == (0, 1, 0, 2, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numerators": []}, "at least one sample"),
        ({"transform": "log"}, r"transform must be one of identity, exp \(got: log\)"),
        ({"samples": "abc"}, "must be a SHA-256 in hexadecimal .*Use hash_samples"),
        ({"denominators": [1, 1]}, r"denominators must be as many as numerators \(got: 2 for 3\)"),
        ({"groups": [1]}, r"groups must be as many as numerators \(got: 1 for 3\)"),
        ({"answers": ["a"] * 4}, r"answers must be as many as numerators \(got: 4 for 3\)"),
        ({"answers": ["a", "b", "c d"]}, "without spaces"),
        ({"answers": ["a", "b", ""]}, "without spaces"),
        ({"numerators": [1, math.nan, 0]}, "must be finite"),
        ({"denominators": [1, math.inf, 1]}, "must be finite"),
        ({"denominators": [1, -1, 1]}, "must not be negative"),
        ({"numerators": [0, 0, 0], "denominators": [0, 0, 0]}, "nor all 0"),
        ({"denominators": [0, 1, 1]}, "numerator must be 0 where its denominator is 0"),
    ],
)
def test_fields_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        exact_match(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": 1}, "must hold exactly metric, .*more"),
        ({"metric": 3}, "metric of outcomes must be text"),
        ({"higher_is_better": 1}, "higher_is_better of outcomes must be true or false"),
        ({"samples": None}, "samples of outcomes must be text"),
        ({"numerators": "102"}, "numerators of outcomes must be a list of numbers, or a text of zeros and ones"),
        ({"numerators": [1, "0", 1]}, "numerators of outcomes"),
        ({"numerators": [1, True, 1]}, "numerators of outcomes"),
        ({"denominators": "111"}, "denominators of outcomes must be a list of numbers or null"),
        ({"transform": ["exp"]}, "transform of outcomes"),
        ({"groups": [0, 0.5, 1]}, "groups of outcomes must be a list of whole numbers or null"),
        ({"answers": ["a", "b", "c"]}, "answers of outcomes must be text or null"),
        ({"answers": "a b"}, "as many as numerators"),
    ],
)
def test_stored_outcomes_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Outcomes.from_dict({**exact_match().to_dict(), **changes})


@pytest.mark.parametrize("plain", [None, [], {}, {"metric": "wer"}])
def test_what_is_no_outcomes_at_all(plain: object) -> None:
    with pytest.raises(DataError, match="must hold exactly"):
        Outcomes.from_dict(plain)
