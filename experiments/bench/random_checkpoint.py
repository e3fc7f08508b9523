"""Checkpoints with the configurations of Qwen2.5-VL and Qwen2.5-Omni, to the last size, and random weights.

In the layout in which Qwen publishes the real ones, in bfloat16 and several shards; the tokenizer is that of the
embedded models, whose ids are a part of the vocabulary. Memory holds one tensor at a time.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from masq.export.shards import write_portions
from masq.models.zoo import published, smol_omni

log = logging.getLogger(__name__)

_POOL = 40_000_003
SHARD_BYTES = 2_000_000_000
_SIZES_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
_SIZES_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
_AUDIO = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
    "n_window": 100,
}
SHAPES: dict[str, tuple[dict[str, int], bool, bool]] = {
    "qwen2_5_vl_3b": (_SIZES_3B, False, True),
    "qwen2_5_omni_3b": (_SIZES_3B, True, False),
    "qwen2_5_vl_7b": (_SIZES_7B, False, False),
}
"""Sizes of the language model, whether there is an audio tower, whether the head is the embeddings."""


def model_of(name: str, blocks: int | None = None) -> Any:
    """The model, without weights.

    Args:
        name: one of ``SHAPES``, as its file in ``conf/model`` is called.
        blocks: only so many decoder blocks; None for all of them.
    """
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
    )

    sizes, has_audio, tied = SHAPES[name]
    tokenizer = smol_omni.build_processor().tokenizer
    text = {
        **sizes,
        "num_hidden_layers": blocks or sizes["num_hidden_layers"],
        **{f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")},
        "max_position_embeddings": 32768 if has_audio else 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": tied,
    }
    vision = {**_VISION, "out_hidden_size": sizes["hidden_size"]}
    ids = {f"{one}_token_{{}}": getattr(tokenizer, f"{one}_token_id") for one in ("image", "video")}
    ends = {f"vision_{end}_token_id": getattr(tokenizer, f"vision_{kind}_token_id") for end, kind in _ENDS.items()}
    common: dict[str, Any] = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied, **ends}
    model_class, config_class, suffix = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, "id"
    if has_audio:
        model_class, config_class = Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniThinkerConfig
        suffix = "index"
        common |= {f"audio_{end}_token_id": getattr(tokenizer, f"audio_{kind}_token_id") for end, kind in _ENDS.items()}
        common |= {
            "audio_config": {**_AUDIO, "output_dim": sizes["hidden_size"]},
            "audio_token_index": tokenizer.audio_token_id,
        }
    config = config_class(**common, **{key.format(suffix): value for key, value in ids.items()})
    with torch.device("meta"):
        return model_class._from_config(config, dtype=torch.bfloat16)


_ENDS = {"start": "bos", "end": "eos"}


def processor_of(name: str) -> Any:
    """The processor: tokenizer and template of the embedded models, pictures and sounds as the towers take them."""
    from transformers import Qwen2_5_VLProcessor, Qwen2_5OmniProcessor, WhisperFeatureExtractor

    found: Any = smol_omni.build_processor()
    parts = {"image_processor": found.image_processor, "video_processor": found.video_processor}
    if not SHAPES[name][1]:
        return Qwen2_5_VLProcessor(**parts, tokenizer=found.tokenizer, chat_template=smol_omni.CHAT_TEMPLATE)
    rate = found.feature_extractor.sampling_rate
    extractor = WhisperFeatureExtractor(feature_size=_AUDIO["num_mel_bins"], sampling_rate=rate)
    return Qwen2_5OmniProcessor(
        **parts, tokenizer=found.tokenizer, feature_extractor=extractor, chat_template=smol_omni.CHAT_TEMPLATE
    )


def tensors_of(model: Any, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random weights, one at a time: matrices that keep the scale of their input, norms near one, small biases.

    All are cut from one pool of random numbers at random places: drawing billions takes longer than quantizing them.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL, generator=generator).bfloat16()
    for name, parameter in model.named_parameters():
        count, start = parameter.numel(), int(torch.randint(_POOL, (1,), generator=generator))
        noise = _cut(pool, start, count).view(parameter.shape)
        if parameter.dim() > 1:
            noise *= 1.0 / math.sqrt(parameter[0].numel())
        else:
            noise = 0.02 * noise + (0.0 if name.endswith("bias") else 1.0)
        yield {published.published_name(model, name): noise}


def _cut(pool: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """``count`` numbers of ``pool`` from ``start`` on, over its end and again, in memory of their own."""
    cut, filled = torch.empty(count, dtype=pool.dtype), 0
    while filled < count:
        piece = pool[start : start + count - filled]
        cut[filled : filled + len(piece)] = piece
        filled, start = filled + len(piece), 0
    return cut


def write(name: str, folder: Path, seed: int = 0, blocks: int | None = None) -> None:
    """Write a checkpoint.

    Args:
        name: one of ``SHAPES``.
        folder: to be made; 8 GB for a model of 3B, 17 GB for one of 7B.
        seed: of the weights.
        blocks: see ``model_of``.
    """
    model = model_of(name, blocks)
    published.write_description(model, processor_of(name), folder)
    names = [published.published_name(model, key) for key, _ in model.named_parameters()]
    write_portions(tensors_of(model, seed), folder, names, SHARD_BYTES, lambda _listing: {})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, help="only so many decoder blocks")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    write(options.name, options.folder, options.seed, options.blocks)
    log.info("%s: %s", options.name, options.folder)


if __name__ == "__main__":
    main()
