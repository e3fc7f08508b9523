"""Conversations become the same inputs as samples, and keep every medium in its place."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from masq.errors import DataError, ModelError
from masq.models.base import Modality, ModelAdapter
from masq.models.conversation import Conversation, kind_of
from masq.models.qwen2_5_omni import Qwen25OmniAdapter
from masq.models.qwen2_5_vl import Qwen25VLAdapter
from masq.models.zoo import nano
from tests.nano_fixtures import nano_adapter

FRAMES = np.random.default_rng(0).integers(0, 255, (4, 16, 24, 3), dtype=np.uint8)
PICTURE = Image.fromarray(FRAMES[0])
SOUND = {"array": np.sin(np.arange(4000) / 5).astype(np.float32), "sampling_rate": 8000}


def omni() -> ModelAdapter:
    return Qwen25OmniAdapter(*nano.build("nano_omni"))


def vl() -> ModelAdapter:
    return Qwen25VLAdapter(*nano.build("nano_vl"))


def said(*parts: dict[str, Any], name: str = "q") -> Conversation:
    return Conversation.from_messages(name, [{"role": "user", "content": list(parts)}])


def image(picture: Any = PICTURE) -> dict[str, Any]:
    return {"type": "image", "url": picture}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def test_a_sample_and_the_same_in_messages_are_the_same_inputs() -> None:
    adapter = omni()
    samples = [s for kinds in (("vision", "audio"), ("audio",), ("vision",)) for s in nano.random_samples(kinds, 2)]
    messages = [
        [
            *([{"type": "image", "url": {"bytes": one.image}}] if one.image else []),
            *([{"type": "audio", "audio": {"bytes": one.audio}}] if one.audio else []),
            text(one.question),
        ]
        for one in samples
    ]
    found = adapter.encode_conversations([said(*parts) for parts in messages])
    expected = adapter.encode(samples, with_answer=False)
    assert found.inputs.keys() == expected.inputs.keys()
    assert all(torch.equal(found.inputs[name], expected.inputs[name]) for name in found.inputs)
    assert torch.equal(found.modality, expected.modality)
    assert not found.answer_mask.any()


@pytest.mark.parametrize("make", [omni, vl])
def test_media_stand_where_they_were_said(make: Any) -> None:
    adapter = make()
    one = said(text("first"), image(), text("then"), image(Image.fromarray(FRAMES[1])), text("?"))
    batch = adapter.encode_conversations([one])
    runs = torch.unique_consecutive(batch.modality[0]).tolist()
    assert runs == [0, 1, 0, 1, 0]
    assert batch.inputs["image_grid_thw"].shape[0] == 2
    assert one.modalities == {Modality.TEXT, Modality.VISION}


def test_roles_and_plain_texts_reach_the_template() -> None:
    adapter = omni()
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text("Hello")]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Who?"},
    ]
    ids = adapter.encode_conversations([Conversation.from_messages("q", turns)]).inputs["input_ids"][0]
    shown = adapter.tokenizer.decode(ids)
    places = [shown.index(part) for part in ("Be brief.", "Hello", "Hi.", "Who?")]
    assert places == sorted(places)


@pytest.mark.parametrize("make", [omni, vl])
def test_a_clip_is_vision_and_is_answered(make: Any) -> None:
    adapter = make()
    if make is omni:  # its video processor has the published budget: thousands of tokens for a stamp
        adapter.processor.video_processor.size = {"shortest_edge": 4 * 64, "longest_edge": 24 * 64}
    clip = {"type": "video", "video": {"frames": FRAMES, "fps": 2.0}}
    batch = adapter.encode_conversations([said(clip, text("What moves?")), said(text("Nothing here"), name="r")])
    assert torch.unique_consecutive(batch.modality[0]).tolist() == [0, 1, 0]
    assert int(Modality.VISION) not in batch.modality[1]
    [seconds] = [batch.inputs[name] for name in ("second_per_grid_ts", "video_second_per_grid") if name in batch.inputs]
    assert seconds.tolist() == [1.0], "two frames of half a second each"
    with pytest.raises(DataError, match="one speed.*2, 3 frames"):
        adapter.encode_conversations([said(clip), said({"type": "video", "video": {"frames": FRAMES, "fps": 3.0}})])
    assert len(adapter.generate(batch, 3)) == 2


# How a clip of four frames is told, and what of it is text between its frames, by nano model.
CLIPS = {
    "nano_qwen3_vl": (2, ("<0.2 seconds>", "<1.2 seconds>")),
    "nano_internvl": (4, ("Frame1: ", "Frame4: ")),
    "nano_llava_onevision": (1, ()),
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_of_every_further_family_is_vision_and_is_answered(name: str) -> None:
    adapter = nano_adapter(name)
    pieces, written = CLIPS[name]
    clip = {"type": "video", "video": {"frames": FRAMES, "fps": 2.0}}
    batch = adapter.encode_conversations([said(clip, text("What moves?")), said(text("Nothing here"), name="r")])
    assert torch.unique_consecutive(batch.modality[0]).tolist() == [0, *[1, 0] * pieces]
    assert int(Modality.VISION) not in batch.modality[1]
    shown = adapter.tokenizer.decode(batch.inputs["input_ids"][0])
    assert all(part in shown for part in written)
    assert len(adapter.generate(batch, 3)) == 2


def test_several_pictures_of_one_prompt_are_not_cropped() -> None:
    """LLaVA-OneVision: one picture is a whole view and crops, of several each is a view alone and its end."""
    adapter = nano_adapter("nano_llava_onevision")
    one, two = said(image(), text("?")), said(image(), image(), text("?"), name="r")
    batch = adapter.encode_conversations([one, two, said(text("none"), name="s")])
    assert batch.inputs["batch_num_images"].tolist() == [1, 2]
    assert (batch.modality[1] == Modality.VISION).sum() == 2 * (16 + 1)
    assert (batch.modality[0] == Modality.VISION).sum() > 16 + 1
    with torch.no_grad():
        assert adapter.model(**batch.inputs).logits.isfinite().all()


def test_sound_is_resampled_and_rescued_from_a_wrong_label() -> None:
    adapter = omni()
    right = said({"type": "audio", "url": SOUND}, text("?"))
    wrong = said({"type": "video", "url": SOUND}, text("?"))
    assert [kind_of(part) for part in wrong.parts] == ["audio", "text"]
    a, b = adapter.encode_conversations([right]), adapter.encode_conversations([wrong])
    assert torch.equal(a.inputs["input_features"], b.inputs["input_features"])
    assert int(Modality.AUDIO) in a.modality


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one turn"),
        ([{"role": "judge", "content": "x"}], "a role must be one of system, user, assistant.*judge"),
        (
            [{"role": "user", "content": [{"type": "smell", "url": 1}]}],
            "a part must be text, image, audio, video.*smell",
        ),
        ([{"role": "user", "content": [{"type": "image", "url": None}]}], "NoneType"),
    ],
)
def test_bad_messages(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Conversation.from_messages("q-1", messages)


def test_media_that_the_model_does_not_take_are_refused() -> None:
    with pytest.raises(ModelError, match="sample q has audio"):
        vl().encode_conversations([said({"type": "audio", "url": SOUND}, text("?"))])
    with pytest.raises(DataError, match="placeholder"):
        omni().encode_conversations([said(text("look: <|IMAGE|>"))])
    with pytest.raises(DataError, match="at least one conversation"):
        omni().encode_conversations([])
