import dataclasses
import io

import pytest
import soundfile
import torch
from PIL import Image

from masq.errors import DataError, ModelError
from masq.models.base import GROUPS, EncodedBatch, Modality, Role, Sample
from masq.models.zoo import nano


def png(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def sound(waveform, kind):
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, 16000, format=kind, subtype="PCM_16")
    return buffer.getvalue()


def test_groups_hold_every_role_once():
    assert [role for roles in GROUPS.values() for role in roles] == list(Role)
    assert list(GROUPS) == ["qkv", "output", "gate_up", "down"]


def test_modality_ids_are_those_of_the_contract():
    assert {m.name: int(m) for m in Modality} == {"PADDING": -1, "TEXT": 0, "VISION": 1, "AUDIO": 2}


def test_sample_modalities_and_prose():
    prose = Sample("1", "prose", "", "passage")
    assert prose.is_prose and prose.modalities == {Modality.TEXT}
    read = Sample("2", "read", "", "word", image=b"x")
    assert not read.is_prose and read.modalities == {Modality.TEXT, Modality.VISION}
    assert Sample("3", "joint", "q", "a", image=b"x", audio=b"y").modalities == set(Modality) - {Modality.PADDING}


def test_content_hash_is_of_pixels_and_samples_not_of_files():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, 6, 3), generator=generator, dtype=torch.uint8).numpy()
    waveform = (torch.randint(-9000, 9000, (400,), generator=generator).double() / 32768).numpy()
    sample = Sample("1", "t", "q", "a", image=png(pixels, compress_level=0), audio=sound(waveform, "WAV"))
    other = Sample("2", "u", "q", "a", image=png(pixels, compress_level=9), audio=sound(waveform, "FLAC"))
    assert sample.image != other.image and sample.audio != other.audio
    assert sample.content_hash() == other.content_hash()

    pixels[0, 0, 0] ^= 1
    waveform[7] += 1 / 32768
    changes = {
        "question": "q2",
        "answer": "b",
        "image": png(pixels),
        "audio": sound(waveform, "WAV"),
    }
    hashes = {dataclasses.replace(sample, **{name: value}).content_hash() for name, value in changes.items()}
    assert len(hashes | {sample.content_hash()}) == 5


def test_content_hash_tells_size_and_text_borders_apart():
    flat = torch.arange(24, dtype=torch.uint8).numpy()
    wide = Sample("1", "t", "q", "a", image=png(flat.reshape(2, 4, 3)))
    tall = Sample("1", "t", "q", "a", image=png(flat.reshape(4, 2, 3)))
    assert wide.content_hash() != tall.content_hash()
    assert Sample("1", "t", "ab", "c").content_hash() != Sample("1", "t", "a", "bc").content_hash()


@pytest.mark.parametrize("media", [{"image": b"no picture"}, {"audio": b"no sound"}])
def test_content_hash_of_broken_media(media):
    with pytest.raises(DataError, match="sample 7"):
        Sample("7", "t", "q", "a", **media).content_hash()


def test_batch_moves_as_a_whole():
    batch = EncodedBatch({"x": torch.zeros(1)}, torch.zeros(1, 1, dtype=torch.int8), torch.ones(1, 1).bool())
    moved = batch.to("meta")
    assert {moved.inputs["x"].device.type, moved.modality.device.type, moved.answer_mask.device.type} == {"meta"}


def test_modality_of_looks_ids_up(adapter):
    tokenizer = adapter.tokenizer
    placeholders = adapter.placeholders()
    assert set(placeholders.values()) == set(adapter.modalities) - {Modality.TEXT}
    row = [5, *placeholders, tokenizer.eos_token_id, 276]
    expected = [0, *map(int, placeholders.values()), 0, 0]
    ids = torch.tensor([row, row])
    assert adapter.modality_of({"input_ids": ids}).tolist() == [expected] * 2
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    found = adapter.modality_of({"input_ids": ids, "attention_mask": mask})
    assert found.dtype == torch.int8
    assert found.tolist() == [expected, [-1, -1, *expected[2:]]]


def test_modality_of_needs_ids(adapter):
    with pytest.raises(ModelError, match="inputs_embeds"):
        adapter.modality_of({"inputs_embeds": torch.zeros(1, 2, 48), "input_ids": None})


def test_blocks_with_different_masks_are_refused(make_adapter):
    model, processor = nano.build("nano_vl")
    model.config.text_config.layer_types[1] = "sliding_attention"
    with pytest.raises(ModelError, match="full_attention, sliding_attention"):
        type(make_adapter("nano_vl"))(model, processor)
