"""The embedded model as a Qwen2.5-VL one must compute what the Omni one computes."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from masq.errors import ModelError
from masq.models import loading
from masq.models.base import Modality, ModelAdapter, Sample
from masq.models.config import ModelConfig
from masq.models.zoo import embedded_name, is_trained, smol_omni, smol_vl


def load(name: str, family: Any, **changes: Any) -> ModelAdapter:
    return loading.load(ModelConfig(name, family, f"zoo:{name}", ("text", "vision"), dtype="float32", **changes))


@pytest.fixture(scope="module")
def omni() -> ModelAdapter:
    return load("smol_omni", "qwen2_5_omni")


@pytest.fixture(scope="module")
def vl() -> ModelAdapter:
    return load("smol_vl", "qwen2_5_vl")


def picture(text: str) -> bytes:
    canvas = Image.new("RGB", (224, 56), (230, 230, 230))
    ImageDraw.Draw(canvas).text((12, 10), text, fill=(20, 20, 60), font_size=32)
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    return buffer.getvalue()


PICTURES = [
    Sample("p-0", "read", "Read the text.", "river", image=picture("river")),
    Sample("p-1", "read", "What is written in the picture?", "3735", image=picture("3735")),
]
TEXTS = [Sample("t-0", "chat", "What is a river?", "water"), Sample("t-1", "prose", "", "Once upon a time.")]


def test_inputs_are_the_same_but_for_what_vl_needs_besides(omni: ModelAdapter, vl: ModelAdapter) -> None:
    for samples in (PICTURES, TEXTS):
        ours, theirs = vl.encode(samples, with_answer=True), omni.encode(samples, with_answer=True)
        assert set(ours.inputs) == set(theirs.inputs) | {"mm_token_type_ids"}
        assert all(torch.equal(ours.inputs[name], value) for name, value in theirs.inputs.items())
        assert torch.equal(ours.modality, theirs.modality)
        assert torch.equal(ours.answer_mask, theirs.answer_mask)


@torch.no_grad()
def test_pictures_look_the_same(omni: ModelAdapter, vl: ModelAdapter) -> None:
    inputs = vl.encode(PICTURES, with_answer=False).inputs
    features = [
        adapter.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        for adapter in (omni, vl)
    ]
    assert torch.allclose(*features, rtol=1e-5, atol=1e-5 * features[0].abs().max().item())


@torch.no_grad()
def difference(omni: ModelAdapter, vl: ModelAdapter, samples: list[Sample]) -> float:
    """Largest difference of two logits, as a share of the largest logit."""
    logits = []
    for adapter in (omni, vl):
        batch = adapter.encode(samples, with_answer=True)
        output = adapter.model(**batch.inputs, use_cache=False).logits
        logits.append(output[batch.modality != Modality.PADDING])
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())


def test_logits_are_the_same(omni: ModelAdapter, vl: ModelAdapter) -> None:
    assert [difference(omni, vl, [text]) for text in TEXTS] == [0, 0]
    # Fused products may round otherwise; and Qwen2.5-VL counts the positions of a padded text from its padding.
    assert difference(omni, vl, PICTURES) < 1e-5
    assert difference(omni, vl, TEXTS) < 1e-5


def test_answers_are_the_same(omni: ModelAdapter, vl: ModelAdapter) -> None:
    answers = [adapter.generate(adapter.encode(PICTURES, with_answer=False), 6) for adapter in (omni, vl)]
    assert answers[0] == answers[1]


def test_the_language_model_is_stored_once(vl: ModelAdapter) -> None:
    assert vl.head().weight is vl.embeddings().weight
    assert not any("audio" in name for name, _ in vl.model.named_modules())
    assert vl.model.config.text_config._attn_implementation == "sdpa"


def test_sounds_are_refused(vl: ModelAdapter) -> None:
    with pytest.raises(ModelError, match="has audio; the model takes text, vision"):
        vl.encode([dataclasses.replace(PICTURES[0], audio=b"x")], with_answer=False)


def test_query_key_and_value_are_fused_in_this_order() -> None:
    state = {f"v.attn.{part}.bias": torch.full((2,), float(index)) for index, part in enumerate("qkv")}
    state |= {"model.audio_tower.x": torch.zeros(1), "v.attn.proj.bias": torch.ones(2)}
    converted = smol_vl.convert_state(state)
    assert set(converted) == {"v.attn.qkv.bias", "v.attn.proj.bias"}
    assert converted["v.attn.qkv.bias"].tolist() == [0, 0, 1, 1, 2, 2]


def test_weights_that_do_not_fit_are_named(omni: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smol_omni, "build_model", lambda *_: omni.model)
    monkeypatch.setattr(smol_vl, "convert_state", lambda _state: {"strange": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"must fit Qwen2_5_VLFor.*unexpected \['strange'\]"):
        smol_vl.build_model()


def test_names_of_embedded_models() -> None:
    assert embedded_name("zoo:smol_vl") == "smol_vl"
    assert embedded_name("owner/zoo") is embedded_name("/zoo:x") is None
    assert [is_trained(f"zoo:{name}") for name in ("smol_omni", "smol_vl", "nano_vl")] == [True, True, False]
    assert not is_trained("smol_omni")
