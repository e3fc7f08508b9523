"""Contexts with all their choices in one sequence: every choice must be read as if it were alone."""

import dataclasses
import itertools

import pytest
import torch

from masq.errors import DataError
from masq.models.base import Modality, Sample
from masq.models.choices import attention_mask
from masq.models.zoo import nano, smol_omni
from masq.modules.modality import install

SAMPLES = [
    Sample("a", "choice", "The cat", "sat on it", choices=("flew", "sat on it", "is 3 m long")),
    Sample("b", "choice", "A much longer context here", "ends", choices=("ends", "goes on and on")),
    Sample("c", "choice", "X", "y", choices=("y", "zz")),
]


def alone(sample):
    """The sample once per choice, with that choice as its answer."""
    return [dataclasses.replace(sample, id=f"{sample.id}{i}", answer=one) for i, one in enumerate(sample.choices)]


def test_a_choice_is_plain_text_after_its_context(adapter):
    batch = adapter.encode(SAMPLES, with_answer=True)
    for sample, ids, real, mask in zip(
        SAMPLES, batch.inputs["input_ids"], batch.inputs["attention_mask"].bool(), batch.answer_mask, strict=True
    ):
        whole = f"{sample.question} {sample.answer}"
        assert adapter.tokenizer.decode(ids[real]) == whole
        assert ids[real].tolist() == adapter.tokenizer(whole)["input_ids"]
        assert adapter.tokenizer.decode(ids[mask]) == f" {sample.answer}"
    assert adapter.encode(SAMPLES, with_answer=False).answer_mask.sum() == 0


def test_a_merging_tokenizer_begins_a_new_piece_at_the_space():
    tokenizer = smol_omni.build_tokenizer(smol_omni.language_file())
    contexts = ("the river", "It ended.", "page 12", 'she said "no"', "wait ...", "café", "a\nb")
    choices = ("because", "12 men", "'s own", "(no)", "Élan vital", "... and", "x\ny", "日本")
    for context, choice in itertools.product(contexts, choices):
        whole = tokenizer(f"{context} {choice}")["input_ids"]
        assert whole == tokenizer(context)["input_ids"] + tokenizer(f" {choice}")["input_ids"], (context, choice)


def test_every_choice_is_marked_once_in_order(adapter):
    batch = adapter.encode_choices(SAMPLES)
    marked = batch.encoded.inputs["input_ids"][batch.encoded.answer_mask]
    assert adapter.tokenizer.decode(marked) == "".join(f" {one}" for sample in SAMPLES for one in sample.choices)
    assert batch.num_tokens == [[1 + len(one) for one in sample.choices] for sample in SAMPLES]
    assert not batch.encoded.answer_mask[:, 0].any()


def test_padding_is_padding_and_the_rest_is_text(adapter):
    batch = adapter.encode_choices(SAMPLES).encoded
    lengths = [
        len(sample.question) - 1 + sum(2 + len(one) for one in sample.choices) for sample in SAMPLES
    ]  # the nano tokenizers have one token per byte
    assert (batch.modality == Modality.TEXT).sum(1).tolist() == lengths
    assert (batch.modality == Modality.PADDING).sum(1).tolist() == [max(lengths) - length for length in lengths]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", nano.NAMES)
def test_logits_are_those_of_every_choice_alone(make_adapter, name, attention):
    adapter = make_adapter(name, attention=attention)
    install(adapter)
    batch = adapter.encode_choices(SAMPLES)
    with torch.no_grad():
        logits = adapter.model(**batch.encoded.inputs, use_cache=False).logits
        found = logits[:, :-1][batch.encoded.answer_mask[:, 1:]]
        expected = []
        for sample in SAMPLES:
            for one in alone(sample):
                encoded = adapter.encode([one], with_answer=True)
                own = adapter.model(**encoded.inputs, use_cache=False).logits
                expected.append(own[:, :-1][encoded.answer_mask[:, 1:]])
    assert torch.allclose(found, torch.cat(expected), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_does_no_harm_in_half_precision(make_adapter, dtype):
    adapter = make_adapter("nano_omni")
    adapter.model.to(dtype)
    batch = adapter.encode_choices(SAMPLES).encoded
    assert batch.inputs["attention_mask"].dtype == dtype
    with torch.no_grad():
        assert adapter.model(**batch.inputs, use_cache=False).logits.isfinite().all()


def test_who_sees_whom():
    seen = attention_mask(torch.tensor([[-2, -1, 0, 0, 1, 1]]), torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [
        [0, 0, 0, 0, 0, 1],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 1, 0, 0, 1, 1],
    ]


def test_samples_without_choices_and_placeholders_are_refused(adapter):
    with pytest.raises(DataError, match="every sample must have choices.*nobody"):
        adapter.encode_choices([*SAMPLES, Sample("nobody", "read", "q", "a")])
    with pytest.raises(DataError, match="at least one sample"):
        adapter.encode_choices([])
    bad = Sample("d", "choice", "see", "this", choices=("this", f"that {adapter.tokenizer.image_token}"))
    with pytest.raises(DataError, match="placeholder"):
        adapter.encode_choices([bad])
