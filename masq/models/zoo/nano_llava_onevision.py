"""nano_llava_onevision: a tiny LLaVA-OneVision whose pictures become a whole view, up to four crops, and row ends."""

from __future__ import annotations

from typing import Any

import torch

from masq.models.zoo import nano

TIED = False
TOKENS = {"image_token": "<image>", "video_token": "<video>"}
SIDE = 4 * nano.PATCH
GRIDS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
ASPECT = "anyres_max_9"
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": nano.PATCH,
    "vision_use_head": False,
}


def make(tied: bool, attention: str) -> tuple[Any, Any]:
    """The model, its weights still to be drawn, and its processor."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    processor = _processor()
    tokenizer = processor.tokenizer
    config = LlavaOnevisionConfig(
        text_config={**nano.text_config(tokenizer, tied), "model_type": "qwen2", "rope_parameters": nano.PLAIN_ROPE},
        vision_config=dict(VISION),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=GRIDS,
        vision_aspect_ratio=ASPECT,
        tie_word_embeddings=tied,
    )
    kwargs: dict[str, Any] = {"attn_implementation": attention, "dtype": torch.float32}
    return LlavaOnevisionForConditionalGeneration._from_config(config, **kwargs), processor


def _processor() -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    size = {"height": SIDE, "width": SIDE}
    template = nano.chat_template({"image": "<image>", "video": "<video>"})
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=dict(size), image_grid_pinpoints=GRIDS),
        nano.build_tokenizer(TOKENS, template),
        LlavaOnevisionVideoProcessor(size=dict(size), do_sample_frames=False),
        num_image_tokens=(SIDE // nano.PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=ASPECT,
        chat_template=template,
    )
