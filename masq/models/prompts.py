"""From samples and conversations to model inputs: decoded media, chat template, processor, left padding.

One path for every family: what differs between families is in their transformers processor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from masq.errors import DataError, ModelError
from masq.models.base import EncodedBatch
from masq.models.conversation import Conversation, Turn, kind_of
from masq.models.media import Sound, read_picture, read_sound

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import numpy as np
    from PIL import Image

    from masq.models.base import Modality, ModelAdapter, Sample
    from masq.models.conversation import Part
    from masq.models.media import Clip

# Fewer mel frames than this pool to no audio token at all (two strides of two after a valid start).
MIN_FRAMES = 4


@dataclass(frozen=True, eq=False)
class _Prompt:
    """A text with a placeholder for every medium, and the media in reading order."""

    name: str
    text: str
    images: list[Image.Image] = field(default_factory=list)
    sounds: list[Sound] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)


def decode_image(sample: Sample) -> Image.Image:
    """The sample's picture as RGB.

    Raises:
        DataError: there is none, or the bytes are not a picture that PIL reads.
    """
    if sample.image is None:
        raise DataError("the sample must have an image", value=sample.id)
    return read_picture(sample.image, sample.id)


def decode_waveform(sample: Sample) -> tuple[np.ndarray, int]:
    """The sample's audio as float32 [num_samples], channels averaged, and its sampling rate in Hz.

    Raises:
        DataError: there is none, or the bytes are not a sound file that libsndfile reads.
    """
    if sample.audio is None:
        raise DataError("the sample must have audio", value=sample.id)
    sound = read_sound(sample.audio, sample.id)
    return sound.waveform, sound.rate


def encode(adapter: ModelAdapter, samples: Sequence[Sample], *, with_answer: bool) -> EncodedBatch:
    """Body of ``ModelAdapter.encode``; see there."""
    if not samples:
        raise DataError("a batch needs at least one sample", value=0)
    for sample in samples:
        _check(adapter, sample.id, sample.modalities, (sample.question, sample.answer, *sample.choices))
    features, rows = _process(adapter, [_prompt(adapter, sample) for sample in samples])
    scored = [
        [sample.is_prose and position > 0 for position in range(len(row))]
        for sample, row in zip(samples, rows["input_ids"], strict=True)
    ]
    if with_answer:
        _append_answers(adapter, samples, rows, scored)
    return _batch(adapter, features, rows, scored)


def encode_conversations(adapter: ModelAdapter, conversations: Sequence[Conversation]) -> EncodedBatch:
    """Body of ``ModelAdapter.encode_conversations``; see there."""
    if not conversations:
        raise DataError("a batch needs at least one conversation", value=0)
    for one in conversations:
        _check(adapter, one.id, one.modalities, one.texts)
    features, rows = _process(adapter, [_spoken(adapter, one) for one in conversations])
    return _batch(adapter, features, rows, [[False] * len(row) for row in rows["input_ids"]])


def _batch(
    adapter: ModelAdapter,
    features: dict[str, torch.Tensor],
    rows: dict[str, list[list[int]]],
    scored: list[list[bool]],
) -> EncodedBatch:
    """Rows of tokens of mixed lengths and the media of all of them as one batch on the model's device."""
    inputs = {
        "input_ids": left_pad(rows["input_ids"], adapter.pad_id, torch.int64),
        "attention_mask": left_pad([[1] * len(row) for row in rows["input_ids"]], 0, torch.int64),
    }
    if "mm_token_type_ids" in rows:
        inputs["mm_token_type_ids"] = left_pad(rows["mm_token_type_ids"], 0, torch.int64)
    inputs |= features
    batch = EncodedBatch(inputs, adapter.modality_of(inputs), left_pad(scored, fill=False, dtype=torch.bool))
    return batch.to(adapter.device)


def _append_answers(
    adapter: ModelAdapter, samples: Sequence[Sample], rows: dict[str, list[list[int]]], scored: list[list[bool]]
) -> None:
    """Append, in place, answer and end token to the rows that are questions, and the right choice to contexts."""
    for index, sample in enumerate(samples):
        if sample.is_prose:
            continue
        if sample.choices:
            answer = choice_ids(adapter, sample.answer)
        else:
            answer = adapter.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
            answer = [*answer, adapter.tokenizer.eos_token_id]
        rows["input_ids"][index] += answer
        scored[index] += [True] * len(answer)
        if "mm_token_type_ids" in rows:
            rows["mm_token_type_ids"][index] += [0] * len(answer)


def choice_ids(adapter: ModelAdapter, choice: str) -> list[int]:
    """Tokens of a choice as it follows its context: the space between them is the choice's."""
    return adapter.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]


