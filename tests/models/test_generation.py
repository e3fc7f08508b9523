import pytest
import torch
from transformers import GenerationConfig

from masq.errors import ModelError
from masq.models.generation import _cut, end_ids
from masq.models.zoo import nano
from tests.nano_fixtures import media_of


def samples_of(adapter):
    media = media_of(adapter)
    kinds = [media[:1], (), *([media[1:], media] if len(media) > 1 else [])]
    return [sample for kind in kinds for sample in nano.random_samples(kind, 1)]


@torch.no_grad()
def greedy_without_cache(adapter, sample, num_tokens):
    """Greedy decoding by whole forward passes on one unpadded sample."""
    inputs = dict(adapter.encode([sample], with_answer=False).inputs)
    suppressed = list(adapter.placeholders())
    answer = []
    for _ in range(num_tokens):
        row = adapter.model(**inputs, use_cache=False).logits[0, -1]
        row[suppressed] = -torch.inf
        answer.append(int(row.argmax()))
        if answer[-1] in adapter.end_ids:
            break
        token = torch.tensor([[answer[-1]]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
    return answer


def test_generation_is_greedy_whatever_the_padding(adapter):
    """With cache and left padding the answers are those of plain forward passes, sample by sample."""
    samples = samples_of(adapter)
    expected = [greedy_without_cache(adapter, sample, 6) for sample in samples]
    assert adapter.generate(adapter.encode(samples, with_answer=False), 6) == expected
    assert len({tuple(answer) for answer in expected}) > 1


def test_published_sampling_defaults_are_not_inherited(make_adapter):
    model, processor = nano.build("nano_omni")
    family = type(make_adapter("nano_omni"))
    expected = family(model, processor)
    batch = expected.encode(samples_of(expected), with_answer=False)
    answers = expected.generate(batch, 8)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, top_k=50, repetition_penalty=3.0, no_repeat_ngram_size=1, num_beams=1
    )
    assert family(model, processor).generate(batch, 8) == answers
    assert any(len(set(answer)) < len(answer) for answer in answers)


def test_answers_end_with_their_end_token(adapter):
    batch = adapter.encode(samples_of(adapter), with_answer=False)
    end = adapter.tokenizer.eos_token_id
    calls = []

    def end_second(_head, _args, logits):
        calls.append(logits)
        if len(calls) == 2:
            logits[0, -1, end] = 1e4
        else:
            logits[..., end] = -1e4
        return logits

    adapter.head().register_forward_hook(end_second)
    answers = adapter.generate(batch, 4)
    assert answers[0][1:] == [end]
    assert all(len(answer) == 4 and end not in answer for answer in answers[1:])
    assert "<|" not in adapter.decode(answers[0])


def test_ids_outside_the_tokenizer_decode_to_nothing(adapter):
    """Published vocabularies are padded beyond the tokenizer."""
    assert len(adapter.tokenizer) < 277
    letters = adapter.tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert adapter.decode([*letters, 276]) == "ab"


def test_cut_keeps_the_first_end_token():
    assert _cut([1, 2, 3, 2], (2, 9)) == [1, 2]
    assert _cut([1, 3], (2,)) == [1, 3]
    assert _cut([9], (2, 9)) == [9]


class Tokenizer:
    eos_token_id = 4
    all_special_ids = (2, 4, 6)


@pytest.mark.parametrize(("published", "expected"), [([6, 4], (4, 6)), (6, (4, 6)), (None, (4,)), ([5, 2], (4, 2))])
def test_end_ids(published, expected):
    """A checkpoint may end answers in several ways; an id that is no special token is a stale default."""
    assert end_ids(Tokenizer, GenerationConfig(eos_token_id=published)) == expected


def test_a_tokenizer_without_end_token_is_refused():
    class Endless(Tokenizer):
        eos_token_id = None

    with pytest.raises(ModelError, match="eos_token"):
        end_ids(Endless, None)
