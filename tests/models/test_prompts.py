import dataclasses
import io

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from masq.errors import DataError, ModelError
from masq.models.base import Modality, Sample
from masq.models.prompts import decode_image, decode_waveform
from masq.models.zoo import nano
from tests.nano_fixtures import media_of


def flac(num_samples, rate=16000, channels=1):
    buffer = io.BytesIO()
    waveform = np.random.default_rng(0).uniform(-0.5, 0.5, (num_samples, channels))
    soundfile.write(buffer, waveform, rate, format="FLAC")
    return buffer.getvalue()


def texts(adapter, batch):
    rows = zip(batch.inputs["input_ids"], batch.inputs["attention_mask"].bool(), strict=True)
    return [adapter.tokenizer.decode(row[real]) for row, real in rows]


def test_prompt_is_the_chat_template_with_image_audio_question(make_adapter):
    adapter = make_adapter("nano_omni")
    (sample,) = nano.random_samples(("vision", "audio"), 1)
    batch = adapter.encode([sample], with_answer=False)
    num_vision = int((batch.modality == Modality.VISION).sum())
    num_audio = int((batch.modality == Modality.AUDIO).sum())
    assert num_vision > 1 and num_audio > 1
    assert texts(adapter, batch) == [
        "<|im_start|>user\n"
        f"<|vision_bos|>{'<|IMAGE|>' * num_vision}<|vision_eos|><|audio_bos|>{'<|AUDIO|>' * num_audio}<|audio_eos|>"
        f"{sample.question}<|im_end|>\n<|im_start|>assistant\n"
    ]
    assert not batch.answer_mask.any()


def test_answer_follows_the_same_prompt(adapter):
    samples = nano.random_samples(media_of(adapter)[:1], 2) + nano.random_samples((), 1)
    prompts, whole = (adapter.encode(samples, with_answer=flag) for flag in (False, True))
    for sample, prompt, text in zip(samples, texts(adapter, prompts), texts(adapter, whole), strict=True):
        assert text == prompt + sample.answer + "<|im_end|>"
    for sample, ids, mask in zip(samples, whole.inputs["input_ids"], whole.answer_mask, strict=True):
        assert adapter.tokenizer.decode(ids[mask]) == sample.answer + "<|im_end|>"
    assert whole.answer_mask.dtype == torch.bool
    assert whole.answer_mask.shape == whole.modality.shape == whole.inputs["input_ids"].shape
    assert set(whole.modality[whole.answer_mask].tolist()) == {0}


def test_padding_is_on_the_left(adapter):
    samples = nano.random_samples(media_of(adapter)[:1], 1) + nano.random_samples((), 2)
    batch = adapter.encode(samples, with_answer=True)
    mask = batch.inputs["attention_mask"]
    assert torch.equal(mask, mask.sort(dim=1).values) and (mask == 0).any()
    assert torch.equal(batch.modality == Modality.PADDING, mask == 0)
    assert set(batch.inputs["input_ids"][mask == 0].tolist()) == {adapter.tokenizer.pad_token_id}


def test_vl_gets_token_types_also_for_answers_and_text(make_adapter):
    adapter = make_adapter("nano_vl")
    for samples in (nano.random_samples(("vision",), 2), nano.random_samples((), 2)):
        batch = adapter.encode(samples, with_answer=True)
        assert torch.equal(batch.inputs["mm_token_type_ids"], (batch.modality == Modality.VISION).long())


def test_prose_is_plain_text_scored_from_its_second_token(adapter):
    samples = [Sample("1", "prose", "", "once upon"), Sample("2", "prose", "", "a time")]
    batch = adapter.encode(samples, with_answer=True)
    assert texts(adapter, batch) == ["once upon", "a time"]
    assert batch.answer_mask.int().tolist() == [[0] + [1] * 8, [0] * 4 + [1] * 5]
    mixed = adapter.encode([samples[0], *nano.random_samples((), 1)], with_answer=False)
    assert mixed.answer_mask.sum(dim=1).tolist() == [8, 0]


def test_a_batch_holds_what_its_samples_hold_alone(adapter):
    """Media follow their own sample: first the logits of each alone, then of all in one batch."""
    media = media_of(adapter)
    kinds = [media[:1], (), *([media[1:], media] if len(media) > 1 else [])]
    samples = [sample for kind in kinds for sample in nano.random_samples(kind, 2, seed=5)]
    together = adapter.encode(samples, with_answer=True)
    with torch.no_grad():
        logits = adapter.model(**together.inputs).logits
        for index, sample in enumerate(samples):
            alone = adapter.encode([sample], with_answer=True)
            expected = adapter.model(**alone.inputs).logits[0]
            assert torch.allclose(logits[index, -len(expected) :], expected, atol=2e-4)


