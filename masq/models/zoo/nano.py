"""Random models with the real classes and tiny odd sizes, built in memory in about a second: the unit tests' models.

``nano_vl`` ties its head to its embeddings, ``nano_omni`` does not; both have nonzero biases, norms that are not ones
and grouped-query attention. Nothing is read from disk and nothing is random but by the seed. The models of further
families are in files of their own beside this one.
"""

from __future__ import annotations

import importlib
import io
import math
from typing import TYPE_CHECKING, Any

import torch

from masq.errors import unknown_name
from masq.models.base import Sample
from masq.models.zoo import embedded_name, published

if TYPE_CHECKING:
    from pathlib import Path

    from masq.models.config import ModelConfig

NAMES = ("nano_vl", "nano_omni")
FURTHER = {
    "nano_internvl": "masq.models.zoo.nano_internvl",
    "nano_llava_onevision": "masq.models.zoo.nano_llava_onevision",
    "nano_qwen2_audio": "masq.models.zoo.nano_qwen2_audio",
    "nano_qwen3_vl": "masq.models.zoo.nano_qwen3_vl",
}
"""Models of further families by name: modules with ``make(tied, attention)`` and whether the head is tied, ``TIED``."""
RATE = 16000
PATCH = 4
MIN_PIXELS, MAX_PIXELS = 4 * (2 * PATCH) ** 2, 24 * (2 * PATCH) ** 2
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 277,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 4 * PATCH,
    "fullatt_block_indexes": [1],
    "out_hidden_size": SIZES["hidden_size"],
}
AUDIO = {
    "num_mel_bins": 20,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "d_model": 32,
    "max_source_positions": 100,
    "n_window": 20,
    "output_dim": SIZES["hidden_size"],
}
SPECIAL_TOKENS = {
    "nano_vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    },
    "nano_omni": {
        "image_token": "<|IMAGE|>",
        "video_token": "<|VIDEO|>",
        "audio_token": "<|AUDIO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    },
}


def build(name: str, *, seed: int = 0, tied: bool | None = None, attention: str = "sdpa") -> tuple[Any, Any]:
    """A random float32 model on the CPU and its processor.

    Args:
        name: one of ``NAMES`` or ``FURTHER``.
        seed: of the weights.
        tied: whether the head is the embeddings; None for what the model's file says (of ``NAMES``, ``nano_vl`` only).
        attention: "sdpa" or "eager".

    Raises:
        ConfigError: unknown name.
    """
    if name in FURTHER:
        module = importlib.import_module(FURTHER[name])
        model, processor = module.make(module.TIED if tied is None else tied, attention)
    elif name in NAMES:
        processor = _build_processor(name)
        make = _build_vl if name == "nano_vl" else _build_omni
        model = make(processor.tokenizer, (name == "nano_vl") if tied is None else tied, attention)
    else:
        raise unknown_name("nano model", name, (*NAMES, *FURTHER))
    _randomize(model, seed)
    return model.eval(), processor


def text_config(tokenizer: Any, tied: bool) -> dict[str, Any]:
    """Keyword arguments of a Qwen2-style language model's configuration, of ``SIZES``."""
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    return {**SIZES, **ids, "rope_parameters": dict(ROPE), "rms_norm_eps": 1e-6, "tie_word_embeddings": tied}


def _build_vl(tokenizer: Any, tied: bool, attention: str) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=text_config(tokenizer, tied),
        vision_config=dict(VISION),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
        tie_word_embeddings=tied,
    )
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention, dtype=torch.float32)


def _build_omni(tokenizer: Any, tied: bool, attention: str) -> Any:
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    # The class declares no such fields, yet its positions of images are computed from them.
    vision_ids: dict[str, Any] = {
        "vision_start_token_id": tokenizer.vision_bos_token_id,
        "vision_end_token_id": tokenizer.vision_eos_token_id,
    }
    config = Qwen2_5OmniThinkerConfig(
        text_config=text_config(tokenizer, tied),
        vision_config=dict(VISION),
        audio_config=dict(AUDIO),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        audio_token_index=tokenizer.audio_token_id,
        audio_start_token_id=tokenizer.audio_bos_token_id,
        audio_end_token_id=tokenizer.audio_eos_token_id,
        tie_word_embeddings=tied,
        **vision_ids,
    )
    return Qwen2_5OmniThinkerForConditionalGeneration._from_config(
        config, attn_implementation=attention, dtype=torch.float32
    )


