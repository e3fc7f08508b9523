"""Every decoder linear sees the modality of every token, in every way in which a model is run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig

from masq.errors import ModelError
from masq.models.base import Modality, Role
from masq.models.qwen2_5_omni import Qwen25OmniAdapter
from masq.models.qwen2_5_vl import Qwen25VLAdapter
from masq.models.zoo import nano
from masq.modules.modality import ModalityContext, install

NEW_TOKENS = 5


class Probe(nn.Module):
    """A linear that notes which modality it was told for each of its rows."""

    def __init__(self, linear, context):
        super().__init__()
        self.linear = linear
        self.context = context
        self.seen = []

    def forward(self, x):
        self.seen.append(self.context.current(x.shape[0], x.shape[1]).clone())
        return self.linear(x)


def probed(name):
    """A nano model with a probe in the place of every decoder linear."""
    family = {"nano_vl": Qwen25VLAdapter, "nano_omni": Qwen25OmniAdapter}[name]
    adapter = family(*nano.build(name))
    context, _ = install(adapter)
    probes = []
    for block in adapter.blocks():
        for role in Role:
            probes.append(Probe(block.linear(role), context))
            block.set_linear(role, probes[-1])
    assert len(probes) == 21
    return adapter, probes


def assert_all_saw(probes, expected):
    """Each probe saw ``expected`` [B, T], its calls joined along the tokens."""
    for probe in probes:
        assert torch.equal(torch.cat(probe.seen, dim=1), expected)


def with_generated(modality, num_tokens):
    """Modality of a prompt and of ``num_tokens`` generated tokens, which are text."""
    return torch.cat([modality, torch.zeros(len(modality), num_tokens, dtype=torch.int8)], dim=1)


def reference(batch, ids):
    """Modality [B, T] written down anew from token ids, apart from the code under test."""
    table = {ids["image"]: 1, ids["video"]: 1, ids.get("audio", -5): 2}
    rows = zip(batch.inputs["input_ids"].tolist(), batch.inputs["attention_mask"].tolist(), strict=True)
    return torch.tensor(
        [[table.get(token, 0) if real else -1 for token, real in zip(*row, strict=True)] for row in rows],
        dtype=torch.int8,
    )


def placeholder_ids(adapter):
    names = ("image", "video", "audio") if "AUDIO" in {m.name for m in adapter.modalities} else ("image", "video")
    return {name: getattr(adapter.tokenizer, f"{name}_token_id") for name in names}


CASES = {
    "text": ("nano_vl", [()]),
    "image": ("nano_vl", [("vision",)]),
    "mixed lengths": ("nano_vl", [("vision",), ()]),
    "audio": ("nano_omni", [("audio",)]),
    "image then audio": ("nano_omni", [("vision", "audio")]),
    "everything in one batch": ("nano_omni", [("vision",), ("audio",), ("vision", "audio"), ()]),
}


@pytest.mark.parametrize("case", CASES)
def test_generation_with_left_padding(case):
    name, kinds = CASES[case]
    adapter, probes = probed(name)
    samples = [sample for kind in kinds for sample in nano.random_samples(kind, 2, seed=len(kind))]
    batch = adapter.encode(samples, with_answer=False)
    assert torch.equal(batch.modality, reference(batch, placeholder_ids(adapter)))
    assert (batch.modality == Modality.PADDING).any() and not (batch.modality[:, -1] == Modality.PADDING).any()
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    adapter.model.generate(**batch.inputs, generation_config=config)
    # The last generated token is not fed back.
    assert_all_saw(probes, with_generated(batch.modality, NEW_TOKENS - 1))
    assert [len(probe.seen) for probe in probes] == [NEW_TOKENS] * len(probes)


def test_image_comes_before_audio_in_one_prompt():
    adapter, _ = probed("nano_omni")
    modality = adapter.encode(nano.random_samples(("vision", "audio"), 1), with_answer=False).modality[0]
    vision, audio = (modality == Modality.VISION).nonzero(), (modality == Modality.AUDIO).nonzero()
    assert len(vision) and len(audio) and vision.max() < audio.min()


@pytest.mark.parametrize(("name", "kind"), [("nano_vl", ("vision",)), ("nano_omni", ("vision", "audio"))])
def test_two_beams(name, kind):
    adapter, probes = probed(name)
    batch = adapter.encode(nano.random_samples(kind, 2), with_answer=False)
    config = GenerationConfig(num_beams=2, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    adapter.model.generate(**batch.inputs, generation_config=config)
    assert_all_saw(probes, with_generated(batch.modality.repeat_interleave(2, dim=0), NEW_TOKENS - 1))


@pytest.mark.parametrize(("name", "kind"), [("nano_vl", ("vision",)), ("nano_omni", ("vision", "audio"))])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_static_cache(name, kind, attention):
    """A static cache gives the model a 4-D mask over the cache's capacity, not a 2-D one over the tokens so far."""
    adapter, probes = probed(name)
    adapter.model.set_attn_implementation(attention)
    masks = []
    adapter.model.register_forward_pre_hook(
        lambda _model, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    batch = adapter.encode(nano.random_samples(kind, 3), with_answer=False)
    assert (batch.modality == Modality.PADDING).any()
    config = GenerationConfig(
        cache_implementation="static", max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, disable_compile=True
    )
    adapter.model.generate(**batch.inputs, generation_config=config)
    assert_all_saw(probes, with_generated(batch.modality, NEW_TOKENS - 1))
    shown = [mask["full_attention"] if isinstance(mask, dict) else mask for mask in masks]
    assert {mask.dim() for mask in shown} == {4}


@pytest.mark.parametrize("kind", [(), ("vision",)])
def test_chunked_prefill_of_generate(kind):
    adapter, probes = probed("nano_vl")
    batch = adapter.encode(nano.random_samples(kind, 2), with_answer=False)
    config = GenerationConfig(prefill_chunk_size=7, max_new_tokens=2, min_new_tokens=2)
    adapter.model.generate(**batch.inputs, generation_config=config)
    assert len(probes[0].seen) > 3
    assert_all_saw(probes, with_generated(batch.modality, 1))


def test_chunked_prefill_by_hand_splits_after_media():
    """Raw audio cannot be split by generate; a caller may still feed media first and text later."""
    adapter, probes = probed("nano_omni")
    batch = adapter.encode(nano.random_samples(("vision", "audio"), 3), with_answer=False)
    mask = batch.inputs.pop("attention_mask")
    ids = batch.inputs.pop("input_ids")
    split = ids.shape[1] - 5
    assert not (batch.modality[:, split:] > 0).any()
    cache = DynamicCache(config=adapter.model.config.get_text_config())
    with torch.no_grad():
        adapter.model(input_ids=ids[:, :split], attention_mask=mask[:, :split], past_key_values=cache, **batch.inputs)
        positions = torch.arange(split, ids.shape[1]).expand(3, len(ids), -1)
        adapter.model(input_ids=ids[:, split:], attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert [one.shape[1] for one in probes[0].seen] == [split, 5]
    assert_all_saw(probes, batch.modality)


@pytest.mark.parametrize("name", nano.NAMES)
def test_video_is_vision(name):
    adapter, probes = probed(name)
    inputs = video_inputs(adapter)
    with torch.no_grad():
        adapter.model(**inputs)
    expected = (inputs["input_ids"] == adapter.tokenizer.video_token_id).to(torch.int8)
    assert expected.sum() == 2 * 2 * 3
    assert_all_saw(probes, expected)


def video_inputs(adapter):
    """A prompt with a video of 4 frames of 16 x 24 pixels."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)
    prompt = adapter.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    size = {"shortest_edge": 64, "longest_edge": 4096}
    features = adapter.processor(
        text=[prompt],
        videos=[frames],
        videos_kwargs={"size": size, "do_resize": False},
        return_tensors="pt",
    )
    return {key: value for key, value in features.items() if isinstance(value, torch.Tensor)}


def test_the_sound_of_a_video_is_audio():
    adapter, _ = probed("nano_omni")
    ids = placeholder_ids(adapter)
    row = torch.tensor([[1, ids["video"], ids["audio"], ids["video"], ids["audio"], 2]])
    assert adapter.modality_of({"input_ids": row}).tolist() == [[0, 1, 2, 1, 2, 0]]


def test_placeholders_are_never_generated():
    """Even a head that wants nothing else writes no placeholder, so a decoding step needs no memory of the prompt."""
    adapter, _ = probed("nano_omni")
    ids = list(placeholder_ids(adapter).values())
    batch = adapter.encode(nano.random_samples(("vision",), 2), with_answer=False)

    def prefer_placeholders(_head, _args, logits):
        logits[..., ids] += 1e4
        return logits

    adapter.head().register_forward_hook(prefer_placeholders)
    assert all(token not in ids for row in adapter.generate(batch, 4) for token in row)


def test_inputs_embeds_need_the_modality():
    adapter, probes = probed("nano_omni")
    batch = adapter.encode(nano.random_samples(("audio",), 2), with_answer=False)
    embeds = adapter.embeddings()(batch.inputs["input_ids"])
    mask = batch.inputs["attention_mask"]
    with pytest.raises(ModelError, match="override"):
        adapter.model(inputs_embeds=embeds, attention_mask=mask)
    context = probes[0].context
    with context.override(batch.modality), torch.no_grad():
        adapter.model(inputs_embeds=embeds, attention_mask=mask)
    assert_all_saw(probes, batch.modality)
    with context.override(batch.modality[:, 1:]), pytest.raises(ModelError, match="belong to the tokens at hand"):
        adapter.model(inputs_embeds=embeds, attention_mask=mask)
    with pytest.raises(ModelError, match="override"):
        adapter.model(inputs_embeds=embeds, attention_mask=mask)


def test_input_ids_win_over_an_override():
    adapter, probes = probed("nano_omni")
    batch = adapter.encode(nano.random_samples(("audio",), 2), with_answer=False)
    with probes[0].context.override(torch.zeros_like(batch.modality)), torch.no_grad():
        adapter.model(**batch.inputs)
    assert_all_saw(probes, batch.modality)


def test_positional_input_ids_are_understood():
    adapter, probes = probed("nano_vl")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        adapter.model(ids, torch.tensor([[0, 1, 1]]))
    assert_all_saw(probes, torch.tensor([[-1, 0, 0]], dtype=torch.int8))


def test_nothing_is_assumed_outside_a_forward_pass():
    adapter, probes = probed("nano_omni")
    batch = adapter.encode(nano.random_samples((), 2), with_answer=False)
    x = torch.zeros(*batch.modality.shape, 48)
    with pytest.raises(ModelError, match="never assumes text"):
        probes[0](x)
    with torch.no_grad():
        adapter.model(**batch.inputs)
    with pytest.raises(ModelError, match="never assumes text"):
        probes[0](x)


def test_a_failed_forward_pass_leaves_nothing_behind():
    adapter, probes = probed("nano_omni")
    batch = adapter.encode(nano.random_samples((), 2), with_answer=False)

    def fail(*_):
        raise RuntimeError("broken block")

    adapter.blocks()[1].module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken block"):
        adapter.model(**batch.inputs)
    with pytest.raises(ModelError, match="never assumes text"):
        probes[0].context.current(*batch.modality.shape)


def test_context_refuses_other_shapes_and_dtypes():
    context = ModalityContext()
    context.set(torch.zeros(2, 3, dtype=torch.int8))
    assert context.current(2, 3).tolist() == [[0] * 3] * 2
    with pytest.raises(ModelError, match=r"ids \(2, 3\) for an input \[2, 4\]"):
        context.current(2, 4)
    for bad in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int8)):
        with pytest.raises(ModelError, match="int8"):
            context.set(bad)


def test_buffers_are_fixed_per_shape_and_copied_into():
    context = ModalityContext()
    ids = torch.tensor([[0, 1]], dtype=torch.int8)
    context.set(ids)
    address = context.current(1, 2).data_ptr()
    context.set(torch.zeros(1, 3, dtype=torch.int8))
    context.set(torch.tensor([[2, -1]], dtype=torch.int8))
    assert context.current(1, 2).data_ptr() == address != ids.data_ptr()
    assert context.current(1, 2).tolist() == [[2, -1]] and ids.tolist() == [[0, 1]]


def test_handle_removes_the_hooks():
    adapter = Qwen25OmniAdapter(*nano.build("nano_omni"))
    context, handle = install(adapter)
    handle.remove()
    handle.remove()
    seen = []
    adapter.head().register_forward_pre_hook(lambda *_: seen.append(context._current))
    with torch.no_grad():
        adapter.model(input_ids=torch.tensor([[1, 2]]))
    assert seen == [None]


def test_hooks_do_not_change_the_model():
    adapter = Qwen25OmniAdapter(*nano.build("nano_omni"))
    batch = adapter.encode(nano.random_samples(("vision", "audio"), 2), with_answer=True)
    with torch.no_grad():
        before = adapter.model(**batch.inputs).logits
        install(adapter)
        assert torch.equal(before, adapter.model(**batch.inputs).logits)
