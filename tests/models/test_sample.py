from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from masq.errors import DataError
from masq.models.sample import Sample

GOOD = Sample("7", "choice", "The cat sat", "on the mat", choices=("on the mat", "in a tree"))


def test_choices_make_a_sample_of_text_that_is_not_prose() -> None:
    assert not GOOD.is_prose
    assert [modality.name for modality in GOOD.modalities] == ["TEXT"]
    assert Sample("1", "read", "q", "a").choices == ()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"choices": ("on the mat",)}, "at least two choices"),
        ({"choices": ("on the mat", "in a tree", "in a tree")}, "choices must be distinct"),
        ({"answer": "on the hat"}, "the answer must be among the choices.*'on the hat'"),
        ({"image": b"x"}, "text alone"),
        ({"audio": b"x"}, "text alone"),
        ({"question": ""}, "choices need a context"),
        ({"question": "The cat sat "}, "must not end in white space"),
        ({"choices": ("on the mat", " in a tree")}, "begin with white space"),
        ({"choices": ("on the mat", "")}, "must not be empty"),
    ],
)
def test_choices_that_cannot_be_scored_are_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(DataError, match=rule) as caught:
        dataclasses.replace(GOOD, **changes)
    assert "sample 7" in str(caught.value)


def test_hashes_cover_context_choices_and_their_order() -> None:
    changes: list[dict[str, Any]] = [
        {"question": "The dog sat"},
        {"answer": "in a tree"},
        {"choices": ("in a tree", "on the mat")},
        {"choices": ("on the mat", "in a tre", "e")},
        {"choices": ()},
    ]
    variants = [GOOD, *(dataclasses.replace(GOOD, **change) for change in changes)]
    assert len({sample.content_hash() for sample in variants}) == len(variants)
    same_context = [sample.content_hashes().get("context") for sample in variants[2:5]]
    assert set(same_context) == {GOOD.content_hashes()["context"]}


def test_hashes_of_other_samples_are_what_they_were() -> None:
    """Golden: identities of published records follow from it."""
    assert Sample("1", "read", "q", "a").content_hash().startswith("c1774600ed122d8d")