@torch.no_grad()
def _randomize(model: Any, seed: int) -> None:
    """Seeded weights: matrices that keep the scale of their input, so that every block matters, and generic biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(1 + 0.2 * noise)


def build_tokenizer(tokens: dict[str, str], template: str) -> Any:
    """A byte-level tokenizer over the 256 bytes without merges, with ChatML and media tokens.

    Args:
        tokens: special tokens by attribute name.
        template: for chats.
    """
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(alphabet)},
        merges=[],
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        extra_special_tokens=dict(tokens),
        model_max_length=SIZES["max_position_embeddings"],
        padding_side="left",
    )
    tokenizer.chat_template = template
    return tokenizer


def wrapped_media(tokens: dict[str, str]) -> dict[str, str]:
    """What stands for each medium in a chat: its token between its begin and end tokens."""
    media = {"image": ("vision", "image"), "video": ("vision", "video"), "audio": ("audio", "audio")}
    return {
        kind: tokens[f"{wrap}_bos_token"] + tokens[f"{token}_token"] + tokens[f"{wrap}_eos_token"]
        for kind, (wrap, token) in media.items()
        if f"{token}_token" in tokens
    }


def chat_template(media: dict[str, str]) -> str:
    """ChatML as Qwen writes it, with ``media`` in place of each medium."""
    branches = "".join(f"{{% elif part.type == '{kind}' %}}{text}" for kind, text in media.items())
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}" + branches + "{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _build_processor(name: str) -> Any:
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2_5OmniProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    size: dict[str, Any] = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    geometry: dict[str, Any] = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    template = chat_template(wrapped_media(SPECIAL_TOKENS[name]))
    parts: dict[str, Any] = {
        "image_processor": Qwen2VLImageProcessor(size=dict(size), **geometry),
        "video_processor": Qwen2VLVideoProcessor(size=dict(size), do_sample_frames=False, **geometry),
        "tokenizer": build_tokenizer(SPECIAL_TOKENS[name], template),
    }
    if name == "nano_vl":
        return Qwen2_5_VLProcessor(**parts, chat_template=template)
    extractor = WhisperFeatureExtractor(feature_size=AUDIO["num_mel_bins"], sampling_rate=RATE, chunk_length=2)
    return Qwen2_5OmniProcessor(**parts, feature_extractor=extractor, chat_template=template)


def random_samples(
    modalities: tuple[str, ...], num_samples: int, *, seed: int = 0, answer: str | None = None
) -> list[Sample]:
    """Samples with random media and texts of mixed lengths.

    Args:
        modalities: media of every sample, of "vision" and "audio"; none of them gives text questions.
        num_samples: how many.
        seed: of the content.
        answer: the answer of every sample; random letters by default.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = "-".join(modalities) or "text"
    return [
        Sample(
            id=f"{kinds}-{seed}-{index}",
            task=kinds,
            question=_letters(generator, 3, 12),
            answer=_letters(generator, 2, 5) if answer is None else answer,
            image=_random_image(generator) if "vision" in modalities else None,
            audio=_random_audio(generator) if "audio" in modalities else None,
        )
        for index in range(num_samples)
    ]


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _letters(generator: torch.Generator, low: int, high: int) -> str:
    length = _integer(generator, low, high)
    return "".join(chr(ord("a") + int(code)) for code in torch.randint(26, (length,), generator=generator))


def _random_image(generator: torch.Generator) -> bytes:
    from PIL import Image

    height, width = (_integer(generator, 16, 40) for _ in range(2))
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _random_audio(generator: torch.Generator) -> bytes:
    import soundfile

    waveform = 0.3 * torch.randn(_integer(generator, RATE // 10, RATE // 2), generator=generator)
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform.clamp(-1, 1).numpy(), RATE, format="FLAC")
    return buffer.getvalue()


def load(config: ModelConfig) -> tuple[Any, Any]:
    """The nano model that ``config.source`` names, in the configured precision."""
    model, processor = build(embedded_name(config.source) or "", attention=config.attention)
    return model.to(getattr(torch, config.dtype)), processor


def save_published(
    name: str, folder: Path, max_shard_size: int, *, seed: int = 0, tied: bool | None = None
) -> tuple[Any, Any]:
    """Write a nano model in the on-disk layout in which Qwen publishes the real ones (see ``zoo/published.py``).

    Args:
        name: "nano_vl" or "nano_omni".
        folder: created if need be.
        max_shard_size: bytes of a shard; it holds at least one tensor.
        seed: of the weights.
        tied: see ``build``.

    Returns:
        The model and the processor that were written.
    """
    model, processor = build(name, seed=seed, tied=tied)
    published.write(model, processor, folder, max_shard_size)
    return model, processor
