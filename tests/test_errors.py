from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from masq.errors import ConfigError, DataError, MasqError, near_matches, suggestion, unknown_name


def test_message_states_rule_value_and_remedy() -> None:
    error = ConfigError("bits must be even", value=3, remedy="use 4")
    assert str(error) == "bits must be even (got: 3). Use 4"
    assert (error.rule, error.value, error.remedy) == ("bits must be even", 3, "use 4")


def test_message_leaves_out_what_is_not_given() -> None:
    assert str(MasqError("it must rain")) == "it must rain"
    assert str(MasqError("it must rain", value=0)) == "it must rain (got: 0)"


def test_errors_are_value_errors_of_their_kind() -> None:
    assert issubclass(DataError, MasqError)
    assert issubclass(MasqError, ValueError)
    assert not issubclass(DataError, ConfigError)


def test_errors_survive_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(DataError("a rule", value=[1], remedy="a remedy")))
    assert type(error) is DataError
    assert str(error) == "a rule (got: [1]). A remedy"
    assert error.rule == "a rule"


def test_near_matches_ignore_case_and_stop_at_n() -> None:
    assert near_matches("MASQANT", ["masquant", "rtn"]) == ["masquant"]
    assert len(near_matches("w4a", ["w4a4", "w4a6", "w4a8", "w4a16"], n=2)) == 2
    assert near_matches("zzz", ["masquant", "rtn"]) == []


@given(st.text(min_size=1, max_size=12), st.lists(st.text(min_size=1, max_size=12), max_size=5))
def test_near_matches_are_options(name: str, options: list[str]) -> None:
    assert set(near_matches(name, options)) <= set(options)


def test_unknown_name_offers_near_matches_else_everything() -> None:
    assert str(unknown_name("method", "rtnn", ["rtn", "mas"])) == "unknown method (got: rtnn). Did you mean rtn?"
    assert str(unknown_name("method", "zzz", ["rtn", "mas"])) == "unknown method (got: zzz). Known: mas, rtn"
    assert str(unknown_name("method", "zzz", [])) == "unknown method (got: zzz). Known: none"


def test_suggestion_joins_several() -> None:
    assert suggestion("w4a9", ["w4a4", "w4a6", "w4a8"]) == "Did you mean w4a8, w4a6 or w4a4?"
