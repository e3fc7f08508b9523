import subprocess
import sys
import time

import pytest
import torch

from masq.errors import ConfigError
from masq.models.base import Modality
from masq.models.zoo import nano


@pytest.mark.parametrize("name", nano.NAMES)
def test_build_is_quick_and_seeded(name):
    nano.build(name)
    start = time.monotonic()
    (one, _), (same, _), (other, _) = nano.build(name), nano.build(name), nano.build(name, seed=1)
    assert (time.monotonic() - start) / 3 < 2
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", nano.NAMES)
def test_building_leaves_the_global_random_state_alone_after_loading(name):
    """The seeded weights come from a generator of their own."""
    torch.manual_seed(0)
    first = nano.build(name)[0].lm_head.weight.clone()
    torch.manual_seed(1)
    assert torch.equal(nano.build(name)[0].lm_head.weight, first)


@pytest.mark.parametrize("name", nano.NAMES)
def test_no_parameter_is_degenerate(name):
    """Zero biases or norms of one would hide a forgotten term."""
    model, _ = nano.build(name)
    for key, parameter in model.named_parameters():
        assert parameter.std() > 0.05, key
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name == "nano_vl")


@pytest.mark.parametrize("name", nano.NAMES)
def test_tokenizer_covers_all_bytes(name):
    _, processor = nano.build(name)
    text = "".join(map(chr, range(1, 300))) + "é語🙂"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    # The tokenizer, like Qwen's, composes characters (NFC); these are composed already.
    assert processor.tokenizer.decode(ids) == text
    assert max(ids) < 256 < processor.tokenizer.eos_token_id < nano.SIZES["vocab_size"]


@pytest.mark.parametrize("kind", [(), ("vision",), ("audio",), ("vision", "audio")])
def test_samples_are_seeded_and_of_mixed_lengths(make_adapter, kind):
    samples = nano.random_samples(kind, 4, seed=2)
    assert samples == nano.random_samples(kind, 4, seed=2)
    assert len({sample.content_hash() for sample in samples + nano.random_samples(kind, 4, seed=3)}) == 8
    assert len({sample.id for sample in samples}) == 4
    modality = make_adapter("nano_omni").encode(samples, with_answer=False).modality
    expected = {Modality.TEXT} | {Modality[name.upper()] for name in kind}
    assert set(modality.unique().tolist()) - {-1} == expected
    assert len(set((modality == -1).sum(dim=1).tolist())) > 1


def test_answer_can_be_fixed():
    assert {sample.answer for sample in nano.random_samples((), 3, answer="yes")} == {"yes"}


def test_unknown_name_lists_near_matches():
    with pytest.raises(ConfigError, match="nano_omni"):
        nano.build("nano_omny")


def test_package_and_configuration_stay_free_of_torch():
    """`masq --help` and `masq plan` answer before torch is imported."""
    code = (
        "import sys, masq.models, masq.models.zoo, masq.models.config, masq.models.checkpoint\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
