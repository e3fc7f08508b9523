"""Perplexity per token in windows: a plain float64 loop, and what it must and must not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from masq.errors import ConfigError, DataError
from masq.evaluation.statistics import value
from masq.evaluation.token_perplexity import token_perplexity, windows
from masq.models.base import ModelAdapter
from masq.modules.modality import install

Make = Callable[..., ModelAdapter]
TEXTS = ["", " = A Tone = \n", "", " A tone is a sound , said to have one pitch . \n", " It ends ."]


@pytest.fixture
def adapter(make_model: Make) -> ModelAdapter:
    made = make_model()
    install(made)
    return made


def naive(adapter: ModelAdapter, length: int) -> list[list[float]]:
    """NLL in nats of every predicted token of every whole window, all in float64."""
    ids = adapter.tokenizer("\n\n".join(TEXTS))["input_ids"]
    model = adapter.model.double()
    found = []
    for start in range(0, len(ids) // length * length, length):
        window = ids[start : start + length]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0]
        found.append([-float(logits[at].log_softmax(-1)[window[at + 1]]) for at in range(length - 1)])
    return found


@pytest.mark.parametrize("length", [2, 7, 32, 64])
def test_it_is_that_of_a_plain_loop(adapter: ModelAdapter, length: int) -> None:
    found = token_perplexity(adapter, TEXTS, length)
    expected = naive(adapter, length)
    assert found.numerators == pytest.approx([sum(one) for one in expected], rel=1e-5)
    tokens = [nll for one in expected for nll in one]
    assert sum(found.counts) == len(tokens)
    assert value(found) == pytest.approx(math.exp(sum(tokens) / len(tokens)), rel=1e-5)
    assert found.metric == f"token_perplexity_{length}"
    assert not found.higher_is_better


def test_a_model_that_knows_nothing_is_as_perplexed_as_there_are_tokens(adapter: ModelAdapter) -> None:
    with torch.no_grad():
        adapter.head().weight.zero_()
    num_tokens = adapter.head().out_features
    assert value(token_perplexity(adapter, TEXTS, 16)) == pytest.approx(num_tokens, rel=1e-6)


def test_windows_do_not_see_each_other_and_the_rest_is_dropped(adapter: ModelAdapter) -> None:
    joined = "\n\n".join(TEXTS)
    whole = token_perplexity(adapter, [joined], 16)
    assert whole == token_perplexity(adapter, TEXTS, 16), "texts are joined by empty lines"
    assert whole.n == len(joined) // 16
    first = token_perplexity(adapter, [joined[:16]], 16)
    assert first.numerators == pytest.approx(whole.numerators[:1], rel=1e-6)
    changed = token_perplexity(adapter, ["#" * 16 + joined[16:]], 16)
    assert changed.numerators[1:] == whole.numerators[1:]
    assert changed.samples != whole.samples, "other texts do not pair"
    assert token_perplexity(adapter, [joined[: whole.n * 16]], 16) == whole


def test_finished_windows_are_kept(adapter: ModelAdapter, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    first = token_perplexity(adapter, TEXTS, 16, folder=tmp_path, progress=lambda *step: told.append(step))
    assert told[-1] == ("windows", first.n, first.n)
    assert first == token_perplexity(adapter, TEXTS, 16)
    calls: list[int] = []
    adapter.model.register_forward_pre_hook(lambda *_: calls.append(1))
    (tmp_path / "window-0001.json").unlink()
    assert token_perplexity(adapter, TEXTS, 16, folder=tmp_path) == first
    assert len(calls) == 1


def test_what_has_no_windows(adapter: ModelAdapter) -> None:
    with pytest.raises(DataError, match="must fill at least one window"):
        token_perplexity(adapter, ["short"])
    with pytest.raises(ConfigError, match="at least two tokens"):
        windows([1, 2, 3], 1)
