"""From samples to model inputs: decoded media, chat template, processor, left padding.

One path for every family: what differs between families is in their transformers processor.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch

from masq.errors import DataError, ModelError
from masq.models.base import EncodedBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from PIL import Image

    from masq.models.base import ModelAdapter, Sample

# Fewer mel frames than this pool to no audio token at all (two strides of two after a valid start).
MIN_FRAMES = 4


def decode_image(sample: Sample) -> Image.Image:
    """The sample's picture as RGB.

    Raises:
        DataError: there is none, or the bytes are not a picture that PIL reads.
    """
    from PIL import Image, UnidentifiedImageError

    if sample.image is None:
        raise DataError("the sample must have an image", value=sample.id)
    try:
        with Image.open(io.BytesIO(sample.image)) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(
            "an image must be a complete PNG or another format that Pillow reads",
            value=f"sample {sample.id}: {error}",
            remedy="write the data set again",
        ) from error


def decode_waveform(sample: Sample) -> tuple[np.ndarray, int]:
    """The sample's audio as float32 [num_samples], channels averaged, and its sampling rate in Hz.

    Raises:
        DataError: there is none, or the bytes are not a sound file that libsndfile reads.
    """
    import soundfile

    if sample.audio is None:
        raise DataError("the sample must have audio", value=sample.id)
    try:
        waveform_nc, rate = soundfile.read(io.BytesIO(sample.audio), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise DataError(
            "audio must be a complete FLAC, WAV or another format that libsndfile reads",
            value=f"sample {sample.id}: {error}",
            remedy="write the data set again",
        ) from error
    return waveform_nc.mean(axis=1), int(rate)


def encode(adapter: ModelAdapter, samples: Sequence[Sample], *, with_answer: bool) -> EncodedBatch:
    """Body of ``ModelAdapter.encode``; see there."""
    if not samples:
        raise DataError("a batch needs at least one sample", value=0)
    _check(adapter, samples)
    features = _process(adapter, samples)
    present = features.pop("attention_mask").bool()
    rows = {
        name: [row[real].tolist() for row, real in zip(features.pop(name), present, strict=True)]
        for name in ("input_ids", "mm_token_type_ids")
        if name in features
    }
    scored = [
        [sample.is_prose and position > 0 for position in range(len(row))]
        for sample, row in zip(samples, rows["input_ids"], strict=True)
    ]
    if with_answer:
        _append_answers(adapter, samples, rows, scored)
    inputs = {
        "input_ids": left_pad(rows["input_ids"], adapter.pad_id, torch.int64),
        "attention_mask": left_pad([[1] * len(row) for row in rows["input_ids"]], 0, torch.int64),
    }
    if "mm_token_type_ids" in rows:
        inputs["mm_token_type_ids"] = left_pad(rows["mm_token_type_ids"], 0, torch.int64)
    inputs |= features
    batch = EncodedBatch(inputs, adapter.modality_of(inputs), left_pad(scored, fill=False, dtype=torch.bool))
    return batch.to(adapter.model.device)


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


def _check(adapter: ModelAdapter, samples: Sequence[Sample]) -> None:
    """Refuse samples whose media the model does not take, and texts that contain a media placeholder."""
    names = [adapter.tokenizer.convert_ids_to_tokens(token_id) for token_id in adapter.placeholders()]
    for sample in samples:
        missing = sample.modalities - set(adapter.modalities)
        if missing:
            raise ModelError(
                "the model must take every modality of a sample",
                value=f"sample {sample.id} has {', '.join(sorted(m.name.lower() for m in missing))}; the model takes "
                + ", ".join(modality.name.lower() for modality in adapter.modalities),
                remedy="choose another model, or leave such samples out (modality=dual)",
            )
        texts = (sample.question, sample.answer, *sample.choices)
        found = [name for name in names if any(name in text for text in texts)]
        if found:
            raise DataError(
                "a text must not contain a media placeholder token",
                value=f"sample {sample.id}: {found[0]}",
                remedy="remove it; media are placed by the chat template",
            )


def _process(adapter: ModelAdapter, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """The processor's tensors for the prompts of ``samples``, left-padded."""
    kwargs: dict[str, Any] = {
        "text": [_prompt(adapter, sample) for sample in samples],
        "padding": True,
        "padding_side": "left",
        "return_tensors": "pt",
    }
    images = [decode_image(sample) for sample in samples if sample.image is not None]
    if images:
        kwargs["images"] = images
        if (size := _image_size(adapter)) is not None:
            kwargs["images_kwargs"] = {"size": size}
    waveforms = [_checked_waveform(adapter, sample) for sample in samples if sample.audio is not None]
    if waveforms:
        kwargs["audio"] = waveforms
    return {name: value for name, value in adapter.processor(**kwargs).items() if isinstance(value, torch.Tensor)}


def _prompt(adapter: ModelAdapter, sample: Sample) -> str:
    if sample.is_prose:
        return sample.answer
    if sample.choices:
        return sample.question
    content: list[dict[str, str]] = []
    if sample.image is not None:
        content.append({"type": "image"})
    if sample.audio is not None:
        content.append({"type": "audio"})
    if sample.question:
        content.append({"type": "text", "text": sample.question})
    return adapter.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def _image_size(adapter: ModelAdapter) -> dict[str, int] | None:
    """The pixel budget as the image processor takes it, None for its own."""
    if adapter.min_pixels is None and adapter.max_pixels is None:
        return None
    own = adapter.processor.image_processor.size
    return {
        "shortest_edge": own["shortest_edge"] if adapter.min_pixels is None else adapter.min_pixels,
        "longest_edge": own["longest_edge"] if adapter.max_pixels is None else adapter.max_pixels,
    }


def _checked_waveform(adapter: ModelAdapter, sample: Sample) -> np.ndarray:
    """The waveform, at the model's rate and neither too short for a token nor cut off by the feature extractor."""
    extractor = adapter.processor.feature_extractor
    waveform, rate = decode_waveform(sample)
    if rate != extractor.sampling_rate:
        raise DataError(
            f"audio must be sampled at {extractor.sampling_rate} Hz",
            value=f"sample {sample.id}: {rate} Hz",
            remedy="resample it when the data set is written",
        )
    shortest = MIN_FRAMES * extractor.hop_length
    if not shortest <= len(waveform) <= extractor.n_samples:
        raise DataError(
            f"audio must last between {shortest / rate:g} and {extractor.n_samples / rate:g} seconds "
            "(the feature extractor cuts longer sound off without a word)",
            value=f"sample {sample.id}: {len(waveform) / rate:g} s",
            remedy="cut the recording, or use a processor with a longer chunk_length",
        )
    return waveform
