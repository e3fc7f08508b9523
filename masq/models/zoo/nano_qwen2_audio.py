"""nano_qwen2_audio: a tiny Qwen2-Audio."""

from __future__ import annotations

from typing import Any

import torch

from masq.models.zoo import nano

TIED = False
TOKENS = {name: text for name, text in nano.SPECIAL_TOKENS["nano_omni"].items() if name.startswith("audio_")}
AUDIO = {key: value for key, value in nano.AUDIO.items() if key not in ("n_window", "output_dim")}


def make(tied: bool, attention: str) -> tuple[Any, Any]:
    """The model, its weights still to be drawn, and its processor. The class never ties its head, ``tied`` or not."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    del tied
    template = nano.chat_template(nano.wrapped_media(TOKENS))
    tokenizer = nano.build_tokenizer(TOKENS, template)
    config = Qwen2AudioConfig(
        text_config={**nano.text_config(tokenizer, False), "model_type": "qwen2", "rope_parameters": nano.PLAIN_ROPE},
        audio_config={**AUDIO, "model_type": "qwen2_audio_encoder"},
        audio_token_index=tokenizer.audio_token_id,
    )
    model = Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation=attention, dtype=torch.float32)
    extractor = WhisperFeatureExtractor(
        feature_size=nano.AUDIO["num_mel_bins"], sampling_rate=nano.RATE, chunk_length=2
    )
    return model, Qwen2AudioProcessor(extractor, tokenizer, chat_template=template)