def test_pixel_budget_overrides_the_processor(make_adapter):
    adapter = make_adapter("nano_vl")
    samples = nano.random_samples(("vision",), 3)
    usual = adapter.encode(samples, with_answer=False).inputs["image_grid_thw"].prod(-1)
    adapter.max_pixels = 4 * 8 * 8
    small = adapter.encode(samples, with_answer=False).inputs["image_grid_thw"].prod(-1)
    assert (small <= 16).all() and (small <= usual).all() and (small < usual).any()
    adapter.min_pixels, adapter.max_pixels = 40 * 8 * 8, None
    adapter.processor.image_processor.size["longest_edge"] = 99 * 8 * 8
    assert (adapter.encode(samples, with_answer=False).inputs["image_grid_thw"].prod(-1) >= 160).all()


@pytest.mark.parametrize("name", ["nano_internvl", "nano_llava_onevision"])
def test_a_pixel_budget_needs_a_processor_that_keeps_one(make_adapter, name):
    adapter = make_adapter(name)
    adapter.max_pixels = 256
    with pytest.raises(ModelError, match=r"pixel budget.*ImageProcessor resizes to.*height"):
        adapter.encode(nano.random_samples(("vision",), 1), with_answer=False)


def test_pictures_become_rgb():
    buffer = io.BytesIO()
    Image.new("LA", (3, 2), (7, 255)).save(buffer, format="PNG")
    picture = decode_image(Sample("1", "t", "q", "a", image=buffer.getvalue()))
    assert picture.mode == "RGB" and picture.size == (3, 2) and picture.getpixel((0, 0)) == (7, 7, 7)


def test_channels_are_averaged():
    waveform, rate = decode_waveform(Sample("1", "t", "q", "a", audio=flac(50, 8000, channels=2)))
    assert waveform.shape == (50,) and waveform.dtype == np.float32 and rate == 8000


def test_truncated_media_are_refused(make_adapter):
    (sample,) = nano.random_samples(("vision", "audio"), 1)
    adapter = make_adapter("nano_omni")
    for name in ("image", "audio"):
        broken = dataclasses.replace(sample, **{name: getattr(sample, name)[:40]})
        with pytest.raises(DataError, match=sample.id):
            adapter.encode([broken], with_answer=False)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (flac(4000, 8000), "8000 Hz"),
        (flac(16000 * 2 + 1), r"2\.00006 s"),
        (flac(100), r"0\.00625 s"),
    ],
    ids=["rate", "too long", "too short"],
)
def test_audio_that_the_extractor_would_mangle_is_refused(make_adapter, audio, message):
    with pytest.raises(DataError, match=message):
        make_adapter("nano_omni").encode([Sample("1", "t", "q", "a", audio=audio)], with_answer=False)


@pytest.mark.parametrize("num_samples", [4 * 160, 32000])
def test_shortest_and_longest_audio_run(make_adapter, num_samples):
    adapter = make_adapter("nano_omni")
    batch = adapter.encode([Sample("1", "t", "q", "a", audio=flac(num_samples))], with_answer=True)
    with torch.no_grad():
        assert adapter.model(**batch.inputs).logits.isfinite().all()
    assert (batch.modality == Modality.AUDIO).any()


def test_a_modality_that_the_model_lacks_is_refused(make_adapter):
    with pytest.raises(ModelError, match="has audio; the model takes text, vision"):
        make_adapter("nano_vl").encode(nano.random_samples(("audio",), 1), with_answer=False)


@pytest.mark.parametrize("field", ["question", "answer"])
def test_placeholders_in_texts_are_refused(adapter, field):
    (sample,) = nano.random_samples((), 1)
    for placeholder in adapter.tokenizer.convert_ids_to_tokens(list(adapter.placeholders())):
        bad = dataclasses.replace(sample, **{field: f"see {placeholder} here"})
        with pytest.raises(DataError, match="placeholder"):
            adapter.encode([bad], with_answer=True)


def test_an_empty_batch_is_refused(adapter):
    with pytest.raises(DataError, match="at least one"):
        adapter.encode([], with_answer=False)