def left_pad(rows: Sequence[Sequence[int]], fill: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of mixed lengths as one tensor [rows, longest], filled on the left."""
    width = max(len(row) for row in rows)
    return torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows], dtype=dtype)


def _check(adapter: ModelAdapter, name: str, modalities: Collection[Modality], texts: Sequence[str]) -> None:
    """Refuse media that the model does not take, and texts that contain a media placeholder."""
    missing = set(modalities) - set(adapter.modalities)
    if missing:
        raise ModelError(
            "the model must take every modality of a sample",
            value=f"sample {name} has {', '.join(sorted(m.name.lower() for m in missing))}; the model takes "
            + ", ".join(modality.name.lower() for modality in adapter.modalities),
            remedy="choose another model, or leave such samples out (modality=dual)",
        )
    tokens = [adapter.tokenizer.convert_ids_to_tokens(token_id) for token_id in adapter.placeholders()]
    found = [token for token in tokens if any(token in text for text in texts)]
    if found:
        raise DataError(
            "a text must not contain a media placeholder token",
            value=f"sample {name}: {found[0]}",
            remedy="remove it; media are placed by the chat template",
        )


def _process(
    adapter: ModelAdapter, prompts: Sequence[_Prompt]
) -> tuple[dict[str, torch.Tensor], dict[str, list[list[int]]]]:
    """The processor's tensors of all media, and the tokens of each prompt without padding, by name."""
    kwargs: dict[str, Any] = {
        "text": [prompt.text for prompt in prompts],
        "padding": True,
        "padding_side": "left",
        "return_tensors": "pt",
    }
    # By prompt: some families treat one picture otherwise than several.
    if any(images := [prompt.images for prompt in prompts]):
        kwargs["images"] = images
        if (size := _image_size(adapter)) is not None:
            kwargs["images_kwargs"] = {"size": size}
    if waveforms := [_checked_waveform(adapter, sound, prompt.name) for prompt in prompts for sound in prompt.sounds]:
        kwargs["audio"] = waveforms
        kwargs["audio_kwargs"] = {"sampling_rate": adapter.processor.feature_extractor.sampling_rate}
    if clips := [clip for prompt in prompts for clip in prompt.clips]:
        kwargs |= _clips(clips, [prompt.name for prompt in prompts if prompt.clips])
    features = {name: value for name, value in adapter.processor(**kwargs).items() if isinstance(value, torch.Tensor)}
    present = features.pop("attention_mask").bool()
    rows = {
        name: [row[real].tolist() for row, real in zip(features.pop(name), present, strict=True)]
        for name in ("input_ids", "mm_token_type_ids")
        if name in features
    }
    return features, rows


def _prompt(adapter: ModelAdapter, sample: Sample) -> _Prompt:
    if sample.is_prose:
        return _Prompt(sample.id, sample.answer)
    if sample.choices:
        return _Prompt(sample.id, sample.question)
    parts: list[Part] = []
    if sample.image is not None:
        parts.append(decode_image(sample))
    if sample.audio is not None:
        waveform, rate = decode_waveform(sample)
        own = adapter.processor.feature_extractor.sampling_rate
        if rate != own:
            raise DataError(
                f"audio must be sampled at {own} Hz",
                value=f"sample {sample.id}: {rate} Hz",
                remedy="resample it when the data set is written",
            )
        parts.append(Sound(waveform, rate))
    if sample.question:
        parts.append(sample.question)
    return _spoken(adapter, Conversation(sample.id, (Turn("user", tuple(parts)),)))


def _spoken(adapter: ModelAdapter, conversation: Conversation) -> _Prompt:
    """The chat template around the turns; the answer comes next."""
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": kind_of(part)}
                for part in turn.parts
            ],
        }
        for turn in conversation.turns
    ]
    text = adapter.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    by_kind: dict[str, list[Any]] = {"text": [], "image": [], "audio": [], "video": []}
    for part in conversation.parts:
        by_kind[kind_of(part)].append(part)
    return _Prompt(conversation.id, text, by_kind["image"], by_kind["audio"], by_kind["video"])


def _clips(clips: Sequence[Clip], names: Sequence[str]) -> dict[str, Any]:
    """Frames as the processor takes them. Omni's reads one speed for the whole batch, VL's the speed of each clip."""
    speeds = {clip.fps for clip in clips}
    if len(speeds) > 1:
        raise DataError(
            "all videos of a batch must have one speed",
            value=f"samples {', '.join(names)}: {', '.join(f'{fps:g}' for fps in sorted(speeds))} frames a second",
            remedy="set the batch size to 1, or sample frames at one speed",
        )
    known = [
        {"fps": clip.fps, "total_num_frames": len(clip.frames), "frames_indices": list(range(len(clip.frames)))}
        for clip in clips
    ]
    return {
        "videos": [clip.frames for clip in clips],
        "videos_kwargs": {"do_sample_frames": False, "fps": speeds.pop(), "video_metadata": known},
    }


def _image_size(adapter: ModelAdapter) -> dict[str, int] | None:
    """The pixel budget as the image processor takes it, None for its own."""
    if adapter.min_pixels is None and adapter.max_pixels is None:
        return None
    own = adapter.processor.image_processor.size
    if "shortest_edge" not in own:
        raise ModelError(
            "a pixel budget needs an image processor that resizes to one",
            value=f"{type(adapter.processor.image_processor).__name__} resizes to {dict(own)}",
            remedy="leave model.min_pixels and model.max_pixels out",
        )
    return {
        "shortest_edge": own["shortest_edge"] if adapter.min_pixels is None else adapter.min_pixels,
        "longest_edge": own["longest_edge"] if adapter.max_pixels is None else adapter.max_pixels,
    }


def _checked_waveform(adapter: ModelAdapter, sound: Sound, name: str) -> np.ndarray:
    """The waveform at the model's rate, neither too short for a token nor cut off by the feature extractor."""
    extractor = adapter.processor.feature_extractor
    waveform, rate = sound.at(extractor.sampling_rate).waveform, extractor.sampling_rate
    shortest = MIN_FRAMES * extractor.hop_length
    if not shortest <= len(waveform) <= extractor.n_samples:
        raise DataError(
            f"audio must last between {shortest / rate:g} and {extractor.n_samples / rate:g} seconds "
            "(the feature extractor cuts longer sound off without a word)",
            value=f"sample {name}: {len(waveform) / rate:g} s",
            remedy="cut the recording, or use a processor with a longer chunk_length",
        )
    return waveform
